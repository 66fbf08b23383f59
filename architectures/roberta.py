"""RoBERTa: BERT without its second task, in rows full of text (Liu et al. 2019,
sections 3 and 4).

  x_0 = LayerNorm(E[tokens] + P[2..L+1] + S[0])
  a   = LayerNorm(x + Attention(x))       every token sees every other
  x'  = LayerNorm(a + W2 gelu(W1 a))
  logits = LayerNorm(gelu(W_t x_N + b_t)) E^T + b

There is no pooler and no head of next sentences. With the head of a task
(model.head) scores are W_s tanh(W_p x_N[first] + b_p) + b_s of a row, as BERT's
pooler has it, or W_s x_N + b_s of each token. Two texts make the row
<s> first </s></s> second </s>, as in fairseq and transformers.

The first token stands at row 2 of the table of positions (fairseq counts from
the row after that of padding, whose id is 1): model.learned.offset. Row 0 is
never read, row 1 by padding alone, which nothing sees. transformers counts the
tokens before one that are no padding, and so does not count one whose id is
that of padding in the middle of a text; here every token counts.
"""

from architectures import bert
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.positions import LearnedConfig
from architectures.parts.skeletons import Encoder
from common.errors import require


class RoBERTa(Encoder):
  """tokens [B, L] -> Output; see Encoder."""
  HEAD_ACT = 'gelu'
  PAIR_SEPARATORS = 2
  PARTS = bert.BERT.PARTS | dict(next_sentence=False, learned=dict(offset=2))


PADDING_ID = 1  # of the published tokenizer


class HF(hf.HuggingFace):
  model_type = 'roberta'
  architecture = 'RobertaForMaskedLM'
  names = (
      *bert.encoder_rows('roberta'),
      *hf.dense_rows('pooler', 'DU', 'classifier.dense', 'U D'),
      *hf.dense_rows('transform', 'DU', 'lm_head.dense', 'U D'),
      *hf.norm_rows('transform_norm', 'lm_head.layer_norm'),
      ('head/bias', 'V', 'lm_head.bias', 'V'))
  fields = bert.FIELDS | hf.fields_with_defaults(vocab_size=50265)
  only = bert.VALUES_OF_AN_ENCODER
  tied = {'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
          'lm_head.decoder.bias': 'lm_head.bias'}
  spellings = (('roberta.', ''),)
  ignored = (r'(roberta\.)?embeddings\.position_ids',)
  fixed_token_ids = ('pad_token_id',)
  optional = {'pooler': r'(roberta\.)?pooler\..*',
              hf.MASKED_WORD_HEAD: r'lm_head\..*'}
  heads = hf.task_heads('Roberta', sequence='classifier.out_proj')

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
    offset = reader.read_count('pad_token_id', PADDING_ID) + 1
    rows = reader('max_position_embeddings', 512)
    require(rows > offset, f'config.json has max_position_embeddings {rows}, '
            f'of which {offset} stand before the first token: it must be '
            'larger')
    return dict(learned=dict(offset=offset), max_len=rows - offset)

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    offset = config.part(LearnedConfig).offset
    return dict(max_position_embeddings=config.max_len + offset,
                pad_token_id=offset - 1,
                tie_word_embeddings=config.tie_embeddings)
