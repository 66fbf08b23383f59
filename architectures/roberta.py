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
    offset = reader.read_count('pad_token_id', PADDING_ID) + 1
    rows = reader('max_position_embeddings', 512)
    require(rows > offset, f'config.json has max_position_embeddings {rows}, '
            f'of which {offset} stand before the first token: it must be '
            'larger')
    return dict(learned=dict(offset=offset), max_len=rows - offset)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    offset = config.part(LearnedConfig).offset
    return dict(max_position_embeddings=config.max_len + offset,
                pad_token_id=offset - 1,
                tie_word_embeddings=config.tie_embeddings)
