r"""Converts weights from Hugging Face's format into a workdir and back, and a
dense model into a mixture of experts.

  python -m tools.convert import DIR_OR_FILE WORKDIR [--dtype=bfloat16] \
      [--adapter=PEFT_DIR]
  python -m tools.convert export WORKDIR DIR [--step=N] [--dtype=bfloat16] \
      [--dropless]
  python -m tools.convert export WORKDIR DIR --adapter [--step=N] [--dtype=...]
  python -m tools.convert upcycle WORKDIR_OR_DIR WORKDIR \
      [--moe num_experts=8 top_k=2 every=2 ...]
  python -m tools.convert gguf FILE.gguf DIR

`import` and `upcycle` make a workdir that eval.py reads like that of any run.
train.py continues in it, given its config, and a new run starts from it with
--config.init_from=WORKDIR. transformers loads what `export` writes. `upcycle`
copies the dense network of a layer to all of its experts and initialises a
router (training/hf/upcycling.py); --moe takes fields of config.model.moe, and
low-rank adapters are added to the weights first.
`export` adds the low-rank adapters of a run to its weights (Hu et al. 2021).
With --adapter, it writes the adapters alone, as PEFT's folders have them, and
`import` reads such a folder beside that of the model.
`gguf` makes a Hugging Face folder of a GGUF file, by transformers.
hf://ORG/NAME in the place of a Hugging Face folder is a repository of the hub:
it is downloaded, or uploaded to; one that is new is private. An export has a
model card (README.md), whose licence is yours to fill in.

A config.json with a value that no architecture here honours is refused, and the
sentence names the field. With --partial, parameters that the files lack are
initialised at random and listed. A BertModel or BertForMaskedLM needs no
--partial: the heads that it has not are new, and said so.

Tokenizer files and the chat template are copied both ways, except into a bucket
(a WORKDIR like gs://BUCKET/NAME), because they are only read from disk. What
generation needs, the ids of the tokens that begin, end and pad a text and
generation_config.json, is kept from import to export. A run that was not
imported gets them from its tokenizer, and a run that learned to chat also gets
the template of its conversations.
"""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import json
import pathlib
import sys
from typing import Any

from etils import epath
import numpy as np

import architectures
from architectures.parts.moe.routing import MoEConfig
from common.errors import RequestError, require, shorten
from common.fields import check_number
from configs import base
from training import cli, hub, objectives, parameters, progress, runs
from training.data import tokenizers
from training.distributed import cpu
from training.hf import card, generation as hf_generation, peft
from training.hf import config as hf_config, files as hf_files
from training.hf import tokenizer as hf_tokenizer, upcycling, weights
from training.workdir import checkpoints, run_config, storage


def import_model(source: pathlib.Path, workdir: epath.Path, *, partial: bool,
                 seed: int, adapter: pathlib.Path | None = None,
                 dtype: str = '') -> None:
  """Imports weights in Hugging Face's format: makes the folder of a run (its
  workdir) at step 0, which can be evaluated or trained further.

  Args:
    source: the folder of the weights, or one of its files.
    workdir: the folder to make.
    partial: whether to initialise at random the parameters that the files lack.
    seed: the seed of this initialisation.
    adapter: a folder of low-rank adapters in PEFT's format to import as well,
      or None.
    dtype: the type of the parameters; '' stands for float32.
  """
  with _make_workdir(workdir):
    # Load the model, and add the adapters.
    config, module, params = _load_from_hugging_face(
        source, partial=partial, seed=seed, dtype=dtype)
    if adapter:
      model, adapters = peft.read_adapters(module.config, adapter)
      config.model.lora.update(dataclasses.asdict(model.lora))
      params = weights.add_adapters(params, adapters)

    # Copy the tokenizer. Without one that can be read, the run has a stand-in
    # with as many ids.
    folder = _folder_of_source(source)
    copied = hf_tokenizer.import_tokenizer(folder, workdir, config)
    if hf_tokenizer.is_stand_in(config.data.tokenizer):
      copied_files = ''
      if copied:
        copied_files = f', though {", ".join(copied)}'
      print(f'warning: {folder} has no tokenizer that is read '
            f'here{copied_files}: '
            f'data.tokenizer is {config.data.tokenizer!r}, whose ids mean '
            'something else than those of its training', file=sys.stderr)

    _write_workdir(workdir, config, params=params,
                   generation=hf_generation.read_generation(folder),
                   trained=False, origin=f'of {module.config.arch}')


def upcycle(source: epath.Path, workdir: epath.Path, *, moe: list[str],
            step: int | str | None, seed: int) -> None:
  """Makes the workdir of a run at step 0 whose model is a mixture of experts
  with the weights of a dense model (Komatsuzaki et al. 2023).

  Args:
    source: the dense model: the workdir of a run, or a folder in Hugging Face's
      format.
    workdir: the workdir to make.
    moe: words 'FIELD=VALUE' with fields of config.model.moe, and 'every=N'.
    step: the step of the checkpoint if the dense model is of a run; None: the
      newest one.
    seed: the seed of the routers.
  """
  with _make_workdir(workdir):
    # Load the dense model, of a run or of a Hugging Face folder.
    folder = _folder_of_source(source)
    if checkpoints.checkpoint_folder(source).exists():
      config, module, params, loaded_step = _load_from_workdir(source, step)
      generation = hf_generation.load_generation(source)
      trained = not hf_generation.is_published(source, loaded_step)
    else:
      require(step is None, f'{source} is no workdir: it has no step {step}')
      config, module, params = _load_from_hugging_face(
          source, partial=False, seed=seed)
      generation = hf_generation.read_generation(folder)
      trained = False

    # Make the config of the mixture. Adapters are merged into the weights.
    module, params = weights.merge_adapters(module, params)
    config.model.lora = base.base().model.lora
    config.model = upcycling.upcycle_config(
        config.model, upcycling.parse_moe_fields(moe, config.model.moe),
        module.config)
    config.init_from = ''
    hf_tokenizer.import_tokenizer(folder, workdir, config)

    # Copy the dense weights to the experts, and initialise the routers.
    model, derived = _resolve_model(config)
    run = runs.build(config, model)
    mixture_params = upcycling.upcycle_parameters(
        run.module, like=run.abstract_state.params, dense=params, seed=seed)
    if not upcycling.keeps_function(run.model):
      print('warning: it starts from another function than the dense model\'s: '
            'its gates do not sum to 1, or tokens are dropped, or experts are '
            'shared', file=sys.stderr)
    num_dense = runs.count_parameters(params)
    _write_workdir(
        workdir, config, params=mixture_params, generation=generation,
        trained=trained,
        origin=f'of {run.model.arch}, from the {num_dense:,} of {source}',
        derived=derived)


def export(workdir: epath.Path, folder: pathlib.Path, *, step: int | str | None,
           dtype: str = '', dropless: bool = False,
           adapter: bool = False) -> None:
  """Writes a checkpoint of a run to a folder in Hugging Face's format.

  Args:
    workdir: the folder of the run.
    folder: the folder to write.
    step: the step of the checkpoint; None: the newest one.
    dtype: the type of the weights; '': that of the parameters.
    dropless: whether to write a model whose experts take every token, although
      the run's own evaluation drops some. config.json cannot express that.
    adapter: whether to write only the low-rank adapters, in PEFT's format.
  """
  storage.refuse_folder_of_run(folder, 'FOLDER')
  require(not (adapter and dropless), '--dropless has no meaning with '
          '--adapter, which writes the adapters alone: leave it out')
  config, module, params, step = _load_from_workdir(workdir, step)

  # Adapters are written by themselves, or merged into the weights.
  if adapter:
    num_parameters = peft.write_adapters(
        module.config, params=params, folder=folder, base=config.init_from,
        dtype=dtype)
    print(f'{folder}: the adapters of {workdir}, {num_parameters:,} parameters')
    return
  module, params = weights.merge_adapters(module, params)

  # Write the weights, the tokenizer and a model card.
  if dropless:
    module = architectures.build(module.config.with_part(
        MoEConfig, eval_capacity_factor=0.0, dispatch='dropless'))
  generation = _generation_of_export(workdir, config, model=module.config,
                                     step=step)
  hf_tokenizer.refuse_files_left(workdir, config, folder=folder, step=step)
  weights.to_hf(module, params, folder, dtype=dtype, generation=generation,
                labels=run_config.load_labels(workdir))
  hf_tokenizer.export_tokenizer(workdir, config, folder=folder, step=step)
  card.write_model_card(workdir, config, folder=folder, step=step,
                        num_parameters=runs.count_parameters(params))
  print(f'{folder}: {runs.count_parameters(params):,} parameters of {workdir}')


def convert_gguf(file: pathlib.Path, folder: pathlib.Path) -> None:
  """Converts a GGUF file to a folder in Hugging Face's format, by transformers.

  Quantised weights are written as the float32 numbers that they stand for. If
  anything is refused, no folder is made.

  Args:
    file: the GGUF file.
    folder: the folder to write.

  Raises:
    RequestError: if transformers does not read all weights of the file, or if
      an import would refuse the folder, as it does with that of a damaged file.
  """
  # Check the file, and import packages that are not installed by default.
  storage.refuse_folder_of_run(folder, 'DIR')
  require(file.is_file() and file.open('rb').read(4) == b'GGUF',
          f'{file} is no GGUF file: it does not begin with GGUF')
  try:
    gguf = importlib.import_module('gguf')  # which transformers imports late
    import torch
    import transformers
  except ImportError as error:
    raise RequestError('a GGUF file is read by the packages torch, '
                       "transformers and gguf: pip install 'archetype[verify]' "
                       'gguf') from error
  where = dict(pretrained_model_name_or_path=str(file.parent),
               gguf_file=file.name)

  # The tokenizer and the model, as transformers reads them.
  try:
    tensors = gguf.GGUFReader(file).tensors
    layers = transformers.AutoConfig.from_pretrained(**where).num_hidden_layers
    require(layers <= len(tensors), f'{file} says that it has {layers} layers, '
            f'and has {len(tensors)} tensors')  # each would be built
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, output_loading_info=True)
    num_elements = sum(  # config.json has what is left out
        int(x.n_elements) for x in tensors if not x.name.startswith('rope_'))
  except RequestError:
    raise
  except Exception as error:  # a damaged file ends its readers anywhere
    raise RequestError(f'transformers does not read {file}: '
                       f'{type(error).__name__}: '
                       + ' '.join(str(error).split())[:200]) from error

  # All tensors of the file must have been read.
  for list_name in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    names = loaded[list_name]
    require(not names, f'{file} is not a whole model: of its tensors '
            f'transformers names as {list_name} {shorten(sorted(names))}')
  # These lists do not have all of them: transformers passes over names that it
  # does not know, and ties weights that it has not found. So the numbers of
  # weights are compared, of tied ones once.
  size_of_storage = {x.data_ptr(): x.numel()
                     for x in model.state_dict().values()}
  num_read = sum(size_of_storage.values())
  require(num_read == num_elements, f'{file} has {num_elements:,} weights, of '
          f'which transformers reads {num_read:,}: it does not know the name '
          'of a tensor')

  # The weights are no longer quantised. save_pretrained would refuse a model
  # that still says so.
  model.hf_quantizer = None
  if hasattr(model.config, 'quantization_config'):
    del model.config.quantization_config
  # A GGUF file has 1e-5 as the float32 nearest to it, 9.9999997e-6.
  for name, value in vars(model.config).items():
    if isinstance(value, float):
      setattr(model.config, name, float(str(np.float32(value))))

  # The config of a damaged file may be one that an import refuses.
  try:
    hf_config.model_of_config_json(json.loads(model.config.to_json_string()))
  except RequestError as error:
    raise RequestError(f'{file} gives a folder that an import refuses: {error}'
                       ) from error
  tokenizer.save_pretrained(folder)
  model.save_pretrained(folder)
  print(f'{folder}: {sum(x.numel() for x in model.parameters()):,} parameters '
        f'of {file}')


def _folder_of_source(source: Any) -> Any:
  """Returns the folder of a model. `source` is the folder or a file in it."""
  return source.parent if source.is_file() else source


def _generation_of_export(workdir: epath.Path, config: Any, model: Any,
                          step: int) -> hf_generation.Generation:
  """Returns the settings of generation of an exported run: the ids of the
  tokens that begin, end and pad a text, and the fields of
  generation_config.json.

  An imported run has kept those that its model was published with. Any other
  run gets them from its tokenizer.

  Args:
    workdir: the folder of the run.
    config: the config of the run.
    model: the config of its model.
    step: the step of the checkpoint.
  """
  # The kept settings are wrong for one kind of run: it was imported without its
  # tokenizer, so that another one stands in, whose ids mean something else, and
  # then it was trained further, on these ids.
  kept = hf_generation.load_generation(workdir)
  if kept and (hf_generation.is_published(workdir, step)
               or not hf_tokenizer.is_stand_in(config.data.tokenizer)):
    return kept
  return hf_generation.generation_of_run(config, model,
                                         tokenizers.load(config.data.tokenizer))


@contextlib.contextmanager
def _make_workdir(workdir: epath.Path) -> Iterator[None]:
  """Gives a context in which the workdir of a run is made. If the body of the
  context fails, the files that it wrote are removed, so that the next attempt
  is not refused.

  Args:
    workdir: the workdir to make.

  Raises:
    RequestError: if the folder already holds a run.
  """
  require(not (storage.has_config(workdir) or run_config.has_begun(workdir)),
          f'{workdir} holds a run already: choose another WORKDIR')
  storage.refuse_folder_of_others(workdir, 'WORKDIR')

  # Files that were in the folder before stay there. Ctrl-C is a BaseException,
  # and must not leave half a workdir either.
  files_before = set(epath.Path(workdir).glob('*'))
  try:
    yield
  except BaseException:
    new_files = set(epath.Path(workdir).glob('*')) - files_before
    for path in new_files:
      if path.is_dir():
        path.rmtree()
      else:
        path.unlink()
    raise


def _load_from_hugging_face(source: pathlib.Path, partial: bool, seed: int,
                            dtype: str = ''):
  """Loads a model in Hugging Face's format.

  Args:
    source: the folder of the model, or one of its files.
    partial: whether to initialise parameters that the files lack at random.
    seed: the seed of these parameters.
    dtype: the type of the parameters; '': that of the model's config.

  Returns:
    The config of a run with this model, the Flax module, and its parameters.

  Raises:
    RequestError: for a config.json with a value that no architecture here
      honours, and, unless `partial`, for parameters that the files lack.
  """
  # Read config.json, and make the model that it describes.
  config_json = hf_config.load_config_json(_folder_of_source(source))
  files = hf_files.Files(source)
  model, _, notes = hf_config.read_config_json(config_json, files)
  for note in notes:
    print(f'warning: {note}', file=sys.stderr)
  model.param_dtype = dtype or model.param_dtype
  module = architectures.build(model)

  # Make the config of a run with this model, with an objective and labels that
  # suit its head.
  config = run_config.default_config_of_system(model.arch)
  config.model = model
  if model.head != objectives.find_objective(config).head:
    config.objective = objectives.find_objective_of_head(module.config)
  if model.head != 'lm':
    labels = hf_config.read_labels(config_json)
    if not labels and model.num_labels > 1:
      labels = hf_config.default_labels(model.num_labels)
    config.data.labels = labels or ()
  config.data.length = min(model.max_len, 1024)
  config.data.tokenizer = hf_tokenizer.stand_in_tokenizer(model.vocab_size)

  # Read the weights.
  loaded = weights.read_params(module, source=files, partial=partial, seed=seed)
  for line in loaded.skipped:
    print(f'skipped: {line}')
  return config, module, loaded.params


def _load_from_workdir(workdir: epath.Path, step: int | str | None):
  """Loads a checkpoint of a run.

  Args:
    workdir: the folder of the run.
    step: the step of the checkpoint; None: the newest one.

  Returns:
    The config of the run, the Flax module, its parameters, and the step of the
    checkpoint that was read.

  Raises:
    RequestError: where there is no such run or step.
  """
  config = runs.fit_mesh_to_this_machine(runs.load_run_config(workdir))
  run = runs.build(config, runs.load_run_model_config(workdir))
  restored = parameters.read_parameters_of_run(run, workdir, step)
  return config, run.module, restored.state, restored.step


def _resolve_model(config: Any):
  """Returns the config of a run's model, and those of its fields that were
  derived from the tokenizer and the data."""
  return runs.resolve_model(config, tokenizers.load(config.data.tokenizer))


def _write_workdir(workdir: epath.Path, config: Any, params: Any,
                   generation: hf_generation.Generation | None, trained: bool,
                   origin: str, derived=()) -> None:
  """Writes the workdir of a run at step 0, and prints a line about it.

  Args:
    workdir: the workdir to write.
    config: the config of the run.
    params: the parameters of its model.
    generation: the settings of generation; None: none are known.
    trained: whether the model was trained here after an import.
    origin: words for the printed line that say where the parameters are from.
    derived: the fields of the model's config that were derived, as pairs or a
      dict.
  """
  hf_generation.save_generation(workdir, generation, trained=trained)
  with progress.show_task('saving'), checkpoints.Checkpoints(
      workdir, every_steps=0, every_minutes=0.0, keep=1, keep_every=0) as saved:
    saved.save(0, {'params': params}, next_batch=0, tokens=0, config=config)
  # The config is written last, because a folder with a config counts as a run:
  # one whose import was cut short would begin without its parameters.
  run_config.save_config(workdir, config, dict(derived))
  print(f'{workdir}: {runs.count_parameters(params):,} parameters {origin}')
  print(f'to go on: {run_config.training_command(workdir, config)}')


_HELP_OF_STEP = ('of the checkpoint; best; of several, for the mean of their '
                 'parameters: 100,200 or last:5; the newest')


def _make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line, with a subcommand for each way to
  convert."""
  parser = cli.Parser(prog='python -m tools.convert', description=__doc__)
  add = parser.add_subparsers(dest='command', required=True).add_parser

  importer = add('import', help='Hugging Face to a workdir')
  importer.add_argument('source')
  importer.add_argument('workdir')
  importer.add_argument(
      '--partial', action='store_true',
      help='draw what the files lack, pass over what is extra')
  importer.add_argument('--seed', type=int, default=0, help='of what is drawn')
  importer.add_argument(
      '--dtype', default='', choices=('', 'float32', 'bfloat16'),
      help='of the parameters (model.param_dtype); float32')
  importer.add_argument('--adapter', metavar='PEFT_DIR', help='low-rank '
                        "adapters of the model, in PEFT's format")

  exporter = add('export', help='a workdir to Hugging Face')
  exporter.add_argument('workdir')
  exporter.add_argument('folder')
  exporter.add_argument('--step', help=_HELP_OF_STEP)
  exporter.add_argument('--dtype', default='', choices=(
      '', 'float32', 'bfloat16', 'float16'), help="the parameters' own")
  exporter.add_argument(
      '--dropless', action='store_true', help='as a model whose experts take '
      "every token, where the run's evaluation drops some that config.json "
      'cannot tell')
  exporter.add_argument(
      '--adapter', action='store_true', help='the low-rank adapters alone, in '
      "PEFT's format; else they are merged")

  upcycler = add('upcycle', help='a dense model to experts')
  upcycler.add_argument('source')
  upcycler.add_argument('workdir')
  upcycler.add_argument(
      '--moe', nargs='*', default=[], metavar='FIELD=VALUE',
      help='of config.model.moe; every=N: the last of every N layers has '
      'experts; default: each has')
  upcycler.add_argument('--step', help=_HELP_OF_STEP)
  upcycler.add_argument('--seed', type=int, default=0, help='of the routers')

  gguf = add('gguf', help='a GGUF file to Hugging Face')
  gguf.add_argument('source', type=pathlib.Path)
  gguf.add_argument('folder', type=pathlib.Path)
  return parser


def main() -> None:
  """Runs the conversion that the first word of the command line names: import,
  export, upcycle or gguf."""
  args = _make_parser().parse_args()

  # A GGUF file is converted without a run.
  if args.command == 'gguf':
    storage.check_folder_is_writable(args.folder, 'DIR')
    convert_gguf(args.source, args.folder)
    return

  # Only the threads are set: with configure_cpu(), freed memory would stay with
  # the process.
  cpu.set_number_of_threads()
  step = checkpoints.parse_step(getattr(args, 'step', None))
  args.workdir = storage.checked_path(args.workdir, 'WORKDIR')
  if args.command == 'export':
    with hub.open_destination(args.folder) as folder:
      storage.check_folder_is_writable(folder, 'FOLDER')
      export(args.workdir, folder=folder, step=step, dtype=args.dtype,
             dropless=args.dropless, adapter=args.adapter)
    return

  # import and upcycle make the workdir of a run.
  check_number('--seed', args.seed, (('>=', 0), ('<=', 2**32 - 1)))
  storage.check_folder_is_writable(args.workdir, 'WORKDIR')
  if args.command == 'import':
    adapter = args.adapter
    if adapter:
      adapter = pathlib.Path(hub.download_if_on_hub(adapter))
    source = pathlib.Path(hub.download_if_on_hub(args.source))
    import_model(
        source, workdir=args.workdir, adapter=adapter, partial=args.partial,
        seed=args.seed, dtype=args.dtype)
  else:
    dense = storage.checked_path(hub.download_if_on_hub(args.source), 'SOURCE')
    upcycle(dense, workdir=args.workdir, moe=args.moe, step=step,
            seed=args.seed)


if __name__ == '__main__':
  cli.run(main)
