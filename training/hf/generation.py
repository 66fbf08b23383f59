"""The needs of generation besides the weights: which tokens begin, end and pad
a text, how transformers is to draw, and the chat template.

An import keeps what its folder says, in WORKDIR/generation.json, and an export
writes that again. A run of our own says it by its tokenizer. What was made of a
trained run, merged or as a mixture of experts, begins at step 0 as an import
does: that its parameters were trained stands there, too.
"""

from collections.abc import Sequence
import pathlib
from typing import Any, NamedTuple

from etils import epath
import ml_collections

import architectures
from architectures.parts.config import ModelConfig
from training import objectives
from training.data import tokenizers
from training.hf import config as hf_config
from training.hf import files as hf_files
from training.objectives import causal, seq2seq
from training.objectives import Prompts, Talk, check_model_has_ids, pad_prompts
from training.workdir import storage

FILE_IN_WORKDIR = 'generation.json'  # in a workdir
FILE_IN_FOLDER = 'generation_config.json'  # in a Hugging Face folder


class Generation(NamedTuple):
  """The part of a folder that says how its model writes.

  Attributes:
    fields: the fields of config.json: token ids, and generation options of
      older files.
    options: the content of generation_config.json; None: there is no such file.
  """
  fields: dict[str, Any]
  options: dict[str, Any] | None


def read_generation(folder: pathlib.Path) -> Generation:
  """Returns the special tokens and the options of generation that a Hugging
  Face folder holds.

  Raises:
    RequestError: if one of its files is no JSON object.
  """
  tree = hf_config.load_config_json(folder)
  fields = {}
  for name, value in tree.items():
    if hf_config.GENERATION_FIELDS.fullmatch(name):
      fields[name] = value
  path = folder / FILE_IN_FOLDER
  options = None
  if path.is_file():
    options = hf_files.read_json_object(path)
  return Generation(fields=fields, options=options)


def generation_of_run(config: ml_collections.ConfigDict, model: ModelConfig,
                      tokenizer: Any) -> Generation:
  """Returns the special tokens and the options of generation of a run of our
  own, by the tokenizer that it reads.

  In config.json stand the tokenizer's own ids. Text begins after
  generation_config.json's bos_token_id: that is the id with which every
  sequence of the run begins, the one between documents.

  Args:
    config: the config of the run.
    model: the config of its model.
    tokenizer: the tokenizer of the run, with its `special_ids`.
  """
  # The ids of the tokenizer, for config.json.
  special_ids = tokenizer.special_ids
  options = None
  ids: dict[str, Any] = {}
  for role in ('bos', 'eos', 'pad'):
    ids[f'{role}_token_id'] = special_ids.get(role)

  # A model that writes ends and begins its texts as in training.
  objective = objectives.find_objective(config)
  if objective.writes:
    end_id, *more_ids = objective.ends(config, tokenizer)
    ids['eos_token_id'] = [end_id, *more_ids] if more_ids else end_id
    if special_ids.get('bos') is None:
      ids['bos_token_id'] = end_id
    if architectures.stack(model) == 'encoder-decoder':
      ids['decoder_start_token_id'] = seq2seq.start_of_target(config, tokenizer)
    options = {name: value for name, value in ids.items() if value is not None}
    options['bos_token_id'] = end_id

  # Some ids are fixed by the module of the system's Hugging Face format
  # (architectures.hugging_face), whatever the tokenizer says.
  fixed = architectures.hugging_face(model.arch).fixed_token_ids
  fields = {name: value for name, value in ids.items() if name not in fixed}
  return Generation(fields=fields, options=options)


def save_generation(workdir: epath.Path, generation: Generation | None,
                    trained: bool = False) -> None:
  """Writes into a new workdir how the model writes whose parameters it begins
  with.

  Args:
    workdir: the folder of the run that begins.
    generation: what the folder of the parameters says; None: they come from no
      folder.
    trained: whether they were trained in the run that they come from.
  """
  tree: dict[str, Any] = dict(trained=trained)
  if generation is not None:
    tree |= generation._asdict()
  storage.write_json(storage.checked_path(workdir) / FILE_IN_WORKDIR, tree)


def is_published(workdir: epath.Path, step: int) -> bool:
  """Whether the parameters at a step are as they were imported: trained neither
  in the workdir nor in a run that this was made of."""
  if step != 0:
    return False
  tree = _read_file(workdir)
  return not (tree and tree['trained'])


def load_if_published(workdir: epath.Path, step: int) -> Generation | None:
  """Returns how the parameters at a step write by the folder from which they
  come; None for those that were trained here, where the separator of documents
  begins a text."""
  if not is_published(workdir, step):
    return None
  return load_generation(workdir)


def load_generation(workdir: epath.Path) -> Generation | None:
  """Returns how the imported model of a workdir writes, by its folder; None in
  the workdir of any other run."""
  tree = _read_file(workdir)
  if 'fields' not in tree:
    return None
  return Generation(fields=tree['fields'], options=tree['options'])


def _read_file(workdir: epath.Path) -> dict[str, Any]:
  """Returns the content of the file that `save_generation` writes; {} if there
  is none."""
  path = storage.checked_path(workdir) / FILE_IN_WORKDIR
  if not path.exists():
    return {}
  return storage.read_json(path, {'trained': bool})


# The prompt of a model that writes, and the end of its texts.


def continue_texts(tokenizer: tokenizers.Tokenizer,
                   generation: Generation | None) -> Talk:
  """Returns how an imported model continues a text: after its folder's token
  bos and up to its eos; where the folder names none, after and up to the
  separator of documents.

  Args:
    tokenizer: the tokenizer of the model.
    generation: what the folder says; None: there is no folder.
  """
  token_ids = special_token_ids(generation)
  bos_ids = token_ids.get('bos_token_id', [])
  bos_id = bos_ids[0] if bos_ids else None
  talk = causal.talk_by_continuing(tokenizer, bos_id)
  eos_ids = frozenset(token_ids.get('eos_token_id', ()))
  return talk._replace(ends=eos_ids or talk.ends)


def encode_prompts(texts: Sequence[str], config: ml_collections.ConfigDict,
                   tokenizer: tokenizers.Tokenizer,
                   generation: Generation | None
                   ) -> tuple[Prompts, tuple[int, ...]]:
  """Encodes texts for a model that is to write on from them.

  Args:
    texts: one or more texts.
    config: the config of the run.
    tokenizer: the tokenizer of the model.
    generation: what the folder says from which the weights come; None: they
      come from no folder.

  Returns:
    The prompts, and the ids of the tokens with which the model ends its text.
  """
  objective = objectives.find_objective(config)
  # Published weights go on from a text as their own folder says.
  is_from_folder = generation is not None and objective.talks
  if is_from_folder and objective.talk(config, tokenizer).plain:
    talk = continue_texts(tokenizer, generation)
    rows = [talk.encode([dict(role='user', content=text)]) for text in texts]
    tokens, lengths = pad_prompts(rows)
    return Prompts(tokens=tokens, lengths=lengths), tuple(sorted(talk.ends))

  # Others as their training shows texts to them.
  prompts = objective.prompt(texts, config, tokenizer)
  check_model_has_ids(prompts.tokens, config=config, tokenizer=tokenizer,
                      subject='the prompt')
  return prompts, objective.ends(config, tokenizer)


def special_token_ids(generation: Generation | None) -> dict[str, list[int]]:
  """Returns the ids of the special tokens that a folder names, such as
  {'eos_token_id': [2]}. generation_config.json goes before config.json, as for
  transformers.

  Args:
    generation: the fields of the folder's config.json and the options of its
      generation_config.json; None: there is no folder, and no id.
  """
  if generation is None:
    return {}
  options = generation.options or {}
  token_ids = {}
  for name, value in (generation.fields | options).items():
    if name.endswith('_token_id') and value is not None:
      token_ids[name] = value if isinstance(value, list) else [value]
  return token_ids
