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

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, d_ff=344, max_len=256,
                 latent=dict(kv_rank=48, nope_dim=24, rope_dim=16, v_dim=24),
                 moe=dict(num_experts=16, d_ff=48)),
    'lite': dict(d_model=2048, num_layers=27, num_heads=16, d_ff=10944,
                 latent=dict(kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
                 moe=dict(num_experts=64, d_ff=1408)),
    '236b': dict(d_model=5120, num_layers=60, num_heads=128, d_ff=12288,
                 latent=dict(q_rank=1536, kv_rank=512, nope_dim=128,
                             rope_dim=64, v_dim=128),
                 moe=dict(num_experts=160, d_ff=1536, expert_groups=8,
                          top_groups=3, gate_scale=16.0)),
}

# Parameter counts of the published checkpoints, for tools.count.
PUBLISHED = {'lite': 15_706_484_224, '236b': 235_741_434_880}

# Tokens of training, rows of a batch, learning rate.
TRAINING = {'lite': (5.7e12, 4608, 4.2e-4), '236b': (8.1e12, 9216, 2.4e-4)}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='deepseek_v2', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='moe', block='pre_norm', mixer='latent',
      attention_bias=False, ffn_bias=False, tie_embeddings=False,
      prefix='dense', kinds=dict(dense=dict(ffn='dense')))
  c.model.rope.interleaved = True
  c.model.latent.norm_eps = 1e-6
  c.model.moe.update(top_k=6, router='topk', ffn='swiglu', shared_experts=2,
                     dispatch='auto', capacity_factor=0.0,
                     eval_capacity_factor=0.0, normalize_gates=False,
                     balance_loss='sequence', balance_weight=0.001)
  c.model.head_dim = c.model.latent.nope_dim
  if size == 'tiny':
    return recipes.tiny(c)
  return released(c, *TRAINING[size], vocab_size=102400)


def released(c, tokens: float, rows: int, lr: float, vocab_size: int):
  """Sets what the sizes that were released have in common."""
  c.model.update(max_len=4096, vocab_size=vocab_size, init='normal',
                 init_stddev=0.006)
  return recipes.pretraining(c, length=4096, batch_size=rows,
                             steps=int(tokens / rows / 4096), lr=lr)
