"""UMT5: mT5 with a table of relative biases in every layer (Chung et al. 2023,
arXiv 2304.09151).

  x_0 = E[tokens]                           E has 256,384 rows
  a   = x + Attention(RMSNorm(x))           scores q k + b_n[h, bucket(i - j)]
  b   = a + CrossAttention(RMSNorm(a), memory)          in the decoder
  x'  = b + W2 (gelu(Wg x) * W1 x)
  logits = W_head RMSNorm(x_N)

The tables b_n of the layers n are theirs alone, where T5 (architectures/t5.py)
has one for all of a stack. What the paper is about is how often languages are
drawn: each as often as others, but for a cap on how often a text is repeated.
"""

from architectures import mt5, t5
from architectures.parts.skeletons import EncoderDecoder


class UMT5(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = mt5.MT5.PARTS | dict(position='relative_by_layer')


class HF(t5.HF):
  model_type = 'umt5'
  architecture = 'UMT5ForConditionalGeneration'
  fields = t5.FIELDS | mt5.DEFAULT_SIZES
  # Published files have the last, which the reference does not read.
  ignored = ()
