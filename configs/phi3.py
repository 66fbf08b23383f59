"""Phi-3: `--config configs/phi3.py:SIZE`.

Lab note. Abdin et al. 2024 (arXiv 2404.14219, section 2): 3.8B parameters in 32
layers of width 3,072 with 32 heads, 4,096 tokens of context and 3.3T tokens
(mini); 14B in 40 layers of width 5,120 with 40 heads and 4.8T tokens (medium).
Windows of 2,047 and medium's 10 key-value heads are those of the released
config.json of 4,096 tokens. Batch, learning rate and schedule are not
published: here they are LLaMA 2's. Counts are those of the published
checkpoints. The versions for 128K tokens are the same but for the factors of
longrope, which their config.json has: an import reads them.

`tiny` has windows of 128 in 256 tokens. It trains on the default text to a
held-out loss of 1.580 nats a byte (2.28 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff tokens parameters', rows={
        'mini': (3072, 32, 32, 32, 8192, 3.3e12, 3_821_079_552),
        'medium': (5120, 40, 40, 10, 17920, 4.8e12, 13_960_238_080),
    }, max_len=4096, vocab_size=32064, sliding_window=2047)
SIZES['tiny'] = base.SMALL_DECODER | dict(num_kv_heads=0, sliding_window=128)

get_config = base.make_get_config('phi3', SIZES, dict(norm_eps=1e-5))
