"""The runs of verify_resume, and what is compared of them."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

from configs import sharding as tables
from configs.errors import EnvironmentFailure, RequestError, require
from tools import tether
from training import runs
from training.distributed import devices
from training.workdir import checkpoints

AXES = tables.MESH_AXES


def verify(config, words: list[str], folder: pathlib.Path, steps: int,
           meshes: list[str], virtual: int, tolerance: float,
           processes: int = 1) -> dict:
  """Returns what was found, to be printed or written as JSON.

  Args:
    config: the user's.
    words: the flags of train.py that make it.
    folder: for the runs' workdirs, which must not be there yet.
    steps: of each run.
    meshes: others to go on with, as 'data=2,fsdp=2'; none: one that fits.
    virtual: devices on a CPU.
    tolerance: relative, of a loss on another mesh.
    processes: of the runs on other meshes; they share the devices.

  Raises:
    ValueError: for what train.py refuses, and meshes that do not fit.
    RuntimeError: a run failed.
  """
  runs.check_config(config)
  middle = steps // 2
  check_own(words)
  env = _environment(folder, virtual)
  count = _count_devices(env)
  own = devices.mesh_shape(config.mesh, count)
  others = [parse(text, count) for text in meshes] or _another(
      config, own, count)
  if processes < 1 or count % processes:
    raise RequestError(f'--processes is {processes}, which does not divide the '
                       f'{count} devices')
  for mesh in others:
    runs.check_mesh(config, runs.resolve_alone(config), mesh)
  words = [*words, *(f'--config.{name}={value}'
                     for name, value in _settings(steps, middle).items())]
  whole, killed = folder / 'whole', folder / 'killed'
  for workdir in (whole, killed):
    if workdir.exists():
      raise RequestError(f'{workdir} is there already: choose another --folder')
  _train(env, words, whole)
  _train(env, words, killed, kill_after=middle)
  _train(env, words, killed, middle)
  comparisons = [bits(own, whole, killed, steps)]
  for i, mesh in enumerate(others):
    copy = folder / f'reshaped-{i}'
    shutil.copytree(whole, copy)
    for step in checkpoints.finished(copy / 'checkpoints'):
      if step > middle:
        shutil.rmtree(copy / 'checkpoints' / str(step))
    _train(env, [*words, *(f'--config.mesh.{axis}={size}'
                           for axis, size in mesh.items())], copy, middle,
           launch=[] if processes == 1 else [
               f'--processes={processes}', f'--devices={count // processes}'])
    comparisons.append(numbers(mesh, whole, copy, middle, steps, tolerance))
  return dict(steps=steps, killed_after=middle, devices=count,
              processes=processes,
              comparisons=comparisons,
              resumes=all(row['ok'] for row in comparisons))


def check_own(words: list[str]) -> None:
  """Raises RequestError for flags that set what this program sets itself."""
  own = _settings(0, 0)
  for word in words:
    name = word.partition('=')[0].removeprefix('--config.')
    require(name not in own, f'{word} sets a field that this program sets '
            'itself: ' + ('pass --steps' if name == 'train.steps' else
                          'leave it out'))


def _settings(steps: int, middle: int) -> dict[str, Any]:
  return {'train.steps': steps, 'checkpoint.every_steps': middle,
          'checkpoint.every_minutes': 0.0, 'checkpoint.keep': steps,
          'checkpoint.keep_every': 0, 'log.every_steps': 1,
          'eval.every_steps': 0, 'log.tensorboard': False, 'log.wandb': False}


def _environment(folder: pathlib.Path, virtual: int) -> dict[str, str]:
  """Returns that of the runs: they share what they compile."""
  env = dict(os.environ)
  env.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'jax_cache'))
  name = '--xla_force_host_platform_device_count'
  kept = [f for f in env.get('XLA_FLAGS', '').split() if name not in f]
  env['XLA_FLAGS'] = ' '.join([*kept, f'{name}={virtual}'])
  return env


def _count_devices(env) -> int:
  """Asks another process: this one must leave an accelerator to the runs."""
  result = subprocess.run(
      [sys.executable, '-c', 'import jax; print(jax.device_count())'], env=env,
      check=True, stdout=subprocess.PIPE, text=True)
  return int(result.stdout)


def parse(text: str, count: int) -> dict[str, int]:
  sizes = dict.fromkeys(AXES, 1)
  for part in text.split(','):
    axis, _, size = part.partition('=')
    if axis not in AXES or not size.lstrip('-').isdecimal():
      raise RequestError(f'--mesh is {text!r}: choose sizes for '
                         f'{", ".join(AXES)}, as data=2,fsdp=2')
    sizes[axis] = int(size)
  return devices.mesh_shape(sizes, count)


def _another(config, own: dict[str, int], count: int) -> list[dict[str, int]]:
  """Returns the first mesh other than `own` that fits the model and batch."""
  model = runs.resolve_alone(config)
  for inner in ('fsdp', 'tensor', 'expert', 'data'):
    for size in range(count, 0, -1):
      if count % size:
        continue
      mesh = dict.fromkeys(AXES, 1)
      mesh['data'] = count // size
      mesh[inner] *= size
      if mesh == own or math.prod(mesh.values()) != count:
        continue
      try:
        runs.check_mesh(config, model, mesh)
      except RequestError:
        continue
      return [mesh]
  raise RequestError(
      f'no other mesh of {count} device{"s" * (count > 1)} fits this model and '
      'batch: on a CPU, choose more with --devices')


def _train(env, words, workdir: pathlib.Path, begin: int = 0, *,
           kill_after: int = 0, launch=()) -> None:
  """Trains to the end, or to be killed; from step `begin`, or else fails."""
  program = (['-m', 'tools.verify_resume.worker', str(kill_after)]
             if kill_after else ['train.py'])
  if launch:
    program = ['-m', 'tools.launch', 'local', '--max_restarts=0', *launch]
  print(f'{workdir.name}: {"to be killed" if kill_after else "training"} ...',
        flush=True)
  result = subprocess.run(
      tether.words([sys.executable, *program, *words, f'--workdir={workdir}']),
      env=env, capture_output=True, text=True)
  if kill_after:
    failed = result.returncode != -signal.SIGKILL
  else:
    failed = result.returncode != 0
  if failed:
    last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]
    sentence = last.removeprefix('error: ')
    if result.returncode == 2:
      raise RequestError(sentence)
    raise EnvironmentFailure(f'{workdir.name} ended with exit code '
                             f'{result.returncode}: {sentence}')
  if begin and f'going on from step {begin}\n' not in result.stdout:
    raise EnvironmentFailure(f'{workdir.name} did not go on from step {begin}, '
                             'so there is nothing to compare')


def _losses(workdir: pathlib.Path) -> dict[int, float]:
  rows = [json.loads(line) for line in
          (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row['loss'] for row in rows if row['split'] == 'train'}


def bits(mesh, whole, killed, steps: int) -> dict:
  """Compares every loss, and every array of the last checkpoint, bit for bit.
  """
  one, two = _losses(whole), _losses(killed)
  arrays, others = (checkpoints.arrays(checkpoints.directory(w), steps)
                    for w in (whole, killed))
  wrong = [f'loss of step {n}' for n in range(1, steps + 1)
           if one.get(n) is None or one[n] != two.get(n)]  # None: not finite
  wrong += [name for name in sorted(arrays.keys() | others.keys())
            if _checksum(arrays, name) is None
            or _checksum(arrays, name) != _checksum(others, name)]
  if not arrays:
    wrong.append(f'no array is saved in step {steps}')
  found = (f'{len(one)} losses and {len(arrays)} arrays, bit for bit'
           if not wrong else f'first: {wrong[0]}; {len(wrong)} in all')
  return dict(what='resumed', mesh=_name(mesh), ok=not wrong, found=found,
              differing=wrong)


def _checksum(arrays: dict, name: str) -> int | None:
  return arrays.get(name, {}).get('checksum')


def numbers(mesh, whole, reshaped, middle: int, steps: int,
             tolerance: float) -> dict:
  """Compares the losses after the checkpoint."""
  one, two = _losses(whole), _losses(reshaped)
  worst = max(_difference(one.get(n), two.get(n))
              for n in range(middle + 1, steps + 1))
  return dict(what='reshaped', mesh=_name(mesh), ok=worst <= tolerance,
              found=f'losses differ by {worst:.1e}, {tolerance:.0e} allowed',
              largest_difference=worst, tolerance=tolerance)


def _difference(a: float | None, b: float | None) -> float:
  if a is None or b is None:  # not finite, or no such step
    return math.inf
  return abs(a - b) / abs(a)


def _name(mesh) -> str:
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1
                  ) or 'one device'
