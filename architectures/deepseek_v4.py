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

# layer_types of a config.json by the mixer, and the mixer by each of them.
WORDS = {'swa': layer_types.WINDOW, 'csa': 'compressed_sparse_attention',
         'hca': 'heavily_compressed_attention'}
MIXERS = {word: mixer for mixer, word in WORDS.items()}
RATIOS = {0: 'swa', 4: 'csa', 128: 'hca'}  # in the published files
ROPES = {'swa': 'main', 'csa': 'compress', 'hca': 'compress'}
ROUTED, HASHED = 'moe', 'hash_moe'  # mlp_layer_types of a config.json
# Not those by the length: transformers has another for entries than for tokens.
SCALINGS = {'default': 'none', 'yarn': 'yarn'}


def layers(mixers: list[str], hashed: list[bool], **rope: Any) -> dict:
  """Returns the order and the kinds of layer.

  Args:
    mixers: the mixer of each layer.
    hashed: whether a table has the experts of each token, by layer.
    **rope: the fields of model.rope of the layers of swa.
  """
  rope = dict(theta=10000.0, scaling='none') | rope
  names, kinds = [], {}
  for mixer, has_table in zip(mixers, hashed):
    name = mixer
    kind: dict[str, Any] = dict(mixer=mixer)
    if has_table:
      name += '_hashed'
      kind['router'] = 'hash_scored'
    if mixer == 'swa':
      kind['rope'] = rope
    names.append(name)
    kinds[name] = kind
  return layer_types.shortest(names) | dict(kinds=kinds)


class DeepSeekV4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = hf.without(llama.LLaMA.PARTS, 'attention_bias') | layers(
      ['csa', 'hca', 'csa', 'hca'], [True, False, False, False]) | dict(
          residual='mhc', streams=dict(learned_end=True), attention_sinks=True,
          rope=dict(fraction=0.125, interleaved=True, theta=160000.0,
                    mscale=0.0),
          indexer=dict(interleaved=True), ffn='moe',
          clamp=dict(alpha=1.0, offset=0.0, limit=10.0),
          moe=dict(router='sqrt_softplus', top_k=6, ffn='swiglu_clamped',
                   shared_experts=1))


ENTRIES = (('value', 'DU', 'wkv.weight', 'U D'),
           ('score', 'DU', 'wgate.weight', 'U D'),
           ('score_bias', 'PU', 'ape', 'P U'),
           ('norm/scale', 'K', 'norm.weight', 'K'))


def _branch(ours: str, theirs: str) -> tuple[hf.Row, ...]:
  """Returns the rows of a branch's norm and of how it reads streams."""
  return (
      (f'{ours}_norm/scale', 'D', f'{theirs}_norm.weight', 'D'),
      (f'{ours}_streams/dynamic', 'UDI', f'hc_{theirs}_fn', 'I UD'),
      (f'{ours}_streams/read|write|mix', 'U|U|UI', f'hc_{theirs}_base',
       'U+U+UI'),
      (f'{ours}_streams/dynamic_scale', 'U', f'hc_{theirs}_scale', 'U'))


NAMES = (
    ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    ('decoder/final_norm/scale', 'D', 'model.norm.weight', 'D'),
    ('head/kernel', 'DV', 'head.weight', 'V D'),
    ('decoder/final_streams/dynamic', 'UDI', 'model.hc_head.hc_fn', 'I UD'),
    ('decoder/final_streams/read', 'U', 'model.hc_head.hc_base', 'U'),
    ('decoder/final_streams/dynamic_scale', 'U', 'model.hc_head.hc_scale', 'U'),
    *llama.layers(
        *_branch('attention', 'attn'), *_branch('ffn', 'ffn'),
        *hf.under(
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
            *hf.under('entries', 'compressor', *ENTRIES),
            *hf.under('indexer/entries', 'indexer.compressor', *ENTRIES)),
        *hf.under(
            'ffn', 'ffn', *llama.experts('w1', 'w3', 'w2'),
            ('router_bias', 'E', 'gate.bias', 'E'),
            ('experts_of', 'VX', 'gate.tid2eid', 'V X'),
            *hf.under('shared', 'shared_experts',
                      ('gate', 'DF', 'w1.weight', 'F D'),
                      ('up', 'DF', 'w3.weight', 'F D'),
                      ('down', 'FD', 'w2.weight', 'D F')))))


class HF(hf.HuggingFace):
  model_type = 'deepseek_v4'
  architecture = 'DeepseekV4ForCausalLM'
  names = NAMES
  fields = hf.fields(
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
  unread = ('expert_dtype', 'router_aux_loss_coef', 'router_jitter_noise')
  spellings = (('model.', ''), ('embed_tokens.', 'embed.'),
               ('hc_head.hc_', 'hc_head_'))
  ignored = (r'(model\.)?mtp\..*',)
  integers = r'.*\.tid2eid'

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    deepseek_v3.note_mtp(reader)
    hf.check_gates(fields)
    n = fields['num_layers']
    layer_types.check_number('num_hidden_layers', n)
    mixers = self._mixers(reader, n)

    # Whether a table has the experts of each layer.
    networks = layer_types.each(
        reader, 'mlp_layer_types', n, (ROUTED, HASHED))
    hashed = [word == HASHED for word in networks]
    if not networks:
      first = reader.count('num_hash_layers', 3)
      hashed = [i < first for i in range(n)]

    # The rates of the compressed entries, and positions.
    rates = reader.section('compress_rates')
    compressed = {}
    for rate, mixer in RATIOS.items():
      if rate:
        compressed[f'{mixer}_rate'] = rates(WORDS[mixer], rate)
    size = fields['head_dim']
    turned = reader('qk_rope_head_dim', size // 8) / size
    main, rope = rope_fields.read_by_kind(
        reader, ('main', ('rope_theta', 10000.0)),
        ('compress', ('compress_rope_theta', 160000.0)),
        fraction=('partial_rotary_factor', turned), interleaved=True,
        temperature=False, words=SCALINGS)
    return layers(mixers, hashed, **main) | dict(
        rope=rope, compressed=compressed)

  def _mixers(self, reader: hf.Reader, n: int) -> list[str]:
    """Returns the mixer of each of `n` layers, by layer_types or by
    compress_ratios of the published files."""
    ratios = reader.listed('compress_ratios')[:n]
    types = layer_types.each(reader, 'layer_types', n, MIXERS)
    if types:
      return [MIXERS[word] for word in types]
    choices = list(RATIOS)  # a ratio may be no key: a list
    known = len(ratios) == n and all(ratio in choices for ratio in ratios)
    require(known, 'config.json has no layer_types and compress_ratios '
            f'{ratios}: give one of {", ".join(map(str, choices))} for each of '
            f'{n} layers')
    return [RATIOS[ratio] for ratio in ratios]

  def write(self, c: ModelConfig) -> dict:
    types, networks = [], []
    for layer in c.layers(c.num_layers):
      types.append(hf.theirs(MIXERS, layer.mixer, 'mixer'))
      is_hashed = layer.part(MoEConfig).router == 'hash_scored'
      networks.append(HASHED if is_hashed else ROUTED)
    ropes = rope_fields.write_by_kind(
        c, ROPES, whole_heads=False, temperature=False, words=SCALINGS)
    # Both must stand there, though no layer has one.
    first = next(iter(ropes.values()))
    ropes = dict.fromkeys(ROPES.values(), first) | ropes
    sizes = c.part(CompressedConfig)
    rates = {WORDS['csa']: sizes.csa_rate, WORDS['hca']: sizes.hca_rate}
    return dict(
        layer_types=types, num_nextn_predict_layers=0,
        mlp_layer_types=networks, compress_rates=rates,
        partial_rotary_factor=c.part(RopeConfig).fraction,
        rope_parameters=ropes)
