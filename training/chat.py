"""Conversations with a model, turn by turn.

`of_run` and `of_folder` load a model that can be talked with. An Engine is its
decoder with a cache: it is shown tokens, and draws the one after them. A
Session is a conversation: its messages, and the answer to each.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

from etils import epath
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks
from architectures.parts import skeletons
from architectures.parts.moe.layer import without_capacity
from common.errors import RequestError, require
from training import generate, objectives, parameters, runs
from training.data import conversations, inputs, tokenizers
from training.data.tokenizers import Tokenizer
from training.hf import config as hf_config, generation as hf_generation
from training.hf import weights
from training.objectives import causal
from training.objectives import Talk

# The numbers of tokens that are read at once, ascending; the rest of the last
# piece is padding, which the next tokens overwrite.
PIECE_SIZES = (1, 32, 256)
# Decoders write this for bytes that are no character.
REPLACEMENT_CHARACTER = '\ufffd'
# The advice for a model that cannot be talked with.
ADVICE_FOR_OTHER_MODELS = (
    'its model does not write a text from left to right: eval.py has '
    '--prompt, and --tasks=fill_mask, diffusion_samples, labels and embed')


class ChatModel(NamedTuple):
  """A model that can be talked with.

  Attributes:
    module, params: the model.
    tokenizer: its tokenizer.
    talk: how it is talked with.
    options: the options of its draws in generation_config.json; {}: none.
  """
  module: nn.Module
  params: Any
  tokenizer: Tokenizer
  talk: Talk
  options: dict[str, Any]


def load_from_run(workdir: epath.Path, step: int | str | None = None,
                  template: str = '') -> ChatModel:
  """Returns the model of a run.

  Args:
    workdir: the folder of the run.
    step: the checkpoint to read; 'best'; None: the newest.
    template: a chat template, as data.chat_template names one; '': the run's.

  Raises:
    RequestError: for a model that cannot be talked with.
  """
  config = runs.load_run_config(workdir)
  objective = objectives.of(config)
  require(objective.talks,
          f'objective {config.objective!r}: {ADVICE_FOR_OTHER_MODELS}')

  # The model.
  tokenizer = runs.load_run_tokenizer(workdir, config)
  generation = hf_generation.kept(workdir)
  module = architectures.build(runs.load_run_model_config(workdir, config))
  restored = parameters.read_parameters_on_one_device(workdir, module, step)

  # How it is talked with: as it was trained, or as its import says.
  talk = objective.talk(config, tokenizer)
  if generation is not None or template:
    is_published = hf_generation.is_published(workdir, restored.step)
    talk = _choose_talk(tokenizer, generation=generation, template=template,
                        usual=talk, published=is_published)
  options = None
  if generation is not None:
    options = generation.options
  return ChatModel(module=module, params=restored.state, tokenizer=tokenizer,
                   talk=talk, options=options or {})


def load_from_folder(folder: epath.Path, template: str = '') -> ChatModel:
  """Returns the model of a Hugging Face folder; see `of_run`."""
  model = hf_config.read(hf_config.load_config_json(folder))
  if architectures.stack(model) != 'decoder' or model.head != 'lm':
    raise RequestError(f'{folder}: {ADVICE_FOR_OTHER_MODELS}')
  # How it is talked with, then its weights, which take the time.
  tokenizer = tokenizers.load(str(folder))
  generation = hf_generation.of_folder(folder)
  talk = _choose_talk(tokenizer, generation=generation, template=template,
                      usual=causal.goes_on(tokenizer), published=True)
  module, params = weights.from_hf(folder)
  return ChatModel(module=module, params=params, tokenizer=tokenizer, talk=talk,
                   options=generation.options or {})


def _choose_talk(tokenizer: Tokenizer,
                 generation: hf_generation.Generation | None,
                 template: str, usual: Talk, published: bool) -> Talk:
  """Returns how an imported model is talked with: by its chat template, and
  with the tokens of its generation_config.json.

  Args:
    tokenizer: the tokenizer of the model.
    generation: what the model's folder says of generation.
    template: the chat template to use; '': that of the folder, if it has one.
    usual: how the model is talked with where there is none.
    published: whether the weights are the folder's, not trained here; else a
      text begins with the separator, as in training.
  """
  end_ids = hf_generation.ids(generation).get('eos_token_id', ())
  ends = frozenset(end_ids)
  # A template that was asked for, then what the model was trained with.
  if template:
    given = conversations.read(template, tokenizer)
    return causal.templated(given, ends, '')
  if not usual.plain:
    return usual._replace(ends=ends or usual.ends)
  # A model that goes on from plain text may have a template in its folder.
  folder = epath.Path(tokenizer.name)
  if conversations.in_folder(folder) is not None:
    of_model = conversations.read(str(folder), tokenizer)
    return causal.templated(of_model, ends, 'answers by its chat template')
  if published:
    return hf_generation.plain(tokenizer, generation)
  return usual


class CachedDecoder:
  """One row of text, and what draws from it.

  What the cache holds already is not computed again. Tokens are read in pieces
  of a few sizes, so that few programs are compiled, whatever the lengths of the
  messages; a single new token is a piece, too. A state cannot take back what it
  has read: where the text is another, all of it is read again. So is the text
  of a model that REREADS, where it has come to be longer than what turns alike.

  Attributes:
    context: the number of tokens that the cache has room for.
    num_read: the number of tokens that were read so far, padding apart.
  """

  def __init__(self, module: nn.Module, params: Any, context: int,
               sampling: generate.Sampling, seed: int = 0):
    """Makes an empty cache, with room for `context` tokens."""
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module = module.clone(config=config)
    self._params = params
    self._sampling = sampling
    self._apart = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    self._cache = architectures.init_cache(config, 1, context)
    if self._apart:
      self._params, self._cache = jax.jit(skeletons.unstack_layers)(
          params, self._cache)
    self._key = jax.random.key(seed)
    self._ids = np.zeros(0, np.int32)  # the tokens in the cache
    self._has_state = blocks.has_layers_with_state(config)
    self._ends = generate.lengths_to_reread_at(module)
    self.context = context
    self.num_read = 0

  def draw(self, ids: Sequence[int] | np.ndarray) -> int:
    """Returns the token drawn after `ids`, int32 [T], where T <= context.

    Tokens are read from the first one on that differs from the cache.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    vocab_size = self._module.config.vocab_size
    inputs.check_ids('the text', ids, vocab_size)

    # The key of this draw, and the tokens that a penalty counts.
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.remembers:
      seen_1V = np.zeros((1, vocab_size), bool)
      seen_1V[0, ids] = True

    # Read what is new, piece by piece; what the last piece draws counts.
    start = self._first_to_read(ids)
    while start < len(ids):
      size = self._piece_size(start, len(ids))
      piece = ids[start:start + size]
      padded_1P = np.pad(piece, (0, size - len(piece)))[None]
      token, self._cache = _read_and_draw(
          module=self._module, sampling=self._sampling, apart=self._apart,
          params=self._params, cache=self._cache, tokens_1P=padded_1P,
          start=np.int32(start), last=np.int32(len(piece) - 1),
          lengths_1=np.array([len(ids)], np.int32), key=key, seen_1V=seen_1V,
          has_state=self._has_state)
      self.num_read += len(piece)
      start += len(piece)
    self._ids = ids
    return int(token)

  def _first_to_read(self, ids: np.ndarray) -> int:
    """Returns the place from which tokens have to be read, the last one at the
    latest. Where it is the first of all, the cache is emptied if need be."""
    known = min(len(self._ids), len(ids) - 1)
    differ = np.flatnonzero(self._ids[:known] != ids[:known])
    start = int(differ[0]) if differ.size else known
    passed_before, passed = np.searchsorted(
        self._ends, [len(self._ids), len(ids)])
    takes_back = self._has_state and start < len(self._ids)
    if passed_before == passed and not takes_back:
      return start
    self._cache = jax.tree.map(jnp.zeros_like, self._cache)
    return 0

  def _piece_size(self, start: int, end: int) -> int:
    """Returns the size of the next piece: the smallest one that takes all that
    is left, and else the largest one that is filled by it."""
    left = end - start
    room = self.context - start
    for size in PIECE_SIZES:
      if left <= size <= room:
        return size
    return max(size for size in PIECE_SIZES if size <= left)


@functools.partial(
    jax.jit, static_argnames=('module', 'sampling', 'apart', 'has_state'),
    donate_argnames='cache')
def _read_and_draw(module: nn.Module, sampling: generate.Sampling, apart: bool,
                   params: Any, cache: Any, tokens_1P: jax.Array,
                   start: jax.Array,
                   last: jax.Array, lengths_1: jax.Array, key: jax.Array,
                   seen_1V: jax.Array | None,
                   has_state: bool) -> tuple[jax.Array, Any]:
  """Reads P tokens into the cache, and draws the token after them.

  Args:
    module, params: the model.
    sampling: how the token is drawn.
    apart: whether its layers follow one another in the program.
    cache: the cache.
    tokens_1P: the tokens, padded on the right.
    start: the slot of the first of them.
    last: the index of the last one that is no padding.
    lengths_1: the length of the whole text.
    key: the key of the draw.
    seen_1V: bool, the tokens that the text has; None: the draw needs none.
    has_state: whether the model has a state, which is told what is padding.

  Returns:
    The token, and the cache.
  """
  places_1P = jnp.arange(tokens_1P.shape[1])[None]
  # A state would take in the padding, where attention only masks it.
  options = {}
  if has_state:
    options['valid_BL'] = (places_1P <= last).astype(jnp.int32)
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=start + places_1P,
      cache=cache, one_by_one=apart, lengths_B=lengths_1, **options)

  # The head is applied to the last real token alone.
  last_11D = jax.lax.dynamic_slice_in_dim(output.hidden, last, 1, axis=1)
  logits_1V = output.head.logits(last_11D)[:, 0]
  token_1 = sampling(logits_1V, key, seen_1V)
  return token_1[0], output.cache


class AnswerStream:
  """The text of an answer while its tokens come, one by one.

  What cannot be shown yet is held back: bytes that are no whole character, and
  what may be the beginning of a stop string.

  Args:
    tokenizer: the tokenizer of the model.
    stops: the strings before which the answer ends.
    lead: a text that the answer may begin with and that is no part of it.
    prompt: the ids of a text that the answer goes on from; (): there is none.

  Attributes:
    stopped: whether a stop string has come.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (),
               lead: str = '', prompt: Sequence[int] = ()):
    """Begins with an answer of no token."""
    self._tokenizer = tokenizer
    self._stops = stops
    self._lead = lead
    self._prompt = prompt
    self._ids: list[int] = []
    self._shown = 0
    self.stopped = False

  def add(self, token: int) -> str:
    """Returns what can be shown more, now that this token has come."""
    self._ids.append(token)
    text = self._decoded(whole=False)
    cut = generate.text_before_stop(text, self._stops)
    self.stopped = len(cut) < len(text)
    if self.stopped:
      return self._show(cut)

    # The longest end of the text that a stop string may begin with waits.
    waiting = 0
    for stop in self._stops:
      for size in range(1, len(stop)):
        if cut.endswith(stop[:size]):
          waiting = max(waiting, size)
    return self._show(cut[:len(cut) - waiting])

  def end(self) -> str:
    """Returns what is left to show, now that no token follows."""
    return self._show(self.text)

  @property
  def text(self) -> str:
    """The whole answer so far."""
    return generate.text_before_stop(self._decoded(whole=True), self._stops)

  def _show(self, text: str) -> str:
    """Returns the part of a text that was not shown before."""
    new = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return new

  def _decoded(self, whole: bool) -> str:
    """Returns the text of all tokens, without its lead.

    Args:
      whole: whether no token follows; else a last character whose bytes have
        not all come is left out.
    """
    data = tokenizers.spelt(self._tokenizer, self._ids, self._prompt)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    text = decoder.decode(data, final=whole)
    if not whole:  # some tokenizers decode to text, and write it themselves
      text = text.rstrip(REPLACEMENT_CHARACTER)
      if self._lead.startswith(text):
        return ''
    return text.removeprefix(self._lead)


class ChatSession:
  """A conversation with a model.

  For each answer the whole conversation is laid out again, as transformers does
  it, and the engine reads what its cache has not: the new message, or all from
  where the template writes something else than before.

  Args:
    engine: the engine that draws the tokens.
    tokenizer: the tokenizer of the model.
    talk: how the model is talked with.
    most: the largest number of tokens of an answer.
    stops: the strings before which an answer ends.
    system: the system text; '': none.

  Attributes:
    messages: dicts with role and content, the system's not among them.
    ended: why the last answer ended: 'end', the model ended it; 'stop', at a
      stop string; 'length', at `most` tokens; 'context', no room is left;
      'interrupted'.

  Raises:
    RequestError: for a system text where the model has no place for it.
  """

  def __init__(self, engine: CachedDecoder, tokenizer: Tokenizer, talk: Talk, *,
               most: int, stops: Sequence[str] = (), system: str = ''):
    """Begins a conversation, with a system text where one is given."""
    self._engine = engine
    self._tokenizer = tokenizer
    self._talk = talk
    self._most = most
    self._stops = stops
    self._system: list[dict[str, str]] = []
    self.messages: list[dict[str, str]] = []
    self.ended = ''
    if not system:
      return
    require(talk.system, f'a system text has no place: the model {talk.words}')
    self._system = [dict(role='system', content=system)]
    # A template may have no place for it, either.
    talk.encode([*self._system, dict(role='user', content='x')])

  def reset(self) -> None:
    """Begins a new conversation, with the same system text."""
    self.messages = []

  def ask(self, text: str, stopped: Callable[[], bool] = lambda: False
          ) -> Iterator[str]:
    """Yields the answer to a message in pieces, as it is written.

    Args:
      text: the message.
      stopped: whether to end the answer here; asked after each token.

    Raises:
      RequestError: where the conversation has become too long, or its template
        refuses it; it is as before, then.
    """
    asked = [*self.messages, dict(role='user', content=text)]
    ids = self._talk.encode(self._system + asked)
    context = self._engine.context
    require(0 < len(ids) < context, f'the conversation has {len(ids):,} tokens '
            f'with this message, and there is room for {context:,}, with the '
            'answer: shorten it, begin another with /reset, or pass a larger '
            '--context, up to the max_len of the model')
    self.messages = asked
    prompt = ids.tolist() if self._talk.plain else ()
    stream = AnswerStream(self._tokenizer, stops=self._stops,
                          lead=self._talk.lead,
                          prompt=prompt)
    # Even an answer that is cut short becomes part of the conversation.
    try:
      yield from self._written(ids, stream, stopped)
    finally:
      self.messages = [*asked, dict(role='assistant', content=stream.text)]

  def _written(self, ids: np.ndarray, stream: AnswerStream,
               stopped: Callable[[], bool]) -> Iterator[str]:
    """Yields the pieces of an answer, and sets `ended`.

    Args:
      ids: the tokens of the conversation, [T].
      stream: the stream that turns the new tokens into text.
      stopped: whether to end the answer here.
    """
    self.ended = 'length'
    for _ in range(self._most):
      token = self._engine.draw(ids)
      if token in self._talk.ends:
        self.ended = 'end'
        break
      ids = np.append(ids, np.int32(token))
      # A token may be no whole character yet, and write nothing.
      piece = stream.add(token)
      if piece:
        yield piece
      reason = self._reason_to_end(len(ids), stream, stopped)
      if reason:
        self.ended = reason
        break
    # The end of the text waited, as a stop string might have begun there.
    piece = stream.end()
    if piece:
      yield piece

  def _reason_to_end(self, length: int, stream: AnswerStream,
                     stopped: Callable[[], bool]) -> str:
    """Returns why an answer ends at this length, as in `ended`; '': it goes
    on."""
    if stream.stopped:
      return 'stop'
    if stopped():
      return 'interrupted'
    if length > self._engine.context:
      return 'context'
    return ''
