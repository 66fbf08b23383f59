"""Qwen3-Next: `--config configs/qwen3_next.py:SIZE`.

Lab note. Qwen Team 2025, "Qwen3-Next: Towards Ultimate Training & Inference
Efficiency" (qwen.ai, September 2025): layers, experts, and 15T tokens, drawn
evenly from the 36T of Qwen3; widths, vocabulary, theta and 262,144 positions
are those of the config.json of Qwen3-Next-80B-A3B. The count is that of the
published checkpoint without the module that predicts a second token, which is
trained with it there and is not here. Norms decay, as the report says, and
batch and learning rate, which it does not say, are those of the other Qwen3
here. The weight of the balancing loss is that of config.json.

`tiny` has 32 experts of 24 hidden units, of which 10 work for a token, and
recurrences with 2 heads of keys and 4 of values: for trials on the default
text, on which it trains to a held-out loss of 1.272 nats a byte (1.84 bits).
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                 head_dim=48, d_ff=344, max_len=256,
                 deltanet=dict(key_heads=2, value_heads=4, key_dim=32,
                               value_dim=32),
                 moe=dict(num_experts=32, d_ff=24)),
    '80b-a3b': dict(d_model=2048, num_layers=48, num_heads=16, num_kv_heads=2,
                    head_dim=256, d_ff=5120, max_len=262144, vocab_size=151936,
                    deltanet=dict(key_heads=16, value_heads=32, key_dim=128,
                                  value_dim=128),
                    moe=dict(num_experts=512, d_ff=512)),
}

# The published parameter count, for tools.count.
PUBLISHED = {'80b-a3b': 79_674_391_296}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='qwen3_next', position='rope', norm='rmsnorm_1p',
      norm_eps=1e-6, ffn='moe', block='pre_norm', qk_norm=True,
      attention_gate='elementwise', attention_bias=False, ffn_bias=False,
      tie_embeddings=False, pattern='linear,linear,linear,full',
      kinds=dict(linear=dict(mixer='deltanet'), full={}))
  c.model.rope.fraction = 0.25
  c.model.moe.update(top_k=10, router='topk', ffn='swiglu', shared_experts=1,
                     shared_gate=True, normalize_gates=True,
                     balance_weight=0.001)
  c.optim.decay_mask = (('.*_norm/offset', 1),
                        ('.*(embed|scale|bias|conv).*', 0), ('.*', 1))
  if size == 'tiny':
    return recipes.tiny(c)
  c.model.rope.theta = 1e7
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=int(15e12 / 2**22), lr=3e-4)
