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

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff max_len parameters', rows={
        '8x7b': (4096, 32, 32, 8, 14336, 32768, 46_702_792_704),
        '8x22b': (6144, 56, 48, 8, 16384, 65536, 140_620_634_112),
    }, vocab_size=32000, moe=dict(num_experts=8), rope=dict(theta=1e6))
SIZES['tiny'] = base.SMALL_DECODER | dict(d_ff=172, moe=dict(num_experts=4))

get_config = base.make_get_config('mixtral', SIZES, dict(moe=dict(
    dispatch='auto', capacity_factor=0.0, eval_capacity_factor=0.0,
    balance_weight=0.02)), length=4096)
