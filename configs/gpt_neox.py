"""GPT-NeoX-20B and the Pythia ladder: `--config configs/gpt_neox.py:SIZE`.

Lab note. 20B (Black et al. 2022): table 1 and section 3: 1,538 sequences of
2,048 tokens a batch, 150,000 steps, learning rate 0.97e-4, Adam b2 0.95, decay
0.01, cosine to 10 %, 1 % warm-up; 96 A100. Pythia (Biderman et al. 2023):
tables 1 and 6: 1,024 sequences, 143,000 steps (300B tokens of the Pile), decay
0.01, flash attention; the vocabulary is padded differently with the degree of
tensor parallelism, hence three sizes of it. Counts are exact. Pythia's gelu is
the exact one, 20B's the tanh approximation.

`tiny` trains on the default text in 3 minutes of one CPU core, to a held-out
loss of 1.772 nats a byte (2.56 bits).
"""

from configs import recipes

# d_model, layers, heads, vocabulary, learning rate.
ROWS = {
    '20b': (6144, 44, 64, 50432, 0.97e-4),
    'pythia-70m': (512, 6, 8, 50304, 10.0e-4),
    'pythia-160m': (768, 12, 12, 50304, 6.0e-4),
    'pythia-410m': (1024, 24, 16, 50304, 3.0e-4),
    'pythia-1b': (2048, 16, 8, 50304, 3.0e-4),
    'pythia-1.4b': (2048, 24, 16, 50304, 2.0e-4),
    'pythia-2.8b': (2560, 32, 32, 50304, 1.6e-4),
    'pythia-6.9b': (4096, 32, 32, 50432, 1.2e-4),
    'pythia-12b': (5120, 36, 40, 50688, 1.2e-4),
}

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, max_len=256)} | {
    name: dict(d_model=d, num_layers=n, num_heads=h, vocab_size=v,
               max_len=2048)
    for name, (d, n, h, v, _) in ROWS.items()}

# Published parameter counts, for tools.count.
PUBLISHED = {
    '20b': 20_554_567_680, 'pythia-70m': 70_426_624,
    'pythia-160m': 162_322_944, 'pythia-410m': 405_334_016,
    'pythia-1b': 1_011_781_632, 'pythia-1.4b': 1_414_647_808,
    'pythia-2.8b': 2_775_208_960, 'pythia-6.9b': 6_857_302_016,
    'pythia-12b': 11_846_072_320,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='gpt_neox', position='rope', norm='layernorm',
      ffn='gelu', block='parallel', tie_embeddings=False)
  c.model.rope.fraction = 0.25
  if size == 'tiny':
    return recipes.tiny(c)
  rows, steps = 1024, 143_000
  if size == '20b':
    c.model.ffn = 'gelu_tanh'
    rows, steps = 1536, 150_000  # 1,538 rows, made divisible
  return recipes.pretraining(
      c, batch_size=rows, steps=steps, lr=ROWS[size][-1],
      warmup_steps=steps // 100, weight_decay=0.01)
