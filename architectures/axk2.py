"""A.X K2: DeepSeek-V3.2 with gated norms and a gate of attention (SK Telecom
2026, as transformers' axk2; the norm: arXiv 2601.22966).

  a  = x + W_o (sigmoid(W_g c) * LatentAttention(n))
  c  = [RMSNorm(W_dq n); W_dq n], of which queries are made too
  x' = a + SwiGLU(RMSNorm(a))                     in the first layer
  x' = a + shared(m) + gate_scale * sum over the chosen experts of g_e E_e(m)

n and m are gated norms of x and a, y * sigmoid(W_up silu(W_down y)) with y =
RMSNorm(x). The final norm has no gate, nor has that before a dense network. A
query sees the top_k of the tokens so far, by an indexer that reads
RMSNorm(W_dq n) alone. The experts are those of DeepSeek-V3, in no groups.
Folders with groups are refused: there, experts of other groups can be chosen
where the biases of a token's own are low.
"""

from architectures import deepseek_v2, deepseek_v3, deepseek_v32, llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Decoder


class AXK2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = deepseek_v32.DeepSeekV32.PARTS | dict(
      norm='rmsnorm_gated', gated_norm=dict(norms='attention,experts'),
      attention_gate='elementwise', latent=dict(q_raw=True))


def gated_norm_rows(ours: str, theirs: str) -> tuple[hf.Row, ...]:
  """Returns the rows that name the Hugging Face tensors of a norm with a gate.

  Args:
    ours: the folder of our parameters.
    theirs: the name of the norm in the files.
  """
  return hf.prefix_rows(
      ours, theirs, ('scale', 'D', 'norm.weight', 'D'),
      ('gate_down', 'DU', 'W_down.weight', 'U D'),
      ('gate_up', 'UD', 'W_up.weight', 'D U'))


class HF(llama.Family):
  model_type = 'axk2'
  architecture = 'AXK2ForCausalLM'
  # The published files name tensors as vLLM does; transformers reads and writes
  # these names.
  names = llama.embedding_and_head_rows() + llama.layer_rows(
      *gated_norm_rows('attention_norm', 'input_layernorm'),
      *deepseek_v2.ATTENTION_ROWS, *deepseek_v2.QUERY_DOWN_ROWS,
      ('attention/query_up|output_gate', 'UHK|UHF',
       'self_attn.q_b_proj.weight', 'H(K+F) U'),
      *deepseek_v32.INDEXER_ROWS, *deepseek_v2.NETWORK_ROWS,
      deepseek_v3.ROUTER_BIAS_ROW)
  fields = hf.drop_entries(
      deepseek_v32.HF.fields, 'moe.expert_groups', 'moe.top_groups') | (
          hf.fields_with_defaults(
              hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
              intermediate_size=5120, vocab_size=163840,
              max_position_embeddings=131072, moe_intermediate_size=512,
              n_routed_experts=128, kv_lora_rank=128, qk_nope_head_dim=64,
              qk_rope_head_dim=32, v_head_dim=64, index_n_heads=16)) | {
                  'gated_norm.rank': ('gated_norm_rank', 16)}
  only = deepseek_v3.HF.only | dict(n_group=1, topk_group=1)
  heads = hf.task_heads('AXK2', tokens='score', only=('sequence', 'tokens'))

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns the rows of the norm before the network, which has a gate before
    experts."""
    if layer.ffn == 'moe':
      return gated_norm_rows('ffn_norm', 'post_attention_layernorm')
    return (('ffn_norm/scale', 'D', 'post_attention_layernorm.weight', 'D'),)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    # For a file that does not say them: the rank of the queries' products, and
    # the number of layers at the start that have no experts.
    return deepseek_v32.read_shared_fields(
        reader, fields=fields, q_rank=384, dense=1)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return deepseek_v2.write_shared_fields(config)
