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
import ml_collections

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
LAYERS_OF_MODEL = 2  # the model of the section `decode`
VOCAB_SIZE = 256
NEW_TOKENS = 16  # how many tokens a turn of the section `decode` writes


class Contender(NamedTuple):
  """A function that is timed.

  Attributes:
    run: the function, without arguments, which waits for its result.
    repeats: how often a call of it does what is timed.
    nbytes: the bytes of memory that stand beside its time in the table.
  """
  run: Callable[[], Any]
  repeats: int
  nbytes: int


def config_with_mixer(mixer: str, length: int, dtype: str,
                      sizes: Mapping[str, int]) -> ml_collections.ConfigDict:
  """Returns the config of a run whose model is a small LLaMA with a mixer.

  Args:
    mixer: a value of model.mixer: attention, or a recurrence.
    length: the number of tokens of a row.
    dtype: the dtype of the computation.
    sizes: fields of the model, such as d_model.
  """
  config = llama.get_config('tiny')
  config.model.update(
      num_layers=LAYERS_OF_MODEL, num_kv_heads=0, d_ff=0, vocab_size=VOCAB_SIZE,
      max_len=length, mixer=mixer, dtype=dtype, **sizes)
  config.data.length = length
  return config


def compile_gradient(module: nn.Module, config: ModelConfig, rows: int,
                     length: int, *arguments: Any, **compiler_options: Any
                     ) -> tuple[jax.stages.Compiled, tuple[Any, jax.Array]]:
  """Compiles the forward and backward pass of one layer.

  The loss is the mean square of the layer's output, and the layer's own losses.
  Its gradient is taken with respect to the parameters and the input.

  Args:
    module: the layer.
    config: the model's config.
    rows: the number of rows of the input.
    length: the number of tokens of a row.
    *arguments: the layer's arguments after its input and context.
    **compiler_options: options of XLA's compiler.

  Returns:
    The compiled gradient, and its arguments: the parameters of the layer and
    x_BLD, its random input, [batch = rows, length, d_model].
  """
  # Initialise the layer, and draw a random input.
  x_BLD = jax.random.normal(jax.random.key(0), (rows, length, config.d_model),
                            config.compute_dtype)
  context = Context(jnp.arange(length)[None])
  params = nn.meta.unbox(jax.jit(module.init)(
      jax.random.key(1), x_BLD, context, *arguments))

  def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
    """Returns the mean square of the output, plus the layer's own losses."""
    y_BLD, *_, report = module.apply(params, x_BLD, context, *arguments)
    losses_of_layer = sum(report.losses.values())
    return jnp.square(y_BLD.astype(jnp.float32)).mean() + losses_of_layer

  # Compile the gradient of its loss for these shapes.
  inputs = params, x_BLD
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  compiled = gradient.lower(*inputs).compile(compiler_options or None)
  return compiled, inputs


def layer_of_mixer(run_config: ml_collections.ConfigDict) -> Contender:
  """Prepares the forward and backward pass of one layer's mixer on one row, to
  be timed.

  Args:
    run_config: the config of the run, as `config_with_mixer` returns it.

  Returns:
    A Contender: `run` computes the gradient and waits for it, and `nbytes` is
    the memory that the program allocates besides its arguments and results.
  """
  config = architectures.resolve(run_config.model)
  mixer = blocks.mixer_of_layers(config)
  module = mixer.module(config, config.layer_kinds(1)[0])
  length = run_config.data.length
  # Training has no cache, which is the last argument of the layer.
  rows = 1
  no_cache = None
  compiled, inputs = compile_gradient(module, config, rows, length, no_cache)
  return Contender(
      run=lambda: jax.block_until_ready(compiled(*inputs)), repeats=1,
      nbytes=compiled.memory_analysis().temp_size_in_bytes)


def decoding_with_mixer(run_config: ml_collections.ConfigDict) -> Contender:
  """Prepares the greedy decoding of one row by a model, to be timed.

  It writes NEW_TOKENS tokens at the end of the row, where a cache of attention
  is longest. What the cache holds before them does not change the time, so it
  is left as it begins.

  Args:
    run_config: the config of the run, as `config_with_mixer` returns it.

  Returns:
    A Contender: `run` writes the tokens and waits for them, `repeats` is their
    number, and `nbytes` is the size of the cache.
  """
  # Make the model and its cache, with the layers unstacked, as a loop over
  # single tokens reads them.
  config = architectures.resolve(run_config.model)
  length = run_config.data.length
  module = architectures.build(config)
  params = jax.jit(module.init)(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  cache = architectures.init_cache(config, batch=1, length=length)
  unstack_layers = jax.jit(skeletons.unstack_layers, static_argnums=0)
  params, cache = unstack_layers(config, params, cache)

  def write_tokens(params: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Generates NEW_TOKENS tokens, each the likeliest one after the token
    before it. Returns the last token and the cache."""
    def write_token(carry: Any, position: jax.Array):
      """Generates one token: given token_B1 at a position, the most likely next
      one, likeliest_B1, both [batch = 1, 1 token]."""
      token_B1, cache = carry
      out = module.apply({'params': params}, token_B1,
                         positions_BL=position[None, None], cache=cache,
                         one_by_one=True)
      likeliest_B1 = out.logits[:, -1:].argmax(-1).astype(jnp.int32)
      return (likeliest_B1, out.cache), None

    # The first token is 0. Which tokens are written does not change the time.
    positions = length - NEW_TOKENS + jnp.arange(NEW_TOKENS)
    carry = jnp.zeros((1, 1), jnp.int32), cache
    carry, _ = jax.lax.scan(write_token, carry, positions)
    return carry

  # The cache is donated: its memory is used again for the new one, as in real
  # decoding. So each call must be given the cache that the last one returned.
  compiled = jax.jit(write_tokens, donate_argnums=1).lower(
      params, cache).compile()
  nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
  cache_holder = [cache]  # a list, as a nested function can replace its item

  def write_again() -> None:
    tokens, cache_holder[0] = compiled(params, cache_holder[0])
    jax.block_until_ready((tokens, cache_holder[0]))

  return Contender(run=write_again, repeats=NEW_TOKENS, nbytes=nbytes)


SECTIONS = {'layer': layer_of_mixer, 'decode': decoding_with_mixer}


def time_section(section: str, dtype: str, mixers: Sequence[str],
                 lengths: Sequence[int], sizes: Mapping[str, int], rounds: int
                 ) -> list[dict[str, Any]]:
  """Times one section in one dtype, and prints a table as it goes.

  Args:
    section: 'layer' or 'decode'.
    dtype: the dtype of the computation.
    mixers: values of model.mixer.
    lengths: the numbers of tokens of a row, ascending.
    sizes: fields of the model, such as d_model.
    rounds: how many turns each mixer takes.

  Returns:
    A row of the table for each length and mixer.
  """
  print(f'{section}, {dtype}\n{HEAD_OF_TABLE}', flush=True)
  rows: list[dict[str, Any]] = []
  row_of_last_length: dict[str, dict] = {}  # by mixer
  for length in lengths:
    # Compile the program of each mixer for this length.
    contenders = {}
    for mixer in mixers:
      run_config = config_with_mixer(mixer, length=length, dtype=dtype,
                                     sizes=sizes)
      contenders[mixer] = SECTIONS[section](run_config)

    # Time them in turns. `growth` compares a mixer's CPU time with that at the
    # length before, so that the first length has none.
    for mixer, times in time_contenders(contenders, rounds).items():
      row = dict(section=section, dtype=dtype, length=length, mixer=mixer,
                 **times, nbytes=contenders[mixer].nbytes, growth=None)
      if mixer in row_of_last_length:
        row['growth'] = exponent_of_length(row_of_last_length[mixer], row)
      row_of_last_length[mixer] = row
      rows.append(row)
      print(line_of_table(row), flush=True)
  return rows


def time_contenders(contenders: Mapping[str, Contender], rounds: int
                    ) -> dict[str, dict[str, float]]:
  """Times contenders in turns.

  Args:
    contenders: the functions to time, by name.
    rounds: how many turns each takes.

  Returns:
    The figures of each, as worker.time_in_turns returns them. Times are of one
    of the `repeats` of a call, such as of one token.
  """
  functions = {name: contender.run for name, contender in contenders.items()}
  figures = worker.time_in_turns(functions, rounds)
  for name, times in figures.items():
    for key in ('seconds', 'cpu_seconds', 'least_seconds'):
      times[key] /= contenders[name].repeats
  return figures


def exponent_of_length(shorter: Mapping[str, Any], longer: Mapping[str, Any]
                       ) -> float:
  """Returns the exponent k with which the CPU time grows as length ** k.

  With times t and lengths n of two rows, t2 / t1 = (n2 / n1) ** k, so that k is
  the logarithm of the ratio of times to the base of the ratio of lengths.

  Args:
    shorter: the row of the table for the shorter length.
    longer: the row for the longer one.
  """
  ratio_of_times = longer['cpu_seconds'] / shorter['cpu_seconds']
  ratio_of_lengths = longer['length'] / shorter['length']
  return math.log(ratio_of_times, ratio_of_lengths)


HEAD_OF_TABLE = (f'{"tokens":>8}  {"mixer":<12}{"ms":>10}{"CPU ms":>10}'
                 f'{"ratio":>8}{"by CPU":>8}{"growth":>8}{"MiB":>10}')


def line_of_table(row: Mapping[str, Any]) -> str:
  """Returns a row of the table as a line of text. The widths of the columns are
  those of HEAD_OF_TABLE, under which the line stands.

  Args:
    row: the row, as `time_section` makes it.
  """
  milliseconds = 1e3 * row['seconds']
  cpu_milliseconds = 1e3 * row['cpu_seconds']
  mebibytes = row['nbytes'] / 2 ** 20
  growth = ''
  if row['growth'] is not None:
    growth = f'{row["growth"]:.2f}'
  return (f'{row["length"]:>8,}  {row["mixer"]:<12}'
          f'{milliseconds:>10.2f}{cpu_milliseconds:>10.2f}'
          f'{row["ratio"]:>8.2f}{row["cpu_ratio"]:>8.2f}{growth:>8}'
          f'{mebibytes:>10.2f}')


def main() -> None:
  """Times the sections, mixers and lengths that the flags name."""
  # Define the flags, and check them.
  cli.define_choices('sections', choices=SECTIONS, text='What to time.',
                     default=SECTIONS)
  mixers = [name for name in blocks.MIXERS if name != 'latent']
  cli.define_choices('mixers', choices=blocks.MIXERS, default=mixers,
                     text='Values of model.mixer; default: all but latent.')
  cli.define_choices('dtypes', choices=DTYPES, default=DTYPES,
                     text='Dtypes of the computation.')
  flags.DEFINE_list('lengths', [*map(str, LENGTHS)], 'Tokens of a row.')
  flags.DEFINE_integer('d_model', 256, 'The width of the model.', 1)
  flags.DEFINE_integer('num_heads', 4, 'The heads of the model.', 1)
  flags.DEFINE_integer('rounds', 5, 'How many turns each mixer takes.', 1)
  flags.DEFINE_string('json', '', 'Write the figures to this file.')
  cli.parse(__doc__)
  args = flags.FLAGS
  lengths = sorted({int(n) for n in args.lengths if n.isdecimal()})
  are_distinct_numbers = len(lengths) == len(args.lengths)
  if not lengths or not are_distinct_numbers or lengths[0] <= NEW_TOKENS:
    raise RequestError(f'--lengths is {",".join(args.lengths)}: write whole '
                       f'numbers above {NEW_TOKENS}, each once')
  json_file = storage.checked_output_file(args.json, '--json')

  # Time each section in each dtype.
  cpu.configure_cpu()
  sizes = dict(d_model=args.d_model, num_heads=args.num_heads)
  rows = []
  for section in args.sections:
    for dtype in args.dtypes:
      rows += time_section(section, dtype=dtype, mixers=args.mixers,
                           lengths=lengths, sizes=sizes, rounds=args.rounds)
  storage.write_json(json_file, dict(
      sizes=sizes, rounds=args.rounds, rows=rows))


if __name__ == '__main__':
  cli.run(main)
