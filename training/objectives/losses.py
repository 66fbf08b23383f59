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
  """The coefficients of the loss, and the shapes that the tokens are cut into.

  Attributes:
    z_loss: the coefficient of the z-loss.
    label_smoothing: the probability that is spread over the vocabulary.
    rows: the number of devices that the rows of a batch are split over.
    lengths: the number of devices that the length of a row is split over. The
      tokens have Q = rows * lengths shards.
    positions: P, the positions of a row whose logits exist at the same time.
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
  """Computes the cross-entropy loss of the tokens of a batch, summed with
  weights, without ever holding the logits of all tokens at once.

  The loss of a token is log_z - q . l + c log_z^2, with its logits l, log_z =
  logsumexp(l), the smoothed target q = (1 - s) onehot(target) + s / V, the
  label smoothing s and the coefficient c of the z-loss (PaLM: Chowdhery et al.
  2022, section 5).

  Args:
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features]; products are taken in their dtype and add up in float32.
    head: the output projection, from features to the V logits.
    targets_BL: the token ids to predict, [batch, length].
    weights_BL: how much each token counts; 0: not at all.
    z_loss: the coefficient of the z-loss.
    label_smoothing: the probability that is spread over the vocabulary.
    chunk: the tokens of one device whose logits exist at once; 0: by size.

  Returns:
    The sum to differentiate; and sums that nothing is differentiated through:
    `weight`, `accuracy` (the weight of the tokens whose target alone has the
    highest logit) and, where there is one, `z_loss`.
  """
  # _sum_losses has a gradient of its own, taken while the logits are there.
  settings = _choose_settings(hidden_BLD, head=head, z_loss=z_loss,
                              label_smoothing=label_smoothing, chunk=chunk)
  weights_BL = weights_BL.astype(jnp.float32)
  chex.assert_equal_shape([targets_BL, weights_BL])
  loss, tokens = _sum_losses(settings, hidden_BLD, head, targets_BL, weights_BL)

  # Sum the figures of the same tokens. Gradients must not flow through them:
  # that of _sum_losses counts only its first result.
  tokens = jax.lax.stop_gradient(tokens)
  sums = {'weight': weights_BL.sum(),
          'accuracy': (weights_BL * tokens.correct).sum()}
  if z_loss:
    sums['z_loss'] = (weights_BL * z_loss * tokens.log_z ** 2).sum()
  return loss, jax.lax.stop_gradient(sums)


def token_losses(hidden_BLD: jax.Array, head: Head, targets_BL: jax.Array, *,
                 chunk: int = 0) -> TokenLosses:
  """Returns each token's negative log-likelihood; for evaluation.

  Args:
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    targets_BL: the token ids to predict, [batch, length].
    chunk: the tokens of one device whose logits exist at once; 0: by size.
  """
  settings = _choose_settings(hidden_BLD, head=head, z_loss=0.0,
                              label_smoothing=0.0, chunk=chunk)
  return _scan_token_losses(settings, hidden_BLD=hidden_BLD, head=head,
                            targets_BL=targets_BL)


def _scan_token_losses(settings: _LossSettings, hidden_BLD: jax.Array,
                       head: Head, targets_BL: jax.Array) -> TokenLosses:
  """Computes the losses of all tokens, a chunk of positions at a time.

  Args:
    settings: the coefficients of the loss, and the size of a chunk.
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    targets_BL: the token ids to predict.
  """
  # The kernel, [features, vocabulary], is collected once for all chunks.
  kernel_DV = _gather_kernel(head, hidden_BLD)

  def compute_losses_of_chunk(_: None, chunk: tuple[jax.Array, ...]):
    """Returns the losses of a chunk of tokens, and no state of the scan."""
    x_QBPD, targets_QBP = chunk
    logits_QBPV = head.finish_logits(_project_to_vocabulary(x_QBPD, kernel_DV))
    return None, _losses_of_logits(settings, logits_QBPV=logits_QBPV,
                                   targets_QBP=targets_QBP)

  # Scan over the chunks, so that the logits of only one exist at a time. The
  # axes of a chunk are [Q, B, P, ...]: the devices' shards of the tokens, the
  # rows of a shard, and the positions of a chunk.
  chunks = _split_into_chunks(settings, (hidden_BLD, targets_BL))
  _, losses = jax.lax.scan(compute_losses_of_chunk, None, chunks)
  return _join_chunks(settings, arrays=losses, shape=targets_BL.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_losses(settings: _LossSettings, hidden_BLD: jax.Array, head: Head,
                targets_BL: jax.Array, weights_BL: jax.Array):
  """Returns the sum of all tokens' weighted losses, and the losses of each
  token, through which no gradient goes. `_sum_losses_forward` and
  `_sum_losses_backward` have its gradient.

  Args:
    settings: the coefficients of the loss, and the size of a chunk.
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    targets_BL: the token ids to predict, [batch, length].
    weights_BL: how much each token counts; 0: not at all.
  """
  tokens = _scan_token_losses(settings, hidden_BLD=hidden_BLD, head=head,
                              targets_BL=targets_BL)
  return (weights_BL * tokens.loss).sum(), tokens


def _sum_losses_forward(settings: _LossSettings, *args):
  """Computes the sum of the weighted losses and, in the same pass, its
  gradients.

  With the logits l = finish(x W + b) of hidden states x, the kernel W and the
  bias b of the head, and g = (1 + 2 c log_z) softmax(l) - q, weighted, for each
  token:

    d        = finish'(x W + b)^T g     (d_QBPV)
    d loss / d x = d W^T,   d loss / d W = x^T d,   d loss / d b = sum of d
    d loss / d weight = the loss of the token

  Args:
    settings: the coefficients of the loss, and the size of a chunk.
    *args: hidden states, head, targets and weights, each with the values and
      with whether a gradient is asked for (custom_vjp's symbolic_zeros).

  Returns:
    What `_sum_losses` returns; and the gradients of the sum, None for each that
    is not asked for.
  """
  # Take the arguments apart into their values and whether a gradient of each
  # is asked for: frozen parameters need none.
  hidden_BLD, head, targets_BL, weights_BL = jax.tree.map(
      lambda x: x.value, args)
  needs_hidden, needs_head, _, needs_weights = jax.tree.map(
      lambda x: x.perturbed, args)
  needs_bias = head.bias_V is not None and needs_head.bias_V

  # Every chunk multiplies by the kernel, and by its transpose for the gradient
  # of the hidden states.
  kernel_DV = _gather_kernel(head, hidden_BLD)
  kernel_VD = kernel_DV.T
  if sharding.traced_platform() == 'cpu':
    # Both products read the kernel along its rows: one copy for all chunks.
    kernel_VD = jax.lax.optimization_barrier(kernel_VD)

  def add_gradients_of_chunk(d_head: Any, chunk: tuple[jax.Array, ...]):
    """Computes the losses and gradients of one chunk of tokens.

    Args:
      d_head: the gradients of the head's kernel and bias so far, None for each
        that is not needed.
      chunk: hidden states, targets and weights, [Q, B, P, ...]: the devices'
        shards of the tokens, the rows of a shard, the positions of a chunk.

    Returns:
      The gradients of the head with those of the chunk; and the losses of the
      chunk with the gradient of its hidden states.
    """
    # Compute the logits, their losses, and the gradient of the products x W.
    # finish_logits adds the bias and whatever follows it, such as a soft cap,
    # so that its own gradient (pull_back) leads from the logits to x W.
    x_QBPD, targets_QBP, weights_QBP = chunk
    products_QBPV = _project_to_vocabulary(x_QBPD, kernel_DV)
    logits_QBPV, pull_back = jax.vjp(head.finish_logits, products_QBPV)
    losses = _losses_of_logits(settings, logits_QBPV=logits_QBPV,
                               targets_QBP=targets_QBP)
    d_logits_QBPV = _gradient_of_logits(settings, logits_QBPV=logits_QBPV,
                                        targets_QBP=targets_QBP,
                                        weights_QBP=weights_QBP,
                                        log_z_QBP=losses.log_z)
    [d_QBPV] = pull_back(d_logits_QBPV)

    # Turn it into the gradients of the head and of the hidden states, before
    # the logits go. The bias adds up in float32, hence before the rounding to
    # the dtype of the products.
    d_kernel, d_bias = d_head
    if needs_bias:
      d_bias += d_QBPV.sum((1, 2))
    d_QBPV = d_QBPV.astype(x_QBPD.dtype)
    if needs_head.kernel_DV:
      d_kernel += _gradient_of_kernel(x_QBPD, d_QBPV)
    dx_QBPD = None
    if needs_hidden:
      dx_QBPD = layers.einsum('QBPV,VD->QBPD', d_QBPV, kernel_VD,
                              dtype=x_QBPD.dtype)
    return (d_kernel, d_bias), (losses, dx_QBPD)

  # Scan over the chunks. The gradients of the head are the state of the scan:
  # each chunk adds its own to them, in float32, for each shard by itself.
  transposed_kernel = _transpose_for_gradient(head.kernel_DV)
  zeros = (_zero_gradients(settings, is_needed=needs_head.kernel_DV,
                           x=transposed_kernel),
           _zero_gradients(settings, is_needed=needs_bias, x=head.bias_V))
  chunks = _split_into_chunks(settings, (hidden_BLD, targets_BL, weights_BL))
  (d_kernel, d_bias), (losses, dx_QBPD) = jax.lax.scan(
      add_gradients_of_chunk, zeros, chunks)

  # Lay out losses and gradients as the arguments are. _total_gradient adds up
  # the shards' gradients of the head, which is where the devices exchange them.
  tokens, d_hidden = _join_chunks(settings, arrays=(losses, dx_QBPD),
                                  shape=targets_BL.shape)
  d_head = head.replace(
      kernel_DV=_total_gradient(d_kernel, head.kernel_DV, 'embed', 'vocab'),
      bias_V=_total_gradient(d_bias, head.bias_V, 'vocab'))
  if sharding.count_devices() > 1:
    # The head's gradient is scattered before the layers' are computed: whole,
    # and in float32, it would lie there until the end.
    d_hidden, d_head = jax.lax.optimization_barrier((d_hidden, d_head))
  d_weights = tokens.loss if needs_weights else None
  gradients = d_hidden, d_head, None, d_weights
  return ((weights_BL * tokens.loss).sum(), tokens), gradients


def _sum_losses_backward(settings: _LossSettings, gradients: Any,
                         cotangents: Any):
  """Multiplies the gradients of the forward pass by the gradient of the sum.

  Args:
    settings: the coefficients of the loss, which are in the gradients already.
    gradients: those that `_sum_losses_forward` has computed.
    cotangents: the gradients of its two results: of the sum, a number, and of
      the figures, which is zero as nothing is differentiated through them.

  Returns:
    The gradients of hidden states, head, targets and weights; None where there
    is none.
  """
  # The chain rule: the gradients are of the sum itself, and the loss that is
  # differentiated may be a multiple of it. A symbolic zero means that it does
  # not depend on the sum at all.
  scale, _ = cotangents
  if isinstance(scale, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)


_sum_losses.defvjp(_sum_losses_forward, _sum_losses_backward,
                   symbolic_zeros=True)


def _project_to_vocabulary(x_QBPD: jax.Array, kernel_DV: jax.Array):
  """Returns the products of hidden states and the kernel of the head, in
  float32."""
  return layers.einsum('QBPD,DV->QBPV', x_QBPD, kernel_DV,
                       dtype=x_QBPD.dtype, out_dtype=jnp.float32)


def _gradient_of_kernel(x_QBPD: jax.Array, d_QBPV: jax.Array) -> jax.Array:
  """Returns each shard's gradient of the kernel, x^T d, in float32.

  It is laid out as `_transpose_for_gradient` says. XLA's CPU backend transposes
  the first operand of such a product, so there that is the hidden states. The
  barrier keeps it from turning the product of a tied kernel around, into one of
  bfloat16 that it does not have.

  Args:
    x_QBPD: the hidden states of a chunk, [shards, rows, positions, features].
    d_QBPV: the gradient of their products with the kernel, whose last axis is
      the vocabulary.
  """
  if sharding.is_single_cpu():
    d_QDV = layers.einsum('QBPD,QBPV->QDV', x_QBPD, d_QBPV,
                          dtype=x_QBPD.dtype, out_dtype=jnp.float32)
    return jax.lax.optimization_barrier(d_QDV)
  return layers.einsum('QBPV,QBPD->QVD', d_QBPV, x_QBPD,
                       dtype=x_QBPD.dtype, out_dtype=jnp.float32)


def _transpose_for_gradient(kernel_DV: jax.Array) -> jax.Array:
  """Returns the kernel in the layout in which its gradient adds up: [V, D], but
  on one CPU [D, V]."""
  return kernel_DV if sharding.is_single_cpu() else kernel_DV.T


def _losses_of_logits(settings: _LossSettings, logits_QBPV: jax.Array,
                      targets_QBP: jax.Array) -> TokenLosses:
  """Computes the loss of each token of a chunk, log_z - q . l + c log_z^2.

  Args:
    settings: the coefficients of the loss: the label smoothing s of q = (1 - s)
      onehot(target) + s / V, and c of the z-loss.
    logits_QBPV: the logits l, [shards, rows, positions, vocabulary].
    targets_QBP: the token ids to predict.

  Returns:
    The loss of each token, log_z, and whether the target has the highest logit.
  """
  # log_z is the logarithm of the softmax's denominator. The largest logit is
  # taken out first, so that no exponential overflows.
  max_QBP1 = logits_QBPV.max(-1, keepdims=True)
  sum_QBP = jnp.exp(logits_QBPV - max_QBP1).sum(-1)
  log_z_QBP = max_QBP1[..., 0] + jnp.log(sum_QBP)

  # Read the target's logit. On a mesh it is a masked sum: a gather would
  # collect a sharded vocabulary on every device.
  if sharding.is_single_cpu():
    target_QBP = jnp.take_along_axis(
        logits_QBPV, targets_QBP[..., None], -1, mode='clip')[..., 0]
  else:
    masked_QBPV = jnp.where(_one_hot_targets(logits_QBPV, targets_QBP),
                            logits_QBPV, 0)
    target_QBP = masked_QBPV.sum(-1)
  is_at_least_target_QBPV = logits_QBPV >= target_QBP[..., None]
  at_least_target_QBP = is_at_least_target_QBPV.sum(-1)

  # Add up the terms of the loss: q . l is (1 - s) times the target's logit, and
  # s times the mean of all.
  smooth = settings.label_smoothing
  loss_QBP = log_z_QBP - (1 - smooth) * target_QBP
  if smooth:
    loss_QBP -= smooth * logits_QBPV.mean(-1)
  if settings.z_loss:
    loss_QBP += settings.z_loss * log_z_QBP ** 2
  # The target is right where no other logit is as high: it is the only one that
  # is at least as high as itself. An argmax would call some ties right.
  is_correct_QBP = at_least_target_QBP == 1
  return TokenLosses(loss=loss_QBP, log_z=log_z_QBP, correct=is_correct_QBP)


def _gradient_of_logits(settings: _LossSettings, logits_QBPV: jax.Array,
                        targets_QBP: jax.Array, weights_QBP: jax.Array,
                        log_z_QBP: jax.Array):
  """Computes the gradient of the weighted losses in the logits l, (1 + 2 c
  log_z) softmax(l) - q.

  Args:
    settings: the coefficients of the loss: the label smoothing s of q = (1 - s)
      onehot(target) + s / V, and c of the z-loss.
    logits_QBPV: the logits of a chunk, [shards, rows, positions, vocabulary].
    targets_QBP: its token ids to predict.
    weights_QBP: how much each token counts.
    log_z_QBP: the logarithm of the sum of the exponentials of the logits.

  Returns:
    The gradient, [shards, rows, positions, vocabulary].
  """
  # With log_z known, the softmax p needs no sum. q is built as it is defined.
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
  """Returns bool [Q, B, P, V]: whether an entry of the logits is the target's.
  """
  ids_QBPV = jax.lax.broadcasted_iota(jnp.int32, logits_QBPV.shape, 3)
  return ids_QBPV == targets_QBP[..., None]


def _choose_settings(hidden_BLD: jax.Array, head: Head, z_loss: float,
                     label_smoothing: float, chunk: int) -> _LossSettings:
  """Decides how the tokens are cut up: into the shards of the devices, and
  these into chunks of positions as even as can be.

  Args:
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    z_loss: the coefficient of the z-loss.
    label_smoothing: the probability that is spread over the vocabulary.
    chunk: the tokens of one device whose logits exist at once; 0: by size.

  Returns:
    The coefficients of the loss, with the numbers of shards and positions.
  """
  # Count over how many devices the rows and their length are split.
  batch, length, _ = hidden_BLD.shape
  rows = sharding.count_shards('batch', batch)
  lengths = sharding.count_shards('length', length)

  # Choose how many positions of a row make a chunk: as many as the allowed
  # tokens of a device give to each of its batch / rows rows. Then make all
  # chunks alike, as the last one is padded. -(-a // b) rounds the quotient up.
  vocab = head.kernel_DV.shape[1]
  tokens = chunk or max(LEAST_TOKENS_OF_CHUNK, MOST_LOGITS_OF_CHUNK // vocab)
  most_positions = max(1, tokens * rows // batch)
  length //= lengths
  num_chunks = -(-length // most_positions)
  positions = -(-length // num_chunks)
  return _LossSettings(
      z_loss=z_loss, label_smoothing=label_smoothing, rows=rows,
      lengths=lengths, positions=positions)


def _split_into_chunks(settings: _LossSettings, arrays: tuple[jax.Array, ...]):
  """Splits arrays [B, L, ...] into chunks [chunks, Q, B / rows, P, ...] for a
  scan.

  The length of a shard is padded with zeros to whole chunks. The weights are
  among the arrays, so that padded tokens count nothing.

  Args:
    settings: the numbers of shards, and the positions of a chunk.
    arrays: hidden states, targets and perhaps weights.
  """
  rows = settings.rows
  lengths = settings.lengths
  P = settings.positions

  def cut(x: jax.Array):
    """Returns one of the arrays as its chunks.

    The function around it gives the numbers of shards (`rows` of the batch,
    `lengths` of the length), and P, the positions of a chunk.

    Args:
      x: an array [B, L, ...].
    """
    batch = x.shape[0] // rows
    length = x.shape[1] // lengths
    # Give each device's part axes of its own. A device has one of `rows` parts
    # of the rows, and one of `lengths` parts of the length:
    # [rows, B / rows, lengths, L / lengths, ...].
    chunks = -(-length // P)
    x = x.reshape(rows, batch, lengths, length, *x.shape[2:])
    # Cut the part of the length (axis 3) into whole chunks of P positions:
    # [rows, B / rows, lengths, chunks, P, ...].
    pad = chunks * P - length
    if pad:
      widths = [(0, 0)] * x.ndim
      widths[3] = (0, pad)
      x = jnp.pad(x, widths)
    x = x.reshape(rows, batch, lengths, chunks, P, *x.shape[4:])
    # Move the chunks to the front, to be scanned, and the two axes of devices
    # behind them, where they become one, Q: [chunks, Q, B / rows, P, ...]. So
    # no device needs tokens of another one. The constraint keeps it that way.
    x = jnp.moveaxis(x, (3, 2), (0, 2))
    x = x.reshape(chunks, rows * lengths, batch, *x.shape[4:])
    unsharded = (None,) * (x.ndim - 2)
    return sharding.constrain_where_divisible(x, None, 'tokens', *unsharded)

  return jax.tree.map(cut, arrays)


def _join_chunks(settings: _LossSettings, arrays: tuple[jax.Array, ...],
                 shape: tuple[int, ...]):
  """Joins chunks [chunks, Q, B / rows, P, ...] to arrays [B, L, ...]: the
  inverse of `_split_into_chunks`.

  Args:
    settings: the numbers of shards, and the positions of a chunk.
    arrays: a tree of arrays whose first axis is that of the scan's chunks.
    shape: [B, L], the shape without the padding.
  """
  rows = settings.rows
  lengths = settings.lengths

  def join(x: jax.Array):
    """Returns the chunks of one array as the array."""
    chunks, _, batch, P = x.shape[:4]
    x = x.reshape(chunks, rows, lengths, batch, P, *x.shape[4:])
    # Undo the steps of `_split_into_chunks`, the last one first: split Q, move
    # the axes back, join the chunks of each length, and cut off its padding.
    x = jnp.moveaxis(x, (0, 2), (3, 2))
    x = x.reshape(rows, batch, lengths, chunks * P, *x.shape[5:])
    x = x[:, :, :, :shape[1] // lengths]
    return x.reshape(*shape, *x.shape[4:])

  return jax.tree.map(join, arrays)


def _gather_kernel(head: Head, hidden_BLD: jax.Array):
  """Returns the head's kernel as every chunk reads it: cast to the dtype of the
  hidden states and gathered from all devices, once."""
  return sharding.gather_weight(head.kernel_DV.astype(hidden_BLD.dtype),
                                ('embed', 'vocab'))


def _zero_gradients(settings: _LossSettings, is_needed: Any, x: jax.Array):
  """Returns zeros for a gradient of x to add up in, one copy for each shard of
  the tokens; None where the gradient is not needed."""
  if not is_needed:
    return None
  shards = settings.rows * settings.lengths
  zeros = jnp.zeros((shards, *x.shape), jnp.float32)
  others = (None,) * (x.ndim - 1)
  return sharding.constrain_where_divisible(zeros, 'tokens', 'vocab', *others)


def _total_gradient(gradient_of_shards: jax.Array | None, x: jax.Array,
                    *axes: str):
  """Adds up the devices' gradients of a parameter of the head.

  Args:
    gradient_of_shards: the gradient of each shard of the tokens, its axes as
      `_transpose_for_gradient` has them; None: it is not needed.
    x: the parameter of the head, such as its kernel [features, vocabulary].
    *axes: the names of its axes, by which it is split over devices.

  Returns:
    The gradient, laid out as x is and of its dtype; None where it is not
    needed.
  """
  if gradient_of_shards is None:
    return None
  # On one CPU there is one shard, and nothing was transposed. Elsewhere the
  # gradient has the axes of x in reverse, so it is transposed after the sum.
  if sharding.is_single_cpu():
    return gradient_of_shards[0].astype(x.dtype)
  return sharding.sum_gradients_of_shards(gradient_of_shards,
                                          axes[::-1]).T.astype(x.dtype)
