"""Conversations: prompt-masked fine-tuning, as Alpaca and Vicuna were made.

A JSONL field with a list of turns, {"role": "user", "content": ...} or
ShareGPT's {"from": "human", "value": ...}, is a conversation. It is laid out
by Vicuna's template, and only what the assistant says, with the separator
that ends it, counts in the loss:

  A system text.
  USER: a question
  ASSISTANT: an answer<separator>
"""

from collections.abc import Sequence

import numpy as np

# Who speaks, as files spell it: our kind of part.
ROLES = {'system': 'system', 'user': 'user', 'human': 'user',
         'prompter': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
         'chatgpt': 'assistant', 'bot': 'assistant'}
HEADERS = {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}


def parse(turns: Sequence, where: str) -> list[tuple[str, str]]:
  """Returns the (kind, text) parts of one conversation.

  Raises:
    ValueError: for a turn without a known role or without text.
  """
  parts = []
  for turn in turns:
    if not isinstance(turn, dict):
      raise ValueError(f'{where} holds a {type(turn).__name__}, not a turn: an '
                       'object with role and content, or from and value.')
    role = turn.get('role', turn.get('from'))
    text = turn.get('content', turn.get('value'))
    if role not in ROLES:
      raise ValueError(f'{where} has the role {role!r}: choose from '
                       f'{", ".join(ROLES)}.')
    if not isinstance(text, str):
      raise ValueError(f'{where} has a turn of {role!r} without text.')
    parts.append((ROLES[role], text))
  return parts


def chat(parts: list[tuple[str, np.ndarray]], rng: np.random.Generator,
         config, tokenizer) -> dict[str, np.ndarray]:
  """Lays out one conversation, cut off at data.length.

  Returns:
    tokens, targets [L] int32, weights [L] float32: 1 where the target is the
    assistant's.
  """
  del rng
  ids, told = layout(parts, tokenizer)
  size = config.data.length + 1
  ids, told = ids[:size], told[:size]
  pad = size - len(ids)
  ids = np.pad(ids, (0, pad), constant_values=tokenizer.separator_id)
  told = np.pad(told, (0, pad))
  return dict(tokens=ids[:-1], targets=ids[1:],
              weights=told[1:].astype(np.float32))


def layout(parts, tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids [T] of a conversation, and which the assistant says."""
  end = np.array([tokenizer.separator_id], np.int32)
  ids, told = [end], [np.zeros(1, bool)]
  for kind, text in parts:
    header = tokenizer.encode(HEADERS[kind])
    tail = end if kind == 'assistant' else tokenizer.encode('\n')
    for piece, counts in ((header, False), (text, kind == 'assistant'),
                          (tail, kind == 'assistant')):
      ids.append(np.asarray(piece, np.int32))
      told.append(np.full(len(piece), counts))
  return np.concatenate(ids), np.concatenate(told)
