"""DiffLlama: `--config configs/diffllama.py:SIZE`.

Lab note. `1b` has the widths, heads and layers of the defaults of transformers'
DiffLlamaConfig, and the count is that of its class. Of its training nothing is
published: it is set as LLaMA 2's. The paper's own models (Ye et al. 2024) have
norms with a scale and heads in another order.
"""

from architectures import diffllama
from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff parameters',
    rows={'1b': (2048, 16, 32, 32, 8192, 1_204_885_504)},
    max_len=2048, vocab_size=32000, **diffllama.kinds_by_depth(16))
SIZES['tiny'] = base.SMALL_DECODER | diffllama.kinds_by_depth(4)

get_config = base.make_get_config('diffllama', SIZES, dict(norm_eps=1e-5))
