"""BERT: an encoder that fills in masked words and tells whether two texts
follow one another (Devlin et al. 2019).

  x_0 = LayerNorm(E[tokens] + P[0..L-1] + S[segment])
  a   = LayerNorm(x + Attention(x))       every token sees every other
  x'  = LayerNorm(a + W2 gelu(W1 a))
  pooled     = tanh(W_p x_N[first])       of the [CLS] token
  NSP logits = pooled W_n + b_n
  MLM logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b

The published sizes (110M, 340M) count the encoder and the pooler; what only
pre-training needs, the transform, b and W_n, comes on top.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import hf as common
from architectures.parts import linear
from architectures.parts.attention import Context
from architectures.parts.config import ModelConfig
from architectures.parts.ffn import ACTIVATIONS
from architectures.parts.norms import norm
from architectures.parts.skeletons import Embed, Output, Stack, Unembed


class BERT(nn.Module):
  """tokens [B, L] -> Output: `logits` of the masked words, and in `extra`
  hidden [B, L, D] of the encoder, pooled [B, D] and nsp_logits [B, 2]
  (0: the second text follows the first, 1: it does not)."""
  STACK = 'encoder'
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, *, type_ids_BL=None,
               positions_BL=None, segment_ids_BL=None,
               deterministic: bool = True,
               keep_layers: bool = False) -> Output:
    c = self.config
    chex.assert_rank(tokens_BL, 2)
    in_order = positions_BL is None or segment_ids_BL is not None
    if positions_BL is None:
      positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    ctx = Context(positions_BL, segment_ids_BL, tokens_BL=tokens_BL,
                  in_order=in_order, deterministic=deterministic,
                  keep_layers=keep_layers)
    x_BLD, table_DV = Embed(c, name='embed')(
        tokens_BL, positions_BL, type_ids_BL=type_ids_BL,
        deterministic=deterministic)
    x_BLD, _, aux = Stack(c, c.layer_pattern(causal=False), c.num_layers,
                          name='encoder')(x_BLD, ctx)
    pooled_BD = jnp.tanh(self._dense('pooler', x_BLD[:, 0], c.d_model))
    nsp_logits_B2 = self._dense('nsp', pooled_BD, 2)
    act, _ = ACTIVATIONS[c.moe.ffn if c.ffn == 'moe' else c.ffn]
    t_BLD = act(self._dense('transform', x_BLD, c.d_model))
    t_BLD = norm(c, 'transform_norm')(t_BLD)
    return Output(t_BLD, Unembed(c, name='head')(table_DV), aux=aux,
                  extra=dict(hidden=x_BLD, pooled=pooled_BD,
                             nsp_logits=nsp_logits_B2.astype(jnp.float32)))

  def _dense(self, name: str, x: jax.Array, size: int) -> jax.Array:
    w = linear.weight(self, name, (self.config.d_model, size),
                      ('embed', None))
    y = linear.einsum('...D,DE->...E', x, w, self.config.compute_dtype)
    return linear.add_bias(y, linear.bias(self, f'{name}_bias', (size,),
                                          (None,)))


HF_MODEL = 'bert', 'BertForPreTraining'
HF_SPELLINGS = (('bert.', ''), ('LayerNorm.weight', 'LayerNorm.gamma'),
                ('LayerNorm.bias', 'LayerNorm.beta'))
HF_TIED = {
    'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
    'cls.predictions.decoder.bias': 'cls.predictions.bias'}
HF_IGNORED = (r'(bert\.)?embeddings\.position_ids',)
HF_NAMES = (
    ('embed/tokens', 'VD', 'bert.embeddings.word_embeddings.weight', 'V D'),
    ('embed/positions', 'LD', 'bert.embeddings.position_embeddings.weight',
     'L D'),
    ('embed/types', 'TD', 'bert.embeddings.token_type_embeddings.weight',
     'T D'),
    ('embed/norm/scale', 'D', 'bert.embeddings.LayerNorm.weight', 'D'),
    ('embed/norm/bias', 'D', 'bert.embeddings.LayerNorm.bias', 'D'),
    ('encoder/layers/attention/query', 'DHK',
     'bert.encoder.layer.{n}.attention.self.query.weight', 'HK D'),
    ('encoder/layers/attention/query_bias', 'HK',
     'bert.encoder.layer.{n}.attention.self.query.bias', 'HK'),
    ('encoder/layers/attention/key', 'DHK',
     'bert.encoder.layer.{n}.attention.self.key.weight', 'HK D'),
    ('encoder/layers/attention/key_bias', 'HK',
     'bert.encoder.layer.{n}.attention.self.key.bias', 'HK'),
    ('encoder/layers/attention/value', 'DHK',
     'bert.encoder.layer.{n}.attention.self.value.weight', 'HK D'),
    ('encoder/layers/attention/value_bias', 'HK',
     'bert.encoder.layer.{n}.attention.self.value.bias', 'HK'),
    ('encoder/layers/attention/out', 'HKD',
     'bert.encoder.layer.{n}.attention.output.dense.weight', 'D HK'),
    ('encoder/layers/attention/out_bias', 'D',
     'bert.encoder.layer.{n}.attention.output.dense.bias', 'D'),
    ('encoder/layers/attention_norm/scale', 'D',
     'bert.encoder.layer.{n}.attention.output.LayerNorm.weight', 'D'),
    ('encoder/layers/attention_norm/bias', 'D',
     'bert.encoder.layer.{n}.attention.output.LayerNorm.bias', 'D'),
    ('encoder/layers/ffn/up', 'DF',
     'bert.encoder.layer.{n}.intermediate.dense.weight', 'F D'),
    ('encoder/layers/ffn/up_bias', 'F',
     'bert.encoder.layer.{n}.intermediate.dense.bias', 'F'),
    ('encoder/layers/ffn/down', 'FD',
     'bert.encoder.layer.{n}.output.dense.weight', 'D F'),
    ('encoder/layers/ffn/down_bias', 'D',
     'bert.encoder.layer.{n}.output.dense.bias', 'D'),
    ('encoder/layers/ffn_norm/scale', 'D',
     'bert.encoder.layer.{n}.output.LayerNorm.weight', 'D'),
    ('encoder/layers/ffn_norm/bias', 'D',
     'bert.encoder.layer.{n}.output.LayerNorm.bias', 'D'),
    ('pooler', 'DX', 'bert.pooler.dense.weight', 'X D'),
    ('pooler_bias', 'D', 'bert.pooler.dense.bias', 'D'),
    ('transform', 'DX', 'cls.predictions.transform.dense.weight', 'X D'),
    ('transform_bias', 'D', 'cls.predictions.transform.dense.bias', 'D'),
    ('transform_norm/scale', 'D',
     'cls.predictions.transform.LayerNorm.weight', 'D'),
    ('transform_norm/bias', 'D',
     'cls.predictions.transform.LayerNorm.bias', 'D'),
    ('head/bias', 'V', 'cls.predictions.bias', 'V'),
    ('nsp', 'DX', 'cls.seq_relationship.weight', 'X D'),
    ('nsp_bias', 'X', 'cls.seq_relationship.bias', 'X'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a bert config.json gives."""
  hf.must(position_embedding_type='absolute', is_decoder=False,
          add_cross_attention=False, tie_word_embeddings=True)
  # The files of 2018 have these, for a pooler that they do not describe.
  hf.passes('directionality', 'pooler_fc_size', 'pooler_num_attention_heads',
            'pooler_num_fc_layers', 'pooler_size_per_head', 'pooler_type')
  return dict(
      d_model=hf('hidden_size', 768), num_layers=hf('num_hidden_layers', 12),
      num_heads=hf('num_attention_heads', 12),
      d_ff=hf('intermediate_size', 3072), vocab_size=hf('vocab_size', 30522),
      max_len=hf('max_position_embeddings', 512),
      type_vocab_size=hf('type_vocab_size', 2), embed_norm=True,
      norm_eps=hf('layer_norm_eps', 1e-12), block='post_norm',
      ffn=hf.choose('hidden_act', 'gelu', common.FFNS), logits_bias=True)


def to_hf_config(c) -> dict:
  """Returns what a bert config.json says of the config `c`."""
  return dict(
      hidden_size=c.d_model, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, intermediate_size=c.d_ff,
      vocab_size=c.vocab_size, max_position_embeddings=c.max_len,
      type_vocab_size=c.type_vocab_size, layer_norm_eps=c.norm_eps,
      hidden_act=common.theirs(common.FFNS, c.ffn),
      tie_word_embeddings=c.tie_embeddings)
