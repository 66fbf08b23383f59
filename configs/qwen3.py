"""Qwen3, dense: `--config configs/qwen3.py:SIZE`.

Lab note. Qwen Team 2025 (arXiv 2505.09388), table 1, for layers, heads and tied
embeddings; widths, heads of 128 features, 1,000,000 for theta and 32,768
positions are those of the config.json of each base model (which YaRN stretches
to 128K from 4B on). 36T tokens; of its training nothing else is published:
batch, learning rate and steps are those of LLaMA 2, whose steps stand for 2T
tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.558 nats a byte (2.25 bits).
"""

from configs import recipes

# d_model, layers, heads, key-value heads, d_ff.
ROWS = {
    '0.6b': (1024, 28, 16, 8, 3072), '1.7b': (2048, 28, 16, 8, 6144),
    '4b': (2560, 36, 32, 8, 9728), '8b': (4096, 36, 32, 8, 12288),
    '14b': (5120, 40, 40, 8, 17408), '32b': (5120, 64, 64, 8, 25600),
}
TIED = ('0.6b', '1.7b', '4b')

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                      d_ff=344, max_len=256)} | {
    name: dict(d_model=d, num_layers=n, num_heads=h, num_kv_heads=j,
               head_dim=128, d_ff=f, max_len=32768, vocab_size=151936)
    for name, (d, n, h, j, f) in ROWS.items()}

# Published parameter counts, for tools.count.
PUBLISHED = {
    '0.6b': 596_049_920, '1.7b': 1_720_574_976, '4b': 4_022_468_096,
    '8b': 8_190_735_360, '14b': 14_768_307_200, '32b': 32_762_123_264,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='qwen3', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='swiglu', block='pre_norm', qk_norm=True,
      qk_norm_over='head', attention_bias=False, ffn_bias=False,
      tie_embeddings=size in TIED)
  c.model.rope.theta = 1e6
  if size == 'tiny':
    return recipes.tiny(c)
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=500_000, lr=3e-4)
