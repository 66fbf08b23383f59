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
# The most candidates that are compiled for each plan that is asked for.
MOST_COMPILED_PER_PLAN = 4
# A batch is cut into 2**11 = 2,048 parts at most.
MOST_HALVINGS_OF_BATCH = 11


def possible_meshes(config: ml_collections.ConfigDict, model: ModelConfig,
                    topology: chips.Topology) -> Iterator[dict[str, int]]:
  """Yields every mesh that the model and the batch allow.

  The `tensor` axis has 16 devices at most, which the fast network of a slice or
  host joins, because it communicates in every layer.

  Args:
    config: the config of the run.
    model: the model of the run, resolved.
    topology: the devices.

  Yields:
    The number of devices of each mesh axis, by its name.
  """
  # The product of all axes is the number of devices. Choose three of them among
  # its divisors, and let `data` take the devices that are left.
  count = topology.devices
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  most_tensor = min(16, topology.devices_in_fast_network)
  for expert, tensor, fsdp in itertools.product(divisors, repeat=3):
    model_parallel = expert * tensor * fsdp
    if tensor > most_tensor or count % model_parallel:
      continue
    data = count // model_parallel

    # Only data parallelism crosses the slow network between slices. So each
    # slice has as many devices along `data` as every other.
    if topology.slices > 1 and data % topology.slices:
      continue

    # A mesh that does not divide the model or the batch is no candidate.
    shape = dict(data=data, fsdp=fsdp, expert=expert, context=1, tensor=tensor)
    try:
      runs.check_mesh(config, model, shape)
    except RequestError:
      continue
    yield shape


def plans_by_estimate(config: ml_collections.ConfigDict,
                      topology: chips.Topology) -> list[dict]:
  """Returns every plan that fits by an estimate, the one with the shortest step
  first.

  A plan is a mesh, a remat policy, and the number of parts into which a batch
  is cut to accumulate gradients.

  Args:
    config: the config of the run, checked. Its mesh, model.remat and
      train.grad_accumulation are replaced.
    topology: the devices.

  Returns:
    The plans, as dicts: see _estimate_plan.
  """
  model, _ = runs.resolve_model(config, tokenizers.load(config.data.tokenizer))
  # Plans are ordered by time, which needs the published peak of the devices.
  predict.require_peak_flops(topology, model.dtype)
  # Estimates start from a batch that is not cut into parts.
  config = config.copy_and_resolve_references()
  config.train.grad_accumulation = 1
  described = chips.described_devices(topology)

  # Estimate the plans of each mesh. Activations come on top of the state, so a
  # mesh on which the state alone is too large has no plan.
  plans: list[dict] = []
  activations: dict[str, tuple[int, int]] = {}  # by remat policy
  shapes = list(possible_meshes(config, model, topology))
  for shape in progress.show_items(shapes, 'meshes estimated'):
    mesh = devices.make_mesh(shape, described, slices=topology.slices)
    run = runs.build(config, model, mesh)
    if sum(memory.state_bytes(run).values()) <= topology.chip.hbm:
      plans += _plans_of_mesh(run, topology, activations)
  plans.sort(key=lambda plan: (plan['step_seconds'], plan['peak_bytes']))
  return plans


def _plans_of_mesh(run: runs.Run, topology: chips.Topology,
                   activations: dict[str, tuple[int, int]]) -> list[dict]:
  """Returns the plans of one mesh whose estimated memory fits the devices: for
  each remat policy, the one that cuts a batch into the fewest parts, if any
  fits. More parts would only gather the weights more often.

  Args:
    run: the run on that mesh.
    topology: the devices.
    activations: for each remat policy, by its name, the bytes on devices and in
      the memory of hosts that memory.bytes_kept_for_backward returns. They are
      the same on each mesh: a missing policy is traced and added here, so that
      the next mesh finds it.

  Returns:
    The plans, as `_estimate_plan` returns them.
  """
  accumulations = _possible_accumulations(run)
  plans = []
  fewest_parts = math.inf  # of this mesh's plans so far
  for name, policy in layers.REMAT.items():
    if name not in activations:
      plain_run = _run_with_policy(run, policy=name, accumulation=1)
      activations[name] = memory.bytes_kept_for_backward(plain_run)
    for num_parts in accumulations:
      # The estimated time does not include sending activations to the host. So
      # a policy that does so is a plan only if it needs fewer parts than the
      # policies before it.
      if policy.keeps_input_on_host and num_parts >= fewest_parts:
        break
      candidate = _run_with_policy(run, policy=name, accumulation=num_parts)
      plan = _estimate_plan(candidate, topology, kept=activations[name])
      if plan['peak_bytes'] < topology.chip.hbm:
        plans.append(plan)
        fewest_parts = min(fewest_parts, num_parts)
        break
  return plans


def _possible_accumulations(run: runs.Run) -> Sequence[int]:
  """Returns the possible values of train.grad_accumulation, the smallest first:
  the numbers of parts into which a step may cut its batch.

  They are powers of two that divide the rows of a device in every batch of the
  run. A run whose batch size grows has batches of several sizes.

  Args:
    run: the run, on its mesh.
  """
  config = run.config
  mesh = run.mesh.shape
  batch_sizes = (*pipeline.read_ramp(config).sizes, config.data.batch_size)
  # The rows of a batch are split over these axes of the mesh.
  shards_of_batch = mesh['data'] * mesh['fsdp'] * mesh['expert']
  accumulations = []
  for power in range(MOST_HALVINGS_OF_BATCH + 1):
    num_parts = 2 ** power
    divisor = shards_of_batch * num_parts
    if all(batch_size % divisor == 0 for batch_size in batch_sizes):
      accumulations.append(num_parts)
  return accumulations


def change_policy(config: ml_collections.ConfigDict, policy: str,
                  accumulation: int) -> ml_collections.ConfigDict:
  """Returns a copy of a config with another remat policy and accumulation."""
  config = config.copy_and_resolve_references()
  config.model.remat = policy
  config.train.grad_accumulation = accumulation
  return config


def _run_with_policy(run: runs.Run, policy: str, accumulation: int) -> runs.Run:
  """Returns the run with another remat policy and accumulation."""
  model = dataclasses.replace(run.model, remat=policy)
  return dataclasses.replace(
      run, config=change_policy(run.config, policy, accumulation), model=model,
      module=run.module.clone(config=model))


def _estimate_plan(run: runs.Run, topology: chips.Topology,
                   kept: tuple[int, int]) -> dict:
  """Estimates one plan without compiling it.

  Args:
    run: the run with the plan's mesh, remat policy and accumulation.
    topology: the devices.
    kept: the bytes that memory.bytes_kept_for_backward returns for its remat
      policy.

  Returns:
    The plan, a dict for JSON with its mesh, remat policy and accumulation, the
    shortest time that its step can take (KEYS_OF_BOUNDS), its peak memory, and
    its flags of the command line.
  """
  model = run.model
  accumulation = run.config.train.grad_accumulation

  # Count the FLOPs of a device. A backward pass costs two forward passes, so a
  # step costs three of them, or four if the backward pass recomputes the
  # layers.
  flops_of_parts = programs.model_flops(run, 'train')
  needed_flops = sum(flops_of_parts.values()) / topology.devices
  computed_flops = needed_flops
  if layers.remat_of_model(model).recomputes_products:
    computed_flops = needed_flops * 4 / 3

  # Estimate the least time of a step, and the peak of its memory.
  sent = predict.predict_collectives(
      run, programs.host_of_devices(run, topology))
  inside, outside = collectives.bytes_sent(sent)
  # The products are not traced, so their bytes are not known: those of the
  # weights and of the state remain as the bound of memory.
  hbm_bytes = predict.memory_traffic(run, products=0.0, training=True)
  bounds = predict.step_times(
      topology, dtype=model.dtype, flops=computed_flops, hbm_bytes=hbm_bytes,
      sent=inside, sent_outside=outside, model_flops=needed_flops)
  estimate = memory.estimate_peak_bytes(
      run, bytes_in_all=kept, platform=topology.chip.platform)

  # The flags name the mesh axes with several devices.
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
  """Returns the best plans of a run that fit its devices. A plan is a mesh, a
  remat policy, and the number of parts into which a batch is cut to accumulate
  gradients. Its figures are those of the compiled program, if a compiler for
  the devices is installed, and estimates otherwise.

  Args:
    config: the config of the run, checked.
    topology: the devices.
    wanted: how many plans to return.

  Returns:
    A dict for JSON: `topology`, its name; `candidates`, the number of plans
    that fit by the estimate; `plans`, the best ones; and `refused`, those that
    the compiler found too large.

  Raises:
    DoesNotFit: if no candidate fits.
  """
  # Compile the best candidates until enough of them fit. An estimate of the
  # memory may be too low, so some do not. Compiling takes long, which is why
  # the search gives up after a few.
  candidates = plans_by_estimate(config, topology)
  plans, refused = [], []
  for plan in candidates[:MOST_COMPILED_PER_PLAN * wanted]:
    if len(plans) == wanted:
      break
    try:
      plans.append(_compile_plan(config, topology, plan))
    except programs.DoesNotFit as error:
      refused.append(plan | dict(reason=str(error)))

  # If none fits, fail, and say why the last one was refused.
  if not plans:
    last_reason = ''
    if refused:
      last_reason = f'. The last: {refused[-1]["reason"]}'
    raise programs.DoesNotFit(
        f'{len(candidates)} plans (meshes, remat policies and accumulations) '
        f'of {topology.name} fit data.batch_size {config.data.batch_size} by '
        f'an estimate, and the compiler refused the best {len(refused)}: take '
        f'more chips, or a batch with more divisors{last_reason}')

  # The compiler's figures may change the order of the estimates.
  plans.sort(key=lambda plan: plan['step_seconds'])
  return dict(topology=topology.name, candidates=len(candidates),
              refused=refused, plans=plans)


def _compile_plan(config: ml_collections.ConfigDict, topology: chips.Topology,
                  plan: dict) -> dict:
  """Compiles the training step of a plan, and puts the compiler's figures in
  place of the estimates. Without a compiler, the plan stays as it is.

  Args:
    config: the config of the run.
    topology: the devices.
    plan: a plan, as `plans_by_estimate` returns it.

  Returns:
    The plan with new `peak_bytes` and KEYS_OF_BOUNDS, and `estimate` False.

  Raises:
    DoesNotFit: if the compiler finds it too large.
  """
  if not chips.installed_compiler(topology):
    return plan
  mesh = ','.join(f'{axis}={n}' for axis, n in plan['mesh'].items())
  config = change_policy(
      config, policy=plan['remat'], accumulation=plan['grad_accumulation'])
  run = programs.run_on_topology(config, topology, mesh=mesh)
  report = programs.analyse_program(run, topology, name='train')
  bounds = {name: report['roofline'][name] for name in KEYS_OF_BOUNDS}
  return plan | bounds | dict(
      estimate=False, peak_bytes=report['memory']['peak'])


def plans_as_text(plans: dict) -> str:
  """Returns the plans of a search as a table for a terminal.

  Args:
    plans: the result of `search_plans`.
  """
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
