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
from architectures.parts.skeletons import embed_predictions
from training import objectives
from training.optim import shares
from training.runs import parameter_shapes, parameter_shares

# Parts of a count: the products of which a mask hides a part, and the others.
ATTENTION = 'attention'
WEIGHTS = 'weights'
FlopsByPart = tuple[tuple[str, float], ...]  # pairs of a part and its FLOPs


def forward_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                  prompt: bool = False) -> dict[str, float]:
  """Returns the FLOPs of a forward pass of a model over one sequence.

  The modules that predict later tokens (model.mtp_depth) are left out, as only
  training needs them.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: the number of tokens; for an encoder-decoder, those of the encoder.
    decoder_length: the number of tokens of an encoder-decoder's decoder.
    prompt: whether all tokens see each other, as in a prompt of a prefix LM.

  Returns:
    `attention`: the FLOPs of attention's scores and weighted values.
    `weights`: the FLOPs of all products with weights.
  """
  config = dataclasses.replace(architectures.resolve(model), mtp_depth=0)
  config = config_for_counting(config, max(length, decoder_length))
  parts = _forward_flops_by_part(
      config, length=length, decoder_length=decoder_length, prefix=prompt,
      prompt=prompt)
  return dict(parts)


def training_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                   num_unread: int = 0, freeze: str = '', prefix: bool = False
                   ) -> dict[str, float]:
  """Returns the FLOPs of a training step for one sequence, forward and
  backward.

  They are three times those of the forward pass if all parameters are trained.
  Self-conditioning adds the pass that makes its estimate.
  With adapters, frozen parameters or passes of a looped stack that have no
  gradient, the backward pass costs only what its program still multiplies. A
  stack with some frozen layers counts as trained, because its program computes
  the gradient of all of its layers.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: the number of tokens; for an encoder-decoder, those of the encoder.
    decoder_length: the number of tokens of an encoder-decoder's decoder.
    num_unread: the number of positions of the sequence for which the head
      computes no logits, because they have no label
      (Objective.num_unread_places).
    freeze: config.optim.freeze.
    prefix: whether the first tokens of a row see each other (Objective.prefix).

  Returns:
    The FLOPs of `attention` and of `weights`, as `forward_flops` returns them.
  """
  config = architectures.resolve(model)
  config = config_for_counting(config, max(length, decoder_length))
  denoises = config.diffusion_block > 0
  count_forward = functools.partial(
      _forward_flops_by_part, config, length=length,
      decoder_length=decoder_length, prefix=prefix, denoises=denoises)
  forward = count_forward(num_unread=num_unread)
  # With self-conditioning, a pass without a gradient makes the estimate, of
  # logits that it computes itself.
  estimate = dict.fromkeys((ATTENTION, WEIGHTS), 0.0)
  if config.self_conditioning:
    estimate = dict(count_forward(num_unread=length, estimates=True))

  # With exits, the loss reads the logits of each pass.
  loops = config.find_part(LoopsConfig)
  if loops is not None and loops.exit_gate:
    without_head = dict(count_forward(num_unread=length))
    for part, flops in forward:
      head = flops - without_head[part]
      estimate[part] += 3.0 * (loops.passes - 1) * head

  # If everything is trained, the backward pass costs two forward passes.
  has_passes_without_gradient = loops is not None and loops.gradient_passes > 0
  trains_everything = not freeze and not config.lora.rank
  if trains_everything and not has_passes_without_gradient:
    return {part: 3.0 * flops + estimate[part] for part, flops in forward}

  backward_passes = dict(_backward_passes_by_part(
      config, length=length, decoder_length=decoder_length,
      num_unread=num_unread, freeze=freeze, prefix=prefix))
  # Rounded, because a quotient and its product are off by a last digit.
  return {part: round((1 + backward_passes[part]) * flops + estimate[part], 3)
          for part, flops in forward}


def training_flops_of_row(config: ml_collections.ConfigDict, model: ModelConfig,
                          lengths: Sequence[int] = ()) -> dict[str, float]:
  """Returns the `training_flops` of one row of a run's batches.

  Args:
    config: the config of the run.
    model: the model of the run, resolved.
    lengths: the number of tokens of the row; for an encoder-decoder, those of
      the source and of the target; (): the lengths that the run's rows have.

  Returns:
    The FLOPs of `attention` and of `weights`, as `forward_flops` returns them.
  """
  objective = objectives.find_objective(config)
  lengths = lengths or objective.row_lengths(config)
  num_unread = objective.num_unread_places(config, lengths[0])
  return training_flops(
      model, *lengths, num_unread=num_unread, freeze=config.optim.freeze,
      prefix=objective.prefix)


def decode_flops(model: ModelConfig, keys: int, memory_length: int = 0
                 ) -> dict[str, float]:
  """Returns the FLOPs of generating one token with a cache of earlier keys and
  values.

  Args:
    model: config.model, of a system with a decoder.
    keys: the number of tokens that the new token attends to, itself included.
    memory_length: the number of tokens that the encoder has read, whose keys
      and values are in the cache; 0: there is no encoder.

  Returns:
    The FLOPs of `attention` and of `weights`, as `forward_flops` returns them.
  """
  config = architectures.resolve(model)
  config = config_for_counting(config, max(keys, memory_length))
  return dict(_decoding_flops_by_part(config, keys, memory_length))


def config_for_counting(config: ModelConfig, reach: int) -> ModelConfig:
  """Returns a config of the same model, with the same parameters, whose program
  does no avoidable work.

  Experts have exactly as many slots as tokens come if all experts get equally
  many, no layer is recomputed (remat), and attention is written out as plain
  products, which a count can see, instead of as a kernel.

  Args:
    config: the config of a model.
    reach: the number of positions that the model must at least have.
  """
  # Each token chooses top_k experts, unless the experts choose their tokens.
  # Then a token has another number of experts in the mean.
  factor = 1.0
  moe = config.find_part(MoEConfig)
  if moe is not None and routing.router_of(moe).experts_choose:
    factor = routing.mean_active_experts(moe) / moe.top_k

  # Layers in a scan are traced once, and counted as often as they run. In
  # float32, a product has one form for all platforms.
  plain = dataclasses.replace(
      config, attention_kernel='xla', remat='none', scan_layers=True,
      dtype='float32', max_len=max(config.max_len, reach))
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
                           decoder_length: int, prefix: bool,
                           denoises: bool = False, estimates: bool = False
                           ) -> tuple:
  """Returns a function that applies a model to whole sequences, to be traced.

  Args:
    config: the config of the model.
    length: the number of tokens of a row; for an encoder-decoder, of a source.
    decoder_length: the number of tokens of a target; 0: there is none.
    prefix: whether the first tokens of a row see each other.
    denoises: whether the row is noised, and read beside its clean tokens.
    estimates: whether this makes the estimate of self-conditioning.

  Returns:
    The function, of a module, its parameters and arrays of tokens; and the
    shape of each of these arrays, [rows, length].
  """
  # With explicit positions, tokens may stand in any order, so the program
  # cannot skip blocks of masked keys. Attention itself declares which share of
  # its products counts.
  def positions_of(count: int) -> jax.Array:
    return jnp.arange(count)[None]

  # An encoder-decoder is applied to a source and a target.
  if decoder_length:
    def apply_to_pair(module: Any, params: Any, source: Any, target: Any):
      return module.apply(
          params, source, decoder_tokens_BL=target,
          decoder_positions_BL=positions_of(decoder_length))
    return (apply_to_pair, _token_shape(config, length),
            _token_shape(config, decoder_length))

  # All others are applied to one row of tokens.
  options = {}
  if prefix:
    options['prefix_B'] = jnp.ones(_fewest_rows(config), jnp.int32)

  def apply_to_row(module: Any, params: Any, tokens: Any):
    """Applies the model to a batch of tokens, [rows, length]. What it returns
    is what the program has to compute: the output, with the estimate of
    self-conditioning where that is asked for."""
    # Block diffusion reads the clean tokens, and perhaps an estimate, beside
    # the noised ones. Their values are of no matter, since FLOPs are counted.
    inputs = dict(options)
    if denoises:
      inputs['clean_BL'] = tokens
    if denoises and config.self_conditioning:
      inputs['estimate_BLD'] = jnp.zeros(
          (*tokens.shape, config.d_model), config.compute_dtype)
    output = module.apply(
        params, tokens, positions_BL=positions_of(length), **inputs)
    if not estimates:
      return output
    estimate_BLD = embed_predictions(config, params['params'], output)
    return output.replace(extra=dict(estimate=estimate_BLD))
  return apply_to_row, _token_shape(config, length)


@functools.lru_cache(maxsize=4096)
def _forward_flops_by_part(config: ModelConfig, length: int,
                           decoder_length: int, num_unread: int = 0,
                           prefix: bool = False, prompt: bool = False,
                           denoises: bool = False, estimates: bool = False
                           ) -> FlopsByPart:
  """Returns the FLOPs of a forward pass over one sequence, as pairs of a part
  (ATTENTION or WEIGHTS) and its FLOPs.

  Args:
    config: the config of the model, as `config_for_counting` returns it.
    length: the number of tokens of a row; for an encoder-decoder, of a source.
    decoder_length: the number of tokens of a target; 0: there is none.
    num_unread: the number of positions that the head does not read.
    prefix: whether the first tokens of a row see each other.
    prompt: whether the row is a prompt, all of whose tokens see each other.
    denoises: whether the row is noised, and read beside its clean tokens.
    estimates: whether this makes the estimate of self-conditioning.
  """
  program, *args = _program_over_sequence(
      config, length=length, decoder_length=decoder_length, prefix=prefix,
      denoises=denoises, estimates=estimates)
  return _row_flops_by_part(
      config, program, *args, num_unread=num_unread, prompt=prompt)


@functools.lru_cache(maxsize=4096)
def _backward_passes_by_part(config: ModelConfig, length: int,
                             decoder_length: int, num_unread: int, freeze: str,
                             prefix: bool) -> tuple:
  """Returns the cost of the backward pass in forward passes, for attention and
  for weights.

  The cost is 2 if all parameters are trained, and less if the program of some
  gradients multiplies less than the program of all gradients.

  Args:
    config: the config of the model.
    length: the number of tokens of a row, or of a source.
    decoder_length: the number of tokens of a target; 0: there is none.
    num_unread: the number of tokens of a row that the head does not read.
    freeze: optim.freeze, the pattern of the parameters that are not trained.
    prefix: whether the first tokens of a row see each other.

  Returns:
    Pairs of a part (ATTENTION or WEIGHTS) and the number of forward passes.
  """
  # The share of the learning rate of each parameter: 1 is trained, 0 is frozen.
  module = architectures.build(config)
  all_trained = jax.tree.map(lambda _: 1.0, parameter_shapes(module))
  optim = ml_collections.ConfigDict(
      dict(freeze=freeze, layer_decay=1.0, table_rate=1.0))
  some_trained = parameter_shares(module, optim) or all_trained

  # Count the same row three times: without gradients, with all gradients (of
  # every pass of a looped stack too), and with those that are trained.
  program, *args = _program_over_sequence(
      config, length=length, decoder_length=decoder_length, prefix=prefix,
      denoises=config.diffusion_block > 0)
  with_all_passes = config.with_part(LoopsConfig, gradient_passes=0)
  forward = _row_flops_by_part(config, program, *args, num_unread=num_unread)
  with_all_gradients = dict(_row_flops_by_part(
      with_all_passes, program, *args, num_unread=num_unread,
      rate_shares=all_trained))
  with_some_gradients = dict(_row_flops_by_part(
      config, program, *args, num_unread=num_unread, rate_shares=some_trained))

  # Compare the three counts, for attention and for weights separately.
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
  # The backward pass has no products, or none that the trace shows.
  if with_all_gradients <= forward:
    return 2.0

  # All gradients count as two passes, and some as their share of these.
  some_gradients = with_some_gradients - forward
  if with_all_gradients <= 3 * forward:
    return 2 * some_gradients / (with_all_gradients - forward)

  # More than three forward passes in all: a recurrence recomputes something for
  # its gradient. A model need not do that work, so it is taken off again.
  recomputed = with_all_gradients - 3 * forward
  if some_gradients >= recomputed:
    some_gradients -= recomputed
  return some_gradients / forward


@functools.lru_cache(maxsize=4096)
def _decoding_flops_by_part(config: ModelConfig, keys: int, memory_length: int
                            ) -> FlopsByPart:
  """Returns the FLOPs of generating one token with a full cache, as pairs of a
  part (ATTENTION or WEIGHTS) and its FLOPs.

  Args:
    config: the config of the model, as `config_for_counting` returns it.
    keys: the number of tokens that the new token attends to, itself included.
    memory_length: the number of tokens of the encoder; 0: there is no encoder.
  """
  # The shapes of the cache.
  empty_cache = functools.partial(
      architectures.init_cache, config, batch=_fewest_rows(config), length=keys)
  cache = jax.eval_shape(empty_cache)

  # An encoder has been run before, so that its keys and values are in the
  # cache, and only the decoder runs.
  method = '__call__'
  if memory_length:
    method = 'decode'
    cache = _cache_with_memory(
        config, cache=cache, keys=keys, memory_length=memory_length)

  def decode_token(module: Any, params: Any, token: Any, cache: Any):
    # The new token stands at the last position, so that it sees the whole
    # cache.
    position_11 = jnp.full((1, 1), keys - 1)
    return module.apply(params, token, positions_BL=position_11, cache=cache,
                        method=method)

  return _row_flops_by_part(
      config, decode_token, _token_shape(config, 1), cache)


def _cache_with_memory(config: ModelConfig, cache: Any, keys: int,
                       memory_length: int) -> tuple:
  """Returns the shapes of a decoder's cache that also holds the keys and values
  of the encoder's output (the memory).

  Every layer has keys and values of its own for the memory, whether or not it
  shares those of the text with other layers.

  The suffixes name axes: B batch, M tokens of the memory, J heads of keys, K
  features of a head.

  Args:
    config: the config of the model.
    cache: the shapes of the cache of the text.
    keys: the number of tokens of the text.
    memory_length: the number of tokens of the encoder's output.
  """
  def unshared_cache() -> Any:
    """Returns the cache of a decoder whose layers share no keys and values."""
    return architectures.init_cache(
        without_sharing(config), batch=_fewest_rows(config), length=keys)

  def lengthen(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns a shape that is as long as the memory, [*rows, M, J, K]."""
    *rows, _, heads, size = x.shape
    return jax.ShapeDtypeStruct((*rows, memory_length, heads, size), x.dtype)

  # Add the memory's keys and values to each layer. Their shapes are those of
  # the unshared cache, in which each layer has keys and values, but for the
  # length.
  layers_with_memory = []
  for layer, unshared_layer in zip(cache, jax.eval_shape(unshared_cache)):
    unshared = unshared_layer.mixer
    mixer = layer.mixer.replace(
        memory_key_BMJK=lengthen(unshared.key_BMJK),
        memory_value_BMJK=lengthen(unshared.value_BMJK))
    layers_with_memory.append(layer.replace(mixer=mixer))
  return tuple(layers_with_memory)


def without_sharing(config: ModelConfig) -> ModelConfig:
  """Returns the model whose layers all have keys and values of their own."""
  tree = flat.to_dict(config)
  for fields in (tree, *tree['kinds'].values()):
    fields['kv_sharing'] = False
  return flat.make_model(tree)


def _row_flops_by_part(config: ModelConfig, program: Any, *args,
                       num_unread: int = 0, rate_shares: Any = None,
                       prompt: bool = False) -> FlopsByPart:
  """Counts the FLOPs of one row of a traced program: of its logits and of all
  else that the model returns.

  Args:
    config: the config of the model.
    program: the function to trace, of the module, its parameters and `args`.
    *args: the arguments of the program, as shapes.
    num_unread: the number of positions that the head does not read.
    rate_shares: a tree with the share of the learning rate of each parameter.
      The gradients of all parameters but those with 0 are counted too. None:
      only the forward pass is counted.
    prompt: whether all tokens see each other.

  Returns:
    The pairs (ATTENTION, its FLOPs) and (WEIGHTS, their FLOPs).

  Raises:
    ValueError: if the program has loops of unknown length or kernels without
      an estimate of their FLOPs.
  """
  module = architectures.build(config)

  def compute_outputs(params: Any, *args):
    """Returns all that a model computes: its logits, its other results, and the
    logits of the modules that predict further tokens (MTP)."""
    output = program(module, {'params': params}, *args)
    logits_of_modules = []
    for hidden_BLD in output.extra.get('mtp', ()):
      logits_of_modules.append(output.head.logits(hidden_BLD))
    logits = None
    if output.head is not None:
      logits = output.head.logits(output.hidden[:, num_unread:])
    return logits, output.extra, logits_of_modules

  def sum_outputs(trained: Any, params: Any, *args):
    """Returns a loss that reads all outputs, so that no gradient is dropped."""
    total = 0
    all_params = shares.fill_in_frozen(
        rate_shares, trained=trained, params=params)
    for x in jax.tree.leaves(compute_outputs(all_params, *args)):
      if jnp.issubdtype(x.dtype, jnp.floating):
        total += x.astype(jnp.float32).sum()
    return total

  def compute_gradients(params: Any, *args):
    """Returns the loss and its gradient by the trained parameters."""
    trained = shares.keep_trained(rate_shares, params)
    return jax.value_and_grad(sum_outputs)(trained, params, *args)

  # Trace the program on shapes, and count the work of all of its equations.
  function = compute_outputs if rate_shares is None else compute_gradients
  jaxpr = jax.make_jaxpr(function)(parameter_shapes(module), *args)
  options = CountOptions(platform='gpu', only_useful=True, prompt=prompt)
  work = count_work(jaxpr, options)
  if work.loops or work.kernels:
    raise ValueError(
        f'the FLOPs of model.arch {config.arch!r} cannot be counted: it has '
        f'{work.loops} loops whose length depends on data, and {work.kernels} '
        'kernels without an estimate')

  # Only products of attention can be partly masked, so masked work is
  # attention's, and all other work is that of weights.
  weights = work.flops - work.masked
  num_rows = _fewest_rows(config)
  return (ATTENTION, work.masked / num_rows), (WEIGHTS, weights / num_rows)


class CountOptions(NamedTuple):
  """How the work of a traced program is counted.

  Attributes:
    platform: the platform that the program runs on. Of code that has a branch
      for each platform, this platform's is counted.
    rows: the number of rows of a grouped product on a device if all experts get
      equally many tokens. The array has room for the most uneven load. 0: count
      the whole array.
    num_passes: the number of passes of loops whose length depends on data;
      None: it is not known.
    dense: the entries of GROUPED_PRODUCTS that the compiler computes as
      products of all rows with all groups, and then masks.
    only_useful: whether products count as the shares that
      layers.count_flops_as_useful_part declares, and functions as
      layers.count_flops_by_result says, instead of as they are computed.
    prompt: whether these are the shares of a prompt.
    loop_rows: the value of `rows` inside a loop that runs `num_passes` times.
    count_elementwise: whether sums, products and functions that are computed
      element by element count too.
  """
  platform: str
  rows: int = 0
  num_passes: int | None = None
  dense: tuple[str, ...] = ()
  only_useful: bool = False
  prompt: bool = False
  loop_rows: int = 0
  count_elementwise: bool = False


# Grouped products: rows by their group's matrix, by its transpose (as for the
# gradient of the rows), and the gradient of the matrices.
GROUPED_PRODUCTS = ('forward', 'transposed', 'weights')


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
    """Returns the work of two programs together."""
    return Work(
        flops=self.flops + other.flops,
        nbytes=self.nbytes + other.nbytes,
        loops=self.loops + other.loops,
        dense=self.dense + other.dense,
        masked=self.masked + other.masked,
        kernels=self.kernels + other.kernels)

  def times(self, repeats: float):
    """Returns the work of several repeats. The numbers of loops and of kernels
    stay, as the program has no more of them."""
    return self._replace(
        flops=self.flops * repeats,
        nbytes=self.nbytes * repeats,
        dense=self.dense * repeats,
        masked=self.masked * repeats)


def count_work(jaxpr: Any, options: CountOptions) -> Work:
  """Returns the work of a traced program, the sum over its equations.

  Equations whose results nothing reads are left out, because XLA drops them.

  Args:
    jaxpr: the program, an open or a closed jaxpr.
    options: how the work is counted.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = Work()
  # Go from the last equation to the first, so that all readers of a result have
  # been seen before the equation that computes it.
  read_later = set(_variables(jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    is_read = any(v in read_later for v in eqn.outvars)
    if not is_read and not eqn.effects:
      continue
    read_later.update(_variables(eqn.invars))
    # The work is counted in full first, and then scaled to its useful share.
    work = _work_of_equation(eqn, options)
    if options.only_useful and work.flops:
      work = _useful_work(work, eqn, prompt=options.prompt)
    total += work
  return total


def _variables(atoms: Sequence[Any]) -> list[Any]:
  """Returns the variables among the inputs or outputs of an equation, without
  its literals."""
  return [v for v in atoms if not isinstance(v, jex.Literal)]


def _useful_work(work: Work, eqn: jex.JaxprEqn, prompt: bool) -> Work:
  """Returns the work of an equation without the products that a mask hides.

  Attention declares the share of its products that the mask shows in a name
  scope around them (layers.count_flops_as_useful_part). If an equation is in no
  such scope, all of its work is returned.

  Args:
    work: the work of the equation.
    eqn: the equation.
    prompt: whether to take the share of a prompt whose tokens all see each
      other, in place of that of training.
  """
  # A scope gives three numbers of products: shown in training, in all, and
  # shown in a prompt.
  name_stack = str(eqn.source_info.name_stack)
  declared_counts = _USEFUL_SHARE_IN_SCOPE.findall(name_stack)
  for in_training, all_products, in_prompt in declared_counts:
    shown_products = in_training
    if prompt:
      shown_products = in_prompt
    flops = work.flops * int(shown_products) / int(all_products)
    work = work._replace(flops=flops, masked=flops)
  return work


# `layers` writes these into names of scopes and of functions.
_USEFUL_SHARE_IN_SCOPE = re.compile(
    layers.SCOPE_OF_USEFUL_FLOPS.format(r'(\d+)', r'(\d+)', r'(\d+)'))
_COUNT_IN_FUNCTION_NAME = re.compile(
    layers.NAME_OF_COUNTED_FUNCTION.format(r'(\d+)', r'(\d+)'))


# The primitives that compute element by element: one FLOP for each number of
# the result, or of what is summed up.
ELEMENTWISE_PRIMITIVES = frozenset((
    'abs', 'add', 'add_any', 'atan2', 'cbrt', 'cos', 'cosh', 'cumlogsumexp',
    'cummax', 'cummin', 'cumprod', 'cumsum', 'div', 'erf', 'exp', 'exp2',
    'expm1', 'integer_pow', 'log', 'log1p', 'logistic', 'max', 'min', 'mul',
    'neg', 'pow', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_sum',
    'rem', 'rsqrt', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'sub', 'tan',
    'tanh'))


def _is_of_associative_scan(eqn: jex.JaxprEqn) -> bool:
  """Whether `jax.lax.associative_scan` wrote an equation. It is no primitive,
  so only the traceback of the equation shows it."""
  trace = eqn.source_info.traceback
  if trace is None:
    return False
  names = [frame.function_name for frame in trace.frames]
  return 'associative_scan' in names


def _work_of_equation(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of one equation of a traced program, and of all programs
  that it calls.

  Args:
    eqn: the equation.
    options: how the work is counted.
  """
  # A recurrence written as an associative scan has no matrix products: what it
  # computes element by element is all of its work.
  if options.only_useful and not options.count_elementwise:
    if _is_of_associative_scan(eqn):
      options = options._replace(count_elementwise=True)

  # Some functions say in their name what they count as, as a share of the size
  # of their result; and megablox's kernels (gmm, tgmm) are known by their name.
  name = eqn.params.get('name', '')
  counted = _COUNT_IN_FUNCTION_NAME.fullmatch(str(name))
  if options.only_useful and counted:
    part, whole = map(int, counted.groups())
    flops = eqn.outvars[0].aval.size * part / whole
    return Work(flops=flops, nbytes=_nbytes_of_equation(eqn))
  if name in ('gmm', 'tgmm'):
    return _work_of_megablox(eqn, options)

  # Primitives with products have a function of their own. Any other counts as
  # the programs that it calls, such as a jit or a custom gradient.
  primitive = eqn.primitive.name
  if primitive in _WORK_OF_PRIMITIVE:
    return _WORK_OF_PRIMITIVE[primitive](eqn, options)
  if options.count_elementwise and primitive in ELEMENTWISE_PRIMITIVES:
    return _work_of_elementwise(eqn)
  total = Work()
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    total += count_work(jaxpr, options)
  return total


def _work_of_elementwise(eqn: jex.JaxprEqn) -> Work:
  """Returns the work of one of ELEMENTWISE_PRIMITIVES: a FLOP for each number
  of its largest array. Computing with integers counts as no work."""
  out = eqn.outvars[0].aval
  if not jnp.issubdtype(out.dtype, jnp.inexact):
    return Work()
  sizes = [v.aval.size for v in (*eqn.invars, *eqn.outvars)]
  return Work(flops=float(max(sizes)), nbytes=_nbytes_of_equation(eqn))


def _work_of_matrix_product(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a matrix product: for each number of the result, a
  multiplication and an addition for each term of its sum."""
  del options
  (contracted, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval
  out = eqn.outvars[0].aval
  summed = math.prod(lhs.shape[axis] for axis in contracted)
  return Work(flops=2.0 * out.size * summed, nbytes=_nbytes_of_equation(eqn))


def _work_of_convolution(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a convolution: for each number of the result, a
  multiplication and an addition for each weight of one output channel."""
  del options
  kernel = eqn.invars[1].aval
  numbers = eqn.params['dimension_numbers']
  out_channels = kernel.shape[numbers.rhs_spec[0]]
  weights_of_one_output = kernel.size / out_channels
  flops = 2.0 * eqn.outvars[0].aval.size * weights_of_one_output
  return Work(flops=flops, nbytes=_nbytes_of_equation(eqn))


def _work_of_scan(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of all passes of a scan. If its body multiplies no
  matrices, the scan is a recurrence whose work is element by element."""
  body = count_work(eqn.params['jaxpr'], options)
  if options.only_useful and not body.flops:
    options = options._replace(count_elementwise=True)
    body = count_work(eqn.params['jaxpr'], options)
  return body.times(eqn.params['length'])


def _work_of_while(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a while loop.

  If the number of passes is not known, one pass is counted; and if that pass
  has products, the loop is added to Work.loops, so that callers can refuse the
  count.

  Args:
    eqn: the equation of the loop.
    options: how the work is counted; its num_passes may give the passes.
  """
  jaxpr = eqn.params['body_jaxpr']
  if options.num_passes is not None:
    body = count_work(jaxpr, options._replace(rows=options.loop_rows))
    return body.times(options.num_passes)
  body = count_work(jaxpr, options)
  if not body.flops:
    return body
  return body._replace(loops=body.loops + 1)


def _work_of_shard_map(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a shard_map on all devices together: that of one
  device, which its program describes, times their number."""
  num_devices = eqn.params['mesh'].size
  return count_work(eqn.params['jaxpr'], options).times(num_devices)


def _work_of_ragged_dot(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a grouped product (jax.lax.ragged_dot), in which each
  row is multiplied with the matrix of its group, or of one of the two products
  of its gradient.

  Args:
    eqn: the equation of the product.
    options: how the work is counted.
  """
  lhs, rhs, group_sizes = (v.aval for v in eqn.invars)
  numbers = eqn.params['ragged_dot_dimension_numbers']
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]

  # Find which of the three GROUPED_PRODUCTS this is. The gradient of the
  # weights has no groups of matrices on its right side, and the gradient of the
  # rows sums over the last axis of the matrices.
  (_, contracted), _ = numbers.dot_dimension_numbers
  if not numbers.rhs_group_dimensions:
    product = 'weights'
  elif contracted == (rhs.ndim - 1,):
    product = 'transposed'
  else:
    product = 'forward'

  # Some platforms multiply all rows with the matrix of each group, and mask.
  if product in options.dense:
    flops *= group_sizes.shape[-1]
    return Work(flops=flops, nbytes=_nbytes_of_equation(eqn), dense=flops)

  # Elsewhere a row is multiplied with the matrix of its own group alone.
  num_rows = lhs.shape[numbers.lhs_ragged_dimensions[0]]
  return _work_in_even_load(
      eqn, options=options, flops=flops, num_rows=num_rows)


def _work_of_megablox(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a grouped product of the megablox kernels.

  gmm multiplies rows [R, K] with matrices [E, K, N] or [E, N, K], and tgmm, the
  gradient of the matrices, [K, R] with [R, N]; for R rows, E groups, and K and
  N units.

  Args:
    eqn: the call of the kernel.
    options: how the work is counted.
  """
  arrays = [v.aval for v in eqn.invars
            if jnp.issubdtype(v.aval.dtype, jnp.floating)]
  if not arrays:
    # This call only works out which tiles there are, ahead of the product.
    return Work()
  lhs, rhs = arrays[:2]
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]
  # The operand whose first axis is the rows: in tgmm it is the second one.
  operand_with_rows = rhs if eqn.params['name'] == 'tgmm' else lhs
  return _work_in_even_load(eqn, options=options, flops=flops,
                            num_rows=operand_with_rows.shape[0])


def _work_in_even_load(eqn: jex.JaxprEqn, options: CountOptions, flops: float,
                       num_rows: int) -> Work:
  """Returns the work of a grouped product if all groups get equally many rows.

  The product's array has room for more rows than then come. Only the rows that
  come are read and multiplied, and at most one matrix of a group for each.

  Args:
    eqn: the equation of the product.
    options: how the work is counted; `options.rows` is the number of rows that
      come.
    flops: the FLOPs of all rows that the array has room for.
    num_rows: the number of rows that the array has room for.
  """
  share_of_rows = 1.0
  if options.rows:
    share_of_rows = min(1.0, options.rows / num_rows)

  # Operands: arrays of two axes are rows, those of three are matrices of
  # groups, and all others, such as the sizes of the groups, are read as a
  # whole.
  nbytes = 0
  for v in eqn.invars:
    share = 1
    if len(v.aval.shape) == 2:
      share = share_of_rows
    if len(v.aval.shape) == 3:
      num_groups = v.aval.shape[0]
      share = min(1.0, share_of_rows * num_rows / num_groups)
    nbytes += _nbytes_of_array(v.aval) * share
  # Results are rows, or the gradient of all matrices.
  for v in eqn.outvars:
    share = 1
    if len(v.aval.shape) == 2:
      share = share_of_rows
    nbytes += _nbytes_of_array(v.aval) * share
  return Work(flops=flops * share_of_rows, nbytes=nbytes)


# How many products of the size of the scores a call of each kernel makes. The
# forward pass multiplies q k and p v; a backward pass computes the scores
# again, dp, and then dv and dk, or dq.
_PRODUCTS_OF_SPLASH_KERNEL = {
    'splash_mha_fwd': 2,
    'splash_mha_dkv': 4,
    'splash_mha_dq': 3,
}


def _work_of_kernel(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a Pallas kernel.

  It is counted for splash attention, which is known by its name. For other
  kernels it is the estimate that they carry; one without an estimate is added
  to Work.kernels and counts as no work.

  Args:
    eqn: the call of the kernel.
    options: how the work is counted, which a kernel does not depend on.
  """
  del options
  # The kernel's name stands under one of two keys.
  key = 'name' if 'name' in eqn.params else 'name_and_src_info'
  name = str(eqn.params[key])
  for prefix, products in _PRODUCTS_OF_SPLASH_KERNEL.items():
    if name.startswith(prefix):
      return _work_of_splash_attention(eqn, products)
  cost = eqn.params['cost_estimate']
  if cost is None:
    return Work(kernels=1)
  return Work(flops=cost.flops, nbytes=cost.bytes_accessed)


def _work_of_splash_attention(eqn: jex.JaxprEqn, products: int) -> Work:
  """Returns the work of a kernel of splash attention.

  The kernel skips the blocks of the scores that the mask hides.

  Args:
    eqn: the call of the kernel.
    products: how many products of the size of the scores the kernel makes.
  """
  # The first array of three axes describes the grid of blocks, [heads or 1,
  # blocks of queries, blocks of keys]. Blocks that the mask hides from all
  # queries are not in the grid.
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
  return Work(flops=flops, nbytes=_nbytes_of_equation(eqn))


def _work_of_branch(eqn: jex.JaxprEqn, options: CountOptions) -> Work:
  """Returns the work of a conditional.

  A conditional on the platform counts as its branch for this platform. One on
  data counts as its branch with the most FLOPs.

  Args:
    eqn: the equation of the conditional.
    options: how the work is counted, and the platform.
  """
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if not platforms:
    works = [count_work(branch, options) for branch in branches]
    return max(works, key=lambda work: work.flops)
  for branch, names in zip(branches, platforms):
    if names is None or options.platform in names:
      return count_work(branch, options)
  raise AssertionError(f'no branch for {options.platform}')


_WORK_OF_PRIMITIVE = {
    'dot_general': _work_of_matrix_product,
    'conv_general_dilated': _work_of_convolution,
    'ragged_dot_general': _work_of_ragged_dot,
    'pallas_call': _work_of_kernel,
    'scan': _work_of_scan,
    'while': _work_of_while,
    'cond': _work_of_branch,
    'shard_map': _work_of_shard_map,
}


def _nbytes_of_equation(eqn: jex.JaxprEqn) -> float:
  """Returns the bytes of an equation's operands and results, once each."""
  total = 0
  for v in (*eqn.invars, *eqn.outvars):
    if hasattr(v.aval, 'dtype'):
      total += _nbytes_of_array(v.aval)
  return float(total)


def _nbytes_of_array(aval: Any) -> int:
  """Returns the bytes of an array, given its shape and type."""
  return aval.size * jnp.dtype(aval.dtype).itemsize


# TPU, per TensorCore, bfloat16. docs.cloud.google.com/tpu/docs/system-
# architecture-tpu-vm and its page for each version give a chip: v2 45, v3 123,
# v4 275, v5e 197, v5p 459, v6e 918, 7x 2307 TFLOP/s. A jax device is a chip or
# a core (v2, v3, 7x: always a core), so we count the device's cores.
_PEAK_OF_TPU_CORE = {
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
_PEAK_OF_GPU = {
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


def peak_flops_per_second(device_kind: str, dtype: str, cores: int = 1
                          ) -> float | None:
  """Returns the FLOP/s that a device reaches at most, as its maker publishes
  them, or None where they are not known.

  Args:
    device_kind: the name of the device's model (jax.Device.device_kind).
    dtype: the type of the products: bfloat16 or float32.
    cores: the number of TensorCores in one jax device; TPUs only.
  """
  if dtype not in ('bfloat16', 'float32'):
    return None
  # At a higher precision a float32 product is made in several passes, for which
  # no maker publishes a figure.
  precision = jax.config.jax_default_matmul_precision
  if dtype == 'float32' and precision not in (None, 'default'):
    return None

  # The tables are in TFLOP/s.
  if device_kind in _PEAK_OF_TPU_CORE:
    return _PEAK_OF_TPU_CORE[device_kind] * cores * 1e12
  if device_kind not in _PEAK_OF_GPU:
    return None
  bfloat16, float32 = _PEAK_OF_GPU[device_kind]
  if dtype == 'float32':
    return float32 * 1e12
  return bfloat16 * 1e12


def total_peak_flops(devices: Sequence[jax.Device], dtype: str) -> float | None:
  """Returns the FLOP/s that all devices together reach at most, or None where
  they are not known of each device.

  Args:
    devices: the devices.
    dtype: the type of the products: bfloat16 or float32.
  """
  total = 0
  for device in devices:
    cores = device.num_cores if device.platform == 'tpu' else 1
    peak = peak_flops_per_second(device.device_kind, dtype=dtype, cores=cores)
    if peak is None:
      return None
    total += peak
  return total
