"""Mixtral: LLaMA whose feed-forward network is a mixture of experts (Jiang et
al. 2024, section 2.1).

  y = sum over the 2 chosen experts of softmax(top2(W_r x))_e * SwiGLU_e(x)

No expert has a capacity: no token is dropped (what is trained with one, and
evaluated without, is exported too). The gates are renormalised over
the two choices, which equals a softmax over their two logits alone. A sliding
window (Mistral 7B) is an option: `model.attention=banded`.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs.errors import require


class Mixtral(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False, ffn='moe',
               ffn_bias=False, tie_embeddings=False,
               moe=dict(router='topk', top_k=2, ffn='swiglu'))


def _read(reader: hf.Reader, fields: dict) -> dict:
  hf.check_gates(fields)
  window = reader('sliding_window', 0)
  return dict(rope=rope_fields.read(reader, theta=('rope_theta', 1e6)),
              attention='banded' if window else 'global',
              sliding_window=window, moe=dict(dispatch='dropless'))


def _write(c: ModelConfig) -> dict:
  require(c.ffn == 'moe', f'model.ffn is {c.ffn!r}: a mixtral config.json can '
          'only say moe')
  return dict(rope_parameters=rope_fields.write(c),
              intermediate_size=c.moe.d_ff,
              sliding_window=c.sliding_window or None)


HF = hf.HuggingFace(
    'mixtral', 'MixtralForCausalLM',
    names=llama.NAMES + hf.under(
        'decoder/layers/ffn', 'model.layers.{n}.block_sparse_moe',
        ('router', 'DE', 'gate.weight', 'E D'),
        ('gate', 'EDF', 'experts.{e}.w1.weight', 'F D'),
        ('down', 'EFD', 'experts.{e}.w2.weight', 'D F'),
        ('up', 'EDF', 'experts.{e}.w3.weight', 'F D')),
    fields={
        'd_model': ('hidden_size', 4096),
        'num_layers': ('num_hidden_layers', 32),
        'num_heads': ('num_attention_heads', 32),
        'num_kv_heads': ('num_key_value_heads', 8),
        'head_dim': ('head_dim',
                     lambda fields: fields['d_model'] // fields['num_heads']),
        'd_ff': ('intermediate_size', 14336),
        'vocab_size': ('vocab_size', 32000),
        'max_len': ('max_position_embeddings', 131072),
        'norm_eps': ('rms_norm_eps', 1e-5),
        'tie_embeddings': ('tie_word_embeddings', False),
        'moe.ffn': ('hidden_act', 'silu', hf.GATED),
        'moe.num_experts': ('num_local_experts', 8),
        'moe.top_k': ('num_experts_per_tok', 2),
        'moe.jitter': ('router_jitter_noise', 0.0),
        'moe.balance_weight': ('router_aux_loss_coef', 0.001)},
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored, heads=hf.heads('Mixtral', tokens='score'))
