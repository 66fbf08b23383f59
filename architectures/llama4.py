"""Llama 4, of text: attention within chunks in three layers of four, and to all
tokens without positions in the fourth; an expert a token beside one that all
share (Meta 2025, "The Llama 4 herd"; as in transformers).

  a  = x + W_o Attention(q, k, v)     q, k turned, then q / rms(q), k / rms(k)
                                      in the smaller model; a token sees its own
                                      chunk of 8,192
  a  = x + W_o Attention(g q, k, v)   in every fourth layer, not turned, with
       g = 1 + 0.1 log(1 + floor((position + 1) / 8192))
  x' = a + SwiGLU(n) + SwiGLU_e(s n),  n = RMSNorm(a)
       e = argmax W_r n,  s = sigmoid of its logit
  x' = a + SwiGLU(n)                  in every second layer of the larger one

Turned pairs are neighbours. The published folders also hold what reads images:
transformers' Llama4ForCausalLM reads one and writes it without.
"""

from typing import Any

from architectures import llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require
from common.kinds import DENSE_NETWORK

CHUNKED = 'chunked_attention'
# A norm follows the turning there, so the temperatures of others would vanish.
SCALINGS = {name: rope_fields.SCALINGS[name]
            for name in ('default', 'linear', 'dynamic', 'llama3')}


class Llama4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(interleaved=True), qk_norm_scale=False,
      pattern='chunk,chunk,chunk,full', kinds=dict(
          chunk=dict(attention='chunked', qk_norm=True),
          full=dict(position='none', attention_log_scale=0.1)),
      ffn='moe', moe=dict(router='sigmoid_plain', top_k=1, ffn='swiglu',
                          shared_experts=1, gate_inputs=True))


def _kind(chunked: bool, turned: bool, moe: bool, norm: bool, scale: float
          ) -> tuple[str, dict[str, Any]]:
  """Returns the name and the fields of a kind of layer.

  Args:
    chunked: whether a token sees its chunk alone.
    turned: whether queries and keys are turned by their positions.
    moe: whether the network is one of experts.
    norm: whether the queries and keys that are turned have a norm.
    scale: by how much queries that are not turned grow with the position.
  """
  name, kind = 'full', {}
  if chunked:
    name = 'chunk'
    kind['attention'] = 'chunked'
  if chunked != turned:  # mostly, both or neither
    name += '_turned' if turned else '_nope'
  if turned:
    kind['qk_norm'] = norm
  else:
    kind |= dict(position='none', attention_log_scale=scale)
  if not moe:
    name += '_dense'
    kind['ffn'] = DENSE_NETWORK
  return name, kind

class HF(llama.Family):
  model_type = 'llama4_text'
  architecture = 'Llama4ForCausalLM'
  names = llama.NAMES + llama.layers(*hf.under(
      'ffn', 'feed_forward', *llama.FFN,
      *hf.under('shared', 'shared_expert', *llama.FFN),
      ('router', 'DE', 'router.weight', 'E D'),
      ('gate|up', 'EDF', 'experts.gate_up_proj', 'E D 2F'),
      ('down', 'EFD', 'experts.down_proj', 'E F D')))
  fields = hf.fields(
      hidden_size=5120, num_hidden_layers=48, num_attention_heads=40,
      num_key_value_heads=8, head_dim=128, vocab_size=202048,
      max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=False,
      tie_word_embeddings=False, num_local_experts=16,
      router_aux_loss_coef=0.001) | {
          'd_ff': ('intermediate_size_mlp', 16384),
          'moe.d_ff': ('intermediate_size', 8192), 'moe.ffn': hf.SILU}
  only = dict(num_experts_per_tok=1)
  unread = ('router_jitter_noise',)  # transformers reads none.

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layers = fields['num_layers']
    layer_types.check_number('num_hidden_layers', layers)
    turned = layer_types.turned(reader, layers)

    # Which layers see a chunk alone.
    chunk = 0
    if not reader.is_null('attention_chunk_size'):
      chunk = reader('attention_chunk_size', 8192)
    types = layer_types.each(
        reader, 'layer_types', layers, (CHUNKED, layer_types.WHOLE))
    if not types:
      types = [CHUNKED if has_positions and chunk else layer_types.WHOLE
               for has_positions in turned]
    require(chunk or CHUNKED not in types, 'config.json has layers of '
            f'{CHUNKED} in layer_types, but no attention_chunk_size')

    # Which layers have experts.
    step = reader('interleave_moe_layer_step', 1)
    experts = range(step - 1, layers, step)
    if reader.has('moe_layers'):
      experts = reader.listed('moe_layers')

    # The kinds of layer.
    norm = reader('use_qk_norm', True)
    scale = reader('attn_scale', 0.1)
    if not reader('attn_temperature_tuning', True):
      scale = 0.0
    names, kinds = [], {}
    for n, (word, has_positions) in enumerate(zip(types, turned)):
      name, kind = _kind(chunked=word == CHUNKED, turned=bool(has_positions),
                         moe=n in experts, norm=norm, scale=scale)
      names.append(name)
      kinds[name] = kind
    rope = rope_fields.read(reader, theta=('rope_theta', 5e5),
                            interleaved=True, words=SCALINGS)
    return layer_types.shortest(names) | dict(
        kinds=kinds, attention_chunk=chunk, rope=rope,
        attention_log_from=reader('floor_scale', 8192))

  def write(self, c: ModelConfig) -> dict:
    types, turned, experts = [], [], []
    ropes, scales = [], []
    for n, layer in enumerate(c.layers(c.num_layers)):
      is_chunked = layer.attention == 'chunked'
      types.append(CHUNKED if is_chunked else layer_types.WHOLE)
      turned.append(int(layer.position == 'rope'))
      if layer.ffn == 'moe':
        experts.append(n)
      if layer.position == 'rope':
        ropes.append(layer)
      else:
        attention = layer.part(AttentionConfig)
        scales.append(attention.attention_log_scale)
    require(ropes, 'no layer of this model has positions: a llama4 config.json '
            'is of a model with some')
    scale = max(scales, default=0.0)
    tree = dict(
        layer_types=types, no_rope_layers=turned, moe_layers=experts,
        attention_chunk_size=c.attention_chunk or None,
        use_qk_norm=ropes[0].part(AttentionConfig).qk_norm,
        attn_temperature_tuning=scale > 0,
        floor_scale=c.part(AttentionConfig).attention_log_from,
        rope_parameters=rope_fields.write(ropes[0], words=SCALINGS))
    if scale:
      tree['attn_scale'] = scale
    return tree
