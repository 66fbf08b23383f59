"""OLMoE: `--config configs/olmoe.py:SIZE`.

Lab note. Muennighoff et al. 2024 (arXiv 2409.02060), table 10: sizes, 64
experts of which 8 work for a token, rows of 4,096 tokens, 1,024 of them a
batch; AdamW (0.9, 0.95) that decays all parameters by 0.1, embeddings and norms
too (section 4.2.4), clipping 1.0, 2,500 steps of warm-up to 4e-4, a cosine to
4e-5 over 5,033B tokens; weights of 0.01 for the balancing loss and of 0.001 for
the router's z-loss, as the paper writes them. First weights have a deviation of
0.02 (theirs are cut off at three deviations). Another 100B tokens, over which
the rate falls to 0, are not here. The count is that of the published
checkpoint; 1.3B of the parameters work for a token. 256 H100s took 10 days.

`tiny` has 16 experts of 44 hidden units, of which 8 work for a token. It trains
on the default text to a held-out loss of 1.628 nats a byte (2.35 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff max_len moe.num_experts', {
        'tiny': (128, 4, 4, 44, 256, 16),
        '1b-7b': (2048, 16, 16, 1024, 4096, 64)})
SIZES['1b-7b'] |= dict(vocab_size=50304, parameters=6_919_161_856)

get_config = base.make_get_config(
    'olmoe', SIZES, dict(norm_eps=1e-5, init='normal', moe=dict(
        balance_weight=0.01, z_loss_weight=0.001)),
    tokens=5033e9, lr=4e-4, warmup_steps=2500, decay_mask=(('.*', 1),))
