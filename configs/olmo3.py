"""OLMo 3: `--config configs/olmo3.py:SIZE`.

Lab note. Sizes, 100,278 entries and a window of 4,096 keys are those of the
config.json of Olmo-3-1025-7B and Olmo-3-1125-32B. `7b` and `32b` are as they
are pre-trained, on 8,192 tokens, by the scripts of the authors' OLMo-core: 4M
and 8M tokens a batch with learning rates of 3e-4 and 6e-4, AdamW (0.9, 0.95)
that decays by 0.1, without embeddings, after 2,000 steps of warm-up, and a
weight of 1e-5 for log(Z)^2 of the logits. 5T tokens, as the first schedule of
7B has it, are taken for both. `7b-64k` and `32b-64k` are as they are released,
for 65,536 tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text to a held-out loss of 1.547 nats a byte (2.23
bits).
"""

from configs import recipes

# d_model, layers, heads, key-value heads, d_ff, rows, learning rate.
ROWS = {
    '7b': (4096, 32, 32, 32, 11008, 512, 3e-4),
    '32b': (5120, 64, 40, 8, 27648, 1024, 6e-4),
}

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, d_ff=344,
                      max_len=256)} | {
    name + more: dict(d_model=d, num_layers=n, num_heads=h, num_kv_heads=j,
                      d_ff=f, max_len=length, vocab_size=100278)
    for name, (d, n, h, j, f, *_) in ROWS.items()
    for more, length in (('', 8192), ('-64k', 65536))}

# Published parameter counts, for tools.count.
PUBLISHED = {
    '7b': 7_298_011_136, '7b-64k': 7_298_011_136, '32b': 32_233_522_176,
    '32b-64k': 32_233_522_176,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='olmo3', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='swiglu', block='out_norm', qk_norm=True,
      qk_norm_over='projection', attention_bias=False,
      pattern='local,local,local,global', ffn_bias=False, tie_embeddings=False,
      init='normal')
  c.model.kinds = {'local': dict(window=64 if size == 'tiny' else 4096),
                   'global': dict(window=0)}
  c.model.rope.theta = 500_000.0
  c.train.z_loss = 1e-5
  if size == 'tiny':
    return recipes.tiny(c)
  if size.endswith('-64k'):
    c.model.rope.update(scaling='yarn', factor=8.0, original_len=8192)
    c.model.kinds['local']['rope'] = dict(scaling='none')
  *_, rows, lr = ROWS[size.removesuffix('-64k')]
  return recipes.pretraining(
      c, batch_size=rows * 8192 // c.data.length,
      steps=int(5e12 / (rows * 8192)), lr=lr)
