"""How fast Archetype is on one GPU, and whether it is right there.

  python -m benchmarks.gpu --json=gpu.json
  python -m benchmarks.gpu --sections=tests,kernels
  python -m benchmarks.gpu --toy --sections=kernels,step

It needs a machine with one GPU, the extras `cuda13` and `verify`, and pytest;
models have random weights, so there is nothing to download. --toy tries the
benchmark itself at tiny sizes, on a CPU too. Each side runs in a process of its
own, one at a time, so that all of the card's memory is free for it.

Sections:
  tests     tests/gpu_test.py on the card
  kernels   attention and a layer of experts alone, in every way that there is
  step      training steps of GPT-2 1.5B, and of as many layers of LLaMA-2-7B
            and Mixtral-8x7B as --layers says, by the fastest kernels; and of
            transformers' models by torch.compile, at the same sizes. A batch
            that does not fit is halved, and what the backward pass keeps is
            worked out again (model.remat)
  generate  64 tokens after a prompt of 128, by both sides

MFU is the share of the card's peak FLOP/s that the model's own FLOPs take.
"""

import argparse
from collections.abc import Iterator, Mapping
import importlib
import json
import math
import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import sharding
from architectures.parts.attention import kernels, xla
from architectures.parts.context import Context
from architectures.parts.moe.layer import MoE
from benchmarks import rival, worker
from configs.errors import EnvironmentFailure, one_of
from training import cli
from training.costs import flops, totals
from training.workdir import run_config, storage

SECTIONS = ('tests', 'kernels', 'step', 'generate')
# A file of configs/ and its size, fields of config.model, tokens of a row, and
# rows of a step that are tried first. nanoGPT rounds the vocabulary of 50,257
# up to a multiple of 64, because GPUs multiply odd sides slowly.
CASES = {
    'gpt2': ('gpt:gpt2-xl', dict(vocab_size=50304), 1024, 8),
    'llama': ('llama:2-7b', {}, 4096, 4),
    'mixtral': ('mixtral:8x7b', dict(max_len=4096), 4096, 4)}
TOY = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=0, d_ff=64,
           vocab_size=384, max_len=256)
# Ways to multiply the rows of experts: fields of model.moe, and options of
# XLA's compiler.
EXPERTS = {
    'ragged_dot': {},
    'ragged_dot, fused by XLA with Triton': dict(compiler=dict(
        xla_gpu_experimental_use_ragged_dot_fusion=True)),
    'ragged_dot, grouped product of cuBLAS': dict(compiler=dict(
        xla_gpu_experimental_use_ragged_dot_grouped_gemm=True)),
    'megablox': dict(moe=dict(grouped_kernel='megablox'))}
# transformers' product of experts takes no part in autocast, and is slow in
# float32.
PRECISION = {'mixtral': 'bfloat16'}
STEPS = 10  # of a window, of which only the last one is waited for


def config_of(case: str, toy: bool, layers: int = 0):
  """Returns the config of a run of a case."""
  file, fields, length, batch = CASES[case]
  name, _, size = file.partition(':')
  config = importlib.import_module(f'configs.{name}').get_config(
      'tiny' if toy else size)
  config.model.update(dtype='bfloat16', **(TOY if toy else fields))
  if layers and case != 'gpt2':
    config.model.num_layers = layers
  config.data.update(length=256 if toy else length, batch_size=batch)
  return config


def jobs(request: Mapping[str, Any]):
  """Returns what a worker of kernels can be asked to do, by name."""
  config, device = config_of(request['case'], request['toy'], 1), jax.devices()
  return {'attention': lambda: list(attention(config)),
          'experts': lambda: experts(
              config, **EXPERTS[request.get('way', 'ragged_dot')]),
          'card': lambda: (device[0].platform, device[0].device_kind)}


def attention(config: Any) -> Iterator[dict[str, Any]]:
  """Yields a row for each kernel of this platform, at the shapes of a config:
  of causal attention, and its gradient with respect to all three inputs."""
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  args = [jax.random.normal(key, (B, L, heads, c.head_dim), c.compute_dtype)
          for key, heads in zip(
              jax.random.split(jax.random.key(0), 3),
              (c.num_heads, c.num_kv_heads, c.num_kv_heads))]
  mask, here = kernels.Mask(causal=True), sharding.platform()
  seen_BLM = jnp.tril(jnp.ones((L, L), bool))[None]

  def loss(name: str, *qkv: jax.Array) -> jax.Array:
    if name == 'xla':
      out = xla.attend(*qkv, mask_BLM=seen_BLM, scale=c.head_dim ** -0.5,
                       causal=True)
    else:
      out = kernels.KERNELS[name].run(
          *qkv, mask, seen_BLM, scale=c.head_dim ** -0.5, softcap=0.0,
          sink_H=None)
    return jnp.square(out.astype(jnp.float32)).sum()

  for name in ('xla', *kernels.KERNELS):
    if name != 'xla' and kernels.KERNELS[name].platform != here:
      continue
    if name != 'xla' and (why := kernels.refusal(name, c, mask, L, L, here)):
      yield dict(way=name, error=f'{name} is refused, {why}')
      continue
    yield dict(way=name) | _timed_kernel(
        jax.grad(lambda *x, name=name: loss(name, *x), (0, 1, 2)), *args)


def experts(config: Any, moe: Mapping[str, Any] | None = None,
            compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Returns the row of a layer of experts, its router and dispatch included.

  Args:
    config: of a run.
    moe: fields of config.model.moe that choose a way to multiply.
    compiler: options of XLA's that do.
  """
  config.model.moe.update(dict(
      grouped_kernel='auto', dispatch='auto', capacity_factor=0.0,
      eval_capacity_factor=0.0) | dict(moe or {}))
  c = totals.resolved(config)
  B, L = config.data.batch_size, config.data.length
  x_BLD = jax.random.normal(jax.random.key(0), (B, L, c.d_model),
                            c.compute_dtype)
  ctx = Context(jnp.arange(L)[None], length=L)
  module = MoE(c)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x_BLD, ctx))

  def loss(params: Any, x_BLD: jax.Array) -> jax.Array:
    y_BLD, _ = module.apply(params, x_BLD, ctx)
    return jnp.square(y_BLD.astype(jnp.float32)).mean()

  return _timed_kernel(jax.grad(loss, (0, 1)), params, x_BLD, compiler=compiler)


def _timed_kernel(function: Any, *args: Any,
           compiler: Mapping[str, Any] | None = None) -> dict[str, Any]:
  compiled = jax.jit(function).lower(*args).compile(
      compiler_options=dict(compiler) if compiler else None)
  return worker.turns({'': lambda: jax.block_until_ready(compiled(*args))},
                      5)['']


def measure_kernels(toy: bool) -> Iterator[dict[str, Any]]:
  """Yields a row for each case and each kernel of attention, and for each way
  to multiply experts: its seconds, or why there are none."""
  for case in CASES:
    with worker.Worker('gpu', dict(case=case, toy=toy)) as side:
      for row in side.do('attention')['result']:
        yield dict(part='attention', case=case) | row
  for way in EXPERTS:
    row = dict(part='experts', case='mixtral', way=way)
    try:
      with worker.Worker('gpu', dict(case='mixtral', toy=toy, way=way)) as side:
        yield row | side.do('experts')['result']
    except EnvironmentFailure as failure:
      yield row | dict(error=str(failure))


def fastest(rows: list[dict[str, Any]], part: str, case: str) -> str:
  """Returns the fastest way of a part of a case; '': nothing was measured."""
  timed = [row for row in rows if (row['part'], row['case']) == (part, case)
           and 'seconds' in row]
  return min(timed, key=lambda row: row['seconds'])['way'] if timed else ''


def measure_steps(case: str, job: str, args: Any, kernel_rows: list
                  ) -> Iterator[dict[str, Any]]:
  """Yields the row of each side of a case, ours first."""
  config = rival.alike(config_of(case, args.toy, args.layers))
  config.model.attention_kernel = fastest(
      kernel_rows, 'attention', case) or 'auto'
  way = EXPERTS[fastest(kernel_rows, 'experts', case) or 'ragged_dot']
  config.model.moe.update(way.get('moe', {}))
  work = flops.training_flops_per_token(
      totals.resolved(config), config.data.length)
  peak = flops.peak(args.card, 'bfloat16')
  for side in ('ours', 'pytorch'):
    notes = []
    for batch, remat in tries(config.data.batch_size, side):
      config.data.batch_size, config.model.remat = batch, remat
      request = rival.request(config) | dict(
          config=run_config.to_json(config), count=STEPS,
          prompt=128, new=64, compiler=way.get('compiler'), compiled=not
          args.toy, dtype=PRECISION.get(case, 'autocast'))
      try:
        row = _timed(side, request, job)
      except EnvironmentFailure as failure:
        notes.append(f'batch {batch}, remat {remat}: {failure}')
        continue
      tokens = batch * (64 if job == 'generate' else
                        STEPS * config.data.length) / row['seconds']
      mfu = tokens * work / peak if peak and job == 'steps' else None
      yield row | dict(
          job=job, case=case, side=side, batch=batch, remat=remat, mfu=mfu,
          tokens_per_s=tokens, layers=config.model.num_layers, notes=notes)
      break
    else:
      yield dict(job=job, case=case, side=side, error=notes[-1], notes=notes)


def tries(batch: int, side: str) -> Iterator[tuple[int, str]]:
  """Yields (rows, what is worked out again), from the fastest on."""
  for power in range(int(math.log2(batch)), -1, -1):
    for remat in ('none', 'dots', 'full') if side == 'ours' else ('none',):
      yield 2 ** power, remat


def _timed(side: str, request: dict, job: str) -> dict[str, Any]:
  with worker.Worker(side, request) as process:
    process.do(job)  # warms up
    answers = [process.do(job) for _ in range(3)]
  best = min(answers, key=lambda answer: answer['seconds'])
  return dict(seconds=best['seconds'], peak_bytes=best['result'])


def line(row: Mapping[str, Any]) -> str:
  """Returns a row for a terminal."""
  names = ('part', 'job', 'case', 'side', 'way')
  name = ' '.join(str(row[key]) for key in names if key in row)
  if 'error' in row:
    return f'{name:50} {row["error"]}'
  text = f'{name:50} {1e3 * row["seconds"]:10.2f} ms'
  if 'tokens_per_s' in row:
    text += f'  {row["tokens_per_s"]:10,.0f} tokens/s  batch {row["batch"]}'
  if row.get('mfu'):
    text += f'  MFU {row["mfu"]:.1%}'
  return text


def main() -> int:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.gpu', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--sections', default=','.join(SECTIONS),
                      help='those to run, separated by commas')
  parser.add_argument('--layers', type=int, default=8,
                      help='of LLaMA and of Mixtral, in training steps')
  parser.add_argument('--toy', action='store_true', help='tiny sizes')
  parser.add_argument('--json', default='', help='write the rows to this file')
  args = parser.parse_args()
  chosen = args.sections.split(',')
  for name in chosen:
    one_of('--sections', name, SECTIONS)
  json_file = storage.output(args.json, '--json')
  # JAX takes so much of a GPU's memory at its start; by itself, 0.75.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
  with worker.Worker('gpu', dict(case='gpt2', toy=True)) as side:
    platform, args.card = side.do('card')['result']
  if platform != 'gpu' and not args.toy:
    raise EnvironmentFailure(f'JAX sees no GPU, but {args.card}: --toy tries '
                             'the benchmark on a CPU')
  jax.config.update('jax_platforms', 'cpu')  # the card is for the workers
  code, rows = 0, []
  if 'tests' in chosen:
    code = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu',
         'tests/gpu_test.py'],
        env=os.environ | dict(ARCHETYPE_TEST_PLATFORM=platform)).returncode
  def add(new: Iterator[dict[str, Any]]) -> None:
    for row in new:
      rows.append(row)
      print(line(row), flush=True)
      if json_file:  # at once, for what comes next may take the machine down
        storage.write(json_file, json.dumps(
            dict(card=args.card, toy=args.toy, rows=rows), indent=1) + '\n')
  if 'kernels' in chosen:
    add(measure_kernels(args.toy))
  kernel_rows = [*rows]
  for section, job, cases in (('step', 'steps', CASES),
                              ('generate', 'generate', ('llama',))):
    for case in cases if section in chosen else ():
      add(measure_steps(case, job, args, kernel_rows))
  return code


if __name__ == '__main__':
  cli.run(main)
