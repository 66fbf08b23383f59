"""Nemotron-H: Mamba-2, few layers of attention without positions, and networks
of squared ReLU, each with its own norm (NVIDIA 2025, arXiv 2504.03624; with
experts Nemotron 3 Nano, arXiv 2512.20848).

  x' = x + Mamba2(n(x))                         written M
  x' = x + W_o Attention(q, k, v)               written *
  x' = x + W_down relu(W_up n(x))^2             written -
  x' = x + shared(n(x)) + gate_scale * sum over the 6 best of 128 experts of
           g_e E_e(n(x))                        written E, as in DeepSeek-V3;
           Super: W_up sum over the 22 best of 512 of g_e E_e(W_down n(x))
  logits = n(x_N) W                             n is RMSNorm

What transformers calls a layer is one of these. A layer here is M or *, and
with it the network that follows, which is the same function: M-M*- has three
layers, of kinds mamba_mlp, mamba and attention_mlp. A network that follows no
M or * is refused.
"""

from collections.abc import Sequence
from typing import Any

from architectures import deepseek_v2, deepseek_v3, llama, mamba2, qwen3_next
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder
from common.errors import require

MAMBA, ATTENTION, MLP, MOE = 'M', '*', '-', 'E'
WORDS = {layer_types.LINEAR: MAMBA, layer_types.WHOLE: ATTENTION, 'mlp': MLP,
         'moe': MOE, 'mamba': MAMBA, 'attention': ATTENTION}
KINDS = {
    'mamba': dict(mixer='mamba2', ffn='none'),
    'mamba_mlp': dict(mixer='mamba2', ffn='relu2'),
    'mamba_moe': dict(mixer='mamba2', ffn='moe'),
    'attention': dict(ffn='none'),
    'attention_mlp': dict(ffn='relu2'),
    'attention_moe': dict(ffn='moe')}
SHARED = 'moe_shared_expert_intermediate_size'  # a field of config.json


def layers(pattern: Sequence[str]) -> dict[str, Any]:
  """Returns the fields of the layers that a pattern of M, *, - and E names."""
  names: list[str] = []
  for letter in pattern:
    if letter == MAMBA:
      names.append('mamba')
    elif letter == ATTENTION:
      names.append('attention')
    else:
      require(names and '_' not in names[-1], 'the layers '
              f'{"".join(pattern)} have a network that follows no Mamba-2 and '
              'no attention: here it belongs to the layer with one of these')
      names[-1] += '_mlp' if letter == MLP else '_moe'
  return layer_types.named(names, KINDS) | dict(num_layers=len(names))


class NemotronH(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(
      position='none', norm='rmsnorm', block='pre_norm', attention='global',
      attention_bias=False, ffn='relu2', ffn_bias=False, tie_embeddings=False,
      pattern='mamba_mlp,mamba,mamba_mlp,attention_mlp',
      kinds={name: KINDS[name] for name in (
          'mamba_mlp', 'mamba', 'attention_mlp')},
      moe=dict(router='sigmoid', top_k=6, ffn='relu2', shared_experts=2))


def _mixer(c: ModelConfig) -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's mixer."""
  if c.mixer == 'mamba2':
    return hf.under('attention', 'mixer', *mamba2.MIXER)
  return hf.under(
      'attention', 'mixer', ('query', 'DHK', 'q_proj.weight', 'HK D'),
      ('key', 'DJK', 'k_proj.weight', 'JK D'),
      ('value', 'DJK', 'v_proj.weight', 'JK D'),
      ('out', 'HKD', 'o_proj.weight', 'D HK'))


LAYER = 'backbone.layers.{m}'  # m counts parts with a norm
NAMES = (
    ('embed/tokens', 'VD', 'backbone.embeddings.weight', 'V D'),
    *hf.under(
        'decoder/layers', LAYER, ('attention_norm/scale', 'D', 'norm.weight',
                                  'D'),
        ('ffn_norm/scale', 'D', 'norm.weight', 'D'), *hf.under(
            'ffn', 'mixer', *llama.FFN, *llama.experts(), *deepseek_v2.SHARED,
            *hf.dense('latent_down', 'DU', 'fc1_latent_proj', 'U D'),
            *hf.dense('latent_up', 'UD', 'fc2_latent_proj', 'D U'),
            ('router_bias', 'E', 'gate.e_score_correction_bias', 'E'))),
    ('decoder/final_norm/scale', 'D', 'backbone.norm_f.weight', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'))


def _letters(reader: hf.Reader) -> list[str]:
  """Returns the letters of what transformers calls layers."""
  reader.passes('num_hidden_layers', 'hybrid_override_pattern')
  if reader.has('layers_block_type'):
    types = reader.listed('layers_block_type')
    layer_types.each(reader, 'layers_block_type', len(types), WORDS)
    return [WORDS[word] for word in types]
  letters = list(reader('hybrid_override_pattern', 'ME*-'))
  require(set(letters) <= set(WORDS.values()), 'config.json has '
          f'hybrid_override_pattern {"".join(letters)!r}: its letters are '
          'M, *, - and E')
  return letters

class HF(hf.HuggingFace):
  model_type = 'nemotron_h'
  architecture = 'NemotronHForCausalLM'
  fields = hf.fields(
      hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
      head_dim=128, intermediate_size=21504, vocab_size=131072,
      max_position_embeddings=4096, layer_norm_epsilon=1e-5,
      moe_intermediate_size=7688, num_experts_per_tok=2, topk_group=1,
      routed_scaling_factor=1.0, norm_topk_prob=True, n_routed_experts=8,
      n_group=1) | {
          'moe.latent_dim': ('moe_latent_size', 0),
          'mamba2.heads': ('mamba_num_heads', 128),
          'mamba2.head_dim': ('mamba_head_dim', 64),
          'mamba2.groups': ('n_groups', 8),
          'mamba2.state': ('ssm_state_size', 128),
          'mamba2.conv': ('conv_kernel', 4),
          'mamba2.conv_bias': ('use_conv_bias', True),
          # A bound of every step, and not only of the first weights.
          'mamba2.least_step': ('time_step_min', 0.001)}
  only = dict(tie_word_embeddings=False, use_bias=False, sliding_window=None,
              mlp_hidden_act='relu2', mamba_hidden_act='silu')
  unread = ('chunk_size', 'expand', 'mamba_proj_bias',
            'mamba_ssm_cache_dtype', 'moe_shared_expert_overlap',
            'mtp_hybrid_override_pattern', 'mtp_layers_block_type',
            'n_shared_experts', 'num_logits_to_keep',
            'partial_rotary_factor', 'rescale_prenorm_residual',
            'residual_in_fp32', 'rope_theta', 'time_step_floor',
            'time_step_limit', 'time_step_max', 'use_mamba_kernels')
  spellings = (('backbone.', 'model.'),)
  module = ('backbone.', 'model.')
  optional = qwen3_next.HF.optional

  def names_of(self, c: ModelConfig) -> tuple[hf.Row, ...]:
    return NAMES + hf.by_block(c, LAYER, _mixer)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    letters = _letters(reader)
    require(letters, 'config.json has no layers: layers_block_type must name '
            'some')
    layer_types.check_number('layers', len(letters))
    deepseek_v3.note_mtp(reader)
    if MOE not in letters:
      reader.passes(SHARED)
      return layers(letters)
    hf.check_gates(fields)
    times = hf.shared_experts(reader, SHARED, 7688, fields['moe.d_ff'])
    return layers(letters) | dict(moe=dict(shared_experts=times))

  def write(self, c: ModelConfig) -> dict:
    types: list[str] = []
    for layer in c.layers(c.num_layers):
      is_linear = layer.mixer == 'mamba2'
      types.append(layer_types.LINEAR if is_linear else layer_types.WHOLE)
      if layer.ffn == 'moe':
        types.append('moe')
      elif layer.ffn != 'none':
        types.append('mlp')
    tree = dict(layers_block_type=types, num_nextn_predict_layers=0)
    if c.has_experts:
      moe = c.part(MoEConfig)
      tree['moe_latent_size'] = moe.latent_dim or None
      tree[SHARED] = moe.shared_experts * moe.d_ff
    return tree

  def check(self, c: ModelConfig) -> None:
    layer_types.check_attention(c)
