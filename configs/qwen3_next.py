"""Qwen3-Next: `--config configs/qwen3_next.py:SIZE`.

Lab note. Qwen Team 2025, "Qwen3-Next: Towards Ultimate Training & Inference
Efficiency" (qwen.ai, September 2025): layers, experts, and 15T tokens, drawn
evenly from the 36T of Qwen3; widths, vocabulary, theta and 262,144 positions
are those of the config.json of Qwen3-Next-80B-A3B. The count is that of the
published checkpoint without the module that predicts a second token, which is
trained with it there and is not here. Norms decay, as the report says, and
batch and learning rate, which it does not say, are those of the other Qwen3
here. The weight of the balancing loss is that of config.json.

`tiny` has 32 experts of 24 hidden units, of which 10 work for a token, and
recurrences with 2 heads of keys and 4 of values: for trials on the default
text, on which it trains to a held-out loss of 1.272 nats a byte (1.84 bits).
"""

from configs import base

# Qwen3.5 shares these: the fields of published sizes, of the small one, and the
# decay.
SAME = dict(
    head_dim=256, max_len=262144, rope=dict(theta=1e7), deltanet=dict(
        key_heads=16, key_dim=128, value_dim=128))
TINY = base.SMALL_DECODER | dict(
    head_dim=48, rope=dict(theta=1e4), deltanet=dict(
        key_heads=2, value_heads=4, key_dim=32, value_dim=32))
DECAY = {'optim.decay_mask': (
    ('.*_norm/offset', 1), ('.*(embed|scale|bias|conv).*', 0), ('.*', 1))}
SIZES = {
    'tiny': TINY | dict(moe=dict(num_experts=32, d_ff=24)),
    '80b-a3b': SAME | {'deltanet.value_heads': 32} | dict(
        d_model=2048, num_layers=48, num_heads=16, num_kv_heads=2, d_ff=5120,
        moe=dict(num_experts=512, d_ff=512), vocab_size=151936,
        parameters=79_674_391_296)}

get_config = base.make_get_config(
    'qwen3_next', SIZES, dict(norm_eps=1e-6, moe=dict(balance_weight=0.001)),
    DECAY, length=4096, tokens=15e12)
