"""A run as a model of lm_eval, EleutherAI's evaluation harness.

What is asked, cut off and counted is as in lm_eval's own backend for Hugging
Face models (lm_eval/models/huggingface.py), so that a run and its export get
the same figures. This module imports lm_eval: only who uses it imports this.
"""

from collections.abc import Iterator, Sequence
import functools
import inspect
from typing import Any

from etils import epath
import jax
from lm_eval import utils
from lm_eval.api import model as api
from lm_eval.models import utils as model_utils
import numpy as np

from common.fields import PositiveSize, check_argument_types
from common.errors import RequestError, require, shorten
from training import evals, generate, objectives, progress
from training.data import conversations, inputs
from training.data.tokenizers import Tokenizer
from training.evals import Evaluation, scoring
from training.evals.scoring import Continuation
from training.hf import generation as hf_generation
from training.workdir import checkpoints, storage


class Model(api.TemplateLM):
  """A run's decoder, as lm_eval asks it.

  A text without a context is scored after the token that begins a document.
  For weights that were imported and not trained here (nor in a run that was
  merged or upcycled) that is the one that Hugging Face's backend takes, bos or
  else eos, and where their tokenizer adds tokens to the beginning of a text, so
  does this. For a run it is the separator that stood before each document of
  its training. Special tokens in a text are obeyed, and what is written ends as
  the run's samples and its export's texts end.

  Args:
    evaluation: the evaluation of the run.
    add_bos_token: whether a text begins with bos; None: as said above.
    prefix_token_id: what begins a text without a context; None: likewise.
    max_length: how many tokens the model is shown; None: max_len.
    max_gen_toks: how many it writes where a task does not say.
  """

  @check_argument_types
  def __init__(self, evaluation: Evaluation, *,
               add_bos_token: bool | None = None,
               prefix_token_id: int | None = None,
               max_length: int | None = None,
               max_gen_toks: PositiveSize = 256):
    """Takes from the run what lm_eval asks for: the lengths, and the tokens
    that begin and end a text.

    Raises:
      RequestError: where the run's model gives texts no probability, or an
        argument does not fit it.
    """
    super().__init__()
    config = evaluation.run.config
    model = evaluation.run.model
    tokenizer = evaluation.tokenizer
    reason = scoring.why_not_scorable(config)
    require(not reason, f'{reason}, and lm_eval has nothing to ask')
    self.evaluation = evaluation
    self._tokenizer = tokenizer
    self._num_batches_written = 0

    # How many tokens there may be.
    if max_length is None:
      max_length = model.max_len
    require(0 < max_length <= model.max_len, 'max_length is '
            f'{max_length}: the model takes 1 to {model.max_len} tokens')
    self.max_length = max_length
    self.max_gen_toks = max_gen_toks

    # The tokens that end a text: those of the Hugging Face folder that the run
    # was imported from, or else those of its training.
    token_ids = hf_generation.special_token_ids(
        hf_generation.load_generation(evaluation.workdir))
    end_tokens = token_ids.get('eos_token_id', ())
    if not end_tokens:
      end_tokens = objectives.find_objective(config).ends(config, tokenizer)
    self._end_tokens = tuple(end_tokens)

    # The tokens that stand before every text, and before one without a context.
    is_published = hf_generation.is_published(evaluation.workdir,
                                              evaluation.step)
    self._tokens_at_start = _tokens_before_text(
        tokenizer, add_bos_token, is_published)
    self._first_token = prefix_token_id
    if prefix_token_id is None:
      self._first_token = _token_before_first_text(tokenizer, is_published)
    inputs.check_ids('prefix_token_id', tokens=self._first_token,
                     vocab_size=model.vocab_size)

  @classmethod
  def create_from_arg_obj(cls, arg_dict: dict[str, Any],
                          additional_config: dict[str, Any] | None = None
                          ) -> 'Model':
    """Makes the model for lm_eval's command line `--model archetype
    --model_args workdir=DIR,...`.

    Args:
      arg_dict: the arguments of --model_args: `workdir`, `step` and those of
        Model.
      additional_config: lm_eval's batch size and device. They are not used:
        the run's mesh and the lengths of the texts decide on both.

    Raises:
      RequestError: for an unknown argument, or a folder that is no run.
    """
    arguments = {'step': None} | arg_dict
    # Check the arguments. Those of the class are allowed, but not its first
    # one, `evaluation`, which is made of `workdir` and `step`.
    known = ('workdir', 'step', *[*inspect.signature(cls).parameters][1:])
    unknown = [name for name in arguments if name not in known]
    require(not unknown, f'--model_args has {", ".join(unknown)}: choose from '
            f'{", ".join(known)}')
    require(bool(arguments.get('workdir')),
            'pass --model_args workdir=DIR, the folder of a run')
    workdir = storage.checked_path(str(arguments.pop('workdir')))
    # Load the run. lm_eval has already turned a step that is a number into an
    # int.
    step = arguments.pop('step')
    if step is not None:
      step = checkpoints.parse_step(str(step))
    evaluation = evals.load_evaluation(workdir, names=(), options=None,
                                       step=step)
    return cls(evaluation, **arguments)

  @property
  def eot_token_id(self) -> int:
    """The token that ends a document."""
    return self._tokenizer.separator_id

  @property
  def prefix_token_id(self) -> int:
    """The token that stands before a text without a context."""
    return self._first_token

  @property
  def tokenizer_name(self) -> str:
    """The fingerprint of the tokenizer, under which lm_eval caches answers."""
    return self._tokenizer.fingerprint

  @functools.cached_property
  def _template(self) -> conversations.Template:
    """The chat template of the run, or else of its tokenizer's folder."""
    config = self.evaluation.run.config
    objective = objectives.find_objective(config)
    text = objective.chat_template(config, self._tokenizer)
    if not text:
      folder = epath.Path(self._tokenizer.name)
      text = conversations.read_template_of_folder(folder)
    require(bool(text), 'a chat template is asked for, and neither the run nor '
            f'the folder of its tokenizer {self._tokenizer.name!r} has one')
    return conversations.make_template('of the run', text=text,
                                       tokenizer=self._tokenizer)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the text of the chat template, as lm_eval records it; None: no
    template is asked for."""
    require(not isinstance(chat_template, str), 'a chat template is asked for '
            f'by the name {chat_template!r}: a run has one, without a name')
    return self._template.text if chat_template else None

  def apply_chat_template(self, chat_history: list[dict[str, str]],
                          add_generation_prompt: bool = True) -> str:
    """Renders a conversation as one text, by the chat template.

    Args:
      chat_history: the messages, with role and content.
      add_generation_prompt: whether the text ends with the beginning of an
        answer. If not, it ends inside the last message, which the model is to
        continue.

    Returns:
      The text, without the marks by which the template tells its own words from
      those of the messages.
    """
    # Either a new answer begins, or the last message goes on.
    continues_last_message = not add_generation_prompt
    rendered = self._template.render(
        chat_history, add_generation_prompt, continues_last_message)
    return conversations.remove_marks(rendered)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                 **kwargs) -> list[int]:
    """Encodes a text, with the tokens that the model has before every text.

    Args:
      string: the text.
      add_special_tokens: whether to add these tokens; None: only if the text
        does not begin with one already.
      **kwargs: options of lm_eval that change nothing here.

    Returns:
      The token ids.
    """
    # Encode the text. If special tokens are written in it, as lm_eval's
    # templates do, they are read as such. The model may lack their ids.
    ids = self._tokenizer.encode(string)
    special_texts = self._tokenizer.special_texts
    if any(special_text in string for special_text in special_texts):
      ids, _ = self._tokenizer.encode_with_special_tokens(string)
      inputs.check_ids(f'the text {shorten(string)}', tokens=ids,
                       vocab_size=self.evaluation.run.model.vocab_size)
    # Do not add a second first token.
    if add_special_tokens is None:
      prefix = self._tokenizer.piece(self._first_token)
      add_special_tokens = not string.startswith(prefix)
    ids = np.asarray(ids).tolist()
    if add_special_tokens:
      return [*self._tokens_at_start, *ids]
    return ids

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True
                    ) -> list[tuple[float, bool]]:
    """Returns what the base class does, without its progress bar beside ours.
    """
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs
                            ) -> list[tuple[float, bool]]:
    """Computes the log-probability of continuations of texts.

    Args:
      requests: ((context, continuation), token ids of the context, token ids of
        the continuation) of each, as lm_eval's base class encodes them.
      **kwargs: options of lm_eval that change no figure.

    Returns:
      For each continuation its log-probability, and whether each of its tokens
      is the likeliest one.
    """
    continuations = []
    for (_, text), context_ids, text_ids in requests:
      continuations.append(self._make_continuation(
          ids=[*context_ids, *text_ids], num_scored=len(text_ids), text=text))
    results = []
    for scores in self._score(continuations):
      results.append((float(scores.log_probs.sum()),
                      bool(scores.is_greedy.all())))
    return results

  def _make_continuation(self, ids: Sequence[int], num_scored: int, text: str
                         ) -> Continuation:
    """Prepares the tokens of a context and its continuation for scoring. Of a
    long context, only the last tokens are kept.

    Args:
      ids: the tokens of the context and of the continuation.
      num_scored: the number of tokens of the continuation, the last ones.
      text: the continuation, for the message.

    Raises:
      RequestError: where the continuation has no token, or more than the model
        takes.
    """
    require(num_scored > 0, f'the continuation {shorten(text)} has no token of '
            'its own, so there is nothing to score')
    require(num_scored <= self.max_length, f'the continuation {shorten(text)} '
            f'has {num_scored} tokens, and the model takes {self.max_length}')
    # The model takes max_length tokens, and the last one is only predicted.
    last_ids = ids[-(self.max_length + 1):]
    return Continuation(tokens=np.asarray(last_ids, np.int32),
                        num_scored=num_scored)

  def _score(self, continuations: Sequence[Continuation]
             ) -> list[scoring.TokenScores]:
    """Returns the scores of the tokens of each continuation."""
    with self.evaluation.run.context():
      return scoring.score_continuations(
          continuations, evaluation=self.evaluation, task_name='scoring')

  def loglikelihood_rolling(self, requests: Sequence[Any],
                            disable_tqdm: bool = False) -> list[float]:
    """Computes the log-probability of whole texts. A long text is cut into
    windows that predict each token once (lm_eval's get_rolling_token_windows).

    Args:
      requests: requests of lm_eval, each with a text.
      disable_tqdm: lm_eval's switch for a progress bar, which is not used here.

    Returns:
      The log-probability of each text.
    """
    # Cut each text into windows, each of which is scored like a continuation.
    # The 1 is the number of tokens of context that a window has at least.
    texts = [request.args[0] for request in requests]
    continuations = []
    text_of_window = []
    for i, text in enumerate(texts):
      windows = utils.get_rolling_token_windows(
          self.tok_encode(text), self._first_token, self.max_length, 1)
      for window in windows:
        context_ids, text_ids = utils.make_disjoint_window(window)
        continuations.append(self._make_continuation(
            ids=[*context_ids, *text_ids], num_scored=len(text_ids), text=text))
        text_of_window.append(i)

    # Add up the log-probabilities of the windows of each text.
    log_probs = [0.0] * len(texts)
    for i, scores in zip(text_of_window, self._score(continuations)):
      log_probs[i] += float(scores.log_probs.sum())
    return log_probs

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False
                     ) -> list[str]:
    """Continues texts (contexts) until a stop string is written.

    Args:
      requests: requests of lm_eval, each with a context and a dict of options.
      disable_tqdm: lm_eval's switch for a progress bar, which is not used here.

    Returns:
      What the model writes for each request.
    """
    # Handle requests with the same options together. A dict cannot be a key, so
    # its repr is used.
    requests_by_options: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      _, options = request.args
      requests_by_options.setdefault(repr(options), []).append(i)
    texts: dict[int, str] = {}
    for numbers in requests_by_options.values():
      contexts = {i: requests[i].args[0] for i in numbers}
      _, options = requests[numbers[0]].args
      texts |= self._write_texts(contexts, options)
    return [texts[i] for i in range(len(requests))]

  def _write_texts(self, contexts: dict[int, str], options: dict[str, Any]
                   ) -> Iterator[tuple[int, str]]:
    """Writes what follows the contexts of requests with the same options.

    The suffixes name axes: B texts, L tokens of a prompt, T new tokens.

    Args:
      contexts: the context of each request, by the request's number.
      options: the options of the task of lm_eval.

    Yields:
      The number of a request and the text, in any order.

    Raises:
      RequestError: where the model takes no more tokens than are written.
    """
    # How texts are drawn, and where they end.
    options = model_utils.normalize_gen_kwargs(options, self.max_gen_toks)
    stops = model_utils.handle_stop_sequences(options.get('until'), eos=None)
    sampling = _make_sampling(options)
    separator = self.eot_token_id
    stop_tokens = tuple(dict.fromkeys(
        (separator, *self._end_tokens, *self._tokens_with_stop(stops))))
    max_new_tokens = options['max_gen_toks']
    room = self.max_length - max_new_tokens
    require(room > 0, f'a task writes up to {max_new_tokens} tokens '
            f'(max_gen_toks), and the model takes {self.max_length} with the '
            'prompt: choose fewer')

    # The last tokens of the contexts that there is room for.
    rows = {}
    for i, text in contexts.items():
      ids = self.tok_encode(text) or [self._first_token]
      rows[i] = np.array(ids)[-room:]

    # Contexts of about one length go through the model together.
    run = self.evaluation.run
    is_prefix_lm = objectives.find_objective(run.config).prefix
    batches = list(scoring.pad_into_batches(rows, room))
    for numbers, tokens_BL, lengths_B in progress.show_items(
        batches, 'writing'):
      prefix = {}
      if is_prefix_lm:
        prefix = {'prefix_B': lengths_B}
      # Each batch has draws of its own.
      key = jax.random.fold_in(jax.random.key(0), self._num_batches_written)
      with run.context():
        written_BT = jax.device_get(generate.generate(
            run.module, self.evaluation.params, tokens_BL, lengths_B, key,
            max_new_tokens=max_new_tokens, sampling=sampling,
            stop_token=stop_tokens, **prefix))
      self._num_batches_written += 1
      for i, row_T in zip(numbers, written_BT):
        ids = generate.tokens_before_stop(row_T, separator)
        text = self._tokenizer.decode(ids)
        yield i, model_utils.postprocess_generated_text(text, stops, None)

  def _tokens_with_stop(self, stops: Sequence[str]) -> list[int]:
    """Returns the tokens that hold a stop string, after which nothing of a
    text is read. A special token holds its own name, which it does not spell.
    """
    stops_in_bytes = [stop.encode() for stop in stops if stop]
    tokens = []
    for token in range(self._tokenizer.vocab_size):
      spelling = self._spell(token)
      if any(stop in spelling for stop in stops_in_bytes):
        tokens.append(token)
    return tokens

  def _spell(self, token: int) -> bytes:
    """Returns the bytes of a token, or the name of a special one."""
    name = self._tokenizer.piece(token)
    if name in self._tokenizer.special_texts:
      return name.encode()
    return self._tokenizer.decode_bytes([token])


def _tokens_before_text(tokenizer: Tokenizer, add_bos_token: bool | None,
                        is_published: bool) -> tuple[int, ...]:
  """Returns the tokens that stand before every text that a model is asked
  about.

  Args:
    tokenizer: the tokenizer of the model.
    add_bos_token: whether a text begins with bos, the token of a beginning;
      None: published weights have what their tokenizer adds to a text, and
      those of a run have none.
    is_published: whether the weights were imported and not trained here.

  Raises:
    RequestError: where bos is asked for, and the tokenizer has none.
  """
  if add_bos_token is None:
    if is_published:
      return tuple(tokenizer.ids_before_text)
    return ()
  if not add_bos_token:
    return ()
  bos = tokenizer.special_ids.get('bos')
  if bos is None:
    raise RequestError('add_bos_token is True, but the tokenizer '
                       f'{tokenizer.name!r} has no bos token')
  return (bos,)


def _token_before_first_text(tokenizer: Tokenizer, is_published: bool) -> int:
  """Returns the token that stands before a text without a context: bos for
  published weights, as in Hugging Face's backend, or else the token that
  separates documents.

  Args:
    tokenizer: the tokenizer of the model.
    is_published: whether the weights were imported and not trained here.
  """
  bos = tokenizer.special_ids.get('bos')
  if is_published and bos is not None:
    return bos
  return tokenizer.separator_id


def _make_sampling(options: dict[str, Any]) -> generate.Sampling:
  """Returns how a token is drawn by the options of a task of lm_eval: the
  likeliest one, unless `do_sample` and a temperature are set."""
  penalty = options.get('repetition_penalty', 1.0)
  if not options.get('do_sample') or not options.get('temperature'):
    return generate.Sampling(temperature=0, repetition_penalty=penalty)
  return generate.Sampling(
      temperature=options['temperature'], top_k=options.get('top_k') or 0,
      top_p=options.get('top_p', 1.0), min_p=options.get('min_p', 0.0),
      repetition_penalty=penalty)
