"""Times attention and a layer of experts on one GPU, forward and backward, in
every way that there is to compute them.

  python -m benchmarks.gpu --json=gpu.json
  python -m benchmarks.gpu --toy

It needs a machine with one GPU and the extra `cuda13`; with the extra `tokamax`
its kernels are timed beside those of XLA and cuDNN. --toy tries the benchmark
itself at tiny sizes, on a CPU too. Whole steps, beside PyTorch's, are
timed by benchmarks.step; tests/gpu_test.py says whether what is computed is
right.
"""

from collections.abc import Iterator, Sequence
import functools
import importlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import ml_collections

from architectures.parts import sharding
from architectures.parts.attention import kernels
from architectures.parts.moe.layer import MoE
from benchmarks import mixers, worker
from common.errors import EnvironmentFailure, RequestError
from training import cli, runs
from training.workdir import storage

# A file of configs/ and its size, fields of config.model, and a batch. nanoGPT
# rounds the vocabulary of 50,257 up to a multiple of 64, because GPUs multiply
# odd sides slowly.
CONFIG_OF_CASE = {
    'gpt2': ('gpt:gpt2-xl', dict(vocab_size=50304), 1024, 8),
    'llama': ('llama:2-7b', {}, 4096, 4),
    'mixtral': ('mixtral:8x7b', dict(max_len=4096), 4096, 4)}
TOY_FIELDS = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=0,
                  d_ff=64, vocab_size=384, max_len=256)
# Ways to multiply the rows of experts: model.moe.grouped_kernel, and options of
# XLA's compiler.
OPTIONS_OF_EXPERTS = {
    'ragged_dot': {},
    'ragged_dot, fused by XLA with Triton': dict(
        xla_gpu_experimental_use_ragged_dot_fusion=True),
    'ragged_dot, grouped product of cuBLAS': dict(
        xla_gpu_experimental_use_ragged_dot_grouped_gemm=True),
    'megablox': dict(kernel='megablox'),
    'tokamax': dict(kernel='tokamax')}


def config_of_case(case: str, toy: bool) -> ml_collections.ConfigDict:
  """Returns the config of a run in bfloat16 whose model has one layer.

  Args:
    case: the name of an entry of CONFIG_OF_CASE.
    toy: whether to take tiny sizes instead of the published ones.
  """
  # The published sizes, or tiny ones that a CPU can try.
  name_and_size, fields, length, batch_size = CONFIG_OF_CASE[case]
  name, _, size = name_and_size.partition(':')
  if toy:
    size = 'tiny'
    fields = TOY_FIELDS
    length = 256
  config = importlib.import_module(f'configs.{name}').get_config(size)
  config.model.update(dtype='bfloat16', **fields)
  config.model.num_layers = 1
  config.data.update(length=length, batch_size=batch_size)
  return config


def time_attention(run_config: ml_collections.ConfigDict
                   ) -> Iterator[dict[str, Any]]:
  """Times causal attention and its gradient with respect to all three inputs.

  Args:
    run_config: the config of a run, whose shapes are taken.

  Yields:
    For each kernel of this platform its name (`way`), and its times, or the
    reason why it refuses the shapes (`error`).
  """
  # Draw random queries [B, L, H, K], keys and values [B, L, J, K].
  config = runs.resolve_model_without_tokenizer(run_config)
  B = run_config.data.batch_size
  L = run_config.data.length
  heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
  rngs = jax.random.split(jax.random.key(0), 3)
  inputs = []
  for rng, num_heads in zip(rngs, heads):
    shape = B, L, num_heads, config.head_dim
    inputs.append(jax.random.normal(rng, shape, config.compute_dtype))

  # The mask is causal, described for kernels and as an array.
  mask = kernels.Mask(causal=True)
  seen_BLM = jnp.tril(jnp.ones((L, L), bool))[None]
  scale = config.head_dim ** -0.5

  def loss(kernel: str, *qkv: jax.Array) -> jax.Array:
    """Returns the sum of the squares of what a kernel computes."""
    if kernel == 'xla':
      out = kernels.attend(*qkv, mask_BLM=seen_BLM, scale=scale, causal=True)
    else:
      out = kernels.KERNELS[kernel].run(*qkv, mask, seen_BLM, scale=scale,
                                        softcap=0.0, sink_H=None)
    return jnp.square(out.astype(jnp.float32)).sum()

  # Choose the kernels of this platform; `xla` runs on all platforms.
  platform = sharding.traced_platform()
  names = ['xla']
  for name, kernel in kernels.KERNELS.items():
    if kernel.platform == platform:
      names.append(name)

  # Time the gradient of each kernel, unless it refuses these shapes.
  for name in names:
    reason = kernels.reason_of_refusal(name, config, mask=mask, q_length=L,
                                       k_length=L, device=platform)
    if reason:
      yield dict(way=name, error=f'{name} is refused, {reason}')
      continue
    gradient = jax.grad(functools.partial(loss, name), argnums=(0, 1, 2))
    try:
      compiled = jax.jit(gradient).lower(*inputs).compile()
    except RequestError as error:
      yield dict(way=name, error=str(error))
      continue
    yield dict(way=name) | time_program(compiled, inputs)


def time_experts(config: ml_collections.ConfigDict, kernel: str = 'auto',
                 **compiler_options: Any) -> dict[str, Any]:
  """Times the forward and backward pass of a layer of experts, its router and
  dispatch included.

  Args:
    config: the config of a run, whose shapes are taken.
    kernel: a value of config.model.moe.grouped_kernel.
    **compiler_options: options of XLA's compiler.

  Returns:
    The times, as worker.time_in_turns returns them.
  """
  config.model.moe.update(grouped_kernel=kernel, dispatch='auto',
                          capacity_factor=0.0, eval_capacity_factor=0.0)
  model_config = runs.resolve_model_without_tokenizer(config)
  compiled, inputs = mixers.compile_gradient(
      MoE(model_config), model_config, rows=config.data.batch_size,
      length=config.data.length, **compiler_options)
  return time_program(compiled, inputs)


def time_program(compiled: jax.stages.Compiled, inputs: Sequence[Any]
                 ) -> dict[str, Any]:
  """Times five calls of a compiled program.

  Args:
    compiled: the program.
    inputs: its arguments.

  Returns:
    The times, as worker.time_in_turns returns them.
  """
  def run() -> None:
    jax.block_until_ready(compiled(*inputs))

  return worker.time_in_turns({'program': run}, rounds=5)['program']


def time_everything(toy: bool) -> Iterator[dict[str, Any]]:
  """Times attention in all cases and by all kernels, and a layer of experts by
  all ways to multiply the rows of a batch with the matrices of their experts.

  Args:
    toy: whether to take tiny sizes.

  Yields:
    A row for each measurement: what was measured (`part`), in which model
    (`case`) and by which kernel (`way`), and its times, or the reason why there
    are none (`error`).
  """
  for case in CONFIG_OF_CASE:
    for row in time_attention(config_of_case(case, toy)):
      yield dict(part='attention', case=case) | row
  for way, options in OPTIONS_OF_EXPERTS.items():
    row = dict(part='experts', case='mixtral', way=way)
    try:
      yield row | time_experts(config_of_case('mixtral', toy), **options)
    # XLA may refuse a kernel, or memory may be too small. The others go on.
    except Exception as error:
      yield row | dict(error=' '.join(str(error).split())[:400])


def main() -> None:
  """Times everything on this machine's GPU, and prints and writes the rows."""
  flags.DEFINE_bool('toy', False, 'Tiny sizes.')
  flags.DEFINE_string('json', '', 'Write the rows to this file.')
  cli.parse(__doc__)
  args = flags.FLAGS
  device = jax.devices()[0]
  json_file = storage.checked_output_file(args.json, '--json')
  if device.platform != 'gpu' and not args.toy:
    raise EnvironmentFailure(f'JAX sees no GPU, but {device.device_kind}: '
                             '--toy tries the benchmark on a CPU')

  # The file is written after each row, because what comes next may take the
  # machine down.
  rows = []
  for row in time_everything(args.toy):
    rows.append(row)
    if 'error' in row:
      time = row['error']
    else:
      milliseconds = 1e3 * row['seconds']
      time = f'{milliseconds:10.2f} ms'
    print(f'{row["part"]} {row["case"]} {row["way"]:40} {time}', flush=True)
    storage.write_json(json_file, dict(
        card=device.device_kind, toy=args.toy, rows=rows))


if __name__ == '__main__':
  cli.run(main)
