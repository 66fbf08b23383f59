"""BERT: an encoder that fills in masked words and tells whether two texts
follow one another (Devlin et al. 2019).

  x_0 = LayerNorm(E[tokens] + P[0..L-1] + S[segment])
  a   = LayerNorm(x + Attention(x))       every token sees every other
  x'  = LayerNorm(a + W2 gelu(W1 a))
  pooled     = tanh(W_p x_N[first])       of the [CLS] token
  NSP logits = pooled W_n + b_n
  MLM logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b

The published sizes (110M, 340M) count the encoder and the pooler; what only
pre-training needs, the transform, b and W_n, comes on top. With the head of a
task (model.head) that is not there: scores = W_s pooled + b_s of a row, or
W_s x_N + b_s of each token, which needs no pooler.
"""

from collections.abc import Collection
import re
from typing import Any

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Encoder


class BERT(Encoder):
  """tokens [B, L] -> Output; see Encoder."""
  PARTS = dict(position='learned', norm='layernorm', embed_norm=True,
               block='post_norm', attention='global', ffn='gelu',
               tie_embeddings=True, logits_bias=True, next_sentence=True)


class TwoTasks(hf.HuggingFace):
  """A folder of a BERT or an ALBERT, whose class says whether it has the second
  task.

  A folder may have a pooler or not, whatever its config.json says: those of
  2018 call themselves BertForMaskedLM and have one.

  Attributes:
    system: the name that its classes begin with.
    optional: as for HuggingFace, with the pooler's tensors under 'pooler'.
  """
  system: str

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
    # BERT is trained on two tasks: masked words, and whether one sentence
    # follows another. These classes of transformers lack the second.
    one_task_classes = {f'{self.system}ForMaskedLM', f'{self.system}Model'}
    classes = reader.read_list('architectures')
    return dict(next_sentence=one_task_classes.isdisjoint(classes))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    config_json: dict[str, Any] = dict(
        tie_word_embeddings=config.tie_embeddings)
    if config.head == 'lm' and not config.next_sentence:
      config_json['architectures'] = [f'{self.system}ForMaskedLM']
    return config_json

  def read_tensor_names(self, names: Collection[str]) -> dict:
    """Returns whether the second task is there, by whether the files have the
    tensors of a pooler."""
    pooler = self.optional['pooler']
    return dict(next_sentence=any(
        re.fullmatch(pooler, name) for name in names))


# The parts of the model that a folder may lack as a whole, by their names in
# messages: a pattern of the names of their tensors.
OPTIONAL_PARTS = {'pooler': r'(bert\.)?pooler\..*',
                  'head of next sentences': r'cls\.seq_relationship\..*',
                  hf.MASKED_WORD_HEAD: r'cls\.predictions\..*'}


def embedding_rows(name: str) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the embedding, whose tensors are under `name`."""
  return hf.prefix_rows(
      'embed', f'{name}.embeddings',
      ('tokens', 'VD', 'word_embeddings.weight', 'V D'),
      ('positions', 'LD', 'position_embeddings.weight', 'L D'),
      ('types', 'UD', 'token_type_embeddings.weight', 'U D'),
      *hf.norm_rows('norm', 'LayerNorm'))


def encoder_rows(name: str) -> tuple[hf.Row, ...]:
  """Returns the table by which the parameters of BERT's embedding and layers
  are converted to tensors of a Hugging Face file, and back.

  Args:
    name: what the names of these tensors begin with, such as 'bert'.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. {n} in a name is the number of the layer.
  """
  attention = hf.attention_rows(
      'self.query', 'self.key', 'self.value', 'output.dense')
  layers = hf.prefix_rows(
      'encoder/layers', f'{name}.encoder.layer.{{n}}',
      *hf.prefix_rows('attention', 'attention', *attention),
      *hf.norm_rows('attention_norm', 'attention.output.LayerNorm'),
      *hf.dense_rows('ffn/up', 'DF', 'intermediate.dense', 'F D'),
      *hf.dense_rows('ffn/down', 'FD', 'output.dense', 'D F'),
      *hf.norm_rows('ffn_norm', 'output.LayerNorm'))
  return *embedding_rows(name), *layers


# The fields of every config.json of the family, but how long its rows are.
FIELDS = hf.fields_with_defaults(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, type_vocab_size=2, layer_norm_eps=1e-12) | {
        'ffn': ('hidden_act', 'gelu', hf.FFN_OF_ACTIVATION)}
VALUES_OF_AN_ENCODER = dict(
    position_embedding_type='absolute', is_decoder=False,
    add_cross_attention=False, tie_word_embeddings=True)


class HF(TwoTasks):
  system = 'Bert'
  model_type = 'bert'
  architecture = 'BertForPreTraining'
  names = (
      *encoder_rows('bert'),
      *hf.dense_rows('pooler', 'DU', 'bert.pooler.dense', 'U D'),
      *hf.dense_rows('transform', 'DU', 'cls.predictions.transform.dense',
                     'U D'),
      *hf.norm_rows('transform_norm', 'cls.predictions.transform.LayerNorm'),
      ('head/bias', 'V', 'cls.predictions.bias', 'V'),
      *hf.dense_rows('nsp', 'DU', 'cls.seq_relationship', 'U D'))
  fields = FIELDS | hf.fields_with_defaults(vocab_size=30522,
                                            max_position_embeddings=512)
  only = VALUES_OF_AN_ENCODER
  tied = {'cls.predictions.decoder.weight':
          'bert.embeddings.word_embeddings.weight',
          'cls.predictions.decoder.bias': 'cls.predictions.bias'}
  spellings = (('bert.', ''), ('LayerNorm.weight', 'LayerNorm.gamma'),
               ('LayerNorm.bias', 'LayerNorm.beta'))
  ignored = (r'(bert\.)?embeddings\.position_ids',)
  optional = OPTIONAL_PARTS
  heads = hf.task_heads('Bert', sequence='classifier')
