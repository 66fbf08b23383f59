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

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff max_len lr tokens '
    'parameters', {
        '7b': (4096, 32, 32, 32, 11008, 2048, 3.0e-4, 1.0e12, 6_738_415_616),
        '13b': (5120, 40, 40, 40, 13824, 2048, 3.0e-4, 1.0e12, 13_015_864_320),
        '33b': (6656, 60, 52, 52, 17920, 2048, 1.5e-4, 1.4e12, 32_528_943_616),
        '65b': (8192, 80, 64, 64, 22016, 2048, 1.5e-4, 1.4e12, 65_285_660_672),
        '2-7b': (4096, 32, 32, 32, 11008, 4096, 3.0e-4, 2e12, 6_738_415_616),
        '2-13b': (5120, 40, 40, 40, 13824, 4096, 3.0e-4, 2e12, 13_015_864_320),
        '2-70b': (8192, 80, 64, 8, 28672, 4096, 1.5e-4, 2e12, 68_976_648_192),
        '3-8b': (4096, 32, 32, 8, 14336, 8192, 3.0e-4, 15e12, 8_030_261_248),
        '3-70b': (8192, 80, 64, 8, 28672, 8192, 1.5e-4, 15e12, 70_553_706_496),
    }, vocab_size=32000)
for _size in ('7b', '13b', '33b'):  # the others' params.json say 1e-5
  SIZES[_size]['norm_eps'] = 1e-6
for _size in ('3-8b', '3-70b'):
  SIZES[_size] |= {'vocab_size': 128256, 'rope.theta': 500_000.0}
SIZES['tiny'] = base.SMALL_DECODER
SIZES['smollm2-135m'] = dict(
    d_model=576, num_layers=30, num_heads=9, num_kv_heads=3, d_ff=1536,
    max_len=8192, vocab_size=49152, tie_embeddings=True,
    rope=dict(theta=100_000.0), dtype='float32', remat='none', length=80,
    batch_size=4, steps=40, lr=1e-3, warmup_steps=4, schedule='linear',
    weight_decay=0.0, parameters=134_515_008)

get_config = base.make_get_config('llama', SIZES, dict(norm_eps=1e-5))
