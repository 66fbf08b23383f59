"""Conversations: prompt-masked fine-tuning, as Vicuna and Alpaca were made.

A JSONL field with a list of turns, {"role": "user", "content": ...} or
ShareGPT's {"from": "human", "value": ...}, is a conversation. It is laid out
by Vicuna's template, version 1.1 (lm-sys/FastChat, conversation.py), where
</s> is the tokenizer's separator:

  SYSTEM USER: a question ASSISTANT: an answer</s>USER: a question ...

A record of `alpaca:GLOB`, {"instruction": ..., "input": ..., "output": ...},
is laid out by Alpaca's (tatsu-lab/stanford_alpaca, train.py), PROMPT or with an
input PROMPT_INPUT, right after which come the output and the separator.

Only what the assistant says, with the separator that ends it, counts in the
loss: from the space after `ASSISTANT:` on, or after `### Response:`. What is
asked and its answer are tokenised as one text, as both published codes do.

`data.chat_template=earlier` lays out as this project did before it had that
field: turns end with a line break, no system text is added, and `ASSISTANT: `
ends with a space. A run of that time goes on with it.
"""

from collections.abc import Iterator, Sequence
import pathlib

import numpy as np

from configs.errors import RequestError
from training.data import texts

# Who speaks, as files spell it: our kind of part.
ROLES = {'system': 'system', 'user': 'user', 'human': 'user',
         'prompter': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'chatgpt': 'assistant', 'bot': 'assistant'}
TEMPLATES = ('published', 'earlier')
# What stands before a part of a kind, and after it; None: the separator, and
# the part counts in the loss. The published templates make questions and
# answers of the turns; the others are parts as the earlier one has them.
HEADERS = {'question': '', 'answer': '', 'system': '', 'user': 'USER: ',
           'assistant': 'ASSISTANT: ', 'prompt': '', 'response': ''}
TAILS = {'question': '', 'answer': None, 'system': '\n', 'user': '\n',
         'assistant': None, 'prompt': '', 'response': None}

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


def published(document):
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
    return _vicuna(document)
  names = {'prompt': 'question', 'response': 'answer'}
  return [(names[kind], text) for kind, text in document]


def _vicuna(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
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
  records = ([texts.parsed(line, path) for line in text.splitlines()
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
    yield [('prompt', _prompt(*told[:2])), ('response', told[2])]


def _prompt(instruction: str, given: str = '') -> str:
  return (PROMPT_INPUT if given else PROMPT).format(
      instruction=instruction, input=given)


def question(text: str, config, tokenizer) -> np.ndarray:
  """Returns the ids after which the model answers `text`, by the template of
  the run's data; of no text, a conversation's start."""
  if not text:
    return np.array([tokenizer.separator_id], np.int32)
  alpaca = 'alpaca:' in config.data.source
  if config.data.chat_template == 'earlier':
    parts = ([('prompt', _prompt(text)), ('response', '')] if alpaca else
             [('user', text), ('assistant', '')])
  elif alpaca:
    parts = [('question', _prompt(text)), ('answer', '')]
  else:
    parts = [*_vicuna([('user', text), ('assistant', '')]), ('answer', '')]
  ids, _ = layout([(kind, tokenizer.encode(part)) for kind, part in parts],
                  tokenizer)
  return ids[:-1]  # the answer has yet to end


def jinja(config, tokenizer) -> str | None:
  """Returns the published template of a run's data as transformers takes one,
  a Jinja template; None where the run has none.

  Alpaca's has no place for an input, which a chat of transformers does not
  have either.
  """
  if config.objective != 'chat' or config.data.chat_template == 'earlier':
    return None
  kind = next(name for name in ('sep', 'eos')
              if tokenizer.special_ids.get(name) == tokenizer.separator_id)
  end = f'{{{{ {kind}_token }}}}'
  said = "{% elif m.role == 'assistant' %}"
  if 'alpaca:' in config.data.source:
    return (end + "{% for m in messages %}{% if m.role == 'user' %}"
            + PROMPT.format(instruction='{{ m.content }}')
            + said + '{{ m.content }}' + end + '{% endif %}{% endfor %}')
  return (
      end + "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
      f"{{% else %}}{SYSTEM}{{% endif %}}{{{{ ' ' }}}}"
      "{% for m in messages %}{% if m.role == 'user' %}"
      "USER: {{ m.content }}{{ ' ' }}"
      + said + 'ASSISTANT: {{ m.content }}' + end
      + "{% elif not loop.first %}{{ m.content }}{{ ' ' }}{% endif %}"
      '{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}')


def chat(parts: list[tuple[str, np.ndarray]], rng: np.random.Generator,
         config, tokenizer) -> dict[str, np.ndarray]:
  """Lays out one conversation, cut off at data.length.

  Returns:
    tokens, targets [L] int32, weights [L] float32: 1 where the target is the
    assistant's; valid [L] float32: 0 on padding.
  """
  del rng
  ids, told = layout(parts, tokenizer)
  size = config.data.length + 1
  ids, told = ids[:size], told[:size]
  pad = size - len(ids)
  ids = np.pad(ids, (0, pad), constant_values=tokenizer.separator_id)
  told = np.pad(told, (0, pad))
  valid = np.arange(size - 1) < size - pad
  return dict(tokens=ids[:-1], targets=ids[1:],
              weights=told[1:].astype(np.float32),
              valid=valid.astype(np.float32))


def layout(parts, tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids [T] of a conversation, and which the model is to say."""
  end = np.array([tokenizer.separator_id], np.int32)
  ids, told = [end], [np.zeros(1, bool)]
  for kind, text in parts:
    says = TAILS[kind] is None
    header = tokenizer.encode(HEADERS[kind])
    tail = end if says else tokenizer.encode(TAILS[kind])
    for piece, counts in ((header, False), (text, says), (tail, says)):
      ids.append(np.asarray(piece, np.int32))
      told.append(np.full(len(piece), counts))
  return np.concatenate(ids), np.concatenate(told)
