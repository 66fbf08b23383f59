"""Granite 4.0-H: nine layers of Mamba-2 to one of attention without positions,
with a factor on everything that meets (IBM 2025, "Granite 4.0", and its model
cards).

  x_0 = 12 E[tokens]
  a   = x + 0.22 Mamba2(n(x))              in nine layers of ten
  a   = x + 0.22 W_o Attention(q, k, v)    in the tenth; scores times 1 / K
  x'  = a + 0.22 (shared(m) + sum over the best experts of g_e SwiGLU_e(m))
        or a + 0.22 SwiGLU(m), without experts;   m = n(a)
  g   = softmax over those chosen of W_r m
  logits = n(x_N) E^T * 256 / D            n is RMSNorm; no bias but of the
                                           convolutions

The factors are model.embed_scale, residual_scale, attention_scale and
logits_scale. parts/recurrent/mamba2.py has the recurrence.
"""

from architectures import llama, mamba2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.recurrent.mamba2 import Mamba2Config
from architectures.parts.skeletons import Decoder
from common.errors import require

KINDS = {'linear': dict(mixer='mamba2'), 'full': {}}
# layer_types of their files, and of the published ones: our kinds of layer.
TYPES = {layer_types.LINEAR: 'linear', layer_types.WHOLE: 'full',
         'mamba': 'linear', 'attention': 'full'}


FACTORS = 'embedding_multiplier', 'attention_multiplier', 'logits_scaling'


class GraniteHybrid(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      position='none', pattern='linear,full', kinds=KINDS, tie_embeddings=True,
      embed_scale=12.0, residual_scale=0.22, attention_scale=1 / 128,
      logits_scale=1 / 6, ffn='moe', moe=dict(
          router='topk', top_k=6, ffn='swiglu', shared_experts=2))


def _read_positions(reader: hf.Reader) -> dict:
  rope = rope_fields.read(reader)
  if reader('position_embedding_type', 'nope') == 'rope':
    return dict(position='rope', rope=rope)
  return dict(position='none')


def _read_ffn(reader: hf.Reader) -> dict:
  """Returns the dense network, or the experts beside it."""
  experts = reader.count('num_local_experts', 8)
  shared = reader('shared_intermediate_size', 1024)
  if not experts:
    reader.passes('intermediate_size', 'num_experts_per_tok',
                  'router_aux_loss_coef')
    return dict(ffn='swiglu', d_ff=shared)
  width = reader('intermediate_size', 11008)
  chosen = reader('num_experts_per_tok', 2)
  hf.check_gates({'moe.top_k': chosen})
  times = hf.shared_experts(reader, 'shared_intermediate_size', shared, width)
  return dict(d_ff=shared, moe=dict(
      num_experts=experts, top_k=chosen, d_ff=width, shared_experts=times,
      balance_weight=reader('router_aux_loss_coef', 0.001)))


def _write_ffn(c: ModelConfig) -> dict:
  """Returns the fields of a config.json that `_read_ffn` reads."""
  if not c.has_experts:
    return dict(num_local_experts=0, shared_intermediate_size=c.d_ff)
  moe = c.part(MoEConfig)
  return dict(
      num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k,
      intermediate_size=moe.d_ff, router_aux_loss_coef=moe.balance_weight,
      shared_intermediate_size=moe.shared_experts * moe.d_ff)


def _mixer(c: ModelConfig) -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's mixer."""
  if c.mixer == 'mamba2':
    return hf.under('attention', 'mamba', *mamba2.MIXER)
  return llama.attention()


NAMES = llama.ends() + llama.layers(*llama.norms(), *hf.under(
    'ffn', 'shared_mlp',
    ('gate|up', 'DF', 'input_linear.weight', '2F D'),
    ('down', 'FD', 'output_linear.weight', 'D F'),
    ('shared/gate|up', 'DF', 'input_linear.weight', '2F D'),
    ('shared/down', 'FD', 'output_linear.weight', 'D F')), *hf.under(
        'ffn', 'block_sparse_moe',
        ('router', 'DE', 'router.layer.weight', 'E D'),
        ('gate|up', 'EDF', 'input_linear.weight', 'E 2F D'),
        ('down', 'EFD', 'output_linear.weight', 'E D F')))


class HF(llama.Family):
  model_type = 'granitemoehybrid'
  architecture = 'GraniteMoeHybridForCausalLM'
  fields = hf.fields(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=hf.each_head, head_dim=hf.split_width,
      vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=False) | {
          'embed_scale': ('embedding_multiplier', 1.0),
          'residual_scale': ('residual_multiplier', 1.0),
          'attention_scale': ('attention_multiplier', 1.0),
          'mamba2.heads': ('mamba_n_heads', 128),
          'mamba2.groups': ('mamba_n_groups', 1),
          'mamba2.state': ('mamba_d_state', 256),
          'mamba2.conv': ('mamba_d_conv', 4),
          'mamba2.conv_bias': ('mamba_conv_bias', True)}
  only = dict(hidden_act='silu', mamba_proj_bias=False)
  unread = ('mamba_chunk_size',)

  def names_of(self, c: ModelConfig) -> tuple[hf.Row, ...]:
    return NAMES + hf.by_block(c, 'model.layers.{n}', _mixer)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    layers, heads = fields['num_layers'], fields['mamba2.heads']
    layer_types.check_number('num_hidden_layers', layers)
    types = layer_types.each(reader, 'layer_types', layers, TYPES)
    if not types:
      types = [layer_types.LINEAR] * layers
    names = [TYPES[word] for word in types]
    for name in FACTORS:
      factor = reader(name, 1.0)
      require(factor > 0, f'config.json has {name} {factor}: it must be > 0')

    # The heads of the recurrence.
    inner = reader('mamba_expand', 2) * fields['d_model']
    size = reader('mamba_d_head', inner // heads)
    require(size * heads == inner, f'config.json has mamba_n_heads {heads} of '
            f'mamba_d_head {size}, which are not mamba_expand times '
            f'hidden_size, {inner}')
    limits = mamba2.read_limits(reader)

    ours = layer_types.named(names, KINDS)
    ours |= _read_ffn(reader)
    ours |= _read_positions(reader)
    return ours | dict(logits_scale=1 / reader('logits_scaling', 1.0),
                       mamba2=limits | dict(head_dim=size))

  def write(self, c: ModelConfig) -> dict:
    is_linear = [layer.mixer == 'mamba2' for layer in c.layers(c.num_layers)]
    # Sizes that fit each other, where no layer has any.
    heads, size = 1, c.d_model
    if any(is_linear):
      sizes = c.part(Mamba2Config)
      heads, size = sizes.heads, sizes.head_dim
    tree = _write_ffn(c) | mamba2.write_limits(c) | dict(
        layer_types=[layer_types.LINEAR if linear else layer_types.WHOLE
                     for linear in is_linear],
        mamba_expand=heads * size // c.d_model, mamba_n_heads=heads,
        mamba_d_head=size, logits_scaling=1 / c.logits_scale,
        position_embedding_type='nope')
    if c.position == 'rope':
      tree['position_embedding_type'] = 'rope'
      tree['rope_parameters'] = rope_fields.write(c)
    return tree

  def check(self, c: ModelConfig) -> None:
    layer_types.check_attention(c)
    require(c.head_dim % 2 == 0, f'model.head_dim is {c.head_dim}: '
            f'transformers refuses a {c.arch} of odd heads, whether or not '
            'they turn')
