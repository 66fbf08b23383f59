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


class _GradientsOfHead(NamedTuple):
  """The gradients of the head's parameters, each with an axis of the shards of
  the tokens in front; None for each that is not needed.

  Attributes:
    kernel: that of the kernel, transposed but on one CPU
      (`_transpose_for_gradient`).
    bias: that of the bias.
  """
  kernel: Any
  bias: Any


class _NeededGradients(NamedTuple):
  """The gradients that are asked for; those of frozen parameters are not.

  Attributes:
    hidden: whether the gradient of the hidden states is.
    kernel: whether that of the head's kernel is.
    bias: whether that of the head's bias is; False: there is no bias.
  """
  hidden: bool
  kernel: bool
  bias: bool


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

  The suffixes name axes: B batch, L length, D features; V counts the tokens of
  the vocabulary.

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
  """Computes the losses of all tokens, for one chunk of tokens after another,
  so that the logits of only one chunk exist at a time.

  The suffixes name axes: B batch, L length, D features, V vocabulary. A chunk
  has Q shards of its tokens, one for each device, and P positions of each row.

  Args:
    settings: the coefficients of the loss, and how tokens are cut into chunks.
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    targets_BL: the token ids to predict, [batch, length].

  Returns:
    The losses of the tokens, arrays [batch, length].
  """
  # The weights of the head, [features, vocabulary], may lie on several devices.
  # They are collected once, before the scan.
  kernel_DV = _gather_kernel(head, hidden_BLD)

  def compute_losses_of_chunk(_: None, chunk: tuple[jax.Array, ...]):
    """Returns the losses of a chunk of tokens, and no state of the scan."""
    x_QBPD, targets_QBP = chunk
    logits_QBPV = head.finish_logits(_project_to_vocabulary(x_QBPD, kernel_DV))
    return None, _losses_of_logits(settings, logits_QBPV=logits_QBPV,
                                   targets_QBP=targets_QBP)

  # Scan over the chunks, whose axes are [Q, B, P, ...].
  chunks = _split_into_chunks(settings, (hidden_BLD, targets_BL))
  _, losses = jax.lax.scan(compute_losses_of_chunk, None, chunks)
  return _join_chunks(settings, arrays=losses, shape=targets_BL.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_losses(settings: _LossSettings, hidden_BLD: jax.Array, head: Head,
                targets_BL: jax.Array, weights_BL: jax.Array):
  """Returns the weighted sum of the losses of all tokens, and the loss of each
  token. Only the sum can be differentiated: its gradient is written by hand, in
  `_sum_losses_forward` and `_sum_losses_backward`.

  Args:
    settings: the coefficients of the loss, and how tokens are cut into chunks.
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    targets_BL: the token ids to predict, [batch, length].
    weights_BL: how much each token counts, [batch, length]; 0: not at all.
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
  needed = _NeededGradients(hidden=needs_hidden, kernel=needs_head.kernel_DV,
                            bias=needs_bias)

  # Every chunk multiplies by the kernel, and by its transpose for the gradient
  # of the hidden states.
  kernel_DV = _gather_kernel(head, hidden_BLD)
  kernel_VD = kernel_DV.T
  if sharding.traced_platform() == 'cpu':
    # Both products read the kernel along its rows: one copy for all chunks.
    kernel_VD = jax.lax.optimization_barrier(kernel_VD)

  # Scan over the chunks. The gradients of the head are the state of the scan:
  # each chunk adds its own to them, in float32, for each shard by itself.
  transposed_kernel = _transpose_for_gradient(head.kernel_DV)
  zeros = _GradientsOfHead(
      kernel=_zero_gradients(settings, is_needed=needs_head.kernel_DV,
                             x=transposed_kernel),
      bias=_zero_gradients(settings, is_needed=needs_bias, x=head.bias_V))
  chunks = _split_into_chunks(settings, (hidden_BLD, targets_BL, weights_BL))
  add_gradients_of_chunk = functools.partial(
      _add_gradients_of_chunk, settings=settings, head=head,
      kernel_DV=kernel_DV, kernel_VD=kernel_VD, needed=needed)
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


def _add_gradients_of_chunk(
    d_head: _GradientsOfHead, chunk: tuple[jax.Array, ...],
    settings: _LossSettings, head: Head, kernel_DV: jax.Array,
    kernel_VD: jax.Array, needed: _NeededGradients):
  """Computes the losses of one chunk of tokens, and the gradients of their sum.
  It is one step of the scan over the chunks in `_sum_losses_forward`, which has
  the equations.

  The suffixes name axes: Q shards of the tokens, B rows of a shard, P positions
  of each row, D features, V vocabulary.

  Args:
    d_head: the sums over the chunks so far of the gradients of the head.
    chunk: hidden states x, targets and weights, [Q, B, P, ...].
    settings: the coefficients of the loss.
    head: the output projection, whose finish_logits adds the bias to the
      products x W, and whatever follows it, such as a soft cap.
    kernel_DV: the kernel W of the head, whole on each device.
    kernel_VD: its transpose.
    needed: which gradients are asked for.

  Returns:
    The sums of the head's gradients, with those of this chunk added; and the
    losses of the tokens with the gradient of their hidden states.
  """
  # Compute the logits, their losses, and the gradient d of the products x W.
  # pull_back is the derivative of finish_logits, which leads from the logits
  # back to x W.
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

  # Compute from d the gradients of the head and of the hidden states, while the
  # logits exist. The bias comes first: it is summed in float32, before d is
  # rounded to the dtype of the products.
  d_kernel, d_bias = d_head
  if needed.bias:
    d_bias += d_QBPV.sum((1, 2))
  rounded_d_QBPV = d_QBPV.astype(x_QBPD.dtype)
  if needed.kernel:
    d_kernel += _gradient_of_kernel(x_QBPD, rounded_d_QBPV)
  dx_QBPD = None
  if needed.hidden:
    dx_QBPD = layers.einsum('QBPV,VD->QBPD', rounded_d_QBPV, kernel_VD,
                            dtype=x_QBPD.dtype)
  return _GradientsOfHead(d_kernel, d_bias), (losses, dx_QBPD)


def _sum_losses_backward(settings: _LossSettings, gradients: Any,
                         cotangents: Any):
  """Computes the gradient of the loss by the chain rule: the gradients of the
  sum of token losses, which the forward pass has computed already, times the
  derivative of the loss by that sum.

  Args:
    settings: the coefficients of the loss, which the gradients already include.
    gradients: the gradients that `_sum_losses_forward` has computed.
    cotangents: the derivatives of the loss by the two results of `_sum_losses`:
      by the sum, a number; and by the losses of the tokens, which is not used,
      as nothing is differentiated through them.

  Returns:
    The gradients of the hidden states, the head, the targets and the weights;
    None where there is none.
  """
  # JAX gives a symbolic zero where the loss does not depend on the sum at all.
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
  """Computes the gradient of the head's kernel W in the products x W, which is
  x^T d, in float32 and for each shard of the tokens by itself.

  On one CPU the result is [shards, D, V]. XLA's CPU backend transposes the
  first operand of such a product, so there that is x, the smaller one.
  Elsewhere the result is [shards, V, D], as `_transpose_for_gradient` explains.

  Args:
    x_QBPD: the hidden states x of a chunk: Q shards, B rows of a shard, P
      positions of a row, D features.
    d_QBPV: the gradient d of the loss by the products x W, with V tokens of the
      vocabulary.
  """
  if sharding.is_single_cpu():
    d_QDV = layers.einsum('QBPD,QBPV->QDV', x_QBPD, d_QBPV,
                          dtype=x_QBPD.dtype, out_dtype=jnp.float32)
    # Without the barrier, and where the head is tied to the embedding, XLA
    # turns this product around, into one of bfloat16 that its CPU backend
    # does not have.
    return jax.lax.optimization_barrier(d_QDV)
  return layers.einsum('QBPV,QBPD->QVD', d_QBPV, x_QBPD,
                       dtype=x_QBPD.dtype, out_dtype=jnp.float32)


def _transpose_for_gradient(kernel_DV: jax.Array) -> jax.Array:
  """Returns the kernel in the layout in which its gradient adds up: [V, D], but
  on one CPU [D, V]."""
  return kernel_DV if sharding.is_single_cpu() else kernel_DV.T


def _losses_of_logits(settings: _LossSettings, logits_QBPV: jax.Array,
                      targets_QBP: jax.Array) -> TokenLosses:
  """Computes the loss of each token of a chunk, log_z - q . l + c log_z^2, with
  the logits l of the token, log_z = logsumexp(l), the smoothed target q = (1 -
  s) onehot(target) + s / V, and the coefficient c of the z-loss.

  Args:
    settings: the coefficients of the loss: the label smoothing s, and c.
    logits_QBPV: the logits: Q shards of the tokens, B rows of a shard, P
      positions of a row, V tokens of the vocabulary.
    targets_QBP: the token ids to predict.

  Returns:
    For each token its loss, its log_z, and whether its target has the highest
    logit.
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
  """Computes the derivative of the weighted losses by the logits l:

    w (p (1 + 2 c log_z) - q),  p = softmax(l) = exp(l - log_z),

  of the loss log_z - q . l + c log_z^2 with the weight w, the smoothed target q
  = (1 - s) onehot(target) + s / V, and the coefficient c of the z-loss.

  Args:
    settings: the coefficients of the loss: the label smoothing s, and c.
    logits_QBPV: the logits of a chunk: Q shards of the tokens, B rows of a
      shard, P positions of a row, V tokens of the vocabulary.
    targets_QBP: the token ids to predict.
    weights_QBP: w, how much each token counts.
    log_z_QBP: the logsumexp of the logits of each token.

  Returns:
    The derivatives, in the shape of the logits.
  """
  # The softmax p needs no sum over the vocabulary, because log_z is known.
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
  """Decides how the tokens of a batch are cut into chunks, so that few logits
  exist at once. Each device has a shard of the tokens, and each chunk takes the
  same number of positions from every row of all shards.

  The suffixes name axes: B batch, L length, D features, V tokens in the
  vocabulary.

  Args:
    hidden_BLD: the hidden states that the head is applied to, [batch, length,
      features].
    head: the output projection, from features to the logits of the vocabulary.
    z_loss: the coefficient of the z-loss.
    label_smoothing: the probability that is spread over the vocabulary.
    chunk: how many tokens of one device may have logits at once; 0: by the size
      of the vocabulary.

  Returns:
    The coefficients of the loss; the number of shards of the rows (`rows`) and
    of the length (`lengths`); and the number of positions of a chunk.
  """
  # The mesh splits the rows into `rows` shards and their length into `lengths`.
  batch, length, _ = hidden_BLD.shape
  rows = sharding.count_shards('batch', batch)
  lengths = sharding.count_shards('length', length)

  # A device has batch / rows rows, and `tokens` tokens at once: find how many
  # positions of a row this allows. Then take the least number of chunks, and
  # spread the positions evenly over them, as the last chunk is padded to the
  # size of the others. -(-a // b) rounds a quotient up.
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
  """Cuts arrays [B, L, ...] into chunks of tokens for a scan: see
  `_cut_into_chunks`.

  Args:
    settings: the numbers of shards, and the positions P of a chunk.
    arrays: hidden states, targets and perhaps weights. The weights are among
      them, so that the padding of a chunk counts nothing.

  Returns:
    The arrays, [chunks, Q, B / rows, P, ...].
  """
  return jax.tree.map(
      functools.partial(_cut_into_chunks, settings=settings), arrays)


def _cut_into_chunks(x: jax.Array, settings: _LossSettings) -> jax.Array:
  """Cuts an array [B, L, ...] into chunks of tokens, as an array
  [chunks, Q, B / rows, P, ...].

  The mesh splits the B rows into `rows` shards and their length L into
  `lengths` shards, so there are Q = rows * lengths shards of the tokens, one
  for each device. A chunk has P positions of each row of each shard. Where P
  does not divide the length of a shard, it is padded with zeros.

  Args:
    x: an array [B, L, ...].
    settings: the numbers of shards, and the positions P of a chunk.
  """
  rows, lengths = settings.rows, settings.lengths
  P = settings.positions
  rows_of_shard = x.shape[0] // rows
  length_of_shard = x.shape[1] // lengths
  num_chunks = -(-length_of_shard // P)  # rounded up
  features = x.shape[2:]
  # Split the rows and the length into their shards:
  # [rows, B / rows, lengths, L / lengths, ...].
  by_shard = x.reshape(
      rows, rows_of_shard, lengths, length_of_shard, *features)
  # Pad the length of a shard, axis 3, to whole chunks of P positions, and split
  # it: [rows, B / rows, lengths, chunks, P, ...].
  padding = num_chunks * P - length_of_shard
  if padding:
    widths = [(0, 0)] * by_shard.ndim
    widths[3] = (0, padding)
    by_shard = jnp.pad(by_shard, widths)
  by_chunk = by_shard.reshape(
      rows, rows_of_shard, lengths, num_chunks, P, *features)
  # Move the chunks to the front, where the scan takes them, and `lengths`
  # behind `rows`: [chunks, rows, lengths, B / rows, P, ...].
  chunks_first = jnp.moveaxis(by_chunk, (3, 2), (0, 2))
  # Join `rows` and `lengths` to Q: [chunks, Q, B / rows, P, ...]. Q is split
  # over the devices, so that no device needs tokens of another one.
  chunks = chunks_first.reshape(
      num_chunks, rows * lengths, rows_of_shard, P, *features)
  unsharded = (None,) * (chunks.ndim - 2)
  return sharding.constrain_where_divisible(
      chunks, None, 'tokens', *unsharded)


def _join_chunks(settings: _LossSettings, arrays: tuple[jax.Array, ...],
                 shape: tuple[int, ...]):
  """Joins the chunks of tokens of several arrays, which a scan has returned:
  see `_join_chunks_of_array`.

  Args:
    settings: the numbers of shards, `rows` and `lengths`.
    arrays: a tree of arrays, whose first axis is that of the chunks.
    shape: [B, L], the shape without padding.

  Returns:
    The arrays, [B, L, ...].
  """
  join_chunks = functools.partial(
      _join_chunks_of_array, settings=settings, shape=shape)
  return jax.tree.map(join_chunks, arrays)


def _join_chunks_of_array(chunks: jax.Array, settings: _LossSettings,
                          shape: tuple[int, ...]) -> jax.Array:
  """Joins chunks of tokens [chunks, Q, B / rows, P, ...] to an array
  [B, L, ...]. This is the inverse of `_cut_into_chunks`.

  The B rows are split into `rows` shards and their length L into `lengths`
  shards: Q = rows * lengths shards of the tokens. A chunk has P positions of
  each row of each shard.

  Args:
    chunks: the array, whose first axis is that of the chunks.
    settings: the numbers of shards, `rows` and `lengths`.
    shape: [B, L], the shape without padding.
  """
  rows, lengths = settings.rows, settings.lengths
  B, L = shape
  num_chunks, _, rows_of_shard, P = chunks.shape[:4]
  features = chunks.shape[4:]
  # Split Q: [chunks, rows, lengths, B / rows, P, ...].
  by_shard = chunks.reshape(
      num_chunks, rows, lengths, rows_of_shard, P, *features)
  # Move the chunks before their positions, and `lengths` before the chunks:
  # [rows, B / rows, lengths, chunks, P, ...].
  rows_first = jnp.moveaxis(by_shard, (0, 2), (3, 2))
  # Join the positions of all chunks, and cut off their padding:
  # [rows, B / rows, lengths, L / lengths, ...].
  padded = rows_first.reshape(
      rows, rows_of_shard, lengths, num_chunks * P, *features)
  whole = padded[:, :, :, :L // lengths]
  # Join the shards of the rows and those of the length: [B, L, ...].
  return whole.reshape(B, L, *features)


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
  """Adds up the gradients that the devices have computed of one parameter of
  the head, each from its own tokens.

  Args:
    gradient_of_shards: the gradient of each shard of the tokens, along the
      first axis; None: no gradient is needed. On one CPU the other axes are
      those of `x`. Elsewhere they are in reverse (`_transpose_for_gradient`
      says why).
    x: the parameter, such as the head's kernel [features, vocabulary].
    *axes: the names of the axes of `x`, which decide how it is split over
      devices.

  Returns:
    The gradient in the shape and dtype of `x`; None where it is not needed.
  """
  if gradient_of_shards is None:
    return None
  # On one CPU there is only one shard. Elsewhere the sum is taken first and
  # transposed after it.
  if sharding.is_single_cpu():
    return gradient_of_shards[0].astype(x.dtype)
  return sharding.sum_gradients_of_shards(gradient_of_shards,
                                          axes[::-1]).T.astype(x.dtype)
