"""Mistral 7B: `--config configs/mistral.py:SIZE`.

Lab note. Jiang et al. 2023, table 1: the sizes, a window of 4,096 keys, 8,192
tokens; its config.json has 32,768 positions, theta 10,000 and 32,000 entries.
`7b-v0.3` has no window, theta 1,000,000 and 32,768 entries, by its config.json.
Nothing of the training is published: batch, learning rate and steps are LLaMA
2's. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.577 nats a byte (2.27 bits).
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                 d_ff=448, max_len=256),
    '7b': dict(d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8,
               d_ff=14336, max_len=32768, vocab_size=32000),
    '7b-v0.3': dict(d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8,
                    d_ff=14336, max_len=32768, vocab_size=32768),
}

# Published parameter counts, for tools.count.
PUBLISHED = {'7b': 7_241_732_096, '7b-v0.3': 7_248_023_552}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='mistral', position='rope', norm='rmsnorm',
      norm_eps=1e-5, ffn='swiglu', block='pre_norm', attention='banded',
      sliding_window=4096, attention_bias=False, ffn_bias=False,
      tie_embeddings=False)
  if size == 'tiny':
    c.model.sliding_window = 64
    return recipes.tiny(c)
  if size == '7b-v0.3':
    c.model.update(attention='global', sliding_window=0)
    c.model.rope.theta = 1e6
  return recipes.pretraining(
      c, length=8192, batch_size=512, steps=500_000, lr=3e-4)
