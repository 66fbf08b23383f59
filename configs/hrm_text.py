"""HRM-Text: `--config configs/hrm_text.py:SIZE`.

Lab note. Sapient 2026 (sapientinc/HRM-Text-1B). The size is that of the
defaults of transformers' HrmTextConfig: 16 layers in each of two stacks, of
which a token goes through 128. The count leaves out the first state of the
lower stack, 1,536 zeros that are never trained. How it was trained is not
known here; what is not said is LLaMA 2's.

`tiny` runs one layer twice and another one once, two times over.
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers parameters', rows={'1b': (32, 1_447_821_312)},
    d_model=1536, num_heads=12, d_ff=4096, max_len=2048, vocab_size=151808,
    length=2048)
SIZES['tiny'] = base.SMALL_DECODER | {'num_layers': 2, 'loops.low_cycles': 2}

get_config = base.make_get_config(
    'hrm_text', SIZES, dict(norm_eps=1e-6), tokens=2e12)
