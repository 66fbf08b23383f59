"""Kimi Linear: `--config configs/kimi_linear.py:SIZE`.

Lab note. Kimi Team 2025 (arXiv 2510.26692), sections 5.4 and 5.4.1: 48B
parameters of which 3B work for a token; the published checkpoints saw 5.7T
tokens, rows of 4,096, 32M tokens a batch, MuonClip, a learning rate of 1.1e-3
that is held and then decays (WSD). Sizes are those of the config.json of
Kimi-Linear-48B-A3B: the first layer is dense, and layers 4, 8, ..., 24 and 27
attend. Its context of 1,048,576 tokens is from later training. The paper counts
the shared expert among the 8 of a token; config.json has it beside them, as
here. The paper gives neither the warm-up, here 500 steps, nor the decay, here
over the last tenth of the steps to a tenth of the rate. Muon here has no bound
on the scores, as MuonClip has. The routers' bias and the balance loss are those
of DeepSeek-V3. The count is exact.

`tiny` has the kinds of the first four layers, and 32 experts of 32 hidden
units. It trains on the default text to a held-out loss of 1.357 nats a byte
(1.96 bits).
"""

from configs import base, deepseek_v2

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, head_dim=24, d_ff=344,
                 max_len=256,
                 latent=dict(kv_rank=48, nope_dim=24, rope_dim=16, v_dim=24),
                 kda=dict(key_heads=4, key_dim=24, value_dim=24),
                 moe=dict(num_experts=32, d_ff=32)),
    '48b-a3b': dict(d_model=2304, num_layers=27, num_heads=32, head_dim=128,
                    d_ff=9216, max_len=1048576, vocab_size=163840,
                    # The last layer, which attends, comes after two
                    # recurrences instead of three.
                    prefix='linear_dense,linear',
                    pattern='linear,full,linear,linear', suffix='full',
                    latent=dict(kv_rank=512, nope_dim=128, rope_dim=64,
                                v_dim=128),
                    kda=dict(key_heads=32, key_dim=128, value_dim=128),
                    moe=dict(num_experts=256, d_ff=1024),
                    parameters=49_122_675_072),
}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'48b-a3b': 26 * 256}

get_config = base.make_get_config(
    'kimi_linear', SIZES, dict(
        norm_eps=1e-5, latent=dict(norm_eps=1e-6),
        moe=deepseek_v2.MOE | dict(shared_experts=1, gate_scale=2.446,
                                   balance_weight=0.0001, bias_rate=0.001)),
    length=4096, batch=2**25, tokens=5.7e12, lr=1.1e-3, warmup_steps=500,
    name='muon', momentum=0.95, schedule='wsd', decay_fraction=0.1)
