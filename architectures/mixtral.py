"""Mixtral: LLaMA whose feed-forward network is a mixture of experts (Jiang et
al. 2024, section 2.1).

  y = sum over the 2 chosen experts of softmax(top2(W_r x))_e * SwiGLU_e(x)

No expert has a capacity: no token is dropped (what is trained with one, and
evaluated without, is exported too). The gates are renormalised over
the two choices, which equals a softmax over their two logits alone. A sliding
window (Mistral 7B) is an option: `model.attention=banded`.
"""

from architectures import llama
from architectures.parts import hf as common
from architectures.parts.skeletons import Decoder
from configs.errors import require


class Mixtral(Decoder):
  """tokens [B, L] -> Output; see Decoder."""


HF_MODEL = 'mixtral', 'MixtralForCausalLM'
HF_SPELLINGS = llama.HF_SPELLINGS
HF_TIED = llama.HF_TIED
HF_IGNORED = llama.HF_IGNORED
HF_NAMES = llama.HF_ATTENTION + (
    ('decoder/layers/ffn/router', 'DE',
     'model.layers.{n}.block_sparse_moe.gate.weight', 'E D'),
    ('decoder/layers/ffn/gate', 'EDF',
     'model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight', 'F D'),
    ('decoder/layers/ffn/down', 'EFD',
     'model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight', 'D F'),
    ('decoder/layers/ffn/up', 'EDF',
     'model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight', 'F D'),
)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a mixtral config.json gives."""
  heads = hf('num_attention_heads', 32)
  require(hf('num_experts_per_tok', 2) > 1, 'config.json has '
          'num_experts_per_tok 1, whose gate there is always 1: here the gate '
          'of a single choice is its probability, so that its router learns')
  d_model = hf('hidden_size', 4096)
  d_ff = hf('intermediate_size', 14336)
  return dict(
      d_model=d_model, num_layers=hf('num_hidden_layers', 32),
      num_heads=heads, num_kv_heads=hf('num_key_value_heads', 8),
      head_dim=hf('head_dim', d_model // heads), d_ff=d_ff,
      vocab_size=hf('vocab_size', 32000),
      max_len=hf('max_position_embeddings', 131072), norm='rmsnorm',
      norm_eps=hf('rms_norm_eps', 1e-5), position='rope',
      rope=common.read_rope(hf, theta=('rope_theta', 1e6)), ffn='moe',
      **common.read_window(hf), attention_bias=False, ffn_bias=False,
      tie_embeddings=hf('tie_word_embeddings', False),
      moe=dict(num_experts=hf('num_local_experts', 8),
               top_k=hf('num_experts_per_tok', 2), router='topk',
               ffn=hf.choose('hidden_act', 'silu', common.GATED), every=1,
               dispatch='dropless', capacity_factor=0.0,
               jitter=hf('router_jitter_noise', 0.0),
               balance_weight=hf('router_aux_loss_coef', 0.001)))


def to_hf_config(c) -> dict:
  """Returns what a mixtral config.json says of the config `c`."""
  require(c.ffn == 'moe', f'model.ffn is {c.ffn!r}: a mixtral config.json can '
          'only say moe')
  return dict(
      hidden_size=c.d_model, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim, intermediate_size=c.moe.d_ff,
      vocab_size=c.vocab_size, max_position_embeddings=c.max_len,
      rms_norm_eps=c.norm_eps, rope_parameters=common.write_rope(c),
      sliding_window=common.write_window(c),
      tie_word_embeddings=c.tie_embeddings,
      hidden_act=common.theirs(common.GATED, c.moe.ffn),
      num_local_experts=c.moe.num_experts, num_experts_per_tok=c.moe.top_k,
      router_jitter_noise=c.moe.jitter,
      router_aux_loss_coef=c.moe.balance_weight)
