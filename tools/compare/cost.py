"""What one point costs, and everything that a run would refuse in it, without
device work: the config is checked, the model built by eval_shape, the state
laid over a mesh that is only described."""

import dataclasses
import functools
import math

from configs.errors import require


@dataclasses.dataclass(frozen=True)
class Cost:
  """Figures of a config.

  Attributes:
    params: parameters.
    active_params: of these, the ones that work for one token.
    flops_per_token: of a training step: forward and backward.
    tokens: of the whole run.
    model: the model's fields, the open ones filled in, by dotted key.
  """
  params: int
  active_params: int
  flops_per_token: float
  tokens: int
  model: dict


def off_devices() -> None:
  """Keeps this process off the accelerators: its children need them."""
  import jax
  jax.config.update('jax_platforms', 'cpu')


def of(config) -> Cost:
  """Returns what a run of `config` costs; ValueError for a bad model."""
  from architectures.parts import tables
  from training import objectives
  from training.costs import flops
  from training.data import ramp
  from training.workdir import run_config
  model = _resolved(config)
  objective = objectives.of(config)
  lengths = objective.row_lengths(config)
  params, active = _parameters(model)
  return Cost(
      params, active, flops.training_flops_per_token(
          model, *lengths, unread=objective.unread(config, lengths[0]),
          freeze=config.optim.freeze, prefix=objective.prefix),
      int(ramp.of(config).before(config.train.steps)) * sum(lengths),
      run_config.flatten_dict({'model': tables.as_dict(model)}))


def figure(config, what: str) -> float:
  """Returns one figure of a Cost alone: parameters without a trace of what is
  computed with them."""
  if what in ('params', 'active_params'):
    return _parameters(_resolved(config))[what == 'active_params']
  return getattr(of(config), what)


def bytes_per_device(config, devices: int = 0) -> dict[str, int]:
  """Estimates the bytes on each device: parameters, gradients, optimiser, what
  the backward pass keeps, the largest layer, and the peak, their sum. `check
  --topology` compiles for the true one.

  Args:
    config: a run's.
    devices: to lay it over; 0: as few as config.mesh allows.

  Raises:
    ValueError: for whatever a run would refuse before it starts.
  """
  from configs import sharding as mesh_tables
  from training.distributed import devices as devices_lib
  from training import runs
  from training.costs import memory
  from training.data import sources
  runs.check_config(config)
  require(not config.eval.patience, f'eval.patience is {config.eval.patience}: '
          'the points of a sweep are compared after their last step, and none '
          'ends before it; leave it at 0')
  for source in filter(None, (config.data.source, config.data.eval_source)):
    sources.parse(source)
  least = math.prod(max(config.mesh[axis], 1) for axis in mesh_tables.MESH_AXES)
  shape = devices_lib.mesh_shape(config.mesh, devices or least)
  return memory.analytic(
      memory.described(config, _resolved(config), shape), _kept(config))


def _kept(config) -> int:
  """Bytes that a whole batch keeps for the backward pass, whatever the mesh:
  traced on one CPU device, once for points that differ in numbers alone."""
  from configs import sharding as mesh_tables
  from training import runs
  from training.costs import memory
  from training.workdir import run_config
  key = tuple((name, value) for name, value in run_config.flatten(
      config).items() if not name.startswith(
          ('optim.', 'mesh.', 'seed', 'init_seed')))
  if key not in _KEPT:
    import jax
    from training.distributed import devices
    alone = devices.make_mesh(dict.fromkeys(mesh_tables.MESH_AXES, 1),
                              jax.devices()[:1])
    _KEPT[key] = memory.kept(runs.build(
        config, memory.traceable(_resolved(config)), alone))
  return _KEPT[key]


_KEPT: dict[tuple, int] = {}


def _resolved(config):
  from training import runs
  model, _ = runs.resolve(config, _tokenizer(config.data.tokenizer))
  return model


@functools.cache
def _tokenizer(name: str):
  from training.data import tokenizers
  return tokenizers.load(name)


@functools.cache
def _parameters(model) -> tuple[int, int]:
  """Sweeps of the optimiser ask for the same model many times."""
  from training.costs import totals
  return totals.parameters(model)
