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
    # Fields whose value in v3 is not transformers' default.
    for name, (default, known) in DEFAULT_AND_V3_VALUE.items():
      value = reader(name, default)
      require(value == known, f'config.json has {name} {value!r}: only '
              f'{known!r} is known here')

    # The terms of a score, a list or one string; and the widths.
    terms = reader.read_list('pos_att_type')
    if not terms:
      terms = reader('pos_att_type', '').split('|')
    normalized_terms = {str(term).strip().lower() for term in terms}
    require(normalized_terms == SCORE_TERMS,
            f'config.json has pos_att_type {terms}: only both '
            f'of {sorted(SCORE_TERMS)} are known here')
    width = fields['d_model']
    reader.require_values(conv_kernel_size=0, embedding_size=width,
                          attention_head_size=width // fields['num_heads'],
                          pooler_hidden_size=width)

    # The distances between tokens: -1 says that there are no buckets, or that
    # the largest distance is the length of the model.
    buckets = int(reader('position_buckets', -1.0))
    require(buckets >= 4, f'config.json has position_buckets {buckets}: only '
            'distances in buckets are known here, 4 or more on each side')
    max_distance = int(reader('max_relative_positions', -1.0))
    if max_distance <= 0:
      max_distance = fields['max_len']
    return dict(disentangled=dict(buckets=buckets, max_distance=max_distance))

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
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
