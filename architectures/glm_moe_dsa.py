"""GLM-5: DeepSeek-V3.2 with fewer and larger heads (GLM-5 Team 2026, arXiv
2602.15763, section 2.1).

  a  = x + LatentAttention(n) over the top_k of the tokens so far, by I
  I  = sum over 32 heads of w_h relu(q_h k),  q_h = W_h n(W_dq n)
  x' = a + shared(m) + gate_scale * sum over the chosen experts of g_e E_e(m)

n and m are RMSNorms of x and a; I is in parts/attention/indexer.py, and the
indexer's rotary pairs are neighbours too. The experts are in no groups. Folders
in which layers share one choice of tokens are refused: each here has its own.
"""

from architectures import deepseek_v32, llama
from architectures.parts import hf
from architectures.parts.skeletons import Decoder
from common.errors import require


class GlmMoeDsa(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = deepseek_v32.DeepSeekV32.PARTS | dict(
      indexer=dict(interleaved=True))


class HF(deepseek_v32.HF):
  model_type = 'glm_moe_dsa'
  architecture = 'GlmMoeDsaForCausalLM'
  fields = deepseek_v32.HF.fields | hf.fields_with_defaults(
      hidden_size=6144, num_hidden_layers=78, num_attention_heads=64,
      intermediate_size=12288, vocab_size=154880, rms_norm_eps=1e-5,
      max_position_embeddings=202752, qk_nope_head_dim=192, v_head_dim=256,
      topk_group=1, index_n_heads=32, n_group=1)
  ignored = (*llama.HF.ignored, r'model\.layers\.78\..*')

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
    reader.require_values(rope_interleave=True, indexer_rope_interleave=True)
    pattern = reader.read_list('indexer_types')
    if not pattern:
      pattern = reader('index_topk_pattern', '')
    is_shared = 'shared' in pattern or 'S' in pattern
    require(not is_shared and reader('index_topk_freq', 1) <= 1,
            'config.json says by indexer_types or index_topk_freq that layers '
            'share a choice of tokens: only layers that each have an indexer '
            'are known here')
    reader.ignore_fields('index_skip_topk_offset')
    return deepseek_v32.read_shared_fields(reader, fields=fields, q_rank=2048)
