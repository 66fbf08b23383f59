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

Where data.chat_template names a Jinja file or a Hugging Face folder, that
template lays out the turns (training/data/chat_templates.py).
training/objectives/chat.py makes rows of all of these parts.
"""

from collections.abc import Callable, Iterator, Sequence
import pathlib
from typing import Any, NamedTuple

from configs.errors import one_of, require, short
from training.data import chat_templates
from training.data import texts

# Who speaks, as files spell it: our kind of part.
ROLES = {'system': 'system', 'user': 'user', 'human': 'user',
         'prompter': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'chatgpt': 'assistant', 'bot': 'assistant'}
# The parts that a conversation is made of: those of the published templates,
# and those of a Jinja template.
KINDS = ('question', 'answer', 'shown', 'said')
ANSWERS = ('answer', 'said')  # those predicted
PUBLISHED_NAME = 'published'  # data.chat_template of the two templates here
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
  """Returns the (role, text) turns of one conversation.

  Raises:
    ValueError: for a turn without a known role or without text.
  """
  parts = []
  for turn in turns:
    require(isinstance(turn, dict), f'{where} holds {short(turn)}, and no '
            'turn: an object with role and content, or from and value')
    role = turn.get('role', turn.get('from'))
    one_of(f'role in {where}', role := str(role), ROLES)
    parts.append((ROLES[role], texts.checked(
        turn.get('content', turn.get('value')), f'{where} turn of {role!r}')))
  return parts


class Layout(NamedTuple):
  """How the conversations of a source are laid out.

  Attributes:
    key: what tells this layout from others.
    of: document -> document; plain text and empty turns stay as they are.
  """
  key: str
  of: Callable[[Any], Any]


def layout(template: str, tokenizer: Any) -> Layout:
  """Returns the layout that data.chat_template names.

  Args:
    template: published, a Jinja file or a Hugging Face folder.
    tokenizer: the run's.

  Raises:
    RequestError: where it names no template.
  """
  if template == PUBLISHED_NAME:
    return PUBLISHED
  jinja = chat_templates.read(template, tokenizer)

  def of(document: Any) -> Any:
    if not _is_turns(document):
      require(isinstance(document, str) or document[0][0] in ROLES.values(),
              'instructions have a template of their own: set '
              'data.chat_template to published')
      return document
    return jinja.parts([dict(role=role, content=text)
                        for role, text in document])

  return Layout(f'jinja {jinja.fingerprint}', of)


def _is_turns(document: Any) -> bool:
  return (not isinstance(document, str) and any(text for _, text in document)
          and document[0][0] in ROLES.values())


PUBLISHED = Layout(PUBLISHED_NAME, lambda document: vicuna(
    document) if _is_turns(document) else document)


def vicuna(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns turns by `parse` as (kind, text) parts, the kinds `question` and
  `answer`. Joined, with the separator after each answer, they are the
  template's text."""
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
  require(isinstance(records, list), f'{path} is no list of records: name it '
          '.jsonl if it has one a line')
  for number, record in enumerate(records, 1):
    where = f'{path}, record {number},'
    require(isinstance(record, dict), f'{where} is no JSON object')
    asked, given, answer = (
        texts.checked(record.get(name, default), f'{where} {name}')
        for name, default in (('instruction', None), ('input', ''),
                              ('output', None)))
    yield [('question', alpaca_prompt(asked, given)), ('answer', answer)]


def alpaca_prompt(instruction: str, given: str = '') -> str:
  """Returns the text before an answer; `given` is the record's input."""
  return (PROMPT_INPUT if given else PROMPT).format(
      instruction=instruction, input=given)
