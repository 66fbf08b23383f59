"""Times attention and a layer of experts on one GPU, forward and backward, in
every way that there is to compute them.

  python -m benchmarks.gpu --json=gpu.json
  python -m benchmarks.gpu --toy

It needs a machine with one GPU and the extra `cuda13`; --toy tries the
benchmark itself at tiny sizes, on a CPU too. Whole steps, beside PyTorch's, are
timed by benchmarks.step; tests/gpu_test.py says whether what is computed is
right.
"""

from collections.abc import Iterator
import functools
import importlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.attention import kernels
from architectures.parts.moe.layer import MoE
from benchmarks import mixers, worker
from common.errors import EnvironmentFailure
from training import cli, runs
from training.workdir import storage

# A file of configs/ and its size, fields of config.model, and a batch. nanoGPT
# rounds the vocabulary of 50,257 up to a multiple of 64, because GPUs multiply
# odd sides slowly.
CASES = {
    'gpt2': ('gpt:gpt2-xl', dict(vocab_size=50304), 1024, 8),
    'llama': ('llama:2-7b', {}, 4096, 4),
    'mixtral': ('mixtral:8x7b', dict(max_len=4096), 4096, 4)}
TOY = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=0, d_ff=64,
           vocab_size=384, max_len=256)
# Ways to multiply the rows of experts: model.moe.grouped_kernel, and options of
# XLA's compiler.
EXPERTS = {
    'ragged_dot': {},
    'ragged_dot, fused by XLA with Triton': dict(
        xla_gpu_experimental_use_ragged_dot_fusion=True),
    'ragged_dot, grouped product of cuBLAS': dict(
        xla_gpu_experimental_use_ragged_dot_grouped_gemm=True),
    'megablox': dict(kernel='megablox')}


def config_of(case: str, toy: bool):
  """Returns the config of a case, with one layer."""
  file, fields, length, batch = CASES[case]
  name, _, size = file.partition(':')
  if toy:
    size, fields, length = 'tiny', TOY, 256
  config = importlib.import_module(f'configs.{name}').get_config(size)
  config.model.update(dtype='bfloat16', **fields)
  config.model.num_layers = 1
  config.data.update(length=length, batch_size=batch)
  return config


def attention(config: Any) -> Iterator[dict[str, Any]]:
  """Yields a row for each kernel of this platform, at the shapes of a config.

  It times causal attention and its gradient with respect to all three inputs.
  """
  c = runs.resolve_alone(config)
  B, L = config.data.batch_size, config.data.length
  args = []
  keys = jax.random.split(jax.random.key(0), 3)
  for key, heads in zip(keys, (c.num_heads, c.num_kv_heads, c.num_kv_heads)):
    shape = B, L, heads, c.head_dim
    args.append(jax.random.normal(key, shape, c.compute_dtype))
  mask, here = kernels.Mask(causal=True), sharding.platform()
  seen_BLM = jnp.tril(jnp.ones((L, L), bool))[None]

  def loss(name: str, *qkv: jax.Array) -> jax.Array:
    """Returns the sum of the squares of what a kernel computes."""
    if name == 'xla':
      out = kernels.attend(*qkv, mask_BLM=seen_BLM, scale=c.head_dim ** -0.5,
                           causal=True)
    else:
      out = kernels.KERNELS[name].run(
          *qkv, mask, seen_BLM, scale=c.head_dim ** -0.5, softcap=0.0,
          sink_H=None)
    return jnp.square(out.astype(jnp.float32)).sum()

  names = ['xla']
  for name, kernel in kernels.KERNELS.items():
    if kernel.platform == here:
      names.append(name)
  for name in names:
    why = kernels.refusal(name, c, mask, L, L, here)
    if why:
      yield dict(way=name, error=f'{name} is refused, {why}')
      continue
    gradient = jax.grad(functools.partial(loss, name), (0, 1, 2))
    compiled = jax.jit(gradient).lower(*args).compile()
    yield dict(way=name) | _timed(compiled, args)


def experts(config: Any, kernel: str = 'auto', **compiler: Any
            ) -> dict[str, Any]:
  """Returns the row of a layer of experts, its router and dispatch included.

  Args:
    config: the config of a run.
    kernel: config.model.moe.grouped_kernel.
    **compiler: options of XLA's compiler.
  """
  config.model.moe.update(grouped_kernel=kernel, dispatch='auto',
                          capacity_factor=0.0, eval_capacity_factor=0.0)
  c = runs.resolve_alone(config)
  B, L = config.data.batch_size, config.data.length
  return _timed(*mixers.gradient(MoE(c), c, B, L, **compiler))


def _timed(compiled: Any, args: Any) -> dict[str, Any]:
  """Returns the times of a compiled program."""
  def run() -> None:
    jax.block_until_ready(compiled(*args))

  return worker.turns({'': run}, 5)['']


def measure(toy: bool) -> Iterator[dict[str, Any]]:
  """Yields a row for each case and each kernel of attention, and for each way
  to multiply experts: its seconds, or why there are none."""
  for case in CASES:
    for row in attention(config_of(case, toy)):
      yield dict(part='attention', case=case) | row
  for way, options in EXPERTS.items():
    row = dict(part='experts', case='mixtral', way=way)
    try:
      yield row | experts(config_of('mixtral', toy), **options)
    except Exception as error:  # of any kind: XLA refuses, or memory ends
      yield row | dict(error=' '.join(str(error).split())[:400])


def main() -> None:
  flags.DEFINE_bool('toy', False, 'Tiny sizes.')
  flags.DEFINE_string('json', '', 'Write the rows to this file.')
  cli.parse(__doc__)
  args, device, rows = flags.FLAGS, jax.devices()[0], []
  json_file = storage.output(args.json, '--json')
  if device.platform != 'gpu' and not args.toy:
    raise EnvironmentFailure(f'JAX sees no GPU, but {device.device_kind}: '
                             '--toy tries the benchmark on a CPU')
  for row in measure(args.toy):
    rows.append(row)
    time = row.get('error') or f'{1e3 * row["seconds"]:10.2f} ms'
    print(f'{row["part"]} {row["case"]} {row["way"]:40} {time}', flush=True)
    # At once, for what comes next may take the machine down.
    storage.write_json(json_file, dict(
        card=device.device_kind, toy=args.toy, rows=rows))


if __name__ == '__main__':
  cli.run(main)
