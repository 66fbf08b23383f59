"""OLMo 2: `--config configs/olmo2.py:SIZE`.

Lab note. OLMo Team 2025 (arXiv 2501.00656): sizes of the config.json of each;
4,096 tokens; 7B, 13B and 32B train on 4, 5 and 6T tokens in batches of 1,024,
2,048 and 2,048 rows, with learning rates of 3e-4, 9e-4 and 6e-4; 1B with those
of its release, 4T tokens in batches of 512 rows by 4e-4. All weights are born
with a deviation of 0.02, log(Z)^2 of the logits has a weight of 1e-5, and AdamW
(0.9, 0.95) decays by 0.1, without embeddings, after 2,000 steps of warm-up. The
second stage, on better text, is not here. Counts are those of the published
checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.534 nats a byte (2.21 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff batch_size lr tokens '
    'parameters', rows={
        '1b': (2048, 16, 16, 16, 8192, 512, 4e-4, 4e12, 1_484_916_736),
        '7b': (4096, 32, 32, 32, 11008, 1024, 3e-4, 4e12, 7_298_617_344),
        '13b': (5120, 40, 40, 40, 13824, 2048, 9e-4, 5e12, 13_716_198_400),
        '32b': (5120, 64, 40, 8, 27648, 2048, 6e-4, 6e12, 32_234_279_936),
    }, max_len=4096, vocab_size=100352)
SIZES['tiny'] = base.SMALL_DECODER | dict(num_kv_heads=0)

get_config = base.make_get_config(
    'olmo2', SIZES,
    dict(norm_eps=1e-6, init='normal', rope=dict(theta=500_000.0)),
    {'train.z_loss': 1e-5})
