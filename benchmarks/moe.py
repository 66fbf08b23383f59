"""What experts cost against dense layers: `python -m benchmarks.moe`.

Ratios within one run: the contenders take turns, and the median counts, so
that a busy machine slows them alike. A layer's time is that of its forward
and backward pass, router and dispatch included.
"""

import argparse
import json

import jax
import jax.numpy as jnp

import architectures
from architectures.parts.context import Context
from architectures.parts.ffn import FFN
from architectures.parts.moe.layer import MoE
from benchmarks import worker
from configs import base
from configs.errors import require
from training import cli
from training.distributed import cpu

TOP_K = 2


def layer(experts: int, tokens: int, d_model: int, d_ff: int):
  """A function without arguments that runs one layer forward and backward.

  `experts` 0: a dense layer as wide as the experts that a token sees.
  """
  fields = base.base().model
  fields.update(d_model=d_model, d_ff=d_ff, num_heads=1, vocab_size=1,
                max_len=tokens, ffn='moe', ffn_bias=False)
  fields.moe.update(num_experts=experts or TOP_K, top_k=TOP_K, ffn='swiglu')
  c = architectures.resolve(fields)
  module = MoE(c) if experts else FFN(c, 'swiglu', width=TOP_K * d_ff)
  x_BLD = jax.random.normal(jax.random.key(0), (1, tokens, d_model))
  ctx = Context(jnp.arange(tokens)[None])
  params = jax.jit(module.init)(jax.random.key(1), x_BLD, ctx)

  def loss(params, x_BLD):
    y_BLD, aux = module.apply(params, x_BLD, ctx)
    return jnp.square(y_BLD).mean() + sum(aux.get('losses', {}).values())

  step = jax.jit(jax.grad(loss, (0, 1)))
  return lambda: jax.block_until_ready(step(params, x_BLD))


def layers(rounds: int, d_model: int, d_ff: int) -> dict[str, float]:
  """The ratios, and the milliseconds behind them."""
  result = {}
  for tokens in (2048, 16384):
    seconds = {name: row['seconds'] for name, row in worker.turns(
        {f'{name}_{tokens}': layer(e, tokens, d_model, d_ff)
         for name, e in (('dense', 0), ('experts8', 8), ('experts64', 64))},
        rounds).items()}
    dense, few, many = seconds.values()
    result.update({f'ms_{name}': 1e3 * s for name, s in seconds.items()})
    result[f'experts8_over_dense_{tokens}'] = few / dense
    result[f'experts64_over_experts8_{tokens}'] = many / few
  return result


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.moe', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--rounds', type=int, default=11,
                      help='how many turns each contender takes')
  parser.add_argument('--d_model', type=int, default=512)
  parser.add_argument('--d_ff', type=int, default=1024)
  parser.add_argument('--json', action='store_true', help='print one object')
  args = parser.parse_args()
  for name in ('rounds', 'd_model', 'd_ff'):
    value = getattr(args, name)
    require(value > 0, f'--{name} is {value}: it must be 1 or more')
  cpu.prepare()
  result = layers(args.rounds, args.d_model, args.d_ff)
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f'{name:40} {value:10.2f}')


if __name__ == '__main__':
  cli.run(main)
