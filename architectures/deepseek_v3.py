"""DeepSeek-V3: DeepSeek-V2 whose load is balanced by a bias (DeepSeek-AI 2024b,
section 2.1).

  s = sigmoid(W_r n)
  chosen: the 8 best of s_e + b_e, of 4 of the 8 groups of experts: those whose
          two best of s_e + b_e have the largest sum
  x' = a + shared(n) + gate_scale * sum over them of s_e / (sum of s) E_e(n)

b moves by `moe.bias_rate` a step, down for an expert with more than its share
of tokens; no gradient reaches it. A balance loss of each sequence, of little
weight, stands beside it. The first 3 layers are dense. The module that predicts
a second token (section 2.2) is model.mtp_depth=1; the published one, layer 61
of a folder, is not imported.
"""

from architectures import deepseek_v2, llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.positions import RopeConfig
from architectures.parts.skeletons import Decoder


class DeepSeekV3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = deepseek_v2.DeepSeekV2.PARTS | dict(moe=dict(
      router='sigmoid', top_k=8, ffn='swiglu'))


def note_multi_token_prediction(reader: hf.Reader) -> None:
  """Adds a note for the user where a config.json has layers that predict
  further tokens, which are not imported."""
  depth = reader('num_nextn_predict_layers', 0)
  if depth:
    reader.notes.append(
        f'config.json has num_nextn_predict_layers {depth}: the layers that '
        'predict further tokens are not imported')


ROUTER_BIAS_ROW = ('ffn/router_bias', 'E', 'mlp.gate.e_score_correction_bias',
                   'E')


class HF(deepseek_v2.HF):
  model_type = 'deepseek_v3'
  architecture = 'DeepseekV3ForCausalLM'
  more_model_types = ('kimi_k2',)
  fields = deepseek_v2.HF.fields | hf.fields_with_defaults(
      hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
      intermediate_size=18432, vocab_size=129280,
      max_position_embeddings=4096, num_experts_per_tok=8,
      moe_intermediate_size=2048, routed_scaling_factor=2.5, topk_group=4,
      norm_topk_prob=True, n_routed_experts=256, n_shared_experts=1,
      n_group=8)
  only = dict(scoring_func='sigmoid', topk_method='noaux_tc')
  # The layers that predict further tokens stand behind the 61 of V3.
  ignored = (*llama.HF.ignored, r'model\.layers\.61\..*')
  heads = hf.task_heads('DeepseekV3', tokens='score',
                        only=('sequence', 'tokens'))

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
    return deepseek_v2.rows_of_deepseek(config, ROUTER_BIAS_ROW)

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
    note_multi_token_prediction(reader)
    hf.check_gates(fields)
    interleaved = False  # A null says so.
    if not reader.is_null('rope_interleave'):
      interleaved = reader('rope_interleave', True)
    model_fields = deepseek_v2.read_shared_fields(
        reader, fields=fields, dense=3, q_rank=1536, interleaved=interleaved)
    if reader.is_null('norm_topk_prob'):  # A null says no here.
      model_fields['moe'] = dict(normalize_gates=False)
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    rope = config.part(RopeConfig)
    return deepseek_v2.write_shared_fields(config) | dict(
        rope_interleave=rope.interleaved, num_nextn_predict_layers=0)

  def check(self, config: ModelConfig) -> None:
    """Accepts all heads, where DeepSeek-V2 refuses some."""
