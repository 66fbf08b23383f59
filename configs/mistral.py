"""Mistral 7B: `--config configs/mistral.py:SIZE`.

Lab note. Jiang et al. 2023, table 1: the sizes, a window of 4,096 keys, 8,192
tokens; its config.json has 32,768 positions, theta 10,000 and 32,000 entries.
`7b-v0.3` has no window, theta 1,000,000 and 32,768 entries, by its config.json.
Nothing of the training is published: batch, learning rate and steps are LLaMA
2's. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.577 nats a byte (2.27 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff max_len sliding_window', {
        'tiny': (128, 4, 4, 2, 448, 256, 64),
        '7b': (4096, 32, 32, 8, 14336, 32768, 4096),
        '7b-v0.3': (4096, 32, 32, 8, 14336, 32768, 0)})
SIZES['7b'] |= dict(vocab_size=32000, parameters=7_241_732_096)
SIZES['7b-v0.3'] |= dict(vocab_size=32768, parameters=7_248_023_552,
                         attention='global', rope=dict(theta=1e6))

get_config = base.make_get_config(
    'mistral', SIZES, dict(norm_eps=1e-5), length=8192)
