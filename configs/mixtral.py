"""Mixtral: `--config configs/mixtral.py:SIZE`.

Lab note. Jiang et al. 2024, table 1: 8x7B, 32,768 tokens of context, 46.7B
parameters of which 12.9B work for a token; 8x22B by its release (141B, 39B
active, 65,536 tokens). Nothing of the training is published: batch, learning
rate and steps here are LLaMA 2's. The balancing loss's weight, 0.02, is that of
the released config. Counts are those of the published checkpoints (8x22B in
its first release, with 32,000 entries of vocabulary).

`tiny` trains on the default text in 3 minutes of one CPU core, to a held-out
loss of 1.608 nats a byte (2.32 bits), the busiest expert of a layer with 1.05
to 1.10 of the mean load.
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                 d_ff=172, max_len=256),
    '8x7b': dict(d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8,
                 d_ff=14336, max_len=32768, vocab_size=32000),
    '8x22b': dict(d_model=6144, num_layers=56, num_heads=48, num_kv_heads=8,
                  d_ff=16384, max_len=65536, vocab_size=32000),
}

# Published parameter counts, for tools.count.
PUBLISHED = {'8x7b': 46_702_792_704, '8x22b': 140_620_634_112}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='mixtral', position='rope', norm='rmsnorm', ffn='moe',
      block='pre_norm', attention_bias=False, ffn_bias=False,
      tie_embeddings=False)
  c.model.moe.update(num_experts=8, top_k=2, router='topk', ffn='swiglu',
                     dispatch='auto', capacity_factor=0.0,
                     eval_capacity_factor=0.0, normalize_gates=True,
                     balance_weight=0.02)
  if size == 'tiny':
    c.model.moe.num_experts = 4
    return recipes.tiny(c)
  c.model.rope.theta = 1e6
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=500_000, lr=3e-4)
