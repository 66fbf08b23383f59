"""Searches for plans that fit, best first, over mesh shapes, remat policies and
gradient accumulations.

A candidate is scored without compiling, by the same bounds as a report: by
FLOPs from a formula with what its remat policy adds, the bytes that its
sharding must send, and memory.py's estimate of the peak. The best are then
compiled, where a compiler is there, until as many fit as were asked for.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

import ml_collections

from architectures.parts import layers
from architectures.parts.config import ModelConfig
from common.errors import RequestError
from tools.plan import chips, collectives, predict, programs
from training import progress, runs
from training.costs import memory
from training.data import tokenizers
from training.distributed import devices
from training.objectives import pipeline

KEYS_OF_BOUNDS = ('step_seconds', 'highest_mfu', 'bound')


def possible_meshes(config: ml_collections.ConfigDict, model: ModelConfig,
                    topology: chips.Topology) -> Iterator[dict[str, int]]:
  """Yields every mesh that the model and the batch allow.

  The `tensor` axis stays within the devices that the fast network joins, and 16
  at most, because it communicates in every layer.

  Args:
    config: the config of the run.
    model: its model, resolved.
    topology: the devices.

  Yields:
    The number of devices of each mesh axis, by its name.
  """
  count = topology.devices
  # Each axis divides the number of devices; `data` takes those that are left.
  sides = [n for n in range(1, count + 1) if count % n == 0]
  for expert, tensor, fsdp in itertools.product(sides, sides, sides):
    if tensor > min(16, topology.together) or count % (expert * tensor * fsdp):
      continue
    data = count // (expert * tensor * fsdp)
    # Only data parallelism crosses the slow network between slices.
    if topology.slices > 1 and data % topology.slices:
      continue
    shape = dict(data=data, fsdp=fsdp, expert=expert, context=1, tensor=tensor)
    try:
      runs.check_mesh(config, model, shape)
    except RequestError:  # what does not divide is no candidate
      continue
    yield shape


def plans_by_estimate(config: ml_collections.ConfigDict,
                      topology: chips.Topology) -> list[dict]:
  """Returns every plan that fits by an estimate, the one with the shortest step
  first. A plan is a mesh, a remat policy and an accumulation of gradients.

  Args:
    config: the config of the run, checked; its mesh, model.remat and
      train.grad_accumulation are replaced.
    topology: the devices.
  """
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  # Without a published peak, plans have no order.
  predict.require_peak_flops(topology, model.dtype)
  config = config.copy_and_resolve_references()
  config.train.grad_accumulation = 1  # the plans have their own
  described = chips.described_devices(topology)
  plans: list[dict] = []
  activations: dict[str, tuple[int, int]] = {}  # those that a policy keeps
  shapes = list(possible_meshes(config, model, topology))
  for shape in progress.show_items(shapes, 'meshes estimated'):
    mesh = devices.make_mesh(shape, described, topology.slices)
    run = runs.build(config, model, mesh)
    # Activations only add to the state, so a state that is too large ends it.
    if sum(memory.state_bytes(run).values()) <= topology.chip.hbm:
      plans += _plans_of_mesh(run, topology, activations)
  plans.sort(key=lambda plan: (plan['step_seconds'], plan['peak_bytes']))
  return plans


def _plans_of_mesh(run: runs.Run, topology: chips.Topology,
                   activations: dict[str, tuple[int, int]]) -> list[dict]:
  """Returns the plans of one mesh that fit by an estimate: for each remat
  policy the one that accumulates the fewest gradients, as more of them only
  send more.

  Args:
    run: the run on that mesh.
    topology: the devices.
    activations: what memory.bytes_kept_for_backward returns, by the name of a
      policy. It is the same on each mesh, and is filled in here.
  """
  accumulations = _possible_accumulations(run)
  plans = []
  least = math.inf  # the accumulation of this mesh's plans so far
  for name, policy in layers.REMAT.items():
    if name not in activations:
      activations[name] = memory.bytes_kept_for_backward(
          _with_policy(run, name, 1))
    for parts in accumulations:
      if policy.keeps_input_on_host and parts >= least:
        break  # the way to the host is in no bound: it must save sending
      plan = _estimate_plan(
          _with_policy(run, name, parts), topology, activations[name])
      if plan['peak_bytes'] < topology.chip.hbm:
        plans.append(plan)
        least = min(least, parts)
        break
  return plans


def _possible_accumulations(run: runs.Run) -> Sequence[int]:
  """Returns the numbers of parts into which a step can cut its batch, so that
  gradients are accumulated over the parts: values of train.grad_accumulation.

  They are powers of two that divide the rows of a device in every batch of the
  run, those of a growing batch size included; the smallest comes first.

  Args:
    run: the run, on its mesh.
  """
  config = run.config
  shape = run.mesh.shape
  batch_sizes = (*pipeline.read_ramp(config).sizes, config.data.batch_size)
  shards = shape['data'] * shape['fsdp'] * shape['expert']
  accumulations = []
  for power in range(12):
    parts = 2 ** power
    if all(size % (shards * parts) == 0 for size in batch_sizes):
      accumulations.append(parts)
  return accumulations


def with_policy(config: ml_collections.ConfigDict, policy: str,
                accumulation: int) -> ml_collections.ConfigDict:
  """Returns a copy of a config with another remat policy and accumulation."""
  config = config.copy_and_resolve_references()
  config.model.remat = policy
  config.train.grad_accumulation = accumulation
  return config


def _with_policy(run: runs.Run, policy: str, accumulation: int) -> runs.Run:
  """Returns the run with another remat policy and accumulation."""
  model = dataclasses.replace(run.model, remat=policy)
  return dataclasses.replace(
      run, config=with_policy(run.config, policy, accumulation), model=model,
      module=run.module.clone(config=model))


def _estimate_plan(run: runs.Run, topology: chips.Topology,
                   kept: tuple[int, int]) -> dict:
  """Returns one plan without compiling it: its flags, its peak memory, and the
  shortest time that its step can take.

  Args:
    run: the run with the plan's mesh, remat policy and accumulation.
    topology: the devices.
    kept: what memory.bytes_kept_for_backward returns for its remat policy.
  """
  model = run.model
  accumulation = run.config.train.grad_accumulation

  # The FLOPs of a device. Where the backward pass computes the layers again, a
  # step has four forward passes in place of three.
  needed = sum(programs.model_flops(run, 'train').values()) / topology.devices
  computed = needed
  if layers.remat_of_model(model).recomputes_products:
    computed = needed * 4 / 3

  # The bounds, and the peak of its memory.
  sent = predict.predict_collectives(
      run, programs.host_of_devices(run, topology))
  inside, outside = collectives.bytes_sent(sent)
  bounds = predict.step_times(
      topology, dtype=model.dtype, flops=computed,
      hbm_bytes=predict.memory_traffic(run, 0.0, True), sent=inside,
      sent_outside=outside, model_flops=needed)
  estimate = memory.estimate_peak_bytes(run, kept, topology.chip.platform)

  axes = [f'{axis}={n}' for axis, n in run.mesh.shape.items() if n > 1]
  mesh = ','.join(axes) or 'data=1'
  return dict(
      mesh=dict(run.mesh.shape), remat=model.remat,
      grad_accumulation=accumulation,
      **{name: bounds[name] for name in KEYS_OF_BOUNDS},
      peak_bytes=estimate['peak'],
      flags=f'--mesh {mesh} --config.model.remat={model.remat} '
      f'--config.train.grad_accumulation={accumulation}', estimate=True)


def search_plans(config: ml_collections.ConfigDict, topology: chips.Topology,
                 wanted: int) -> dict:
  """Returns the best plans of a run that fit its devices, compiled where there
  is a compiler.

  Args:
    config: the config of the run, checked.
    topology: the devices.
    wanted: how many plans to return.

  Returns:
    topology: its name. candidates: how many plans fit by the estimate. plans:
    the best ones. refused: those that the compiler found too large.

  Raises:
    DoesNotFit: where no candidate does.
  """
  # Estimates may be too low, so some plans are refused. Compiling takes long:
  # no more than four candidates are tried for each plan wanted.
  listed = plans_by_estimate(config, topology)
  plans, refused = [], []
  for plan in listed[:4 * wanted]:
    if len(plans) == wanted:
      break
    try:
      plans.append(_compile_plan(config, topology, plan))
    except programs.DoesNotFit as error:
      refused.append(plan | dict(reason=str(error)))
  if not plans:
    last = ''
    if refused:
      last = f'. The last: {refused[-1]["reason"]}'
    raise programs.DoesNotFit(
        f'{len(listed)} plans (meshes, remat policies and accumulations) of '
        f'{topology.name} fit data.batch_size {config.data.batch_size} by an '
        f'estimate, and the compiler refused the best {len(refused)}: take '
        f'more chips, or a batch with more divisors{last}')
  # The compiler's figures may change the order of the estimates.
  plans.sort(key=lambda plan: plan['step_seconds'])
  return dict(topology=topology.name, candidates=len(listed), refused=refused,
              plans=plans)


def _compile_plan(config: ml_collections.ConfigDict, topology: chips.Topology,
                  plan: dict) -> dict:
  """Compiles the training step of a plan, and returns the plan with the
  compiler's figures; or as it is where there is no compiler.

  Args:
    config: the config of the run.
    topology: the devices.
    plan: a dict of `plans_by_estimate`.

  Returns:
    The plan with new `peak_bytes`, KEYS_OF_BOUNDS and `estimate` False.

  Raises:
    DoesNotFit: where the compiler refuses it.
  """
  if not chips.installed_compiler(topology):
    return plan
  mesh = ','.join(f'{axis}={n}' for axis, n in plan['mesh'].items())
  config = with_policy(config, plan['remat'], plan['grad_accumulation'])
  run = programs.run_on(config, topology, mesh)
  report = programs.analyse_program(run, topology, 'train')
  bounds = {name: report['roofline'][name] for name in KEYS_OF_BOUNDS}
  return plan | bounds | dict(
      estimate=False, peak_bytes=report['memory']['peak'])


def plans_as_text(plans: dict) -> str:
  """Returns the plans as a table."""
  lines = [f'{plans["topology"]}: {plans["candidates"]} plans fit by an '
           'estimate; best first, by the shortest step that published figures '
           'allow (~: not compiled)']
  for plan in plans['plans']:
    mark = '~' if plan['estimate'] else ''
    lines.append(
        f'  {mark}{plan["step_seconds"]:.3g} s a step, highest MFU {mark}'
        f'{plan["highest_mfu"]:.1%}, bound by {plan["bound"]}, {mark}'
        f'{plan["peak_bytes"] / chips.GIB:.1f} GiB  {plan["flags"]}')
  for plan in plans['refused']:
    lines.append(f'  refused: {plan["flags"]}: {plan["reason"]}')
  return '\n'.join(lines)
