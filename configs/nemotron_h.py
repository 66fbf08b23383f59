"""Nemotron-H: `--config configs/nemotron_h.py:SIZE`.

Lab note. NVIDIA 2025: `8b` (arXiv 2504.03624, 15T tokens, 768 rows of 8,192 a
batch, a peak of 8e-4), `9b` Nemotron Nano 2 (arXiv 2508.14444, pruned from 12B,
so that there is no recipe for it), `30b-a3b` Nemotron 3 Nano (arXiv
2512.20848, 25T tokens, 3,072 rows a batch, a peak of 1e-3), `120b-a12b`
Nemotron 3 Super (arXiv 2604.12374, 25T tokens), of which batch and peak are
Nano's here, and what predicts further tokens is left out. Widths, heads,
experts and the order of layers are those of each config.json. Their schedules
hold and then fall, or fall by a cosine; here it is a cosine. Counts are exact,
without the biases of the routers; that of Super is of transformers' class.

`tiny` has Mamba-2 in three layers of four, and networks in three.
"""

from architectures import nemotron_h
from configs import base

SIZES = {
    '8b': nemotron_h.pattern_of_letters(
        'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-') | dict(
            d_model=4096, num_heads=32, num_kv_heads=8, d_ff=21504,
            mamba2=dict(heads=128, head_dim=64), parameters=8_100_852_736),
    '9b': nemotron_h.pattern_of_letters(
        'M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-') | dict(
            d_model=4480, num_heads=40, num_kv_heads=8, d_ff=15680,
            mamba2=dict(heads=128, head_dim=80), parameters=8_888_227_328),
    '30b-a3b': nemotron_h.pattern_of_letters(
        'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME') | dict(
            d_model=2688, num_heads=32, num_kv_heads=2, d_ff=1856,
            mamba2=dict(heads=64, head_dim=64), moe=dict(
                num_experts=128, d_ff=1856, gate_scale=2.5,
                balance_weight=0.0001), batch_size=3072, tokens=25e12, lr=1e-3,
            parameters=31_577_937_344),
    '120b-a12b': nemotron_h.pattern_of_letters(
        'MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*'
        'EMEMEMEM*EMEMEMEME') | dict(
            d_model=4096, num_heads=32, num_kv_heads=2, d_ff=2688,
            mamba2=dict(heads=128, head_dim=64), moe=dict(
                num_experts=512, top_k=22, d_ff=2688, latent_dim=1024,
                gate_scale=5.0, balance_weight=0.0001), batch_size=3072,
            tokens=25e12, lr=1e-3, parameters=120_668_687_360)}
for published in SIZES.values():
  published |= dict(head_dim=128, max_len=8192, vocab_size=131_072)
  published['mamba2'] |= dict(groups=8, least_step=0.001)
SIZES['tiny'] = base.SMALL_DECODER | dict(mamba2=dict(
    state=32, groups=2, least_step=0.001))
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'30b-a3b': 23 * 128, '120b-a12b': 40 * 512}


def get_config(size: str = 'tiny'):
  c = base.make_config('nemotron_h', size=size, sizes=SIZES, tokens=15e12,
                          batch_size=768, lr=8e-4)
  if size != 'tiny':  # not beside those of the page
    c.model.kinds = {}
    c.model.update(kinds=SIZES[size]['kinds'])
  return c
