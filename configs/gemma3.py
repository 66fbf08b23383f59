"""Gemma 3, of text: `--config configs/gemma3.py:SIZE`.

Lab note. Gemma Team 2025 (arXiv 2503.19786) and the config.json of each size:
five layers with a window (512 keys in 1B, 1,024 else) for each that sees the
whole text, theta 10,000 and 1,000,000, 2T, 4T, 12T and 14T tokens (section
2.2). 1B reads 32,768 tokens, the others 131,072, to which the paper stretched
them at the end of the training by scaling the positions of the layers that see
all by 8. 27B scales scores by (width / heads) ** -0.5. Batch and learning rate
are not published: here they are LLaMA 2's, at the 32,768 tokens of the paper's
pre-training. The models learned from a larger one's probabilities, and those
from 4B on also from images; neither is done here. Counts are those of the text
model in the published checkpoints, the shared embedding once.

`tiny` has windows of 128 in 256 tokens, in every other layer. It trains on the
default text to a held-out loss of 1.464 nats a byte (2.11 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff tokens lr max_len '
    'vocab_size kinds.local.window parameters', {
        '1b': (1152, 26, 4, 1, 256, 6912, 2e12, 3e-4, 32768, 262144, 512,
               999_885_952),
        '4b': (2560, 34, 8, 4, 256, 10240, 4e12, 3e-4, 131072, 262208, 1024,
               3_880_263_168),
        '12b': (3840, 48, 16, 8, 256, 15360, 12e12, 1.5e-4, 131072, 262208,
                1024, 11_766_034_176),
        '27b': (5376, 62, 32, 16, 128, 21504, 14e12, 1.5e-4, 131072, 262208,
                1024, 27_009_346_304)})
SIZES['27b']['attention_scale'] = (5376 / 32) ** -0.5
SIZES['tiny'] = base.SMALL_DECODER


def get_config(size: str = 'tiny'):
  """Returns the config of a run of a size, a key of SIZES."""
  config = base.make_config('gemma3', size=size, sizes=SIZES, model=dict(
      norm_eps=1e-6, rope=dict(theta=1e6)), length=32768)
  # Every sixth layer attends to the whole text, the others to a window. If the
  # number of layers is no multiple of six, the remaining ones come first, as a
  # prefix, and the repeated period of six goes on where the prefix ends.
  if size != 'tiny':
    period = ['local'] * 5 + ['global']
    layers_of_prefix = config.model.num_layers % 6
    config.model.prefix = ','.join(period[:layers_of_prefix])
    config.model.pattern = ','.join(
        period[layers_of_prefix:] + period[:layers_of_prefix])

  # From 4B on, the layers that attend to the whole text scale their positions.
  if size not in ('tiny', '1b'):
    config.model.rope.update(scaling='linear', factor=8.0)
    config.model.kinds['local']['rope'].update(scaling='none')
  return config
