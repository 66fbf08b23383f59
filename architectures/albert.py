"""ALBERT: a BERT whose layers all have the same weights (Lan et al. 2020, arXiv
1909.11942).

  x_0 = LayerNorm(E[tokens] + P[0..L-1] + S[segment]) W + w     of embed_dim
  x_t = BERT's layer of x_(t-1), for t = 1 ... loops.passes     always the same
  SOP logits = tanh(W_p x_T[first]) W_n + b_n
  MLM logits = LayerNorm(gelu(W_t x_T + b_t)) E^T + b

So the embedding has 128 features (section 3.1, factorised), of which a product
makes d_model, and the head of masked words goes back to them; the second task
is the order of two texts (objective mlm_sop), where BERT's is whether they
belong together. One layer runs num_hidden_layers times; a config.json with
several groups of layers (num_hidden_groups) is of no published size, and is
refused. The weights of 2020 are version 2 of the paper's, without dropout.
"""

from architectures import bert
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Encoder
from common.errors import require


class ALBERT(Encoder):
  """tokens [B, L] -> Output; see Encoder. nsp_logits are of the order."""
  PARTS = bert.BERT.PARTS | dict(ffn='gelu_tanh', loop='plain')


OPTIONAL_PARTS = {'pooler': r'(albert\.)?pooler\..*',
                  'head of the order of sentences': r'sop_classifier\..*',
                  hf.MASKED_WORD_HEAD: r'predictions\..*'}
LAYER_PREFIX = 'albert.encoder.albert_layer_groups.0.albert_layers.{n}'


class HF(bert.TwoTasks):
  system = 'Albert'
  model_type = 'albert'
  architecture = 'AlbertForPreTraining'
  names = (
      *bert.embedding_rows('albert'),
      *hf.dense_rows('widen', 'UD',
                     'albert.encoder.embedding_hidden_mapping_in', 'D U'),
      *hf.prefix_rows(
          'encoder/layers', LAYER_PREFIX,
          *hf.prefix_rows('attention', 'attention', *hf.attention_rows(
              'query', 'key', 'value', 'dense')),
          *hf.norm_rows('attention_norm', 'attention.LayerNorm'),
          *hf.dense_rows('ffn/up', 'DF', 'ffn', 'F D'),
          *hf.dense_rows('ffn/down', 'FD', 'ffn_output', 'D F'),
          *hf.norm_rows('ffn_norm', 'full_layer_layer_norm')),
      *hf.dense_rows('pooler', 'DU', 'albert.pooler', 'U D'),
      *hf.dense_rows('transform', 'DU', 'predictions.dense', 'U D'),
      *hf.norm_rows('transform_norm', 'predictions.LayerNorm'),
      ('head/bias', 'V', 'predictions.bias', 'V'),
      *hf.dense_rows('nsp', 'DU', 'sop_classifier.classifier', 'U D'))
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_attention_heads=64, intermediate_size=16384,
      type_vocab_size=2, layer_norm_eps=1e-12, vocab_size=30000,
      max_position_embeddings=512) | {
          'num_layers': ('inner_group_num', 1),
          'loops.passes': ('num_hidden_layers', 12),
          'embed_dim': ('embedding_size', 128),
          'ffn': ('hidden_act', 'gelu_new', hf.FFN_OF_ACTIVATION)}
  only = bert.VALUES_OF_AN_ENCODER | dict(num_hidden_groups=1)
  tied = {'predictions.decoder.weight':
          'albert.embeddings.word_embeddings.weight',
          'predictions.decoder.bias': 'predictions.bias'}
  spellings = (('albert.', ''),)
  ignored = (r'(albert\.)?embeddings\.position_ids',)
  optional = OPTIONAL_PARTS
  heads = hf.task_heads('Albert', sequence='classifier')

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    require(config.embed_dim > 0,
            f'model.embed_dim is {config.embed_dim}: transformers '
            'has a product behind the embedding of an ALBERT, whatever its '
            'width; set it to model.d_model or less')
