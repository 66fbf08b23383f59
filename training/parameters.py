"""Where the parameters of a run come from: drawn, a checkpoint, or weights.

A run draws them, goes on from its own newest good checkpoint, or begins with
the weights of another training (init_from): a workdir, or Hugging Face's
format. Those must be of the same function, or of a language model's under the
head of a task: the head is drawn then, and what only the language model's head
needed is passed over. With init_partial what fits is taken, the rest is as it
was drawn, and every difference is listed.

What a checkpoint is evaluated with, exported and continued from are its
parameters; or their average, of a run with optim.ema, unless those that were
trained are asked for by `live`; or the mean of several checkpoints, where
several are named (checkpoints.Mean).

What reads the weights of another training is imported by the functions that do:
most runs begin without.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

from etils import epath
import flax.linen as nn
import jax
import jax.numpy as jnp

import architectures
from architectures.parts import paths
from architectures.parts import positions
from architectures.parts.config import ModelConfig
from architectures.parts.heads import GeneratorConfig
from common.errors import RequestError, require, short
from training import hub, objectives, runs
from training.data.tokenizers import Tokenizer
from training.distributed import devices
from training.objectives import pipeline
from training.workdir import checkpoints, provenance, run_config, storage

Step = int | str | checkpoints.Mean | None


def restore(run: runs.Run, saved: checkpoints.Checkpoints
            ) -> checkpoints.Restored | None:
  """Returns the newest good checkpoint of a run, and goes on from it; None
  where the run begins. One that tools.convert made has parameters alone: its
  state is that of a run before its first step with them."""
  if not checkpoints.steps(saved.directory):
    return None
  restored = checkpoints.restore(
      saved.directory,
      lambda arrays: None if checkpoints.parameters_alone(arrays) else
      run.abstract)
  if devices.primary():
    _warn(restored)
  if restored.state is None:
    restored = restored._replace(state=create(
        run, saved.directory.parent, restored.step))
    if devices.primary():
      print('starting from the parameters in this workdir')
  saved.go_on_from(restored)
  return restored


def _warn(restored: checkpoints.Restored) -> None:
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)


# From the weights of another training.


def create(run: runs.Run, source: str | epath.Path, step: int | None = None
           ) -> runs.TrainState:
  """Returns the state of a run before its first step.

  Args:
    run: the run.
    source: config.init_from; '' for none.
    step: of a workdir, which checkpoint; None: the newest good one.

  Raises:
    RequestError: for a source that is none, or of another model.
  """
  state = run.new_state()
  if not str(source):
    return state
  check_source(str(source))
  path = _path(source)
  _check_labels(run, path)
  if checkpoints.directory(path).exists():
    params, skipped = _from_workdir(run, path, state.params, step)
  else:
    params, skipped = _from_hugging_face(run, path, state.params)
  for line in skipped:
    print(f'skipped: {line}')
  return run.with_params(state, params)


def check_source(source: str) -> None:
  """Raises RequestError where config.init_from names nothing that is there."""
  path = _path(source)
  if source and not storage.in_bucket(path):
    require(os.path.exists(path),
            f'init_from is {source!r}: no such folder or file (one of the hub '
            'is hf://ORG/NAME)')
    require(not storage.has_config(path) or run_config.has_begun(path),
            f'init_from is {source!r}, the folder of a run that has no '
            'checkpoint')


def check_tokenizer(config: objectives.Config, ours: Tokenizer) -> None:
  """Raises RequestError where the ids of a run stand for other pieces of text
  than those for which the weights of config.init_from were trained, unless
  init_partial; their tokenizer is not compared where it cannot be read."""
  from training.data import tokenizers
  from training.hf import tokenizer as hf_tokenizer
  ignored = 'data.tokenizer' in objectives.of(config).ignores
  if not config.init_from or config.init_partial or ignored:
    return
  path = _path(config.init_from)
  if checkpoints.directory(path).exists():
    spec = run_config.load_config(path).data.tokenizer
    replaced = provenance.check_data(
        run_config.starts(path), pipeline.of_tokenizer(config, ours),
        allowed=True)
    require(not replaced, f'init_from is {config.init_from!r}, whose weights '
            f'were trained with what data.tokenizer {ours.name!r} held before '
            'it was replaced: put the file back, or pass '
            '--config.init_partial=True to take the weights all the same')
  elif hub.repository(config.init_from):
    spec = config.init_from
  else:
    spec = str(_folder(path))
  if spec == config.data.tokenizer or hf_tokenizer.is_stand_in(spec):
    return
  try:
    theirs = tokenizers.load(spec)
  except RequestError:
    return
  require(ours.vocabulary == theirs.vocabulary, f'init_from is '
          f'{config.init_from!r}, whose weights have another tokenizer than '
          f'data.tokenizer {ours.name!r}: pass --config.data.tokenizer={spec}, '
          'or --config.init_partial=True to take the weights all the same')


def _check_labels(run: runs.Run, source: epath.Path) -> None:
  """Raises RequestError where the outputs of the head that is taken stand for
  other labels than those of the run."""
  from training.hf import config as hf_config
  if run.model.head == 'lm' or run.config.init_partial:
    return
  if checkpoints.directory(source).exists():
    theirs = hf_config.meaningful_labels(run_config.labels(source))
  else:
    tree = hf_config.load_config_json(_folder(source))
    # That of a language model has a table that says nothing.
    theirs = hf_config.labels(tree) if hf_config.read(tree).head != 'lm' else ()
  ours = tuple(objectives.with_labels(run.config).data.labels)
  require(ours == theirs or not (ours and theirs), f'init_from {str(source)!r} '
          f'has the labels {short(", ".join(theirs))}, in this order, and the '
          f'run {short(", ".join(ours))}: set data.labels to the first')


def _path(source: str | epath.Path) -> epath.Path:
  return storage.path(hub.local(source), 'init_from')


def _folder(path: epath.Path) -> epath.Path:
  return path.parent if path.is_file() else path


def _from_hugging_face(run: runs.Run, source: epath.Path, drawn: Any
                       ) -> tuple[Any, list[str]]:
  """Returns (parameters, a line for each thing that was skipped). Low-rank
  adapters are those of the run, as they were drawn."""
  from training.hf import config as hf_config, files, weights
  module = architectures.build(weights.without_adapters(run.model))
  theirs = dataclasses.replace(  # optional heads are drawn or passed over
      hf_config.read(hf_config.load_config_json(_folder(source))),
      next_sentence=module.config.next_sentence)
  partial = run.config.init_partial
  skipped = _differences(module.config, theirs, source, partial)
  with run.context():
    loaded = weights.read_params(
        module, files.Files(pathlib.Path(source)), partial=partial,
        like=weights.without(run.abstract.params),
        seed=int(runs.initial_seed(run.config)),
        new_head=weights.is_new_head(module.config, theirs))
  return weights.beside(loaded.params, drawn), skipped + loaded.skipped


def _from_workdir(run: runs.Run, source: epath.Path, drawn: Any,
                  step: int | None) -> tuple[Any, list[str]]:
  """Returns (parameters, skipped) of the newest good checkpoint there, or of
  that of `step`. Its adapters are taken where they are those of this run; of a
  model without any, those of this run are as they were drawn."""
  from training.hf import weights
  theirs = runs.model_of(source)
  model, abstract, initial = run.model, run.abstract.params, drawn
  if not weights.same_adapters(model, theirs):
    require(not theirs.lora.rank, f'init_from is {str(source)!r}, whose model '
            'has other low-rank adapters than the run: begin with its export, '
            'which python -m tools.convert export writes')
    model = weights.without_adapters(model)
    abstract, initial = weights.without(abstract), weights.without(drawn)
  partial, folder = run.config.init_partial, checkpoints.directory(source)
  skipped = _differences(model, theirs, source, partial)
  wanted = {'params': abstract}
  saved = checkpoints.arrays(folder, step)
  drawn_by = theirs.find(GeneratorConfig)
  if saved and (partial or weights.is_new_head(model, theirs)):
    wanted, lines = _fitting(wanted, saved)
    require(not drawn_by or not drawn_by.num_layers
            or drawn_by.sharing == 'whole', f'init_from is '
            f'{str(source)!r}, whose table of tokens is the sum of two: begin '
            'with its export, which python -m tools.convert export writes')
    apart = weights.left_out(architectures.build(model), theirs) | (
        weights.left_out(architectures.build(theirs), model))
    wrong = [line for path, line in lines.items() if not (
        path.startswith(f'params/{weights.TASK}')
        or path.removeprefix('params/') in apart)]
    require(partial or not wrong, f'init_from {str(source)!r}: '
            + '; '.join(wrong) + '. To take what fits all the same: '
            '--config.init_partial=True')
    skipped += lines.values()
    require(wanted, f'init_from is {str(source)!r}, of which nothing fits this '
            'model')
  restored = of_checkpoint(folder, wanted['params'], step)
  if step is None:
    _warn(restored)
  params = checkpoints.nest(
      paths.flatten(initial) | paths.flatten(restored.state))
  return params if initial is drawn else weights.beside(params, drawn), skipped


def _fitting(wanted: Any, saved: dict[str, dict]
             ) -> tuple[dict, dict[str, str]]:
  """Returns what of `wanted` is in `saved` alike, and a line for each path of
  the rest."""
  flat = paths.flatten(wanted)
  lines = {name: line for name, line in checkpoints.differences(
      saved, flat).items() if name in flat or name.startswith('params/')}
  return checkpoints.nest({name: x for name, x in flat.items()
                           if name not in lines}), lines


def _differences(ours: ModelConfig, theirs: ModelConfig, path: epath.Path,
                 partial: bool) -> list[str]:
  """Returns a line for each field by which the weights in `path`, of the model
  `theirs`, are those of another function than `ours`; unless `partial`, one is
  a RequestError. The length may differ where no position is learned."""
  from training.hf import config as hf_config, weights
  if weights.is_new_head(ours, theirs):
    theirs = dataclasses.replace(theirs, head=ours.head, pooling=ours.pooling,
                                 num_labels=ours.num_labels)
  if ours.position == theirs.position and math.isinf(positions.reach(ours)):
    theirs = dataclasses.replace(theirs, max_len=ours.max_len)
  lines = [f'{line} as in its config.json'
           for line in hf_config.different(ours, theirs).values()]
  require(partial or not lines, f'init_from {str(path)!r}: {"; ".join(lines)}. '
          'Set these fields to begin with all of it, or take what fits all the '
          'same: --config.init_partial=True')
  return lines


# Of a checkpoint.


def of_checkpoint(folder: epath.Path, params: Any, step: Step = None, *,
                  live: bool = False) -> checkpoints.Restored:
  """Returns a checkpoint whose `state` are parameters.

  Args:
    folder: what checkpoints.directory(workdir) returns.
    params: which ones, as ShapeDtypeStructs with shardings.
    step: which checkpoint, or the mean of which; None: the newest good one.
    live: take the parameters themselves, where an average is kept as well.

  Raises:
    RequestError: there is no such checkpoint, or not of these parameters.
  """
  if isinstance(step, checkpoints.Mean):
    there = checkpoints.steps(folder)
    require(len(there) >= step.last, f'the mean of the last {step.last} '
            f'checkpoints was asked for, and {folder} has {len(there)}: '
            f'{", ".join(map(str, there)) or "none"}')
    steps = sorted(step.steps) or there[-step.last:]
    each = [of_checkpoint(folder, params, n, live=live) for n in steps]
    return each[-1]._replace(
        state=mean([one.state for one in each]),
        what=f'the mean of steps {", ".join(map(str, steps))}'
        + f', each {each[-1].what}' * bool(each[-1].what))

  def asked(saved: dict[str, Any]):
    leaves = {}
    for path, x in paths.flatten(params).items():
      if not live and f'ema/{path}' in saved:
        leaves[f'ema/{path}'] = jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=x.sharding)
      else:
        leaves[f'params/{path}'] = x
    return checkpoints.nest(leaves)

  restored = checkpoints.restore(folder, asked, step, partial=True)
  arrays = {path.partition('/')[2]: x
            for path, x in paths.flatten(restored.state).items()}
  return restored._replace(
      state=jax.tree_util.tree_map_with_path(
          lambda path, x: arrays[paths.join(path)].astype(x.dtype), params),
      what='the average (optim.ema)' if 'ema' in restored.state else '')


def mean(trees: Sequence[Any]):
  """Returns the mean of trees of parameters, taken in float32, in their own
  dtype."""
  def of(*leaves: jax.Array):
    total = sum(x.astype(jnp.float32) for x in leaves)
    return (total / len(leaves)).astype(leaves[0].dtype)
  return jax.tree.map(of, *trees)


def on_one_device(workdir: epath.Path, module: nn.Module, step: Step = None
                  ) -> checkpoints.Restored:
  """Returns the parameters of a checkpoint that are evaluated, as its `state`,
  all on one device of this process; warns of checkpoints that were passed over
  because they are damaged.

  Args:
    workdir: the run's folder.
    module: its model.
    step: which checkpoint; 'best'; None: the newest good one.
  """
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      nn.meta.unbox(runs.abstract_params(module)))
  restored = of_checkpoint(checkpoints.directory(workdir), shapes, step)
  _warn(restored)
  return restored


def of_run(run: runs.Run, workdir: epath.Path, step: Step = None,
           live: bool = False) -> checkpoints.Restored:
  """Returns the parameters of a checkpoint of a run, as its `state`; prints
  which it is, and the checkpoints that were passed over as damaged.

  Args:
    run: the run of `workdir`.
    workdir: its folder.
    step: which checkpoint; 'best'; several, for their mean; None: the newest
      good one.
    live: with optim.ema, the parameters themselves and not their average.
  """
  require(run.config.optim.ema or not live, f'{workdir} keeps no average of '
          'its parameters (optim.ema is 0): there is nothing to choose. '
          'Leave out --live')
  restored = of_checkpoint(checkpoints.directory(workdir), run.abstract.params,
                           step, live=live)
  _warn(restored)
  print(f'{workdir}, step {restored.step}'
        + (f': {restored.what}' if restored.what else ''))
  return restored
