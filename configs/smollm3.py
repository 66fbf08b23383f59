"""SmolLM3: `--config configs/smollm3.py:SIZE`.

Lab note. Hugging Face 2025 (the post "SmolLM3: smol, multilingual, long-context
reasoner", and the scripts that it names): 11.1T tokens, 576 rows of 4,096 a
batch, documents apart in attention; AdamW (0.9, 0.95) that decays by 0.1,
without embeddings, clipping 1.0, 2,000 steps of warm-up to 2e-4, which falls to
0 in a line over the last 522,000 of 4,720,000 steps. 384 H100s took 24 days.
`3b` is as it was pre-trained, with theta 50,000; `3b-64k` as it is released,
for 65,536 tokens and theta 5,000,000, to which two short stages took it that
are not here. The count is that of the published checkpoint.

`tiny` trains on the default text to a held-out loss of 1.590 nats a byte (2.29
bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'max_len rope.theta', rows={'3b': (4096, 50_000.0), '3b-64k': (65536, 5e6)},
    d_model=2048, num_layers=36, num_heads=16, num_kv_heads=4, d_ff=11008,
    vocab_size=128256, parameters=3_075_098_624,
    **{'data.document_mask': True})
SIZES['tiny'] = base.SMALL_DECODER | {'rope.theta': 50_000.0}

get_config = base.make_get_config(
    'smollm3', SIZES, dict(norm_eps=1e-6), batch=576 * 4096, steps=4_720_000,
    lr=2e-4, schedule='wsd', final_fraction=0.0,
    decay_fraction=522_000 / 4_720_000)
