"""OLMoE: LLaMA whose feed-forward networks are mixtures of many narrow experts,
with norms of queries and keys (Muennighoff et al. 2024, section 2).

  q, k = RMSNorm(W_q n), RMSNorm(W_k n)   over all heads, then turned
  a    = x + W_o Attention(q, k, W_v n),  n = RMSNorm(x)
  x'   = a + sum over the 8 best of 64 experts of g_e * SwiGLU_e(m)
  g    = softmax(W_r m), not normalised again over the chosen; m = RMSNorm(a)

An expert is half as wide as the model. No expert has a capacity, no expert is
shared, and nothing has a bias. `moe.normalize_gates` is norm_topk_prob of
config.json. Its clip_qkv, a bound on queries, keys and values, is null in the
published models, and is not here.
"""

from architectures import llama
from architectures import phi3
from architectures import qwen3_moe
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs.errors import require


class OLMoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False, qk_norm=True,
               qk_norm_over='projection', ffn='moe', ffn_bias=False,
               tie_embeddings=False,
               moe=dict(router='topk', top_k=8, ffn='swiglu',
                        normalize_gates=False))


def _read(reader: hf.Reader, fields: dict) -> dict:
  hf.check_gates(fields)
  # transformers has no other: its norms are as wide as the model.
  reader.must(head_dim=fields['d_model'] // fields['num_heads'])
  return dict(rope=rope_fields.read(reader), moe=dict(dispatch='dropless'))


def _write(c: ModelConfig) -> dict:
  require(c.ffn == 'moe', f'model.ffn is {c.ffn!r}: an olmoe config.json can '
          'only say moe')
  require(c.num_heads * c.head_dim == c.d_model, f'model.head_dim is '
          f'{c.head_dim}: an olmoe config.json has only model.d_model / '
          f'model.num_heads, {c.d_model} / {c.num_heads}')
  return dict(rope_parameters=rope_fields.write(c),
              intermediate_size=c.moe.d_ff,
              # Left out, a text ends at 50,279 and is padded with 1.
              **dict.fromkeys(phi3.IDS))


HF = hf.HuggingFace(
    'olmoe', 'OlmoeForCausalLM',
    names=llama.NAMES + qwen3_moe.EXPERTS + hf.under(
        'decoder/layers/attention', 'model.layers.{n}.self_attn',
        ('query_norm/scale', 'U', 'q_norm.weight', 'U'),
        ('key_norm/scale', 'U', 'k_norm.weight', 'U')),
    fields={
        'd_model': ('hidden_size', 2048),
        'num_layers': ('num_hidden_layers', 16),
        'num_heads': ('num_attention_heads', 16),
        'num_kv_heads': ('num_key_value_heads',
                         lambda fields: fields['num_heads']),
        'd_ff': ('intermediate_size', 2048),
        'vocab_size': ('vocab_size', 50304),
        'max_len': ('max_position_embeddings', 4096),
        'norm_eps': ('rms_norm_eps', 1e-5),
        'attention_bias': ('attention_bias', False),
        'tie_embeddings': ('tie_word_embeddings', False),
        'moe.ffn': ('hidden_act', 'silu', hf.GATED),
        'moe.num_experts': ('num_local_experts|num_experts', 64),
        'moe.top_k': ('num_experts_per_tok', 8),
        'moe.normalize_gates': ('norm_topk_prob', False),
        'moe.balance_weight': ('router_aux_loss_coef', 0.01)},
    only=dict(clip_qkv=None),
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored)
