"""DeepSeek-V3: `--config configs/deepseek_v3.py:SIZE`.

Lab note. DeepSeek-AI 2024b (arXiv 2412.19437), section 4.2: 671B parameters of
which 37B work for a token, trained on 14.8T tokens, rows of 4,096 tokens,
15,360 rows a batch, which grew from 3,072 over the first 469B tokens; AdamW b1
0.9, b2 0.95, decay 0.1, clipping 1.0, 2,000 steps of warm-up to 2.2e-4, which
was held for 10T tokens and fell to 2.2e-5 by a cosine over 4.3T; first weights
with deviation 0.006; the routers' bias moves by 0.001, the balance loss of a
sequence weighs 0.0001. Here the batch does not grow, and the rate falls by a
cosine from the start. Sizes that the paper leaves out are those of the released
config.json, whose context of 163,840 tokens is from later training: with
`--config.model.rope.scaling=yarn --config.model.rope.factor=40
--config.model.rope.original_len=4096 --config.model.rope.mscale_all_dim=1`. The
count is without the module that predicts a second token, 14B more.

`kimi-k2` (Kimi Team 2025, arXiv 2507.20534, section 2 and table 2): 1.04T
parameters of which 32.6B work for a token, 15.5T tokens, rows of 4,096 tokens,
67M tokens a batch; 500 steps of warm-up to 2e-4, which was held for 10T tokens
and fell to 2e-5 by a cosine. Its optimiser, Muon with clipped queries and keys,
is AdamW here (`--config.optim.name=muon` has Muon without the clipping). Its
context of 131,072 tokens has yarn with factor 32.

`tiny` trains on the default text to a held-out loss of 1.633 nats a byte (2.36
bits).
"""

from configs import base, deepseek_v2

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff max_len prefix latent.q_rank '
    'latent.kv_rank latent.nope_dim latent.rope_dim latent.v_dim '
    'moe.num_experts moe.d_ff moe.expert_groups moe.top_groups', {
        'tiny': (128, 4, 4, 344, 256, 'dense', 64, 48, 24, 16, 24, 32, 32, 4,
                 2),
        '671b': (7168, 61, 128, 18432, 4096, 'dense,dense,dense', 1536, 512,
                 128, 64, 128, 256, 2048, 8, 4)})
SIZES['tiny']['head_dim'] = 24
SIZES['671b'] |= deepseek_v2.PUBLISHED | dict(
    vocab_size=129280, parameters=671_026_404_352)
SIZES['kimi-k2'] = SIZES['671b'] | {
    'num_heads': 64, 'prefix': 'dense', 'moe.num_experts': 384,
    'moe.expert_groups': 1, 'moe.top_groups': 1, 'moe.gate_scale': 2.827,
    'rope.theta': 50_000.0} | dict(
        vocab_size=163840, tokens=15.5e12, batch_size=16384, lr=2e-4,
        warmup_steps=500, parameters=1_026_408_209_408)
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'671b': 58 * 256, 'kimi-k2': 60 * 384}
# V3.2 and GLM-5 have these too.
MODEL = dict(norm_eps=1e-6, latent=dict(norm_eps=1e-6), moe=(
    deepseek_v2.MOE | dict(shared_experts=1, gate_scale=2.5,
                           balance_weight=0.0001, bias_rate=0.001)))

get_config = base.make_get_config(
    'deepseek_v3', SIZES, MODEL, tokens=14.8e12, batch_size=15360, lr=2.2e-4)
