"""DeepSeek-V3.2: `--config configs/deepseek_v32.py:SIZE`.

Lab note. DeepSeek-AI 2025 (arXiv 2512.02556), section 2.1.1. `671b` is
DeepSeek-V3 (configs/deepseek_v3.py) with an indexer of 64 heads of 128 features
in each layer, 0.9B parameters, and 2,048 keys a query; the count is without the
module that predicts a second token. Its run is the sparse training: from V3.1's
weights, whose context is 128K tokens by yarn, 15,000 steps of 480 rows of 128K
tokens, 944B tokens, at 7.3e-6. Before it came 1,000 steps of 16 rows in which
the indexer alone learned, at 1e-3: `--config.model.indexer.top_k=0
--config.optim.freeze='(?!.*/indexer/).*'`.

`tiny` is that of DeepSeek-V3, of whose 256 tokens a query sees 64.
"""

from configs import base, deepseek_v3

SIZES = {
    'tiny': deepseek_v3.SIZES['tiny'] | {
        'indexer.heads': 4, 'indexer.head_dim': 24},
    '671b': deepseek_v3.SIZES['671b'] | {
        'max_len': 131072, 'rope.scaling': 'yarn', 'rope.factor': 40.0,
        'rope.original_len': 4096, 'rope.mscale_all_dim': 1.0,
        'indexer.top_k': 2048, 'indexer.heads': 64, 'indexer.head_dim': 128,
        'parameters': 671_877_929_216}}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'671b': 58 * 256}

get_config = base.make_get_config(
    'deepseek_v32', SIZES, deepseek_v3.MODEL, steps=15_000, batch_size=480,
    lr=7.3e-6, warmup_steps=0, schedule='constant')
