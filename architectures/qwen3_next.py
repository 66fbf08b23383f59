"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, and a
mixture of 512 narrow experts beside one that every token goes through (Qwen
Team 2025, "Qwen3-Next: Towards Ultimate Training & Inference Efficiency").

  a  = x + DeltaNet(n(x))                     in three layers of four
  a  = x + W_o (Attention(q, k, W_v m) * sigmoid(W_g m)),  m = n(x)
       q, k = n(W_q m), n(W_k m)              each head by itself; a quarter of
                                              its features turns
  x' = a + sum over the 10 best of 512 experts of g_e * SwiGLU_e(m)
         + sigmoid(w m) * SwiGLU(m),  m = n(a)
  g  = softmax(W_r m) of the chosen, divided by their sum
  n(x) = x / rms(x) * (1 + offset)

No bias anywhere. parts/recurrent/deltanet.py has the recurrence, whose 32
heads of values share 16 of queries and keys. A config.json may name layers
without experts (mlp_only_layers, decoder_sparse_step), whose network is
SwiGLU; the published one has none. The published files also hold a module that
predicts a second token (mtp), which is not here.
"""

from typing import Any

from architectures import llama
from architectures import qwen3_moe
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from configs.errors import require


class Qwen3Next(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', rope=dict(fraction=0.25), norm='rmsnorm_1p',
               block='pre_norm', attention='global', attention_bias=False,
               attention_gate='elementwise', qk_norm=True,
               pattern='linear,linear,linear,full',
               kinds=dict(linear=dict(mixer='deltanet'), full={}),
               ffn='moe', ffn_bias=False, tie_embeddings=False,
               moe=dict(router='topk', top_k=10, ffn='swiglu',
                        shared_experts=1, shared_gate=True))


def _read(reader: hf.Reader, fields: dict) -> dict[str, Any]:
  shared, width = reader('shared_expert_intermediate_size',
                         512), fields['moe.d_ff']
  require(shared % width == 0, 'config.json has '
          f'shared_expert_intermediate_size {shared}, which is no multiple of '
          f'moe_intermediate_size {width}: model.moe.shared_experts says how '
          'many times as wide as an expert the shared one is')
  hf.check_gates(fields)
  return layer_types.read_mixers(
      reader, fields['num_layers'], 'deltanet') | dict(
      rope=rope_fields.read(reader, fraction=('partial_rotary_factor', 0.25)),
      moe=dict(dispatch='dropless', shared_experts=shared // width))


def _write(c: ModelConfig) -> dict[str, Any]:
  require(c.has_experts, f'model.ffn is {c.ffn!r}, and no kind of layer has '
          'experts: a qwen3_next config.json is of a model with some')
  require(any(c.of_kind(name).mixer == 'attention' for name in c.kinds_used),
          'all layers are recurrences: transformers runs a qwen3_next with '
          'some layers of attention only')
  return layer_types.write_mixers(c) | dict(
      shared_expert_intermediate_size=c.moe.shared_experts * c.moe.d_ff,
      rope_parameters=rope_fields.write(c, whole_heads=False))


BASE = (
    *llama.NAMES[:1],
    *hf.under('decoder/layers', 'model.layers.{n}',
              ('attention_norm/offset', 'D', 'input_layernorm.weight', 'D'),
              ('ffn_norm/offset', 'D', 'post_attention_layernorm.weight', 'D')),
    ('decoder/final_norm/offset', 'D', 'model.norm.weight', 'D'),
    *llama.NAMES[-1:], *qwen3_moe.EXPERTS, *qwen3_moe.DENSE,
    *hf.under('decoder/layers/ffn', 'model.layers.{n}.mlp',
              ('shared/gate', 'DF', 'shared_expert.gate_proj.weight', 'F D'),
              ('shared/up', 'DF', 'shared_expert.up_proj.weight', 'F D'),
              ('shared/down', 'FD', 'shared_expert.down_proj.weight', 'D F'),
              ('shared_gate', 'DU', 'shared_expert_gate.weight', 'U D')))
ATTENTION = hf.under(
    'attention', 'self_attn',
    *hf.dense('query|output_gate', 'DHK', 'q_proj', 'H2K D'),
    *hf.dense('key', 'DJK', 'k_proj', 'JK D'),
    *hf.dense('value', 'DJK', 'v_proj', 'JK D'),
    *hf.dense('out', 'HKD', 'o_proj', 'D HK'),
    ('query_norm/offset', 'K', 'q_norm.weight', 'K'),
    ('key_norm/offset', 'K', 'k_norm.weight', 'K'))


def _mixer(c: ModelConfig) -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's mixer. Those of a recurrence go through the
  heads of keys: the query, the key, the values and gates of each."""
  if c.mixer != 'deltanet':
    return tuple(row for row in ATTENTION
                 if c.attention_bias or not row[2].endswith('bias'))
  return hf.under(
      'attention', 'linear_attn',
      ('query|key|value|output_gate', 'DJK|DJK|DHU|DHU',
       'in_proj_qkvz.weight', 'J(K+K+RU+RU) D'),
      ('rate|decay', 'DH', 'in_proj_ba.weight',
       f'J={c.deltanet.key_heads}(R+R) D'),
      ('query_conv|key_conv|value_conv', 'WJK|WJK|WHU', 'conv1d.weight',
       'JK+JK+HU 1 W'),
      ('decay_scale', 'H', 'A_log', 'H'), ('decay_bias', 'H', 'dt_bias', 'H'),
      ('out_norm/scale', 'U', 'norm.weight', 'U'),
      ('out', 'HUD', 'out_proj.weight', 'D HU'))


HF = hf.HuggingFace(
    'qwen3_next', 'Qwen3NextForCausalLM',
    names=lambda c: BASE + hf.by_block(c, 'model.layers.{n}', _mixer),
    fields={
        'd_model': ('hidden_size', 2048),
        'num_layers': ('num_hidden_layers', 48),
        'num_heads': ('num_attention_heads', 16),
        'num_kv_heads': ('num_key_value_heads', 2),
        'head_dim': ('head_dim', 256),
        'd_ff': ('intermediate_size', 5632),
        'vocab_size': ('vocab_size', 151936),
        'max_len': ('max_position_embeddings', 32768),
        'norm_eps': ('rms_norm_eps', 1e-6),
        'attention_bias': ('attention_bias', False),
        'tie_embeddings': ('tie_word_embeddings', False),
        'deltanet.key_heads': ('linear_num_key_heads', 16),
        'deltanet.value_heads': ('linear_num_value_heads', 32),
        'deltanet.key_dim': ('linear_key_head_dim', 128),
        'deltanet.value_dim': ('linear_value_head_dim', 128),
        'deltanet.conv': ('linear_conv_kernel_dim', 4),
        # Of the convolutions too, which are SiLU's here.
        'moe.ffn': ('hidden_act', 'silu', {'silu': 'swiglu'}),
        'moe.d_ff': ('moe_intermediate_size', 512),
        'moe.num_experts': ('num_experts', 512),
        'moe.top_k': ('num_experts_per_tok', 10),
        'moe.normalize_gates': ('norm_topk_prob', True),
        'moe.balance_weight': ('router_aux_loss_coef', 0.001)},
    only=dict(use_sliding_window=False),
    read=_read, write=_write, tied=llama.HF.tied, spellings=llama.HF.spellings,
    ignored=llama.HF.ignored,
    optional={'module that predicts a second token': r'mtp\..*'},
    heads=hf.heads('Qwen3Next', tokens='score', span=(
        'model.', 'transformer.')))
