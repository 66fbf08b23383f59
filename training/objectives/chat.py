"""Conversations: only the assistant's answers are predicted.

As in the training of Vicuna and Alpaca, only what the assistant says, with the
separator that ends it, counts in the loss: from the space after `ASSISTANT:`
on, or after `### Response:`. A question and its answer are tokenised as one
text, as both published codes do. See training/data/conversations.py for the
templates.

`data.chat_template=earlier` lays out as this project did before it had that
field: turns end with a line break, no system text is added, and `ASSISTANT: `
ends with a space. A run of that time continues with it.
"""

from collections.abc import Sequence

import numpy as np

from training.data import conversations, packing
from training.data.tokenizers import Tokenizer
from training.objectives import record
from training.objectives.record import Config, Objective, Prompts, Row, Shape

# The text before a part of each kind, and after it. None stands for the
# separator, and says that the part counts in the loss. Questions and answers
# are what the published templates make of the turns; all others are of the
# earlier template.
HEADERS = {'question': '', 'answer': '', 'system': '', 'user': 'USER: ',
           'assistant': 'ASSISTANT: ', 'prompt': '', 'response': ''}
TAILS = {'question': '', 'answer': None, 'system': '\n', 'user': '\n',
         'assistant': None, 'prompt': '', 'response': None}


def chat(parts: list[tuple[str, np.ndarray]], rng: np.random.Generator | None,
         config: Config, tokenizer: Tokenizer) -> Row:
  """Lays out one conversation, cut off at data.length = L.

  Returns:
    tokens, targets [up to L]; weights [up to L], 1 where the target is the
    assistant's; valid [up to L], 1 for each token.
  """
  del rng
  L = config.data.length
  ids, told = layout(parts, tokenizer)
  return dict(tokens=ids[:L], targets=ids[1:L + 1], weights=told[1:L + 1],
              valid=np.ones(len(ids[:L])))


def _arrays(config: Config) -> dict[str, Shape]:
  row = record.text_arrays(config)
  return row | dict(valid=row['weights'])


def layout(parts: list[tuple[str, np.ndarray]], tokenizer: Tokenizer
           ) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids [T] of a conversation, and which of them are predicted."""
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


def question(text: str, config: Config, tokenizer: Tokenizer) -> np.ndarray:
  """Returns the ids after which the model answers `text`, by the template of
  the run's data; of no text, a conversation's start."""
  if not text:
    return np.array([tokenizer.separator_id], np.int32)
  alpaca = 'alpaca:' in config.data.source
  if config.data.chat_template == 'earlier':
    parts = ([('prompt', conversations.alpaca_prompt(text)), ('response', '')]
             if alpaca else [('user', text), ('assistant', '')])
  elif alpaca:
    parts = [('question', conversations.alpaca_prompt(text)), ('answer', '')]
  else:
    parts = [*conversations.vicuna([('user', text), ('assistant', '')]),
             ('answer', '')]
  ids, _ = layout([(kind, tokenizer.encode(part)) for kind, part in parts],
                  tokenizer)
  return ids[:-1]  # the answer has yet to end


def jinja(config: Config, tokenizer: Tokenizer) -> str | None:
  """Returns the published template of a run's data as transformers takes one,
  a Jinja template; None for the earlier template.

  Alpaca's has no place for an input, which a chat of transformers does not
  have either.
  """
  if config.data.chat_template == 'earlier':
    return None
  kind = next(name for name in ('sep', 'eos')
              if tokenizer.special_ids.get(name) == tokenizer.separator_id)
  end = f'{{{{ {kind}_token }}}}'
  said = "{% elif m.role == 'assistant' %}"
  if 'alpaca:' in config.data.source:
    return (end + "{% for m in messages %}{% if m.role == 'user' %}"
            + conversations.PROMPT.format(instruction='{{ m.content }}')
            + said + '{{ m.content }}' + end + '{% endif %}{% endfor %}')
  return (
      end + "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
      f"{{% else %}}{conversations.SYSTEM}{{% endif %}}{{{{ ' ' }}}}"
      "{% for m in messages %}{% if m.role == 'user' %}"
      "USER: {{ m.content }}{{ ' ' }}"
      + said + 'ASSISTANT: {{ m.content }}' + end
      + "{% elif not loop.first %}{{ m.content }}{{ ' ' }}{% endif %}"
      '{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}')


def _questions(texts: Sequence[str], config: Config, tokenizer: Tokenizer
               ) -> Prompts:
  """Returns each text as a question."""
  return Prompts(*record.padded([question(text, config, tokenizer)
                                 for text in texts]), gap='\n')


OBJECTIVES = {
    'chat': Objective(
        'decoder', packing.Conversations, chat, _arrays, ('tokens',),
        {'valid': 'valid_BL'}, ('valid',), reads=('data.chat_template',),
        prompt=_questions, chat_template=jinja),
}
