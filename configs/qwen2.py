"""Qwen2.5, dense: `--config configs/qwen2.py:SIZE`.

Lab note. Qwen Team 2024 (arXiv 2412.15115), table 1, for layers, heads, tied
embeddings and context; widths, 1,000,000 for theta and the norms' epsilon are
those of the config.json of each. 18T tokens; of its training nothing else is
published: batch, learning rate and steps are those of LLaMA 2, whose steps
stand for 2T tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.628 nats a byte (2.35 bits).
"""

from configs import recipes

# d_model, layers, heads, key-value heads, d_ff, entries of the vocabulary.
ROWS = {
    '0.5b': (896, 24, 14, 2, 4864, 151936),
    '1.5b': (1536, 28, 12, 2, 8960, 151936),
    '3b': (2048, 36, 16, 2, 11008, 151936),
    '7b': (3584, 28, 28, 4, 18944, 152064),
    '14b': (5120, 48, 40, 8, 13824, 152064),
    '32b': (5120, 64, 40, 8, 27648, 152064),
    '72b': (8192, 80, 64, 8, 29568, 152064),
}
TIED = ('0.5b', '1.5b', '3b')

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                      d_ff=344, max_len=256)} | {
    name: dict(d_model=d, num_layers=n, num_heads=h, num_kv_heads=j, d_ff=f,
               max_len=32768 if name in TIED else 131072, vocab_size=v)
    for name, (d, n, h, j, f, v) in ROWS.items()}

# Published parameter counts, for tools.count.
PUBLISHED = {
    '0.5b': 494_032_768, '1.5b': 1_543_714_304, '3b': 3_085_938_688,
    '7b': 7_615_616_512, '14b': 14_770_033_664, '32b': 32_763_876_352,
    '72b': 72_706_203_648,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='qwen2', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='swiglu', block='pre_norm', attention_bias=True,
      attention_out_bias=False, ffn_bias=False, tie_embeddings=size in TIED)
  c.model.rope.theta = 1e6
  if size == 'tiny':
    return recipes.tiny(c)
  if size in ('14b', '32b', '72b'):
    c.model.norm_eps = 1e-5
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=500_000, lr=3e-4)
