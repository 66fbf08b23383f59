"""Qwen3-MoE: Qwen3 whose feed-forward networks are mixtures of many narrow
experts (Qwen Team 2025, arXiv 2505.09388, section 2).

  q, k = RMSNorm(x W_q), RMSNorm(x W_k)   each head by itself, before it turns
  y    = sum over the 8 best of 128 experts of g_e * SwiGLU_e(n)
  g    = softmax(W_r n) of the chosen, divided by their sum

No shared expert, no bias, no capacity; heads are wider than width / heads. The
report balances the experts over the whole batch (its section 2), which the
switch loss does here: its means are over all that goes through the model at
once. `moe.normalize_gates=False` is norm_topk_prob of config.json.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts import kinds as layer_kinds
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs import kinds
from configs.errors import require


class Qwen3MoE(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False, qk_norm=True,
               ffn='moe', ffn_bias=False, tie_embeddings=False,
               moe=dict(router='topk', top_k=8, ffn='swiglu'))


def _read(reader: hf.Reader, fields: dict) -> dict:
  every = reader('decoder_sparse_step', 1)
  layers = fields['num_layers']
  require(layers % every == 0, f'config.json has decoder_sparse_step {every}, '
          f'which does not divide num_hidden_layers {layers}')
  layer_types.check_number('decoder_sparse_step', every)
  hf.check_gates(fields)
  require(not reader.listed('mlp_only_layers'), 'config.json has '
          'mlp_only_layers, which is only known here where it is empty: '
          'decoder_sparse_step says which layers have experts')
  return kinds.with_experts({}, every) | dict(
      rope=rope_fields.read(reader), moe=dict(dispatch='dropless'))


def _write(c: ModelConfig) -> dict:
  require(c.has_experts, f'model.ffn is {c.ffn!r}: a qwen3_moe config.json can '
          'only say moe')
  return dict(rope_parameters=rope_fields.write(c), mlp_only_layers=[],
              decoder_sparse_step=layer_kinds.experts_every(c))


NORMS = hf.under(
    'decoder/layers/attention', 'model.layers.{n}.self_attn',
    ('query_norm/scale', 'K', 'q_norm.weight', 'K'),
    ('key_norm/scale', 'K', 'k_norm.weight', 'K'))
EXPERTS = hf.under(
    'decoder/layers/ffn', 'model.layers.{n}.mlp',
    ('router', 'DE', 'gate.weight', 'E D'),
    ('gate', 'EDF', 'experts.{e}.gate_proj.weight', 'F D'),
    ('up', 'EDF', 'experts.{e}.up_proj.weight', 'F D'),
    ('down', 'EFD', 'experts.{e}.down_proj.weight', 'D F'))
DENSE = hf.under(
    'decoder/layers/ffn', 'model.layers.{n}.mlp',
    ('gate', 'DF', 'gate_proj.weight', 'F D'),
    ('up', 'DF', 'up_proj.weight', 'F D'),
    ('down', 'FD', 'down_proj.weight', 'D F'))

HF = hf.HuggingFace(
    'qwen3_moe', 'Qwen3MoeForCausalLM',
    names=llama.NAMES + NORMS + EXPERTS + DENSE,
    fields={
        'd_model': ('hidden_size', 2048),
        'num_layers': ('num_hidden_layers', 24),
        'num_heads': ('num_attention_heads', 32),
        'num_kv_heads': ('num_key_value_heads', 4),
        'head_dim': ('head_dim',
                     lambda fields: fields['d_model'] // fields['num_heads']),
        'd_ff': ('intermediate_size', 6144),
        'vocab_size': ('vocab_size', 151936),
        'max_len': ('max_position_embeddings', 32768),
        'norm_eps': ('rms_norm_eps', 1e-6),
        'attention_bias': ('attention_bias', False),
        'tie_embeddings': ('tie_word_embeddings', False),
        'moe.ffn': ('hidden_act', 'silu', hf.GATED),
        'moe.d_ff': ('moe_intermediate_size', 768),
        'moe.num_experts': ('num_local_experts|num_experts', 128),
        'moe.top_k': ('num_experts_per_tok', 8),
        'moe.normalize_gates': ('norm_topk_prob', False),
        'moe.balance_weight': ('router_aux_loss_coef', 0.001)},
    only=dict(use_sliding_window=False),
    unread=('sliding_window', 'max_window_layers'),
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored, heads=hf.heads(
        'Qwen3Moe', tokens='score', span=('model.', 'transformer.')))
