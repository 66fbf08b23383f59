"""DeepSeek-V3.2: DeepSeek-V3 whose queries see the tokens that an indexer
chooses (DeepSeek-AI 2025, arXiv 2512.02556, section 2.1).

  a  = x + LatentAttention(n) over the top_k of the tokens so far, by I
  I  = sum over 64 heads of w_h relu(q_h k),  q_h = W_h n(W_dq n)
  x' = a + shared(m) + gate_scale * sum over the chosen experts of g_e E_e(m)

n and m are RMSNorms of x and a; I is in parts/attention/indexer.py, and experts
are as in architectures/deepseek_v3.py. Rotary pairs of attention are
neighbours, and those of the indexer half of what is turned apart. The published
weights come of V3.1's in two steps: configs/deepseek_v32.py has them.
"""

from architectures import deepseek_v2, deepseek_v3, llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Decoder
from common.errors import require


class DeepSeekV32(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = deepseek_v3.DeepSeekV3.PARTS | dict(attention='indexed')


def read_shared_fields(reader: hf.Reader, fields: dict, q_rank: int) -> dict:
  """Reads what the Hugging Face config.json of DeepSeek-V3.2 and that of GLM-5
  have in common: those of DeepSeek-V2 with an indexer in each layer, which
  selects the tokens that a query attends to.

  Args:
    reader: the reader of the config.json.
    fields: the fields of our config.model that were looked up before.
    q_rank: the default of q_lora_rank, the rank of the queries' products.

  Returns:
    Further fields of config.model.

  Raises:
    RequestError: for a file whose layers have no indexer, or another order than
      dense layers first and experts after them.
  """
  # The parts of older DeepSeek models. By default, three layers are dense.
  deepseek_v3.note_multi_token_prediction(reader)
  hf.check_gates(fields)
  model_fields = deepseek_v2.read_shared_fields(reader, fields=fields, dense=3,
                                                q_rank=q_rank)
  require(model_fields['latent']['q_rank'],
          'config.json has q_lora_rank null, of '
          'which transformers makes no indexer')
  # The types of the layers, where they are listed, must say the same again.
  num_layers = fields['num_layers']
  num_dense = model_fields['prefix'].count('dense')
  reader.require_values(
      layer_types=['indexed_attention'] * num_layers,
      mlp_layer_types=(['dense'] * num_dense
                       + ['sparse'] * (num_layers - num_dense)))
  return model_fields


INDEXER_ROWS = hf.prefix_rows(
    'attention/indexer', 'self_attn.indexer',
    ('query', 'UHK', 'wq_b.weight', 'HK U'), ('key', 'DK', 'wk.weight', 'K D'),
    ('key_norm/scale', 'K', 'k_norm.weight', 'K'),
    ('key_norm/bias', 'K', 'k_norm.bias', 'K'),
    ('weights', 'DH', 'weights_proj.weight', 'H D'))


class HF(deepseek_v3.HF):
  model_type = 'deepseek_v32'
  architecture = 'DeepseekV32ForCausalLM'
  more_model_types = ()
  fields = deepseek_v3.HF.fields | hf.fields_with_defaults(
      max_position_embeddings=163840, index_topk=2048, index_n_heads=64,
      index_head_dim=128)
  heads = {}

  def rows_of_model(self, config: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns the rows that map our parameters to the tensors of a Hugging Face
    file.

    Args:
      config: our config of the model.

    Returns:
      Rows of four strings: the path and the axes of a parameter of ours, such
      as 'DHK', and the name and the axes of its tensor there, such as 'HK D'
      (parts/hf/tensor_map.py explains both). {n} in a name is the number of the
      layer. Rows whose parameter the model does not have are passed over.
    """
    return (*super().rows_of_model(config), *llama.layer_rows(*INDEXER_ROWS))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Returns the fields of our config.model that take more than looking up one
    field of a Hugging Face config.json.

    Args:
      reader: reads that file: `reader(name, default)` returns a field and marks
        it as read. The import refuses a file with fields that nothing has read
        and that may matter; `ignore_fields` marks those that do not.
      fields: the fields of ours that were looked up before, by flat name.

    Returns:
      Further fields of config.model, with a dict for each group, such as rope.
      They replace those of `fields`.
    """
    reader.require_values(rope_interleave=True, indexer_rope_interleave=False)
    return read_shared_fields(reader, fields=fields, q_rank=1536)

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    return deepseek_v2.write_shared_fields(config) | dict(
        num_nextn_predict_layers=0)
