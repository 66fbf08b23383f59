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

from common.errors import RequestError, check_choice, require, shorten
from training import hub
from training.data import texts, tokenizers
from training.data.tokenizers import Tokenizer, read_special_tokens
from training.workdir import storage

# How files spell who speaks in a turn, and the role as templates know it.
ROLE_OF_SPELLING = {'system': 'system', 'user': 'user', 'human': 'user',
                    'prompter': 'user', 'assistant': 'assistant',
                    'gpt': 'assistant', 'chatgpt': 'assistant',
                    'bot': 'assistant'}
# A conversation that is laid out consists of (kind, text) parts. The published
# templates make questions and answers; a Jinja template makes text that is
# shown to the model, and text that the assistant says.
KINDS_OF_PARTS = ('question', 'answer', 'shown', 'said')
KINDS_OF_ANSWERS = ('answer', 'said')  # those that a model learns to predict
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


def parse_turns(turns: Sequence, location: str) -> list[tuple[str, str]]:
  """Reads the turns of a conversation in either of the two published spellings:
  role and content, or from and value.

  Args:
    turns: the turns as the file has them, a list of objects.
    location: the file and the line of the conversation, for messages.

  Returns:
    (role, text) of each turn. The roles are system, user and assistant.

  Raises:
    RequestError: for a turn without a known role or without text.
  """
  parts = []
  for turn in turns:
    require(isinstance(turn, dict), f'{location} holds {shorten(turn)}, and no '
            'turn: an object with role and content, or from and value')
    role = turn.get('role', turn.get('from'))
    role = str(role)
    check_choice(f'role in {location}', value=role, choices=ROLE_OF_SPELLING)
    content = turn.get('content', turn.get('value'))
    text = texts.check_text(content, f'{location} turn of {role!r}')
    parts.append((ROLE_OF_SPELLING[role], text))
  return parts


class Layout:
  """A way to lay out the conversations of a data source as text.

  Attributes:
    key: a string that tells this layout from all others. It is part of the name
      of the tokens in the cache.
  """
  key: str

  def lay_out(self, document: Any) -> Any:
    """Returns a document as its (kind, text) parts, if it is a conversation.
    Plain text, and turns that say nothing, are returned as they are."""
    raise NotImplementedError


class PublishedLayout(Layout):
  """Vicuna's template for conversations. Instructions are laid out by Alpaca's
  template when they are read, and stay as they are."""

  key = PUBLISHED_NAME

  def lay_out(self, document: Any) -> Any:
    if _is_conversation(document):
      return lay_out_vicuna_turns(document)
    return document


class JinjaLayout(Layout):
  """The layout of a Jinja template, which refuses Alpaca's instructions.

  Args:
    template: the template with its tokenizer.
  """

  def __init__(self, template: 'Template'):
    """Computes `key`, by which the tokens of conversations are found in the
    cache: a hash of everything that decides into which tokens a conversation
    is turned.

    Args:
      template: the chat template, with its tokenizer.
    """
    # Nothing may be missing that changes the tokens: the template, how special
    # tokens are written, and which added tokens are spelt letter by letter.
    # Sets are sorted, as they have no order.
    tokenizer = template.tokenizer
    special, special_or_written = template.tokens_to_spell
    described = json.dumps([
        template.text, template.special_tokens, tokenizer.special_texts,
        *sorted(special_or_written - special)])
    digest = hashlib.sha256(described.encode()).hexdigest()
    self.key = f'jinja {digest}'
    self._template = template

  def lay_out(self, document: Any) -> Any:
    """Returns a conversation as the parts that the template makes of it. A text
    without roles is returned as it is.

    Raises:
      RequestError: for instructions, which have a template of their own.
    """
    if _is_conversation(document):
      messages = [dict(role=role, content=text) for role, text in document]
      return self._template.split_into_parts(messages)
    if not isinstance(document, str) and not _has_roles(document):
      raise RequestError('instructions have a template of their own: set '
                         'data.chat_template to published')
    return document


def choose_layout(template: str, tokenizer: Any) -> Layout:
  """Returns the layout that data.chat_template names.

  Args:
    template: `published`, or else a Jinja file or a Hugging Face folder.
    tokenizer: the tokenizer of the run.

  Raises:
    RequestError: where it names no template.
  """
  if template == PUBLISHED_NAME:
    return PUBLISHED_LAYOUT
  return JinjaLayout(read_template(template, tokenizer))


def _is_conversation(document: Any) -> bool:
  """Returns whether a document is a list of turns in which something is said.
  """
  if isinstance(document, str):
    return False
  return any(text for _, text in document) and _has_roles(document)


def _has_roles(document: Sequence[tuple[str, str]]) -> bool:
  """Returns whether the first part of a document has the role of a speaker."""
  role, _ = document[0]
  return role in ROLE_OF_SPELLING.values()


PUBLISHED_LAYOUT = PublishedLayout()


def lay_out_vicuna_turns(turns: list[tuple[str, str]]
                         ) -> list[tuple[str, str]]:
  """Lays out a conversation by Vicuna's template, as questions and answers.

  Args:
    turns: (role, text) of each turn. The roles are system, user and assistant.

  Returns:
    (kind, text) of parts whose kinds are alternately 'question', all text
    before an answer, and 'answer'. Joined, with the tokenizer's separator after
    each answer, the texts are what the template writes.
  """
  # A conversation without a system message of its own begins with Vicuna's.
  parts = []
  question = ''
  first_role, _ = turns[0]
  if first_role != 'system':
    question = f'{VICUNA_SYSTEM_MESSAGE} '

  # Collect all that stands before the assistant's next answer as its question.
  # It ends with 'ASSISTANT:', which a model is shown and does not predict; the
  # space after the colon belongs to the answer.
  for role, text in turns:
    if role == 'system':
      question += f'{text} '
    elif not text:
      # An empty turn asks for an answer. FastChat writes neither a space nor a
      # separator after it.
      question += f'{role.upper()}:'
    elif role == 'user':
      question += f'USER: {text} '
    else:
      parts.append(('question', f'{question}ASSISTANT:'))
      parts.append(('answer', f' {text}'))
      question = ''
  if question:
    parts.append(('question', question))
  return parts


def read_alpaca(path: str) -> Iterator[list[tuple[str, str]]]:
  """Reads the instructions of a file, and lays each out by Alpaca's template.

  Args:
    path: a file of one JSON list, or a .jsonl with an object a line. Each
      object has an instruction, an output and perhaps an input.

  Yields:
    For each instruction its (kind, text) parts: a question and an answer.

  Raises:
    RequestError: naming the record that has no instruction or no output.
  """
  for location, record in texts.read_rows(path):
    instruction = texts.check_text(record.get('instruction'),
                                   f'{location}, instruction')
    context = texts.check_text(record.get('input', ''), f'{location}, input')
    answer = texts.check_text(record.get('output'), f'{location}, output')
    question = alpaca_prompt(instruction, context)
    yield [('question', question), ('answer', answer)]


def alpaca_prompt(instruction: str, context: str = '') -> str:
  """Returns the text that Alpaca's template writes before an answer.

  Args:
    instruction: the text of the task that the model is given.
    context: the input of the instruction; '': it has none.
  """
  if context:
    return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction,
                                           input=context)
  return ALPACA_PROMPT.format(instruction=instruction)


@dataclasses.dataclass(frozen=True)
class Template:
  """A Jinja chat template, with the tokenizer whose special tokens it writes.

  Attributes:
    name: the file or the folder that it is from, for messages.
    text: the text of the template.
    tokenizer: the tokenizer that encodes what the template writes.
    special_tokens: {'bos_token': '<s>', ...}, the names by which the template
      writes special tokens.
  """
  name: str
  text: str
  tokenizer: Tokenizer
  special_tokens: dict[str, str]

  @functools.cached_property
  def tokens_to_spell(self) -> tuple[frozenset[int], frozenset[int]]:
    """The tokens that are spelt letter by letter where they occur in a message,
    so that nobody can end a turn or speak for another participant.

    Returns:
      Two sets of ids. The first are spelt in messages of the assistant: the
      special tokens. The second are spelt in all other messages: also those
      added tokens that the template writes.
    """
    # Some templates begin a turn with an added token that is not special. Only
    # the assistant may write it, for instance to begin a call of a tool.
    id_of_added_text = self.tokenizer.id_of_added_text
    special_ids = set()
    for text in self.tokenizer.special_texts:
      special_ids.add(id_of_added_text[text])
    template_ids = set()
    for text, token in id_of_added_text.items():
      if text.strip() and text in self.text:
        template_ids.add(token)
    return frozenset(special_ids), frozenset(special_ids | template_ids)

  def encode(self, messages: Messages, answer: bool = False) -> np.ndarray:
    """Returns the token ids [T] of a conversation.

    Args:
      messages: dicts with role and content.
      answer: whether the text ends where the assistant's next message begins.
    """
    [ids_T] = encode_rendered_parts([self.render(messages, answer)],
                                    self.tokenizer)
    return ids_T

  def render(self, messages: Messages, answer: bool = False,
             goes_on: bool = False) -> str:
    """Returns the text of a conversation, in which marks stand around what is
    spelt.

    Args:
      messages: dicts with role and content.
      answer: whether the text ends where the assistant's next message begins.
      goes_on: whether the text ends inside the last message, without what the
        template writes after it.
    """
    text, _ = self._render(messages, answer=answer, goes_on=goes_on)
    return text

  def split_into_parts(self, messages: Messages) -> list[tuple[str, str]]:
    """Renders a conversation by the template, and splits the text into what the
    assistant says and everything else.

    The assistant says what stands in the template's {% generation %} blocks. If
    the template has none, an answer is the text that it adds to the text before
    it, which asks for the answer, up to the last special token.

    Args:
      messages: dicts with role and content.

    Returns:
      (kind, text) of the parts, in order. The kind 'said' is what the assistant
      says, and 'shown' is everything else. Joined, the texts are that of
      `render`, with marks around what is spelt letter by letter.

    Raises:
      RequestError: where the text with an answer does not begin with the text
        that asks for the answer.
    """
    # Find the answers in the text.
    text, spans = self._render(messages)
    if not _PATTERN_OF_ANSWER_BLOCK.search(self.text):
      spans = self._find_answers_by_difference(messages, text)

    # Shown and said parts alternate. The first and the last one must be shown
    # parts, perhaps empty ones, as encode_rendered_parts relies on it.
    parts = []
    end_of_last = 0
    for first, end in spans:
      parts.append(('shown', text[end_of_last:first]))
      parts.append(('said', text[first:end]))
      end_of_last = end
    parts.append(('shown', text[end_of_last:]))
    return parts

  def find_end_ids(self) -> set[int]:
    """Finds the special token that the template writes directly after an
    answer, at which generation can stop.

    Returns:
      The ids of that token; none, where the template writes no special token
      there.
    """
    # Render a conversation with a word that no template contains. What follows
    # the last occurrence of the word follows an answer.
    answer = 'Xyzzy'
    text = self.render([dict(role='user', content=answer),
                        dict(role='assistant', content=answer)])
    if answer not in text:
      return set()
    text_after_answer = text.rpartition(answer)[2].lstrip()

    # The longest special token wins, as one may begin with another.
    for special in sorted(self.tokenizer.special_texts, key=len, reverse=True):
      if text_after_answer.startswith(special):
        ids_T, _ = self.tokenizer.encode_with_special_tokens(special)
        return {int(token) for token in ids_T}
    return set()

  def _find_answers_by_difference(self, messages: Messages, text: str
                                  ) -> list[tuple[int, int]]:
    """Finds the assistant's answers where the template does not mark them.

    Args:
      messages: the messages of the conversation.
      text: the text of all of them, rendered.

    Returns:
      The (first character, end) of each answer in `text`.

    Raises:
      RequestError: where the text before an answer changes with the answer.
    """
    spans = []
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      # Render the conversation up to this answer, without it and with it. What
      # the second text adds to the first is the answer. This needs two things:
      # the second text begins with the first, and the whole text begins with
      # the second, so that places in it are also places in `text`.
      text_before = self.render(messages[:i], answer=True)
      text_with_answer = self.render(messages[:i + 1])
      can_be_told = (text_with_answer.startswith(text_before)
                     and text.startswith(text_with_answer))
      if not can_be_told:
        raise RequestError(
            f'message {i + 1} cannot be told from the others: the chat '
            f'template {self.name} has no {{% generation %}} block, and what '
            'it writes before an answer changes with the answer: put the '
            'block around what the assistant says')
      start = len(text_before)
      spans.append((start, self._find_end_of_answer(text_with_answer, start)))
    return spans

  def _find_end_of_answer(self, text: str, start: int) -> int:
    """Finds where an answer ends in a rendered text whose last turn it is:
    after the last special token that follows it, by which the template ends a
    turn.

    Args:
      text: the rendered text, with marks around what is spelt letter by letter.
      start: the index of the first character of the answer.

    Returns:
      The index of the character after that token; the end of the text if there
      is no such token.
    """
    # Find the last special token. What the template writes after it, such as a
    # line break, does not belong to the answer.
    ends = []
    for special in self.tokenizer.special_texts:
      if special in text[start:]:
        ends.append(text.rindex(special) + len(special))
    if not ends:
      return len(text)
    end = max(ends)

    # The token may stand in what the assistant itself says, and be spelt. Then
    # the mark that ends spelt text follows it, and it ends no turn.
    if MARKS_OF_SPELT_TEXT[1] in text[end:]:
      return len(text)
    return end

  def _render(self, messages: Messages, answer: bool = False,
              goes_on: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation by the template, in a process with limits.

    Args:
      messages: the messages of the conversation, with role and content.
      answer: whether the text ends where the assistant's next message begins.
      goes_on: whether the text ends inside the last message, without what the
        template writes after it.

    Returns:
      The text, and the (first character, end) of each block in it that is
      marked by {% generation %}.

    Raises:
      RequestError: where the template fails, or takes too long.
    """
    from training.data import limited
    # Mark in each message what must not be read as a special token that the
    # template itself writes. All fields are marked, as a template may write
    # any.
    tokens_of_assistant, tokens_of_others = self.tokens_to_spell
    chat = []
    for message in messages:
      tokens_to_spell = tokens_of_others
      if message['role'] == 'assistant':
        tokens_to_spell = tokens_of_assistant
      marked_message = {}
      for key, value in message.items():
        marked_message[key] = mark_special_tokens(
            value, tokenizer=self.tokenizer, tokens=tokens_to_spell)
      chat.append(marked_message)

    # Render in another process, with limits of time and memory: anybody may
    # have published the template, and it may do anything. transformers returns
    # the spans of {% generation %} blocks only if it is asked for them.
    options = dict(
        self.special_tokens, add_generation_prompt=answer,
        continue_final_message=goes_on,
        return_assistant_tokens_mask=bool(
            _PATTERN_OF_ANSWER_BLOCK.search(self.text)))
    return limited.call_with_limits(f'the chat template {self.name} fails',
                                    'render', self.text, chat, options,
                                    keep=True)


def read_template(spec: str, tokenizer: Tokenizer) -> Template:
  """Returns the template of data.chat_template.

  Args:
    spec: a Jinja file, a Hugging Face folder, or 'jinja:' and the text of the
      template itself, which the config of a run keeps.
    tokenizer: the tokenizer whose special tokens the template writes.

  Raises:
    RequestError: where there is no template.
  """
  name, text = read_template_text(spec)
  return make_template(name, text=text, tokenizer=tokenizer)


def read_template_text(spec: str) -> tuple[str, str]:
  """Reads the Jinja chat template that data.chat_template names.

  Args:
    spec: the path of a Jinja file, a Hugging Face folder, or 'jinja:' and the
      text of the template itself.

  Returns:
    Where the template comes from, for messages; and its text.

  Raises:
    RequestError: where there is no template.
  """
  if spec.startswith(PREFIX_OF_TEMPLATE_TEXT):
    return 'of the run', spec.removeprefix(PREFIX_OF_TEMPLATE_TEXT)

  # A name on the Hugging Face hub becomes a folder of its cache, for which this
  # downloads the files. Any other spec stays as it is.
  path = pathlib.Path(hub.download_if_on_hub(spec, weights=False)).expanduser()
  text = None
  if path.is_dir():
    text = read_template_of_folder(path)
  elif path.is_file():
    text = texts.read_text(str(path))
  if text is None:
    raise RequestError(
        f'data.chat_template is {shorten(spec)}, which is no file, and no '
        f'folder with a {CHAT_TEMPLATE_FILE} or a template in its '
        'tokenizer_config.json: choose from published, a Jinja file, and a '
        'Hugging Face folder')
  return str(path), text


def make_template(name: str, text: str, tokenizer: Tokenizer) -> Template:
  """Returns a template with a tokenizer and the special tokens that this has.

  Args:
    name: where the template is from, for messages.
    text: the text of the template.
    tokenizer: the tokenizer of the run.
  """
  return Template(name=name, text=text, tokenizer=tokenizer,
                  special_tokens=special_tokens_of_template(tokenizer))


def read_template_of_folder(folder: Any) -> str | None:
  """Reads the chat template of a Hugging Face folder.

  Args:
    folder: the path of the folder.

  Returns:
    The text of the template; None where the folder has none.
  """
  # A file of its own comes before the config of the tokenizer, as in
  # transformers.
  template_file = folder / CHAT_TEMPLATE_FILE
  if template_file.is_file():
    return texts.decode_text(template_file.read_bytes(), str(template_file))
  tokenizer_config = folder / 'tokenizer_config.json'
  if not tokenizer_config.is_file():
    return None
  template = storage.read_json(tokenizer_config).get('chat_template')

  # A folder with several templates has a list of them, each with a name. The
  # one called `default` is for a chat without tools.
  if isinstance(template, list):
    template_of_name = {}
    for entry in template:
      template_of_name[entry.get('name')] = entry.get('template')
    template = template_of_name.get('default')
  return template if isinstance(template, str) else None


def mark_special_tokens(text: str, tokenizer: Tokenizer, tokens: Set[int]
                        ) -> str:
  """Puts marks around the parts of a message that the tokenizer would read as
  special tokens. When the text is encoded, marked parts are spelt letter by
  letter, so that nobody can end a turn by writing a special token.

  The tokenizer itself finds these parts, since its normaliser may turn other
  letters into a special token.

  Args:
    text: the message.
    tokenizer: the tokenizer of the run.
    tokens: the ids of the tokens that the message may not contain.

  Returns:
    The text with MARKS_OF_SPELT_TEXT around each such part.
  """
  # Remove marks that the message itself contains, which could end ours. Then
  # find the parts that the tokenizer reads as one of the tokens, but not when
  # it spells special tokens. (An unknown word is [UNK] either way, and needs no
  # mark.)
  text = remove_marks(text)
  ids_T, spans_T2 = tokenizer.encode_with_special_tokens(text)
  spans = _find_spans_of_tokens(tokens, ids_T=ids_T, spans_T2=spans_T2)
  if spans:
    ids_T, spans_T2 = tokenizer.encode_without_special_tokens(text)
    spans -= _find_spans_of_tokens(tokens, ids_T=ids_T, spans_T2=spans_T2)

  # Mark the last part first: a mark moves all text behind it.
  begin_mark, end_mark = MARKS_OF_SPELT_TEXT
  for start, end in sorted(spans, reverse=True):
    spelt_part = f'{begin_mark}{text[start:end]}{end_mark}'
    text = text[:start] + spelt_part + text[end:]
  return text


def _find_spans_of_tokens(tokens: Set[int], ids_T: np.ndarray,
                          spans_T2: np.ndarray) -> set[tuple[int, int]]:
  """Finds where certain tokens stand in an encoded text.

  Args:
    tokens: the ids to find.
    ids_T: the ids of the T tokens of the text.
    spans_T2: [T, 2], the first character of each token, and the one after its
      last.

  Returns:
    (first character, end) of each such token.
  """
  spans = set()
  for token, (start, end) in zip(ids_T.tolist(), spans_T2.tolist()):
    if token in tokens:
      spans.add((start, end))
  return spans


def remove_marks(text: str) -> str:
  """Returns a text without the marks around spelt text."""
  return re.sub(f'[{"".join(MARKS_OF_SPELT_TEXT)}]', '', text)


def encode_rendered_parts(parts: Sequence[str],
                          tokenizer: Tokenizer) -> list[np.ndarray]:
  """Encodes a rendered conversation, and divides its ids among its parts.

  The parts are encoded as one text. They take turns: the first, third, ... are
  shown, and the second, fourth, ... are said. A token that has a character of
  something said belongs to the first such part, and any other token to the
  shown part in which it begins. So transformers masks {% generation %} blocks.

  Args:
    parts: the texts of `Template.split_into_parts`, with marks around what is
      to be spelt.
    tokenizer: the tokenizer of the run.

  Returns:
    The token ids of each part, int32 [T]; T may be 0.
  """
  # Encode the whole text, and find the characters that each of its T ids stands
  # for. Special tokens are spelt in what stands between two marks, and obeyed
  # in all else; the marks themselves have no ids. Spans count from the start of
  # a piece, and are moved to its place in the text.
  ids = []
  spans = []
  for match in re.finditer(_PATTERN_OF_PIECES, ''.join(parts)):
    if match['spelt']:
      group = 'spelt'
      encode = tokenizer.encode_without_special_tokens
    else:
      group = 'text'
      encode = tokenizer.encode_with_special_tokens
    piece_ids, piece_spans = encode(match[group])
    ids.append(piece_ids)
    spans.append(piece_spans + match.start(group))
  if not ids:
    return [np.zeros(0, np.int32) for _ in parts]
  ids_T = np.concatenate(ids)
  spans_T2 = np.concatenate(spans)

  # Count the ids that stand before each part's end, at which to split them. An
  # id of something shown (an even part) ends by then. An id of something said
  # (an odd part) begins before it, so that a token which reaches beyond the end
  # of an answer is the answer's. Only ids from the first on without a gap
  # count, and a later part can have no fewer ids before it than an earlier one.
  ends_of_parts = np.cumsum([len(part) for part in parts])
  ids_before_end = []
  most_before = 0
  for number, end in enumerate(ends_of_parts[:-1]):
    is_shown = number % 2 == 0
    if is_shown:
      is_before_T = spans_T2[:, 1] <= end
    else:
      is_before_T = spans_T2[:, 0] < end
    is_leading_T = np.logical_and.accumulate(is_before_T)
    most_before = max(most_before, int(np.count_nonzero(is_leading_T)))
    ids_before_end.append(most_before)
  return np.split(ids_T, ids_before_end)


def special_tokens_of_template(tokenizer: Tokenizer) -> dict[str, str]:
  """Returns the special tokens of a tokenizer in the form in which transformers
  passes them to a chat template, {'bos_token': '<s>', ...}.

  Args:
    tokenizer: the tokenizer of the run.
  """
  # The files of a tokenizer may name its special tokens. The tokenizer is
  # called by the path of its file or folder; one of bytes has neither.
  folder = tokenizers.find_path(tokenizer.name)
  if not folder.is_dir():
    folder = folder.parent
  named = {}
  if not tokenizer.name.startswith('bytes'):
    named = read_special_tokens(folder)
  if named:
    return named

  # Where no file names them, take those that the tokenizer found by itself.
  for kind, token in tokenizer.special_ids.items():
    named[f'{kind}_token'] = tokenizer.piece(token)
  return named
