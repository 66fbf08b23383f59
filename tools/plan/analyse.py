"""From a config and a topology to a report: a dict that JSON can hold."""

import importlib.metadata
import math
import time

import numpy as np

from configs.errors import require
from tools.plan import cache, chips, collectives, compile as compiling
from tools.plan import roofline, topology as topologies
from training import objectives, preflight, runs
from training.costs import totals, flops, memory
from training.costs import traced
from training.data import tokenizers
from training.distributed import devices

GIB = chips.GIB


def run_on(config, topology: chips.Topology, mesh: str) -> runs.Run:
  """Returns the run on the topology's devices; nothing is computed.

  Args:
    config: of the run; its mesh is replaced by `mesh`, where that is given.
    topology: whose devices.
    mesh: as devices.parse_mesh reads it; '': config.mesh.

  Raises:
    ValueError: for anything that the run could not honour.
  """
  preflight.check_config(config)
  shape = (devices.parse_mesh(mesh, topology.devices) if mesh else
           devices.mesh_shape(config.mesh, topology.devices))
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  roofline.peak_flops(topology, model.dtype)  # or there is no bound to print
  require(config.mesh.slices in (0, topology.slices), 'mesh.slices is '
          f'{config.mesh.slices}, but --slices is {topology.slices}: leave '
          'the first at 0')
  placed = devices.make_mesh(shape, topologies.devices(topology),
                             topology.slices)
  return runs.build(config, model, placed)


def describe(run: runs.Run, topology: chips.Topology) -> dict:
  """Returns what the plan is of."""
  c, config = run.model, run.config
  compiler = topologies.compiler(topology)
  rows = devices.shards('batch', run.mesh.shape, config.mesh.rules)
  return dict(
      model=c.arch, topology=topology.name, slices=topology.slices,
      chips=topology.chips, devices=topology.devices,
      mesh=dict(run.mesh.shape), rules=config.mesh.rules,
      compiler=compiler or 'virtual CPU devices', estimate=not compiler,
      jax=importlib.metadata.version('jax'), batch_size=config.data.batch_size,
      length=config.data.length, sequences_per_device=(
          config.data.batch_size / rows / config.train.grad_accumulation),
      grad_accumulation=config.train.grad_accumulation, remat=c.remat,
      keep_gathered=c.keep_gathered, optimizer=config.optim.name)


def check_state(run: runs.Run, topology: chips.Topology, name: str
                ) -> dict[str, int]:
  """Returns the bytes of a device's state that a program is given: a
  generation has no optimiser.

  Raises:
    DoesNotFit: where they alone are more than a device has.
  """
  state = memory.state(run)
  if name != 'train':
    state = {'parameters': state['parameters']}
  total = sum(state.values())
  if total > topology.chip.hbm:
    parts = ', '.join(f'{name} {n / GIB:,.1f} GiB' for name, n in state.items())
    raise compiling.DoesNotFit(
        f'the state does not fit a device of {topology.name}: {parts}, and a '
        f'device has {topology.chip.hbm / GIB:,.2f} GiB. Shard it over more '
        'devices (mesh.fsdp, mesh.expert, mesh.tensor), or take more of them')
  return state


def analyse(run: runs.Run, topology: chips.Topology, name: str,
            fresh: bool = False) -> dict:
  """Returns the report of one program.

  Args:
    run: on the topology's devices.
    topology: these.
    name: of compile.PROGRAMS.
    fresh: compile even where a report of the same content is kept.

  Raises:
    DoesNotFit: with figures, where a device has too little memory.
  """
  state = check_state(run, topology, name)
  what = compiling.program(run, name)
  jaxpr, lowered = compiling.lower(run, what)
  key = cache.key(lowered.as_text(), describe(run, topology))
  kept = None if fresh else cache.load_report(key)
  if kept:
    if 'refused' in kept:
      raise compiling.DoesNotFit(kept['refused'])
    return kept
  try:
    report = _compiled(run, topology, what, jaxpr, lowered, state)
  except compiling.DoesNotFit as error:
    cache.save_report(key, {'refused': str(error)})
    raise
  cache.save_report(key, report)
  return report


def programs(run: runs.Run, topology: chips.Topology, names: list[str],
             fresh: bool = False) -> dict:
  """Returns the reports of those that fit, whether all do, and why not.

  Raises:
    RequestError: for a program that the run's model does not have, before any
      is compiled.
  """
  for name in names:
    compiling.check(run, name)
  reports, reasons = [], []
  for name in names:
    try:
      reports.append(analyse(run, topology, name, fresh))
    except compiling.DoesNotFit as error:
      reasons.append(str(error))
  return dict(programs=reports, fits=not reasons,
              reasons=list(dict.fromkeys(reasons)))


def _compiled(run, topology, what, jaxpr, lowered, state) -> dict:
  estimate = not topologies.compiler(topology)
  begun = time.monotonic()
  built = compiling.build(run, what, jaxpr, lowered,
                          math.inf if estimate else topology.chip.hbm)
  stats = built.executable.memory_analysis()
  sizes = dict(hbm=int(topology.chip.hbm), **state,
               arguments=stats.argument_size_in_bytes,
               temporaries=stats.temp_size_in_bytes,
               peak=compiling.peak_bytes(stats))
  if stats.host_temp_size_in_bytes:
    sizes['host_memory'] = stats.host_temp_size_in_bytes
  if estimate and what.name == 'train':
    sizes |= memory.analytic(run, platform=topology.chip.platform)
    del sizes['temporaries']
  if estimate and sizes['peak'] > topology.chip.hbm:
    raise compiling.DoesNotFit(
        f'by an estimate, {what.name} does not fit a device: it needs about '
        f'{sizes["peak"] / GIB:,.1f} GiB, and a device has '
        f'{topology.chip.hbm / GIB:,.2f} GiB')
  # Generation ends early where all rows have drawn a stop token: here none do.
  rows, passes = ragged_rows(run, what.name), what.passes
  found = collectives.read(
      built.executable.as_text(), run.mesh.shape,
      host_of=hosts(run, topology), ragged_rows=rows, passes=passes)
  total = work(run, topology, what, jaxpr)
  return dict(
      program=what.name, estimate=estimate, fits=True,
      compile_seconds=round(time.monotonic() - begun, 1), memory=sizes,
      replicated=memory.replicated(run),
      collectives=collectives.table(found),
      **_performance(run, topology, what.name, total, found))


def work(run: runs.Run, topology: chips.Topology, what: compiling.Program,
         jaxpr) -> traced.Work:
  """Returns the work of a program, experts in even load."""
  data, rows = run.config.data, ragged_rows(run, what.name)
  if what.name == 'decode':  # reads the prompt, then a token of each row
    rows = roofline.expert_rows(run, data.batch_size * (
        data.length - compiling.DRAWN['decode']))
  return traced.count(jaxpr, traced.Place(
      topology.chip.platform, rows, what.passes, topologies.dense(topology),
      loop_rows=roofline.expert_rows(run, data.batch_size)))


def _performance(run, topology, name, total, found) -> dict:
  """FLOPs and the roofline."""
  count, dtype = topology.devices, run.model.dtype
  needed = model_flops(run, name)
  sent = sum(c.sent * c.runs for c in found)
  outside = sum(c.sent_outside * c.runs for c in found)
  bounds = roofline.times(
      topology, dtype, flops=total.flops / count,
      hbm_bytes=roofline.hbm_bytes(run, total.nbytes, name == 'train'),
      sent=sent - outside, sent_outside=outside,
      model_flops=sum(needed.values()) / count)
  read, held = (roofline.experts(run, run.config.data.batch_size)
                if name == 'decode' and run.model.has_experts
                and not total.dense else (0, 0))
  return dict(
      experts=dict(read=read, held=held), flops=dict(
          per_device=total.flops / count,
          model_per_device=sum(needed.values()) / count,
          weights_per_device=needed['weights'] / count,
          attention_per_device=needed['attention'] / count,
          ratio=total.flops / sum(needed.values()),
          loops_counted_once=total.loops,
          all_groups_per_device=total.dense / count),
      roofline=bounds)


def model_flops(run: runs.Run, name: str) -> dict[str, float]:
  """Returns what the model needs for a step, of all devices: `weights`, which
  is 6 N_active T in training, N_active the weights that a token is multiplied
  with, less the gradients of what is frozen, and `attention`, as the mask has
  it."""
  config, c = run.config, run.model
  objective, rows = objectives.of(config), config.data.batch_size
  sides = objective.row_lengths(config)
  if name == 'train':
    unread = objective.unread(config, sides[0])
    return {part: rows * n for part, n in flops.training_flops(
        c, *sides, unread=unread, freeze=config.optim.freeze,
        prefix=objective.prefix).items()}
  # The prompt and, one at a time, all tokens after it but the last, which is
  # not read: in the sum, a forward pass over them.
  needed = flops.forward_flops(c, sides[0] - 1)
  prompt = sides[0] - compiling.DRAWN[name]
  if objective.prefix:  # and in the prompt, later tokens are seen too
    both, one = (flops.forward_flops(c, prompt, prompt=way)['attention']
                 for way in (True, False))
    needed['attention'] += both - one
  # The head reads those that a token is drawn after.
  needed['weights'] -= (prompt - 1) * 2 * c.d_model * c.vocab_size
  return {part: rows * n for part, n in needed.items()}


def ragged_rows(run: runs.Run, name: str) -> int:
  """Rows that a device sends to experts in a layer, in even load."""
  if not run.model.has_experts or name == 'decode':
    return 0
  parts = run.config.train.grad_accumulation if name == 'train' else 1
  lengths = objectives.of(run.config).row_lengths(run.config)
  tokens = run.config.data.batch_size * max(lengths)
  return roofline.expert_rows(run, tokens / parts)


def hosts(run: runs.Run, topology: chips.Topology) -> np.ndarray:
  """Returns the slice (TPU) or host (GPU) of each device, in mesh order."""
  placed = run.mesh.devices.reshape(-1)
  if topology.slices > 1:  # `data` goes over the slices, and comes first
    return np.arange(placed.size, dtype=np.int64) // topology.together
  order = {id_: i for i, id_ in enumerate(sorted(d.id for d in placed))}
  return np.array([order[d.id] // topology.together for d in placed], np.int64)


def active_parameters(run: runs.Run) -> dict:
  """Returns parameters in all, and those at work for one token."""
  figures = totals.count(run.config, model=run.model)
  return {name: figures[name] for name in ('parameters', 'active_parameters')}
