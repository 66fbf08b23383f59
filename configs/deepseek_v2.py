"""DeepSeek-V2: `--config configs/deepseek_v2.py:SIZE`.

Lab note. DeepSeek-AI 2024a (arXiv 2405.04434). `236b`: section 3.1.2, 236B
parameters of which 21B work for a token, trained on 8.1T tokens, rows of 4,096
tokens, 9,216 rows a batch, which grew from 2,304 over the first 225B tokens;
AdamW b1 0.9, b2 0.95, decay 0.1, clipping 1.0, 2,000 steps of warm-up to
2.4e-4, which fell by 0.316 at 60 and at 90 % of the tokens. `lite`, 15.7B of
which 2.4B work for a token: appendix B, 5.7T tokens, 4,608 rows, 4.2e-4. Both:
first weights with deviation 0.006. Here the batch does not grow, and the rate
falls by a cosine to 0.1 of its peak, about the published 0.316 squared; the
losses that balance devices are not here. Sizes that the paper leaves out are
those of the released config.json, whose contexts of 163,840 tokens are from
later training: with `--config.model.rope.scaling=yarn
--config.model.rope.factor=40 --config.model.rope.original_len=4096
--config.model.rope.mscale=0.707 --config.model.rope.mscale_all_dim=0.707`.

`tiny` trains on the default text to a held-out loss of 1.605 nats a byte (2.32
bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff max_len latent.kv_rank latent.nope_dim '
    'latent.rope_dim latent.v_dim moe.num_experts moe.d_ff', {
        'tiny': (128, 4, 4, 344, 256, 48, 24, 16, 24, 16, 48),
        'lite': (2048, 27, 16, 10944, 4096, 512, 128, 64, 128, 64, 1408),
        '236b': (5120, 60, 128, 12288, 4096, 512, 128, 64, 128, 160, 1536)})
# The published sizes of V3 have these too.
PUBLISHED = dict(head_dim=128, init='normal', init_stddev=0.006)
SIZES['tiny']['head_dim'] = 24
SIZES['lite'] |= PUBLISHED | dict(
    vocab_size=102400, tokens=5.7e12, batch_size=4608, lr=4.2e-4,
    parameters=15_706_484_224)
SIZES['236b'] |= PUBLISHED | {
    'latent.q_rank': 1536, 'moe.expert_groups': 8, 'moe.top_groups': 3,
    'moe.gate_scale': 16.0} | dict(
        vocab_size=102400, tokens=8.1e12, batch_size=9216, lr=2.4e-4,
        parameters=235_741_434_880)
MOE = dict(dispatch='auto', capacity_factor=0.0, eval_capacity_factor=0.0,
           balance_loss='sequence')

get_config = base.make_get_config('deepseek_v2', SIZES, dict(
    norm_eps=1e-6, latent=dict(norm_eps=1e-6), moe=MOE | dict(
        shared_experts=2, balance_weight=0.001)))
