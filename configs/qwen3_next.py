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

SIZES = recipes.table(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff max_len '
    'deltanet.key_heads deltanet.value_heads deltanet.key_dim '
    'deltanet.value_dim moe.num_experts moe.d_ff rope.theta', {
        'tiny': (128, 4, 4, 2, 48, 344, 256, 2, 4, 32, 32, 32, 24, 1e4),
        '80b-a3b': (2048, 48, 16, 2, 256, 5120, 262144, 16, 32, 128, 128, 512,
                    512, 1e7)})
SIZES['80b-a3b'] |= dict(vocab_size=151936, parameters=79_674_391_296)


def get_config(size: str = 'tiny'):
  c = recipes.config(
      'qwen3_next', size, SIZES, dict(norm_eps=1e-6, moe=dict(
          balance_weight=0.001)), length=4096, tokens=15e12)
  c.optim.decay_mask = (('.*_norm/offset', 1),
                        ('.*(embed|scale|bias|conv).*', 0), ('.*', 1))
  return c
