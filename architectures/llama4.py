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

from architectures import llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require
from common.kinds import DENSE

CHUNKED = 'chunked_attention'
CHUNK = dict(attention='chunked', qk_norm=True)
FULL = dict(position='none', attention_log_scale=0.1)
# A norm follows the turning there, so the temperatures of others would vanish.
SCALINGS = {name: rope_fields.SCALINGS[name]
            for name in ('default', 'linear', 'dynamic', 'llama3')}


class Llama4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(interleaved=True), qk_norm_scale=False,
      pattern='chunk,chunk,chunk,full', kinds=dict(chunk=CHUNK, full=FULL),
      ffn='moe', moe=dict(router='sigmoid_plain', top_k=1, ffn='swiglu',
                          shared_experts=1, gate_inputs=True))


def _read(reader: hf.Reader, fields: dict) -> dict:
  layers = fields['num_layers']
  layer_types.check_number('num_hidden_layers', layers)
  turned = layer_types.turned(reader, layers)
  step = reader('interleave_moe_layer_step', 1)
  chunk = (0 if reader.is_null('attention_chunk_size') else
           reader('attention_chunk_size', 8192))
  types = layer_types.each(
      reader, 'layer_types', layers, (CHUNKED, layer_types.WHOLE)) or [
          CHUNKED if x and chunk else layer_types.WHOLE for x in turned]
  require(chunk or CHUNKED not in types, 'config.json has layers of '
          f'{CHUNKED} in layer_types, but no attention_chunk_size')
  experts = reader.listed('moe_layers') if reader.has(
      'moe_layers') else range(step - 1, layers, step)
  norm, grows = reader('use_qk_norm', True), reader(
      'attn_temperature_tuning', True)
  scale = reader('attn_scale', 0.1) * grows
  names, kinds = [], {}
  for n, (word, x) in enumerate(zip(types, turned)):
    local, moe = word == CHUNKED, n in experts
    names.append(('chunk' if local else 'full') + ('' if local == bool(x) else (
        '_turned' if x else '_nope')) + '_dense' * (not moe))
    kinds[names[-1]] = (
        dict(attention='chunked') if local else {}) | (
            dict(qk_norm=norm) if x else dict(
                position='none', attention_log_scale=scale)) | (
                    {} if moe else dict(ffn=DENSE))
  return dict(layer_types.shortest(names), kinds=kinds, attention_chunk=chunk,
              attention_log_from=reader('floor_scale', 8192),
              rope=rope_fields.read(reader, theta=('rope_theta', 5e5),
                                    interleaved=True, words=SCALINGS))


def _write(c: ModelConfig) -> dict:
  layers = c.layers(c.num_layers)
  turned = [layer.position == 'rope' for layer in layers]
  require(any(turned), 'no layer of this model has positions: a llama4 '
          'config.json is of a model with some')
  scale = max((layer.part(AttentionConfig).attention_log_scale
               for layer in layers if layer.position != 'rope'), default=0.0)
  rope = next(layer for layer in layers if layer.position == 'rope')
  return dict(
      layer_types=[CHUNKED if layer.attention == 'chunked' else
                   layer_types.WHOLE for layer in layers],
      no_rope_layers=[int(x) for x in turned],
      moe_layers=[n for n, layer in enumerate(layers) if layer.ffn == 'moe'],
      attention_chunk_size=c.attention_chunk or None,
      use_qk_norm=rope.part(AttentionConfig).qk_norm,
      attn_temperature_tuning=scale > 0,
      floor_scale=c.part(AttentionConfig).attention_log_from,
      rope_parameters=rope_fields.write(rope, words=SCALINGS)) | (
          dict(attn_scale=scale) if scale else {})


HF = hf.HuggingFace(
    'llama4_text', 'Llama4ForCausalLM',
    names=llama.NAMES + llama.layers(*hf.under(
        'ffn', 'feed_forward', *llama.FFN,
        *hf.under('shared', 'shared_expert', *llama.FFN),
        ('router', 'DE', 'router.weight', 'E D'),
        ('gate|up', 'EDF', 'experts.gate_up_proj', 'E D 2F'),
        ('down', 'EFD', 'experts.down_proj', 'E F D'))),
    fields=hf.fields(
        hidden_size=5120, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, head_dim=128, vocab_size=202048,
        max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=False,
        tie_word_embeddings=False, num_local_experts=16,
        router_aux_loss_coef=0.001) | {
            'd_ff': ('intermediate_size_mlp', 16384),
            'moe.d_ff': ('intermediate_size', 8192), 'moe.ffn': hf.SILU},
    only=dict(num_experts_per_tok=1),
    unread=('router_jitter_noise',),  # transformers reads none
    read=_read, write=_write, **llama.FILES)
