"""LLaMA: a decoder of RMSNorm, rotary positions and SwiGLU (Touvron et al.
2023a, section 2.2), with grouped heads from LLaMA 2 70B on (2023b; Llama 3:
Dubey et al. 2024).

  x_0 = E[tokens]
  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Longer contexts: `model.rope.scaling` linear, ntk, dynamic, llama3, yarn or
longrope, by `model.rope.factor`.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs.errors import require


class LLaMA(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False,
               ffn='swiglu', ffn_bias=False, tie_embeddings=False)


def _read(reader: hf.Reader, fields: dict) -> dict:
  return dict(rope=rope_fields.read(reader))


def _write(c: ModelConfig) -> dict:
  require(c.d_model % c.num_heads == 0,
          f'model.num_heads is {c.num_heads}, which does not divide '
          f'model.d_model {c.d_model}: transformers refuses such a llama')
  return dict(rope_parameters=rope_fields.write(c))


ATTENTION = (
    *hf.dense('attention/query', 'DHK', 'self_attn.q_proj', 'HK D'),
    *hf.dense('attention/key', 'DJK', 'self_attn.k_proj', 'JK D'),
    *hf.dense('attention/value', 'DJK', 'self_attn.v_proj', 'JK D'),
    *hf.dense('attention/out', 'HKD', 'self_attn.o_proj', 'D HK'))
# All but the feed-forward networks, as Mixtral has them too.
NAMES = (
    ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    *hf.under(
        'decoder/layers', 'model.layers.{n}',
        ('attention_norm/scale', 'D', 'input_layernorm.weight', 'D'),
        *ATTENTION,
        ('ffn_norm/scale', 'D', 'post_attention_layernorm.weight', 'D')),
    ('decoder/final_norm/scale', 'D', 'model.norm.weight', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
FFN = hf.under(
    'decoder/layers/ffn', 'model.layers.{n}.mlp',
    *hf.dense('gate', 'DF', 'gate_proj', 'F D'),
    *hf.dense('up', 'DF', 'up_proj', 'F D'),
    *hf.dense('down', 'FD', 'down_proj', 'D F'))

HF = hf.HuggingFace(
    'llama', 'LlamaForCausalLM',
    names=NAMES + FFN,
    fields={
        'd_model': ('hidden_size', 4096),
        'num_layers': ('num_hidden_layers', 32),
        'num_heads': ('num_attention_heads', 32),
        'num_kv_heads': ('num_key_value_heads',
                         lambda fields: fields['num_heads']),
        'head_dim': ('head_dim',
                     lambda fields: fields['d_model'] // fields['num_heads']),
        'd_ff': ('intermediate_size', 11008),
        'vocab_size': ('vocab_size', 32000),
        'max_len': ('max_position_embeddings', 2048),
        'norm_eps': ('rms_norm_eps', 1e-6),
        'ffn': ('hidden_act', 'silu', hf.GATED),
        'attention_bias': ('attention_bias', False),
        'ffn_bias': ('mlp_bias', False),
        'tie_embeddings': ('tie_word_embeddings', False)},
    only=dict(rope_interleaved=False),
    unread=('is_llama_config',),  # of SmolLM2
    read=_read, write=_write,
    tied={'lm_head.weight': 'model.embed_tokens.weight'},
    spellings=(('model.', ''),),
    ignored=(r'.*\.rotary_emb\.inv_freq',),
    heads=hf.heads('Llama', tokens='score', span=('model.', 'transformer.')))
