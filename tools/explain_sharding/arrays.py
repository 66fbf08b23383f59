"""The parameters of a run, and the activations that its code constrains."""

import re

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from architectures.parts import sharding
from tools.explain_sharding import rules
from training import objectives, paths
from training.step import abstract_params

_SCOPE = re.compile(rf'{sharding.AXES}\(([^()]*)\)')


def parameters(run) -> list[dict]:
  """Returns a row of rules.row for each parameter."""
  boxed = abstract_params(run.module)
  leaves = jax.tree_util.tree_flatten_with_path(
      boxed, is_leaf=lambda x: hasattr(x, 'names'))[0]
  found = []
  for path, box in leaves:
    names = box.names if hasattr(box, 'names') else ()
    value = box.value if hasattr(box, 'names') else box
    dims = rules.explain(value.shape, names, run.mesh.shape,
                         run.config.mesh.rules)
    found.append(rules.row(paths.join(path), dims,
                           jnp.dtype(value.dtype).itemsize, run.mesh.shape))
  return found


def activations(run) -> list[dict]:
  """Returns a row for each array that the forward pass constrains, and
  `times`: how often, with the layers that are alike counted."""
  objective = objectives.of(run.config)
  batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype)
           in objectives.shapes(run.config).items()}

  def loss(params, batch):
    rngs = {name: jax.random.key(0) for name in ('dropout', 'router')}
    output = objective.apply(run.module, params, batch, deterministic=False,
                             rngs=rngs)
    return objective.loss(output, batch, run.config)[0]

  with run.context():
    jaxpr = jax.make_jaxpr(loss)(run.abstract.params, batch)
  rows: dict = {}
  for name, aval, axes, times in _constraints(jaxpr.jaxpr, '', 1):
    dims = rules.explain(aval.shape, axes, run.mesh.shape,
                         run.config.mesh.rules)
    row = rules.row(name, dims, jnp.dtype(aval.dtype).itemsize,
                    run.mesh.shape)
    key = name, row['spec'], tuple(row['shape'])
    rows.setdefault(key, row | dict(times=0))['times'] += times
  return list(rows.values())


def _constraints(jaxpr, above: str, times: int):
  """Yields (place, aval, logical axes, times) of each named constraint."""
  for eqn in jaxpr.eqns:
    name = f'{above}/{eqn.source_info.name_stack}'
    scope = _SCOPE.search(name)
    if eqn.primitive.name == 'sharding_constraint' and scope:
      axes = [None if a == 'None' else a for a in scope[1].split(',') if a]
      yield _place(name), eqn.invars[0].aval, axes, times
    repeated = (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    for inner in jex.jaxprs_in_params(eqn.params):
      yield from _constraints(inner, name, times * repeated)


def _place(name: str) -> str:
  """The module's path: what jax and flax add to it is left out."""
  parts = [p for p in _SCOPE.sub('', name).split('/')
           if p and not re.fullmatch(
               r'(jit|jvp|closed_call|checkpoint|while|body|[A-Z]\w*).*', p)]
  tidy = [p.rpartition('.')[0] or p for p in parts]
  return '/'.join(p for i, p in enumerate(tidy)
                  if p not in tidy[:i]) or 'loss'
