"""Every field of a run, and how the config of a system sets those of a size.

A config file under configs/ starts from `base()` and changes what its paper
says. Whatever a run does is printed by its config: no default hides in code.
0 or '' in a field that says 'derived' means: worked out from the other fields.
The fields of config.model are declared beside the parts that read them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import ml_collections
import numpy as np

import architectures
from architectures.parts import flat
from common.errors import RequestError, check_choice, shorten
from common.fields import AT_START, check_values, field
from common.fields import DeclaredField, declared_fields, Effect, INCOMPATIBLE
from common.fields import OPTIMISATION
from common.fields import SAFE, FieldValue

MOST = 2**31 - 1  # steps, rows and tokens are counted in int32 on a device


def _fields(kind: str, why: str) -> functools.partial:
  """Returns `field` for fields whose changes do the same to a run."""
  return functools.partial(field, resume=Effect(kind, why))


_written = _fields(SAFE, 'only what is written, and when')
_mesh = _fields(SAFE, 'same sums in another order: equal to about 1e-5')
_prepared = _fields(SAFE, 'batches do not depend on it')
_batches = _fields(OPTIMISATION, 'other batches from here on')
# The effects by which a comparison of runs knows what the held-out loss is of:
# fields that change what is trained on alone, and those that choose the text to
# evaluate on. Other fields of batches change both.
TRAINING_BATCHES = Effect(OPTIMISATION, 'other batches of training alone')
HELD_OUT = Effect(SAFE, 'only what is evaluated')
_training_batches = functools.partial(field, resume=TRAINING_BATCHES)
_held_out = functools.partial(field, resume=HELD_OUT)
_loss = _fields(OPTIMISATION, 'the loss')
_updates = _fields(OPTIMISATION, 'other updates')
_state = _fields(INCOMPATIBLE, 'another optimizer state')
_rows = _fields(OPTIMISATION, 'other rows from here on')
_task = _fields(OPTIMISATION, 'another difficulty of the task')


def _steps(old: Mapping[str, Any], new: Mapping[str, Any]) -> Effect:
  """Returns what another number of steps does to a run."""
  if new['optim.decay_time']:
    return Effect(OPTIMISATION, 'optim.decay_time is a share of the steps')
  schedules = old['optim.schedule'], new['optim.schedule']
  if all(name in ('constant', 'rsqrt') for name in schedules):
    return Effect(SAFE, 'this schedule does not depend on the last step')
  if old['optim.decay_steps'] and old['optim.decay_steps'] == new[
      'optim.decay_steps']:
    return Effect(SAFE, 'the schedule ends at optim.decay_steps')
  return Effect(OPTIMISATION, 'the schedule is drawn out to the last step')


def _ema(old: Mapping[str, Any], new: Mapping[str, Any]) -> Effect:
  """Returns what another average of the parameters does to a run."""
  if bool(old['optim.ema']) == bool(new['optim.ema']):
    return Effect(OPTIMISATION, 'another average from here on')
  return Effect(INCOMPATIBLE,
                'an average that is kept from the first step on, or not')


@dataclasses.dataclass(frozen=True)
class Span:
  """The spans that the objectives span and denoising cut out."""
  noise_density: float = _task(0.15, 'The share of tokens that is cut out.',
                               above=0, below=1)
  mean_length: float = _task(3.0, 'The mean length of a span in tokens.',
                             least=1)
  permuted: float = _task(1.0, 'The share of sentences that change places, '
                          'with objective denoising.', least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Probe:
  """The task of the objective probe."""
  levels: tuple = _rows((), 'The difficulties, one for each row; derived: '
                        "those of the task's paper.")
  vocab: int = _rows(0, 'The letters of the task; derived: as many as '
                     'published.', most=2**20)
  examples: int = _training_batches(0, 'The rows in one pass of training; '
                                    'derived: as many as published.', most=MOST)
  held_out: int = _rows(0, 'The rows to evaluate on; derived: as many as '
                        'published.', most=MOST)
  random_non_queries: bool = _rows(False, 'Whether mqar has any letter between '
                                   'its queries, and not always the same one.')


@dataclasses.dataclass(frozen=True)
class Data:
  """The data, and how they become batches."""
  source: str = _batches(
      'sotu', 'The training data: sotu, text:GLOB or another form of '
      'docs/howto/own_data.md, all of which the answer to an unknown one '
      "lists; several with weights: '0.7*A,0.3*B'.")
  eval_source: str = _batches(
      '', 'The text to evaluate on, written like source. Empty: what is held '
      'out of source. The loss of a mixture is the mean of the losses of its '
      'sources, weighted by their weights.')
  holdout_every: int = _batches(
      20, 'Every n-th document is held out of training; of a single text file, '
      'its last n-th part. 0: nothing is held out.', most=MOST)
  tokenizer: str = field(
      'bytes', 'The tokenizer: bytes | bytes:N (in N ids) | sotu (1,024 tokens '
      'made of the default text) | a tokenizer.json | a folder | hf://ORG/NAME.',
      resume=Effect(INCOMPATIBLE, 'token numbers mean something else'))
  length: int = _batches(256, 'The tokens in a sequence (in the source, with '
                         'seq2seq).', least=1, most=2**24)
  target_length: int = _batches(0, 'The tokens in the target of seq2seq; '
                                'derived: length.', most=2**24)
  batch_size: int = _training_batches(32, 'The sequences in a batch, over all '
                                      'devices.', least=1, most=2**24)
  batch_ramp: str = _training_batches(
      '', "Smaller batches at first, STEP:ROWS with commas between: '100:8' "
      'has 8 rows in a batch until step 100. Empty: all have batch_size.')
  document_mask: bool = _batches(False, 'Whether attention and positions stop '
                                 'at the ends of documents.')
  cache_dir: str = _prepared('', 'The folder where tokens are kept; empty: '
                             '$ARCHETYPE_CACHE, or ~/.cache/archetype.')
  chat_template: str = field(
      'published', 'How chat lays out a conversation. published: as Vicuna '
      'v1.1, or for alpaca: as Alpaca. Any other: by the chat template in a '
      'Jinja file or a Hugging Face folder, whose text the run keeps, or in '
      "'jinja:TEXT'.",
      resume=Effect(OPTIMISATION, 'another layout of conversations'))
  labels: tuple = field((), 'The labels of classification, in the order of the '
                        "model's scores; derived: those of the training data.",
                        resume=Effect(INCOMPATIBLE, 'scores mean other labels'))
  class_weights: str = _training_batches(
      '', 'The weight of a row in the training loss of classification. '
      'balanced: each label the same in all; or a number for each label, with '
      'commas between. Empty: all rows the same.')
  length_buckets: int = _training_batches(
      4, 'Batches of labelled data are padded to one of so many lengths, the '
      'last of them data.length.', least=1, most=64)
  stride: int = _batches(
      0, 'The tokens that neighbouring windows share, where a sentence or a '
      'paragraph is longer than a row; derived: length / 3, as in BERT.',
      most=2**24)
  mask_rate: float = _batches(0.15, 'The share of tokens that mlm, mlm_nsp and '
                              'mlm_sop mask.', above=0, most=1)
  whole_words: bool = _batches(False, 'Whether all tokens of a word are masked '
                               'or none.')
  threads: int = _prepared(2, 'The threads that prepare batches; more pay '
                           'where they wait for a bucket.', least=1, most=512)


@dataclasses.dataclass(frozen=True)
class Train:
  """The length of the training, and its loss."""
  steps: int = field(1000, 'The last step of the run.', least=1, most=MOST,
                     resume=_steps)
  grad_accumulation: int = field(
      1, 'A batch is processed in so many parts, one after another.', least=1,
      most=2**24, resume=Effect(
          OPTIMISATION, 'dropout and expert capacity see other micro-batches'))
  max_bad_steps: int = field(
      10, 'The steps in a row with a loss that is not finite before the run '
      'ends.', least=1, most=MOST,
      resume=Effect(SAFE, 'only when a failing run ends'))
  z_loss: float = _loss(0.0, 'The weight of log(Z)^2 of the logits in the '
                        'loss.', least=0)
  label_smoothing: float = _loss(0.0, 'The share of the target given to all '
                                 'tokens.', least=0, below=1)
  hooks: str = _written('', 'Hooks of your own, FILE.py:CLASS with commas '
                        'between; see training/hook.py.')
  mtp_weight: float = _loss(0.3, 'The weight in the loss of the mean loss of '
                            'the modules of model.mtp_depth.', least=0)


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimiser and its schedule."""
  name: str = _state('adamw', 'The optimiser: adamw ademamix adafactor lion '
                     'muon normuon soap sgd.')
  lr: float = _updates(1e-3, 'The highest learning rate.', least=0)
  schedule: str = _updates('cosine', 'The schedule of the learning rate: '
                           'cosine linear rsqrt wsd constant.')
  warmup_steps: int = _updates(100, 'The steps in which the learning rate '
                               'rises to lr.', most=MOST)
  final_fraction: float = _updates(
      0.1, 'The learning rate at the end of the schedule, as a share of lr.',
      least=0, most=1)
  decay_steps: int = _updates(0, 'The step at which cosine and linear end; 0: '
                              'train.steps.', most=MOST)
  decay_fraction: float = _updates(0.2, 'The share of steps in which wsd '
                                   'decays.', above=0, most=1)
  weight_decay: float = _updates(0.1, 'The share of a parameter, times lr, '
                                 'that each step takes from it.', least=0)
  decay_time: float = _updates(
      0.0, 'The steps over which weight decay averages updates, as a share of '
      'train.steps, from which the decay is derived: 1 / (lr * decay_time * '
      'steps). 0: it is weight_decay.', least=0)
  cautious_decay: bool = _updates(
      False, 'Whether only numbers decay that the step does not make larger.')
  hyperball: bool = _state(
      False, 'Whether each hidden matrix keeps the norm that it began with; lr '
      'is its step as a share of that norm, and it does not decay.')
  decay_mask: tuple = _updates(
      (), 'Patterns over parameter paths. The first that matches says whether '
      'the parameter decays: 1, or not: 0. Empty: matrices decay; embeddings, '
      'norms and biases do not.')
  freeze: str = _state(
      '', 'Patterns over parameter paths, with commas between: what matches is '
      'not trained. A path may have block_B, as in the tree, or the number of '
      'a layer: embed/.*,decoder/layers/[0-3]/.*')
  layer_decay: float = _updates(
      1.0, 'The factor of the learning rate from a layer to the one below it; '
      '1: all have the same.', above=0, most=1)
  table_rate: float = _updates(
      1.0, 'The factor of the learning rate of the tables of model.memory that '
      'n-grams look up (Engram: 5). They do not decay by default.', above=0)
  clip_norm: float = _updates(1.0, "The gradient's largest norm, to which it "
                              'is scaled down; 0: none.', least=0)
  b1: float = _updates(0.9, 'The decay of the mean of the gradients, of adamw, '
                       'ademamix, lion, muon, normuon and soap.', least=0,
                       below=1)
  b2: float = _updates(0.95, 'The decay of the mean of their squares, of the '
                       'same optimisers.', least=0, below=1)
  b3: float = _updates(0.9999, 'The decay of the slow mean of the gradients, '
                       'of ademamix.', least=0, below=1)
  alpha: float = _updates(5.0, 'The weight of the slow mean of the gradients, '
                          'of ademamix.', least=0)
  eps: float = _updates(1e-8, 'The number that keeps adamw, ademamix, muon, '
                        'normuon and soap from dividing by 0.', above=0)
  momentum: float = _updates(0.9, 'The momentum of sgd, muon and normuon.',
                             least=0, below=1)
  precondition_every: int = _updates(10, 'The steps between two updates of the '
                                     'bases of soap.', least=1, most=MOST)
  precondition_max: int = _updates(
      10_000, 'The longest side of a matrix that has a preconditioner of soap.',
      least=1, most=MOST)
  ema: float = field(0.0, 'The decay of a moving average of the parameters, '
                     'which is evaluated and exported in their place, such as '
                     '0.999. 0: none is kept.', least=0, below=1, resume=_ema)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The sizes of the axes, which multiply to the number of devices."""
  data: int = _mesh(-1, 'The devices that split the batch; -1: those that are '
                    'left.', least=-1)
  fsdp: int = _mesh(1, 'The devices that split the batch, and d_model of the '
                    'weights.', least=-1)
  expert: int = _mesh(1, 'The devices that split the batch, and the experts.',
                      least=-1)
  context: int = _mesh(1, 'The devices that split the length.', least=-1)
  tensor: int = _mesh(1, 'The devices that split heads, feed-forward networks '
                      'and the vocabulary.', least=-1)
  rules: str = _mesh('default', 'The table of configs/sharding.py.')
  slices: int = _mesh(0, 'Groups of devices with a slow network between them, '
                      'over which data goes; 0: as the devices say.', most=MOST)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The checkpoints that are kept."""
  every_steps: int = _written(500, 'The steps between two checkpoints.',
                              most=MOST)
  every_minutes: float = _written(0.0, 'The minutes between two checkpoints; '
                                  '0: not by time.', least=0, most=1e6)
  keep: int = _written(3, 'The number of the newest good checkpoints that are '
                       'kept.', least=1, most=10_000)
  keep_every: int = _written(0, 'Every n-th step is kept too; 0: none.',
                             most=MOST)


@dataclasses.dataclass(frozen=True)
class Eval:
  """The evaluations while a run trains."""
  every_steps: int = _written(250, 'The steps between two evaluations.',
                              most=MOST)
  batches: int = _held_out(16, 'The batches of each source, of data.batch_size '
                           'rows; 0: all, whatever that size is.', most=MOST)
  part: str = _held_out(
      '', 'The half of the documents that are held out, first or second, to '
      'evaluate on; a probe then has rows of its own. Empty: all of them.')
  tasks: str = _written(
      '', "The tasks of eval.py to do while training, such as 'loss,exact'. "
      'They are done after the last step in any case.')
  tasks_every_steps: int = _written(0, 'The steps between two times that these '
                                    'tasks are done; 0: after the last one '
                                    'alone.', most=MOST)
  best: str = _written('', 'The figure, such as loss or labels/f1, whose best '
                       'checkpoint is kept. Empty: none.')
  best_is: str = _written('', 'The value of it that is the best: least or '
                          'largest; derived, where the figure is known.')
  patience: int = _written(0, 'The run ends after so many evaluations without '
                           'a better one; 0: no.', most=MOST)
  live: bool = _written(False, 'Whether the parameters are evaluated too, as '
                        'live/loss, where optim.ema is set.')


@dataclasses.dataclass(frozen=True)
class Log:
  """The figures that are written, and where."""
  every_steps: int = _written(10, 'The steps between two lines of metrics.',
                              least=1, most=MOST)
  tensorboard: bool = _written(False, "Whether TensorBoard's files are written "
                               'too.')
  wandb: bool = _written(False, 'Whether to log to Weights & Biases too.')
  wandb_project: str = _written('archetype', 'The project in Weights & Biases.')
  trackio: bool = _written(False, 'Whether to log to trackio too, on this '
                           'machine.')
  trackio_project: str = _written('archetype', 'The project in trackio.')


@dataclasses.dataclass(frozen=True)
class Run:
  """The fields that are in no group, and the groups; config.model stands after
  `probe`."""
  seed: int = field(
      0, 'The seed of the parameters, the order of the data, and dropout.',
      most=2**32 - 1, resume=Effect(
          OPTIMISATION, 'another order of the data, another dropout'))
  init_seed: int = field(0, 'The first parameters are drawn from both seeds, '
                         'so that each value gives others with the same data; '
                         '0: from seed alone.', most=2**32 - 1, resume=AT_START)
  objective: str = field(
      'causal', 'The objective: causal, prefix, chat, mlm, mlm_nsp, '
      'mlm_sop, replaced_tokens, masked_diffusion, block_diffusion, span, '
      'denoising, seq2seq, classification, regression, token_classification, '
      'question_answering, probe, compression.',
      resume=Effect(INCOMPATIBLE, 'another task, maybe with other heads'))
  init_from: str = field(
      '', 'A Hugging Face folder, hf://ORG/NAME or a workdir whose weights the '
      'run starts from.', resume=AT_START)
  init_partial: bool = field(False, 'Whether only the parameters are loaded '
                             'whose names and shapes match; the others are '
                             'listed.', resume=AT_START)
  span: Span = dataclasses.field(default_factory=Span)
  probe: Probe = dataclasses.field(default_factory=Probe)
  data: Data = dataclasses.field(default_factory=Data)
  train: Train = dataclasses.field(default_factory=Train)
  optim: Optim = dataclasses.field(default_factory=Optim)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  eval: Eval = dataclasses.field(default_factory=Eval)
  log: Log = dataclasses.field(default_factory=Log)


# All fields of a config by dotted name, but those of kinds of layer (sets of
# fields that the config gives to some of its layers).
FIELDS: dict[str, DeclaredField] = {}
# The sentence of each field.
SENTENCES: dict[str, str] = {}


def refresh_fields() -> None:
  """Fills FIELDS and SENTENCES: when this file is imported, and again where a
  file from outside has declared parts of models with fields of their own."""
  FIELDS.update(declared_fields(Run))
  for name, leaf in flat.FIELDS.items():
    FIELDS[f'model.{name}'] = leaf
  for name, leaf in FIELDS.items():
    SENTENCES[name] = leaf.rule.doc


refresh_fields()


def find_field(name: str) -> DeclaredField | None:
  """Returns the declaration of a config field, with its default and its range,
  or None if no field has this name.

  A kind of layer is a named set of fields, model.kinds.NAME, which some of the
  model's layers have in place of the model's own. These fields are declared
  once, as those of the model.

  Args:
    name: the dotted name of the field, such as 'optim.lr'.
  """
  # Translate a field of a kind of layer to the model's name of that field. A
  # name that is unknown becomes one that FIELDS does not have.
  match = re.fullmatch(r'model\.kinds\.\w+\.(\w+)(.*)', name)
  if match:
    name_in_kind, name_in_group = match.groups()
    name_in_model = flat.FIELDS_OF_LAYER_KINDS.get(name_in_kind, '')
    name = f'model.{name_in_model}{name_in_group}'
  return FIELDS.get(name)


def check_config(tree: Mapping[str, Any], subject: str = '') -> None:
  """Checks each value of a config by itself: its type, its range and its
  choices. Whether the fields of a model fit each other is checked only when the
  model is built.

  Args:
    tree: the config as nested dicts. Fields may be missing.
    subject: the words that the sentence of an error begins with.

  Raises:
    RequestError: if a name is no field of a config, or a value is not of its
      field's type, in its range and among its choices.
  """
  # Collect all values with their declarations, so that an unknown name is
  # reported before a wrong value.
  values = []
  for name, value in flat.flatten_groups(tree).items():
    declared_field = FIELDS.get(name) or find_field(name)
    if declared_field is None:
      raise RequestError(f'{subject}{shorten(name)} is no config field')
    values.append(
        FieldValue(leaf=declared_field, value=value, subject=subject + name))
  check_values(values)

  # The kinds of layer are named sets of fields that some layers have.
  kinds = tree.get('model', {}).get('kinds', {})
  flat.check_kinds(kinds, f'{subject}model.kinds')


def find_effect_of_change(name: str, old: Mapping[str, Any],
                          new: Mapping[str, Any]) -> Effect:
  """Returns what the change of a config field does to a run that is resumed
  with it: an Effect, which says how serious it is and why.

  Args:
    name: the field's dotted name.
    old: the value of each field in the run's own config, by dotted name.
    new: the value of each field in the config that it is resumed with.
  """
  # A run of another version may have a field that is unknown here.
  declared_field = find_field(name)
  if declared_field is None:
    return Effect(OPTIMISATION, 'this version has no such field')
  effect = declared_field.rule.resume

  # The effect of some fields depends on their old and new values.
  if callable(effect):
    return effect(old, new)
  return effect


def base() -> ml_collections.ConfigDict:
  """Returns a config with every field of a run at its default."""
  return ml_collections.ConfigDict(
      dataclasses.asdict(Run()) | {'model': flat.default_tree()})


def set_model_fields(model: ml_collections.ConfigDict, fields: Mapping[str, Any]
                     ) -> None:
  """Sets fields of config.model.

  Args:
    model: config.model, which is changed.
    fields: the new values by the name of their field. The value of a group of
      fields, such as `moe`, is a dict.

  Raises:
    RequestError: for an unknown field, or a value that it cannot have.
  """
  # `kinds`, a dict of named sets of fields for some of the layers, is replaced
  # as a whole. All else is merged into what the model has.
  python_fields = _with_python_numbers(fields)
  flat.check_fields(python_fields)
  if 'kinds' in python_fields:
    model.kinds = ml_collections.ConfigDict(python_fields.pop('kinds'))
  model.update(python_fields)


def _with_python_numbers(value: Any) -> Any:
  """Returns a value, or nested dicts of values, with Python's numbers in place
  of numpy's."""
  if isinstance(value, np.generic):
    return value.item()
  if hasattr(value, 'items'):
    return {name: _with_python_numbers(x) for name, x in value.items()}
  return value


# The configs of systems: their sizes as a table, and how a run of the smallest
# size and of a published size is set.

# The training of a small size, for minutes of one CPU core.
TINY_TRAINING = dict(batch_size=16, steps=300, lr=3e-3, warmup_steps=30)
# The model of most such sizes of decoders.
SMALL_DECODER = dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                     d_ff=344, max_len=256)
# LLaMA 2's batch in tokens, tokens and rates, where a paper has no others.
PUBLISHED_TRAINING = dict(batch=2**22, tokens=500_000 * 2**22, lr=3e-4,
                          warmup_steps=2000)
# The names in a size that set the training, and are no fields of config.model.
NAMES_OF_TRAINING = (
    'batch', 'batch_size', 'tokens', 'steps', 'warmup', 'decay', 'length',
    *(field.name for field in dataclasses.fields(Optim)))


def table_of_sizes(names: str, rows: Mapping[str, Sequence[Any]],
                   **shared_fields: Any) -> dict[str, dict[str, Any]]:
  """Returns the fields of each published size of a model, {size: {name:
  value}}, from a table with a row for each size and a column for each field.

  Args:
    names: the names of the columns, with spaces between them. A column is a
      field of config.model ('d_ff', or 'moe.d_ff' in a group of fields), a name
      of NAMES_OF_TRAINING, any other field of the config by its dotted name
      ('train.z_loss'), or `parameters`, the published number of parameters.
    rows: the values of each size, by its name, in the order of the columns.
    **shared_fields: the fields that all sizes have. A column of the same name
      overrides them.
  """
  sizes = {}
  for size, values in rows.items():
    fields = dict(zip(names.split(), values, strict=True))
    sizes[size] = shared_fields | fields
  return sizes


def make_config(arch: str, size: str, sizes: Mapping[str, Mapping[str, Any]],
                model: Mapping[str, Any] | None = None,
                run: Mapping[str, Any] | None = None, remat: str = 'full',
                **training: Any) -> ml_collections.ConfigDict:
  """Returns the config of a run of one size of a system.

  Its model has the parts of the system's page (architectures/), then `model`,
  then what its size says. A size that is not `tiny` computes in bfloat16.

  Args:
    arch: model.arch.
    size: the ':size' argument, a key of `sizes`.
    sizes: the fields of each size, by its name; see `table_of_sizes`.
    model: the fields of config.model that all sizes have.
    run: the other fields of the config, dotted, that all sizes have.
    remat: model.remat of a published size.
    **training: of all published sizes, before what theirs says: `batch` in
      tokens, or `batch_size` in rows; `tokens` in all, or `steps`; `warmup` and
      `decay` in tokens, or `warmup_steps`; `length` of a row, where it is not
      model.max_len; and fields of config.optim.

  Raises:
    RequestError: where there is no such size.
  """
  check_choice('size', size, sizes)

  # A size sets fields of the training, of the run, and of the model.
  training_fields = dict(PUBLISHED_TRAINING | training)
  if size == 'tiny':
    training_fields = dict(TINY_TRAINING)
  run_fields = dict(run or {})
  model_fields = {}
  for name, value in sizes[size].items():
    if name in NAMES_OF_TRAINING:
      training_fields[name] = value
    elif name in FIELDS:
      run_fields[name] = value
    elif name != 'parameters':
      model_fields[name] = value

  # The model; the later fields win.
  config = base()
  if size != 'tiny':
    config.model.update(dtype='bfloat16', remat=remat)
  _update_model(config.model, architectures.system(arch).PARTS)
  _update_model(config.model, model or {})
  _update_model(config.model, model_fields)
  config.model.arch = arch
  if architectures.stack(config.model) == 'encoder-decoder':
    config.model.num_decoder_layers = config.model.num_layers

  # The training, whose length may be the model's.
  _set_training(config, training_fields)
  config.update_from_flattened_dict(run_fields)
  return config


def _update_model(model: ml_collections.ConfigDict, fields: Mapping[str, Any]
                  ) -> None:
  """Sets fields of config.model.

  Args:
    model: config.model, which is changed.
    fields: the new values. A name with a dot, such as 'moe.d_ff', is a single
      field of a group of fields; the value of a whole group is a dict.
  """
  # Groups come first: the single field of a group overrides the group's value.
  undotted = {}
  dotted = {}
  for name, value in fields.items():
    if '.' in name:
      dotted[name] = value
    else:
      undotted[name] = value
  model.update(undotted)
  model.update_from_flattened_dict(dotted)


def _set_training(config: ml_collections.ConfigDict, training: dict[str, Any]
                  ) -> None:
  """Sets the length of a row, the batch, the steps and the optimiser of a
  config. Papers often state sizes in tokens, where the config has rows and
  steps; they are converted here.

  Args:
    config: the config, which is changed.
    training: values by the names in NAMES_OF_TRAINING, such as `batch` in
      tokens or `batch_size` in rows. They are popped as they are used, and
      those that remain are fields of config.optim.
  """
  # The batch: its tokens become rows of `length` tokens each. Without a batch
  # in tokens, `batch_size` gives the rows.
  length = training.pop('length', config.model.max_len)
  tokens_of_batch = training.pop('batch', 0)
  num_rows = training.pop('batch_size', tokens_of_batch // length)
  config.data.update(length=length, batch_size=num_rows)

  # The training and the phases of its schedule: their tokens become steps.
  tokens_of_step = num_rows * length
  num_tokens = training.pop('tokens', 0)
  config.train.steps = training.pop('steps', int(num_tokens / tokens_of_step))
  for phase in ('warmup', 'decay'):
    if phase in training:
      tokens_of_phase = training.pop(phase)
      training[f'{phase}_steps'] = int(tokens_of_phase / tokens_of_step)
  config.optim.update(training)


def make_get_config(arch: str, sizes: Mapping[str, Mapping[str, Any]],
                    *args: Any, **kwargs: Any
                    ) -> Callable[..., ml_collections.ConfigDict]:
  """Returns the function get_config(size) of a system's file of configs, for a
  system whose sizes are all set alike; the arguments are those of
  `make_config`."""
  return lambda size='tiny': make_config(arch, size, sizes, *args, **kwargs)
