"""Tokenizer files, from a Hugging Face folder into a workdir and back.

An import whose folder has no tokenizer that is read here gets a stand-in, the
bytes of the text in as many ids as the model has: it can be evaluated, trained
and exported, and its ids mean something else than those of its training.
"""

import itertools
import json
import pathlib
import shutil

from etils import epath
import ml_collections

from training import objectives, runs
from training.data import conversations, tokenizers
from training.hf import files
from training.workdir import storage

TEMPLATE = conversations.CHAT_TEMPLATE_FILE
PIPELINE = 'tokenizer.json'
# Files that are copied beside the only file of a tokenizer.
FILES_BESIDE_PIPELINE = (tokenizers.CONFIG_FILE, 'special_tokens_map.json',
                         'added_tokens.json')
# Files that go along with a folder: those that training/data/tokenizers.py
# reads; Marian's and NLLB's, whose numbers are not the pieces' own, for the way
# out; and those that sentence-transformers reads beside the model.
FILE_NAMES = (
    *dict.fromkeys(
        itertools.chain.from_iterable(tokenizers.FILES_OF_TOKENIZERS)),
    *FILES_BESIDE_PIPELINE,
    'source.spm', 'target.spm', 'sentencepiece.bpe.model', TEMPLATE,
    'modules.json', 'sentence_bert_config.json',
    'config_sentence_transformers.json', '1_Pooling/config.json')
# The special tokens around a text, or a pair of texts with their types, that
# the training of a system puts there, where its tokenizer.json puts none.
FRAME_OF_SYSTEM = {'bert': '{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1',
                   't5': '$A {eos} $B {eos}', 'switch': '$A {eos} $B {eos}'}


def import_tokenizer(folder: epath.Path, workdir: epath.Path,
                     config: ml_collections.ConfigDict) -> list[str]:
  """Copies the tokenizer of a Hugging Face folder to the folder of a run, and
  sets it in the run's config if it can be read here.

  Args:
    folder: the folder of the model.
    workdir: the folder of the run.
    config: the config of the run, whose data.tokenizer is changed.

  Returns:
    The names of the files that were copied.

  Raises:
    RequestError: where files of another tokenizer lie in the run's folder.
  """
  # A folder in a bucket is one of our runs, whose config names its tokenizer.
  if storage.is_in_bucket(folder):
    return []
  # Read the tokenizer before anything is written, as that may be refused.
  tokenizer = None
  if tokenizers.find_tokenizer_files(folder):
    tokenizer = tokenizers.load(str(folder))

  # Copy the files, unless the run's folder is in a bucket.
  target = folder
  copied = {}
  if not storage.is_in_bucket(workdir):
    target = workdir / 'tokenizer'
    copied = _tokenizer_files_of_folder(folder)
    # An earlier import that was killed may have left another tokenizer there.
    written = {*copied}
    if tokenizer is not None:
      written.add(PIPELINE)
    files.refuse_files_left(target, written=written, patterns=FILE_NAMES)
    _copy_files(copied, target)
    if (isinstance(tokenizer, tokenizers.HuggingFace)
        and PIPELINE not in copied):
      # transformers has built this tokenizer from the other files and from the
      # model's config.json, which is not copied. Save it in the form that can
      # be read without them.
      tokenizer.save(target / PIPELINE)
      copied[PIPELINE] = target / PIPELINE
  if tokenizers.find_tokenizer_files(target):
    config.data.tokenizer = str(target.absolute())
  return [*copied]


def stand_in_tokenizer(vocab_size: int) -> str:
  """Returns config.data.tokenizer for a model whose folder has no tokenizer:
  one of bytes, with as many ids as the model has."""
  least, usual = tokenizers.Bytes.LEAST, tokenizers.Bytes.USUAL
  num_ids = max(least, min(vocab_size, usual))
  return tokenizers.Bytes(num_ids).name


def is_stand_in(tokenizer: str) -> bool:
  """Whether config.data.tokenizer is one of bytes, as an import without a
  tokenizer gets it."""
  return tokenizer.partition(':')[0] == 'bytes'


def _tokenizer_files(workdir: epath.Path, config: ml_collections.ConfigDict,
                     step: int) -> dict[str, epath.Path]:
  """Returns the files of a run's tokenizer that are exported with its model.

  Args:
    workdir: the folder of the run.
    config: the config of the run.
    step: the step of the checkpoint that is exported.

  Returns:
    {name in the export: path}.
  """
  path = tokenizers.find_path(config.data.tokenizer)
  if is_stand_in(config.data.tokenizer):
    # The run reads bytes, in place of the tokenizer that its weights came with
    # and that could not be read here. Export that one, unless training has
    # since given the ids another meaning.
    if step > 0 or storage.is_in_bucket(workdir):
      return {}
    return _tokenizer_files_of_folder(workdir / 'tokenizer')
  if path.is_dir():
    return _tokenizer_files_of_folder(path)
  return _files_beside(path)


def _files_beside(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns a tokenizer.json, and the files of the tokenizer that stand beside
  it, by their names."""
  files_of_tokenizer = {PIPELINE: path}
  for name in FILES_BESIDE_PIPELINE:
    file = path.parent / name
    if file.is_file():
      files_of_tokenizer[name] = file
  return files_of_tokenizer


def refuse_files_left(workdir: epath.Path, config: ml_collections.ConfigDict,
                      folder: pathlib.Path, step: int) -> None:
  """Raises RequestError for files of another tokenizer that
  `export_tokenizer`, with the same arguments, would leave in a folder."""
  written = {*_tokenizer_files(workdir, config, step=step)}
  if not is_stand_in(config.data.tokenizer):
    written |= {tokenizers.CONFIG_FILE, PIPELINE}
    if objectives.find_objective(config).has_chat_template:
      written.add(TEMPLATE)
  files.refuse_files_left(folder, written=written, patterns=FILE_NAMES)


def export_tokenizer(workdir: epath.Path, config: ml_collections.ConfigDict,
                     folder: pathlib.Path, step: int) -> None:
  """Copies the tokenizer of a run's checkpoint into a Hugging Face folder; of
  a run that learned to chat, with the template that it learned."""
  sources = _tokenizer_files(workdir, config, step=step)
  _copy_files(sources, folder)
  if not is_stand_in(config.data.tokenizer):
    tokenizer = runs.load_run_tokenizer(workdir, config)
    _add_tokenizer_config(tokenizer, config=config, folder=folder,
                          copied={*sources})


def save_tokenizer(tokenizer: tokenizers.Tokenizer,
                   config: ml_collections.ConfigDict,
                   folder: pathlib.Path) -> None:
  """Writes a tokenizer to a Hugging Face folder. The files that it was loaded
  from are copied, if they still are the same; else it is saved from memory.

  Args:
    tokenizer: the tokenizer of a model.
    config: the config of its run.
    folder: the folder to write to, which exists.
  """
  sources = _files_of_tokenizer(tokenizer)
  _copy_files(sources, folder)
  _add_tokenizer_config(tokenizer, config=config, folder=folder,
                        copied={*sources})


def refuse_other_tokenizer(tokenizer: tokenizers.Tokenizer,
                           config: ml_collections.ConfigDict,
                           folder: pathlib.Path) -> None:
  """Raises RequestError for files of another tokenizer that `save_tokenizer`,
  with the same arguments, would leave in a folder."""
  written = {*_files_of_tokenizer(tokenizer), tokenizers.CONFIG_FILE, PIPELINE}
  if objectives.find_objective(config).has_chat_template:
    written.add(TEMPLATE)
  files.refuse_files_left(folder, written=written, patterns=FILE_NAMES)


def _files_of_tokenizer(tokenizer: tokenizers.Tokenizer
                        ) -> dict[str, pathlib.Path]:
  """Returns the files that a tokenizer was loaded from.

  Args:
    tokenizer: the tokenizer.

  Returns:
    {name: path}; {} for a tokenizer of bytes, which has no files, and where the
    files are gone or hold another tokenizer by now.
  """
  if isinstance(tokenizer, tokenizers.Bytes):
    return {}
  path = tokenizers.find_path(tokenizer.name)
  if not path.exists():
    return {}
  if tokenizers.load(tokenizer.name).fingerprint != tokenizer.fingerprint:
    return {}
  if path.is_dir():
    return _tokenizer_files_of_folder(path)
  return _files_beside(path)


def _add_tokenizer_config(tokenizer: tokenizers.Tokenizer,
                          config: ml_collections.ConfigDict,
                          folder: pathlib.Path, copied: set[str]) -> None:
  """Adds to a Hugging Face folder what transformers needs to load a tokenizer
  and the files of the tokenizer do not have.

  Args:
    tokenizer: the tokenizer of the run.
    config: the config of the run.
    folder: the folder to write to.
    copied: the names of the tokenizer's files that are there already.
  """
  if PIPELINE not in copied:
    tokenizer.save(folder / PIPELINE)

  # Add the special tokens that the architecture puts around a text.
  special_tokens = {}
  for role, token_id in tokenizer.special_ids.items():
    special_tokens[role] = tokenizer.piece(token_id)
  frame = FRAME_OF_SYSTEM.get(config.model.arch, '')
  _add_frame(folder / PIPELINE, frame=frame, special_tokens=special_tokens)

  # Tell transformers which tokens are special: it does not know by the
  # spelling.
  if tokenizers.CONFIG_FILE not in copied:
    tree = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    for role, token in special_tokens.items():
      tree[f'{role}_token'] = token
    tree |= conversations.special_tokens_of_template(tokenizer)
    text = json.dumps(tree, indent=2)
    (folder / tokenizers.CONFIG_FILE).write_text(text + '\n')

  # Add the template by which a conversation is turned into text.
  template = objectives.find_objective(config).chat_template(config, tokenizer)
  if template is not None:
    (folder / TEMPLATE).write_text(template)


def _add_frame(file: pathlib.Path, frame: str, special_tokens: dict[str, str]
               ) -> None:
  """Adds to a tokenizer.json the special tokens that are put around a text.

  Args:
    file: the path of the tokenizer.json, which is changed.
    frame: the special tokens around a pair of texts $A and $B, such as '{cls}:0
      $A:0 {sep}:0 $B:1 {sep}:1', with the number of the text after each colon;
      '': there are none.
    special_tokens: the special tokens by their roles: 'cls', 'sep', 'eos', ...
  """
  import tokenizers as library
  pipeline = library.Tokenizer.from_file(str(file))
  # Leave the file as it is if it already puts tokens around a text, or if the
  # tokenizer lacks one of these tokens.
  roles = [role for role in ('cls', 'sep', 'eos') if f'{{{role}}}' in frame]
  if not roles or pipeline.post_processor is not None:
    return
  if not special_tokens.keys() >= {*roles}:
    return

  # For a single text, leave out all that begins with the second one.
  pair = frame.format(**special_tokens)
  tokens_and_ids = []
  for role in roles:
    token = special_tokens[role]
    tokens_and_ids.append((token, pipeline.token_to_id(token)))
  pipeline.post_processor = library.processors.TemplateProcessing(
      single=pair.partition(' $B')[0], pair=pair,
      special_tokens=tokens_and_ids)
  pipeline.save(str(file))


def _tokenizer_files_of_folder(folder: epath.Path) -> dict[str, epath.Path]:
  """Returns the files of a tokenizer that a folder has, by their names."""
  return {name: folder / name for name in FILE_NAMES
          if (folder / name).is_file()}


def _copy_files(sources: dict[str, epath.Path], target: epath.Path) -> None:
  """Copies files into a folder under the names that are their keys; a file that
  is there already, as the same file, stays."""
  for name, path in sources.items():
    copy = target / name
    if copy.exists() and copy.samefile(path):
      continue
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)
