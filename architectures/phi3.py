"""Phi-3: LLaMA with one matrix for queries, keys and values, one for gate and
up, and a window in every layer (Abdin et al. 2024, section 2).

  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)

The matrices are fused in the published files alone: here each is by itself, as
in LLaMA. For 128K tokens, `model.rope.scaling=longrope` divides each frequency
by a factor that was searched for, one for rows of up to 4,096 tokens and one
for longer ones (LongRoPE: Ding et al. 2024). When a text that is written comes
to 4,097 tokens, all of it is read again with the factors of long rows.
"""

from architectures import llama, mistral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.positions import RopeConfig
from architectures.parts.skeletons import Decoder
from common.errors import require


class Phi3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = mistral.Mistral.PARTS
  REREADS = True


# Our scaling by rope_type. Early files call longrope by the last two.
SCALING_OF_ROPE_TYPE = {'default': 'none', 'longrope': 'longrope',
                        'su': 'longrope', 'yarn': 'longrope'}

# Ids without which transformers takes 32,000, past the end of a small
# vocabulary.
TOKEN_ID_FIELDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


class HF(llama.Family):
  model_type = 'phi3'
  architecture = 'Phi3ForCausalLM'
  names = llama.embedding_and_head_rows() + llama.layer_rows(
      *llama.norm_rows(),
      ('attention/query|key|value', 'DHK|DJK|DJK',
       'self_attn.qkv_proj.weight', 'HK+JK+JK D'),
      ('attention/out', 'HKD', 'self_attn.o_proj.weight', 'D HK'),
      ('ffn/gate|up', 'DF', 'mlp.gate_up_proj.weight', '2F D'),
      ('ffn/down', 'FD', 'mlp.down_proj.weight', 'D F'))
  fields = hf.fields_with_defaults(
      hidden_size=3072, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=hf.default_num_kv_heads, head_dim=hf.default_head_dim,
      intermediate_size=8192, vocab_size=32064, max_position_embeddings=4096,
      rms_norm_eps=1e-5, tie_word_embeddings=False) | {
          'ffn': hf.GATED_FFN_FIELD}
  # Published files have these, Phi-4-mini's all: transformers has no such
  # bias, a window in every layer, and its own class in place of the program
  # that auto_map names.
  only = dict(lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
  ignored = ()
  heads = hf.task_heads('Phi3', tokens='score', only=('sequence', 'tokens'))

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
    window = reader('sliding_window', 0)
    attention = 'banded' if window else 'global'
    rope = rope_fields.read_rope(
        reader, fraction=('partial_rotary_factor', 1.0),
        words=SCALING_OF_ROPE_TYPE, original=4096)
    return dict(rope=rope, attention=attention, sliding_window=window)

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
    parameters = rope_fields.write_rope(config, whole_heads=False,
                                        words=SCALING_OF_ROPE_TYPE)
    # Nulls for the ids of special tokens. Left out, transformers takes 32,000,
    # which may lie past the end of our vocabulary.
    config_json = dict(rope_parameters=parameters,
                       sliding_window=config.sliding_window or None,
                       **dict.fromkeys(TOKEN_ID_FIELDS))
    if rope.scaling == 'longrope':
      config_json['original_max_position_embeddings'] = rope.original_len
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    if config.part(RopeConfig).scaling != 'longrope':
      return
    require(config.num_heads * config.head_dim == config.d_model,
            f'model.num_heads is {config.num_heads} of {config.head_dim} '
            f'features, which are not model.d_model {config.d_model}: '
            'transformers counts the factors of a phi3 by the width over the '
            'heads')
