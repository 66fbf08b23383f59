"""Checks how activations grow with width, depth or experts: in muP they stay
flat.

  python -m tools.coord_check
  python -m tools.coord_check --systems=gpt --optimizer=sgd
  python -m tools.coord_check --systems=gpt --depths=2,4,8,16 --widths=64
  python -m tools.coord_check --systems=llama --mixers=deltanet --widen=heads
  python -m tools.coord_check --systems=mixtral --experts=4,8,16 --widths=64

Each system is trained for a few steps on one batch, the bytes of a text, at
each width with the same learning rate. It prints the mean |x| of each block's
output and of the logits, and its slope over width on logarithmic axes: 0 is
flat, 1 grows as the width does. The base of muP is the least width, where
the two forms are one (Yang et al. 2022, appendix D.1). With --depths it trains
models of one width and several depths, of which the least is the base, and with
--experts models of several numbers of experts.
"""

from collections.abc import Sequence
import importlib
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import architectures
from architectures.parts import blocks
from architectures.parts.recurrent.layer import Recurrence
from common import kinds
from common.errors import RequestError
from common.fields import check_number
from configs import base as base_config
from training import cli, progress
from training.runs import init_state, make_train_step, build_optimizer
from training.workdir import storage

# A rate at which a few steps move the model visibly at every width.
LEARNING_RATE_OF_OPTIMIZER = {
    'adamw': 1e-3, 'ademamix': 3e-4, 'adafactor': 0.03, 'lion': 1e-3,
    'muon': 3e-3, 'normuon': 3e-3, 'soap': 1e-3, 'sgd': 0.03}
# The fields that grow with the width, by --widen. One that is 0 stays 0: it is
# derived from another, which grows.
WIDENED_FIELDS = {'size': ('head_dim', 'key_dim', 'value_dim'),
                  'heads': ('num_heads', 'num_kv_heads', 'heads', 'key_heads',
                            'value_heads')}
# The fields that grow with the number of experts, by --experts_grow: `alone`
# leaves the experts of a token and their size; `active` keeps the share of them
# that a token goes to; `grain` also divides their size by as much, so that the
# hidden units of a token stay.
EXPERTS_GROW = ('alone', 'active', 'grain')
# A slope up to this is called flat; one of twice as much, growing.
MAX_FLAT_SLOPE = 0.1

NUM_LAYERS, LENGTH, BATCH = 2, 32, 4
# The batch is its bytes, which are those with which docs/mup.md was measured.
TEXT = (
    'Checks how activations grow with width: in muP they should stay flat.\n\n'
    '  python -m tools.coord_check\n  python -m tools.coord_check --'
    'systems=gpt')


def define_flags() -> None:
  """Defines the flags of this program.

  They are not defined when this module is imported, because other programs
  import it and have flags of the same names.
  """
  cli.define_choices('systems', architectures.files('decoder'),
                     'Decoders; default: all that muP has rules for.')
  flags.DEFINE_list('widths', ['64', '128', '256', '512'],
                    'Values of model.d_model, the base first.')
  flags.DEFINE_list('depths', [], 'Values of model.num_layers, the base first; '
                    'then --widths is one number.')
  flags.DEFINE_list('experts', [], 'Values of model.moe.num_experts, the base '
                    'first; then --widths is one number.')
  flags.DEFINE_enum('experts_grow', 'alone', [*EXPERTS_GROW],
                    'What grows with --experts: nothing (alone); the experts '
                    'of a token (active); or these, while the size of an '
                    'expert falls (grain).')
  cli.define_choices('mixers', blocks.MIXERS, 'Values of model.mixer: each '
                     'system is measured with each of them in all its layers; '
                     'default: with the mixers that it has.')
  flags.DEFINE_enum('widen', 'size', [*WIDENED_FIELDS],
                    'What grows with d_model: the '
                    'size of a head (size), or the number of heads, which keep '
                    'their size (heads).')
  flags.DEFINE_integer('steps', 6, 'Training steps.', 1, 10**6)
  flags.DEFINE_integer('seeds', 2, 'Initialisations that are averaged.',
                       1, 10_000)
  flags.DEFINE_enum('optimizer', 'adamw', [*LEARNING_RATE_OF_OPTIMIZER],
                    'The optimiser.')
  flags.DEFINE_boolean('hyperball', False, 'Whether hidden matrices keep their '
                       'norm (optim.hyperball).')
  rates = ', '.join(f'{name} {rate:g}'
                    for name, rate in LEARNING_RATE_OF_OPTIMIZER.items())
  flags.DEFINE_float('lr', None, f'The learning rate; default: {rates}.')
  flags.DEFINE_string('json', '', 'A file to write the figures to.')


def main() -> int:
  """Measures the systems that the flags name, and prints and writes the
  figures."""
  # Check the flags.
  cli.parse(__doc__)
  args = flags.FLAGS
  depths, experts = _read_depths_and_experts(args)
  widths = read_sizes('--widths', args.widths, is_one=bool(depths or experts))
  lr = LEARNING_RATE_OF_OPTIMIZER[args.optimizer]
  if args.lr is not None:
    check_number('--lr', args.lr, (('>', 0),))
    lr = args.lr
  json_file = storage.checked_output_file(args.json, '--json')

  # Choose the systems. Without --systems, those for which muP has no rules are
  # left out.
  measured = []
  for system in args.systems or architectures.files('decoder'):
    for mixer in args.mixers or ['']:
      setting = TrainingSetting(
          optimizer=args.optimizer, lr=lr, steps=args.steps, mixer=mixer,
          widen=args.widen, hyperball=args.hyperball,
          experts_grow=args.experts_grow)
      try:
        _check_rules_of_mup(system, setting, widths=widths, depths=depths,
                            experts=experts)
      except RequestError as error:
        if args.systems:
          raise
        print(f'left out: {setting.name(system)}: {error}')
        continue
      measured.append((system, setting))

  # Train them in both parametrizations, and print the figures.
  rows = []
  for system, setting in measured:
    for parametrization in ('standard', 'mup'):
      row = measure_growth(
          system, parametrization=parametrization, widths=widths,
          depths=depths or [NUM_LAYERS], setting=setting, seeds=args.seeds,
          experts=experts)
      print(format_figures(row), flush=True)
      rows.append(row)
  storage.write_json(json_file, rows)
  return 0


def _read_depths_and_experts(args: Any) -> tuple[list[int], list[int]]:
  """Returns the numbers of layers and of experts over which to measure, from
  the flags; [] where the flag is not set.

  Args:
    args: the flags of this program.

  Raises:
    RequestError: where both flags are set, and for numbers of experts that are
      no multiples of the first.
  """
  depths, experts = [], []
  if args.depths:
    depths = read_sizes('--depths', args.depths)
  if args.experts:
    experts = read_sizes('--experts', args.experts)
    for number in experts:
      if number % experts[0]:
        raise RequestError(f'--experts has {number} and begins with '
                           f'{experts[0]}: choose multiples of it')
  if depths and experts:
    raise RequestError('--depths and --experts are both set: choose one')
  return depths, experts


def _check_rules_of_mup(system: str, setting: 'TrainingSetting',
                        widths: Sequence[int], depths: Sequence[int],
                        experts: Sequence[int]) -> None:
  """Checks that muP has rules for a system.

  Args:
    system: the name of the system.
    setting: the settings of the training runs.
    widths: the widths, ascending.
    depths: the depths, of which the first is muP's base; []: only one.
    experts: the numbers of experts, of which the first is muP's base; []: there
      are no experts, or always as many.

  Raises:
    RequestError: for a system without rules.
  """
  # Resolving a model with model.parametrization=mup raises the error. The rules
  # concern what differs from muP's base, so the widest model has them all.
  widest = config_at_width(
      system, parametrization='mup', width=widths[-1], base=widths[0],
      setting=setting, experts=experts)
  if depths:
    widest.model.mup_base_depth = depths[0]
  architectures.resolve(widest.model)


def read_sizes(flag: str, texts: Sequence[str], is_one: bool = False
               ) -> list[int]:
  """Returns the numbers of a flag in their order by size.

  Args:
    flag: the name of the flag, for the message.
    texts: its values.
    is_one: whether there must be one number rather than several.

  Raises:
    RequestError: for another number of them, for a number that is given twice,
      and for what is no number.
  """
  sizes = sorted({int(text) for text in texts if text.isdecimal()})
  wanted = 'two numbers or more, each once'
  is_right_count = len(sizes) >= 2
  if is_one:
    wanted = 'one number, beside several of --depths or --experts'
    is_right_count = len(sizes) == 1
  # The set has fewer elements than there are texts if some text is no number,
  # or a number is there twice.
  if not is_right_count or len(sizes) != len(texts):
    raise RequestError(f'{flag} is {",".join(texts)}: give {wanted}')
  return sizes


class TrainingSetting(NamedTuple):
  """How systems are trained, and how they grow with the width.

  Attributes:
    optimizer: the name of the optimiser.
    lr: the learning rate.
    steps: the number of training steps.
    mixer: the mixer of all layers (attention, or a recurrence); '': that of the
      system.
    widen: a key of WIDENED_FIELDS, which names the fields that grow.
    hyperball: whether hidden matrices keep their norm.
    experts_grow: one of EXPERTS_GROW, what grows with the number of experts.
  """
  optimizer: str
  lr: float
  steps: int
  mixer: str = ''
  widen: str = 'size'
  hyperball: bool = False
  experts_grow: str = 'alone'

  def name(self, system: str) -> str:
    """Returns the name of a system that is trained in this way."""
    if self.mixer:
      return f'{system} with {self.mixer}'
    return system


def config_at_width(system: str, parametrization: str, width: int, base: int,
                    setting: TrainingSetting, depth: int = NUM_LAYERS,
                    base_depth: int = 0, experts: Sequence[int] = ()
                    ) -> ml_collections.ConfigDict:
  """Returns the config of a system's smallest size (tiny), widened to a width.

  It has more layers than `depth` if the system's pattern of layers needs them.

  Args:
    system: the name of a file of configs/.
    parametrization: standard or mup.
    width: model.d_model.
    base: the width at which both parametrizations are the same.
    setting: how the system is trained, and how it grows with the width.
    depth: the number of layers.
    base_depth: model.mup_base_depth.
    experts: numbers of experts, the base's first and the model's last; empty:
      those of the system.

  Raises:
    RequestError: for experts that cannot be divided as the setting says.
  """
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  model = config.model
  is_mup = parametrization == 'mup'
  factor_of_width = width / model.d_model
  head_dim = model.head_dim or model.d_model // model.num_heads

  # Set how it is trained: at a constant rate, without decay and clipping.
  config.optim = base_config.base().optim
  config.optim.update(name=setting.optimizer, lr=setting.lr, warmup_steps=0,
                      schedule='constant', weight_decay=0.0, clip_norm=0.0,
                      hyperball=setting.hyperball)
  config.train.steps = setting.steps

  # Widen the model and its feed-forward networks. The vocabulary is all bytes.
  model.update(
      num_layers=kinds.fewest_layers(model, depth), vocab_size=256,
      max_len=LENGTH, parametrization=parametrization, d_model=width,
      d_ff=round(model.d_ff * factor_of_width),
      mixer=setting.mixer or model.mixer,
      mup_base_width=base if is_mup else 0,
      mup_base_depth=base_depth if is_mup else 0)
  model.moe.d_ff = round(model.moe.d_ff * factor_of_width)
  if setting.widen == 'heads':
    model.update(head_dim=head_dim,
                 mup_base_head_dim=head_dim if is_mup else 0)

  # Widen the heads of attention, and those of each recurrence, which has a
  # group of fields of its own.
  groups = [model]
  for name, mixer in blocks.MIXERS.items():
    if isinstance(mixer, Recurrence) and name in model:
      groups.append(model[name])
  for group in groups:
    for field in WIDENED_FIELDS[setting.widen]:
      if field in group:
        group[field] = round(group[field] * factor_of_width)
  if experts:
    grow_experts(model, base=experts[0], number=experts[-1],
                 what_grows=setting.experts_grow)
  return config


def grow_experts(model: ml_collections.ConfigDict, base: int, number: int,
                 what_grows: str) -> None:
  """Changes the experts of a model from those of the base.

  Let f be the number of experts over that of the base. Always, the number of
  experts grows by f. For `active` and `grain`, so does the number of experts
  that a token goes to (top_k); for `grain`, the hidden units of an expert
  (d_ff) are divided by f, so that the hidden units of a token stay:

    (f top_k) (d_ff / f) = top_k d_ff

  Args:
    model: config.model, with the experts of a token, and the size of an expert,
      of the base. It is changed.
    base: the number of experts of the base.
    number: the number of experts, a multiple of it.
    what_grows: one of EXPERTS_GROW: 'alone', 'active' or 'grain'.

  Raises:
    RequestError: for a number by which the size of an expert cannot be divided.
  """
  moe = model.moe
  factor = number // base
  top_k = moe.top_k
  d_ff = moe.d_ff or model.d_ff  # 0 stands for that of the dense layers
  if model.parametrization == 'mup':
    moe.update(mup_base_experts=base, mup_base_top_k=top_k, mup_base_d_ff=d_ff)
  moe.num_experts = number
  if what_grows != 'alone':
    moe.top_k = factor * top_k
  if what_grows == 'grain':
    moe.d_ff, remainder = divmod(d_ff, factor)
    if remainder:
      raise RequestError(f'--experts_grow is grain and an expert of {base} has '
                         f'{d_ff} hidden units, which {factor} does not divide')


def measure_growth(system: str, parametrization: str, widths: Sequence[int],
                   depths: Sequence[int], setting: TrainingSetting, seeds: int,
                   experts: Sequence[int] = ()) -> dict:
  """Trains a system at each width, each depth or each number of experts, and
  measures how its outputs grow with it.

  Args:
    system: the name of a file of configs/.
    parametrization: standard or mup.
    widths: the widths, the base first.
    depths: the numbers of layers, the base first. There is one width, or one
      depth.
    setting: how the system is trained, and how it grows.
    seeds: the number of initialisations that are averaged.
    experts: the numbers of experts, the base first; then there are one width
      and one depth. Empty: those of the system.

  Returns:
    A row for JSON with the fields of the setting, the names of the outputs
    (each block's and the logits; over several depths, the last block's), their
    mean |x| (`sizes`, for each model [steps + 1, outputs]), and for each output
    the slope of its mean |x| over what grows, on logarithmic axes.
  """
  # The models. The base of the depth is set only where depths are compared.
  is_over_depths = len(depths) > 1
  grown = widths
  base_depth = 0
  if is_over_depths:
    grown = depths
    base_depth = depths[0]
  if experts:
    grown = experts
  models = []
  for width in widths:
    for depth in depths:
      for number in experts or [0]:
        models.append((width, depth, number))

  # Measure the outputs of each.
  sizes = []
  title = f'{system}, {parametrization}: models'
  for width, depth, number in progress.show_items(models, title):
    base_and_number = []
    if experts:
      base_and_number = [experts[0], number]
    config = config_at_width(
        system, parametrization=parametrization, width=width, base=widths[0],
        setting=setting, depth=depth, base_depth=base_depth,
        experts=base_and_number)
    sizes_of_model = mean_sizes_of_outputs(
        config, steps=setting.steps, seeds=seeds)
    sizes.append(np.asarray(sizes_of_model, np.float64))
  outputs = [f'block {i}' for i in range(sizes[0].shape[-1] - 1)] + ['logits']
  if is_over_depths:
    sizes = [size[:, -2:] for size in sizes]
    outputs = ['last block', 'logits']

  # Fit a line to the sizes [models, outputs] after the last step, as functions
  # of what grows. In polyfit's result, the slope comes before the
  # intercept.
  log_sizes = np.log2([size[-1] for size in sizes])
  slopes = np.polyfit(np.log2(grown), log_sizes, 1)[0]
  return setting._asdict() | dict(
      system=setting.name(system), parametrization=parametrization,
      widths=list(widths), depths=list(depths), experts=list(experts),
      outputs=outputs,
      sizes=[size.tolist() for size in sizes], slopes=slopes.tolist())


def mean_sizes_of_outputs(config: ml_collections.ConfigDict, steps: int,
                          seeds: int) -> jax.Array:
  """Trains a model on one batch, and measures its outputs before each step and
  after the last one.

  Args:
    config: the config of the run.
    steps: the number of training steps.
    seeds: the number of initialisations.

  Returns:
    [steps + 1, outputs], the mean absolute value of each block's output and of
    the logits, averaged over the initialisations.
  """
  module = architectures.build(config.model)
  optimizer = build_optimizer(module, config.optim, steps)
  step = make_train_step(module, optimizer, config)
  batch = _batch_of_text()

  def measure_and_step(state: Any, _: None) -> tuple[Any, jax.Array]:
    """Returns the state after a step, and the sizes [outputs] before it. It has
    the form of a body of jax.lax.scan, which stacks the sizes of all steps."""
    sizes = _sizes_of_outputs(
        module, params=state.params, tokens_BL=batch['tokens'])
    new_state, _ = step(state, batch)
    return new_state, sizes

  def train_from_key(key: jax.Array) -> jax.Array:
    """Returns the sizes of one initialisation, [steps + 1, outputs]."""
    first_state = init_state(
        module, tx=optimizer, key=key, optim=config.optim)
    last_state, sizes = jax.lax.scan(
        measure_and_step, first_state, length=steps)
    last_sizes = _sizes_of_outputs(
        module, params=last_state.params, tokens_BL=batch['tokens'])
    return jnp.concatenate([sizes, last_sizes[None]])

  @jax.jit
  def train_from_keys(keys: jax.Array) -> jax.Array:
    """Trains all initialisations as one program; returns the mean sizes."""
    return jax.vmap(train_from_key)(keys).mean(0)

  return train_from_keys(jax.random.split(jax.random.key(1), seeds))


def _batch_of_text() -> dict[str, Any]:
  """Returns a batch of BATCH rows of LENGTH tokens, which are bytes of TEXT:
  its tokens, the targets, which are the bytes one position later, and the
  weights of the targets, all 1; each [BATCH, LENGTH]."""
  # A row takes one byte more than it has tokens, for the last target. The
  # reshape relies on TEXT to be long enough for all rows.
  text = TEXT.encode()[:BATCH * (LENGTH + 1)]
  bytes_BL = np.frombuffer(text, np.uint8).reshape(BATCH, LENGTH + 1)
  ids_BL = bytes_BL.astype(np.int32)
  return dict(tokens=ids_BL[:, :-1], targets=ids_BL[:, 1:],
              weights=jnp.ones((BATCH, LENGTH)))


def _sizes_of_outputs(module: Any, params: Any, tokens_BL: np.ndarray
                      ) -> jax.Array:
  """Returns the mean absolute value of the output of each block and of the
  logits, [N + 1] for N blocks.

  Args:
    module: the model.
    params: its parameters.
    tokens_BL: the tokens that it reads, [batch, length].
  """
  output: Any = module.apply({'params': params}, tokens_BL, keep_layers=True)
  # The first entry is the input of the first block. The others are [blocks,
  # batch, length, d_model].
  layers_NBLD = output.aux['layers'][1:]
  size_of_blocks = jnp.abs(layers_NBLD).mean((1, 2, 3))
  size_of_logits = jnp.abs(output.logits).mean()
  return jnp.append(size_of_blocks, size_of_logits)


def describe_slope(slope: float) -> str:
  """Returns a word for a slope: 'flat', 'growing', 'falling' or 'unclear'."""
  if abs(slope) <= MAX_FLAT_SLOPE:
    return 'flat'
  if slope >= 2 * MAX_FLAT_SLOPE:
    return 'growing'
  if slope <= -2 * MAX_FLAT_SLOPE:
    return 'falling'
  return 'unclear'


def format_figures(row: dict) -> str:
  """Returns the figures of a system as a table for a terminal: for each output
  its mean |x| at every width, depth or number of experts, and the slope over
  these.

  Args:
    row: the figures, as `measure_growth` returns them.
  """
  # Only one of the three grows: the models have one of each of the others.
  grown, title = row['widths'], 'width'
  if len(row['depths']) > 1:
    grown, title = row['depths'], 'depth'
  if row['experts']:
    grown, title = row['experts'], 'experts'

  # The columns: 10 characters for a name, 9 for a number.
  columns = ''.join(f'{number:>9}' for number in grown)
  lines = [f'{row["system"]}, {row["parametrization"]}: mean |x| after '
           f'{row["steps"]} steps of {row["optimizer"]} at lr {row["lr"]:g}',
           f'  {title:10}{columns}    slope']
  for i, output in enumerate(row['outputs']):
    # The sizes of a model are [steps + 1, outputs]: -1 is after the last step.
    sizes = ''.join(f'{sizes_of_model[-1][i]:9.3g}'
                    for sizes_of_model in row['sizes'])
    slope = row['slopes'][i]
    lines.append(f'  {output:10}{sizes}{slope:+9.2f}  {describe_slope(slope)}')
  return '\n'.join(lines)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
