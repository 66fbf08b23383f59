"""Times layers of experts against dense ones: `python -m benchmarks.moe`.

It prints ratios within one run: the contenders take turns, and the median
counts, so that a busy machine slows them alike. A layer's time is that of its
forward and backward pass, router and dispatch included.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
import flax.linen as nn
import jax

import architectures
from architectures.parts.layers import FFN
from architectures.parts.moe.layer import MoE
from benchmarks import mixers, worker
from configs import base
from training import cli
from training.distributed import cpu

TOP_K, D_MODEL, D_FF = 2, 512, 1024


def make_layer(experts: int, tokens: int) -> Callable[[], Any]:
  """Returns a function that runs one feed-forward layer forward and backward on
  one row of tokens, and waits for the result.

  Args:
    experts: the number of experts of the layer. With 0, it is a dense layer as
      wide as the TOP_K experts that a token sees together, which costs as many
      FLOPs.
    tokens: the number of tokens of the row.
  """
  # Both layers read their sizes from the config of a model with experts. The
  # number of experts means nothing to the dense one.
  fields = base.base().model
  fields.update(d_model=D_MODEL, d_ff=D_FF, num_heads=1, vocab_size=1,
                max_len=tokens, ffn='moe', ffn_bias=False)
  fields.moe.update(num_experts=experts or TOP_K, top_k=TOP_K, ffn='swiglu')
  config = architectures.resolve(fields)

  # Make the layer, and compile its gradient.
  module: nn.Module = MoE(config)
  if not experts:
    module = FFN(config, 'swiglu', width=TOP_K * D_FF)
  compiled, inputs = mixers.compile_gradient(module, config, rows=1,
                                             length=tokens)
  return lambda: jax.block_until_ready(compiled(*inputs))


def main() -> None:
  """Times a dense layer and two layers of experts, on a short and a long row.
  """
  flags.DEFINE_integer('rounds', 11, 'How many turns each contender takes.', 1)
  cli.parse(__doc__)
  cpu.configure_cpu()
  for tokens in (2048, 16384):
    contenders = {
        'dense': make_layer(0, tokens),
        '8 experts': make_layer(8, tokens),
        '64 experts': make_layer(64, tokens)}
    rows = worker.time_in_turns(contenders, flags.FLAGS.rounds)
    for name, row in rows.items():
      print(f'{tokens:>8,} tokens  {name:<12}{1e3 * row["seconds"]:>10.2f} ms'
            f'{row["ratio"]:>8.2f} x dense', flush=True)


if __name__ == '__main__':
  cli.run(main)
