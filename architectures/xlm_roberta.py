"""XLM-R: RoBERTa over texts of 100 languages, with one vocabulary for all
(Conneau et al. 2020, arXiv 1911.02116, section 3).

  x_0 = LayerNorm(E[tokens] + P[2..L+1] + S[0])    E has 250,002 rows

All else is RoBERTa's (architectures/roberta.py). No embedding tells the
language, so a text may be of several.
"""

from architectures import roberta
from architectures.parts import hf


class XLMR(roberta.RoBERTa):
  """tokens [B, L] -> Output; see Encoder."""


class HF(roberta.HF):
  model_type = 'xlm-roberta'
  architecture = 'XLMRobertaForMaskedLM'
  fields = roberta.HF.fields | hf.fields_with_defaults(vocab_size=30522)
  heads = hf.task_heads('XLMRoberta', sequence='classifier.out_proj')
