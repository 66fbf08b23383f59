"""Plans that fit, best first: over mesh shapes, remat and micro-batches.

A candidate is scored without compiling, by the same bounds as a report: FLOPs
by formula with what its remat policy adds, the bytes that its sharding must
send, and memory.py's estimate of the peak. The best are then compiled, where a
compiler is there, until as many fit as were asked for.
"""

import dataclasses
import itertools
import math

import ml_collections

from architectures.parts import layers
from common.errors import RequestError
from tools.plan import chips, collectives, predict, programs
from training import progress, runs
from training.costs import memory
from training.data import tokenizers
from training.distributed import devices
from training.objectives import pipeline

BOUNDS = ('step_seconds', 'highest_mfu', 'bound')


def meshes(config, model, topology: chips.Topology):
  """Yields every mesh that the model and the batch allow, `tensor` within
  what the fast network joins and 16 at most."""
  count = topology.devices
  sides = [n for n in range(1, count + 1) if count % n == 0]
  for expert, tensor in itertools.product(sides, [n for n in sides if n <= 16]):
    if count % (expert * tensor) or tensor > topology.together:
      continue
    rest = count // (expert * tensor)
    for fsdp in (n for n in sides if rest % n == 0):
      shape = dict(data=rest // fsdp, fsdp=fsdp, expert=expert, context=1,
                   tensor=tensor)
      if topology.slices > 1 and shape['data'] % topology.slices:
        continue
      try:
        runs.check_mesh(config, model, shape)
      except RequestError:  # what does not divide is no candidate
        continue
      yield shape


def candidates(config, topology: chips.Topology) -> list[dict]:
  """Returns every plan of a config, checked, whose estimate fits, shortest step
  first."""
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  predict.peak_flops(topology, model.dtype)  # or there is no order of plans
  config = config.copy_and_resolve_references()
  config.train.grad_accumulation = 1  # the plans have their own
  sizes = (*pipeline.ramp_of(config).sizes, config.data.batch_size)
  placed = chips.devices(topology)
  plans, kept = [], {}
  for shape in progress.each(list(meshes(config, model, topology)),
                             'meshes estimated'):
    run = runs.build(config, model,
                     devices.make_mesh(shape, placed, topology.slices))
    if sum(memory.state(run).values()) > topology.chip.hbm:
      continue
    least = math.inf  # the accumulation of this mesh's plans so far
    for name, policy in layers.REMAT.items():
      variant = _variant(run, name, 1)
      if name not in kept:
        kept[name] = memory.kept(variant)
      shards = math.prod(shape[a] for a in ('data', 'fsdp', 'expert'))
      for parts in (2 ** i for i in range(12) if not any(
          size % (shards * 2 ** i) for size in sizes)):
        if policy.to_host and parts >= least:
          break  # the way to the host is in no bound: it must save sending
        one = _score(_variant(run, name, parts), topology, kept[name])
        if one['peak_bytes'] < topology.chip.hbm:
          plans.append(one)
          least = min(least, parts)
          break  # more accumulation only sends more
  return sorted(plans, key=lambda one: (one['step_seconds'],
                                            one['peak_bytes']))


def with_policy(config: ml_collections.ConfigDict, policy: str,
                accumulation: int) -> ml_collections.ConfigDict:
  """Returns a copy with another remat policy and accumulation."""
  config = config.copy_and_resolve_references()
  config.model.remat = policy
  config.train.grad_accumulation = accumulation
  return config


def _variant(run: runs.Run, policy: str, accumulation: int) -> runs.Run:
  model = dataclasses.replace(run.model, remat=policy)
  return dataclasses.replace(
      run, config=with_policy(run.config, policy, accumulation), model=model,
      module=run.module.clone(config=model))


def _score(run: runs.Run, topology: chips.Topology, kept: tuple[int, int]
           ) -> dict:
  """Returns one plan, its flags and its bounds."""
  c, accumulation = run.model, run.config.train.grad_accumulation
  needed = sum(programs.model_flops(run, 'train').values()) / topology.devices
  inside, outside = collectives.total(
      predict.sent(run, programs.hosts(run, topology)))
  bounds = predict.times(
      topology, c.dtype, flops=needed * (3 + layers.remat(c).again) / 3,
      hbm_bytes=predict.hbm_bytes(run, 0.0, True), sent=inside,
      sent_outside=outside, model_flops=needed)
  mesh = ','.join(f'{a}={n}' for a, n in run.mesh.shape.items() if n > 1)
  return dict(
      mesh=dict(run.mesh.shape), remat=c.remat, grad_accumulation=accumulation,
      **{name: bounds[name] for name in BOUNDS},
      peak_bytes=memory.analytic(run, kept, topology.chip.platform)['peak'],
      flags=f'--mesh {mesh or "data=1"} --config.model.remat={c.remat} '
      f'--config.train.grad_accumulation={accumulation}', estimate=True)


def search(config, topology: chips.Topology, wanted: int) -> dict:
  """Returns the `wanted` best plans, compiled where that is possible.

  Raises:
    DoesNotFit: where no candidate does.
  """
  listed = candidates(config, topology)
  plans, refused = [], []
  for row in listed[:4 * wanted]:
    if len(plans) == wanted:
      break
    if chips.compiler(topology):
      mesh = ','.join(f'{axis}={n}' for axis, n in row['mesh'].items())
      run = programs.run_on(with_policy(
          config, row['remat'], row['grad_accumulation']), topology, mesh)
      try:
        report = programs.analyse(run, topology, 'train')
      except programs.DoesNotFit as error:
        refused.append(row | dict(reason=str(error)))
        continue
      row |= dict(estimate=False, peak_bytes=report['memory']['peak'], **{
          name: report['roofline'][name] for name in BOUNDS})
    plans.append(row)
  if not plans:
    raise programs.DoesNotFit(
        f'{len(listed)} plans (meshes, remat policies and accumulations) of '
        f'{topology.name} fit data.batch_size {config.data.batch_size} by an '
        f'estimate, and the compiler refused the best {len(refused)}: take '
        'more chips, or a batch with more divisors'
        + ''.join(f'. The last: {row["reason"]}' for row in refused[-1:]))
  return dict(topology=topology.name, candidates=len(listed), refused=refused,
              plans=sorted(plans, key=lambda row: row['step_seconds']))


def text(plans: dict) -> str:
  """Returns the plans as a table."""
  lines = [f'{plans["topology"]}: {plans["candidates"]} plans fit by an '
           'estimate; best first, by the shortest step that published figures '
           'allow (~: not compiled)']
  for row in plans['plans']:
    m = '~' if row['estimate'] else ''
    lines.append(
        f'  {m}{row["step_seconds"]:.3g} s a step, highest MFU {m}'
        f'{row["highest_mfu"]:.1%}, bound by {row["bound"]}, {m}'
        f'{row["peak_bytes"] / chips.GIB:.1f} GiB  {row["flags"]}')
  for row in plans['refused']:
    lines.append(f'  refused: {row["flags"]}: {row["reason"]}')
  return '\n'.join(lines)
