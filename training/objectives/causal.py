"""Next tokens: of all text, of what follows a prefix, or of answers.

Of conversations only the assistant's answers are predicted.

As in the training of Vicuna and Alpaca, only what the assistant says, with the
separator that ends it, counts in the loss: from the space after `ASSISTANT:`
on, or after `### Response:`. A question and its answer are tokenised as one
text, as both published codes do. See training/data/conversations.py for the
templates.

Where data.chat_template names a Jinja template, that one says what is the
assistant's: see training/data/conversations.py.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from common.errors import require
from training import objectives
from training.data import conversations, sources
from training.data.conversations import Messages
from training.data.tokenizers import Tokenizer
from training.data.tokens import Documents
from training.objectives import Config, Objective, Prompts, Row, Shape, Talk


class Window(NamedTuple):
  """A stretch of the text, and the one token that follows it.

  Attributes:
    tokens: int32 [length + 1].
    size: how many of these are text; separators fill up the rest.
  """

  tokens: np.ndarray
  size: int


class Windows:
  """All documents as one stream of tokens, cut into windows of equal length.

  The stream is separator, document, separator, ... document, separator. Window
  i is stream[i L : i L + L + 1]: it overlaps the next one by a token, and so
  each token of the stream but the first separator is a target exactly once. In
  the 'eval' split the last window may be short, and is filled up with
  separators; in 'train' a short last window is left out.

  Args:
    corpus: of plain text.
    length: of a row; 0: data.length. L is AROUND less.
  """

  READS = (sources.TEXT,)
  AROUND = 0  # the tokens of a row beside its text, such as [CLS]

  def __init__(self, corpus: sources.Corpus, length: int = 0):
    """Cuts a text into windows, consecutive pieces of which each makes one row
    of a batch, and counts them.

    Args:
      corpus: the text, either of the training data or of the held-out data.
      length: the number of tokens of a row; 0: data.length.

    Raises:
      RequestError: for a text that is shorter than a row, or no plain text.
    """
    # The objective adds AROUND special tokens to a window, such as [CLS] and
    # [SEP], so a window is that much shorter than a row.
    length = length or corpus.config.data.length
    self.length = length - self.AROUND
    require(self.length > 0, f'data.length is {length}: a row of objective '
            f'{corpus.config.objective!r} needs {self.AROUND + 1} or more')
    self.separator = corpus.tokenizer.separator_id
    corpus.check_plain()
    self._stream = corpus.tokens
    self.num_tokens = self._stream.num_tokens
    self.num_bytes = self._stream.num_bytes

    # Count the windows, which do not overlap. Tokens at the end that do not
    # fill a window are left out in training. In evaluation they make a shorter
    # window, so that every token counts in the loss.
    full_windows, remaining_tokens = divmod(self.num_tokens, self.length)
    self._len = full_windows
    if remaining_tokens > 0 and corpus.split == 'eval':
      self._len += 1
    require(self._len > 0, f'data source {corpus.name!r} has '
            f'{self.num_tokens} training tokens, fewer than one sequence of '
            f'data.length={self.length}.')

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> Window:
    first_token = int(i) * self.length
    # A window and the token after it, which the stream has too.
    last_token = min(first_token + self.length, self.num_tokens)
    tokens = np.full(self.length + 1, self.separator, np.int32)
    self._stream.fill(tokens, first_token)
    return Window(tokens=tokens, size=last_token - first_token + 1)


class Causal(Objective):
  """Next-token prediction: the target of each token is the next one."""
  stacks = ('decoder',)
  view = Windows
  # Every token of a window but its padding is one to predict from.
  options = {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL',
             'weights': 'valid_BL'}
  seen = ('weights',)
  reads = ('data.document_mask',)
  writes = talks = predicts_every_token = mtp = True

  def example(self, item: Window, rng: np.random.Generator | None,
              config: Config, tokenizer: Tokenizer) -> Row:
    """Lays out a window of text as a row of a decoder, which predicts each next
    token.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [L]: tokens; targets, the token after each; and
      weights, which are 0 on padding. With data.document_mask also segment_ids
      and positions: a separator begins a new segment, at position 0, and so
      does the window.
    """
    # A window has L + 1 tokens: each but the last predicts the one after it. Of
    # `size` tokens that are no padding, one fewer has a target.
    tokens_L = item.tokens[:-1]
    targets_L = item.tokens[1:]
    predicted_L = np.arange(len(tokens_L)) < item.size - 1
    row = dict(tokens=tokens_L, targets=targets_L, weights=predicted_L)
    if config.data.document_mask:
      row |= objectives.number_documents(tokens_L == tokenizer.separator_id)
    return row

  def arrays(self, config: Config) -> dict[str, Shape]:
    if config.data.document_mask:
      return objectives.arrays_of_text(config, 'segment_ids', 'positions')
    return objectives.arrays_of_text(config)

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    return objectives.prompt_after_separator(texts, config, tokenizer=tokenizer)

  def talk(self, config: Config, tokenizer: Tokenizer) -> Talk:
    return talk_by_continuing(tokenizer)


class Prefix(Objective):
  """Prefix language modelling (Raffel et al. 2020, section 3.2.1): the tokens
  before a random place see each other, and those from there on are predicted.
  """
  stacks = ('decoder',)
  view = Windows
  options = {'prefix': 'prefix_B', 'valid': 'valid_BL'}
  seen = ('valid',)
  writes = True

  def example(self, item: Window, rng: np.random.Generator, config: Config,
              tokenizer: Tokenizer) -> Row:
    """Lays out a window of text as a row of a prefix language model: a random
    number of its first tokens are the prefix, which see each other and are not
    predicted.

    Args:
      item: a window of text: `tokens`, [L + 1], of which the first `size` are
        no padding.
      rng: the random generator that draws the length of the prefix.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row: tokens, targets and weights [L], where a weight is
      0 in the prefix and on padding; valid [L], which is 0 on padding; and
      prefix [], the number of tokens of the prefix.
    """
    tokens_L = item.tokens[:-1]
    targets_L = item.tokens[1:]
    place_L = np.arange(config.data.length)
    is_real_L = place_L < item.size - 1
    # The last token of the prefix predicts the first one after it.
    prefix_length = int(rng.integers(1, config.data.length))
    is_predicted_L = place_L >= prefix_length - 1
    return dict(tokens=tokens_L, targets=targets_L, valid=is_real_L,
                weights=is_real_L & is_predicted_L, prefix=prefix_length)

  def arrays(self, config: Config) -> dict[str, Shape]:
    return _valid_arrays(config) | dict(prefix=((), np.int32))

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    """Returns texts as prompts whose tokens all see each other."""
    prompts = objectives.prompt_after_separator(texts, config,
                                                tokenizer=tokenizer)
    return prompts._replace(arguments=dict(prefix_B=prompts.lengths))


def _valid_arrays(config: Config) -> dict[str, Shape]:
  """Returns the shapes of the arrays of a row of text, of which `valid` is 0 on
  padding."""
  row = objectives.arrays_of_text(config)
  return row | dict(valid=row['weights'])


def talk_by_continuing(tokenizer: Tokenizer, start: int | None = None) -> Talk:
  """Describes how to talk with a model of plain text, which has no chat
  template: each message of the user is a new line, from which the model
  continues the text.

  Args:
    tokenizer: the tokenizer of the model.
    start: the id of the token before the text; None: the separator, which
      stands between documents in training.

  Returns:
    A Talk: how to encode the messages, and which tokens end an answer.
  """
  separator = tokenizer.separator_id
  if start is None:
    start = separator

  def encode(messages: Sequence[dict[str, str]]) -> np.ndarray:
    """Returns the token ids [T] of the text that is said so far."""
    # Each message of the user begins a line. What the model says follows
    # without a line break, as it goes on from the user's text.
    text = ''
    for message in messages:
      if text and message['role'] == 'user':
        text += '\n'
      text += message['content']
    return np.concatenate([[start], tokenizer.encode(text)]).astype(np.int32)

  return Talk(words='goes on from the text', encode=encode,
              ends=frozenset({separator}), system=False, plain=True)


class Conversations:
  """Documents that are conversations: item i is the (kind, token ids) parts of
  one."""

  READS = (sources.TURNS,)

  def __init__(self, corpus: sources.Corpus):
    """Opens the conversations of a corpus.

    Args:
      corpus: conversations of one split.

    Raises:
      RequestError: for a source without answers of an assistant.
    """
    # `kinds` names all kinds of parts that the data have, such as 'question'.
    # None may be unknown here, and one at least must be an answer.
    kinds = corpus.tokens.kinds
    require(kinds <= {*conversations.KINDS_OF_PARTS}
            and bool(kinds & {*conversations.KINDS_OF_ANSWERS}),
            f'objective {corpus.config.objective!r} predicts the answers of '
            f'the assistant, but data source {corpus.name!r} holds none: name '
            'a field with a list of turns, some of the role assistant')
    # A conversation is one document. Its first token is not predicted, so it is
    # not counted.
    self._documents = Documents(corpus.tokens)
    self.num_tokens = corpus.tokens.num_tokens - corpus.tokens.documents
    self.num_bytes = corpus.tokens.num_bytes

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, i: int) -> list[tuple[str, np.ndarray]]:
    return self._documents[int(i)]


class Chat(Objective):
  """Prediction of the assistant's answers in conversations."""
  stacks = ('decoder',)
  view = Conversations
  options = {'valid': 'valid_BL'}
  seen = ('valid',)
  reads = ('data.chat_template',)
  writes = talks = has_chat_template = mtp = True

  def example(self, item: list[tuple[str, np.ndarray]],
              rng: np.random.Generator | None, config: Config,
              tokenizer: Tokenizer) -> Row:
    """Lays out one conversation as a row of a decoder, which learns to write
    the answers. A conversation of more than data.length = L tokens is cut off.

    Args:
      item: (kind, token ids) of each part of the conversation, such as a
        question or an answer.
      rng: not used, as nothing is drawn.
      config: the config of the run.
      tokenizer: the tokenizer of the run.

    Returns:
      The arrays of the row, [up to L]: tokens; targets, the token after each;
      weights, 1 where the target is the assistant's; and valid, which is 1.
    """
    # The target of a token is the one after it, hence the shift by one. If the
    # conversation is not cut off, its last token has no target. The caller pads
    # the arrays, with weight 0.
    L = config.data.length
    ids, is_predicted = lay_out_conversation(item, tokenizer)
    tokens = ids[:L]
    return dict(tokens=tokens, targets=ids[1:L + 1],
                weights=is_predicted[1:L + 1], valid=np.ones(len(tokens)))

  def arrays(self, config: Config) -> dict[str, Shape]:
    return _valid_arrays(config)

  def derived(self, config: Config) -> dict[str, str]:
    """Returns data.chat_template with the text of the template itself, so that
    the run does not change where its file or folder does, or is gone."""
    name = config.data.chat_template
    if name == conversations.PUBLISHED_NAME:
      return {}
    _, text = conversations.read_template_text(name)
    return {'data.chat_template': conversations.PREFIX_OF_TEMPLATE_TEXT + text}

  def prompt(self, texts: Sequence[str], config: Config, tokenizer: Tokenizer
             ) -> Prompts:
    """Returns each text as a question that the model is about to answer."""
    rows = []
    for text in texts:
      rows.append(encode_question(text, config, tokenizer=tokenizer))
    tokens, lengths = objectives.pad_prompts(rows)
    lead = talk_by_config(config, tokenizer).lead
    return Prompts(tokens=tokens, lengths=lengths, gap='\n', lead=lead)

  def talk(self, config: Config, tokenizer: Tokenizer) -> Talk:
    return talk_by_config(config, tokenizer)

  def chat_template(self, config: Config, tokenizer: Tokenizer) -> str:
    return write_chat_template(config, tokenizer)


def lay_out_conversation(parts: list[tuple[str, np.ndarray]],
                         tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Joins the parts of a conversation into one row of tokens, and marks which
  of them the model is trained to predict.

  Args:
    parts: (kind, token ids) of each part, in order. The kind says what it is,
      such as 'question' or 'answer'; the kinds 'shown' and 'said' are what a
      Jinja template wrote around an answer, and the answer.
    tokenizer: the tokenizer of the run.

  Returns:
    The token ids [T]; and bool [T], whether each is a token of the assistant,
    and so one to predict.
  """
  # The separator begins the row, so that the first token of a question follows
  # something, and it ends each answer. A Jinja template has written its own
  # marks of both, so there `separator` is an empty array.
  is_rendered = bool(parts) and parts[0][0] in ('shown', 'said')
  separator = np.array([tokenizer.separator_id], np.int32)
  if is_rendered:
    separator = separator[:0]
  ids_of_parts = [separator]
  is_predicted = [np.zeros(len(separator), bool)]

  # Join the parts. Answers are predicted together with the separator after
  # them, so that the model learns to stop. Everything else is only read.
  for kind, part in parts:
    ids = np.asarray(part, np.int32)
    is_answer = kind in conversations.KINDS_OF_ANSWERS
    if is_answer:
      ids = np.concatenate([ids, separator])
    ids_of_parts.append(ids)
    is_predicted.append(np.full(len(ids), is_answer))
  return np.concatenate(ids_of_parts), np.concatenate(is_predicted)


def encode_question(text: str, config: Config,
                    tokenizer: Tokenizer) -> np.ndarray:
  """Returns the token ids [T] after which the model answers a question.

  Args:
    text: the question, which is laid out by the template of the run's data;
      '': the start of a conversation, without one.
    config: the config of the run.
    tokenizer: the tokenizer of the run.
  """
  if not text:
    return np.array([tokenizer.separator_id], np.int32)
  return talk_by_config(config, tokenizer).encode([dict(role='user',
                                                        content=text)])


def talk_by_config(config: Config, tokenizer: Tokenizer) -> Talk:
  """Returns how the model of a run is talked with: by the template that laid
  out its training data, which is a Jinja template, Alpaca's or Vicuna's.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer of the run.
  """
  name = config.data.chat_template
  if name != conversations.PUBLISHED_NAME:
    return talk_by_template(conversations.read_template(name, tokenizer))
  is_alpaca = 'alpaca:' in config.data.source

  def encode(messages: Messages) -> np.ndarray:
    """Returns the token ids [T] of a conversation, up to the answer that is
    about to begin.

    Args:
      messages: the messages so far, each with role and content.
    """
    # Lay out the messages as (kind, text) parts. The last one is an answer
    # without text, which is about to begin; Vicuna's template writes
    # 'ASSISTANT:' for an empty turn before it.
    parts = []
    if is_alpaca:
      for message in messages:
        content = message['content']
        if message['role'] == 'user':
          parts.append(('question', conversations.alpaca_prompt(content)))
        else:
          parts.append(('answer', content))
    else:
      turns = [(message['role'], message['content']) for message in messages]
      parts.extend(conversations.lay_out_vicuna_turns([*turns, ('assistant',
                                                                '')]))
    parts.append(('answer', ''))

    # Encode them as in training. That writes a separator after the empty
    # answer. It is cut off, as the model is to write the answer there.
    ids_of_parts = [ids for ids, _ in sources.encode_parts(tokenizer, [parts])]
    kinds = [kind for kind, _ in parts]
    encoded_parts = list(zip(kinds, ids_of_parts))
    ids, _ = lay_out_conversation(encoded_parts, tokenizer)
    return ids[:-1]

  ends = frozenset({tokenizer.separator_id})
  if is_alpaca:
    return Talk(words="answers by Alpaca's template", encode=encode, ends=ends,
                system=False)
  return Talk(words="answers by Vicuna's template", encode=encode, ends=ends,
              lead=' ')


def talk_by_template(template: conversations.Template, ends: Iterable[int] = (),
                     words: str = '') -> Talk:
  """Describes how to talk with a model that has a Jinja chat template, as
  Hugging Face models have.

  Args:
    template: the chat template, together with its tokenizer.
    ends: the ids of the tokens that end an answer, as a Hugging Face folder
      lists them; (): the separator, and the token that the template writes
      after an answer.
    words: a phrase that tells the user how the model answers, such as 'answers
      by the chat template NAME', which '' stands for.

  Returns:
    A Talk: how to encode the messages, and which tokens end an answer.
  """
  def encode(messages: Messages) -> np.ndarray:
    """Returns the token ids [T] of a conversation, up to its next answer."""
    return template.encode(messages, answer=True)

  if not ends:
    ends = template.find_end_ids() | {template.tokenizer.separator_id}
  if not words:
    words = f'answers by the chat template {template.name}'
  return Talk(words=words, encode=encode, ends=frozenset(ends))


def write_chat_template(config: Config, tokenizer: Tokenizer) -> str:
  """Writes the template by which a run's conversations are laid out as a Jinja
  template, for use in transformers.

  It renders the messages of a chat to the same text as the training data have.
  One thing is lost: an Alpaca instruction may come with an input, for which a
  chat of transformers has no place.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    The text of the template.
  """
  # If the run has a Jinja template, it is returned as it is.
  if config.data.chat_template != conversations.PUBLISHED_NAME:
    return conversations.read_template_text(config.data.chat_template)[1]

  # A template writes special tokens by their names in transformers: here the
  # separator is {{ eos_token }} or {{ sep_token }}. In an f-string, four braces
  # write two.
  role_of_separator = 'eos'
  if tokenizer.special_ids.get('eos') != tokenizer.separator_id:
    role_of_separator = 'sep'
  end = f'{{{{ {role_of_separator}_token }}}}'
  assistant = "{% elif m.role == 'assistant' %}"

  # Write Alpaca's template or Vicuna's. In both, the separator begins the text
  # and ends each answer; the text ends where the next answer is to begin.
  if 'alpaca:' in config.data.source:
    return (end + "{% for m in messages %}{% if m.role == 'user' %}"
            + conversations.ALPACA_PROMPT.format(instruction='{{ m.content }}')
            + assistant + '{{ m.content }}' + end + '{% endif %}{% endfor %}')
  return (
      end + "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
      f'{{% else %}}{conversations.VICUNA_SYSTEM_MESSAGE}{{% endif %}}'
      "{{ ' ' }}"
      "{% for m in messages %}{% if m.role == 'user' %}"
      "USER: {{ m.content }}{{ ' ' }}"
      + assistant + 'ASSISTANT: {{ m.content }}' + end
      + "{% elif not loop.first %}{{ m.content }}{{ ' ' }}{% endif %}"
      '{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}')


OBJECTIVES = {'causal': Causal(), 'prefix': Prefix(), 'chat': Chat()}
