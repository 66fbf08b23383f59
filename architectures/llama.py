"""LLaMA: a decoder of RMSNorm, rotary positions and SwiGLU (Touvron et al.
2023a, section 2.2), with grouped heads from LLaMA 2 70B on (2023b; Llama 3:
Dubey et al. 2024).

  x_0 = E[tokens]
  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Longer contexts: `model.rope.scaling` linear, ntk, dynamic, llama3, yarn or
longrope, by `model.rope.factor`.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class LLaMA(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False,
               ffn='swiglu', ffn_bias=False, tie_embeddings=False)


# Rows that other systems have too.


def embedding_and_head_rows(norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the embedding, the final norm and the head; `norm` is the name of our
  parameter in the norm."""
  return (('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
          (f'decoder/final_norm/{norm}', 'D', 'model.norm.weight', 'D'),
          ('head/kernel', 'DV', 'lm_head.weight', 'V D'))


def layer_rows(*rows: hf.Row) -> tuple[hf.Row, ...]:
  """Returns rows of all layers: `rows`, whose names begin within a layer, with
  the folder and the number of the layer put before them."""
  return hf.prefix_rows('decoder/layers', 'model.layers.{n}', *rows)


def norm_rows(norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the norms before a layer's attention and its feed-forward network. `norm` is
  the name of our parameter in them."""
  return ((f'attention_norm/{norm}', 'D', 'input_layernorm.weight', 'D'),
          (f'ffn_norm/{norm}', 'D', 'post_attention_layernorm.weight', 'D'))


def head_norm_rows(axis: str = 'K', norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensors of the norms of a
  layer's queries and keys.

  Args:
    axis: the axis of the scale: K where each head has a norm of its own size, U
      where one goes over all heads.
    norm: the name of our parameter in them.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return (
      (f'attention/query_norm/{norm}', axis, 'self_attn.q_norm.weight', axis),
      (f'attention/key_norm/{norm}', axis, 'self_attn.k_norm.weight', axis))


def attention_rows(*more: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensors of the matrices and
  biases of a layer's attention, and after them the rows `more`."""
  return hf.prefix_rows('attention', 'self_attn', *hf.attention_rows(
      'q_proj', 'k_proj', 'v_proj', 'o_proj', 'J'), *more)


FFN_ROWS = (*hf.dense_rows('gate', 'DF', 'gate_proj', 'F D'),
            *hf.dense_rows('up', 'DF', 'up_proj', 'F D'),
            *hf.dense_rows('down', 'FD', 'down_proj', 'D F'))


def expert_rows(gate: str = 'gate_proj', up: str = 'up_proj',
                down: str = 'down_proj') -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensors of a layer's router
  and experts. The file has a tensor for each expert {e}.

  Args:
    gate: the name of an expert's gate in transformers.
    up: the name of the matrix beside it.
    down: the name of the last matrix.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return (('router', 'DE', 'gate.weight', 'E D'),
          ('gate', 'EDF', f'experts.{{e}}.{gate}.weight', 'F D'),
          ('up', 'EDF', f'experts.{{e}}.{up}.weight', 'F D'),
          ('down', 'EFD', f'experts.{{e}}.{down}.weight', 'D F'))


# All but the feed-forward networks, as Mixtral has them too.
ROWS = embedding_and_head_rows() + layer_rows(*norm_rows(), *attention_rows())
# The prefixes of names, without and with a head that answers questions.
SPAN_PREFIXES = 'model.', 'transformer.'


class Family(hf.HuggingFace):
  """A folder of LLaMA, or of a system that took its names: with rotary
  positions, and with the names around the layers."""
  tied = {'lm_head.weight': 'model.embed_tokens.weight'}
  spellings = (('model.', ''),)
  ignored = (r'.*\.rotary_emb\.inv_freq',)

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
    return dict(rope=rope_fields.read_rope(reader))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return dict(rope_parameters=rope_fields.write_rope(config))


class HF(Family):
  model_type = 'llama'
  architecture = 'LlamaForCausalLM'
  names = ROWS + layer_rows(*hf.prefix_rows('ffn', 'mlp', *FFN_ROWS))
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=hf.default_num_kv_heads, head_dim=hf.default_head_dim,
      intermediate_size=11008, vocab_size=32000, max_position_embeddings=2048,
      rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False,
      tie_word_embeddings=False) | {'ffn': hf.GATED_FFN_FIELD}
  only = dict(rope_interleaved=False)
  heads = hf.task_heads('Llama', tokens='score', span=SPAN_PREFIXES)

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
