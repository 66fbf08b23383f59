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


def read_shared_fields(reader: hf.Reader, fields: dict, q_rank: int,
                       dense: int = 3) -> dict:
  """Translates what the Hugging Face files config.json of DeepSeek-V3.2, GLM-5
  and A.X K2 have in common: the fields of DeepSeek-V3, and those of the indexer
  of each layer, which selects the tokens that a query attends to.

  Args:
    reader: the fields of the config.json.
    fields: the fields of our config.model that were looked up before.
    q_rank: the default of q_lora_rank, the rank of the queries' products.
    dense: how many layers at the start are dense if the file does not say it.

  Returns:
    Further fields of config.model.

  Raises:
    RequestError: if layers have no indexer, or if the order of the layers is
      not dense layers first and layers with experts after them.
  """
  # These fields older DeepSeek models have too.
  deepseek_v3.note_multi_token_prediction(reader)
  hf.check_gates(fields)
  model_fields = deepseek_v2.read_shared_fields(
      reader, fields=fields, dense=dense, q_rank=q_rank)
  require(model_fields['latent']['q_rank'],
          'config.json has q_lora_rank null, of '
          'which transformers makes no indexer')
  # If the file also lists the types of the layers, they must agree.
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
    """Returns the table by which our parameters are converted to the tensors of
    a Hugging Face file, and back.

    Args:
      config: our config of the model.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor. Letters name axes, such as D d_model, H heads
      and K features of a head. 'DHK' and 'HK D' say that the tensor has two
      axes, of which the first is our H and K joined. {n} in a name is the
      number of the layer. Rows of parameters that the model lacks are skipped.
    """
    return (*super().rows_of_model(config), *llama.layer_rows(*INDEXER_ROWS))

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
    reader.require_values(rope_interleave=True, indexer_rope_interleave=False)
    return read_shared_fields(reader, fields=fields, q_rank=1536)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return deepseek_v2.write_shared_fields(config) | dict(
        num_nextn_predict_layers=0)
