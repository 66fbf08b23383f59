"""Chat templates in Jinja, rendered as transformers renders them.

A template is text from whoever made a model, so it runs in jinja2's immutable
sandbox. It has what templates of transformers have (transformers,
utils/chat_template_utils.py): trim_blocks and lstrip_blocks, loop controls, the
block {% generation %}, `raise_exception`, `strftime_now`, a `tojson` that
escapes nothing, `bos_token`, `eos_token` and other special tokens.

A special token that a template writes is obeyed. One that stands in what
somebody said is spelt, so that nobody speaks for another: the same is
transformers' sanitize_control_tokens. Until the text is encoded, it stands
between two characters, MARKS, that have no meaning in Unicode.
"""

from collections.abc import Sequence
import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from configs.errors import RequestError, require, short
from training.workdir import schema
from training.data import texts
from training.data.tokenizers import Tokenizer, named_tokens

MARKS = '\ue010', '\ue011'
FILE = 'chat_template.jinja'
PREFIX = 'folder:'
TEXT = 'jinja:'
KEPT = 'of the run'  # what a template is called that is given as its text
# Text of a rendered conversation, and what stands between two marks in it. A
# template may have taken a mark from its pair: alone, it means nothing.
_PIECES = re.compile('{0}(?P<spelt>[^{0}{1}]+){1}|(?P<text>[^{0}{1}]+)'.format(
    *MARKS))
Messages = Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Template:
  """A template with the tokenizer whose special tokens it writes.

  Attributes:
    name: where it is from, for messages.
    text: the template itself.
    tokenizer: what its text is encoded with.
    specials: {'bos_token': '<s>', ...}, as the template knows them.
  """
  name: str
  text: str
  tokenizer: Tokenizer
  specials: dict[str, str]

  @property
  def fingerprint(self) -> str:
    """Changes when any conversation could be laid out otherwise."""
    described = json.dumps([self.text, self.specials,
                            self.tokenizer.special_texts], sort_keys=True)
    return hashlib.blake2b(described.encode('utf-8'),
                           digest_size=16).hexdigest()

  def encode(self, messages: Messages, answer: bool = False) -> np.ndarray:
    """Returns the ids [T] of a conversation.

    Args:
      messages: dicts with role and content.
      answer: whether the assistant's next message is about to begin.
    """
    return encode([self.render(messages, answer)], self.tokenizer)[0]

  def render(self, messages: Messages, answer: bool = False) -> str:
    """Returns the text of a conversation, MARKS in it; see `encode`."""
    return self._render(messages, answer)[0]

  def parts(self, messages: Messages) -> list[tuple[str, str]]:
    """Returns the text of a conversation as parts: `said` is the assistant's,
    `shown` is not. Their texts, with MARKS, one after the other are `render`'s.

    The assistant's is what stands in the template's {% generation %} blocks. Of
    a template without these, it is what an answer adds to the text that asks
    for it, up to the last special token of that, where there is one.

    Raises:
      RequestError: where the text with an answer does not begin with the text
        that asks for the answer.
    """
    text, spans = self._render(messages)
    if not self.marks_answers:
      spans = self._differences(messages, text)
    bounds = [0, *(place for span in spans for place in span), len(text)]
    return [(('shown', 'said')[i % 2], text[a:b])
            for i, (a, b) in enumerate(zip(bounds, bounds[1:]))]

  @functools.cached_property
  def marks_answers(self) -> bool:
    """Whether the template has {% generation %} blocks."""
    return bool(re.search(r'\{%-?\s*generation\s*-?%\}', self.text))

  def ends(self) -> set[int]:
    """Returns the special token with which an answer ends, if one follows it
    directly."""
    said = 'Xyzzy'
    text, _ = self._render([dict(role='user', content=said),
                            dict(role='assistant', content=said)])
    after = text.rpartition(said)[2].lstrip() if said in text else ''
    for special in sorted(self.tokenizer.special_texts, key=len, reverse=True):
      if after.startswith(special):
        return {int(i) for i in self.tokenizer.encode_placed(special)[0]}
    return set()

  def _differences(self, messages: Messages, text: str
                   ) -> list[tuple[int, int]]:
    """Returns where each answer stands in `text`, all messages rendered."""
    spans = []
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      asked = self.render(messages[:i], answer=True)
      answered = self.render(messages[:i + 1])
      if not (answered.startswith(asked) and text.startswith(answered)):
        raise RequestError(
            f'message {i + 1} cannot be told from the others: the chat '
            f'template {self.name} has no {{% generation %}} block, and what '
            'it writes before an answer changes with the answer: put the '
            'block around what the assistant says')
      spans.append((len(asked), self._up_to_special(answered, len(asked))))
    return spans

  def _up_to_special(self, text: str, start: int) -> int:
    """Returns where the last special token after `start` ends, or the text."""
    specials = _either(self.tokenizer.special_texts)
    pieces = re.split(f'({specials})', text[start:])
    if len(pieces) == 1 or MARKS[1] in pieces[-1]:  # one that was said
      return len(text)
    return len(text) - len(pieces[-1])

  def _render(self, messages: Messages, answer: bool = False
              ) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text, and where {% generation %} blocks stand in it."""
    template = _compiled(self.text, self.name)
    said = [{key: marked(value, self.tokenizer)
             for key, value in message.items()} for message in messages]
    blocks: list[str] = []  # rendered so far
    spans: list[tuple[int, int]] = []

    def place(caller: Any) -> str:
      text, start = caller(), sum(map(len, blocks))
      spans.append((start, start + len(text)))
      return text

    try:
      for block in template.generate(
          messages=said, tools=None, documents=None, _place=place,
          add_generation_prompt=answer, **self.specials):
        blocks.append(block)
    except Exception as error:  # of jinja2, and whatever a template does
      raise RequestError(f'the chat template {self.name} fails: '
                         f'{_line(error)}') from error
    return ''.join(blocks), spans


def read(spec: str, tokenizer: Tokenizer) -> Template:
  """Returns the template of data.chat_template.

  Args:
    spec: a Jinja file, a Hugging Face folder (PATH or 'folder:PATH'), or
      'jinja:' and the template itself, as a run keeps it.
    tokenizer: whose special tokens it writes.

  Raises:
    RequestError: where there is none, or it is no Jinja.
  """
  return make(*source(spec), tokenizer)


def source(spec: str) -> tuple[str, str]:
  """Returns where the template of data.chat_template is from, and its text.

  Raises:
    RequestError: where there is none, or it is no Jinja.
  """
  if spec.startswith(TEXT):
    _compiled(spec.removeprefix(TEXT), KEPT)
    return KEPT, spec.removeprefix(TEXT)
  path = pathlib.Path(spec.removeprefix(PREFIX)).expanduser()
  if path.is_dir():
    text = in_folder(path)
    if text is None:
      raise RequestError(f'the folder {short(str(path))} has no chat template: '
                         f'no {FILE}, and none in its tokenizer_config.json')
  else:
    require(path.is_file() and not spec.startswith(PREFIX),
            f'data.chat_template is {short(spec)}, which is no file or folder: '
            'choose from published, a Jinja file, and a Hugging Face folder')
    text = _read(path)
  _compiled(text, str(path))
  return str(path), text


def kept(spec: str) -> str:
  """Returns a data.chat_template that says the same when the file or the folder
  that `spec` names has changed, or is gone."""
  return TEXT + source(spec)[1]


def make(name: str, text: str, tokenizer: Tokenizer) -> Template:
  """Returns a template; RequestError for one that is no Jinja."""
  _compiled(text, name)
  return Template(name, text, tokenizer, specials(tokenizer))


def in_folder(folder: Any) -> str | None:
  """Returns the chat template of a Hugging Face folder; None: it has none."""
  if (folder / FILE).is_file():
    return _read(folder / FILE)
  for name in ('chat_template.json', 'tokenizer_config.json'):
    if (folder / name).is_file():
      described = schema.parse((folder / name).read_bytes(),
                               str(folder / name))
      found = (described.get('chat_template')
               if isinstance(described, dict) else None)
      if isinstance(found, list):  # several, by name
        found = {row.get('name'): row.get('template') for row in found
                 if isinstance(row, dict)}.get('default')
      if isinstance(found, str):
        return found
  return None


def marked(text: str, tokenizer: Tokenizer) -> str:
  """Returns what somebody says, with MARKS around special tokens in it."""
  return re.sub(_either(tokenizer.special_texts),
                lambda found: f'{MARKS[0]}{found[0]}{MARKS[1]}', unmarked(text))


def unmarked(text: str) -> str:
  """Returns a text without MARKS."""
  return re.sub(f'[{"".join(MARKS)}]', '', text)


def encode(parts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
  """Returns the ids [T] of each part of a rendered text.

  The parts are encoded as one text. An id belongs to the first of the odd
  parts, those between two others, that it has a character of; if to none, to
  the even part where it begins: as transformers masks a {% generation %} block.
  """
  ids, places = [], []
  for piece in re.finditer(_PIECES, ''.join(parts)):
    if piece['spelt']:
      own, spans = tokenizer.encode_spans([piece['spelt']])[0]
    else:
      own, spans = tokenizer.encode_placed(piece['text'])
    ids.append(own)
    places.append(spans + piece.start('spelt' if piece['spelt'] else 'text'))
  if not ids:
    return [np.zeros(0, np.int32) for _ in parts]
  ids_T, places_T2 = np.concatenate(ids), np.concatenate(places)
  ends = np.cumsum([len(part) for part in parts])
  # What ends at or before the end of a `shown` part is not of the next.
  cuts, before = [], 0
  for number, end in enumerate(ends[:-1]):
    outside = places_T2[:, 1] <= end if number % 2 == 0 else (
        places_T2[:, 0] < end)
    before = max(before, int(np.count_nonzero(
        np.logical_and.accumulate(outside))))
    cuts.append(before)
  return np.split(ids_T, cuts)


def _either(texts: Sequence[str]) -> str:
  """A pattern of any of these; the longest that fits."""
  words = sorted(texts, key=len, reverse=True)
  return '|'.join(map(re.escape, words)) or '(?!)'


def specials(tokenizer: Tokenizer) -> dict[str, str]:
  """Returns the special tokens as transformers gives them to a template: those
  that the tokenizer's own files name, where they name any."""
  folder = pathlib.Path(tokenizer.name)
  folder = folder if folder.is_dir() else folder.parent
  named = {} if tokenizer.name.startswith('bytes') else named_tokens(folder)
  return named or {f'{kind}_token': tokenizer.piece(i)
                   for kind, i in tokenizer.special_ids.items()}


def _read(path: Any) -> str:
  return texts.decoded(path.read_bytes(), str(path))


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


@functools.lru_cache(maxsize=16)
def _compiled(text: str, name: str) -> Any:
  """Returns the template, compiled in the sandbox.

  {% generation %} stands around what the assistant says; it calls the function
  `_place` that the template is rendered with.
  """
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      call = jinja2.nodes.Call(
          jinja2.nodes.Name('_place', 'load'), [], [], None, None)
      return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[Generation, jinja2.ext.loopcontrols])
  environment.filters['tojson'] = functools.partial(
      json.dumps, ensure_ascii=False)
  environment.globals.update(
      raise_exception=refuse,
      strftime_now=lambda form: datetime.datetime.now().strftime(form))
  try:
    return environment.from_string(text)
  except jinja2.TemplateSyntaxError as error:
    raise RequestError(f'the chat template {name} is no Jinja, line '
                       f'{error.lineno}: {_line(error)}') from error
