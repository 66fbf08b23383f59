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
  """Reads how the model in a Hugging Face folder generates text: its special
  tokens, from config.json, and its options, from generation_config.json.

  Args:
    folder: the folder of the model.

  Raises:
    RequestError: for a file that is no JSON object.
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
  """Returns how the model of a run generates text, for export to a Hugging Face
  folder: the special tokens of its config.json, and the options of its
  generation_config.json.

  config.json gets the tokenizer's ids. generation_config.json gets those
  between which this model writes: its bos_token_id is the separator of
  documents, with which each sequence begins in training.

  Args:
    config: the config of the run.
    model: the config of its model.
    tokenizer: the tokenizer of the run, with its `special_ids`.
  """
  # Take the ids of the tokenizer for config.json.
  special_ids = tokenizer.special_ids
  options = None
  ids: dict[str, Any] = {}
  for role in ('bos', 'eos', 'pad'):
    ids[f'{role}_token_id'] = special_ids.get(role)

  # A model that writes text begins and ends it as in training.
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

  # transformers fixes some ids for an architecture, whatever the tokenizer
  # says.
  fixed = architectures.hugging_face(model.arch).fixed_token_ids
  fields = {name: value for name, value in ids.items() if name not in fixed}
  return Generation(fields=fields, options=options)


def save_generation(workdir: epath.Path, generation: Generation | None,
                    trained: bool = False) -> None:
  """Records in a new run's folder how the model generates text from whose
  parameters the run starts.

  Args:
    workdir: the folder of the new run.
    generation: the special tokens and options of the folder from which the
      parameters come; None: they come from no folder.
    trained: whether the parameters were trained in the run that they come from.
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
  """Describes how an imported model continues a text. The text begins after the
  bos token of its folder, and the model writes until the eos token. Where the
  folder names none, both are the separator of documents.

  Args:
    tokenizer: the tokenizer of the model.
    generation: the special tokens and options of the folder; None: there is no
      folder.

  Returns:
    A Talk: how to encode the text, and which tokens end what the model writes.
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
  """Encodes texts as prompts, from which a model is to write on.

  Args:
    texts: the texts.
    config: the config of the run.
    tokenizer: the tokenizer of the model.
    generation: the special tokens and options of the Hugging Face folder from
      which the weights come; None: they come from no folder.

  Returns:
    The prompts; and the ids of the tokens that end what the model writes.
  """
  objective = objectives.find_objective(config)
  # Published weights that were trained on plain text continue it as their
  # folder says.
  is_from_folder = generation is not None and objective.talks
  if is_from_folder and objective.talk(config, tokenizer).plain:
    talk = continue_texts(tokenizer, generation)
    rows = [talk.encode([dict(role='user', content=text)]) for text in texts]
    tokens, lengths = pad_prompts(rows)
    return Prompts(tokens=tokens, lengths=lengths), tuple(sorted(talk.ends))

  # All other models get a prompt that is laid out as in training.
  prompts = objective.prompt(texts, config, tokenizer)
  check_model_has_ids(prompts.tokens, config=config, tokenizer=tokenizer,
                      subject='the prompt')
  return prompts, objective.ends(config, tokenizer)


def special_token_ids(generation: Generation | None) -> dict[str, list[int]]:
  """Returns the ids of the special tokens that a Hugging Face folder names,
  such as {'eos_token_id': [2]}.

  Args:
    generation: the fields of the folder's config.json, and the options of its
      generation_config.json, which take precedence as in transformers; None:
      there is no folder.
  """
  if generation is None:
    return {}
  options = generation.options or {}
  token_ids = {}
  for name, value in (generation.fields | options).items():
    if name.endswith('_token_id') and value is not None:
      token_ids[name] = value if isinstance(value, list) else [value]
  return token_ids
