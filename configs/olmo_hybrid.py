"""Olmo Hybrid: `--config configs/olmo_hybrid.py:SIZE`.

Lab note. Ai2 2026: widths, heads, layers and 100,352 entries are those of the
config.json of Olmo-Hybrid-7B. `7b` is as it is pre-trained, on 8,192 tokens and
turned, by the script of the authors' OLMo-core: 4M tokens a batch, a learning
rate of 3e-4, AdamW (0.9, 0.95) that decays by 0.1, without embeddings, after
2,000 steps of warm-up, and a weight of 1e-5 for log(Z)^2 of the logits; 6T
tokens in all. `7b-64k` is as it is released, for 65,536 tokens and without
positions. The count is that of transformers' class.

`tiny` trains on the default text to a held-out loss of 1.304 nats a byte (1.88
bits).
"""

from configs import base

SIZES = {'7b': dict(
    d_model=3840, num_layers=32, num_heads=30, num_kv_heads=30, d_ff=11008,
    max_len=8192, vocab_size=100352, deltanet=dict(key_dim=96, value_dim=192),
    parameters=7_430_870_688)}
SIZES['7b-64k'] = SIZES['7b'] | dict(max_len=65536, position='none')
SIZES['tiny'] = base.SMALL_DECODER | dict(
    num_kv_heads=0, deltanet=dict(key_dim=24, value_dim=48))

get_config = base.make_get_config(
    'olmo_hybrid', SIZES, dict(
        norm_eps=1e-6, init='normal', deltanet=dict(norm_eps=1e-5),
        rope=dict(theta=500_000.0)),
    {'train.z_loss': 1e-5}, batch=2**22, tokens=6e12)
