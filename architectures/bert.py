"""BERT: an encoder that fills in masked words and tells whether two texts
follow one another (Devlin et al. 2019).

  x_0 = LayerNorm(E[tokens] + P[0..L-1] + S[segment])
  a   = LayerNorm(x + Attention(x))       every token sees every other
  x'  = LayerNorm(a + W2 gelu(W1 a))
  pooled     = tanh(W_p x_N[first])       of the [CLS] token
  NSP logits = pooled W_n + b_n
  MLM logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b

The published sizes (110M, 340M) count the encoder and the pooler; what only
pre-training needs, the transform, b and W_n, comes on top. With the head of a
task (model.head) that is not there: scores = W_s pooled + b_s of a row, or
W_s x_N + b_s of each token, which needs no pooler.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import heads
from architectures.parts import hf
from architectures.parts import linear
from architectures.parts.attention import Context
from architectures.parts.config import ModelConfig
from architectures.parts.ffn import FFNS
from architectures.parts.norms import norm
from architectures.parts.skeletons import Embed, Output, Stack


class BERT(nn.Module):
  """tokens [B, L] -> Output: `logits` of the masked words, and in `extra`
  hidden [B, L, D] of the encoder, pooled [B, D] and nsp_logits [B, 2]
  (0: the second text follows the first, 1: it does not). With the head of a
  task: in `extra` hidden, scores and, where a row is scored, pooled."""
  STACK = 'encoder'
  PARTS = dict(position='learned', norm='layernorm', embed_norm=True,
               block='post_norm', attention='global', ffn='gelu',
               tie_embeddings=True, logits_bias=True)
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
    x_BLD, _, aux = Stack(c, c.layer_pattern(causal=False), c.num_layers,
                          c.layer_prefix(causal=False),
                          name='encoder')(x_BLD, ctx)
    if c.head == 'lm':
      return self._pretraining(x_BLD, table_DV, aux)
    if heads.HEADS[c.head].unfolds:
      y_BLD, head = heads.Unfold(c, name='task')(
          heads.last(x_BLD, None, segment_ids_BL), x_BLD.shape[1])
      return Output(y_BLD, head, aux=aux, extra=dict(hidden=x_BLD))
    extra = dict(hidden=x_BLD)
    if heads.HEADS[c.head].of_row:
      extra['pooled'] = self._pooled(x_BLD)
    scores = heads.Task(c, name='task')(extra.get('pooled', x_BLD),
                                        deterministic=deterministic)
    return Output(x_BLD, None, aux=aux, extra=extra | dict(scores=scores))

  def _pretraining(self, x_BLD: jax.Array, table_DV: jax.Array, aux: dict
                   ) -> Output:
    """Masked words and next sentences."""
    c = self.config
    pooled_BD = self._pooled(x_BLD)
    nsp_logits_B2 = self._dense('nsp', pooled_BD, 2, output=True)
    act = FFNS[c.moe.ffn if c.ffn == 'moe' else c.ffn].act
    read = aux.get('readouts', x_BLD)  # of every layer, where they are kept
    t = norm(c, 'transform_norm')(act(self._dense('transform', read,
                                                  c.d_model)))
    t_BLD, aux = ((t[-1], aux | {'readouts': t}) if 'readouts' in aux
                  else (t, aux))
    return Output(t_BLD, heads.Unembed(c, name='head')(table_DV), aux=aux,
                  extra=dict(hidden=x_BLD, pooled=pooled_BD,
                             nsp_logits=nsp_logits_B2.astype(jnp.float32)))

  def _pooled(self, x_BLD: jax.Array) -> jax.Array:
    return jnp.tanh(self._dense('pooler', x_BLD[:, 0], self.config.d_model))

  def _dense(self, name: str, x: jax.Array, size: int, output: bool = False
             ) -> jax.Array:
    w = linear.weight(self, name, (self.config.d_model, size),
                      ('embed', None), output=output)
    y = linear.einsum('...D,DE->...E', x, w, self.config.compute_dtype)
    return linear.add_bias(y, linear.bias(self, f'{name}_bias', (size,),
                                          (None,), output=output))


HF = hf.HuggingFace(
    'bert', 'BertForPreTraining',
    names=(
        *hf.under(
            'embed', 'bert.embeddings',
            ('tokens', 'VD', 'word_embeddings.weight', 'V D'),
            ('positions', 'LD', 'position_embeddings.weight', 'L D'),
            ('types', 'UD', 'token_type_embeddings.weight', 'U D'),
            *hf.norm('norm', 'LayerNorm')),
        *hf.under(
            'encoder/layers', 'bert.encoder.layer.{n}',
            *hf.dense('attention/query', 'DHK', 'attention.self.query',
                      'HK D'),
            *hf.dense('attention/key', 'DHK', 'attention.self.key', 'HK D'),
            *hf.dense('attention/value', 'DHK', 'attention.self.value',
                      'HK D'),
            *hf.dense('attention/out', 'HKD', 'attention.output.dense',
                      'D HK'),
            *hf.norm('attention_norm', 'attention.output.LayerNorm'),
            *hf.dense('ffn/up', 'DF', 'intermediate.dense', 'F D'),
            *hf.dense('ffn/down', 'FD', 'output.dense', 'D F'),
            *hf.norm('ffn_norm', 'output.LayerNorm')),
        *hf.dense('pooler', 'DU', 'bert.pooler.dense', 'U D'),
        *hf.dense('transform', 'DU', 'cls.predictions.transform.dense', 'U D'),
        *hf.norm('transform_norm', 'cls.predictions.transform.LayerNorm'),
        ('head/bias', 'V', 'cls.predictions.bias', 'V'),
        *hf.dense('nsp', 'DU', 'cls.seq_relationship', 'U D')),
    fields={
        'd_model': ('hidden_size', 768),
        'num_layers': ('num_hidden_layers', 12),
        'num_heads': ('num_attention_heads', 12),
        'd_ff': ('intermediate_size', 3072),
        'vocab_size': ('vocab_size', 30522),
        'max_len': ('max_position_embeddings', 512),
        'type_vocab_size': ('type_vocab_size', 2),
        'norm_eps': ('layer_norm_eps', 1e-12),
        'ffn': ('hidden_act', 'gelu', hf.FFNS)},
    only=dict(position_embedding_type='absolute', is_decoder=False,
              add_cross_attention=False, tie_word_embeddings=True),
    # The files of 2018 have these, for a pooler that they do not describe.
    unread=('directionality', 'pooler_fc_size', 'pooler_num_attention_heads',
            'pooler_num_fc_layers', 'pooler_size_per_head', 'pooler_type'),
    write=lambda c: dict(tie_word_embeddings=c.tie_embeddings),
    tied={'cls.predictions.decoder.weight':
          'bert.embeddings.word_embeddings.weight',
          'cls.predictions.decoder.bias': 'cls.predictions.bias'},
    spellings=(('bert.', ''), ('LayerNorm.weight', 'LayerNorm.gamma'),
               ('LayerNorm.bias', 'LayerNorm.beta')),
    ignored=(r'(bert\.)?embeddings\.position_ids',),
    heads=hf.heads('Bert', sequence='classifier'))
