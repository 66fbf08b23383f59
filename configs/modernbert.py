"""ModernBERT: `--config configs/modernbert.py:SIZE`.

Lab note. Warner et al. 2024, section 2 and appendix A: 22 layers of 768 and 28
of 1,024, windows of 128 tokens (64 on either side) in two layers of three, a
vocabulary of 50,368; masks of 30 %, AdamW (with the clipping of StableAdamW)
b2 0.98, eps 1e-6, decay 1e-5; 1.7T tokens in rows of 1,024, then 300B in rows
of 8,192, of which the first part is set here: batches of 4,608 rows and a
learning rate of 8e-4 for base, 4,928 and 5e-4 for large, constant after a
warm-up (wsd). 8 H100.

Counts are those of transformers' ModernBertForMaskedLM, with its head.

`tiny` learns masked bytes in rows of 64, 15 % of them masked: 600 steps of 32
rows, 1.2M bytes in all, to 1.47 nats and 56 % right of those held out. Rotary
positions spare it the plateau of BERT's `tiny` (configs/bert.py).
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers d_model num_heads d_ff max_len lr batch_size data.mask_rate '
    'kinds.local.window', {
        'tiny': (4, 128, 4, 192, 64, 2e-3, 32, 0.15, 9),
        'base': (22, 768, 12, 1152, 8192, 8e-4, 4608, 0.3, 65),
        'large': (28, 1024, 16, 2624, 8192, 5e-4, 4928, 0.3, 65)})
SIZES['tiny'] |= dict(steps=600, warmup_steps=100)
SIZES['base'] |= dict(vocab_size=50368, parameters=149_655_232)
SIZES['large'] |= dict(vocab_size=50368, parameters=395_881_664)

get_config = base.make_get_config(
    'modernbert', SIZES, dict(rope=dict(theta=160_000.0), kinds={
        'local': dict(rope=dict(theta=10_000.0)), 'global': {}}),
    dict(objective='mlm'), remat='dots', length=1024, tokens=1.719e12,
    warmup=3e9, schedule='wsd', weight_decay=1e-5, b2=0.98, eps=1e-6)
