"""ELECTRA: BERT's encoder, which tells of each token whether a smaller network
drew it (Clark et al. 2020, arXiv 2003.10555).

  x_0 = LayerNorm(E[tokens] + P[0..L-1] + S[segment]) W + w     W: embed_dim
  x_n: BERT's layers
  scores = w_s gelu(W_d x_N + b_d) + b              of each token: is it drawn?
  MLM logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b           the generator's

Small has an embedding of 128 features and a product W that makes d_model of it;
the others have none. With model.head 'replaced', objective replaced_tokens, a
generator stands in the model while it is trained, whose widths are a part of
the encoder's, and both have one embedding. An export has the encoder alone, as
transformers' ElectraForPreTraining. A model for masked words (head 'lm') is
what a published generator is. The head of a row has gelu where BERT's pooler
has tanh.
"""

from architectures import bert
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Encoder


class ELECTRA(Encoder):
  """tokens [B, L] -> Output; see Encoder."""
  HEAD_ACT = POOLER_ACT = 'gelu'
  PARTS = bert.BERT.PARTS | dict(next_sentence=False)


GENERATOR_HEAD = 'generator_predictions'
DISCRIMINATOR_HEAD = 'discriminator_predictions'


class HF(hf.HuggingFace):
  model_type = 'electra'
  architecture = 'ElectraForMaskedLM'
  names = (
      *bert.encoder_rows('electra'),
      *hf.dense_rows('widen', 'UD', 'electra.embeddings_project', 'D U'),
      *hf.dense_rows('pooler', 'DU', 'classifier.dense', 'U D'),
      *hf.dense_rows('detector', 'DU', f'{DISCRIMINATOR_HEAD}.dense', 'U D'),
      *hf.dense_rows('transform', 'DU', f'{GENERATOR_HEAD}.dense', 'U D'),
      *hf.norm_rows('transform_norm', f'{GENERATOR_HEAD}.LayerNorm'),
      ('head/bias', 'V', 'generator_lm_head.bias', 'V'))
  fields = bert.FIELDS | hf.fields_with_defaults(
      hidden_size=256, num_attention_heads=4, intermediate_size=1024,
      vocab_size=30522, max_position_embeddings=512)
  only = bert.VALUES_OF_AN_ENCODER
  tied = {'generator_lm_head.weight':
          'electra.embeddings.word_embeddings.weight'}
  spellings = (('electra.', ''),)
  ignored = (r'(electra\.)?embeddings\.position_ids',)
  optional = {hf.MASKED_WORD_HEAD: r'generator_(predictions|lm_head)\..*',
              'head of replaced tokens': rf'{DISCRIMINATOR_HEAD}\..*'}
  heads = hf.task_heads('Electra', sequence='classifier.out_proj') | {
      'replaced': hf.TaskHead('ElectraForPreTraining',
                              f'{DISCRIMINATOR_HEAD}.dense_prediction')}

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
    size = reader('embedding_size', 128)
    if size == fields['d_model']:
      size = 0  # no product makes d_model of it
    return dict(embed_dim=size)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return dict(embedding_size=config.embed_dim or config.d_model,
                tie_word_embeddings=config.tie_embeddings)
