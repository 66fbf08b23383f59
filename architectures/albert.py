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


OPTIONAL = {'pooler': r'(albert\.)?pooler\..*',
            'head of the order of sentences': r'sop_classifier\..*',
            hf.MASKED_WORDS: r'predictions\..*'}
LAYERS = 'albert.encoder.albert_layer_groups.0.albert_layers.{n}'


class HF(bert.TwoTasks):
  system = 'Albert'
  model_type = 'albert'
  architecture = 'AlbertForPreTraining'
  names = (
      *(row for row in bert.stack('albert') if row[0].startswith('embed/')),
      *hf.dense('widen', 'UD', 'albert.encoder.embedding_hidden_mapping_in',
                'D U'),
      *hf.under(
          'encoder/layers', LAYERS,
          *hf.under('attention', 'attention', *hf.attention(
              'query', 'key', 'value', 'dense')),
          *hf.norm('attention_norm', 'attention.LayerNorm'),
          *hf.dense('ffn/up', 'DF', 'ffn', 'F D'),
          *hf.dense('ffn/down', 'FD', 'ffn_output', 'D F'),
          *hf.norm('ffn_norm', 'full_layer_layer_norm')),
      *hf.dense('pooler', 'DU', 'albert.pooler', 'U D'),
      *hf.dense('transform', 'DU', 'predictions.dense', 'U D'),
      *hf.norm('transform_norm', 'predictions.LayerNorm'),
      ('head/bias', 'V', 'predictions.bias', 'V'),
      *hf.dense('nsp', 'DU', 'sop_classifier.classifier', 'U D'))
  fields = hf.fields(
      hidden_size=4096, num_attention_heads=64, intermediate_size=16384,
      type_vocab_size=2, layer_norm_eps=1e-12, vocab_size=30000,
      max_position_embeddings=512) | {
          'num_layers': ('inner_group_num', 1),
          'loops.passes': ('num_hidden_layers', 12),
          'embed_dim': ('embedding_size', 128),
          'ffn': ('hidden_act', 'gelu_new', hf.FFNS)}
  only = bert.ONLY | dict(num_hidden_groups=1)
  tied = {'predictions.decoder.weight':
          'albert.embeddings.word_embeddings.weight',
          'predictions.decoder.bias': 'predictions.bias'}
  spellings = (('albert.', ''),)
  ignored = (r'(albert\.)?embeddings\.position_ids',)
  optional = OPTIONAL
  heads = hf.heads('Albert', sequence='classifier')

  def check(self, c: ModelConfig) -> None:
    require(c.embed_dim > 0, f'model.embed_dim is {c.embed_dim}: transformers '
            'has a product behind the embedding of an ALBERT, whatever its '
            'width; set it to model.d_model or less')
