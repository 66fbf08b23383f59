"""Granite 4.0-H: `--config configs/granitemoehybrid.py:SIZE`.

Lab note. IBM 2025, the model cards: widths, heads, layers, experts and 131,072
positions (32,768 of `350m`), and the factors of each config.json; `micro`,
`1b` and `350m` have no experts. `small` is Granite-4.0-H-Small, of 32B, and
`7b-a1b` H-Tiny, of 7B. They were trained on 15T and more tokens; batch and
learning rate are not published and LLaMA 2's here, and rows have 4,096 tokens.
Counts are exact.

`tiny` has 16 experts of 32 hidden units, of which 6 work for a token.
"""

from configs import base

TEN = 'linear,linear,linear,linear,linear,full,linear,linear,linear,linear'
SIZES = base.table_of_sizes(
    'd_model num_heads num_kv_heads d_ff attention_scale logits_scale '
    'mamba2.heads parameters', rows={
        '1b': (1536, 12, 4, 4096, 1 / 128, 1 / 6, 48, 1_461_538_368),
        'micro': (2048, 32, 8, 8192, 1 / 64, 1 / 8, 64, 3_191_396_096),
        '7b-a1b': (1536, 12, 4, 1024, 1 / 128, 1 / 6, 48, 6_939_037_248),
        'small': (4096, 32, 8, 1536, 1 / 128, 1 / 16, 128, 32_207_337_984),
    }, num_layers=40, max_len=131_072, vocab_size=100_352, pattern=TEN,
    mamba2=dict(head_dim=64))
SIZES['350m'] = dict(
    d_model=768, num_layers=32, num_heads=12, num_kv_heads=4, d_ff=2048,
    max_len=32_768, vocab_size=100_352, attention_scale=1 / 64,
    logits_scale=1 / 3, residual_scale=0.246,
    mamba2=dict(head_dim=32, heads=48),
    prefix='linear,' * 10 + 'full,linear,linear,full,linear,linear,linear,full',
    pattern='linear', suffix='full,linear,linear,linear,linear',
    parameters=340_332_224)
for dense in '350m', '1b', 'micro':
  SIZES[dense]['ffn'] = 'swiglu'
SIZES['7b-a1b']['moe'] = dict(num_experts=64, d_ff=512)
SIZES['small']['moe'] = dict(num_experts=72, top_k=10, d_ff=768)
SIZES['tiny'] = base.SMALL_DECODER | dict(
    d_ff=64, attention_scale=1 / 32, logits_scale=1.0, mamba2=dict(state=32),
    moe=dict(num_experts=16, d_ff=32))

get_config = base.make_get_config(
    'granitemoehybrid', SIZES, dict(moe=dict(balance_weight=0.001)),
    length=4096, tokens=15e12)
