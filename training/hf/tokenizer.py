"""Tokenizer files, from a Hugging Face folder into a workdir and back.

An import whose folder has no tokenizer that is read here gets a stand-in, the
bytes of the text in as many ids as the model has: it can be evaluated, trained
and exported, and its ids mean something else than those of its training.
"""

import pathlib
import shutil

from etils import epath
import ml_collections

from training import objectives
from training.data import tokenizers
from training.workdir import storage

TEMPLATE = 'chat_template.jinja'
# What sentence-transformers reads beside the model.
SENTENCES = ('modules.json', 'sentence_bert_config.json',
             'config_sentence_transformers.json', '1_Pooling/config.json')
# What goes along beside the files that training/data/tokenizers.py reads:
# Marian's and NLLB's, whose numbers are not the pieces' own, are kept for the
# way out.
MORE_FILES = ('tokenizer_config.json', 'special_tokens_map.json',
              'added_tokens.json', 'source.spm', 'target.spm', 'vocab.json',
              'sentencepiece.bpe.model', TEMPLATE, 'chat_template.json',
              *SENTENCES)


def take(folder: epath.Path, workdir: epath.Path,
         config: ml_collections.ConfigDict) -> list[str]:
  """Copies a folder's tokenizer into a workdir, and takes it for its run where
  it can be read; returns the names of what was copied."""
  if storage.in_bucket(folder):  # a run's: its config names the tokenizer
    return []
  if tokenizers.found_in(folder):
    tokenizers.load(str(folder))  # before anything is written
  target, copied = folder, []
  if not storage.in_bucket(workdir):
    target = workdir / 'tokenizer'
    copied = copy(folder, target)
  if tokenizers.found_in(target):
    config.data.tokenizer = str(target.absolute())
  return copied


def stand_in(vocab_size: int) -> str:
  """Returns data.tokenizer of an import without a tokenizer."""
  kind = tokenizers.Bytes
  return kind(max(kind.LEAST, min(vocab_size, kind.USUAL))).name


def is_stand_in(tokenizer: str) -> bool:
  """Whether data.tokenizer is what `stand_in` gives."""
  return tokenizer.partition(':')[0] == 'bytes'


def give(workdir: epath.Path, config: ml_collections.ConfigDict,
         folder: pathlib.Path, step: int) -> None:
  """Copies the tokenizer of a run's checkpoint into a Hugging Face folder; of
  a run that learned to chat, with the template that it learned."""
  path = pathlib.Path(config.data.tokenizer)
  if is_stand_in(config.data.tokenizer):
    # An import's own, until training has given the ids another meaning.
    if step == 0 and not storage.in_bucket(workdir):
      copy(workdir / 'tokenizer', folder)
    return
  if path.is_dir():
    copy(path, folder)
  elif path.is_file():
    shutil.copyfile(path, folder / ('tokenizer.json' if path.suffix == '.json'
                                    else path.name))

  chat_template = objectives.of(config).chat_template
  template = chat_template and chat_template(
      config, tokenizers.load(config.data.tokenizer))
  if template is not None:
    (folder / TEMPLATE).write_text(template)


def copy(source: epath.Path, target: epath.Path) -> list[str]:
  """Copies a folder's tokenizer files, and what else goes along; returns their
  names."""
  read = (name for names in tokenizers.FOLDERS for name in names)
  found = [name for name in dict.fromkeys((*read, *MORE_FILES))
           if (source / name).is_file()]
  if found:
    target.mkdir(parents=True, exist_ok=True)
  for name in found:
    (target / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / name, target / name)
  return found
