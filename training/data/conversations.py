"""Conversations in files, and the published templates that lay them out.

A JSONL field with a list of turns, {"role": "user", "content": ...} or
ShareGPT's {"from": "human", "value": ...}, is a conversation. It is laid out
by Vicuna's template, version 1.1 (lm-sys/FastChat, conversation.py), where
</s> is the tokenizer's separator:

  SYSTEM USER: a question ASSISTANT: an answer</s>USER: a question ...

A record of `alpaca:GLOB`, {"instruction": ..., "input": ..., "output": ...},
is laid out by Alpaca's template (tatsu-lab/stanford_alpaca, train.py): PROMPT,
or PROMPT_INPUT where there is an input, directly followed by the output and the
separator.

With `data.chat_template=earlier` neither template is used: the turns, or the
prompt and its response, stay the parts that the file has. Where it names a
Jinja file or a Hugging Face folder, that template lays out the turns
(training/data/chat_templates.py). training/objectives/chat.py makes rows of all
of these parts.
"""

from collections.abc import Callable, Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

from configs.errors import RequestError
from training.data import chat_templates
from training.data import texts

# Who speaks, as files spell it: our kind of part.
ROLES = {'system': 'system', 'user': 'user', 'human': 'user',
         'prompter': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'chatgpt': 'assistant', 'bot': 'assistant'}
# The parts that a conversation may be made of: those of a file, those of the
# published templates, and those of a Jinja template.
KINDS = ('system', 'user', 'assistant', 'prompt', 'response', 'question',
         'answer', 'shown', 'said')
ANSWERS = ('assistant', 'response', 'answer', 'said')  # those predicted
TEMPLATES = ('published', 'earlier')
SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's "
    'questions.')
PROMPT = (
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n'
    '### Instruction:\n{instruction}\n\n### Response:')
PROMPT_INPUT = (
    'Below is an instruction that describes a task, paired with an input that '
    'provides further context. Write a response that appropriately completes '
    'the request.\n\n'
    '### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n'
    '### Response:')


def parse(turns: Sequence, where: str) -> list[tuple[str, str]]:
  """Returns the (kind, text) parts of one conversation.

  Raises:
    ValueError: for a turn without a known role or without text.
  """
  parts = []
  for turn in turns:
    if not isinstance(turn, dict):
      raise RequestError(f'{where} holds a {type(turn).__name__}, not a turn: '
                         'an object with role and content, or from and value.')
    role = turn.get('role', turn.get('from'))
    text = turn.get('content', turn.get('value'))
    if not isinstance(role, str) or role not in ROLES:
      raise RequestError(f'{where} has the role {role!r}: choose from '
                         f'{", ".join(ROLES)}.')
    if not isinstance(text, str):
      raise RequestError(f'{where} has a turn of {role!r} without text.')
    parts.append((ROLES[role], texts.checked(text, where)))
  return parts


class Layout(NamedTuple):
  """How the documents of a source are laid out.

  Attributes:
    key: what tells this layout from others; '': documents stay as they are.
    of: document -> document.
  """
  key: str
  of: Callable[[Any], Any]


def layout(template: str, tokenizer: Any) -> Layout:
  """Returns the layout that data.chat_template names.

  Args:
    template: published, earlier, a Jinja file or a Hugging Face folder.
    tokenizer: the run's.

  Raises:
    RequestError: where it names no template.
  """
  if template == 'published':
    return PUBLISHED
  if template == 'earlier':
    return Layout('', lambda document: document)
  jinja = chat_templates.read(template, tokenizer)

  def of(document: Any) -> Any:
    if isinstance(document, str) or not any(text for _, text in document):
      return document
    if document[0][0] not in ROLES.values():
      raise RequestError('instructions have a template of their own: set '
                         'data.chat_template to published')
    return jinja.parts([dict(role=role, content=text)
                        for role, text in document])

  return Layout(f'jinja {jinja.fingerprint}', of)


def published(document: Any):
  """Returns a document as the published templates lay it out.

  Args:
    document: parts by `parse` or read_alpaca; plain text is returned as it
      is.

  Returns:
    (kind, text) parts, the kinds `question` and `answer`. Joined, with the
    separator after each answer, they are the template's text.
  """
  if isinstance(document, str) or not any(text for _, text in document):
    return document
  if document[0][0] in ROLES.values():
    return vicuna(document)
  names = {'prompt': 'question', 'response': 'answer'}
  return [(names[kind], text) for kind, text in document]


PUBLISHED = Layout('published', published)


def vicuna(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns turns, (kind, text) by `parse`, as questions and answers."""
  parts = []
  asked = '' if turns[0][0] == 'system' else f'{SYSTEM} '
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
  return parts + [('question', asked)] * bool(asked)


def read_alpaca(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the parts of each record of a file: one JSON list, or in a .jsonl
  an object a line.

  Raises:
    ValueError: naming the record that is none.
  """
  text = texts.decoded(pathlib.Path(path).read_bytes(), path)
  records = ([texts.parsed(line, f'{path}, line {number},')
              for number, line in enumerate(text.split('\n'), 1)
              if line.strip()]
             if path.endswith('.jsonl') else texts.parsed(text, path))
  if not isinstance(records, list):
    raise RequestError(f'{path} is no list of records: name it .jsonl if it '
                       'has one a line.')
  for number, record in enumerate(records, 1):
    told = [record.get(name, '' if name == 'input' else None)
            if isinstance(record, dict) else None
            for name in ('instruction', 'input', 'output')]
    if not all(isinstance(text, str) for text in told):
      raise RequestError(f'{path}, record {number}, has no text under '
                         'instruction and output, or an input that is none.')
    told = [texts.checked(text, f'{path}, record {number},') for text in told]
    yield [('prompt', alpaca_prompt(*told[:2])), ('response', told[2])]


def alpaca_prompt(instruction: str, given: str = '') -> str:
  """Returns the text before an answer; `given` is the record's input."""
  return (PROMPT_INPUT if given else PROMPT).format(
      instruction=instruction, input=given)
