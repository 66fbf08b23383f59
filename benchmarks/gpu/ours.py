"""This project's side: what the card is, kernels, training steps, writing.

workers.py runs it as a program, which reads a request from stdin and writes
rows to stdout.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

import architectures
from benchmarks import ours as training_side
from benchmarks.gpu import cases
from benchmarks.gpu import kernel_trials
from benchmarks.gpu import timing
from training import cli
from training import generate
from training import runs
from training.costs import flops, memory, peaks, totals
from training.workdir import run_config

Row = dict[str, Any]
FUSED = 1.25  # a guess; too low a one costs a compile, too high a one speed


def config_of(case: cases.Case, layers: int = 0):
  """Returns the config of a run of a case."""
  name, _, size = case.config.partition(':')
  config = importlib.import_module(f'configs.{name}').get_config(size)
  config.model.update(case.model)
  if layers:
    config.model.num_layers = layers
  config.data.update(length=case.length, batch_size=case.batch)
  return config


def device_memory() -> int | None:
  """Returns the bytes that programs may have; None: nobody says."""
  return (jax.devices()[0].memory_stats() or {}).get('bytes_limit')


def check(request: Mapping[str, Any]) -> Iterator[Row]:
  """Says what is here, and what the cases are on this card."""
  device = jax.devices()[0]
  yield dict(
      platform=device.platform, card=device.device_kind,
      devices=jax.device_count(), memory=device_memory(),
      peak=peaks.flops(device.device_kind, 'bfloat16'),
      backend=device.client.platform_version.splitlines()[0],
      python=platform.python_version(), cores=os.cpu_count(),
      jax=jax.__version__, flax=flax.__version__,
      commit=_said('git', 'rev-parse', '--short', 'HEAD'),
      driver=_said('nvidia-smi', '--query-gpu=name,driver_version,memory.total',
                   '--format=csv,noheader'))
  yield dict(cudnn_attention=_cudnn_attention())
  for name, case in cases.chosen(request['toy'])[0].items():
    try:
      yield dict(case=name) | sizes(case)
    except Exception as error:
      yield dict(case=name, error=timing.sentence(error))
  yield dict(case='write', model=_fields(totals.resolved(_writing_config(
      cases.chosen(request['toy'])[1]))))


def _fields(model: Any) -> Row:
  """Returns what the other side has to know of a model."""
  names = ('vocab_size', 'd_model', 'd_ff', 'num_layers', 'num_heads',
           'num_kv_heads', 'head_dim', 'max_len', 'norm_eps')
  return {name: getattr(model, name) for name in names} | dict(moe={
      name: getattr(model.moe, name) for name in (
          'num_experts', 'top_k', 'balance_weight')})


def sizes(case: cases.Case) -> Row:
  """Returns the layers, parameters and FLOPs of a case on this card."""
  config = config_of(case)
  if case.share:
    room = device_memory()
    config.model.num_layers = case.layers
    if room:
      one, two = (totals.parameters(totals.resolved(config_of(case, n)))[0]
                  for n in (1, 2))
      fit = (case.share * room / cases.STATE_BYTES - one) // (two - one) + 1
      config.model.num_layers = int(min(max(fit, 1), case.layers))
  model = totals.resolved(config)
  whole, active = totals.parameters(model)
  return dict(layers=config.model.num_layers, parameters=whole,
              active_parameters=active, model=_fields(model),
              flops_per_token=flops.training_flops_per_token(
                  model, case.length))


def _said(*words: str) -> str:
  """Returns the first line that a program prints, or why there is none."""
  try:
    return subprocess.run(words, capture_output=True, text=True, check=True,
                          timeout=20).stdout.strip().splitlines()[0]
  except (OSError, subprocess.SubprocessError, IndexError) as error:
    return f'not said ({timing.sentence(error)})'


def _cudnn_attention() -> str:
  """Returns 'works' or what cuDNN's attention ends with, forward and back."""
  q_BLHK = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
  try:
    jax.block_until_ready(jax.jit(jax.grad(
        lambda q: jax.nn.dot_product_attention(
            q, q, q, is_causal=True, implementation='cudnn').astype(
                jnp.float32).sum()))(q_BLHK))
  except Exception as error:
    return timing.sentence(error)
  return 'works'


@contextlib.contextmanager
def options(way: Mapping[str, Any]):
  """The options of JAX that a way of multiplying experts wants."""
  wanted = way.get('jax', {})
  missing = [name for name in wanted if not hasattr(jax.config, name)]
  if missing:
    raise LookupError(f'jax {jax.__version__} has no option {missing[0]}')
  for name, value in wanted.items():
    jax.config.update(name, value)
  try:
    yield
  finally:
    for name in wanted:
      jax.config.update(name, False)


def step(request: Mapping[str, Any]) -> Iterator[Row]:
  """Times training steps at the first size that the memory has room for."""
  case = cases.chosen(request['toy'])[0][request['case']]
  way = request.get('way', {})
  config = config_of(case, request['layers'])
  config.model.attention_kernel = request.get('attention', 'auto')
  config.model.moe.update(way.get('moe', {}))
  notes: list[str] = []
  for batch, remat in tries(request.get('batch') or case.batch):
    gc.collect()  # what the try before left
    config.data.batch_size, config.model.remat = batch, remat
    said = f'batch {batch}, remat {remat}'
    try:
      with options(way):
        row = _timed(config, request['seconds'], way.get('compiler'))
    except _TooLarge as error:
      notes.append(f'{said}: {error}')
    except Exception as error:
      if not cli.is_out_of_memory(error):
        yield dict(error=timing.sentence(error), notes=notes)
        return
      notes.append(f'{said}: out of memory')
    else:
      yield row | dict(batch=batch, length=case.length, remat=remat,
                       layers=config.model.num_layers, notes=notes)
      return
  yield dict(error='out of memory at every size', notes=notes)


def tries(batch: int) -> Iterator[tuple[int, str]]:
  """Yields (rows, what is worked out again), from the fastest on."""
  while batch:
    for remat in cases.REMAT:
      yield batch, remat
    batch //= 2


class _TooLarge(Exception):
  """What a step would need is known to be more than there is."""


def _timed(config: Any, seconds: float, compiler: Mapping[str, Any] | None
           ) -> Row:
  trainer = training_side.Trainer(run_config.to_json(config))
  room = device_memory()
  if room:
    least = memory.least(trainer.run)
    # Of what the backward pass keeps XLA needs less: not that of a fusion.
    _fits(sum(least[name] for name in ('parameters', 'optimizer', 'gradients'))
          + memory.kept(trainer.run) / FUSED, room, 'by estimate')
  traced, compiled = trainer.create(compiler)
  if room:
    needs = trainer.compiled.memory_analysis()
    _fits(needs.argument_size_in_bytes + needs.temp_size_in_bytes
          + needs.output_size_in_bytes - needs.alias_size_in_bytes, room,
          'by the compiler')
  found = timing.windows(trainer.dispatch, lambda metrics: float(
      metrics['loss']), seconds)
  stats = jax.devices()[0].memory_stats() or {}
  tokens = config.data.batch_size * config.data.length
  return found | dict(
      tokens_per_s=tokens / found['step_s'], compile_s=traced + compiled,
      peak_bytes=stats.get('peak_bytes_in_use'), loss=trainer.step(),
      parameters=runs.count(trainer.state.params))


def _fits(need: int, room: int, by: str) -> None:
  if need > room:
    raise _TooLarge(f'{need / 2**30:.0f} GiB {by}, of {room / 2**30:.0f}')


def write(request: Mapping[str, Any]) -> Iterator[Row]:
  """Times the writing of text, and says what a token has to read."""
  case = cases.chosen(request['toy'])[1]
  config = _writing_config(case)
  model = totals.resolved(config)
  module = architectures.build(model)
  params = nn.meta.unbox(jax.jit(module.init)(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])
  figures = totals.count(config, case.prompt + case.new)
  for batch in case.batches:
    prompts_BL = jax.random.randint(
        jax.random.key(1), (batch, case.prompt), 0, model.vocab_size)
    def run(batch: int = batch, prompts_BL: jax.Array = prompts_BL):
      return jax.block_until_ready(generate.generate(
          module, params, prompts_BL, jnp.full(batch, case.prompt),
          jax.random.key(2), max_new_tokens=case.new,
          sampling=generate.Sampling(temperature=0)))
    try:
      start = time.perf_counter()
      run()
      first = time.perf_counter() - start
      found = timing.windows(run, lambda x: x, request['seconds'])
    except Exception as error:
      yield dict(batch=batch, error=timing.sentence(error))
      continue
    yield dict(
        batch=batch, prompt=case.prompt, new=case.new, compile_s=first,
        call_s=found['step_s'], tokens_per_s=batch * case.new / found['step_s'],
        bytes_per_step=read(figures, model, case, batch))


def _writing_config(case: cases.Writing):
  name, _, size = case.config.partition(':')
  config = importlib.import_module(f'configs.{name}').get_config(size)
  config.model.update(case.model | dict(dtype='bfloat16',
                                        param_dtype='bfloat16'))
  return config


def read(figures: Mapping[str, Any], model: Any, case: cases.Writing,
         batch: int) -> float:
  """Returns the bytes that writing a token to each row has to read: every
  weight but the table of the embedding, of which a row is looked up, and the
  keys and values of the tokens that are there, in the mean."""
  parameters = figures['parameters']
  if not model.tie_embeddings:
    parameters -= figures['by_part']['embed']
  weights = parameters / figures['parameters'] * figures['parameter_bytes']
  there = case.prompt + case.new / 2
  return weights + batch * there * figures['kv_cache_bytes_per_token']


def kernels(request: Mapping[str, Any]) -> Iterator[Row]:
  """Times attention and products of experts alone, each way that there is."""
  table = cases.chosen(request['toy'])[0]
  for name, case in table.items():
    yield from (row | dict(case=name) for row in kernel_trials.attention(
        config_of(case), request['seconds']))
  config = config_of(table['mixtral'], 1)
  for name, way in cases.EXPERTS.items():
    try:
      with options(way):
        row = kernel_trials.experts(config, way, request['seconds'])
    except Exception as error:
      row = dict(error=timing.sentence(error))
    gc.collect()
    yield dict(part='experts', case='mixtral', way=name,
               drops=way.get('drops', False)) | row


JOBS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    'check': check, 'kernels': kernels, 'step': step, 'write': write}


def main() -> None:
  request = json.loads(sys.stdin.readline())
  for row in JOBS[request['job']](request):
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()
