"""GLM-5: `--config configs/glm_moe_dsa.py:SIZE`.

Lab note. GLM-5 Team 2026 (arXiv 2602.15763): `744b-a40b`, without the module
that predicts a second token, and 28.5T tokens in all, at first in rows of 4,096
tokens, at the end of 202,752; the indexer came late, by the stages of
DeepSeek-V3.2. Theta is that of the released config.json. Their optimiser is
Muon; AdamW is here, with the batch and the rate of GLM-4.5
(configs/glm4_moe.py).

`tiny` is that of DeepSeek-V3.2 without groups of experts.
"""

from configs import base, deepseek_v2, deepseek_v3, deepseek_v32

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff max_len prefix latent.q_rank '
    'latent.kv_rank latent.nope_dim latent.rope_dim latent.v_dim '
    'moe.num_experts moe.d_ff indexer.top_k indexer.heads indexer.head_dim '
    'parameters', rows={
        '744b-a40b': (6144, 78, 64, 12288, 4096, 'dense,dense,dense', 2048, 512,
                      192, 64, 256, 256, 2048, 2048, 32, 128, 743_911_199_232)},
    rope=dict(theta=1e6), vocab_size=154880,
    **deepseek_v2.PUBLISHED | dict(head_dim=192))
SIZES['tiny'] = deepseek_v32.SIZES['tiny'] | {
    'moe.expert_groups': 1, 'moe.top_groups': 1}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'744b-a40b': 75 * 256}

get_config = base.make_get_config(
    'glm_moe_dsa', SIZES, deepseek_v3.MODEL | dict(norm_eps=1e-5),
    tokens=28.5e12, batch_size=16384, lr=2.5e-4)
