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
    f'{name}{network}': mixer | dict(ffn=ffn)
    for name, mixer in (('mamba', dict(mixer='mamba2')), ('attention', {}))
    for network, ffn in (('', 'none'), ('_mlp', 'relu2'), ('_moe', 'moe'))}


def layers(pattern: Sequence[str]) -> dict[str, Any]:
  """Returns the fields of the layers that a pattern of M, *, - and E names."""
  names: list[str] = []
  for letter in pattern:
    if letter in (MAMBA, ATTENTION):
      names.append('mamba' if letter == MAMBA else 'attention')
      continue
    require(names and '_' not in names[-1], f'the layers {"".join(pattern)} '
            'have a network that follows no Mamba-2 and no attention: here it '
            'belongs to the layer with one of these')
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


def _read(reader: hf.Reader, fields: dict) -> dict:
  reader.passes('num_hidden_layers', 'hybrid_override_pattern')
  if reader.has('layers_block_type'):
    types = reader.listed('layers_block_type')
    layer_types.each(reader, 'layers_block_type', len(types), WORDS)
    letters = [WORDS[word] for word in types]
  else:
    letters = list(reader('hybrid_override_pattern', 'ME*-'))
    require(set(letters) <= set(WORDS.values()), 'config.json has '
            f'hybrid_override_pattern {"".join(letters)!r}: its letters are '
            'M, *, - and E')
  require(letters, 'config.json has no layers: layers_block_type must name '
          'some')
  layer_types.check_number('layers', len(letters))
  deepseek_v3.note_mtp(reader)
  shared = 'moe_shared_expert_intermediate_size'
  if MOE not in letters:
    reader.passes(shared)
    return layers(letters)
  hf.check_gates(fields)
  return layers(letters) | dict(moe=dict(shared_experts=hf.shared_experts(
      reader, shared, 7688, fields['moe.d_ff'])))


def _write(c: ModelConfig) -> dict:
  types: list[str] = []
  for kind in c.layer_kinds(c.num_layers):
    layer = c.of_kind(kind.name)
    types.append(layer_types.LINEAR if layer.mixer == 'mamba2'
                 else layer_types.WHOLE)
    types += {'none': [], 'moe': ['moe']}.get(layer.ffn, ['mlp'])
  moe = c.find(MoEConfig)
  return dict(layers_block_type=types, num_nextn_predict_layers=0) | (dict(
      moe_latent_size=moe.latent_dim or None,
      moe_shared_expert_intermediate_size=moe.shared_experts * moe.d_ff)
                                                    if c.has_experts else {})


def _mixer(c: ModelConfig) -> tuple[hf.Row, ...]:
  if c.mixer == 'mamba2':
    return hf.under('attention', 'mixer', *mamba2.MIXER)
  return tuple((ours, axes, theirs.replace('self_attn', 'mixer'), their_axes)
               for ours, axes, theirs, their_axes in llama.attention()
               if not theirs.endswith('bias'))


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
HF = hf.HuggingFace(
    'nemotron_h', 'NemotronHForCausalLM',
    names=lambda c: NAMES + hf.by_block(c, LAYER, _mixer),
    fields=hf.fields(
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
            'mamba2.least_step': ('time_step_min', 0.001)},
    only=dict(tie_word_embeddings=False, use_bias=False, sliding_window=None,
              mlp_hidden_act='relu2', mamba_hidden_act='silu'),
    unread=('chunk_size', 'expand', 'mamba_proj_bias',
            'mamba_ssm_cache_dtype', 'moe_shared_expert_overlap',
            'mtp_hybrid_override_pattern', 'mtp_layers_block_type',
            'n_shared_experts', 'num_logits_to_keep',
            'partial_rotary_factor', 'rescale_prenorm_residual',
            'residual_in_fp32', 'rope_theta', 'time_step_floor',
            'time_step_limit', 'time_step_max', 'use_mamba_kernels'),
    read=_read, write=_write, check=layer_types.check_attention,
    optional=qwen3_next.HF.optional, spellings=(('backbone.', 'model.'),),
    module=('backbone.', 'model.'))
