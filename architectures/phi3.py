"""Phi-3: LLaMA with one matrix for queries, keys and values, one for gate and
up, and a window in every layer (Abdin et al. 2024, section 2).

  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)

The matrices are fused in the published files alone: here each is by itself, as
in LLaMA. For 128K tokens, `model.rope.scaling=longrope` divides each frequency
by a factor that was searched for, one for rows of up to 4,096 tokens and one
for longer ones (LongRoPE: Ding et al. 2024).
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs.errors import require


class Phi3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='banded', attention_bias=False,
               ffn='swiglu', ffn_bias=False, tie_embeddings=False)


# rope_type: our scaling. Early files call longrope by the last two.
SCALINGS = {'default': 'none', 'longrope': 'longrope', 'su': 'longrope',
            'yarn': 'longrope'}

# Ids without which transformers takes 32,000, past the end of a small
# vocabulary.
IDS = [f'{name}_token_id' for name in ('bos', 'eos', 'pad')]


def _read(reader: hf.Reader, fields: dict) -> dict:
  window = reader('sliding_window', 0)
  rope = rope_fields.read(reader, fraction=('partial_rotary_factor', 1.0),
                          words=SCALINGS, original=4096)
  return dict(rope=rope, attention='banded' if window else 'global',
              sliding_window=window)


def _write(c: ModelConfig) -> dict:
  long = c.rope.scaling == 'longrope'
  require(not long or c.num_heads * c.head_dim == c.d_model,
          f'model.num_heads is {c.num_heads} of {c.head_dim} features, which '
          f'are not model.d_model {c.d_model}: transformers counts the factors '
          'of a phi3 by the width over the heads')
  return dict(rope_parameters=rope_fields.write(c, whole_heads=False,
                                                words=SCALINGS),
              sliding_window=c.sliding_window or None,
              **dict.fromkeys(IDS)) | (
                  dict(original_max_position_embeddings=c.rope.original_len)
                  if long else {})


HF = hf.HuggingFace(
    'phi3', 'Phi3ForCausalLM',
    names=(
        *llama.NAMES[:1], *llama.NAMES[-2:],
        *hf.under(
            'decoder/layers', 'model.layers.{n}',
            ('attention_norm/scale', 'D', 'input_layernorm.weight', 'D'),
            ('attention/query|key|value', 'DHK|DJK|DJK',
             'self_attn.qkv_proj.weight', 'HK+JK+JK D'),
            ('attention/out', 'HKD', 'self_attn.o_proj.weight', 'D HK'),
            ('ffn_norm/scale', 'D', 'post_attention_layernorm.weight', 'D'),
            ('ffn/gate|up', 'DF', 'mlp.gate_up_proj.weight', '2F D'),
            ('ffn/down', 'FD', 'mlp.down_proj.weight', 'D F'))),
    fields={
        'd_model': ('hidden_size', 3072),
        'num_layers': ('num_hidden_layers', 32),
        'num_heads': ('num_attention_heads', 32),
        'num_kv_heads': ('num_key_value_heads',
                         lambda fields: fields['num_heads']),
        'head_dim': ('head_dim',
                     lambda fields: fields['d_model'] // fields['num_heads']),
        'd_ff': ('intermediate_size', 8192),
        'vocab_size': ('vocab_size', 32064),
        'max_len': ('max_position_embeddings', 4096),
        'norm_eps': ('rms_norm_eps', 1e-5),
        'ffn': ('hidden_act', 'silu', hf.GATED),
        'tie_embeddings': ('tie_word_embeddings', False)},
    # Published files have these, Phi-4-mini's all: transformers has no such
    # biases, a window in every layer, and its own class in place of the
    # program that auto_map names.
    only=dict(attention_bias=False, mlp_bias=False, lm_head_bias=False,
              full_attn_mod=1, interpolate_factor=1),
    unread=('auto_map',),
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    heads={name: head for name, head in hf.heads(
        'Phi3', tokens='score').items() if name != 'span'})
