"""Gemma 2: `--config configs/gemma2.py:SIZE`.

Lab note. Gemma Team 2024 (arXiv 2408.00118): sizes of table 1 (its "feedforward
dim" counts the gate and the other half, so it is twice d_ff), 8,192 tokens of
context, windows of 4,096, bounds of 50 on scores and 30 on logits, and 2T, 8T
and 13T tokens (section 3.1). 27B scales scores by (width / heads) ** -0.5, as
its config.json has it. Nothing else of the training is published, and 2B and 9B
learned from a larger model's probabilities, which is not done here: batch,
learning rate and schedule are LLaMA 2's. Counts are those of the published
checkpoints, the shared embedding once.

`tiny` has windows of 128 in 256 tokens. It trains on the default text to a
held-out loss of 1.662 nats a byte (2.40 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff tokens lr '
    'parameters', rows={
        '2b': (2304, 26, 8, 4, 256, 9216, 2e12, 3e-4, 2_614_341_888),
        '9b': (3584, 42, 16, 8, 256, 14336, 8e12, 1.5e-4, 9_241_705_984),
        '27b': (4608, 46, 32, 16, 128, 36864, 13e12, 1.5e-4, 27_227_128_320),
    }, max_len=8192, vocab_size=256000, kinds=dict(local=dict(window=4096)))
SIZES['27b']['attention_scale'] = (4608 / 32) ** -0.5
SIZES['tiny'] = base.SMALL_DECODER

get_config = base.make_get_config('gemma2', SIZES, dict(norm_eps=1e-6))
