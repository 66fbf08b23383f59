"""Model FLOPs: what a forward pass must multiply, and no more.

They are counted in the traced program (traced.py), so that a part is
counted without being described a second time. A product of [a, b] and [b, c] is
2abc. The program that is traced pads no expert and skips no masked block, and
attention declares which share of its products the mask shows
(`linear.useful`; with a prefix, in the mean over those of training, or of a
whole prompt), and what
is no product of matrices says what it counts as (`linear.counted`). So the work
that an implementation wastes on masked keys, padding, idle expert slots or
recomputation lowers utilisation (MFU, Chowdhery et al. 2022, appendix B; theirs
counts all keys). A token counts with the experts that its router chooses,
whether or not they have room. A backward pass costs twice the forward, the
gradient of both factors, less what is only there for parameters that are not
trained.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

import architectures
from architectures.parts.config import Kinds, ModelConfig
from architectures.parts.moe import routing
from configs.errors import require
from training.step import parameter_shapes, parameter_shares
from training.costs import traced
from training.optim import shares

# Parts of a count: the products of which a mask hides a part, and the others.
ATTENTION, WEIGHTS = 'attention', 'weights'


def forward_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                  training: bool = False, prompt: bool = False
                  ) -> dict[str, float]:
  """Returns the FLOPs of a forward pass over one sequence: of `attention`'s
  scores and weighted values, and of products with `weights`.

  Args:
    model: config.model, or the frozen ModelConfig.
    length: tokens; of the encoder, for an encoder-decoder.
    decoder_length: tokens of the decoder, for an encoder-decoder.
    training: with the modules of model.mtp_depth, which training alone needs.
    prompt: whether all tokens see each other: those of a prompt of a prefix LM.

  Raises:
    RequestError: for a decoder_length that the model does not have.
  """
  c = architectures.resolve(model)
  both = architectures.stack(c) == 'encoder-decoder'
  require(both == bool(decoder_length),
          f'decoder_length is {decoder_length} for model.arch {c.arch!r}: an '
          'encoder-decoder needs it, and nothing else has it')
  if not training:
    c = dataclasses.replace(c, mtp_depth=0)
  return dict(_forward(_countable(c, max(length, decoder_length)), length,
                       decoder_length, prefix=prompt, prompt=prompt))


def forward_flops_per_token(model: ModelConfig, length: int,
                            decoder_length: int = 0, training: bool = False,
                            prompt: bool = False) -> float:
  """Returns the mean over a sequence's tokens, both sides counted."""
  total = sum(forward_flops(model, length, decoder_length, training,
                            prompt).values())
  return total / (length + decoder_length)


def training_flops(model: ModelConfig, length: int, decoder_length: int = 0,
                   unread: int = 0, freeze: str = '', prefix: bool = False
                   ) -> dict[str, float]:
  """Returns those of a sequence, forward and backward, by part: three times the
  forward pass where all parameters are trained. Adapters and `freeze` take from
  the backward pass what its program is then without. A stack of which some
  layers are frozen counts as trained, as its program computes the gradient.

  Args:
    model, length, decoder_length: as of `forward_flops`.
    unread: the places that the head does not read (Objective.unread).
    freeze: config.optim.freeze.
    prefix: whether the first tokens of a row see each other (Objective.prefix).
  """
  c = architectures.resolve(model)
  forward_flops(c, length, decoder_length, True)  # refuses what it refuses
  c, back = _countable(c, max(length, decoder_length)), {}
  if freeze or c.lora.rank:
    back = dict(_backward(c, length, decoder_length, unread, freeze, prefix))
  forward = _forward(c, length, decoder_length, unread, prefix)
  if not back:
    return {part: 3.0 * n for part, n in forward}
  # A quotient and its product are off by a last digit.
  return {part: round((1 + back[part]) * n, 3) for part, n in forward}


def training_flops_per_token(model: ModelConfig, length: int,
                             decoder_length: int = 0, unread: int = 0,
                             freeze: str = '', prefix: bool = False) -> float:
  """Returns the mean of `training_flops` over a sequence's tokens."""
  return sum(training_flops(model, length, decoder_length, unread,
                            freeze, prefix).values()) / (
                                length + decoder_length)


def decode_flops(model: ModelConfig, keys: int, memory: int = 0
                 ) -> dict[str, float]:
  """Returns the FLOPs of one token that sees `keys` keys, itself included.

  Args:
    model: config.model, of a system with a decoder.
    keys: its position plus one.
    memory: tokens of the encoder, whose keys and values are kept.

  Raises:
    RequestError: for an encoder, or a memory that the model does not have.
  """
  c = architectures.resolve(model)
  stack = architectures.stack(c)
  require(stack != 'encoder', f'model.arch {c.arch!r} has no decoder')
  require((stack == 'encoder-decoder') == bool(memory), f'memory is {memory} '
          f'for model.arch {c.arch!r}: an encoder-decoder needs it, and '
          'nothing else has it')
  return dict(_decode(_countable(c, max(keys, memory)), keys, memory))


def _countable(c: ModelConfig, reach: int) -> ModelConfig:
  """The same function for `reach` tokens, whose program multiplies no more than
  the model must: experts have as many slots as tokens come in even load, and no
  layer is made again."""
  moe = c.moe
  if moe:
    factor = routing.active_experts(moe) / moe.top_k
    moe = dataclasses.replace(
        moe, dispatch='sorted', grouped_kernel='auto', group_size=0,
        capacity_factor=factor, eval_capacity_factor=factor)
  return dataclasses.replace(
      c, moe=moe, attention_kernel='xla', remat='none', scan_layers=True,
      max_len=max(c.max_len, reach))


def _rows(c: ModelConfig) -> int:
  """Of the batch that is traced: tokens divide evenly over experts."""
  return c.moe.num_experts if c.has_experts else 1


def _whole(length: int, decoder_length: int, rows: int, prefix: bool
           ) -> tuple:
  """Returns what applies a module to whole sequences, and the tokens."""
  # With positions of their own, tokens may stand in any order: no block of
  # keys is skipped, and all of them are there to take a share of.
  place = lambda n: jnp.arange(n)[None]
  if decoder_length:
    return (lambda module, params, source, target: module.apply(
        params, source, decoder_tokens_BL=target, positions_BM=place(length),
        decoder_positions_BL=place(decoder_length)),
            _tokens(rows, length), _tokens(rows, decoder_length))
  own = dict(prefix_B=jnp.ones(rows, jnp.int32)) if prefix else {}
  return (lambda module, params, tokens: module.apply(
      params, tokens, positions_BL=place(length), **own), _tokens(rows, length))


@functools.lru_cache(maxsize=4096)
def _forward(c: ModelConfig, length: int, decoder_length: int,
             unread: int = 0, prefix: bool = False, prompt: bool = False
             ) -> tuple:
  rows = _rows(c)
  return _count(c, rows, *_whole(length, decoder_length, rows, prefix),
                unread=unread, prompt=prompt)


@functools.lru_cache(maxsize=4096)
def _backward(c: ModelConfig, length: int, decoder_length: int, unread: int,
              freeze: str, prefix: bool) -> tuple:
  """Returns by part how many forward passes the backward pass costs: 2, and
  less by what the program of the gradients of what is trained is without,
  beside that of all gradients."""
  rows, module = _rows(c), architectures.build(c)
  some = parameter_shares(module, ml_collections.ConfigDict(
      dict(freeze=freeze, layer_decay=1.0)))
  program, *args = _whole(length, decoder_length, rows, prefix)
  forward, most, least = (
      _count(c, rows, program, *args, unread=unread, trained=trained)
      for trained in (None, jax.tree.map(lambda _: 1.0, some), some))

  def passes(n: float, whole: float, own: float) -> float:
    if whole <= n:  # a part without products, or none that a trace shows
      return 2.0
    if whole <= 3 * n:
      return 2 * (own - n) / (whole - n)
    extra = whole - 3 * n  # which a recurrence makes again, in both or in one
    return (own - n - (extra if own - n >= extra else 0.0)) / n

  return tuple((part, passes(n, whole, own)) for (part, n), (_, whole), (_, own)
               in zip(forward, most, least))


@functools.lru_cache(maxsize=4096)
def _decode(c: ModelConfig, keys: int, memory: int) -> tuple:
  rows = _rows(c)
  cache = jax.eval_shape(lambda: architectures.init_cache(c, rows, keys))
  if memory:  # of which every layer has keys and values of its own
    slots = jax.eval_shape(
        lambda: architectures.init_cache(without_sharing(c), rows, keys))
    cache = tuple(entry.replace(
        memory_key_BMJK=_with_length(slot.key_BMJK, memory),
        memory_value_BMJK=_with_length(slot.value_BMJK, memory))
                  for entry, slot in zip(cache, slots))
  method = 'decode' if memory else '__call__'
  return _count(c, rows, lambda module, params, token, cache: module.apply(
      params, token, positions_BL=jnp.full((1, 1), keys - 1), cache=cache,
      method=method), _tokens(rows, 1), cache)


def without_sharing(c: ModelConfig) -> ModelConfig:
  """Returns the model whose layers all have keys and values of their own."""
  return dataclasses.replace(c, kv_sharing=False, kinds=Kinds(
      {name: dict(kind, kv_sharing=False) for name, kind in c.kinds.items()}))


def _tokens(rows: int, length: int):
  return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def _with_length(slots: jax.ShapeDtypeStruct, length: int):
  shape = (*slots.shape[:-3], length, *slots.shape[-2:])
  return jax.ShapeDtypeStruct(shape, slots.dtype)


def _count(c: ModelConfig, rows: int, program: Any, *args, unread: int = 0,
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
    return jax.value_and_grad(lambda own: sum(
        x.astype(jnp.float32).sum() for x in jax.tree.leaves(
            outputs(shares.whole(trained, own, params), *args))
        if jnp.issubdtype(x.dtype, jnp.floating)))(
            shares.trained(trained, params))

  work = traced.count(
      jax.make_jaxpr(outputs if trained is None else gradients)(
          parameter_shapes(module), *args),
      traced.Place('gpu', useful=True, prompt=prompt))
  if work.loops or work.kernels:
    raise ValueError(
        f'the FLOPs of model.arch {c.arch!r} cannot be counted: it has '
        f'{work.loops} loops whose length depends on data, and {work.kernels} '
        'kernels without an estimate')
  return ((ATTENTION, work.masked / rows),
          (WEIGHTS, (work.flops - work.masked) / rows))
