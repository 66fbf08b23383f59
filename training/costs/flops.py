"""FLOPs: those of a program, what a model must multiply, and what devices can.

Of a program, they are counted in its jaxpr, loops multiplied, recomputation
included, whatever XLA makes of it. Only matrix products and convolutions count,
and functions that say what they count as (layers.counted). Splash attention is
known by its name; another kernel counts with the estimate that it carries. A
product of [a, b] and [b, c] is 2abc.

Of a model, they are counted in the program of a forward pass, so that a part is
counted without being described a second time. The program that is traced pads
no expert and skips no masked block, and attention declares which share of its
products the mask shows (`layers.useful`; with a prefix, in the mean over those
of training, or of a whole prompt). So the work that an implementation wastes on
masked keys, padding, idle expert slots or recomputation lowers utilisation
(MFU, Chowdhery et al. 2022, appendix B; theirs counts all keys). A token counts
with the experts that its router chooses, whether or not they have room. A
recurrence that multiplies no matrices counts what it computes element by
element: one FLOP for each number of a sum, a product or a function, in a scan
without a matrix product and in what `jax.lax.associative_scan` writes out. A
backward pass costs twice the forward, the gradient of both factors, less what
is only there for parameters that are not trained.
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
ATTENTION, WEIGHTS = 'attention', 'weights'


def forward_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                  prompt: bool = False) -> dict[str, float]:
  """Returns the FLOPs of a forward pass over one sequence: of `attention`'s
  scores and weighted values, and of products with `weights`; without the
  modules of model.mtp_depth, which training alone needs.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: tokens; of the encoder, for an encoder-decoder.
    decoder_length: tokens of the decoder, for an encoder-decoder.
    prompt: whether all tokens see each other: those of a prompt of a prefix LM.
  """
  c = dataclasses.replace(architectures.resolve(model), mtp_depth=0)
  return dict(_forward(_countable(c, max(length, decoder_length)), length,
                       decoder_length, prefix=prompt, prompt=prompt))


def training_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                   unread: int = 0, freeze: str = '', prefix: bool = False
                   ) -> dict[str, float]:
  """Returns those of a sequence, forward and backward, by part: three times the
  forward pass where all parameters are trained. Adapters, `freeze` and passes
  of a loop that have no gradient take from the backward pass what its program
  is then without. A stack of which some
  layers are frozen counts as trained, as its program computes the gradient.

  Args:
    model, length, decoder_length: as of `forward_flops`.
    unread: the places that the head does not read (Objective.unread).
    freeze: config.optim.freeze.
    prefix: whether the first tokens of a row see each other (Objective.prefix).
  """
  c = architectures.resolve(model)
  c, back = _countable(c, max(length, decoder_length)), {}
  loops = c.find(LoopsConfig)
  stops = loops is not None and loops.gradient_passes > 0
  if freeze or c.lora.rank or stops:
    back = dict(_backward(c, length, decoder_length, unread, freeze, prefix))
  forward = _forward(c, length, decoder_length, unread, prefix)
  if not back:
    return {part: 3.0 * n for part, n in forward}
  # A quotient and its product are off by a last digit.
  return {part: round((1 + back[part]) * n, 3) for part, n in forward}


def of_a_row(config: ml_collections.ConfigDict, model: ModelConfig,
             sides: Sequence[int] = ()) -> dict[str, float]:
  """Returns the `training_flops` of a row of a run.

  Args:
    config: the run's.
    model: its model, resolved.
    sides: the tokens of a row; of an encoder-decoder, of both sides; none:
      those of the run.
  """
  objective = objectives.of(config)
  sides = sides or objective.row_lengths(config)
  return training_flops(
      model, *sides, unread=objective.unread(config, sides[0]),
      freeze=config.optim.freeze, prefix=objective.prefix)


def decode_flops(model: ModelConfig, keys: int, memory: int = 0
                 ) -> dict[str, float]:
  """Returns the FLOPs of one token that sees `keys` keys, itself included.

  Args:
    model: config.model, of a system with a decoder.
    keys: its position plus one.
    memory: tokens of the encoder, whose keys and values are kept.
  """
  c = architectures.resolve(model)
  return dict(_decode(_countable(c, max(keys, memory)), keys, memory))


def _countable(c: ModelConfig, reach: int) -> ModelConfig:
  """The same function for `reach` tokens, whose program multiplies no more than
  the model must: experts have as many slots as tokens come in even load, and no
  layer is made again."""
  factor, moe = 1.0, c.find(MoEConfig)
  if moe is not None and routing.of(moe).experts_choose:
    factor = routing.active_experts(moe) / moe.top_k
  plain = dataclasses.replace(
      c, attention_kernel='xla', remat='none', scan_layers=True,
      max_len=max(c.max_len, reach))
  return plain.with_part(
      MoEConfig, dispatch='sorted', grouped_kernel='auto', group_size=0,
      capacity_factor=factor, eval_capacity_factor=factor)


def _rows(c: ModelConfig) -> int:
  """Of the batch that is traced: tokens divide evenly over experts."""
  return c.part(MoEConfig).all_experts if c.has_experts else 1


def _tokens(c: ModelConfig, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((_rows(c), length), jnp.int32)


def _whole(c: ModelConfig, length: int, decoder_length: int, prefix: bool
           ) -> tuple:
  """Returns what applies a module to whole sequences, and the tokens."""
  # With positions of their own, tokens may stand in any order: no block of
  # keys is skipped, and all of them are there to take a share of.
  place = lambda n: jnp.arange(n)[None]
  if decoder_length:
    return (lambda module, params, source, target: module.apply(
        params, source, decoder_tokens_BL=target,
        decoder_positions_BL=place(decoder_length)),
            _tokens(c, length), _tokens(c, decoder_length))
  first = dict(prefix_B=jnp.ones(_rows(c), jnp.int32)) if prefix else {}
  return (lambda module, params, tokens: module.apply(
      params, tokens, positions_BL=place(length), **first), _tokens(c, length))


@functools.lru_cache(maxsize=4096)
def _forward(c: ModelConfig, length: int, decoder_length: int,
             unread: int = 0, prefix: bool = False, prompt: bool = False
             ) -> tuple:
  return _row_flops(c, *_whole(c, length, decoder_length, prefix),
                    unread=unread, prompt=prompt)


@functools.lru_cache(maxsize=4096)
def _backward(c: ModelConfig, length: int, decoder_length: int, unread: int,
              freeze: str, prefix: bool) -> tuple:
  """Returns by part how many forward passes the backward pass costs: 2, and
  less by what the program of the gradients of what is trained is without,
  beside that of all gradients."""
  module = architectures.build(c)
  every = jax.tree.map(lambda _: 1.0, parameter_shapes(module))
  some = parameter_shares(module, ml_collections.ConfigDict(
      dict(freeze=freeze, layer_decay=1.0, table_rate=1.0))) or every
  full = c.with_part(LoopsConfig, gradient_passes=0)
  forward, most, least = (
      _row_flops(model, *_whole(c, length, decoder_length, prefix),
                 unread=unread, trained=trained)
      for model, trained in ((c, None), (full, every), (c, some)))

  def passes(n: float, whole: float, part: float) -> float:
    if whole <= n:  # a part without products, or none that a trace shows
      return 2.0
    if whole <= 3 * n:
      return 2 * (part - n) / (whole - n)
    extra = whole - 3 * n  # which a recurrence makes again, in both or in one
    return (part - n - (extra if part - n >= extra else 0.0)) / n

  return tuple((name, passes(n, whole, part)) for (name, n), (_, whole), (
      _, part) in zip(forward, most, least))


@functools.lru_cache(maxsize=4096)
def _decode(c: ModelConfig, keys: int, memory: int) -> tuple:
  cache = jax.eval_shape(lambda: architectures.init_cache(c, _rows(c), keys))
  if memory:  # of which every layer has keys and values of its own
    slots = jax.eval_shape(lambda: architectures.init_cache(
        without_sharing(c), _rows(c), keys))
    longer = lambda x: jax.ShapeDtypeStruct(
        (*x.shape[:-3], memory, *x.shape[-2:]), x.dtype)
    cache = tuple(
        entry.replace(mixer=entry.mixer.replace(
            memory_key_BMJK=longer(slot.mixer.key_BMJK),
            memory_value_BMJK=longer(slot.mixer.value_BMJK)))
        for entry, slot in zip(cache, slots))
  method = 'decode' if memory else '__call__'
  return _row_flops(c, lambda module, params, token, cache: module.apply(
      params, token, positions_BL=jnp.full((1, 1), keys - 1), cache=cache,
      method=method), _tokens(c, 1), cache)


def without_sharing(c: ModelConfig) -> ModelConfig:
  """Returns the model whose layers all have keys and values of their own."""
  tree = flat.as_dict(c)
  for fields in (tree, *tree['kinds'].values()):
    fields['kv_sharing'] = False
  return flat.make(tree)


def _row_flops(c: ModelConfig, program: Any, *args, unread: int = 0,
               trained: Any = None, prompt: bool = False) -> tuple:
  """Counts what a row's logits, and what else a model returns, are made of,
  and the gradients of what `trained` has no 0 for, if it is there."""
  module = architectures.build(c)

  def outputs(params: Any, *args):
    out = program(module, {'params': params}, *args)
    mtp = [out.head.logits(x) for x in out.extra.get('mtp', ())]
    return (out.head and out.head.logits(out.hidden[:, unread:]), out.extra,
            mtp)

  def gradients(params: Any, *args):
    return jax.value_and_grad(lambda part: sum(
        x.astype(jnp.float32).sum() for x in jax.tree.leaves(
            outputs(shares.whole(trained, part, params), *args))
        if jnp.issubdtype(x.dtype, jnp.floating)))(
            shares.trained(trained, params))

  traced = jax.make_jaxpr(outputs if trained is None else gradients)
  work = count(traced(parameter_shapes(module), *args),
               Place('gpu', useful=True, prompt=prompt))
  if work.loops or work.kernels:
    raise ValueError(
        f'the FLOPs of model.arch {c.arch!r} cannot be counted: it has '
        f'{work.loops} loops whose length depends on data, and {work.kernels} '
        'kernels without an estimate')
  return ((ATTENTION, work.masked / _rows(c)),
          (WEIGHTS, (work.flops - work.masked) / _rows(c)))


class Place(NamedTuple):
  """Where a program runs, as far as its work depends on that.

  Attributes:
    platform: whose branch runs, where the code has one for each.
    rows: of a grouped product on a device in even load, whose array has room
      for the worst; 0: count all of the array.
    passes: of a loop that depends on data, where they are known otherwise.
    dense: of GROUPED, those that the compiler makes of all rows and all
      groups, and masks.
    useful: whether products count as the shares that layers.useful declares,
      and functions as layers.counted says, instead of as they are computed.
    prompt: whether these are the shares of a prompt.
    loop_rows: `rows` in a pass of the loop that `passes` is of.
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
  """Of all devices together.

  Attributes:
    flops: of the products; 2abc for [a, b] by [b, c].
    nbytes: of their operands and results, once each.
    loops: loops whose number of passes depends on data, counted as one.
    dense: the FLOPs of grouped products that are made of all groups.
    masked: the FLOPs of products of which a mask hides a part: attention's.
    kernels: kernels that carry no estimate, and count as nothing.
  """
  flops: float = 0.0
  nbytes: float = 0.0
  loops: int = 0
  dense: float = 0.0
  masked: float = 0.0
  kernels: int = 0

  def __add__(self, other: Any):
    return Work(*(a + b for a, b in zip(self, other)))

  def times(self, n: float):
    return Work(self.flops * n, self.nbytes * n, self.loops, self.dense * n,
                self.masked * n, self.kernels)


def count(jaxpr: Any, place: Place) -> Work:
  """Returns the work of a jaxpr, open or closed."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  is_var = lambda v: not isinstance(v, jex.Literal)
  total, live = Work(), set(filter(is_var, jaxpr.outvars))
  for eqn in reversed(jaxpr.eqns):
    if not any(v in live for v in eqn.outvars) and not eqn.effects:
      continue  # dead: XLA drops it
    live.update(filter(is_var, eqn.invars))
    work = _equation(eqn, place)
    if place.useful and work.flops:
      for part, whole, prompt in _DECLARED.findall(
          str(eqn.source_info.name_stack)):
        part = prompt if place.prompt else part
        flops = work.flops * int(part) / int(whole)
        work = work._replace(flops=flops, masked=flops)
    total += work
  return total


_DECLARED = re.compile(layers.USEFUL.format(r'(\d+)', r'(\d+)', r'(\d+)'))
_COUNTED = re.compile(layers.COUNTED.format(r'(\d+)', r'(\d+)'))


# What is computed element by element: one FLOP for each number of its result,
# or of what it sums up.
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
  return trace is not None and any(
      frame.function_name == 'associative_scan' for frame in trace.frames)


def _elementwise(eqn: jex.JaxprEqn) -> Work:
  """Returns the work of one of ELEMENTWISE; of whole numbers, none."""
  out = eqn.outvars[0].aval
  if not jnp.issubdtype(out.dtype, jnp.inexact):
    return Work()
  sizes = [v.aval.size for v in (*eqn.invars, *eqn.outvars)]
  return Work(float(max(sizes)), _nbytes(eqn))


def _scan(eqn: jex.JaxprEqn, place: Place) -> Work:
  """Returns the work of all passes. Where a body multiplies no matrices, what
  it computes element by element is all that a model must compute there."""
  body = count(eqn.params['jaxpr'], place)
  if place.useful and not body.flops:
    body = count(eqn.params['jaxpr'], place._replace(elements=True))
  return body.times(eqn.params['length'])


def _equation(eqn: jex.JaxprEqn, place: Place) -> Work:
  name = eqn.primitive.name
  if place.useful and not place.elements and _is_of_associative_scan(eqn):
    place = place._replace(elements=True)
  inner = lambda jaxpr: count(jaxpr, place)
  counted = _COUNTED.fullmatch(str(eqn.params.get('name', '')))
  if place.useful and counted:
    part, whole = map(int, counted.groups())
    return Work(eqn.outvars[0].aval.size * part / whole, _nbytes(eqn))
  if name == 'dot_general':
    (contract, _), _ = eqn.params['dimension_numbers']
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return Work(2.0 * out.size * math.prod(lhs.shape[i] for i in contract),
                _nbytes(eqn))
  if name == 'conv_general_dilated':
    kernel, numbers = eqn.invars[1].aval, eqn.params['dimension_numbers']
    each = kernel.size / kernel.shape[numbers.rhs_spec[0]]  # of one output
    return Work(2.0 * eqn.outvars[0].aval.size * each, _nbytes(eqn))
  if name == 'ragged_dot_general':
    return _grouped(eqn, place)
  if eqn.params.get('name') in ('gmm', 'tgmm'):  # megablox
    return _megablox(eqn, place)
  if name == 'pallas_call':
    return _kernel(eqn)
  if name == 'scan':
    return _scan(eqn, place)
  if place.elements and name in ELEMENTWISE:
    return _elementwise(eqn)
  if name == 'while':
    if place.passes is not None:
      return count(eqn.params['body_jaxpr'], place._replace(
          rows=place.loop_rows)).times(place.passes)
    body = inner(eqn.params['body_jaxpr'])
    return body._replace(loops=body.loops + bool(body.flops))
  if name == 'cond':
    return _branch(eqn, place.platform, inner)
  if name == 'shard_map':
    return inner(eqn.params['jaxpr']).times(eqn.params['mesh'].size)
  total = Work()
  for jaxpr in jex.jaxprs_in_params(eqn.params):
    total += inner(jaxpr)
  return total


def _grouped(eqn: jex.JaxprEqn, place: Place) -> Work:
  lhs, rhs, counts = (v.aval for v in eqn.invars)
  dims = eqn.params['ragged_dot_dimension_numbers']
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]
  (_, contracted), _ = dims.dot_dimension_numbers
  if not dims.rhs_group_dimensions:
    kind = 'weights'
  else:
    kind = 'transposed' if contracted == (rhs.ndim - 1,) else 'forward'
  if kind in place.dense:
    flops *= counts.shape[-1]
    return Work(flops, _nbytes(eqn), dense=flops)
  return _even_load(eqn, place, flops, lhs.shape[dims.lhs_ragged_dimensions[0]])


def _megablox(eqn: jex.JaxprEqn, place: Place) -> Work:
  """gmm: [R, K] by [E, K, N] or [E, N, K]; tgmm: [K, R] by [R, N]."""
  arrays = [v.aval for v in eqn.invars
            if jnp.issubdtype(v.aval.dtype, jnp.floating)]
  if not arrays:
    return Work()  # which tiles there are, worked out ahead of the product
  lhs, rhs = arrays[:2]
  flops = 2.0 * lhs.size * eqn.outvars[0].aval.shape[-1]
  return _even_load(eqn, place, flops,
               (rhs if eqn.params['name'] == 'tgmm' else lhs).shape[0])


def _even_load(eqn: jex.JaxprEqn, place: Place, flops: float, there: int
               ) -> Work:
  """Of the rows in even load, where the array has room for `there`. They are of
  as many groups as there are, or as they are: of no others is the matrix read.
  """
  share = min(1.0, place.rows / there) if place.rows else 1.0
  def part(shape: tuple[int, ...], read: bool):
    if len(shape) == 2:  # rows
      return share
    return min(1.0, share * there / shape[0]) if len(shape) == 3 and read else 1
  return Work(flops * share, sum(
      _size(v.aval) * part(v.aval.shape, read)
      for arrays, read in ((eqn.invars, True), (eqn.outvars, False))
      for v in arrays))


# Products of scores' size in a call: q k and p v; and in the backward passes
# the scores again, dv, dp, and dk or dq.
_SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}


def _kernel(eqn: jex.JaxprEqn) -> Work:
  name = str(next(eqn.params[key] for key in ('name', 'name_and_src_info')
                  if key in eqn.params))
  products = [n for key, n in _SPLASH.items() if name.startswith(key)]
  cost = eqn.params['cost_estimate']
  if not products:
    if cost is None:
      return Work(kernels=1)
    return Work(cost.flops, cost.bytes_accessed)
  # [heads or 1, blocks of queries, blocks of keys]: what the mask hides of
  # all queries is not in the grid, and a causal kernel, which is given the
  # places of the queries, skips half of it.
  blocks = next(v.aval.shape for v in eqn.invars if v.aval.ndim >= 3)[-2:]
  side = max(blocks)
  share = math.prod(blocks) / side ** 2
  places = [v for v in eqn.invars if v.aval.ndim == 2
            and v.aval.dtype == jnp.int32]
  if share == 1 and places:
    share = (side + 1) / (2 * side)
  q, k = [v.aval.shape for v in eqn.invars if v.aval.ndim >= 3
          and jnp.issubdtype(v.aval.dtype, jnp.floating)][:2]
  return Work(products[0] * 2.0 * math.prod(q) * k[-2] * share, _nbytes(eqn))


def _branch(eqn: jex.JaxprEqn, platform: str, inner: Any) -> Work:
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if platforms:
    chosen = next(i for i, names in enumerate(platforms)
                  if names is None or platform in names)
    return inner(branches[chosen])
  return max((inner(b) for b in branches), key=lambda work: work.flops)


def _nbytes(eqn: jex.JaxprEqn) -> float:
  return float(sum(_size(v.aval) for v in (*eqn.invars, *eqn.outvars)
                   if hasattr(v.aval, 'dtype')))


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


def peak(kind: str, dtype: str, cores: int = 1) -> float | None:
  """Returns a device's peak FLOP/s, or None where it is not known.

  Args:
    kind: jax.Device.device_kind.
    dtype: of the products: bfloat16 or float32.
    cores: TensorCores in one jax device; TPUs only.
  """
  if dtype == 'float32' and jax.config.jax_default_matmul_precision not in (
      None, 'default') or dtype not in ('bfloat16', 'float32'):
    return None  # several passes: no published figure
  if kind in _TPU_CORE:
    return _TPU_CORE[kind] * cores * 1e12
  return _GPU[kind][dtype == 'float32'] * 1e12 if kind in _GPU else None


def total_peak(devices: Sequence[jax.Device], dtype: str) -> float | None:
  """Returns the peak of all `devices` together, or None."""
  each = [peak(d.device_kind, dtype,
                d.num_cores if d.platform == 'tpu' else 1) for d in devices]
  return None if None in each else sum(each)
