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
    without = {f'{self.system}ForMaskedLM', f'{self.system}Model'}
    named = reader.listed('architectures')
    return dict(next_sentence=without.isdisjoint(named))

  def write(self, c: ModelConfig) -> dict:
    tree: dict[str, Any] = dict(tie_word_embeddings=c.tie_embeddings)
    if c.head == 'lm' and not c.next_sentence:
      tree['architectures'] = [f'{self.system}ForMaskedLM']
    return tree

  def of_files(self, names: Collection[str]) -> dict:
    pooler = self.optional['pooler']
    return dict(next_sentence=any(
        re.fullmatch(pooler, name) for name in names))


# The parts that a folder may lack or have too, in words.
OPTIONAL = {'pooler': r'(bert\.)?pooler\..*',
            'head of next sentences': r'cls\.seq_relationship\..*',
            hf.MASKED_WORDS: r'cls\.predictions\..*'}

def stack(name: str) -> tuple[hf.Row, ...]:
  """Returns the rows of the embedding and of the layers, under `name`."""
  embedding = hf.under(
      'embed', f'{name}.embeddings',
      ('tokens', 'VD', 'word_embeddings.weight', 'V D'),
      ('positions', 'LD', 'position_embeddings.weight', 'L D'),
      ('types', 'UD', 'token_type_embeddings.weight', 'U D'),
      *hf.norm('norm', 'LayerNorm'))
  attention = hf.attention(
      'self.query', 'self.key', 'self.value', 'output.dense')
  layers = hf.under(
      'encoder/layers', f'{name}.encoder.layer.{{n}}',
      *hf.under('attention', 'attention', *attention),
      *hf.norm('attention_norm', 'attention.output.LayerNorm'),
      *hf.dense('ffn/up', 'DF', 'intermediate.dense', 'F D'),
      *hf.dense('ffn/down', 'FD', 'output.dense', 'D F'),
      *hf.norm('ffn_norm', 'output.LayerNorm'))
  return *embedding, *layers


# The fields of every config.json of the family, but how long its rows are.
FIELDS = hf.fields(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, type_vocab_size=2, layer_norm_eps=1e-12) | {
        'ffn': ('hidden_act', 'gelu', hf.FFNS)}
ONLY = dict(position_embedding_type='absolute', is_decoder=False,
            add_cross_attention=False, tie_word_embeddings=True)


class HF(TwoTasks):
  system = 'Bert'
  model_type = 'bert'
  architecture = 'BertForPreTraining'
  names = (
      *stack('bert'),
      *hf.dense('pooler', 'DU', 'bert.pooler.dense', 'U D'),
      *hf.dense('transform', 'DU', 'cls.predictions.transform.dense', 'U D'),
      *hf.norm('transform_norm', 'cls.predictions.transform.LayerNorm'),
      ('head/bias', 'V', 'cls.predictions.bias', 'V'),
      *hf.dense('nsp', 'DU', 'cls.seq_relationship', 'U D'))
  fields = FIELDS | hf.fields(vocab_size=30522, max_position_embeddings=512)
  only = ONLY
  tied = {'cls.predictions.decoder.weight':
          'bert.embeddings.word_embeddings.weight',
          'cls.predictions.decoder.bias': 'cls.predictions.bias'}
  spellings = (('bert.', ''), ('LayerNorm.weight', 'LayerNorm.gamma'),
               ('LayerNorm.bias', 'LayerNorm.beta'))
  ignored = (r'(bert\.)?embeddings\.position_ids',)
  optional = OPTIONAL
  heads = hf.heads('Bert', sequence='classifier')
