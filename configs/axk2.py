"""A.X K2: `--config configs/axk2.py:SIZE`.

Lab note. SK Telecom 2026. `light` has the defaults of transformers' AXK2Config,
which are those of A.X-K2-Light: 20.3B parameters, of which 2.6B work for a
token, 128 experts in each layer but the first, and 2,048 keys a query. How it
was trained is not known here; what is not said is DeepSeek-V3's.

`tiny` is that of DeepSeek-V3.2 without groups of experts.
"""

from configs import base, deepseek_v3, deepseek_v32

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff max_len prefix head_dim latent.q_rank '
    'latent.kv_rank latent.nope_dim latent.rope_dim latent.v_dim '
    'moe.num_experts moe.d_ff indexer.top_k indexer.heads indexer.head_dim '
    'parameters', rows={
        'light': (2048, 48, 32, 5120, 131072, 'dense', 64, 384, 128, 64, 32, 64,
                  128, 512, 2048, 16, 128, 20_314_494_976)},
    vocab_size=163840, length=4096)
SIZES['tiny'] = deepseek_v32.SIZES['tiny'] | {
    'moe.expert_groups': 1, 'moe.top_groups': 1, 'gated_norm.rank': 8}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'light': 47 * 128}

get_config = base.make_get_config(
    'axk2', SIZES, deepseek_v3.MODEL, tokens=14.8e12, batch_size=15360,
    lr=2.2e-4)
