"""Tokenizer files, from a Hugging Face folder into a workdir and back.

An import whose folder has no tokenizer that is read here gets a stand-in, the
bytes of the text in as many ids as the model has: it can be evaluated, trained
and exported, and its ids mean something else than those of its training.
"""

import json
import pathlib
import shutil
from typing import Any

from etils import epath
import ml_collections

import architectures
from training import objectives
from training.data import conversations, tokenizers
from training.hf import files
from training.workdir import storage

TEMPLATE, PIPELINE = 'chat_template.jinja', 'tokenizer.json'
CONFIG, SPECIALS = 'tokenizer_config.json', 'special_tokens_map.json'
# What sentence-transformers reads beside the model.
SENTENCES = ('modules.json', 'sentence_bert_config.json',
             'config_sentence_transformers.json', '1_Pooling/config.json')
# What goes along beside the files that training/data/tokenizers.py reads:
# Marian's and NLLB's, whose numbers are not the pieces' own, are kept for the
# way out.
MORE_FILES = (CONFIG, SPECIALS, 'added_tokens.json', 'source.spm',
              'target.spm', 'vocab.json',
              'sentencepiece.bpe.model', TEMPLATE, 'chat_template.json',
              *SENTENCES)
# What is copied beside the only file of a tokenizer.
BESIDE = (CONFIG, SPECIALS, 'added_tokens.json')
# Which class of transformers reads a folder, by its first file that is there.
# The first class takes nothing for granted; the others know their own files.
CLASSES = {'tokenizer.json': 'PreTrainedTokenizerFast',
           'tokenizer.model': 'PreTrainedTokenizerFast',
           'spiece.model': 'T5Tokenizer', 'vocab.json': 'GPT2Tokenizer',
           'vocab.txt': 'BertTokenizer'}


def take(folder: epath.Path, workdir: epath.Path,
         config: ml_collections.ConfigDict) -> list[str]:
  """Copies a folder's tokenizer into a workdir, and takes it for its run where
  it can be read; returns the names of what was copied."""
  if storage.in_bucket(folder):  # a run's: its config names the tokenizer
    return []
  found = tokenizers.found_in(folder)
  # Before anything is written.
  tokenizer = tokenizers.load(str(folder)) if found else None
  target, copied = folder, []
  if not storage.in_bucket(workdir):
    target = workdir / 'tokenizer'
    copied = copy(folder, target)
    if isinstance(tokenizer, tokenizers.HuggingFace) and (
        PIPELINE not in copied):
      # What transformers made of the other files, and of the model's
      # config.json, which is not copied: the run reads it without transformers.
      tokenizer.save(target / PIPELINE)
      copied.append(PIPELINE)
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
  arch, copied = config.model.arch, []
  if path.is_dir():
    copied = copy(path, folder)
  elif path.is_file():
    shutil.copyfile(path, folder / _name(path, arch))
    for name in BESIDE:
      if (path.parent / name).is_file():
        shutil.copyfile(path.parent / name, folder / name)
        copied.append(name)

  tokenizer = tokenizers.load(config.data.tokenizer)
  if CONFIG not in copied:
    (folder / CONFIG).write_text(json.dumps(
        _described(tokenizer, folder, arch), indent=2) + '\n')
  chat_template = objectives.of(config).chat_template
  template = chat_template and chat_template(config, tokenizer)
  if template is not None:
    (folder / TEMPLATE).write_text(template)


def refuse_left(workdir: epath.Path, config: ml_collections.ConfigDict,
                folder: pathlib.Path, step: int) -> None:
  """Raises RequestError for files of a tokenizer that `give`, with the same
  arguments, would leave in a folder."""
  path, written = pathlib.Path(config.data.tokenizer), {CONFIG}
  if is_stand_in(config.data.tokenizer):
    own = step == 0 and not storage.in_bucket(workdir)
    written = {*_found(workdir / 'tokenizer')} if own else set()
  else:
    written.update(_found(path) if path.is_dir() else
                   [_name(path, config.model.arch), *(
                       name for name in BESIDE
                       if (path.parent / name).is_file())])
    if objectives.of(config).chat_template:
      written.add(TEMPLATE)
  files.refuse_left(folder, written, _names())


def _is_t5(arch: str) -> bool:
  return architectures.hugging_face(arch).model_type in (
      't5', 'switch_transformers')


def _described(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, arch: str
               ) -> dict[str, Any]:
  """Returns the tokenizer_config.json of a tokenizer that came without one:
  transformers knows no special token by its spelling alone."""
  name = next((name for name in CLASSES if (folder / name).is_file()), '')
  kind, told = CLASSES.get(name, ''), dict[str, Any]()
  if (name, arch) == ('vocab.json', 'roberta'):
    kind = 'RobertaTokenizer'
  if name == 'tokenizer.json':
    kind, told = _framing(json.loads((folder / name).read_bytes()), arch, kind)
  if kind == 'T5Tokenizer':
    told['extra_ids'] = 0  # It would add 100 that the vocabulary has not.
  if kind == 'GPT2Tokenizer':
    told |= {'bos_token': None, 'unk_token': None}  # or <|endoftext|>, added
  told |= {'tokenizer_class': kind} if kind else {}
  told |= {f'{name}_token': tokenizer.piece(i)
           for name, i in tokenizer.special_ids.items()}
  return told | conversations.specials(tokenizer)


def _framing(pipeline: dict[str, Any], arch: str, usual: str
             ) -> tuple[str, dict[str, Any]]:
  """Returns the class that puts a text between [CLS] and [SEP], or before </s>,
  as the training of this system did, where a tokenizer.json itself does not;
  and what that class must be told."""
  model, normalizer = pipeline['model'], pipeline.get('normalizer') or {}
  if pipeline.get('post_processor'):
    return usual, {}
  if _is_t5(arch) and model.get('type') == 'Unigram':
    return 'T5Tokenizer', {}
  if arch == 'bert' and normalizer.get('type') == 'BertNormalizer':
    return 'BertTokenizer', dict(
        do_lower_case=normalizer['lowercase'],
        strip_accents=normalizer['strip_accents'],
        tokenize_chinese_chars=normalizer['handle_chinese_chars'])
  return usual, {}


def copy(source: epath.Path, target: epath.Path) -> list[str]:
  """Copies a folder's tokenizer files, and what else goes along; returns their
  names."""
  found = _found(source)
  if found:
    target.mkdir(parents=True, exist_ok=True)
  for name in found:
    (target / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(source / name, target / name)
  return found


def _found(folder: epath.Path) -> list[str]:
  return [name for name in _names() if (folder / name).is_file()]


def _names() -> list[str]:
  read = (name for names in tokenizers.FOLDERS for name in names)
  return [*dict.fromkeys((*read, *MORE_FILES))]


def _name(file: pathlib.Path, arch: str) -> str:
  """The name of a tokenizer's only file in a Hugging Face folder."""
  own = 'spiece.model' if _is_t5(arch) else 'tokenizer.model'
  return 'tokenizer.json' if file.suffix == '.json' else own
