"""Llama 4, of text: `--config configs/llama4.py:SIZE`.

Lab note. Meta 2025, "The Llama 4 herd" and the model card: `17b-16e` is Scout,
of 40T tokens, and `17b-128e` Maverick, of 22T; both were trained on rows of up
to 256K tokens. Widths, heads, experts, chunks and theta are those of the
text_config of each config.json; Scout's, which is for 10M tokens, also
stretches its positions (model.rope.scaling=llama3). Batch and learning rate are
not published and LLaMA 2's here. Counts are without what reads images.

`tiny` has chunks of 64 in rows of 256, and 16 experts of 172 hidden units.
"""

from configs import base

SIZES = base.table_of_sizes(
    'moe.num_experts max_len tokens parameters', rows={
        '17b-16e': (16, 262_144, 40e12, 107_769_861_120),
        '17b-128e': (128, 262_144, 22e12, 400_711_848_960),
    }, d_model=5120, num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128,
    d_ff=16384, vocab_size=202_048, attention_chunk=8192, rope=dict(theta=5e5),
    moe=dict(d_ff=8192), length=8192)
SIZES['17b-128e'] |= dict(
    pattern='chunk_dense,chunk,chunk_dense,full', kinds=dict(
        chunk_dense=dict(attention='chunked', ffn='dense'),
        chunk=dict(qk_norm=False)))
SIZES['tiny'] = base.SMALL_DECODER | dict(
    attention_chunk=64, attention_log_from=64, moe=dict(
        num_experts=16, d_ff=172))

get_config = base.make_get_config(
    'llama4', SIZES, dict(moe=dict(balance_weight=0.001)))
