"""Ouro: `--config configs/ouro.py:SIZE`.

Lab note. Zhu et al. 2025 (arXiv 2510.25741): four passes, 7.7T tokens, in
stages of longer rows; 2.6B began as a copy of the half-trained 1.4B with its
layers twice. Sizes are those of the config.json of each. The count of the
published 2.6B is 2,667,974,657, of which 2,049 are of the gate that ends the
passes (loops.exit_gate). What else of the training is not known is LLaMA 2's.

`tiny` runs two layers three times.
"""

from configs import base

SIZES = base.table_of_sizes('num_layers parameters', rows={
    '1.4b': (24, 1_434_650_624), '2.6b': (48, 2_667_972_608)},
    d_model=2048, num_heads=16, d_ff=5632, max_len=65536, vocab_size=49152,
    length=4096)
SIZES['tiny'] = base.SMALL_DECODER | {'num_layers': 2, 'loops.passes': 3}

get_config = base.make_get_config(
    'ouro', SIZES, dict(norm_eps=1e-6, rope=dict(theta=1e6)), tokens=7.7e12)
