"""DeepSeek-V4: keys of a window beside entries that stand for several tokens
each, in layers that read mixtures of streams (DeepSeek-AI 2026, arXiv
2606.19348, section 2; as transformers has it).

  x  : 4 streams; a branch F reads a mixture of them, and they end in one (mHC)
  F1 = SWA, CSA or HCA (RMSNorm)                 parts/attention/compressed.py
  F2 = shared(n) + gate_scale * sum over 6 experts of s_e / (sum of s) E_e(n)
  s  = sqrt(softplus(W_r n)),  E(n) = W_down (silu(min(g, 10)) u),
       g = W_gate n,  u = W_up n between -10 and 10

The experts are the best by s + b, where b moves against the load, and in the
first 3 layers those that a table has for the token. Flash begins with two
layers of SWA and Pro with two of HCA; CSA and HCA alternate after these.
Positions of layers with entries turn by another theta, stretched by YaRN
without its temperature, and rotary pairs are neighbours at the end of a head.
The modules that predict further tokens are not imported.
"""

from typing import Any

from architectures import deepseek_v3, llama
from architectures.parts import hf
from architectures.parts.attention.compressed import CompressedConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.positions import RopeConfig
from architectures.parts.skeletons import Decoder
from common.errors import require

# The entry of layer_types in a config.json by the mixer of a layer, and back.
LAYER_TYPE_OF_MIXER = {'swa': layer_types.SLIDING_ATTENTION,
                       'csa': 'compressed_sparse_attention',
                       'hca': 'heavily_compressed_attention'}
MIXER_OF_LAYER_TYPE = {
    layer_type: mixer for mixer, layer_type in LAYER_TYPE_OF_MIXER.items()}
# The mixer of a layer by its entry of compress_ratios in the published files:
# the number of tokens that one compressed entry stands for, 0 without entries.
MIXER_OF_COMPRESS_RATIO = {0: 'swa', 4: 'csa', 128: 'hca'}
# The object of rope_parameters that holds the positions of a mixer.
ROPE_SECTION_OF_MIXER = {'swa': 'main', 'csa': 'compress', 'hca': 'compress'}
# Entries of mlp_layer_types in a config.json.
ROUTED_EXPERTS, HASHED_EXPERTS = 'moe', 'hash_moe'
# Not those by the length: transformers has another for entries than for tokens.
SCALING_OF_ROPE_TYPE = {'default': 'none', 'yarn': 'yarn'}


def pattern_of_layers(mixers: list[str], hashed: list[bool], **rope: Any
                      ) -> dict:
  """Returns the fields of config.model that say, for each layer, which kind of
  attention it has and how it chooses experts.

  Args:
    mixers: the attention of each layer: 'swa' (a sliding window), or 'csa' or
      'hca' (the window, and earlier tokens compressed).
    hashed: for each layer, whether a fixed table says which experts a token
      goes to. If not, a router scores the experts.
    **rope: fields of the rotary positions of the layers with 'swa', which
      replace the defaults.

  Returns:
    The order of the layers (`prefix`, `pattern`, `suffix`, lists of names of
    kinds), and `kinds`, {name of a kind of layer: the fields of config.model
    that it overrides}.
  """
  swa_rope = dict(theta=10000.0, scaling='none') | rope
  kind_names, kinds = [], {}
  for mixer, is_hashed in zip(mixers, hashed):
    name = mixer
    kind: dict[str, Any] = dict(mixer=mixer)
    if is_hashed:
      name += '_hashed'
      kind['router'] = 'hash_scored'
    if mixer == 'swa':
      kind['rope'] = swa_rope
    kind_names.append(name)
    kinds[name] = kind
  return layer_types.shortest_pattern(kind_names) | dict(kinds=kinds)


class DeepSeekV4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(
      hf.drop_entries(llama.LLaMA.PARTS, 'attention_bias'),
      **pattern_of_layers(mixers=['csa', 'hca', 'csa', 'hca'],
                          hashed=[True, False, False, False]),
      residual='mhc', streams=dict(learned_end=True), attention_sinks=True,
      rope=dict(fraction=0.125, interleaved=True, theta=160000.0, mscale=0.0),
      indexer=dict(interleaved=True), ffn='moe',
      clamp=dict(alpha=1.0, offset=0.0, limit=10.0),
      moe=dict(router='sqrt_softplus', top_k=6, ffn='swiglu_clamped',
               shared_experts=1))


# The rows of a module that compresses tokens into entries.
COMPRESSED_ENTRY_ROWS = (
    ('value', 'DU', 'wkv.weight', 'U D'),
    ('score', 'DU', 'wgate.weight', 'U D'),
    ('score_bias', 'PU', 'ape', 'P U'), ('norm/scale', 'K', 'norm.weight', 'K'))


def _branch_rows(our_name: str, hf_name: str) -> tuple[hf.Row, ...]:
  """Returns the table by which the norm and the hyper-connections before one
  branch of a layer are converted to tensors of a Hugging Face file, and back.
  Hyper-connections are the matrices by which a branch reads and writes several
  residual streams.

  Args:
    our_name: our name of the branch, 'attention' or 'ffn'.
    hf_name: the name of the branch in transformers.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return (
      (f'{our_name}_norm/scale', 'D', f'{hf_name}_norm.weight', 'D'),
      (f'{our_name}_streams/dynamic', 'UDI', f'hc_{hf_name}_fn', 'I UD'),
      (f'{our_name}_streams/read|write|mix', 'U|U|UI', f'hc_{hf_name}_base',
       'U+U+UI'),
      (f'{our_name}_streams/dynamic_scale', 'U', f'hc_{hf_name}_scale', 'U'))


ROWS = (
    ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    ('decoder/final_norm/scale', 'D', 'model.norm.weight', 'D'),
    ('head/kernel', 'DV', 'head.weight', 'V D'),
    ('decoder/final_streams/dynamic', 'UDI', 'model.hc_head.hc_fn', 'I UD'),
    ('decoder/final_streams/read', 'U', 'model.hc_head.hc_base', 'U'),
    ('decoder/final_streams/dynamic_scale', 'U', 'model.hc_head.hc_scale', 'U'),
    *llama.layer_rows(
        *_branch_rows('attention', 'attn'), *_branch_rows('ffn', 'ffn'),
        *hf.prefix_rows(
            'attention', 'attn', ('query_down', 'DU', 'wq_a.weight', 'U D'),
            ('query_norm/scale', 'U', 'q_norm.weight', 'U'),
            ('query_up', 'UHK', 'wq_b.weight', 'HK U'),
            ('key', 'DK', 'wkv.weight', 'K D'),
            ('key_norm/scale', 'K', 'norm.weight', 'K'),
            ('out_down', 'GHKU', 'wo_a.weight', 'GU HK'),
            ('out', 'GUD', 'wo_b.weight', 'D GU'),
            ('sink', 'H', 'attn_sink', 'H'),
            ('indexer/query', 'UHK', 'indexer.wq_b.weight', 'HK U'),
            ('indexer/weights', 'DH', 'indexer.weights_proj.weight', 'H D'),
            *hf.prefix_rows('entries', 'compressor', *COMPRESSED_ENTRY_ROWS),
            *hf.prefix_rows('indexer/entries', 'indexer.compressor',
                            *COMPRESSED_ENTRY_ROWS)),
        *hf.prefix_rows(
            'ffn', 'ffn', *llama.expert_rows('w1', 'w3', 'w2'),
            ('router_bias', 'E', 'gate.bias', 'E'),
            ('experts_of', 'VX', 'gate.tid2eid', 'V X'),
            *hf.prefix_rows('shared', 'shared_experts',
                            ('gate', 'DF', 'w1.weight', 'F D'),
                            ('up', 'DF', 'w3.weight', 'F D'),
                            ('down', 'FD', 'w2.weight', 'D F')))))


class HF(hf.HuggingFace):
  model_type = 'deepseek_v4'
  architecture = 'DeepseekV4ForCausalLM'
  names = ROWS
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=43, num_attention_heads=64,
      head_dim=512, vocab_size=129280, max_position_embeddings=1048576,
      rms_norm_eps=1e-6, moe_intermediate_size=2048, num_experts_per_tok=6,
      routed_scaling_factor=1.5, index_topk=512, index_n_heads=64,
      index_head_dim=128, n_routed_experts=256) | {
          'moe.ffn': ('hidden_act', 'silu', {'silu': 'swiglu_clamped'}),
          'clamp.limit': ('swiglu_limit', 10.0),
          'compressed.window': ('sliding_window', 128),
          'compressed.q_rank': ('q_lora_rank', 1024),
          'compressed.out_groups': ('o_groups', 8),
          'compressed.out_rank': ('o_lora_rank', 1024),
          'streams.count': ('hc_mult', 4),
          'streams.iterations': ('hc_sinkhorn_iters', 20)}
  only = dict(num_key_value_heads=1, n_shared_experts=1, norm_topk_prob=True,
              scoring_func='sqrtsoftplus', hc_eps=1e-6,
              tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
  fields_without_effect = (
      'expert_dtype', 'router_aux_loss_coef', 'router_jitter_noise')
  spellings = (('model.', ''), ('embed_tokens.', 'embed.'),
               ('hc_head.hc_', 'hc_head_'))
  ignored = (r'(model\.)?mtp\..*',)
  integers = r'.*\.tid2eid'

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    deepseek_v3.note_multi_token_prediction(reader)
    hf.check_gates(fields)
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    mixers = self._read_mixers(reader, num_layers)

    # The layers whose experts a table chooses; by default, the first three.
    networks = layer_types.read_entry_of_each_layer(
        reader, field='mlp_layer_types', layers=num_layers,
        words=(ROUTED_EXPERTS, HASHED_EXPERTS))
    hashed = [network == HASHED_EXPERTS for network in networks]
    if not networks:
      num_hashed = reader.read_count('num_hash_layers', 3)
      hashed = [n < num_hashed for n in range(num_layers)]

    # The number of tokens that one entry stands for, in layers with entries.
    rates = reader.read_object('compress_rates')
    compressed = {}
    for rate, mixer in MIXER_OF_COMPRESS_RATIO.items():
      if rate:
        layer_type = LAYER_TYPE_OF_MIXER[mixer]
        compressed[f'{mixer}_rate'] = rates(layer_type, rate)

    # Positions: one set of fields for layers of swa, one for the others.
    head_dim = fields['head_dim']
    rotated_share = reader('qk_rope_head_dim', head_dim // 8) / head_dim
    swa_rope, rope = rope_fields.read_rope_of_layer_kinds(
        reader, ('main', ('rope_theta', 10000.0)),
        ('compress', ('compress_rope_theta', 160000.0)),
        fraction=('partial_rotary_factor', rotated_share), interleaved=True,
        temperature=False, words=SCALING_OF_ROPE_TYPE)
    return pattern_of_layers(mixers, hashed=hashed, **swa_rope) | dict(
        rope=rope, compressed=compressed)

  def _read_mixers(self, reader: hf.Reader, num_layers: int) -> list[str]:
    """Reads the kind of attention of each layer from a Hugging Face
    config.json. transformers writes it as layer_types, and the published files
    have compress_ratios.

    Args:
      reader: the fields of the config.json.
      num_layers: the number of layers.

    Returns:
      For each layer 'swa' (a sliding window), or 'csa' or 'hca' (the window,
      and earlier tokens compressed).
    """
    ratios = reader.read_list('compress_ratios')[:num_layers]
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=MIXER_OF_LAYER_TYPE)
    if types:
      return [MIXER_OF_LAYER_TYPE[layer_type] for layer_type in types]
    # A ratio in the file may be of any type, such as a list, which cannot be
    # looked up in a dict. So it is compared with the keys one by one.
    choices = list(MIXER_OF_COMPRESS_RATIO)
    is_known = (len(ratios) == num_layers
                and all(ratio in choices for ratio in ratios))
    require(is_known, 'config.json has no layer_types and compress_ratios '
            f'{ratios}: give one of {", ".join(map(str, choices))} for each of '
            f'{num_layers} layers')
    return [MIXER_OF_COMPRESS_RATIO[ratio] for ratio in ratios]

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The type of each layer's attention, and how its experts are chosen.
    types, networks = [], []
    for layer in config.layers(config.num_layers):
      types.append(hf.find_hf_word(MIXER_OF_LAYER_TYPE, value=layer.mixer,
                                   field='mixer'))
      if layer.part(MoEConfig).router == 'hash_scored':
        networks.append(HASHED_EXPERTS)
      else:
        networks.append(ROUTED_EXPERTS)

    # The rotary positions of each type of attention. transformers needs all of
    # them, even of a type that no layer has, which gets those of another.
    ropes = rope_fields.write_rope_of_layer_kinds(
        config, names=ROPE_SECTION_OF_MIXER, whole_heads=False,
        temperature=False, words=SCALING_OF_ROPE_TYPE)
    any_rope = next(iter(ropes.values()))
    ropes = dict.fromkeys(ROPE_SECTION_OF_MIXER.values(), any_rope) | ropes

    # How many tokens are compressed to one key, by the type of attention.
    sizes = config.part(CompressedConfig)
    rates = {LAYER_TYPE_OF_MIXER['csa']: sizes.csa_rate,
             LAYER_TYPE_OF_MIXER['hca']: sizes.hca_rate}
    return dict(
        layer_types=types, num_nextn_predict_layers=0,
        mlp_layer_types=networks, compress_rates=rates,
        partial_rotary_factor=config.part(RopeConfig).fraction,
        rope_parameters=ropes)
