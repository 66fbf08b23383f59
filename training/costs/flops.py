"""FLOPs: those of a program, what a model must multiply, and what devices can.

Those of a program are counted in its jaxpr, loops multiplied, recomputation
included, whatever XLA makes of it. Only matrix products and convolutions count,
and functions that say what they count as (layers.count_flops_by_result). Splash
attention is known by its name; another kernel counts with the estimate that it
carries. A product of [a, b] and [b, c] is 2abc.

Those of a model are counted in the program of a forward pass, so that a part is
counted without being described a second time. The program that is traced pads
no expert and skips no masked block, and attention declares which share of its
products the mask shows (`layers.count_flops_as_useful_part`; with a prefix, in
the mean over those of training, or of a whole prompt). So the work that an
implementation wastes on masked keys, padding, idle expert slots or
recomputation lowers utilisation (MFU, Chowdhery et al. 2022, appendix B; theirs
counts all keys). A token counts with the experts that its router chooses,
whether or not they have room. A recurrence that multiplies no matrices counts
what it computes element by element: one FLOP for each number of a sum, a
product or a function, in a scan without a matrix product and in what
`jax.lax.associative_scan` writes out. A backward pass costs twice the forward,
the gradient of both factors, less what is only there for parameters that are
not trained.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import ml_collections

import architectures
from architectures.parts import flat, layers
from architectures.parts.config import ModelConfig
from architectures.parts.loops import LoopsConfig
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from training import objectives
from training.optim import shares
from training.runs import parameter_shapes, parameter_shares

# Parts of a count: the products of which a mask hides a part, and the others.
ATTENTION = 'attention'
WEIGHTS = 'weights'


def forward_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                  prompt: bool = False) -> dict[str, float]:
  """Returns the FLOPs of a forward pass of a model over one sequence.

  The modules that predict later tokens (model.mtp_depth) are left out, as only
  training needs them.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: the number of tokens; for an encoder-decoder, those of the encoder.
    decoder_length: the number of tokens of an encoder-decoder's decoder.
    prompt: whether all tokens see each other: those of a prompt of a prefix LM.

  Returns:
    `attention`: the FLOPs of attention's scores and weighted values.
    `weights`: the FLOPs of all products with weights.
  """
  config = dataclasses.replace(architectures.resolve(model), mtp_depth=0)
  config = _config_for_counting(config, max(length, decoder_length))
  parts = _forward(config, length, decoder_length, prefix=prompt, prompt=prompt)
  return dict(parts)


def training_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                   unread: int = 0, freeze: str = '', prefix: bool = False
                   ) -> dict[str, float]:
  """Returns the FLOPs of a training step for one sequence, forward and
  backward.

  They are three times those of the forward pass where all parameters are
  trained. Adapters, frozen parameters and passes of a looped stack without a
  gradient take from the backward pass what its program is then without. A stack
  of which some layers are frozen counts as trained, as its program computes the
  gradient of all of them.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: the number of tokens; for an encoder-decoder, those of the encoder.
    decoder_length: the number of tokens of an encoder-decoder's decoder.
    unread: how many places of the sequence the head does not read, as those
      that have no label (Objective.num_unread_places).
    freeze: config.optim.freeze.
    prefix: whether the first tokens of a row see each other (Objective.prefix).

  Returns:
    The FLOPs of `attention` and of `weights`, as `forward_flops` returns them.
  """
  config = architectures.resolve(model)
  config = _config_for_counting(config, max(length, decoder_length))
  forward = _forward(config, length, decoder_length, unread=unread,
                     prefix=prefix)

  # Where all is trained, the backward pass costs two forward passes.
  loops = config.find(LoopsConfig)
  has_passes_without_gradient = loops is not None and loops.gradient_passes > 0
  is_whole = not freeze and not config.lora.rank
  if is_whole and not has_passes_without_gradient:
    return {part: 3.0 * flops for part, flops in forward}

  backward_passes = dict(_backward_passes_by_part(
      config, length, decoder_length, unread=unread, freeze=freeze,
      prefix=prefix))
  # Rounded, because a quotient and its product are off by a last digit.
  return {part: round((1 + backward_passes[part]) * flops, 3)
          for part, flops in forward}


def training_flops_of_row(config: ml_collections.ConfigDict, model: ModelConfig,
                          lengths: Sequence[int] = ()) -> dict[str, float]:
  """Returns the `training_flops` of one row of a run's batches.

  Args:
    config: the config of the run.
    model: its model, resolved.
    lengths: the number of tokens of the row; for an encoder-decoder, those of
      the source and of the target; (): the lengths that the run's rows have.
  """
  objective = objectives.find_objective(config)
  lengths = lengths or objective.row_lengths(config)
  return training_flops(
      model, *lengths, unread=objective.num_unread_places(config, lengths[0]),
      freeze=config.optim.freeze, prefix=objective.prefix)


def decode_flops(model: ModelConfig, keys: int, memory: int = 0
                 ) -> dict[str, float]:
  """Returns the FLOPs of writing one token with a cache, by part.

  Args:
    model: config.model, of a system with a decoder.
    keys: how many tokens the new one sees, itself included.
    memory: the number of tokens of the encoder, whose keys and values are kept.
  """
  config = architectures.resolve(model)
  config = _config_for_counting(config, max(keys, memory))
  return dict(_decoding_flops(config, keys, memory))


def _config_for_counting(config: ModelConfig, reach: int) -> ModelConfig:
  """Returns the config of the same function, whose program multiplies no more
  than the model must: experts have as many slots as tokens come in even load,
    no layer is computed again, and no kernel hides its products from the count.

  Args:
    config: the config of a model.
    reach: how many tokens the positions of the model must reach.
  """
  factor = 1.0
  moe = config.find(MoEConfig)
  if moe is not None and routing.router_of(moe).experts_choose:
    factor = routing.mean_active_experts(moe) / moe.top_k
  plain = dataclasses.replace(
      config, attention_kernel='xla', remat='none', scan_layers=True,
      max_len=max(config.max_len, reach))
  return plain.with_part(
      MoEConfig, dispatch='sorted', grouped_kernel='auto', group_size=0,
      capacity_factor=factor, eval_capacity_factor=factor)


def _fewest_rows(config: ModelConfig) -> int:
  """Returns the number of rows of the batch that is traced: as many as there
  are experts, so that tokens divide evenly over them."""
  if not config.has_experts:
    return 1
  return config.part(MoEConfig).all_experts


def _token_shape(config: ModelConfig, length: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of the batch of tokens that is traced, [rows, length]."""
  return jax.ShapeDtypeStruct((_fewest_rows(config), length), jnp.int32)


def _program_over_sequence(config: ModelConfig, length: int,
                           decoder_length: int, prefix: bool) -> tuple:
  """Returns a function that applies a module to whole sequences, and the shapes
  of the tokens that it takes after the module and its parameters.

  Args:
    config: the config of the model.
    length: the number of tokens of a row, or of a source.
    decoder_length: the number of tokens of a target; 0: there is none.
    prefix: whether the first tokens of a row see each other.
  """
  # Where positions are given, tokens may stand in any order, so that the
  # program skips no block of masked keys. Attention declares which share of the
  # products counts.
  def positions_of(count: int) -> jax.Array:
    return jnp.arange(count)[None]

  # A model with two sides is applied to a source and a target.
  if decoder_length:
    def translate(module: Any, params: Any, source: Any, target: Any):
      return module.apply(
          params, source, decoder_tokens_BL=target,
          decoder_positions_BL=positions_of(decoder_length))
    return (translate, _token_shape(config, length),
            _token_shape(config, decoder_length))

  # All others are applied to one row of tokens.
  options = {}
  if prefix:
    options['prefix_B'] = jnp.ones(_fewest_rows(config), jnp.int32)

  def read(module: Any, params: Any, tokens: Any):
    return module.apply(
        params, tokens, positions_BL=positions_of(length), **options)
  return read, _token_shape(config, length)


@functools.lru_cache(maxsize=4096)
def _forward(config: ModelConfig, length: int, decoder_length: int,
             unread: int = 0, prefix: bool = False, prompt: bool = False
             ) -> tuple:
  """Returns the FLOPs of a forward pass over one sequence, by part."""
  program, *args = _program_over_sequence(
      config, length=length, decoder_length=decoder_length, prefix=prefix)
  return _row_flops(config, program, *args, unread=unread, prompt=prompt)


@functools.lru_cache(maxsize=4096)
def _backward_passes_by_part(config: ModelConfig, length: int,
                             decoder_length: int, unread: int, freeze: str,
                             prefix: bool) -> tuple:
  """Returns how many forward passes the backward pass costs, for `attention`
  and for `weights`.

  They are 2 where all parameters are trained, and fewer where the program of
  the gradients of some parameters multiplies less than that of all gradients.

  Args:
    config: the config of the model.
    length: the number of tokens of a row, or of a source.
    decoder_length: the number of tokens of a target; 0: there is none.
    unread: the number of tokens of a row that the head does not read.
    freeze: optim.freeze, the pattern of the parameters that are not trained.
    prefix: whether the first tokens of a row see each other.

  Returns:
    Pairs of a part and its number.
  """
  # The shares of a learning rate: 1 is trained, and 0 is frozen.
  module = architectures.build(config)
  all_trained = jax.tree.map(lambda _: 1.0, parameter_shapes(module))
  optim = ml_collections.ConfigDict(
      dict(freeze=freeze, layer_decay=1.0, table_rate=1.0))
  some_trained = parameter_shares(module, optim) or all_trained

  # A forward pass alone, with all gradients, and with those that are taken. All
  # gradients are those of every pass of a looped stack.
  program, *args = _program_over_sequence(
      config, length=length, decoder_length=decoder_length, prefix=prefix)
  with_all_passes = config.with_part(LoopsConfig, gradient_passes=0)
  forward = _row_flops(config, program, *args, unread=unread)
  with_all_gradients = dict(_row_flops(
      with_all_passes, program, *args, unread=unread, trained=all_trained))
  with_some_gradients = dict(_row_flops(
      config, program, *args, unread=unread, trained=some_trained))

  passes_by_part = []
  for part, flops in forward:
    passes = _backward_passes(
        forward=flops, with_all_gradients=with_all_gradients[part],
        with_some_gradients=with_some_gradients[part])
    passes_by_part.append((part, passes))
  return tuple(passes_by_part)


def _backward_passes(forward: float, with_all_gradients: float,
                     with_some_gradients: float) -> float:
  """Returns how many forward passes the backward pass of some gradients costs.

  Args:
    forward: the FLOPs of a forward pass alone.
    with_all_gradients: the FLOPs of a forward pass and of all gradients.
    with_some_gradients: the FLOPs of a forward pass and of the gradients that
      are taken.
  """
  # There are no products, or none that the trace shows.
  if with_all_gradients <= forward:
    return 2.0

  # All gradients count as two passes, and some as their share of these.
  some_gradients = with_some_gradients - forward
  if with_all_gradients <= 3 * forward:
    return 2 * some_gradients / (with_all_gradients - forward)

  # A recurrence computes something again, in both programs or in one: that is
  # no work which the model must do.
  recomputed = with_all_gradients - 3 * forward
  if some_gradients >= recomputed:
    some_gradients -= recomputed
  return some_gradients / forward


@functools.lru_cache(maxsize=4096)
def _decoding_flops(config: ModelConfig, keys: int, memory: int) -> tuple:
  """Returns the FLOPs of writing one token with a full cache, as pairs of a
  part and its FLOPs.

  Args:
    config: the config of the model, as `_config_for_counting` returns it.
    keys: how many tokens the new one sees, itself included.
    memory: the number of tokens of the encoder; 0: there is no encoder.
  """
  # The shapes of the cache. An encoder's output stands in it already.
  method = '__call__'
  rows = _fewest_rows(config)
  cache = jax.eval_shape(lambda: architectures.init_cache(config, rows, keys))
  if memory:
    method = 'decode'
    cache = _cache_with_memory(config, cache=cache, keys=keys, memory=memory)

  def step(module: Any, params: Any, token: Any, cache: Any):
    position_11 = jnp.full((1, 1), keys - 1)
    return module.apply(params, token, positions_BL=position_11, cache=cache,
                        method=method)

  return _row_flops(config, step, _token_shape(config, 1), cache)


def _cache_with_memory(config: ModelConfig, cache: Any, keys: int, memory: int
                       ) -> tuple:
  """Returns the shapes of a decoder's cache that also holds the keys and values
  of the encoder's output (the memory).

  Every layer has keys and values of its own for the memory, whether or not it
  shares those of the text with other layers.

  Args:
    config: the config of the model.
    cache: the shapes of the cache of the text.
    keys: the number of tokens of the text.
    memory: the number of tokens of the encoder's output.
  """
  def unshared_cache() -> Any:
    """Returns the cache of a decoder whose layers share nothing."""
    return architectures.init_cache(
        without_sharing(config), _fewest_rows(config), keys)

  def lengthened(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns a shape that is as long as the memory, [*rows, M, J, K]."""
    *rows, _, heads, size = x.shape
    return jax.ShapeDtypeStruct((*rows, memory, heads, size), x.dtype)

  # Each layer of the cache gets the keys and values of a layer of its own.
  entries = []
  for entry, slot in zip(cache, jax.eval_shape(unshared_cache)):
    mixer = entry.mixer.replace(
        memory_key_BMJK=lengthened(slot.mixer.key_BMJK),
        memory_value_BMJK=lengthened(slot.mixer.value_BMJK))
    entries.append(entry.replace(mixer=mixer))
  return tuple(entries)


def without_sharing(config: ModelConfig) -> ModelConfig:
  """Returns the model whose layers all have keys and values of their own."""
  tree = flat.to_dict(config)
  for fields in (tree, *tree['kinds'].values()):
    fields['kv_sharing'] = False
  return flat.make_model(tree)


def _row_flops(config: ModelConfig, program: Any, *args, unread: int = 0,
               trained: Any = None, prompt: bool = False) -> tuple:
  """Counts the FLOPs of a row's logits and of what else a model returns.

  Args:
    config: the model.
    program: a function of the module, its parameters and `args`.
    *args: the arguments of the program, as shapes.
    unread: the number of places that the head does not read.
    trained: the share of the learning rate that each parameter has; the
      gradients of those that have no 0 count too. None: no gradients.
    prompt: whether all tokens see each other.

  Returns:
    (ATTENTION, its FLOPs) and (WEIGHTS, their FLOPs).
  """
  module = architectures.build(config)

  def outputs(params: Any, *args):
    out = program(module, {'params': params}, *args)
    mtp = [out.head.logits(x) for x in out.extra.get('mtp', ())]
    logits = None
    if out.head is not None:
      logits = out.head.logits(out.hidden[:, unread:])
    return logits, out.extra, mtp

  def sum_of_outputs(part: Any, params: Any, *args):
    """Returns a loss that reads all outputs, so that no gradient is dropped."""
    total = 0
    all_params = shares.fill_in_frozen(trained, part, params)
    for x in jax.tree.leaves(outputs(all_params, *args)):
      if jnp.issubdtype(x.dtype, jnp.floating):
        total += x.astype(jnp.float32).sum()
    return total

  def gradients(params: Any, *args):
    part = shares.keep_trained(trained, params)
    return jax.value_and_grad(sum_of_outputs)(part, params, *args)

  function = outputs if trained is None else gradients
  jaxpr = jax.make_jaxpr(function)(parameter_shapes(module), *args)
  work = count_work(jaxpr, Place(platform='gpu', useful=True, prompt=prompt))
  if work.loops or work.kernels:
    raise ValueError(
        f'the FLOPs of model.arch {config.arch!r} cannot be counted: it has '
        f'{work.loops} loops whose length depends on data, and {work.kernels} '
        'kernels without an estimate')

  # Attention's products are those that a mask may hide a part of.
  weights = work.flops - work.masked
  num_rows = _fewest_rows(config)
  return (ATTENTION, work.masked / num_rows), (WEIGHTS, weights / num_rows)


class Place(NamedTuple):
  """Where a program runs, as far as its work depends on that.

  Attributes:
    platform: the platform whose branch runs, where the code has one for each.
    rows: the number of rows of a grouped product on a device in even load,
      whose array has room for the worst; 0: count all of the array.
    passes: the number of passes of a loop that depends on data, where it is
      known otherwise.
    dense: the entries of GROUPED that the compiler makes of all rows and all
      groups, and masks.
    useful: whether products count as the shares that
      layers.count_flops_as_useful_part declares, and functions as
      layers.count_flops_by_result says, instead of as they are computed.
    prompt: whether these are the shares of a prompt.
    loop_rows: `rows` in a pass of the loop that `passes` is about.
    elements: whether what is computed element by element counts.
  """
  platform: str
  rows: int = 0
  passes: int | None = None
  dense: tuple[str, ...] = ()
  useful: bool = False
  prompt: bool = False
  loop_rows: int = 0
  elements: bool = False


# Grouped products: rows by their group's matrix, by its transpose (as for the
# gradient of the rows), and the gradient of the matrices.
GROUPED = ('forward', 'transposed', 'weights')


class Work(NamedTuple):
  """The work of all devices together.

  Attributes:
    flops: the FLOPs of the products; 2abc for [a, b] by [b, c].
    nbytes: the bytes of their operands and results, once each.
    loops: the loops whose number of passes depends on data, counted as one.
    dense: the FLOPs of grouped products that are made of all groups.
    masked: the FLOPs of products of which a mask hides a part: attention's.
    kernels: the kernels that carry no estimate, and count as nothing.
  """
  flops: float = 0.0
  nbytes: float = 0.0
  loops: int = 0
  dense: float = 0.0
  masked: float = 0.0
  kernels: int = 0

  def __add__(self, other: Any):
    return Work(
        flops=self.flops + other.flops,
        nbytes=self.nbytes + other.nbytes,
        loops=self.loops + other.loops,
        dense=self.dense + other.dense,
        masked=self.masked + other.masked,
        kernels=self.kernels + other.kernels)

  def times(self, n: float):
    """Returns the work done n times; loops and kernels are still as many."""
    return self._replace(
        flops=self.flops * n, nbytes=self.nbytes * n, dense=self.dense * n,
        masked=self.masked * n)


def count_work(jaxpr: Any, place: Place) -> Work:
  """Returns the work of a traced program: the sum of that of its equations.

  Equations whose results nothing reads are left out, as XLA drops them. For
  this, equations are gone through from the last to the first, with the set of
  variables that later ones read.

  Args:
    jaxpr: the program, an open or a closed jaxpr.
    place: where the program runs, and what of it counts.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = Work()
  read_later = set(_variables(jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    is_read = any(v in read_later for v in eqn.outvars)
    if not is_read and not eqn.effects:
      continue
    read_later.update(_variables(eqn.invars))
    work = _work_of_equation(eqn, place)
    if place.useful and work.flops:
      work = _useful_work(work, eqn, place.prompt)
    total += work
  return total


def _variables(atoms: Sequence[Any]) -> list[Any]:
  """Returns the inputs or outputs of an equation that are no literals."""
  return [v for v in atoms if not isinstance(v, jex.Literal)]


def _useful_work(work: Work, eqn: jex.JaxprEqn, prompt: bool) -> Work:
  """Returns the share of an equation's work that a mask leaves.

  Attention declares that share in a name scope around its products
  (layers.count_flops_as_useful_part), which the equation's name stack shows.
  Where nothing is declared, all of the work is returned.

  Args:
    work: the work of the equation.
    eqn: the equation.
    prompt: whether to take the share of a prompt whose tokens all see each
      other, in place of that of training.
  """
  name_stack = str(eqn.source_info.name_stack)
  for in_training, all_products, in_prompt in _DECLARED.findall(name_stack):
    shown_products = in_training
    if prompt:
      shown_products = in_prompt
    flops = work.flops * int(shown_products) / int(all_products)
    work = work._replace(flops=flops, masked=flops)
  return work


_DECLARED = re.compile(
    layers.SCOPE_OF_USEFUL_FLOPS.format(r'(\d+)', r'(\d+)', r'(\d+)'))
_COUNTED = re.compile(
    layers.NAME_OF_COUNTED_FUNCTION.format(r'(\d+)', r'(\d+)'))


# The primitives that compute element by element: one FLOP for each number of
# the result, or of what is summed up.
ELEMENTWISE = frozenset((
    'abs', 'add', 'add_any', 'atan2', 'cbrt', 'cos', 'cosh', 'cumlogsumexp',
    'cummax', 'cummin', 'cumprod', 'cumsum', 'div', 'erf', 'exp', 'exp2',
    'expm1', 'integer_pow', 'log', 'log1p', 'logistic', 'max', 'min', 'mul',
    'neg', 'pow', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_sum',
    'rem', 'rsqrt', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'sub', 'tan',
    'tanh'))


def _is_of_associative_scan(eqn: jex.JaxprEqn) -> bool:
  """Whether `jax.lax.associative_scan`, which is no primitive, wrote this."""
  trace = eqn.source_info.traceback
  if trace is None:
    return False
  names = [frame.function_name for frame in trace.frames]
  return 'associative_scan' in names


def _work_of_equation(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of one equation of a traced program, and of all programs
  that it calls.

  Args:
    eqn: the equation.
    place: where the program runs, and what of it counts.
  """
  # Inside of an associative scan, what is computed element by element counts.
  if place.useful and not place.elements and _is_of_associative_scan(eqn):
    place = place._replace(elements=True)

  # A function whose name says what it counts as, or is that of a kernel.
  name = eqn.params.get('name', '')
  counted = _COUNTED.fullmatch(str(name))
  if place.useful and counted:
    part, whole = map(int, counted.groups())
    flops = eqn.outvars[0].aval.size * part / whole
    return Work(flops=flops, nbytes=_nbytes(eqn))
  if name in ('gmm', 'tgmm'):
    return _megablox(eqn, place)

  # A primitive with products. Any other counts as the programs that it calls.
  primitive = eqn.primitive.name
  if primitive in _PRIMITIVES:
    return _PRIMITIVES[primitive](eqn, place)
  if place.elements and primitive in ELEMENTWISE:
    return _elementwise(eqn)
  total = Work()
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    total += count_work(jaxpr, place)
  return total


def _elementwise(eqn: jex.JaxprEqn) -> Work:
  """Returns the work of one of ELEMENTWISE; none, where the numbers are whole
  ones."""
  out = eqn.outvars[0].aval
  if not jnp.issubdtype(out.dtype, jnp.inexact):
    return Work()
  sizes = [v.aval.size for v in (*eqn.invars, *eqn.outvars)]
  return Work(flops=float(max(sizes)), nbytes=_nbytes(eqn))


def _dot(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of a matrix product: twice its results times the numbers
  that each one sums up."""
  del place
  (contracted, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval
  out = eqn.outvars[0].aval
  summed = math.prod(lhs.shape[axis] for axis in contracted)
  return Work(flops=2.0 * out.size * summed, nbytes=_nbytes(eqn))


def _convolution(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of a convolution."""
  del place
  kernel = eqn.invars[1].aval
  numbers = eqn.params['dimension_numbers']
  out_channels = kernel.shape[numbers.rhs_spec[0]]
  of_one_output = kernel.size / out_channels
  flops = 2.0 * eqn.outvars[0].aval.size * of_one_output
  return Work(flops=flops, nbytes=_nbytes(eqn))


def _scan(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of all passes. Where a body multiplies no matrices, what
  it computes element by element is all that a model must compute there."""
  body = count_work(eqn.params['jaxpr'], place)
  if place.useful and not body.flops:
    body = count_work(eqn.params['jaxpr'], place._replace(elements=True))
  return body.times(eqn.params['length'])


def _while(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of the passes that are known, or of one pass; one with
  products is noted then."""
  jaxpr = eqn.params['body_jaxpr']
  if place.passes is not None:
    body = count_work(jaxpr, place._replace(rows=place.loop_rows))
    return body.times(place.passes)
  body = count_work(jaxpr, place)
  if not body.flops:
    return body
  return body._replace(loops=body.loops + 1)


def _shard_map(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of all devices."""
  return count_work(eqn.params['jaxpr'], place).times(eqn.params['mesh'].size)


def _work_of_ragged_dot(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of a product of rows with the matrices of their groups
  (jax.lax.ragged_dot), or of one of the two products of its gradient."""
  lhs, rhs, group_sizes = (v.aval for v in eqn.invars)
  numbers = eqn.params['ragged_dot_dimension_numbers']
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]

  # Which of the three products of GROUPED this is.
  (_, contracted), _ = numbers.dot_dimension_numbers
  if not numbers.rhs_group_dimensions:
    kind = 'weights'
  elif contracted == (rhs.ndim - 1,):
    kind = 'transposed'
  else:
    kind = 'forward'

  # Some platforms multiply all rows with the matrix of each group, and mask.
  if kind in place.dense:
    flops *= group_sizes.shape[-1]
    return Work(flops=flops, nbytes=_nbytes(eqn), dense=flops)

  num_rows = lhs.shape[numbers.lhs_ragged_dimensions[0]]
  return _work_in_even_load(eqn, place=place, flops=flops, num_rows=num_rows)


def _megablox(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of megablox's grouped products. gmm: [R, K] by [E, K, N]
  or [E, N, K]; tgmm: [K, R] by [R, N]; R rows, E groups, and K and N units."""
  arrays = [v.aval for v in eqn.invars
            if jnp.issubdtype(v.aval.dtype, jnp.floating)]
  if not arrays:
    return Work()  # which tiles there are, worked out ahead of the product
  lhs, rhs = arrays[:2]
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]
  by_row = rhs if eqn.params['name'] == 'tgmm' else lhs
  return _work_in_even_load(eqn, place=place, flops=flops,
                            num_rows=by_row.shape[0])


def _work_in_even_load(eqn: jex.JaxprEqn, place: Place, flops: float,
                       num_rows: int) -> Work:
  """Returns the work of a grouped product where tokens come in even load.

  Its array has room for more rows than come then. Only those that come are read
  and multiplied, and of the groups' matrices only as many as rows come.

  Args:
    eqn: the equation of the product.
    place: where it runs; its `rows` are those that come.
    flops: the FLOPs of all rows that the array has room for.
    num_rows: the number of these rows.
  """
  share_of_rows = 1.0
  if place.rows:
    share_of_rows = min(1.0, place.rows / num_rows)

  nbytes = 0
  for v in eqn.invars:
    share = 1
    if len(v.aval.shape) == 2:  # rows
      share = share_of_rows
    if len(v.aval.shape) == 3:  # the matrices of the groups
      num_groups = v.aval.shape[0]
      share = min(1.0, share_of_rows * num_rows / num_groups)
    nbytes += _size(v.aval) * share
  for v in eqn.outvars:
    share = 1
    if len(v.aval.shape) == 2:
      share = share_of_rows
    nbytes += _size(v.aval) * share
  return Work(flops=flops * share_of_rows, nbytes=nbytes)


# Products of scores' size in a call: q k and p v; and in the backward passes
# the scores again, dv, dp, and dk or dq.
_SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}


def _work_of_kernel(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of a Pallas kernel: that of splash attention, or the
  estimate that another one carries."""
  del place
  key = 'name' if 'name' in eqn.params else 'name_and_src_info'
  name = str(eqn.params[key])
  for prefix, products in _SPLASH.items():
    if name.startswith(prefix):
      return _work_of_splash_attention(eqn, products)
  cost = eqn.params['cost_estimate']
  if cost is None:
    return Work(kernels=1)
  return Work(flops=cost.flops, nbytes=cost.bytes_accessed)


def _work_of_splash_attention(eqn: jex.JaxprEqn, products: int) -> Work:
  """Returns the work of a kernel of splash attention, which skips blocks of the
  scores that the mask hides.

  Args:
    eqn: the call of the kernel.
    products: how many products of the size of the scores the kernel makes.
  """
  # The grid is [heads or 1, blocks of queries, blocks of keys]. Blocks that the
  # mask hides of all queries are not in it.
  arrays = [v.aval for v in eqn.invars if v.aval.ndim >= 3]
  grid = arrays[0].shape[-2:]
  side = max(grid)
  share_of_blocks = math.prod(grid) / side ** 2

  # A causal kernel is given the positions of the queries, and skips the blocks
  # above the diagonal.
  has_positions = False
  for v in eqn.invars:
    if v.aval.ndim == 2 and v.aval.dtype == jnp.int32:
      has_positions = True
  if share_of_blocks == 1 and has_positions:
    share_of_blocks = (side + 1) / (2 * side)

  # The first array of floats is the queries, the second one the keys.
  floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
  queries, keys = floats[:2]
  flops_of_product = 2.0 * math.prod(queries.shape) * keys.shape[-2]
  flops = products * flops_of_product * share_of_blocks
  return Work(flops=flops, nbytes=_nbytes(eqn))


def _work_of_branch(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of a conditional: that of the branch of the platform;
  where the branch depends on data, that of the branch with the most FLOPs."""
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if not platforms:
    works = [count_work(branch, place) for branch in branches]
    return max(works, key=lambda work: work.flops)
  for branch, names in zip(branches, platforms):
    if names is None or place.platform in names:
      return count_work(branch, place)
  raise AssertionError(f'no branch for {place.platform}')


_PRIMITIVES = {
    'dot_general': _dot,
    'conv_general_dilated': _convolution,
    'ragged_dot_general': _work_of_ragged_dot,
    'pallas_call': _work_of_kernel,
    'scan': _scan,
    'while': _while,
    'cond': _work_of_branch,
    'shard_map': _shard_map,
}


def _nbytes(eqn: jex.JaxprEqn) -> float:
  """Returns the bytes of an equation's operands and results, once each."""
  total = 0
  for v in (*eqn.invars, *eqn.outvars):
    if hasattr(v.aval, 'dtype'):
      total += _size(v.aval)
  return float(total)


def _size(aval: Any) -> int:
  return aval.size * jnp.dtype(aval.dtype).itemsize


# TPU, per TensorCore, bfloat16. docs.cloud.google.com/tpu/docs/system-
# architecture-tpu-vm and its page for each version give a chip: v2 45, v3 123,
# v4 275, v5e 197, v5p 459, v6e 918, 7x 2307 TFLOP/s. A jax device is a chip or
# a core (v2, v3, 7x: always a core), so we count the device's cores.
_TPU_CORE = {
    'TPU v2': 45 / 2,
    'TPU v3': 123 / 2,
    'TPU v4': 275 / 2,
    'TPU v5 lite': 197,  # v5e
    'TPU v5e': 197,
    'TPU v5': 459 / 2,  # v5p
    'TPU v5p': 459 / 2,
    'TPU v6 lite': 918,  # v6e, Trillium
    'TPU v6e': 918,
    'TPU7x': 2307 / 2,  # Ironwood
}

# GPU: bfloat16, and float32 as TF32. Datasheets of the A100, L4, L40S, H100,
# H200, HGX B200, GH200 and GB200 (nvidia.com/en-us/data-center); those of
# Hopper and later print figures with sparsity, twice the dense ones here.
_GPU = {
    'NVIDIA A100-PCIE-40GB': (312, 156),
    'NVIDIA A100-SXM4-40GB': (312, 156),
    'NVIDIA A100 80GB PCIe': (312, 156),
    'NVIDIA A100-SXM4-80GB': (312, 156),
    'NVIDIA L4': (121, 60),
    'NVIDIA L40S': (362, 183),
    'NVIDIA H100 80GB HBM3': (989.4, 494.7),  # SXM
    'NVIDIA H100 PCIe': (756, 378),
    'NVIDIA H100 NVL': (835.5, 417.5),
    'NVIDIA H200': (989.4, 494.7),  # SXM
    'NVIDIA H200 NVL': (835.5, 417.5),
    'NVIDIA GH200 480GB': (990, 495),
    'NVIDIA B200': (2250, 1125),
    'NVIDIA GB200': (2500, 1250),
}


def peak_flops_per_second(kind: str, dtype: str, cores: int = 1
                          ) -> float | None:
  """Returns the FLOP/s that a device reaches at most, as its maker publishes
  them, or None where they are not known.

  Args:
    kind: jax.Device.device_kind.
    dtype: the type of the products: bfloat16 or float32.
    cores: the number of TensorCores in one jax device; TPUs only.
  """
  if dtype not in ('bfloat16', 'float32'):
    return None
  precision = jax.config.jax_default_matmul_precision
  if dtype == 'float32' and precision not in (None, 'default'):
    return None  # several passes: no published figure
  if kind in _TPU_CORE:
    return _TPU_CORE[kind] * cores * 1e12
  if kind not in _GPU:
    return None
  bfloat16, float32 = _GPU[kind]
  if dtype == 'float32':
    return float32 * 1e12
  return bfloat16 * 1e12


def total_peak(devices: Sequence[jax.Device], dtype: str) -> float | None:
  """Returns the peak of all `devices` together, or None."""
  total = 0
  for device in devices:
    cores = device.num_cores if device.platform == 'tpu' else 1
    each = peak_flops_per_second(device.device_kind, dtype, cores)
    if each is None:
      return None
    total += each
  return total
