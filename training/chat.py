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
  """Loads the model of a training run for a chat.

  Args:
    workdir: the folder of the run.
    step: the step of the checkpoint; 'best'; None: the newest.
    template: a chat template, as data.chat_template names one; '': the run's.

  Raises:
    RequestError: for a model that cannot chat.
  """
  config = runs.load_run_config(workdir)
  objective = objectives.find_objective(config)
  require(objective.talks,
          f'objective {config.objective!r}: {ADVICE_FOR_OTHER_MODELS}')

  # Load the model and its parameters.
  tokenizer = runs.load_run_tokenizer(workdir, config)
  generation = hf_generation.load_generation(workdir)
  module = architectures.build(runs.load_run_model_config(workdir, config))
  restored = parameters.read_parameters_on_one_device(workdir, module=module,
                                                      step=step)

  # Choose how messages become tokens (`talk`): as in training, or, for weights
  # that were imported, as their folder says.
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
  """Loads the model in a folder of the Hugging Face format for a chat.

  Args:
    folder: the path of the folder, with a config.json, weights and a tokenizer.
    template: a chat template, as data.chat_template names one; '': that of the
      folder.

  Raises:
    RequestError: for a model that cannot chat.
  """
  model = hf_config.model_of_config_json(hf_config.load_config_json(folder))
  if architectures.stack(model) != 'decoder' or model.head != 'lm':
    raise RequestError(f'{folder}: {ADVICE_FOR_OTHER_MODELS}')
  # Choose how messages become tokens (`talk`). This may fail, so it is done
  # before the weights are read, which takes long.
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
  """Chooses how to talk with an imported model: how a conversation becomes
  tokens, and which tokens end an answer.

  Args:
    tokenizer: the tokenizer of the model.
    generation: the special tokens and options of the folder from which the
      weights come; None: they come from no folder.
    template: the chat template to use; '': that of the folder, if it has one.
    usual: how to talk with the model if there is no template.
    is_published: whether the weights are still as they were imported. If they
      have been trained here, a text begins with the separator, as in training.
  """
  token_ids = hf_generation.special_token_ids(generation)
  end_tokens = frozenset(token_ids.get('eos_token_id', ()))
  # The template that the user asks for has precedence, then the one that the
  # model was trained with here.
  if template:
    asked_template = conversations.read_template(template, tokenizer)
    return causal.talk_by_template(asked_template, ends=end_tokens, words='')
  if not usual.plain:
    return usual._replace(ends=end_tokens or usual.ends)
  # A model that was trained here on plain text may have been imported with a
  # chat template.
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
    # Let experts take any number of tokens. With a limited capacity, the expert
    # of a token would depend on the tokens that are read together with it.
    config = without_capacity(module.config)  # type: ignore[attr-defined]
    self._module = module.clone(config=config)
    self._params = params
    self._sampling = sampling
    self._key = jax.random.key(seed)

    # Make the cache. If there are few layers, they are compiled one by one
    # instead of as a scan, and their parameters are unstacked for this.
    self._cache = architectures.init_cache(config, 1, context)
    self._is_unrolled = config.num_decoder_layers <= generate.UNROLLED_LAYERS
    if self._is_unrolled:
      unstack_layers = jax.jit(skeletons.unstack_layers, static_argnums=0)
      self._params, self._cache = unstack_layers(config, params, self._cache)
    self._ids = np.zeros(0, np.int32)  # the tokens in the cache
    self.context = context
    self.num_read = 0

    # The whole text must be read again in two cases: where it goes back in
    # layers that have a state, and where it passes one of these lengths.
    self._has_state = blocks.has_layers_with_state(config)
    self._lengths_to_reread_at = generate.lengths_to_reread_at(module)

  def draw_token(self, ids: Sequence[int] | np.ndarray) -> int:
    """Reads a text into the cache, and draws the token that follows it. Only
    the part of the text that the cache does not hold yet is read.

    Args:
      ids: the tokens of the text, int32 [T], where 0 < T <= context.

    Returns:
      The id of the drawn token.
    """
    ids = np.asarray(ids, np.int32)
    assert 0 < len(ids) <= self.context
    vocab_size = self._module.config.vocab_size
    inputs.check_ids('the text', tokens=ids, vocab_size=vocab_size)

    # Make a random key for this draw, and note which tokens the text has, if
    # the draw punishes repetitions.
    self._key, key = jax.random.split(self._key)
    seen_1V = None
    if self._sampling.needs_seen_tokens:
      seen_1V = np.zeros((1, vocab_size), bool)
      seen_1V[0, ids] = True

    # Read the new tokens in pieces of a few sizes, for each of which the model
    # is compiled once. A token is drawn after each piece, but only the last one
    # is used. The padding of a piece also enters the cache, where the tokens
    # that follow overwrite it.
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
    """Returns the index of the first token of a text that must be read. The
    tokens before it are in the cache already. If the whole text must be read,
    the cache is emptied.

    Args:
      ids: the tokens of the text, [T]. The last one is always read, since the
        new token is drawn from its output.
    """
    # Find the first difference between the text and the cache. If there is
    # none, the text continues where the cache ends.
    num_common = min(len(self._ids), len(ids) - 1)
    differences = np.flatnonzero(self._ids[:num_common] != ids[:num_common])
    start = num_common
    if differences.size:
      start = int(differences[0])

    # The whole text is read again in two cases. First, if it is longer than one
    # of the lengths at which position encodings change, so that the cached keys
    # are wrong; searchsorted counts how many of these lengths are exceeded.
    # Second, if a layer has a state, which cannot forget the tokens after
    # `start`.
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
  """Lets the model read P further tokens of a text into its cache, and draws
  the token that follows them.

  Args:
    module, params: the Flax module of the model, and its parameters.
    sampling: how a token is drawn from logits: temperature, top_k and so on.
    is_unrolled: whether the layers follow one another in the compiled program,
      instead of a scan over them.
    cache: what the layers keep of earlier tokens: keys and values, and states
      of recurrences.
    tokens_1P: the tokens, [1, P], padded on the right.
    start: the position of the first of them in the text.
    last: the index among them of the last one that is no padding.
    lengths_1: the length of the whole text, [1].
    key: the random key of the draw.
    seen_1V: bool [1, V], which tokens of the vocabulary V the text has already;
      None: the draw does not depend on it.
    has_state: whether a layer has a state, which must know what is padding.

  Returns:
    The token, and the cache.
  """
  indices_1P = jnp.arange(tokens_1P.shape[1])[None]
  # Attention masks the padding anyhow. The state of a recurrence would change
  # with it, so recurrent layers are told which tokens are no padding.
  options = {}
  if has_state:
    options['valid_BL'] = (indices_1P <= last).astype(jnp.int32)
  output: Any = module.apply(
      {'params': params}, tokens_1P, positions_BL=start + indices_1P,
      cache=cache, one_by_one=is_unrolled, lengths_B=lengths_1, **options)

  # Compute the logits of the last token that is no padding: they predict the
  # next one. The slice has the shape [1, 1, D], with the D features of a token.
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
    """Adds a token to the answer.

    Args:
      token: the id of the token.

    Returns:
      The text that can be shown now and was not shown before. It is '' if the
      token completes no character, or might begin a stop string, before which
      the answer ends.
    """
    self._ids.append(token)
    text = self._decode(is_complete=False)
    before_stop = generate.text_before_stop(text, self._stops)
    self.stopped = len(before_stop) < len(text)
    if self.stopped:
      return self._take_unshown(before_stop)

    # The text may end with the beginning of a stop string. Do not show this end
    # (the longest such one) until later tokens decide.
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
    """Decodes all tokens of the answer so far. The lead is removed: a fixed
    text, such as a space, with which the model may begin an answer and which
    is not shown.

    Args:
      is_complete: whether no token follows. If not, a last character is left
        out while some of its bytes are missing.
    """
    # A character may consist of bytes of several tokens. An incremental decoder
    # leaves out an incomplete one at the end, unless the input is final.
    utf8 = tokenizers.decode_after_prompt(self._tokenizer, ids=self._ids,
                                          prompt=self._prompt)
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    text = decoder.decode(utf8, final=is_complete)
    if not is_complete:
      # Some tokenizers return text, not bytes, and have put the replacement
      # character U+FFFD in the place of an incomplete one.
      text = text.rstrip(REPLACEMENT_CHARACTER)
      # Show nothing while all of the text may be the beginning of the lead.
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
    # Check now that the model can be given a system text, so that it is refused
    # before the first message.
    if not system:
      return
    require(talk.system, f'a system text has no place: the model {talk.words}')
    self._system = [dict(role='system', content=system)]
    # A chat template may refuse system texts. Try it with any message.
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
    # Encode the conversation with this message, and check that it fits.
    messages = [*self.messages, dict(role='user', content=text)]
    ids = self._talk.encode(self._system + messages)
    context = self._engine.context
    require(0 < len(ids) < context, f'the conversation has {len(ids):,} tokens '
            f'with this message, and there is room for {context:,}, with the '
            'answer: shorten it, begin another with /reset, or pass a larger '
            '--context, up to the max_len of the model')
    self.messages = messages

    # Write the answer. It becomes part of the conversation even if the caller
    # stops early.
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
    """Draws the tokens of an answer, and yields its text in pieces as it is
    written. Afterwards `end_reason` says why the answer has ended: 'end',
    'length', or the reason of `_reason_to_end`.

    Args:
      ids: the tokens of the conversation, [T].
      stream: turns the new tokens into text.
      stopped: returns whether to end the answer early.
    """
    # This is the reason if the loop below runs to its end.
    self.end_reason = 'length'
    for _ in range(self._max_new_tokens):
      token = self._engine.draw_token(ids)
      if token in self._talk.ends:
        self.end_reason = 'end'
        break
      ids = np.append(ids, np.int32(token))
      # The token may complete no character, so that there is nothing to show.
      piece = stream.add_token(token)
      if piece:
        yield piece
      reason = self._reason_to_end(len(ids), stream=stream, stopped=stopped)
      if reason:
        self.end_reason = reason
        break
    # Show what was held back because it might have begun a stop string.
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
