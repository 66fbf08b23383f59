"""LLaMA 1 to 3: `--config configs/llama.py:SIZE`.

Lab note. LLaMA (Touvron et al. 2023a): sizes, learning rate, 4M tokens a
batch and 1.0 or 1.4T tokens of table 2; AdamW b2 0.95, cosine to 10 %, decay
0.1, clipping 1.0, 2,000 steps of warm-up. The paper says 32.5B and 65.2B for
what it calls 33B and 65B. LLaMA 2 (2023b): table 1 and appendix A.1: 4,096
tokens, 2T tokens, the same optimiser; 70B has 8 key-value heads. Llama 3
(Dubey et al. 2024): table 3, 8,192 tokens, 128,256 entries, theta 500,000,
15T tokens; its batch grows in training, 4M tokens are taken. Counts are those
of the published checkpoints.

`smollm2-135m` is a derivative of LLaMA that fits a laptop: SmolLM2-135M (Allal
et al. 2025), with the sizes of its config.json. What is set of its training is
for fine-tuning it with low-rank adapters (docs/howto/instruct.md).

`tiny` trains on the default text in 2 to 3 minutes of one CPU core, to a
held-out loss of 1.644 nats a byte (2.37 bits).

Prompt-masked fine-tuning, as Alpaca and Vicuna were made of LLaMA, by their
published templates (training/data/conversations.py):
  python train.py --config configs/llama.py --workdir runs/chat \
      --config.objective=chat --config.data.source=jsonl:talks.jsonl:messages
(or alpaca:alpaca_data.json), and what it answers:
  python eval.py --workdir runs/chat --prompt="Name three primary colours."
"""

from configs import recipes

# d_model, layers, heads, key-value heads, d_ff, learning rate, tokens.
ROWS = {
    '7b': (4096, 32, 32, 32, 11008, 3.0e-4, 1.0e12),
    '13b': (5120, 40, 40, 40, 13824, 3.0e-4, 1.0e12),
    '33b': (6656, 60, 52, 52, 17920, 1.5e-4, 1.4e12),
    '65b': (8192, 80, 64, 64, 22016, 1.5e-4, 1.4e12),
    '2-7b': (4096, 32, 32, 32, 11008, 3.0e-4, 2e12),
    '2-13b': (5120, 40, 40, 40, 13824, 3.0e-4, 2e12),
    '2-70b': (8192, 80, 64, 8, 28672, 1.5e-4, 2e12),
    '3-8b': (4096, 32, 32, 8, 14336, 3.0e-4, 15e12),
    '3-70b': (8192, 80, 64, 8, 28672, 1.5e-4, 15e12),
}

SIZES = {'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                      d_ff=344, max_len=256),
         'smollm2-135m': dict(d_model=576, num_layers=30, num_heads=9,
                              num_kv_heads=3, d_ff=1536, max_len=8192,
                              vocab_size=49152)} | {
    name: dict(d_model=d, num_layers=n, num_heads=h, num_kv_heads=j, d_ff=f,
               max_len={'2-': 4096, '3-': 8192}.get(name[:2], 2048),
               vocab_size=128256 if name.startswith('3-') else 32000)
    for name, (d, n, h, j, f, _, _) in ROWS.items()}

# Published parameter counts, for tools.count.
PUBLISHED = {
    '7b': 6_738_415_616, '13b': 13_015_864_320, '33b': 32_528_943_616,
    '65b': 65_285_660_672, '2-7b': 6_738_415_616, '2-13b': 13_015_864_320,
    '2-70b': 68_976_648_192, '3-8b': 8_030_261_248, '3-70b': 70_553_706_496,
    'smollm2-135m': 134_515_008,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='llama', position='rope', norm='rmsnorm',
      norm_eps=1e-5, ffn='swiglu', block='pre_norm', attention_bias=False,
      ffn_bias=False, tie_embeddings=False)
  if size == 'tiny':
    return recipes.tiny(c)
  if size.startswith('smollm2'):
    return _smollm2(c)
  *_, lr, tokens = ROWS[size]
  if size in ('7b', '13b', '33b'):  # the others' params.json say 1e-5
    c.model.norm_eps = 1e-6
  if size.startswith('3-'):
    c.model.rope.theta = 500_000.0
  return recipes.pretraining(c, batch_size=2**22 // c.data.length,
                             steps=int(tokens / 2**22), lr=lr)


def _smollm2(c):
  """For fine-tuning it on a laptop."""
  c.model.tie_embeddings = True
  c.model.rope.theta = 100_000.0
  c.data.update(length=80, batch_size=4)
  c.train.steps = 40
  c.optim.update(lr=1e-3, warmup_steps=4, schedule='linear', weight_decay=0.0)
  return c
