"""DeBERTa-v3: an encoder whose attention tells what a token holds from how far
away it is (He et al. 2021, arXiv 2006.03654; 2023, arXiv 2111.09543).

  x_0 = LayerNorm(E[tokens])                no positions, no segments
  a   = LayerNorm(x + Attention(x))         scores q k + q K_r + k Q_r
  x'  = LayerNorm(a + W2 gelu(W1 a))
  pooled     = gelu(W_p x_N[first])         of the head of a row
  MLM logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b

K_r and Q_r: architectures/parts/attention/disentangled.py. transformers calls
v3 DebertaV2, which v2 is too; of v2, only models without a convolution (its
conv_kernel_size) are known here. The enhanced mask decoder of the papers, which
adds positions before the head, is not in transformers, and not here.

It learns as ELECTRA does (objective replaced_tokens), from a generator of its
width and half its layers, whose table of tokens it reads without a gradient and
adds to (generator.sharing 'apart'). transformers has no class for that head.

The heads for masked words stand in files under one of two names (`legacy`), and
both are read; published files also hold the head that tells replaced tokens.
"""

from architectures import bert
from architectures.parts import hf
from architectures.parts.attention.disentangled import DisentangledConfig
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Encoder
from common.errors import require


class DeBERTa(Encoder):
  """tokens [B, L] -> Output; see Encoder."""
  POOLER_ACT = 'gelu'
  PARTS = bert.BERT.PARTS | dict(position='disentangled', next_sentence=False,
                                 generator=dict(sharing='apart'))


# pos_att_type of a config.json: the terms of a score with a position in them,
# content to position (q K_r) and position to content (k Q_r).
SCORE_TERMS = {'c2p', 'p2c'}
# Fields of a config.json: transformers' default, and the only value known here,
# which v3 has.
DEFAULT_AND_V3_VALUE = {'relative_attention': (False, True),
                        'share_att_key': (False, True),
                        'position_biased_input': (True, False),
                        'norm_rel_ebd': ('none', 'layer_norm')}
HEAD_PREFIX = 'cls.predictions.'


class HF(hf.HuggingFace):
  model_type = 'deberta-v2'
  architecture = 'DebertaV2ForMaskedLM'
  names = (
      ('embed/tokens', 'VD', 'deberta.embeddings.word_embeddings.weight',
       'V D'),
      ('embed/types', 'UD', 'deberta.embeddings.token_type_embeddings.weight',
       'U D'),
      *hf.norm_rows('embed/norm', 'deberta.embeddings.LayerNorm'),
      ('encoder/disentangled/table', 'UD',
       'deberta.encoder.rel_embeddings.weight', 'U D'),
      *hf.norm_rows('encoder/disentangled/norm', 'deberta.encoder.LayerNorm'),
      *hf.prefix_rows(
          'encoder/layers', 'deberta.encoder.layer.{n}',
          *hf.prefix_rows('attention', 'attention', *hf.attention_rows(
              'self.query_proj', 'self.key_proj', 'self.value_proj',
              'output.dense')),
          *hf.norm_rows('attention_norm', 'attention.output.LayerNorm'),
          *hf.dense_rows('ffn/up', 'DF', 'intermediate.dense', 'F D'),
          *hf.dense_rows('ffn/down', 'FD', 'output.dense', 'D F'),
          *hf.norm_rows('ffn_norm', 'output.LayerNorm')),
      *hf.dense_rows('pooler', 'DU', 'pooler.dense', 'U D'),
      *hf.dense_rows('transform', 'DU', f'{HEAD_PREFIX}transform.dense', 'U D'),
      *hf.norm_rows('transform_norm', f'{HEAD_PREFIX}transform.LayerNorm'),
      ('head/bias', 'V', f'{HEAD_PREFIX}bias', 'V'))
  fields = bert.FIELDS | hf.fields_with_defaults(
      vocab_size=128100, hidden_size=1536, num_hidden_layers=24,
      num_attention_heads=24, intermediate_size=6144, type_vocab_size=0,
      layer_norm_eps=1e-7, max_position_embeddings=512)
  only = dict(pooler_hidden_act='gelu', tie_word_embeddings=True)
  fields_without_effect = ('legacy',)
  tied = {f'{HEAD_PREFIX}decoder.weight':
          'deberta.embeddings.word_embeddings.weight',
          f'{HEAD_PREFIX}decoder.bias': f'{HEAD_PREFIX}bias'}
  spellings = ((f'{HEAD_PREFIX}transform.', 'lm_predictions.lm_head.'),
               (HEAD_PREFIX, 'lm_predictions.lm_head.'), ('deberta.', ''))
  ignored = (r'(deberta\.)?embeddings\.position_(ids|embeddings\.weight)',)
  optional = {hf.MASKED_WORD_HEAD: r'(cls\.predictions|lm_predictions)\..*',
              'head of replaced tokens': r'mask_predictions\..*'}
  heads = hf.task_heads('DebertaV2', sequence='classifier')

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
    # These fields must have the value of DeBERTa-v3. It must be in the file,
    # because transformers' default, which a missing field has, is another.
    for name, (hf_default, v3_value) in DEFAULT_AND_V3_VALUE.items():
      value = reader(name, hf_default)
      require(value == v3_value, f'config.json has {name} {value!r}: only '
              f'{v3_value!r} is known here')

    # The terms of a score, which files have as a list or as 'c2p|p2c'.
    terms = reader.read_list('pos_att_type')
    if not terms:
      terms = reader('pos_att_type', '').split('|')
    normalized_terms = {str(term).strip().lower() for term in terms}
    require(normalized_terms == SCORE_TERMS,
            f'config.json has pos_att_type {terms}: only both '
            f'of {sorted(SCORE_TERMS)} are known here')

    # Sizes that transformers can set apart, and our model cannot.
    width = fields['d_model']
    reader.require_values(conv_kernel_size=0, embedding_size=width,
                          attention_head_size=width // fields['num_heads'],
                          pooler_hidden_size=width)

    # The buckets of distances between tokens. In the file, -1 says that there
    # are none, or that the largest distance is the length of the model.
    buckets = int(reader('position_buckets', -1.0))
    require(buckets >= 4, f'config.json has position_buckets {buckets}: only '
            'distances in buckets are known here, 4 or more on each side')
    max_distance = int(reader('max_relative_positions', -1.0))
    if max_distance <= 0:
      max_distance = fields['max_len']
    return dict(disentangled=dict(buckets=buckets, max_distance=max_distance))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The values of DeBERTa-v3 are written out, as transformers' defaults are
    # others.
    distances = config.part(DisentangledConfig)
    v3_values = {}
    for name, (_, value) in DEFAULT_AND_V3_VALUE.items():
      v3_values[name] = value
    return v3_values | dict(
        position_buckets=distances.buckets, pos_att_type=sorted(SCORE_TERMS),
        max_relative_positions=distances.max_distance,
        tie_word_embeddings=config.tie_embeddings)

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
