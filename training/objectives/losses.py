"""Cross-entropy of a model's hidden states, a chunk of the length at a time.

For a token with logits l, target y, and q = (1 - s) onehot(y) + s / V, where
s is the label smoothing (Szegedy et al. 2016, section 7):

  loss = log_z - q . l + c log_z^2,    log_z = logsumexp(l)

with c the coefficient of the z-loss (PaLM: Chowdhery et al. 2022, section 5).
Its gradient, (1 + 2 c log_z) softmax(l) - q, needs nothing but l. So it is
taken in the forward pass, while a chunk's logits are there, and turned at once
into gradients of the hidden states and of the head: no [B, L, V] array ever
lives, and no logit is computed twice.

Each shard of the tokens (axis Q) adds up its own gradient of the head, which
the devices exchange once, after the last chunk of P positions.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from architectures.parts import layers, sharding
from architectures.parts.heads import Head

# Where `chunk` is 0: float32 logits of 64 MiB a device, but tokens enough to
# be worth a reading of the head's weights.
MOST_LOGITS_OF_CHUNK = 2 ** 24
LEAST_TOKENS_OF_CHUNK = 512


class TokenLosses(NamedTuple):
  """The losses of each token, [B, L], in float32.

  Attributes:
    loss: the loss in nats, with label smoothing and z-loss.
    log_z: the logarithm of the softmax's denominator.
    correct: whether the target alone has the highest logit.
  """
  loss: jax.Array
  log_z: jax.Array
  correct: jax.Array


class _LossSettings(NamedTuple):
  """The terms of the loss, and how the tokens are cut up.

  Attributes:
    z_loss: the z-loss's coefficient.
    label_smoothing: the probability that is spread over the vocabulary.
    rows: the number of shards of the batch.
    lengths: the number of shards of the length; Q = rows * lengths.
    positions: P, the positions of a chunk.
  """
  z_loss: float
  label_smoothing: float
  rows: int
  lengths: int
  positions: int


def cross_entropy(hidden_BLD: jax.Array, head: Head, targets_BL: jax.Array,
                  weights_BL: jax.Array, *, z_loss: float = 0.0,
                  label_smoothing: float = 0.0, chunk: int = 0
                  ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the weighted sum of the tokens' losses, and other weighted sums.

  Args:
    hidden_BLD: what the head is applied to; products are taken in its dtype
      and add up in float32.
    head: the output projection.
    targets_BL: token ids.
    weights_BL: how much each token counts; 0: not at all.
    z_loss: the z-loss's coefficient.
    label_smoothing: the probability that is spread over the vocabulary.
    chunk: tokens of one device whose logits are held at once; 0: by size.

  Returns:
    The sum to differentiate, and sums that nothing is differentiated through:
    `weight`, `accuracy` and, where there is one, `z_loss`.
  """
  settings = _choose_settings(hidden_BLD, head=head, z_loss=z_loss,
                              label_smoothing=label_smoothing, chunk=chunk)
  weights_BL = weights_BL.astype(jnp.float32)
  chex.assert_equal_shape([targets_BL, weights_BL])
  loss, tokens = _sum_losses(settings, hidden_BLD, head, targets_BL, weights_BL)

  # Figures are of the same tokens, and nothing learns from them.
  tokens = jax.lax.stop_gradient(tokens)
  sums = {'weight': weights_BL.sum(),
          'accuracy': (weights_BL * tokens.correct).sum()}
  if z_loss:
    sums['z_loss'] = (weights_BL * z_loss * tokens.log_z ** 2).sum()
  return loss, jax.lax.stop_gradient(sums)


def token_losses(hidden_BLD: jax.Array, head: Head, targets_BL: jax.Array, *,
                 chunk: int = 0) -> TokenLosses:
  """Returns each token's negative log-likelihood; for evaluation."""
  settings = _choose_settings(hidden_BLD, head=head, z_loss=0.0,
                              label_smoothing=0.0, chunk=chunk)
  return _scan_token_losses(settings, hidden_BLD=hidden_BLD, head=head,
                            targets_BL=targets_BL)


def _scan_token_losses(settings: _LossSettings, hidden_BLD: jax.Array,
                       head: Head, targets_BL: jax.Array) -> TokenLosses:
  """Returns the losses of all tokens, a chunk at a time.

  Args:
    settings: how the tokens are cut up.
    hidden_BLD: what the head is applied to.
    head: the output projection.
    targets_BL: token ids.
  """
  kernel_DV = _gather_kernel(head, hidden_BLD)

  def of_chunk(_: None, chunk: tuple[jax.Array, ...]):
    """Returns the losses of a chunk."""
    x_QBPD, targets_QBP = chunk
    logits_QBPV = head.finish_logits(_project_to_vocabulary(x_QBPD, kernel_DV))
    return None, _losses_of_logits(settings, logits_QBPV, targets_QBP)

  # The logits of one chunk exist at a time.
  _, losses = jax.lax.scan(
      of_chunk, None, _split_into_chunks(settings, (hidden_BLD, targets_BL)))
  return _join_chunks(settings, losses, targets_BL.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_losses(settings: _LossSettings, hidden_BLD: jax.Array, head: Head,
                targets_BL: jax.Array, weights_BL: jax.Array):
  """Returns (sum of weights * losses, TokenLosses, through which no gradient
  goes)."""
  tokens = _scan_token_losses(settings, hidden_BLD=hidden_BLD, head=head,
                              targets_BL=targets_BL)
  return (weights_BL * tokens.loss).sum(), tokens


def _sum_losses_forward(settings: _LossSettings, *args):
  """Returns the sum and, in the same pass, such of its gradients as are asked
  for."""
  # The arguments, and which of their gradients are asked for.
  hidden_BLD, head, targets_BL, weights_BL = jax.tree.map(
      lambda x: x.value, args)
  ask_hidden, ask_head, _, ask_weights = jax.tree.map(
      lambda x: x.perturbed, args)
  ask_bias = head.bias_V is not None and ask_head.bias_V

  kernel_DV = _gather_kernel(head, hidden_BLD)
  kernel_VD = kernel_DV.T
  if sharding.traced_platform() == 'cpu':
    # Both products read the kernel along its rows: one copy for all chunks.
    kernel_VD = jax.lax.optimization_barrier(kernel_VD)

  def of_chunk(d_head: Any, chunk: tuple[jax.Array, ...]):
    """Returns the gradients of the head with a chunk's added, the losses of the
    chunk, and the gradient of its hidden states."""
    # The losses, and the gradient of the head's products.
    x_QBPD, targets_QBP, weights_QBP = chunk
    logits_QBPV, pull = jax.vjp(head.finish_logits,
                                _project_to_vocabulary(x_QBPD, kernel_DV))
    losses = _losses_of_logits(settings, logits_QBPV, targets_QBP)
    d_logits_QBPV = _gradient_of_logits(settings, logits_QBPV=logits_QBPV,
                                        targets_QBP=targets_QBP,
                                        weights_QBP=weights_QBP,
                                        log_z_QBP=losses.log_z)
    [d_QBPV] = pull(d_logits_QBPV)

    # The gradients of the head and of the hidden states.
    d_kernel, d_bias = d_head
    if ask_bias:
      d_bias += d_QBPV.sum((1, 2))
    d_QBPV = d_QBPV.astype(x_QBPD.dtype)
    if ask_head.kernel_DV:
      d_kernel += _gradient_of_kernel(x_QBPD, d_QBPV)
    dx_QBPD = None
    if ask_hidden:
      dx_QBPD = layers.einsum('QBPV,VD->QBPD', d_QBPV, kernel_VD, x_QBPD.dtype)
    return (d_kernel, d_bias), (losses, dx_QBPD)

  # All chunks.
  zeros = (_zero_gradients(settings, ask_head.kernel_DV,
                           _transpose_for_gradient(head.kernel_DV)),
           _zero_gradients(settings, ask_bias, head.bias_V))
  chunks = _split_into_chunks(settings, (hidden_BLD, targets_BL, weights_BL))
  (d_kernel, d_bias), (losses, dx_QBPD) = jax.lax.scan(of_chunk, zeros, chunks)

  # Their losses and gradients, laid out as the arguments are.
  tokens, d_hidden = _join_chunks(settings, (losses, dx_QBPD), targets_BL.shape)
  d_head = head.replace(
      kernel_DV=_total_gradient(d_kernel, head.kernel_DV, 'embed', 'vocab'),
      bias_V=_total_gradient(d_bias, head.bias_V, 'vocab'))
  if sharding.count_devices() > 1:
    # The head's gradient is scattered before the layers' are computed: whole,
    # and in float32, it would lie there until the end.
    d_hidden, d_head = jax.lax.optimization_barrier((d_hidden, d_head))
  d_weights = tokens.loss if ask_weights else None
  gradients = d_hidden, d_head, None, d_weights
  return ((weights_BL * tokens.loss).sum(), tokens), gradients


def _sum_losses_backward(settings: _LossSettings, gradients: Any,
                         cotangents: Any):
  """Returns the gradients of the forward pass times the sum's cotangent."""
  scale, _ = cotangents
  if isinstance(scale, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)


_sum_losses.defvjp(_sum_losses_forward, _sum_losses_backward,
                   symbolic_zeros=True)


def _project_to_vocabulary(x_QBPD: jax.Array, kernel_DV: jax.Array):
  """Returns the products of hidden states and the kernel, in float32."""
  return layers.einsum('QBPD,DV->QBPV', x_QBPD, kernel_DV,
                       dtype=x_QBPD.dtype, out_dtype=jnp.float32)


def _gradient_of_kernel(x_QBPD: jax.Array, d_QBPV: jax.Array) -> jax.Array:
  """Returns each shard's gradient of the kernel, `_turned`, in float32.

  XLA's CPU backend transposes the first operand of such a product, so there
  that is the hidden states. The barrier keeps it from turning the product of a
  tied kernel around, into one of bfloat16 that it does not have.
  """
  if sharding.is_single_cpu():
    d_QDV = layers.einsum('QBPD,QBPV->QDV', x_QBPD, d_QBPV,
                          dtype=x_QBPD.dtype, out_dtype=jnp.float32)
    return jax.lax.optimization_barrier(d_QDV)
  return layers.einsum('QBPV,QBPD->QVD', d_QBPV, x_QBPD,
                       dtype=x_QBPD.dtype, out_dtype=jnp.float32)


def _transpose_for_gradient(kernel_DV: jax.Array) -> jax.Array:
  """Returns the kernel as its gradient is added up: [V, D], but on one CPU
  [D, V]."""
  return kernel_DV if sharding.is_single_cpu() else kernel_DV.T


def _losses_of_logits(settings: _LossSettings, logits_QBPV: jax.Array,
                      targets_QBP: jax.Array) -> TokenLosses:
  """Returns the loss of each token, log_z - q . l + c log_z^2."""
  # The logarithm of the softmax's denominator.
  max_QBP1 = logits_QBPV.max(-1, keepdims=True)
  sum_QBP = jnp.exp(logits_QBPV - max_QBP1).sum(-1)
  log_z_QBP = max_QBP1[..., 0] + jnp.log(sum_QBP)

  # The target's logit. On a mesh it is a masked sum: a gather would collect a
  # sharded vocabulary on every device.
  if sharding.is_single_cpu():
    target_QBP = jnp.take_along_axis(
        logits_QBPV, targets_QBP[..., None], -1, mode='clip')[..., 0]
  else:
    masked_QBPV = jnp.where(_one_hot_targets(logits_QBPV, targets_QBP),
                            logits_QBPV, 0)
    target_QBP = masked_QBPV.sum(-1)
  rivals_QBP = (logits_QBPV >= target_QBP[..., None]).sum(-1)

  # The terms of the loss.
  smooth = settings.label_smoothing
  loss_QBP = log_z_QBP - (1 - smooth) * target_QBP
  if smooth:
    loss_QBP -= smooth * logits_QBPV.mean(-1)
  if settings.z_loss:
    loss_QBP += settings.z_loss * log_z_QBP ** 2
  return TokenLosses(loss=loss_QBP, log_z=log_z_QBP, correct=rivals_QBP == 1)


def _gradient_of_logits(settings: _LossSettings, logits_QBPV: jax.Array,
                        targets_QBP: jax.Array, weights_QBP: jax.Array,
                        log_z_QBP: jax.Array):
  """Returns the gradient of the weighted losses in the logits l,
  (1 + 2 c log_z) softmax(l) - q, with the z-loss's coefficient c and the
  smoothed targets q.

  Args:
    settings: the coefficients, and how the tokens are cut up.
    logits_QBPV: the logits of a chunk.
    targets_QBP: its token ids.
    weights_QBP: how much each token counts.
    log_z_QBP: the logarithm of the sum of the exponentials of the logits.
  """
  smooth = settings.label_smoothing
  z_loss = settings.z_loss
  p_QBPV = jnp.exp(logits_QBPV - log_z_QBP[..., None])
  q_QBPV = jnp.where(_one_hot_targets(logits_QBPV, targets_QBP), 1 - smooth,
                     0.0)
  if smooth:
    q_QBPV += smooth / logits_QBPV.shape[-1]
  if z_loss:
    p_QBPV *= (1 + 2 * z_loss * log_z_QBP)[..., None]
  return (p_QBPV - q_QBPV) * weights_QBP[..., None]


def _one_hot_targets(logits_QBPV: jax.Array, targets_QBP: jax.Array):
  """Returns onehot(y) as truth values."""
  ids_QBPV = jax.lax.broadcasted_iota(jnp.int32, logits_QBPV.shape, 3)
  return ids_QBPV == targets_QBP[..., None]


def _choose_settings(hidden_BLD: jax.Array, head: Head, z_loss: float,
                     label_smoothing: float, chunk: int) -> _LossSettings:
  """Returns how the tokens are cut up: shards of the batch, and of the length
  chunks as even as can be.

  Args:
    hidden_BLD, head, z_loss, label_smoothing, chunk: those of `cross_entropy`.
  """
  # The shards.
  batch, length, _ = hidden_BLD.shape
  rows = sharding.count_shards('batch', batch)
  lengths = sharding.count_shards('length', length)

  # The chunks of a shard's length.
  vocab = head.kernel_DV.shape[1]
  tokens = chunk or max(LEAST_TOKENS_OF_CHUNK, MOST_LOGITS_OF_CHUNK // vocab)
  most = max(1, tokens * rows // batch)
  length //= lengths
  chunks = -(-length // most)
  return _LossSettings(
      z_loss=z_loss, label_smoothing=label_smoothing, rows=rows,
      lengths=lengths, positions=-(-length // chunks))


def _split_into_chunks(settings: _LossSettings, arrays: tuple[jax.Array, ...]):
  """Returns arrays [B, L, ...] as [chunks, Q, B / rows, P, ...], the length of
  a shard padded with zeros; the weight of a padded token is one of them."""
  rows = settings.rows
  lengths = settings.lengths
  P = settings.positions

  def cut(x: jax.Array):
    """Returns one of the arrays as its chunks."""
    batch = x.shape[0] // rows
    length = x.shape[1] // lengths
    # One device has one of `rows` parts of the rows, and of `lengths` parts of
    # the length: [rows, B / rows, lengths, L / lengths, ...].
    chunks = -(-length // P)
    x = x.reshape(rows, batch, lengths, length, *x.shape[2:])
    # The part of the length becomes whole chunks of P positions.
    pad = chunks * P - length
    if pad:
      widths = [(0, 0)] * x.ndim
      widths[3] = (0, pad)
      x = jnp.pad(x, widths)
    x = x.reshape(rows, batch, lengths, chunks, P, *x.shape[4:])
    # Chunks come first, to be scanned. Then Q is the device's part.
    x = jnp.moveaxis(x, (3, 2), (0, 2))
    x = x.reshape(chunks, rows * lengths, batch, *x.shape[4:])
    unsharded = (None,) * (x.ndim - 2)
    return sharding.constrain_where_divisible(x, None, 'tokens', *unsharded)

  return jax.tree.map(cut, arrays)


def _join_chunks(settings: _LossSettings, arrays: tuple[jax.Array, ...],
                 shape: tuple[int, ...]):
  """Returns arrays [chunks, Q, B / rows, P, ...] as [B, L, ...]: undoes `_cut`.
  """
  rows = settings.rows
  lengths = settings.lengths

  def join(x: jax.Array):
    """Returns the chunks of one array as the array."""
    chunks, _, batch, P = x.shape[:4]
    x = x.reshape(chunks, rows, lengths, batch, P, *x.shape[4:])
    # The steps of `_cut` in reverse, without the padding.
    x = jnp.moveaxis(x, (0, 2), (3, 2))
    x = x.reshape(rows, batch, lengths, chunks * P, *x.shape[5:])
    x = x[:, :, :, :shape[1] // lengths]
    return x.reshape(*shape, *x.shape[4:])

  return jax.tree.map(join, arrays)


def _gather_kernel(head: Head, hidden_BLD: jax.Array):
  """Returns the head's kernel as every chunk reads it: cast, and gathered,
  once."""
  return sharding.gather_weight(head.kernel_DV.astype(hidden_BLD.dtype),
                                ('embed', 'vocab'))


def _zero_gradients(settings: _LossSettings, asked: Any, x: jax.Array):
  """Returns zeros that a gradient of x adds up in, with a copy for each shard
  of the tokens; None: the gradient is not asked for."""
  if not asked:
    return None
  shards = settings.rows * settings.lengths
  zeros = jnp.zeros((shards, *x.shape), jnp.float32)
  others = (None,) * (x.ndim - 1)
  return sharding.constrain_where_divisible(zeros, 'tokens', 'vocab', *others)


def _total_gradient(d: jax.Array | None, x: jax.Array, *axes: str):
  """Returns the shards' gradients of x, added up and laid out as x is."""
  if d is None:
    return None
  if sharding.is_single_cpu():
    return d[0].astype(x.dtype)
  return sharding.sum_gradients_of_shards(d, axes[::-1]).T.astype(x.dtype)
