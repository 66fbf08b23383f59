"""DeepSeek-V2: latent attention, and a mixture of many small experts beside
some that every token goes through (DeepSeek-AI 2024a; the experts: Dai et al.
2024, DeepSeekMoE).

  a  = x + LatentAttention(RMSNorm(x))           parts/attention/latent.py
  x' = a + SwiGLU(n), n = RMSNorm(a)             in the first layer
  x' = a + shared(n) + gate_scale * sum over the 6 chosen experts of p_e E_e(n)

p is the softmax over all experts, and is not normalised over those chosen. The
shared experts are one network of their joint width. In the largest model a
token goes to experts of 3 of 8 groups at most, those with the best of its
experts (`moe.expert_groups`): each group lies on devices of its own.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.attention.fields import LatentConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder
from common.errors import one_of, require


class DeepSeekV2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(interleaved=True), mixer='latent', ffn='moe', prefix='dense',
      kinds=dict(dense=dict(ffn='dense')), moe=dict(
          router='topk', top_k=6, ffn='swiglu', normalize_gates=False))


def read_dense(reader: hf.Reader, fields: dict, dense: int) -> dict:
  """Returns the kinds of the layers at the start that are dense.

  Args:
    reader: the reader of the config.json.
    fields: the fields that were read.
    dense: how many they are where the config.json does not say.
  """
  first = reader.count('first_k_dense_replace', dense)
  require(first < fields['num_layers'], 'config.json has first_k_dense_replace '
          f'{first} of num_hidden_layers {fields["num_layers"]}: no layer has '
          'experts')
  kinds = {}
  if first:
    kinds['dense'] = dict(ffn='dense')
  return dict(prefix=','.join(['dense'] * first), kinds=kinds)


def write_dense(c: ModelConfig) -> dict:
  """Returns the field of a config.json that `read_dense` reads."""
  moe = [kind.ffn == 'moe' for kind in c.layer_kinds(c.num_layers)]
  require(any(moe), 'no layer of this model has experts')
  return dict(first_k_dense_replace=moe.index(True))


def read(reader: hf.Reader, fields: dict, *, dense: int, q_rank: int,
         interleaved: bool = True) -> dict:
  """Returns what the config.json of V2 and of V3 say alike.

  Args:
    reader: the reader of the config.json.
    fields: the fields that were read.
    dense: the default of how many layers at the start are dense.
    q_rank: the default of q_lora_rank, whose null says that there is none.
    interleaved: whether rotary pairs are neighbours.
  """
  reader.must(num_key_value_heads=fields['num_heads'], moe_layer_freq=1)
  # These are the size of what is turned, always.
  reader.passes('head_dim', 'qk_head_dim')
  rank = 0
  if not reader.is_null('q_lora_rank'):
    rank = reader('q_lora_rank', q_rank)
  return read_dense(reader, fields, dense) | dict(
      head_dim=fields['latent.nope_dim'],
      latent=dict(q_rank=rank, norm_eps=LATENT_EPS),
      rope=rope_fields.read(reader, interleaved=interleaved, on_scores=True))


def write(c: ModelConfig) -> dict:
  """Returns the fields of a config.json that `read` reads."""
  return write_dense(c) | dict(
      num_key_value_heads=c.num_heads,
      q_lora_rank=c.part(LatentConfig).q_rank or None,
      rope_parameters=rope_fields.write(c, on_scores=True))


PLAIN, GROUPED = 'greedy', 'group_limited_greedy'  # values of topk_method
LATENT_EPS = 1e-6  # whatever a config.json says
# The rows of a layer, without the products for queries, and without networks.
BLOCK = (
    *llama.norms(),
    *hf.dense('attention/kv_down', 'DU', 'self_attn.kv_a_proj_with_mqa', 'U D'),
    ('attention/kv_norm/scale', 'U', 'self_attn.kv_a_layernorm.weight', 'U'),
    ('attention/kv_up', 'UHK', 'self_attn.kv_b_proj.weight', 'HK U'),
    *hf.dense('attention/out', 'HKD', 'self_attn.o_proj', 'D HK'))
SHARED = hf.under('shared', 'shared_experts', *llama.FFN)
QUERIES = (('attention/query', 'DHK', 'self_attn.q_proj.weight', 'HK D'),)
LATENT_QUERIES = (
    *hf.dense('attention/query_down', 'DU', 'self_attn.q_a_proj', 'U D'),
    ('attention/query_norm/scale', 'U', 'self_attn.q_a_layernorm.weight', 'U'),
    ('attention/query_up', 'UHK', 'self_attn.q_b_proj.weight', 'HK U'))


def names(c: ModelConfig, *more: hf.Row) -> tuple[hf.Row, ...]:
  """Returns the rows of V2, and `more` of a layer."""
  sizes = c.part(LatentConfig)
  return llama.ends() + llama.layers(
      *(LATENT_QUERIES if sizes.q_rank else QUERIES), *BLOCK, *hf.under(
          'ffn', 'mlp', *llama.FFN, *llama.experts(), *SHARED), *more)


# Fields that V3 and Kimi Linear have too.
LATENT = hf.fields(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                   v_head_dim=128, attention_bias=False)


class HF(llama.Family):
  model_type = 'deepseek_v2'
  architecture = 'DeepseekV2ForCausalLM'
  fields = LATENT | hf.fields(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      intermediate_size=11008, vocab_size=102400,
      max_position_embeddings=2048, rms_norm_eps=1e-6,
      tie_word_embeddings=False, num_experts_per_tok=6,
      moe_intermediate_size=1407, routed_scaling_factor=1.0,
      n_routed_experts=64, n_shared_experts=2) | {'moe.ffn': hf.SILU}
  only = dict(norm_topk_prob=False, scoring_func='softmax')
  heads = hf.heads('DeepseekV2', only=('sequence',))

  def names_of(self, c: ModelConfig) -> tuple[hf.Row, ...]:
    return names(c)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    groups, chosen = reader('n_group', 1), reader('topk_group', 1)
    method = reader('topk_method', PLAIN)
    one_of('topk_method of config.json', method, (PLAIN, GROUPED))
    ours = read(reader, fields, dense=0, q_rank=1536)
    if method == GROUPED:
      ours['moe'] = dict(expert_groups=groups, top_groups=chosen)
    return ours

  def write(self, c: ModelConfig) -> dict:
    moe = c.part(MoEConfig)
    method = GROUPED if moe.expert_groups > 1 else PLAIN
    return write(c) | dict(topk_method=method, n_group=moe.expert_groups,
                           topk_group=moe.top_groups)

  def check(self, c: ModelConfig) -> None:
    hf.check_heads(c)
