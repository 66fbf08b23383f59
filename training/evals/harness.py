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

from common.arguments import PositiveSize, check_argument_types
from common.errors import RequestError, require, short
from training import evals, generate, objectives, progress
from training.data import conversations, inputs
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
    """Fits the run to lm_eval: its lengths, its first token, its ends of
    texts."""
    super().__init__()
    config = evaluation.run.config
    model = evaluation.run.model
    tokens = evaluation.tokenizer
    reason = scoring.why_not_scorable(config)
    require(not reason, f'{reason}, and lm_eval has nothing to ask')
    self.evaluation = evaluation
    self._tokens = tokens
    self._num_written = 0  # batches, of which each has draws of its own

    # How many tokens there may be.
    if max_length is None:
      max_length = model.max_len
    require(0 < max_length <= model.max_len, 'max_length is '
            f'{max_length}: the model takes 1 to {model.max_len} tokens')
    self.max_length = max_length
    self.max_gen_toks = max_gen_toks

    # The tokens that end a text.
    token_ids = hf_generation.ids(hf_generation.kept(evaluation.workdir))
    ends = token_ids.get('eos_token_id', ())
    if not ends:
      ends = objectives.find_objective(config).ends(config, tokens)
    self._ends = tuple(ends)

    # The tokens that begin one.
    published = hf_generation.is_published(evaluation.workdir, evaluation.step)
    bos = tokens.special_ids.get('bos')
    if add_bos_token is None:
      self._begin = tokens.added_ids if published else ()
    elif not add_bos_token:
      self._begin = ()
    elif bos is not None:
      self._begin = (bos,)
    else:
      raise RequestError('add_bos_token is True, but the tokenizer '
                         f'{tokens.name!r} has no bos token')

    # The token that begins a text without a context.
    if prefix_token_id is not None:
      self._prefix = prefix_token_id
    elif published and bos is not None:
      self._prefix = bos
    else:
      self._prefix = tokens.separator_id
    inputs.check_ids('prefix_token_id', self._prefix, model.vocab_size)

  @classmethod
  def create_from_arg_obj(cls, arg_dict: dict[str, Any],
                          additional_config: dict[str, Any] | None = None
                          ) -> 'Model':
    """Makes the model of `--model archetype --model_args workdir=DIR,...`.

    Args:
      arg_dict: `workdir`, `step` and the arguments of Model.
      additional_config: lm_eval's batch size and device, which the run's mesh
        and the lengths of the texts decide here.
    """
    arguments = {'step': None} | arg_dict
    # The arguments are these two and those of the class, less `evaluation`.
    known = ('workdir', 'step', *[*inspect.signature(cls).parameters][1:])
    strange = [name for name in arguments if name not in known]
    require(not strange, f'--model_args has {", ".join(strange)}: choose from '
            f'{", ".join(known)}')
    require(bool(arguments.get('workdir')),
            'pass --model_args workdir=DIR, the folder of a run')
    workdir = storage.checked_path(str(arguments.pop('workdir')))
    # lm_eval has read a number as an int already.
    step = arguments.pop('step')
    if step is not None:
      step = checkpoints.parse_step(str(step))
    evaluation = evals.load_evaluation(workdir, names=(), options=None,
                                       step=step)
    return cls(evaluation, **arguments)

  @property
  def eot_token_id(self) -> int:
    return self._tokens.separator_id

  @property
  def prefix_token_id(self) -> int:
    return self._prefix

  @property
  def tokenizer_name(self) -> str:
    return self._tokens.fingerprint

  @functools.cached_property
  def _template(self) -> conversations.Template:
    config = self.evaluation.run.config
    text = objectives.find_objective(config).chat_template(config, self._tokens)
    text = text or conversations.read_template_of_folder(
        epath.Path(self._tokens.name))
    require(bool(text), 'a chat template is asked for, and neither the run nor '
            f'the folder of its tokenizer {self._tokens.name!r} has one')
    return conversations.make_template('of the run', text, self._tokens)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the template of the run, as lm_eval records it."""
    require(not isinstance(chat_template, str), 'a chat template is asked for '
            f'by the name {chat_template!r}: a run has one, without a name')
    return self._template.text if chat_template else None

  def apply_chat_template(self, chat_history: list[dict[str, str]],
                          add_generation_prompt: bool = True) -> str:
    """Returns the text of a conversation: with what begins an answer, or
    without what ends the last message, which is then gone on from."""
    return conversations.remove_marks(self._template.render(
        chat_history, add_generation_prompt, not add_generation_prompt))

  def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                 **kwargs) -> list[int]:
    """Returns the ids of a text, with what a text begins with."""
    ids = self._tokens.encode(string)
    # A special token that is written in a text counts as that token.
    if any(word in string for word in self._tokens.special_texts):
      ids, _ = self._tokens.encode_placed(string)
      inputs.check_ids(f'the text {short(string)}', ids,
                       self.evaluation.run.model.vocab_size)
    # A text that begins with the prefix needs no second one.
    if add_special_tokens is None:
      prefix = self._tokens.piece(self._prefix)
      add_special_tokens = not string.startswith(prefix)
    ids = np.asarray(ids).tolist()
    if add_special_tokens:
      return [*self._begin, *ids]
    return ids

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True
                    ) -> list[tuple[float, bool]]:
    """Returns what the base class does, without a bar beside ours."""
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs
                            ) -> list[tuple[float, bool]]:
    """Returns (log-probability, whether greedy) of each continuation; a request
    is ((context, continuation), their ids, and its ids)."""
    questions = []
    for (_, text), before, ids in requests:
      questions.append(self._question([*before, *ids], len(ids), text))
    results = []
    for answer in self._answer(questions):
      results.append((float(answer.log_probs.sum()),
                      bool(answer.greedy.all())))
    return results

  def _question(self, ids: Sequence[int], scored: int,
                text: str) -> Continuation:
    """Returns the question about the last `scored` of some tokens, of which the
    continuation `text` has as many."""
    require(scored > 0, f'the continuation {short(text)} has no token of its '
            'own, so there is nothing to score')
    require(scored <= self.max_length, f'the continuation {short(text)} has '
            f'{scored} tokens, and the model takes {self.max_length}')
    last = ids[-(self.max_length + 1):]
    return Continuation(tokens=np.asarray(last, np.int32), scored=scored)

  def _answer(self,
              questions: Sequence[Continuation]) -> list[scoring.TokenScores]:
    with self.evaluation.run.context():
      return scoring.score_continuations(questions, self.evaluation, 'scoring')

  def loglikelihood_rolling(self, requests: Sequence[Any],
                            disable_tqdm: bool = False) -> list[float]:
    """Returns the log-probability of each whole text, in windows that predict
    each token once (lm_eval's get_rolling_token_windows)."""
    texts = [request.args[0] for request in requests]
    # A text is cut into windows, each a question of its own.
    questions = []
    owners = []
    for i, text in enumerate(texts):
      for pair in utils.get_rolling_token_windows(
          self.tok_encode(text), self._prefix, self.max_length, 1):
        before, after = utils.make_disjoint_window(pair)
        questions.append(self._question([*before, *after], len(after), text))
        owners.append(i)

    # The log-probability of a text is the sum of those of its windows.
    totals = [0.0] * len(texts)
    for i, answer in zip(owners, self._answer(questions)):
      totals[i] += float(answer.log_probs.sum())
    return totals

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False
                     ) -> list[str]:
    """Returns what the model writes after each context, up to a stop string.
    """
    # Requests with the same options are written together.
    alike: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      _, options = request.args
      alike.setdefault(repr(options), []).append(i)
    texts: dict[int, str] = {}
    for group in alike.values():
      contexts = {i: requests[i].args[0] for i in group}
      _, options = requests[group[0]].args
      texts |= self._written(contexts, options)
    return [texts[i] for i in range(len(requests))]

  def _written(self, contexts: dict[int, str], options: dict[str, Any]
               ) -> Iterator[tuple[int, str]]:
    """Yields (which, text) of requests with the same options."""
    # How texts are drawn, and where they end.
    options = model_utils.normalize_gen_kwargs(options, self.max_gen_toks)
    stops = model_utils.handle_stop_sequences(options.get('until'), eos=None)
    sampling = _sampling(options)
    end = self.eot_token_id
    ends = tuple(dict.fromkeys((end, *self._ends, *self._holding(stops))))
    count = options['max_gen_toks']
    room = self.max_length - count
    require(room > 0, f'a task writes up to {count} tokens (max_gen_toks), and '
            f'the model takes {self.max_length} with the prompt: choose fewer')

    # The last tokens of the contexts that there is room for.
    rows = {}
    for i, text in contexts.items():
      ids = self.tok_encode(text) or [self._prefix]
      rows[i] = np.array(ids)[-room:]

    # Contexts of about one length go through the model together.
    run = self.evaluation.run
    has_prefix = objectives.find_objective(run.config).prefix
    batches = list(scoring.pad_into_batches(rows, room))
    for chosen, tokens_BL, lengths_B in progress.show_items(batches, 'writing'):
      prefix = {}
      if has_prefix:
        prefix = {'prefix_B': lengths_B}
      key = jax.random.fold_in(jax.random.key(0), self._num_written)
      with run.context():
        written_BT = jax.device_get(generate.generate(
            run.module, self.evaluation.params, tokens_BL, lengths_B, key,
            max_new_tokens=count, sampling=sampling, stop_token=ends, **prefix))
      self._num_written += 1
      for i, row_T in zip(chosen, written_BT):
        text = self._tokens.decode(generate.tokens_before_stop(row_T, end))
        yield i, model_utils.postprocess_generated_text(text, stops, None)

  def _holding(self, stops: Sequence[str]) -> list[int]:
    """Returns the tokens that hold a stop string, after which nothing of a
    text is read. A special token holds its own name, which it does not spell.
    """
    wanted = [stop.encode() for stop in stops if stop]
    holding = []
    for token in range(self._tokens.vocab_size):
      spelling = self._spelling(token)
      if any(stop in spelling for stop in wanted):
        holding.append(token)
    return holding

  def _spelling(self, token: int) -> bytes:
    """Returns the bytes of a token, or the name of a special one."""
    name = self._tokens.piece(token)
    if name in self._tokens.special_texts:
      return name.encode()
    return self._tokens.decode_bytes([token])


def _sampling(options: dict[str, Any]) -> generate.Sampling:
  """Returns how a token is drawn by the options of a task of lm_eval."""
  penalty = options.get('repetition_penalty', 1.0)
  if not options.get('do_sample') or not options.get('temperature'):
    return generate.Sampling(temperature=0, repetition_penalty=penalty)
  return generate.Sampling(
      temperature=options['temperature'], top_k=options.get('top_k') or 0,
      top_p=options.get('top_p', 1.0), min_p=options.get('min_p', 0.0),
      repetition_penalty=penalty)
