"""Conversations with a model, turn by turn.

`load_from_run` and `load_from_folder` load a model that can be talked with. A
CachedDecoder is its decoder with a cache: it is shown tokens, and draws the one
after them. A ChatSession is a conversation: its messages, and the answer to
each.
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
    module, params: the Flax module of the model, and its parameters.
    tokenizer: its tokenizer.
    talk: how it is talked with: how a conversation becomes tokens, and which
      tokens end an answer.
    options: the options of its draws in generation_config.json; {}: none.
  """
  module: nn.Module
  params: Any
  tokenizer: Tokenizer
  talk: Talk
  options: dict[str, Any]


def load_from_run(workdir: epath.Path, step: int | str | None = None,
                  template: str = '') -> ChatModel:
  """Loads the model of a training run, to be talked with.

  Args:
    workdir: the folder of the run.
    step: the checkpoint to read; 'best'; None: the newest.
    template: a chat template, as data.chat_template names one; '': the run's.

  Raises:
    RequestError: for a model that cannot be talked with.
  """
  config = runs.load_run_config(workdir)
  objective = objectives.find_objective(config)
  require(objective.talks,
          f'objective {config.objective!r}: {ADVICE_FOR_OTHER_MODELS}')

  # The model and its parameters.
  tokenizer = runs.load_run_tokenizer(workdir, config)
  generation = hf_generation.load_generation(workdir)
  module = architectures.build(runs.load_run_model_config(workdir, config))
  restored = parameters.read_parameters_on_one_device(workdir, module=module,
                                                      step=step)

  # How it is talked with: as it was trained, or as its import says.
  talk = objective.talk(config, tokenizer)
  if generation is not None or template:
    is_published = hf_generation.is_published(workdir, restored.step)
    talk = _choose_talk(tokenizer, generation=generation, template=template,
                        usual=talk, is_published=is_published)
  options = None
  if generation is not None:
    options = generation.options
  return ChatModel(module=module, params=restored.state, tokenizer=tokenizer,
                   talk=talk, options=options or {})


def load_from_folder(folder: epath.Path, template: str = '') -> ChatModel:
  """Loads the model of a folder in the Hugging Face format, to be talked with.

  Args:
    folder: the path of the folder, with a config.json, weights and a tokenizer.
    template: a chat template, as data.chat_template names one; '': that of the
      folder.

  Raises:
    RequestError: for a model that cannot be talked with.
  """
  model = hf_config.model_of_config_json(hf_config.load_config_json(folder))
  if architectures.stack(model) != 'decoder' or model.head != 'lm':
    raise RequestError(f'{folder}: {ADVICE_FOR_OTHER_MODELS}')
  # How it is talked with comes first: to read the weights takes the time.
  tokenizer = tokenizers.load(str(folder))
  generation = hf_generation.read_generation(folder)
  talk = _choose_talk(
      tokenizer, generation=generation, template=template,
      usual=causal.talk_by_continuing(tokenizer), is_published=True)
  module, params = weights.from_hf(folder)
  return ChatModel(module=module, params=params, tokenizer=tokenizer, talk=talk,
                   options=generation.options or {})


def _choose_talk(tokenizer: Tokenizer,
                 generation: hf_generation.Generation | None, template: str,
                 usual: Talk, is_published: bool) -> Talk:
  """Returns how an imported model is talked with (how a conversation becomes
  tokens, and which tokens end an answer): by its chat template, and with the
  tokens of its generation_config.json.

  Args:
    tokenizer: the tokenizer of the model.
    generation: the generation_config.json of the model's folder, if any.
    template: the chat template to use; '': that of the folder, if it has one.
    usual: how the model is talked with where there is none.
    is_published: whether the weights are as they were imported, not trained
      here; else a text begins with the separator, as in training.
  """
  token_ids = hf_generation.special_token_ids(generation)
  end_tokens = frozenset(token_ids.get('eos_token_id', ()))
  # A template that was asked for comes first, then what the model was trained
  # with here.
  if template:
    asked_template = conversations.read_template(template, tokenizer)
    return causal.talk_by_template(asked_template, ends=end_tokens, words='')
  if not usual.plain:
    return usual._replace(ends=end_tokens or usual.ends)
  # A model that continues plain text may have a template in its folder.
  folder = epath.Path(tokenizer.name)
  if conversations.read_template_of_folder(folder) is not None:
    template_of_folder = conversations.read_template(str(folder), tokenizer)
    return causal.talk_by_template(template_of_folder, ends=end_tokens,
                                   words='answers by its chat template')
  if is_published:
    return hf_generation.continue_texts(tokenizer, generation)
  return usual


class CachedDecoder:
  """A model with the cache of one text, which draws the token after the text.

  What the cache holds already is not computed again. Tokens are read in pieces
  of a few sizes, so that few programs are compiled, whatever the lengths of the
  messages; a single new token is a piece, too. The state of a recurrent layer
  cannot take back what it has read: where the text is another, all of it is
  read again. So is a text that grows past a length at which its positions
  change (generate.lengths_to_reread_at).

  Attributes:
    context: the number of tokens that the cache has room for.
    num_read: the number of tokens that were read so far, padding apart.
  """

  def __init__(self, module: nn.Module, params: Any, context: int,
               sampling: generate.Sampling, seed: int = 0):
    """Makes an empty cache, with room for `context` tokens.

    Args:
      module, params: the Flax module of the model, and its parameters.
      context: the largest number of tokens of a text.
      sampling: the way to draw a token from logits: temperature, top_k and so
        on.
      seed: the seed of the draws.
    """
    # The experts have no capacity here, so that which of them a token is given
    # does not depend on the tokens that are read with it.
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module = module.clone(config=config)
    self._params = params
    self._sampling = sampling
    self._key = jax.random.key(seed)

    # The cache. The layers of a stack that is not deep are run one by one.
    self._cache = architectures.init_cache(config, 1, context)
    self._is_unrolled = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    if self._is_unrolled:
      self._params, self._cache = jax.jit(skeletons.unstack_layers)(
          params, self._cache)
    self._ids = np.zeros(0, np.int32)  # the tokens in the cache
    self.context = context
    self.num_read = 0

    # A text cannot be read from where it differs if layers have a state, or
    # past some lengths.
    self._has_state = blocks.has_layers_with_state(config)
    self._lengths_to_reread_at = generate.lengths_to_reread_at(module)

  def draw_token(self, ids: Sequence[int] | np.ndarray) -> int:
    """Returns the token that is drawn after a text, and reads the text into the
    cache from the first token on that differs from what the cache holds.

    Args:
      ids: the tokens of the text, int32 [T], where 0 < T <= context.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    vocab_size = self._module.config.vocab_size
    inputs.check_ids('the text', tokens=ids, vocab_size=vocab_size)

    # The random key of this draw, and the tokens that a penalty counts.
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.needs_seen_tokens:
      seen_1V = np.zeros((1, vocab_size), bool)
      seen_1V[0, ids] = True

    # Read what is new, piece by piece. A token is drawn after each piece with
    # the same key; only the one after the last piece is returned. The padding
    # of a piece is overwritten in the cache by the tokens that follow.
    start = self._index_of_first_unread(ids)
    while start < len(ids):
      size = self._piece_size(start, len(ids))
      piece = ids[start:start + size]
      padded_1P = np.pad(piece, (0, size - len(piece)))[None]
      token, self._cache = _read_and_draw(
          module=self._module, sampling=self._sampling,
          is_unrolled=self._is_unrolled, params=self._params, cache=self._cache,
          tokens_1P=padded_1P, start=np.int32(start),
          last=np.int32(len(piece) - 1),
          lengths_1=np.array([len(ids)], np.int32), key=key, seen_1V=seen_1V,
          has_state=self._has_state)
      self.num_read += len(piece)
      start += len(piece)
    self._ids = ids
    return int(token)

  def _index_of_first_unread(self, ids: np.ndarray) -> int:
    """Returns the index of the first token of a text that has to be read, given
    what the cache holds; empties the cache and returns 0 where the whole text
    has to be read.

    Args:
      ids: the tokens of the text, [T]. The last one is always read, since the
        new token is drawn from its output.
    """
    # The first difference between the text and the cache. If there is none, the
    # text goes on where the cache ends.
    num_common = min(len(self._ids), len(ids) - 1)
    differences = np.flatnonzero(self._ids[:num_common] != ids[:num_common])
    start = num_common
    if differences.size:
      start = int(differences[0])

    # All is read again in two cases. A text that passes one of the lengths at
    # which positions change makes the cached keys wrong; searchsorted counts
    # how many of them a length has passed. And the state of a recurrent layer
    # cannot forget the tokens after `start`.
    num_passed_before, num_passed = np.searchsorted(
        self._lengths_to_reread_at, [len(self._ids), len(ids)])
    goes_back = self._has_state and start < len(self._ids)
    if num_passed_before == num_passed and not goes_back:
      return start
    self._cache = jax.tree.map(jnp.zeros_like, self._cache)
    return 0

  def _piece_size(self, start: int, end: int) -> int:
    """Returns the size of the next piece to read of the tokens from `start` to
    `end`: the smallest of PIECE_SIZES that takes all of them, else the largest
    one that they fill."""
    num_left = end - start
    # A padded piece must not reach past the end of the cache.
    room = self.context - start
    for size in PIECE_SIZES:
      if num_left <= size <= room:
        return size
    return max(size for size in PIECE_SIZES if size <= num_left)


@functools.partial(
    jax.jit, static_argnames=('module', 'sampling', 'is_unrolled', 'has_state'),
    donate_argnames='cache')
def _read_and_draw(module: nn.Module, sampling: generate.Sampling,
                   is_unrolled: bool, params: Any, cache: Any,
                   tokens_1P: jax.Array, start: jax.Array, last: jax.Array,
                   lengths_1: jax.Array, key: jax.Array,
                   seen_1V: jax.Array | None, has_state: bool
                   ) -> tuple[jax.Array, Any]:
  """Reads P tokens of one text into the cache, and draws the token after them.

  Args:
    module, params: the Flax module of the model, and its parameters.
    sampling: the way to draw a token from logits: temperature, top_k and so on.
    is_unrolled: whether the layers follow one another in the program.
    cache: what the layers keep of the tokens before: keys and values, and
      states of recurrences.
    tokens_1P: the tokens of one text, [1, P], padded on the right.
    start: the position of the first of them in the text.
    last: the index of the last one that is no padding.
    lengths_1: the length of the whole text.
    key: the random key of the draw.
    seen_1V: bool, [1, V = vocabulary], the tokens that the text has; None: the
      draw needs none.
    has_state: whether a layer has a state, which is told what is padding.

  Returns:
    The token, and the cache.
  """
  indices_1P = jnp.arange(tokens_1P.shape[1])[None]
  # Attention masks the padding anyhow. The state of a recurrent layer would
  # take it in, so such a layer is told which tokens are none.
  options = {}
  if has_state:
    options['valid_BL'] = (indices_1P <= last).astype(jnp.int32)
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=start + indices_1P,
      cache=cache, one_by_one=is_unrolled, lengths_B=lengths_1, **options)

  # The head is applied to the last real token alone, whose logits are those of
  # the next token. The slice is [1, 1, D = features of the model].
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
    """Begins with an empty answer."""
    self._tokenizer = tokenizer
    self._stops = stops
    self._lead = lead
    self._prompt = prompt
    self._ids: list[int] = []
    self._shown = 0
    self.stopped = False

  def add_token(self, token: int) -> str:
    """Adds a token to the answer, and returns the text that can be shown now
    and was not before; '' where the token writes no whole character yet."""
    self._ids.append(token)
    text = self._decode(is_complete=False)
    before_stop = generate.text_before_stop(text, self._stops)
    self.stopped = len(before_stop) < len(text)
    if self.stopped:
      return self._take_unshown(before_stop)

    # The text may end in the beginning of a stop string. The longest such end
    # is held back until the next tokens show whether the rest follows.
    num_held_back = 0
    for stop in self._stops:
      for size in range(1, len(stop)):
        if text.endswith(stop[:size]):
          num_held_back = max(num_held_back, size)
    return self._take_unshown(text[:len(text) - num_held_back])

  def finish(self) -> str:
    """Returns the text that was held back, now that no token follows."""
    return self._take_unshown(self.text)

  @property
  def text(self) -> str:
    """The whole answer so far, up to a stop string."""
    text = self._decode(is_complete=True)
    return generate.text_before_stop(text, self._stops)

  def _take_unshown(self, text: str) -> str:
    """Returns the part of the answer's text that was not shown before, and
    notes that it is shown now."""
    unshown = text[self._shown:]
    self._shown = max(self._shown, len(text))
    return unshown

  def _decode(self, is_complete: bool) -> str:
    """Returns the text of all tokens so far, without the lead.

    Args:
      is_complete: whether no token follows; else a last character whose bytes
        have not all come is left out.
    """
    # An incremental decoder leaves out a character at the end whose bytes have
    # not all come, unless it is told that the input is final.
    utf8 = tokenizers.decode_after_prompt(self._tokenizer, ids=self._ids,
                                          prompt=self._prompt)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    text = decoder.decode(utf8, final=is_complete)
    if not is_complete:
      # Some tokenizers decode to text, and write this character themselves.
      text = text.rstrip(REPLACEMENT_CHARACTER)
      # While the text may still become the lead, nothing of it is shown.
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
    talk: how the model is talked with: how a conversation becomes tokens, and
      which tokens end an answer.
    max_new_tokens: the largest number of tokens of an answer.
    stops: the strings before which an answer ends.
    system: the system text; '': none.

  Attributes:
    messages: dicts with role and content, the system's not among them.
    end_reason: why the last answer ended: 'end', the model ended it; 'stop', at
      a stop string; 'length', at `max_new_tokens` tokens; 'context', no room is
      left; 'interrupted'.

  Raises:
    RequestError: for a system text where the model has no place for it.
  """

  def __init__(self, engine: CachedDecoder, tokenizer: Tokenizer, talk: Talk, *,
               max_new_tokens: int, stops: Sequence[str] = (),
               system: str = ''):
    """Begins a conversation, with a system text where one is given.

    Args:
      engine: the model with a cache, which draws each token.
      tokenizer: the tokenizer of the model.
      talk: how the model is talked with: how a conversation becomes tokens, and
        which tokens end an answer.
      max_new_tokens: the largest number of tokens of an answer.
      stops: the strings before which an answer ends.
      system: the system text; '': none.
    """
    self._engine = engine
    self._tokenizer = tokenizer
    self._talk = talk
    self._max_new_tokens = max_new_tokens
    self._stops = stops
    self._system: list[dict[str, str]] = []
    self.messages: list[dict[str, str]] = []
    self.end_reason = ''
    # A system text is tried at once, so that one for which the model has no
    # place is refused before the first message.
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
    """Adds a message of the user to the conversation, and yields the answer in
    pieces as it is written.

    Args:
      text: the message of the user.
      stopped: whether to end the answer here; called after each token.

    Raises:
      RequestError: where the conversation has become too long, or its template
        refuses it; it is as before, then.
    """
    # The conversation with this message, as tokens.
    messages = [*self.messages, dict(role='user', content=text)]
    ids = self._talk.encode(self._system + messages)
    context = self._engine.context
    require(0 < len(ids) < context, f'the conversation has {len(ids):,} tokens '
            f'with this message, and there is room for {context:,}, with the '
            'answer: shorten it, begin another with /reset, or pass a larger '
            '--context, up to the max_len of the model')
    self.messages = messages

    # The answer, which becomes part of the conversation even if it is cut
    # short.
    prompt = ids.tolist() if self._talk.plain else ()
    stream = AnswerStream(self._tokenizer, stops=self._stops,
                          lead=self._talk.lead, prompt=prompt)
    try:
      yield from self._write_answer(ids, stream=stream, stopped=stopped)
    finally:
      answer = dict(role='assistant', content=stream.text)
      self.messages = [*messages, answer]

  def _write_answer(self, ids: np.ndarray, stream: AnswerStream,
                    stopped: Callable[[], bool]) -> Iterator[str]:
    """Draws the tokens of an answer and yields its text in pieces; sets
    `end_reason`.

    Args:
      ids: the tokens of the conversation, [T].
      stream: the stream that turns the new tokens into text.
      stopped: whether to end the answer here.
    """
    # This reason holds where the loop ends of itself.
    self.end_reason = 'length'
    for _ in range(self._max_new_tokens):
      token = self._engine.draw_token(ids)
      if token in self._talk.ends:
        self.end_reason = 'end'
        break
      ids = np.append(ids, np.int32(token))
      # A token may be no whole character yet, and write nothing.
      piece = stream.add_token(token)
      if piece:
        yield piece
      reason = self._reason_to_end(len(ids), stream=stream, stopped=stopped)
      if reason:
        self.end_reason = reason
        break
    # The end of the text was held back, as a stop string might begin with it.
    piece = stream.finish()
    if piece:
      yield piece

  def _reason_to_end(self, length: int, stream: AnswerStream,
                     stopped: Callable[[], bool]) -> str:
    """Returns why an answer ends after so many tokens of text, as in
    `end_reason`; '' where it goes on."""
    if stream.stopped:
      return 'stop'
    if stopped():
      return 'interrupted'
    if length > self._engine.context:
      return 'context'
    return ''
