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
from common.errors import require
from training import generate, objectives, parameters, runs
from training.data import conversations, inputs, tokenizers
from training.data.tokenizers import Tokenizer
from training.hf import config as hf_config, generation as hf_generation
from training.hf import weights
from training.objectives import causal
from training.objectives import Talk

# So many tokens are read at once; what is left of the last piece is padding,
# which the next tokens overwrite.
PIECES = (1, 32, 256)
REPLACEMENT = '\ufffd'  # what decoders write for bytes that are no character
# What there is for a model that cannot be talked with.
INSTEAD = ('its model does not write a text from left to right: eval.py has '
           '--prompt, and --tasks=fill_mask, diffusion_samples, labels and '
           'embed')


class Speaker(NamedTuple):
  """A model that can be talked with.

  Attributes:
    module, params: the model.
    tokenizer: its tokenizer.
    talk: how it is asked.
    options: what generation_config.json says of its draws; {}: nothing.
  """
  module: nn.Module
  params: Any
  tokenizer: Tokenizer
  talk: Talk
  options: dict[str, Any]


def of_run(workdir: epath.Path, step: int | str | None = None,
           template: str = '') -> Speaker:
  """Returns the model of a run.

  Args:
    workdir: its folder.
    step: which checkpoint; 'best'; None: the newest.
    template: a chat template, as data.chat_template names one; '': the run's.

  Raises:
    RequestError: for a model that cannot be talked with.
  """
  config = runs.config_of(workdir)
  objective = objectives.of(config)
  require(objective.talks, f'objective {config.objective!r}: '
          + INSTEAD)
  tokenizer = runs.tokenizer_of(workdir, config)
  generation = hf_generation.kept(workdir)
  module = architectures.build(runs.model_of(workdir, config))
  restored = parameters.on_one_device(workdir, module, step)
  talk = objective.talk(config, tokenizer)
  if generation is not None or template:
    talk = _talk(tokenizer, generation, template, talk,
                 hf_generation.is_published(workdir, restored.step))
  return Speaker(module, restored.state, tokenizer, talk,
                 (generation and generation.options) or {})


def of_folder(folder: epath.Path, template: str = '') -> Speaker:
  """Returns the model of a Hugging Face folder; see `of_run`."""
  model = hf_config.read(hf_config.load_config_json(folder))
  require(architectures.stack(model) == 'decoder' and model.head == 'lm',
          f'{folder}: {INSTEAD}')
  tokenizer = tokenizers.load(str(folder))
  generation = hf_generation.of_folder(folder)
  talk = _talk(tokenizer, generation, template, causal.goes_on(tokenizer), True)
  return Speaker(*weights.from_hf(folder), tokenizer, talk,
                 generation.options or {})


def _talk(tokenizer: Tokenizer, generation: hf_generation.Generation | None,
          template: str, usual: Talk, published: bool) -> Talk:
  """Returns how an imported model is talked with: by its chat template, and
  with the tokens of its generation_config.json.

  Args:
    tokenizer: the model's.
    generation: what its folder says of generation.
    template: instead of the folder's own; '': that one, where it has one.
    usual: how the model is talked with where there is none.
    published: whether the weights are the folder's, not trained here; else a
      text begins with the separator, as in training.
  """
  ends = frozenset(hf_generation.ids(generation).get('eos_token_id', ()))
  folder = epath.Path(tokenizer.name)
  if template or (conversations.in_folder(folder) is not None
                  and usual.plain):
    return causal.templated(
        conversations.read(template or str(folder), tokenizer), ends,
        '' if template else 'answers by its chat template')
  if usual.plain:
    return hf_generation.plain(tokenizer, generation) if published else usual
  return usual._replace(ends=ends or usual.ends)


class Engine:
  """One row of text, and what draws from it.

  What the cache holds already is not computed again. Tokens are read in pieces
  of a few sizes, so that few programs are compiled, whatever the lengths of the
  messages; a single new token is a piece, too. A state cannot take back what it
  has read: where the text is another, all of it is read again. So is the text
  of a model that REREADS, where it has come to be longer than what turns alike.

  Attributes:
    context: how many tokens the cache holds.
    num_read: how many tokens were read so far, padding apart.
  """

  def __init__(self, module: nn.Module, params: Any, context: int,
               sampling: generate.Sampling, seed: int = 0):
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module, self._params = module.clone(config=config), params
    self._sampling = sampling
    self._apart = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    self._cache = architectures.init_cache(config, 1, context)
    if self._apart:
      self._params, self._cache = jax.jit(skeletons.one_by_one)(
          params, self._cache)
    self._key = jax.random.key(seed)
    self._ids = np.zeros(0, np.int32)  # what the cache holds
    self._state = blocks.with_state(config)
    self._ends = generate.rereads_at(module)
    self.context, self.num_read = context, 0

  def draw(self, ids: Sequence[int] | np.ndarray) -> int:
    """Returns the token drawn after `ids`, int32 [T], of which T <= context.

    From the first one on that differs from what the cache holds, they are read.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    vocab_size = self._module.config.vocab_size
    inputs.check_ids('the text', ids, vocab_size)
    known = min(len(self._ids), len(ids) - 1)
    differ = np.flatnonzero(self._ids[:known] != ids[:known])
    start = int(differ[0]) if differ.size else known
    outgrown = len(set(np.searchsorted(
        self._ends, [len(self._ids), len(ids)]))) > 1
    if outgrown or self._state and start < len(self._ids):
      self._cache = jax.tree.map(jnp.zeros_like, self._cache)
      start = 0
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.remembers:
      seen_1V = np.zeros((1, vocab_size), bool)
      seen_1V[0, ids] = True
    while start < len(ids):
      left, room = len(ids) - start, self.context - start
      # One that takes all that is left, and else the largest that this fills.
      size = next((size for size in PIECES if left <= size <= room), None)
      size = size or max(size for size in PIECES if size <= left)
      piece = ids[start:start + size]
      token, self._cache = _read(
          self._module, self._sampling, self._apart, self._params, self._cache,
          np.pad(piece, (0, size - len(piece)))[None], np.int32(start),
          np.int32(len(piece) - 1), np.array([len(ids)], np.int32), key,
          seen_1V, self._state)
      self.num_read += len(piece)
      start += len(piece)
    self._ids = ids
    return int(token)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 11),
                   donate_argnums=4)
def _read(module: nn.Module, sampling: generate.Sampling, apart: bool,
          params: Any, cache: Any, tokens_1P: jax.Array, start: jax.Array,
          last: jax.Array, lengths_1: jax.Array, key: jax.Array,
          seen_1V: jax.Array | None, state: bool) -> tuple[jax.Array, Any]:
  """Puts tokens into the cache from slot `start` on; returns what is drawn
  after the token `last` of them, and the cache. `lengths_1` is the length of
  the whole text. A `state` is told that those after it are padding."""
  places_1P = jnp.arange(tokens_1P.shape[1])[None]
  options = dict(valid_BL=(places_1P <= last).astype(jnp.int32)
                 ) if state else {}
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=start + places_1P,
      cache=cache, one_by_one=apart, lengths_B=lengths_1, **options)
  last_11D = jax.lax.dynamic_slice_in_dim(output.hidden, last, 1, 1)
  logits_1V = output.head.logits(last_11D)[:, 0]
  return sampling(logits_1V, key, seen_1V)[0], output.cache


class Stream:
  """The text of an answer while its tokens come, one by one.

  What cannot be shown yet is held back: bytes that are no whole character, and
  what may be the beginning of a stop string.

  Args:
    tokenizer: the model's.
    stops: strings before which the answer ends.
    lead: what the answer may begin with that is no part of it.
    prompt: the ids of a text that the answer goes on from; (): of none.

  Attributes:
    stopped: whether a stop string was found.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (),
               lead: str = '', prompt: Sequence[int] = ()):
    self._tokenizer, self._stops, self._lead = tokenizer, stops, lead
    self._prompt = prompt
    self._ids: list[int] = []
    self._shown = 0
    self.stopped = False

  def add(self, token: int) -> str:
    """Returns what can be shown more, now that this token has come."""
    self._ids.append(token)
    text = self._decoded(whole=False)
    cut = generate.before(text, self._stops)
    self.stopped = len(cut) < len(text)
    may_begin_a_stop = 0 if self.stopped else max((
        size for stop in self._stops for size in range(1, len(stop))
        if cut.endswith(stop[:size])), default=0)
    return self._show(cut[:len(cut) - may_begin_a_stop])

  def end(self) -> str:
    """Returns what is left to show, now that no token follows."""
    return self._show(self.text)

  @property
  def text(self) -> str:
    """The whole answer so far."""
    return generate.before(self._decoded(whole=True), self._stops)

  def _show(self, text: str) -> str:
    new = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return new

  def _decoded(self, whole: bool) -> str:
    """The text of all tokens, without its lead; of a last character that is
    not `whole` yet, nothing."""
    data = tokenizers.spelt(self._tokenizer, self._ids, self._prompt)
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(data, whole)
    if not whole:  # some tokenizers decode to text, and write it themselves
      text = text.rstrip(REPLACEMENT)
      if self._lead.startswith(text):
        return ''
    return text.removeprefix(self._lead)


class Session:
  """A conversation with a model.

  For each answer the whole conversation is laid out again, as transformers does
  it, and the engine reads what its cache has not: the new message, or all from
  where the template writes something else than before.

  Args:
    engine: draws the tokens.
    tokenizer: the model's.
    talk: how the model is asked.
    most: tokens of an answer.
    stops: strings before which an answer ends.
    system: the system text; '': none.

  Attributes:
    messages: dicts with role and content, the system's not among them.
    ended: why the last answer ended: 'end', the model ended it; 'stop', at a
      stop string; 'length', at `most` tokens; 'context', no room is left;
      'interrupted'.

  Raises:
    RequestError: for a system text where the model has no place for it.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, talk: Talk, *,
               most: int, stops: Sequence[str] = (), system: str = ''):
    self._engine, self._tokenizer, self._talk = engine, tokenizer, talk
    self._most, self._stops = most, stops
    self._system = [dict(role='system', content=system)] * bool(system)
    self.messages: list[dict[str, str]] = []
    self.ended = ''
    require(not system or talk.system, 'a system text has no place: the model '
            f'{talk.words}')
    if system:  # a template may have no place for it, either
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
    stream = Stream(self._tokenizer, self._stops, self._talk.lead,
                    ids.tolist() if self._talk.plain else ())
    try:
      yield from self._written(ids, stream, stopped)
    finally:
      self.messages = [*asked, dict(role='assistant', content=stream.text)]

  def _written(self, ids: np.ndarray, stream: Stream,
               stopped: Callable[[], bool]) -> Iterator[str]:
    self.ended = 'length'
    for _ in range(self._most):
      token = self._engine.draw(ids)
      if token in self._talk.ends:
        self.ended = 'end'
        break
      ids = np.append(ids, np.int32(token))
      if piece := stream.add(token):
        yield piece
      if stream.stopped or stopped() or len(ids) > self._engine.context:
        self.ended = ('stop' if stream.stopped else
                      'interrupted' if stopped() else 'context')
        break
    if piece := stream.end():
      yield piece
