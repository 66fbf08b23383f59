"""The encoder's skeleton, which BERT and those that came after it share.

Every token sees every other. A page says how its pre-training reads the last
layer and, with `Encoder.scored`, what a task's head is applied to.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import heads
from architectures.parts import linear
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.ffn import FFNS
from architectures.parts.norms import norm
from architectures.parts.skeletons import Embed, Output, Stack


class Encoder(nn.Module):
  """tokens [B, L] -> Output: `logits` of the masked words, and in `extra`
  hidden [B, L, D] of the encoder and, with model.next_sentence, pooled [B, D]
  and nsp_logits [B, 2] (0: the second text follows the first, 1: it does not).
  With the head of a task: in `extra` hidden, scores and, where a pooler is
  what a row is scored by, pooled.

  HEAD_ACT: the network of FFNS whose activation the head of masked words has;
    '': that of the layers.
  HEAD_BIAS: whether the product of that head has a bias.
  PAIR_SEPARATORS: how many separators stand between two texts of a row.
  """
  STACK = 'encoder'
  HEAD_ACT = ''
  HEAD_BIAS = True
  PAIR_SEPARATORS = 1
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *,
               type_ids_BL: jax.Array | None = None,
               positions_BL: jax.Array | None = None,
               segment_ids_BL: jax.Array | None = None,
               deterministic: bool = True, keep_layers: bool = False,
               keep_attention: bool = False) -> Output:
    c = self.config
    chex.assert_rank(tokens_BL, 2)
    in_order = positions_BL is None or segment_ids_BL is not None
    if positions_BL is None:
      positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    ctx = Context(positions_BL, segment_ids_BL, tokens_BL=tokens_BL,
                  in_order=in_order, deterministic=deterministic,
                  keep_layers=keep_layers, keep_attention=keep_attention)
    x_BLD, table_DV = Embed(c, name='embed')(
        tokens_BL, positions_BL, type_ids_BL=type_ids_BL,
        deterministic=deterministic)
    x_BLD, _, aux = Stack(c, c.sections(c.num_layers, causal=False),
                          name='encoder')(x_BLD, ctx)
    if c.head == 'lm':
      return self._pretraining(x_BLD, table_DV, aux)
    head = heads.HEADS[c.head]
    if head.unfolds:
      y_BLD, head = heads.Unfold(c, name='task')(
          heads.last(x_BLD, None, segment_ids_BL), x_BLD.shape[1])
      return Output(y_BLD, head, aux=aux, extra=dict(hidden=x_BLD))
    read, extra = self.scored(
        heads.POOLINGS[c.pooling](x_BLD, segment_ids_BL) if head.of_row
        else x_BLD, head.of_row)
    scores = heads.Task(c, name='task')(read, deterministic=deterministic)
    return Output(x_BLD, None, aux=aux,
                  extra=dict(hidden=x_BLD, scores=scores) | extra)

  def scored(self, x: jax.Array, of_row: bool
             ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the head of a task is applied to, of a row [B, D] or of
    each token [B, L, D], and what of it belongs into `extra`."""
    if not of_row:
      return x, {}
    pooled_BD = self._pooled(x)
    return pooled_BD, dict(pooled=pooled_BD)

  def transform(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]: what the head of masked words reads."""
    c = self.config
    act = FFNS[self.HEAD_ACT or (c.moe.ffn if c.ffn == 'moe' else c.ffn)].act
    return norm(c, 'transform_norm')(act(self._dense(
        'transform', x, c.d_model, bias=self.HEAD_BIAS)))

  def _pretraining(self, x_BLD: jax.Array, table_DV: jax.Array, aux: dict
                   ) -> Output:
    """Masked words and, where the model has a head for them, next sentences."""
    c = self.config
    extra = dict(hidden=x_BLD)
    if c.next_sentence:
      pooled_BD = self._pooled(x_BLD[:, 0])
      logits_B2 = self._dense('nsp', pooled_BD, 2, output=True)
      extra |= dict(pooled=pooled_BD,
                    nsp_logits=logits_B2.astype(jnp.float32))
    # Of every layer, where they are kept.
    t = self.transform(aux.get('readouts', x_BLD))
    t_BLD, aux = ((t[-1], aux | {'readouts': t}) if 'readouts' in aux
                  else (t, aux))
    return Output(t_BLD, heads.Unembed(c, name='head')(table_DV), aux=aux,
                  extra=extra)

  def _pooled(self, x_BD: jax.Array) -> jax.Array:
    return jnp.tanh(self._dense('pooler', x_BD, self.config.d_model))

  def _dense(self, name: str, x: jax.Array, size: int, output: bool = False,
             bias: bool = True) -> jax.Array:
    w = linear.weight(self, name, (self.config.d_model, size),
                      ('embed', None), output=output)
    y = linear.einsum('...D,DE->...E', x, w, self.config.compute_dtype)
    if not bias:
      return y
    return linear.add_bias(y, linear.bias(self, f'{name}_bias', (size,),
                                          (None,), output=output))
