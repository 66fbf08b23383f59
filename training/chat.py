"""Conversations with a model, turn by turn.

`of_run` and `of_folder` load a model that can be talked with. An Engine is its
decoder with a cache: it is shown tokens, and draws the one after them. A
Session is a conversation: its messages, and the answer to each.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
from typing import Any, NamedTuple

from etils import epath
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import architectures
from architectures.parts import mixers
from architectures.parts import skeletons
from architectures.parts.moe.layer import without_capacity
from configs.errors import RequestError, require
from training import generate, limits, objectives, parameters, progress, runs
from training.data import conversations, tokenizers
from training.data.tokenizers import Tokenizer
from training.hf import config as hf_config, generation as hf_generation
from training.hf import weights
from training.objectives import causal, chat
from training.objectives.record import Prompts, Talk, known_ids, padded

# So many tokens are read at once; what is left of the last piece is padding,
# which the next tokens overwrite.
PIECES = (1, 32, 256)
REPLACEMENT = '\ufffd'  # what decoders write for bytes that are no character
# What to do instead, where a model cannot be talked with.
INSTEAD = {
    'encoder': 'an encoder has no conversation: eval.py has --tasks=fill_mask '
               'for one that learned mlm or mlm_nsp, --tasks=diffusion_samples '
               'for masked_diffusion, and --tasks=embed for each',
    'encoder-decoder': 'an encoder-decoder reads a source and writes its '
                       'target, without a conversation: pass the source to '
                       'eval.py as --prompt',
    'decoder': 'a prompt is not read from left to right, as a cache that is '
               'kept from turn to turn needs it: eval.py has --prompt'}


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
  row, model = objectives.of(config), runs.model_of(workdir, config)
  if row.talk is None:
    raise RequestError(f'objective {config.objective!r}: ' + (
        INSTEAD[architectures.stack(model)] if row.head == 'lm' else
        f'its model has the head {row.head!r}, which writes no text'))
  tokenizer = tokenizers.load(config.data.tokenizer)
  said = hf_generation.kept(workdir)
  module = architectures.build(model)
  found = parameters.on_one_device(workdir, module, step)
  talk = row.talk(config, tokenizer)
  if said is not None or template:
    talk = _talk(tokenizer, said, template, talk,
                 hf_generation.is_published(workdir, found.step))
  return Speaker(module, found.state, tokenizer, talk, _options(said))


def of_folder(folder: epath.Path, template: str = '') -> Speaker:
  """Returns the model of a Hugging Face folder; see `of_run`."""
  model = hf_config.read(hf_config.load_config_json(folder))
  stack = architectures.stack(model)
  require(stack == 'decoder', f'{folder}: {INSTEAD[stack]}')
  require(model.head == 'lm', f'{folder} holds a model with the head '
          f'{model.head!r}, which writes no text')
  require(bool(tokenizers.found_in(folder)),
          f'{folder} has no tokenizer that is read here: it needs '
          + ', or '.join(' + '.join(names) for names in tokenizers.FOLDERS))
  tokenizer = tokenizers.load(str(folder))
  said = hf_generation.of_folder(folder)
  talk = _talk(tokenizer, said, template, causal.goes_on(tokenizer), True)
  return Speaker(*weights.from_hf(folder), tokenizer, talk, _options(said))


def _talk(tokenizer: Tokenizer, said: hf_generation.Generation | None,
          template: str, usual: Talk, published: bool) -> Talk:
  """Returns how an imported model is talked with: by its chat template, and
  with the tokens of its generation_config.json.

  Args:
    tokenizer: the model's.
    said: what its folder says of generation.
    template: instead of the folder's own; '': that one, where it has one.
    usual: how the model is talked with where there is none.
    published: whether the weights are the folder's, not trained here; else a
      text begins with the separator, as in training.
  """
  ends = frozenset(ids(said).get('eos_token_id', ()))
  folder = epath.Path(tokenizer.name)
  if template or (conversations.in_folder(folder) is not None
                  and usual.plain):
    found = conversations.read(template or str(folder), tokenizer)
    return chat.templated(
        found, ends, '' if template else 'answers by its chat template')
  if usual.plain:
    return plain(tokenizer, said) if published else usual
  return usual._replace(ends=ends or usual.ends)


def plain(tokenizer: Tokenizer, said: hf_generation.Generation | None) -> Talk:
  """Returns how an imported model goes on from a text: after its folder's bos
  and up to its eos; where the folder names none, the separator."""
  named = ids(said)
  usual = causal.goes_on(tokenizer, next(iter(named.get('bos_token_id', ())),
                                         None))
  return usual._replace(
      ends=frozenset(named.get('eos_token_id', ())) or usual.ends)


def shown(texts: Sequence[str], config: ml_collections.ConfigDict,
          tokenizer: Tokenizer, said: hf_generation.Generation | None
          ) -> tuple[Prompts, tuple[int, ...]]:
  """Returns texts as a model that writes is shown them, and the ids with which
  it ends its own.

  Args:
    texts: one or more.
    config: the run's.
    tokenizer: the model's.
    said: what the folder says of which these are the weights; None: of none.
  """
  objective = objectives.of(config)
  talk = objective.talk and objective.talk(config, tokenizer)
  if said is not None and talk and talk.plain:
    talk = plain(tokenizer, said)
    return Prompts(*padded([talk.encode([dict(role='user', content=text)])
                            for text in texts])), tuple(sorted(talk.ends))
  assert objective.prompt is not None
  prompts = objective.prompt(texts, config, tokenizer)
  known_ids(prompts.tokens, config, tokenizer, 'the prompt')
  return prompts, objective.ends(config, tokenizer)


def ids(said: hf_generation.Generation | None) -> dict[str, list[int]]:
  """Returns the ids of special tokens that a folder names; the file of
  generation counts more than config.json, as for transformers."""
  if said is None:
    return {}
  found = {}
  for name, value in {**said.fields, **(said.options or {})}.items():
    if name.endswith('_token_id') and value is not None:
      found[name] = value if isinstance(value, list) else [value]
  return found


def _options(said: hf_generation.Generation | None) -> dict[str, Any]:
  return (said and said.options) or {}


class Engine:
  """One row of text, and what draws from it.

  What the cache holds already is not computed again. Tokens are read in pieces
  of a few sizes, so that few programs are compiled, whatever the lengths of the
  messages; a single new token is a piece, too. A state cannot take back what it
  has read: where the text is another, all of it is read again.

  Attributes:
    context: how many tokens the cache holds.
    num_read: how many tokens were read so far, padding apart.
    sizes: the sizes of the pieces that were read: one program each.
  """

  def __init__(self, module: nn.Module, params: Any, context: int,
               sampling: generate.Sampling, seed: int = 0):
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module = module.clone(config=config)
    self._sampling = sampling
    self._apart = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    self._params = params
    self._cache = architectures.init_cache(config, 1, context)
    if self._apart:
      self._params, self._cache = jax.jit(skeletons.one_by_one)(
          params, self._cache)
    self._key, self._drawn = jax.random.key(seed), 0
    self._ids = np.zeros(0, np.int32)  # what the cache holds
    self._state = mixers.with_state(config)
    self._whole = True  # whether a state has read `_ids` and no more
    self.context, self.num_read = context, 0
    self.sizes: set[int] = set()

  def draw(self, ids: Sequence[int] | np.ndarray) -> int:
    """Returns the token drawn after `ids`, int32 [T], of which T <= context.

    From the first one on that differs from what the cache holds, they are read.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    limits.ids('the text', ids, self._module.config.vocab_size)
    start = _shared(self._ids, ids[:-1])
    if self._state and not (self._whole and start == len(self._ids)):
      self._cache = jax.tree.map(jnp.zeros_like, self._cache)
      start = 0
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.remembers:
      seen_1V = np.zeros((1, self._module.config.vocab_size), bool)
      seen_1V[0, ids] = True
    while start < len(ids):
      # The program of single tokens comes first: while an answer stands on a
      # line of the terminal, nothing must be compiled, which is shown there.
      size = (self._size(len(ids) - start, self.context - start)
              if self.sizes else 1)
      piece = ids[start:start + size]
      tokens_1P = np.zeros((1, size), np.int32)
      tokens_1P[0, :len(piece)] = piece
      # Should the next line not return.
      self._ids, self._whole = ids[:start], False
      with (contextlib.nullcontext() if size in self.sizes
            else progress.during('compiling')):
        token, self._cache = _read(
            self._module, self._sampling, self._apart, self._params,
            self._cache, tokens_1P, np.int32(start), np.int32(len(piece) - 1),
            key, seen_1V, self._state)
      self.sizes.add(size)
      self.num_read += len(piece)
      start += len(piece)
      self._ids, self._whole = ids[:start], True
    return int(token)

  @staticmethod
  def _size(left: int, room: int) -> int:
    """The size of the next piece: one that takes all that is left, and else
    the largest that this fills. Its padding needs room, too."""
    enough = [size for size in PIECES if left <= size <= room]
    return enough[0] if enough else max(
        size for size in PIECES if size <= left)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two arrays begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 10),
                   donate_argnums=4)
def _read(module: nn.Module, sampling: generate.Sampling, apart: bool,
          params: Any, cache: Any, tokens_1P: jax.Array, start: jax.Array,
          last: jax.Array, key: jax.Array, seen_1V: jax.Array | None,
          state: bool) -> tuple[jax.Array, Any]:
  """Puts tokens into the cache from slot `start` on; returns what is drawn
  after the token `last` of them, and the cache. A `state` is told that those
  after it are padding."""
  positions_1P = start + jnp.arange(tokens_1P.shape[1])[None]
  options = {}
  if state:
    options['valid_BL'] = (
        jnp.arange(tokens_1P.shape[1])[None] <= last).astype(jnp.int32)
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=positions_1P, cache=cache,
      one_by_one=apart, **options)
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
    return self._show(cut if self.stopped else cut[:len(cut) - self._held(cut)])

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
    data = generate.spelt(self._tokenizer, self._ids, self._prompt)
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(data, whole)
    if not whole:  # some tokenizers decode to text, and write it themselves
      text = text.rstrip(REPLACEMENT)
      if self._lead.startswith(text):
        return ''
    return text.removeprefix(self._lead)

  def _held(self, text: str) -> int:
    """How many of the last characters may begin a stop string."""
    return max((size for stop in self._stops for size in range(1, len(stop))
                if text.endswith(stop[:size])), default=0)


class Session:
  """A conversation with a model.

  For each answer the whole conversation is laid out again, as transformers does
  it, and the engine reads what its cache has not: the new message, or all from
  where the template writes something else than before.

  Attributes:
    messages: dicts with role and content, the system's not among them.
    system: the system text; '': none.
    ended: why the last answer ended: 'end', the model ended it; 'stop', at a
      stop string; 'length', at `most` tokens; 'context', no room is left;
      'interrupted'.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, talk: Talk, *,
               most: int, stops: Sequence[str] = (), system: str = ''):
    self._engine, self._tokenizer, self._talk = engine, tokenizer, talk
    self._most, self._stops = most, stops
    self.messages: list[dict[str, str]] = []
    self.system, self.ended = '', ''
    if system:
      self.instruct(system)

  def reset(self) -> None:
    """Begins a new conversation, with the same system text."""
    self.messages = []

  def instruct(self, system: str) -> None:
    """Sets the system text, also of the conversation so far; '': none.

    Raises:
      RequestError: where the model's template has no place for it.
    """
    require(not system or self._talk.system, 'a system text has no place: the '
            f'model {self._talk.words}')
    if system:  # a template may have no place for it, either
      self._talk.encode([dict(role='system', content=system),
                         dict(role='user', content='x')])
    self.system = system

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
    ids = self._talk.encode(self._whole(asked))
    require(len(ids) > 0, 'the chat template makes nothing of the '
            f'conversation: the model {self._talk.words}')
    if len(ids) >= self._engine.context:
      raise RequestError(
          f'the conversation has {len(ids):,} tokens with this message, and '
          f'there is room for {self._engine.context:,}, with the answer: '
          'shorten it, begin another with /reset, or pass a larger --context, '
          'up to the max_len of the model')
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

  def line(self) -> str:
    """Returns the conversation as a line of a file that data.source reads as
    jsonl:FILE:messages."""
    return json.dumps({'messages': self._whole(self.messages)},
                      ensure_ascii=False) + '\n'

  def _whole(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    system: list[dict[str, Any]] = [dict(role='system', content=self.system)]
    return system * bool(self.system) + messages
