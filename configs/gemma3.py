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

from configs import recipes

# d_model, layers, heads, key-value heads, head_dim, d_ff, tokens.
ROWS = {
    '1b': (1152, 26, 4, 1, 256, 6912, 2e12),
    '4b': (2560, 34, 8, 4, 256, 10240, 4e12),
    '12b': (3840, 48, 16, 8, 256, 15360, 12e12),
    '27b': (5376, 62, 32, 16, 128, 21504, 14e12),
}

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                      d_ff=344, max_len=256)} | {
    name: dict(d_model=d, num_layers=n, num_heads=h, num_kv_heads=j, head_dim=k,
               d_ff=f, max_len=32768 if name == '1b' else 131072,
               vocab_size=262144 if name == '1b' else 262208)
    for name, (d, n, h, j, k, f, _) in ROWS.items()}

# Published parameter counts, for tools.count.
PUBLISHED = {'1b': 999_885_952, '4b': 3_880_263_168, '12b': 11_766_034_176,
             '27b': 27_009_346_304}
WINDOWS = {'tiny': 128, '1b': 512}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='gemma3', position='rope', norm='rmsnorm_1p',
      norm_eps=1e-6, ffn='geglu_tanh', block='sandwich',
      pattern='local,global', qk_norm=True, embed_scale=0.0,
      attention_bias=False, ffn_bias=False, tie_embeddings=True)
  c.model.kinds = {'local': dict(window=WINDOWS.get(size, 1024),
                                 rope=dict(theta=1e4)),
                   'global': dict(window=0)}
  c.model.rope.theta = 1e6
  if size == 'tiny':
    return recipes.tiny(c)
  _repeat(c.model)
  if size != '1b':
    c.model.rope.update(scaling='linear', factor=8.0)
    c.model.kinds['local']['rope'].update(scaling='none')
  if size == '27b':
    c.model.attention_scale = (5376 / 32) ** -0.5
  return recipes.pretraining(
      c, length=32768, batch_size=2**22 // 32768,
      steps=int(ROWS[size][-1] / 2**22),
      lr=3e-4 if size in ('1b', '4b') else 1.5e-4)


def _repeat(model):
  """Every sixth layer sees all. Layers that are no multiple of six stand before
  the first period, and the periods begin where they end."""
  period = ['local'] * 5 + ['global']
  first = model.num_layers % 6
  model.prefix = ','.join(period[:first])
  model.pattern = ','.join(period[first:] + period[:first])
