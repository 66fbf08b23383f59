"""Conversations in files, and the templates that lay them out.

A field with a list of turns, {"role": "user", "content": ...} or ShareGPT's
{"from": "human", "value": ...}, is a conversation. It is laid out by Vicuna's
template, version 1.1 (lm-sys/FastChat, conversation.py), where </s> is the
tokenizer's separator:

  SYSTEM USER: a question ASSISTANT: an answer</s>USER: a question ...

A record of `alpaca:GLOB`, {"instruction": ..., "input": ..., "output": ...},
is laid out by Alpaca's template (tatsu-lab/stanford_alpaca, train.py): PROMPT,
or PROMPT_INPUT where there is an input, directly followed by the output and the
separator. training/objectives/causal.py makes rows of all of these parts.

Where data.chat_template names a Jinja file or a Hugging Face folder, that
template lays out the turns. transformers renders it, in a sandbox and in a
process with limits (limited.py). A special token that a template writes is
obeyed. What the tokenizer would take for one in what somebody said is spelt, so
that nobody speaks for another; so is, unless the assistant says it, any other
added token that the template's text has, since some turns begin with one, as
transformers' sanitize_control_tokens does. Until the text is encoded, it
stands between two characters, MARKS, that have no meaning in Unicode.
"""

from collections.abc import Iterator, Sequence, Set
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from common.errors import RequestError, one_of, require, short
from training import hub
from training.data import texts
from training.data.tokenizers import Tokenizer, read_special_tokens
from training.workdir import storage

# Who speaks, as files spell it: our kind of part.
ROLE_OF_SPELLING = {'system': 'system', 'user': 'user', 'human': 'user',
         'prompter': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'chatgpt': 'assistant', 'bot': 'assistant'}
# The parts that a conversation is made of: those of the published templates,
# and those of a Jinja template.
KINDS_OF_PARTS = ('question', 'answer', 'shown', 'said')
KINDS_OF_ANSWERS = ('answer', 'said')  # those predicted
PUBLISHED_NAME = 'published'  # data.chat_template of Vicuna's and Alpaca's
VICUNA_SYSTEM_MESSAGE = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's "
    'questions.')
ALPACA_PROMPT = (
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n'
    '### Instruction:\n{instruction}\n\n### Response:')
ALPACA_PROMPT_WITH_INPUT = (
    'Below is an instruction that describes a task, paired with an input that '
    'provides further context. Write a response that appropriately completes '
    'the request.\n\n'
    '### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n'
    '### Response:')
MARKS_OF_SPELT_TEXT = '\ue010', '\ue011'
CHAT_TEMPLATE_FILE = 'chat_template.jinja'
# The config of a run keeps the text of its template after this prefix.
PREFIX_OF_TEMPLATE_TEXT = 'jinja:'
# Text of a rendered conversation, and what stands between two marks in it. A
# template may have taken a mark from its pair: alone, it means nothing.
_PATTERN_OF_PIECES = re.compile(
    '{0}(?P<spelt>[^{0}{1}]+){1}|(?P<text>[^{0}{1}]+)'.format(
        *MARKS_OF_SPELT_TEXT))
_PATTERN_OF_ANSWER_BLOCK = re.compile(r'\{%-?\s*generation\s*-?%\}')
Messages = Sequence[dict[str, str]]


def parse_turns(turns: Sequence, where: str) -> list[tuple[str, str]]:
  """Returns the (role, text) turns of one conversation.

  Raises:
    ValueError: for a turn without a known role or without text.
  """
  parts = []
  for turn in turns:
    require(isinstance(turn, dict), f'{where} holds {short(turn)}, and no '
            'turn: an object with role and content, or from and value')
    # Both spellings are published: role and content, from and value.
    role = turn.get('role', turn.get('from'))
    role = str(role)
    one_of(f'role in {where}', role, ROLE_OF_SPELLING)
    content = turn.get('content', turn.get('value'))
    text = texts.check_text(content, f'{where} turn of {role!r}')
    parts.append((ROLE_OF_SPELLING[role], text))
  return parts


class Layout:
  """How the conversations of a source are laid out.

  Attributes:
    key: what tells this layout from others.
  """
  key: str

  def of(self, document: Any) -> Any:
    """Returns a document, laid out if it is a conversation; plain text and
    empty turns stay as they are."""
    raise NotImplementedError


class PublishedLayout(Layout):
  """Vicuna's template for turns; instructions have Alpaca's already."""

  key = PUBLISHED_NAME

  def of(self, document: Any) -> Any:
    if _is_conversation(document):
      return lay_out_vicuna_turns(document)
    return document


class JinjaLayout(Layout):
  """A Jinja template.

  Args:
    template: the template.
  """

  def __init__(self, template: 'Template'):
    """Finds the key, a hash of everything that decides on a text's ids."""
    tokenizer = template.tokenizer
    special, special_or_written = template.markers
    described = json.dumps([
        template.text, template.special_tokens, tokenizer.special_texts,
        *sorted(special_or_written - special)])
    digest = hashlib.sha256(described.encode()).hexdigest()
    self.key = f'jinja {digest}'
    self._template = template

  def of(self, document: Any) -> Any:
    if _is_conversation(document):
      messages = [dict(role=role, content=text) for role, text in document]
      return self._template.parts(messages)
    if not isinstance(document, str) and not _has_roles(document):
      raise RequestError('instructions have a template of their own: set '
                         'data.chat_template to published')
    return document


def choose_layout(template: str, tokenizer: Any) -> Layout:
  """Returns the layout that data.chat_template names.

  Args:
    template: published, a Jinja file or a Hugging Face folder.
    tokenizer: the tokenizer of the run.

  Raises:
    RequestError: where it names no template.
  """
  if template == PUBLISHED_NAME:
    return PUBLISHED_LAYOUT
  return JinjaLayout(read_template(template, tokenizer))


def _is_conversation(document: Any) -> bool:
  """Returns whether a document is a conversation in which something is said."""
  if isinstance(document, str):
    return False
  return any(text for _, text in document) and _has_roles(document)


def _has_roles(document: Sequence[tuple[str, str]]) -> bool:
  """Returns whether the parts of a document are turns."""
  role, _ = document[0]
  return role in ROLE_OF_SPELLING.values()


PUBLISHED_LAYOUT = PublishedLayout()


def lay_out_vicuna_turns(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns turns by `parse` as (kind, text) parts, the kinds `question` and
  `answer`. Joined, with the separator after each answer, they are the
  template's text."""
  parts = []
  asked = '' if turns[0][0] == 'system' else f'{VICUNA_SYSTEM_MESSAGE} '
  for kind, text in turns:
    if kind == 'system':
      asked += f'{text} '
    elif not text:  # FastChat writes neither the space nor the separator.
      asked += f'{kind.upper()}:'
    elif kind == 'user':
      asked += f'USER: {text} '
    else:
      parts += [('question', f'{asked}ASSISTANT:'), ('answer', f' {text}')]
      asked = ''
  if asked:
    parts.append(('question', asked))
  return parts


def read_alpaca(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the parts of each record of a file: one JSON list, or in a .jsonl
  an object a line.

  Raises:
    ValueError: naming the record that is none.
  """
  for where, record in texts.read_rows(path):
    asked = texts.check_text(record.get('instruction'), f'{where}, instruction')
    context = texts.check_text(record.get('input', ''), f'{where}, input')
    answer = texts.check_text(record.get('output'), f'{where}, output')
    yield [('question', alpaca_prompt(asked, context)), ('answer', answer)]


def alpaca_prompt(instruction: str, context: str = '') -> str:
  """Returns the text before an answer; `context` is the record's input."""
  if context:
    return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction,
                                           input=context)
  return ALPACA_PROMPT.format(instruction=instruction)


@dataclasses.dataclass(frozen=True)
class Template:
  """A template with the tokenizer whose special tokens it writes.

  Attributes:
    name: where it is from, for messages.
    text: the template itself.
    tokenizer: what its text is encoded with.
    special_tokens: {'bos_token': '<s>', ...}, as the template knows them.
  """
  name: str
  text: str
  tokenizer: Tokenizer
  special_tokens: dict[str, str]

  @functools.cached_property
  def markers(self) -> tuple[frozenset[int], frozenset[int]]:
    """The tokens that nobody says: the special ones and, for all but the
    assistant, also those added ones that the template's text has."""
    added = self.tokenizer.added_texts
    special = {added[text] for text in self.tokenizer.special_texts}
    written = set()
    for text, i in added.items():
      if text.strip() and text in self.text:
        written.add(i)
    return frozenset(special), frozenset(special | written)

  def encode(self, messages: Messages, answer: bool = False) -> np.ndarray:
    """Returns the ids [T] of a conversation.

    Args:
      messages: dicts with role and content.
      answer: whether the assistant's next message is about to begin.
    """
    [ids_T] = encode_rendered_parts([self.render(messages, answer)],
                                    self.tokenizer)
    return ids_T

  def render(self, messages: Messages, answer: bool = False,
             goes_on: bool = False) -> str:
    """Returns the text of a conversation, MARKS in it; see `encode`. Where it
    `goes_on`, it is without what ends the last message."""
    text, _ = self._render(messages, answer, goes_on)
    return text

  def parts(self, messages: Messages) -> list[tuple[str, str]]:
    """Returns the text of a conversation as parts: `said` is the assistant's,
    `shown` is not. Their texts, with MARKS, one after the other are `render`'s.

    The assistant's is what stands in the template's {% generation %} blocks. In
    a template without these, it is what an answer adds to the text that asks
    for it, up to the last special token of that, where there is one.

    Raises:
      RequestError: where the text with an answer does not begin with the text
        that asks for the answer.
    """
    text, spans = self._render(messages)
    if not _PATTERN_OF_ANSWER_BLOCK.search(self.text):
      spans = self._differences(messages, text)
    parts = []
    end_of_last = 0
    for first, end in spans:
      parts.append(('shown', text[end_of_last:first]))
      parts.append(('said', text[first:end]))
      end_of_last = end
    parts.append(('shown', text[end_of_last:]))
    return parts

  def ends(self) -> set[int]:
    """Returns the special token with which an answer ends, if one follows it
    directly."""
    # A word that no template contains, so that its end can be found.
    answer = 'Xyzzy'
    text = self.render([dict(role='user', content=answer),
                        dict(role='assistant', content=answer)])
    if answer not in text:
      return set()
    after = text.rpartition(answer)[2].lstrip()
    for special in sorted(self.tokenizer.special_texts, key=len, reverse=True):
      if after.startswith(special):
        ids_T, _ = self.tokenizer.encode_placed(special)
        return {int(i) for i in ids_T}
    return set()

  def _differences(self, messages: Messages, text: str
                   ) -> list[tuple[int, int]]:
    """Returns where each answer stands in `text`, all messages rendered."""
    spans = []
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      # The answer is what the second text has and the first one lacks.
      asked = self.render(messages[:i], answer=True)
      answered = self.render(messages[:i + 1])
      if not answered.startswith(asked) or not text.startswith(answered):
        raise RequestError(
            f'message {i + 1} cannot be told from the others: the chat '
            f'template {self.name} has no {{% generation %}} block, and what '
            'it writes before an answer changes with the answer: put the '
            'block around what the assistant says')
      spans.append((len(asked), self._up_to_special(answered, len(asked))))
    return spans

  def _up_to_special(self, text: str, start: int) -> int:
    """Returns where the last special token after `start` ends, or the text."""
    ends = []
    for special in self.tokenizer.special_texts:
      if special in text[start:]:
        ends.append(text.rindex(special) + len(special))
    if not ends:
      return len(text)
    end = max(ends)
    # That one may have been said, too.
    if MARKS_OF_SPELT_TEXT[1] in text[end:]:
      return len(text)
    return end

  def _render(self, messages: Messages, answer: bool = False,
              goes_on: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text, and where {% generation %} blocks stand in it."""
    from training.data import limited
    # Words that somebody says must not be taken for the template's own tokens.
    chat = []
    for message in messages:
      special, special_or_written = self.markers
      markers = special_or_written
      if message['role'] == 'assistant':
        markers = special
      marked_message = {}
      for key, value in message.items():
        marked_message[key] = mark_special_tokens(value, self.tokenizer,
                                                  markers)
      chat.append(marked_message)
    options = dict(
        self.special_tokens, add_generation_prompt=answer,
        continue_final_message=goes_on,
        return_assistant_tokens_mask=bool(
            _PATTERN_OF_ANSWER_BLOCK.search(self.text)))
    # The template comes with a model, and may do anything.
    return limited.call_with_limits(f'the chat template {self.name} fails',
                                    'render', self.text, chat, options,
                                    keep=True)


def read_template(spec: str, tokenizer: Tokenizer) -> Template:
  """Returns the template of data.chat_template.

  Args:
    spec: a Jinja file, a Hugging Face folder, or 'jinja:' and the template
      itself, as a run keeps it.
    tokenizer: the tokenizer whose special tokens it writes.

  Raises:
    RequestError: where there is none.
  """
  name, text = read_template_text(spec)
  return make_template(name, text, tokenizer)


def read_template_text(spec: str) -> tuple[str, str]:
  """Returns where the template of data.chat_template is from, and its text;
  RequestError: there is none."""
  if spec.startswith(PREFIX_OF_TEMPLATE_TEXT):
    return 'of the run', spec.removeprefix(PREFIX_OF_TEMPLATE_TEXT)
  # A name on the Hugging Face hub is a folder of its cache.
  path = pathlib.Path(hub.download_if_on_hub(spec, weights=False)).expanduser()
  text = None
  if path.is_dir():
    text = read_template_of_folder(path)
  elif path.is_file():
    text = texts.read_text(str(path))
  if text is None:
    raise RequestError(
        f'data.chat_template is {short(spec)}, which is no file, and no folder '
        f'with a {CHAT_TEMPLATE_FILE} or a template in its '
        'tokenizer_config.json: choose from published, a Jinja file, and a '
        'Hugging Face folder')
  return str(path), text


def make_template(name: str, text: str, tokenizer: Tokenizer) -> Template:
  """Returns a template with the special tokens of a tokenizer."""
  return Template(name=name, text=text, tokenizer=tokenizer,
                  special_tokens=special_tokens_of_template(tokenizer))


def read_template_of_folder(folder: Any) -> str | None:
  """Returns the chat template of a Hugging Face folder; None: it has none."""
  if (folder / CHAT_TEMPLATE_FILE).is_file():
    return texts.decode_text((folder / CHAT_TEMPLATE_FILE).read_bytes(),
                             str(folder / CHAT_TEMPLATE_FILE))
  path = folder / 'tokenizer_config.json'
  if not path.is_file():
    return None
  template = storage.read_json(path).get('chat_template')
  if isinstance(template, list):  # several, by name
    by_name = {row.get('name'): row.get('template') for row in template}
    template = by_name.get('default')
  return template if isinstance(template, str) else None


def mark_special_tokens(text: str, tokenizer: Tokenizer,
                        markers: Set[int]) -> str:
  """Returns what somebody says, with MARKS around each stretch that the
  tokenizer takes for one of `markers`, however it is written: a normaliser may
  turn other letters into a special token's."""
  text = remove_marks(text)
  ids_T, spans_T2 = tokenizer.encode_placed(text)
  spans = _find_spans_of_tokens(markers, ids_T, spans_T2)
  if spans:
    # An unknown word is [UNK] when it is spelt, too.
    ids_T, spans_T2 = tokenizer.encode_typed(text)
    spans -= _find_spans_of_tokens(markers, ids_T, spans_T2)
  begin_mark, end_mark = MARKS_OF_SPELT_TEXT
  for first, end in sorted(spans, reverse=True):
    spelt = f'{begin_mark}{text[first:end]}{end_mark}'
    text = text[:first] + spelt + text[end:]
  return text


def _find_spans_of_tokens(markers: Set[int], ids_T: np.ndarray,
                          spans_T2: np.ndarray) -> set[tuple[int, int]]:
  """Returns the spans of those tokens of a text that are in `markers`."""
  spans = set()
  for i, (first, end) in zip(ids_T.tolist(), spans_T2.tolist()):
    if i in markers:
      spans.add((first, end))
  return spans


def remove_marks(text: str) -> str:
  """Returns a text without MARKS."""
  return re.sub(f'[{"".join(MARKS_OF_SPELT_TEXT)}]', '', text)


def encode_rendered_parts(parts: Sequence[str],
                          tokenizer: Tokenizer) -> list[np.ndarray]:
  """Returns the ids [T] of each part of a rendered text.

  The parts are encoded as one text. An id belongs to the first of the odd
  parts, those between two others, that it has a character of; if to none, to
  the even part where it begins: as transformers masks a {% generation %} block.
  """
  # The ids of the whole text, and where each of them stands in it.
  ids = []
  places = []
  for piece in re.finditer(_PATTERN_OF_PIECES, ''.join(parts)):
    if piece['spelt']:
      group = 'spelt'
      piece_ids, spans = tokenizer.encode_typed(piece[group])
    else:
      group = 'text'
      piece_ids, spans = tokenizer.encode_placed(piece[group])
    ids.append(piece_ids)
    places.append(spans + piece.start(group))
  if not ids:
    return [np.zeros(0, np.int32) for _ in parts]
  ids_T = np.concatenate(ids)
  places_T2 = np.concatenate(places)

  # The ids before each part's end. An id that ends at or before the end of an
  # even part is not of the odd one after it.
  ends = np.cumsum([len(part) for part in parts])
  cuts = []
  before = 0
  for number, end in enumerate(ends[:-1]):
    if number % 2 == 0:
      is_before_T = places_T2[:, 1] <= end
    else:
      is_before_T = places_T2[:, 0] < end
    leading_T = np.logical_and.accumulate(is_before_T)
    before = max(before, int(np.count_nonzero(leading_T)))
    cuts.append(before)
  return np.split(ids_T, cuts)


def special_tokens_of_template(tokenizer: Tokenizer) -> dict[str, str]:
  """Returns the special tokens as transformers gives them to a template: those
  that the tokenizer's own files name, where they name any."""
  folder = pathlib.Path(tokenizer.name)
  # A tokenizer is named by its file or by its folder.
  if not folder.is_dir():
    folder = folder.parent
  named = {}
  if not tokenizer.name.startswith('bytes'):
    named = read_special_tokens(folder)
  if named:
    return named
  # No file names them: those that the tokenizer itself has.
  for kind, i in tokenizer.special_ids.items():
    named[f'{kind}_token'] = tokenizer.piece(i)
  return named
