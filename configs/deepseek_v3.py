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

`tiny` trains on the default text to a held-out loss of 1.633 nats a byte (2.36
bits).
"""

from configs import recipes
from configs import deepseek_v2

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, d_ff=344, max_len=256,
                 prefix='dense',
                 latent=dict(q_rank=64, kv_rank=48, nope_dim=24, rope_dim=16,
                             v_dim=24),
                 moe=dict(num_experts=32, d_ff=32, expert_groups=4,
                          top_groups=2)),
    '671b': dict(d_model=7168, num_layers=61, num_heads=128, d_ff=18432,
                 prefix='dense,dense,dense',
                 latent=dict(q_rank=1536, kv_rank=512, nope_dim=128,
                             rope_dim=64, v_dim=128),
                 moe=dict(num_experts=256, d_ff=2048, expert_groups=8,
                          top_groups=4)),
}

# Parameter counts of the published checkpoints, for tools.count.
PUBLISHED = {'671b': 671_026_404_352}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'671b': 58 * 256}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='deepseek_v3', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='moe', block='pre_norm', mixer='latent',
      attention_bias=False, ffn_bias=False, tie_embeddings=False,
      kinds=dict(dense=dict(ffn='dense')))
  c.model.rope.interleaved = True
  c.model.latent.norm_eps = 1e-6
  c.model.moe.update(top_k=8, router='sigmoid', ffn='swiglu', shared_experts=1,
                     gate_scale=2.5, dispatch='auto', capacity_factor=0.0,
                     eval_capacity_factor=0.0, normalize_gates=True,
                     balance_loss='sequence', balance_weight=0.0001,
                     bias_rate=0.001)
  c.model.head_dim = c.model.latent.nope_dim
  if size == 'tiny':
    return recipes.tiny(c)
  return deepseek_v2.released(c, 14.8e12, 15360, 2.2e-4, vocab_size=129280)
