r"""Times mixers: attention, and each recurrence beside it.

  python -m benchmarks.mixers
  python -m benchmarks.mixers --sections=layer --lengths=1024,2048 \
      --dtypes=float32 --d_model=512 --num_heads=8
  taskset -c 0 python -m benchmarks.mixers --json=FILE

Sections:
  layer   the forward and backward pass of one layer's mixer on one row
  decode  one more token of a row, by a model of two layers and its cache

All of it runs in one process. The mixers take turns, so that a busy machine
slows them alike, and a ratio is the median over the turns of a mixer's time
over that of the first one of --mixers. CPU time is that of all threads of the
process: on a machine that does other work, read the ratio by CPU time. Growth
is the exponent with which the CPU time grows from one length to the next: 1
where twice the length takes twice the time. Memory is what the compiled program
allocates besides its arguments and results (memory_analysis of XLA); of decode,
it is the size of a row's cache.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp

import architectures
from architectures.parts import blocks, skeletons
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from benchmarks import worker
from common.errors import RequestError
from configs import llama
from training import cli
from training.distributed import cpu
from training.workdir import storage

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DTYPES = ('float32', 'bfloat16')
LAYERS = 2  # of the model of `decode`
VOCAB = 256
WRITTEN = 16  # tokens that a turn of `decode` writes


class Contender(NamedTuple):
  """A function that is timed.

  Attributes:
    run: the function, without arguments, which waits for its result.
    times: how often it does what is counted.
    nbytes: the bytes that stand beside its time.
  """
  run: Callable[[], Any]
  times: int
  nbytes: int


def config(mixer: str, length: int, dtype: str, sizes: Mapping[str, int]):
  """Returns the config of a run: a LLaMA with a mixer."""
  made = llama.get_config('tiny')
  made.model.update(
      num_layers=LAYERS, num_kv_heads=0, d_ff=0, vocab_size=VOCAB,
      max_len=length, mixer=mixer, dtype=dtype, **sizes)
  made.data.length = length
  return made


def gradient(module: nn.Module, c: ModelConfig, rows: int, length: int,
             *more: Any, **compiler: Any):
  """Returns the compiled forward and backward pass of a layer, and its
  arguments: the gradient of the mean square of its output, and of its losses,
  with respect to its parameters and an input [rows, length, D].

  Args:
    module: the layer.
    c: the model's config.
    rows: the rows of the input.
    length: the tokens of a row.
    *more: the arguments after the input and its context.
    **compiler: options of XLA's compiler.
  """
  x_BLD = jax.random.normal(jax.random.key(0), (rows, length, c.d_model),
                            c.compute_dtype)
  beside = Context(jnp.arange(length)[None]), *more
  params = nn.meta.unbox(jax.jit(module.init)(
      jax.random.key(1), x_BLD, *beside))

  def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
    y_BLD, *_, report = module.apply(params, x_BLD, *beside)
    losses = sum(report.losses.values())
    return jnp.square(y_BLD.astype(jnp.float32)).mean() + losses

  args = params, x_BLD
  lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*args)
  return lowered.compile(compiler or None), args


def layer(made: Any) -> Contender:
  """Returns the forward and backward pass of one mixer on one row."""
  c = architectures.resolve(made.model)
  module = blocks.mixer_of(c).module(c, c.layer_kinds(1)[0])
  compiled, args = gradient(module, c, 1, made.data.length, None)
  return Contender(
      run=lambda: jax.block_until_ready(compiled(*args)), times=1,
      nbytes=compiled.memory_analysis().temp_size_in_bytes)


def decode(made: Any) -> Contender:
  """Returns the writing of WRITTEN tokens, the last that the cache holds."""
  c = architectures.resolve(made.model)
  module, first = architectures.build(c), made.data.length - WRITTEN
  params = jax.jit(module.init)(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  params, cache = jax.jit(skeletons.one_by_one)(
      params, architectures.init_cache(c, 1, made.data.length))

  def write(params: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Writes the tokens, each the likeliest after the one before it."""
    def token(carry: Any, at: jax.Array):
      token_B1, cache = carry
      out = module.apply({'params': params}, token_B1,
                         positions_BL=at[None, None], cache=cache,
                         one_by_one=True)
      likeliest_B1 = out.logits[:, -1:].argmax(-1).astype(jnp.int32)
      return (likeliest_B1, out.cache), None

    carry = jnp.zeros((1, 1), jnp.int32), cache
    return jax.lax.scan(token, carry, first + jnp.arange(WRITTEN))[0]

  compiled = jax.jit(write, donate_argnums=1).lower(params, cache).compile()
  nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
  state = [cache]

  def again() -> None:
    tokens, state[0] = compiled(params, state[0])
    jax.block_until_ready((tokens, state[0]))

  return Contender(run=again, times=WRITTEN, nbytes=nbytes)


SECTIONS = {'layer': layer, 'decode': decode}


def measure(sections: Sequence[str], names: Sequence[str],
            lengths: Sequence[int], dtypes: Sequence[str],
            sizes: Mapping[str, int], rounds: int) -> list[dict[str, Any]]:
  """Times everything and prints a table as it goes; returns a row for each
  section, dtype, length and mixer."""
  rows: list[dict[str, Any]] = []
  for section in sections:
    for dtype in dtypes:
      print(f'{section}, {dtype}\n{HEAD}', flush=True)
      before: dict[str, dict] = {}  # the rows of the length before
      for length in lengths:
        contenders = {}
        for name in names:
          made = config(name, length, dtype, sizes)
          contenders[name] = SECTIONS[section](made)
        for name, times in _times(contenders, rounds).items():
          row = dict(section=section, dtype=dtype, length=length, mixer=name,
                     **times, nbytes=contenders[name].nbytes, growth=None)
          if name in before:
            row['growth'] = _growth(before[name], row)
          before[name] = row
          rows.append(row)
          print(line(row), flush=True)
  return rows


def _times(contenders: Mapping[str, Contender], rounds: int
           ) -> dict[str, dict[str, float]]:
  """Returns the times of each contender, for one of what it counts."""
  functions = {name: one.run for name, one in contenders.items()}
  timed = worker.turns(functions, rounds)
  for name, times in timed.items():
    for key in ('seconds', 'cpu_seconds', 'least_seconds'):
      times[key] /= contenders[name].times
  return timed


def _growth(before: Mapping[str, Any], row: Mapping[str, Any]) -> float:
  """Returns the exponent of the length in the CPU time."""
  taken = row['cpu_seconds'] / before['cpu_seconds']
  longer = row['length'] / before['length']
  return math.log(taken, longer)


HEAD = (f'{"tokens":>8}  {"mixer":<12}{"ms":>10}{"CPU ms":>10}{"ratio":>8}'
        f'{"by CPU":>8}{"growth":>8}{"MiB":>10}')


def line(row: Mapping[str, Any]) -> str:
  """Returns a line of the table."""
  growth = ''
  if row['growth'] is not None:
    growth = f'{row["growth"]:.2f}'
  return (f'{row["length"]:>8,}  {row["mixer"]:<12}'
          f'{1e3 * row["seconds"]:>10.2f}{1e3 * row["cpu_seconds"]:>10.2f}'
          f'{row["ratio"]:>8.2f}{row["cpu_ratio"]:>8.2f}{growth:>8}'
          f'{row["nbytes"] / 2 ** 20:>10.2f}')


def main() -> None:
  cli.define_choices('sections', [*SECTIONS], SECTIONS, 'What to time.')
  mixers = [name for name in blocks.MIXERS if name != 'latent']
  cli.define_choices('mixers', mixers, blocks.MIXERS,
                     'Values of model.mixer; default: all but latent.')
  cli.define_choices('dtypes', DTYPES, DTYPES, 'Dtypes of the computation.')
  flags.DEFINE_list('lengths', [*map(str, LENGTHS)], 'Tokens of a row.')
  flags.DEFINE_integer('d_model', 256, 'The width of the model.', 1)
  flags.DEFINE_integer('num_heads', 4, 'The heads of the model.', 1)
  flags.DEFINE_integer('rounds', 5, 'How many turns each mixer takes.', 1)
  flags.DEFINE_string('json', '', 'Write the figures to this file.')
  cli.parse(__doc__)
  args = flags.FLAGS
  lengths = sorted({int(n) for n in args.lengths if n.isdecimal()})
  if len(lengths) != len(args.lengths) or not lengths or lengths[0] <= WRITTEN:
    raise RequestError(f'--lengths is {",".join(args.lengths)}: write whole '
                       f'numbers above {WRITTEN}, each once')
  json_file = storage.output(args.json, '--json')
  cpu.prepare()
  sizes = dict(d_model=args.d_model, num_heads=args.num_heads)
  rows = measure(args.sections, args.mixers, lengths, args.dtypes, sizes,
                 args.rounds)
  storage.write_json(json_file, dict(
      sizes=sizes, rounds=args.rounds, rows=rows))


if __name__ == '__main__':
  cli.run(main)
