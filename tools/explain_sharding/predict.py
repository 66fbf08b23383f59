"""The collectives that the rules lead to, before anything is compiled.

A weight whose dimension is sharded over mesh axes of the batch is gathered over
them before use, one axis after another, and its gradient is scattered over
them; over the batch's other axes the gradient is summed. A product over a
dimension that is sharded over `tensor` is summed over it. Tokens cross `expert`
and come back.

Some things are left out: the sums over a vocabulary that is sharded over
`tensor` (of embeddings, of the loss, and of the last hidden state's gradient,
once a micro-batch each), and the gates that cross with their rows. An embedding
is counted as if it were gathered, although its tokens cross instead: if there
are few tokens, less is sent than is said here. XLA may choose otherwise: python
-m tools.plan says what it chose.
"""

import math

from architectures.parts import remat
from architectures.parts.moe import dispatch
from architectures.parts.moe import routing
from architectures.parts.moe.layer import routing_groups
from configs import sharding as tables
import jax.numpy as jnp
from training import objectives
from training.distributed import devices


def collectives(run, parameters: list[dict]) -> list[dict]:
  """Returns rows of kind, mesh axes, why, times a step, and bytes that a
  device sends in it.

  Args:
    run: a runs.Run.
    parameters: rows of rules.row.
  """
  mesh = {k: n for k, n in run.mesh.shape.items() if n > 1}
  table = dict(tables.RULES[run.config.mesh.rules])
  batch = [axis for axis in table['tokens'] if axis in mesh]
  rows = []
  for one in parameters:
    rows += _of_weight(run, one, batch, mesh)
  rows += _of_activations(run, parameters, mesh)
  return _sum(rows)


def _of_weight(run, one: dict, batch: list, mesh: dict) -> list[dict]:
  """A parameter's gathers and its gradient's reductions."""
  own = [axis for d in one['dimensions'] for axis in d['mesh']]
  times = run.config.train.grad_accumulation
  # It is cast before it is sent.
  width = (run.model.compute_dtype.itemsize
           / jnp.dtype(run.model.param_dtype).itemsize)
  rows, held = [], one['bytes_per_device']
  for axis in reversed(own):
    n = mesh[axis]
    if axis in batch and not _stays(one, axis):
      sent = held * (n - 1) * width
      held *= n
      passes = times * remat.gathers(run.model, one['name'], one['axes'])
      rows.append(_row('all-gather', [axis], 'weights before use', passes,
                       sent * passes))
      rows.append(_row('reduce-scatter', [axis], 'gradients of weights',
                       times, sent * times))
  rest = [axis for axis in batch if axis not in own]
  if rest:
    n = math.prod(mesh[axis] for axis in rest)
    sent = 2 * one['bytes_per_device'] * (n - 1) / n * width
    rows.append(_row('all-reduce', rest, 'gradients of weights', times,
                     sent * times))
  return rows


def _stays(one: dict, axis: str) -> bool:
  """Experts stay where they are: tokens come to them."""
  return any(d['axis'] == 'experts' and axis in d['mesh']
             for d in one['dimensions'])


def _of_activations(run, parameters, mesh) -> list[dict]:
  """Sums over `tensor`, and the crossings of tokens."""
  c, config = run.model, run.config
  longest = max(objectives.of(config).row_lengths(config))
  micro = config.train.grad_accumulation
  passes = 2 + remat.of(c).again
  tokens = config.data.batch_size * longest // micro // devices.shards(
      'tokens', run.mesh.shape, config.mesh.rules)
  one = tokens * c.d_model * jnp.dtype(c.dtype).itemsize
  rows = []
  for row in parameters:
    dims = row['dimensions']
    layers = math.prod(d['size'] for d in dims if d['axis'] == 'layers')
    if 'layers' not in row['axes']:
      continue
    summed = [d for d in dims if d['axis'] in ('heads', 'mlp')
              and 'tensor' in d['mesh']]
    if summed and row['axes'][-1] == 'embed' and len(dims) > 2:
      # Forward, backward of what went in, and again where it is remade.
      runs = layers * passes * micro
      n = mesh['tensor']
      sent = one * (n - 1) / n * runs
      if longest % (n * mesh.get('context', 1)):
        rows.append(_row('all-reduce', ['tensor'], 'products summed over heads '
                         'or mlp', runs, 2 * sent))
      else:  # between the products, they lie over tensor
        rows += [_row('reduce-scatter', ['tensor'], 'products summed over '
                      'heads or mlp', runs, sent),
                 _row('all-gather', ['tensor'], 'what layers read', runs, sent)]
    if 'context' in mesh and row['name'].endswith(
        ('/attention/key', '/attention/value', '/attention/kv_down')):
      runs = layers * passes * micro
      width = math.prod(d['size'] // math.prod(mesh[a] for a in d['mesh'])
                        for d in dims
                        if d['axis'] in ('kv_heads', 'head', 'latent'))
      rows.append(_row(
          'all-gather', ['context'], 'keys and values, and their gradients',
          runs, tokens * width * jnp.dtype(c.dtype).itemsize * runs
          * (mesh['context'] - 1)))
    if 'expert' in mesh and row['name'].endswith('/ffn/down') and any(
        d['axis'] == 'experts' for d in dims):
      crossing, dropless = _rows_a_token(run, tokens)
      # 'dots' computes experts again, too: see parts/moe/dispatch.py.
      again = 0 if c.remat == 'none' else 1 if dropless else 2
      runs = layers * (4 + again) * micro
      n = mesh['expert']
      rows.append(_row(
          'all-to-all', ['expert'], 'tokens to their experts and back', runs,
          one * crossing * (n - 1) / n * runs))
  return rows


def _rows_a_token(run, tokens: int) -> tuple[float, bool]:
  """Returns how many rows cross for each of a device's `tokens`, in even load,
  and whether they are dropless, without padding."""
  m = run.model.moe
  shards = devices.shards('tokens', run.mesh.shape, run.config.mesh.rules)
  groups = routing_groups(m.group_size, tokens * shards)
  laid_out = m.capacity_factor, tokens * shards, groups, shards
  if routing.of(m).experts_choose:
    return m.top_k * (m.capacity_factor or 1.0), False
  if dispatch.way(m, *laid_out) == 'dropless':
    return m.top_k, True
  return m.num_experts * dispatch.slots(m, *laid_out) / tokens, False


def _row(kind, axes, why, times, sent) -> dict:
  return dict(kind=kind, axes=list(axes), why=why, runs_per_step=times,
              bytes_sent_per_device=sent)


def _sum(rows: list[dict]) -> list[dict]:
  total: dict = {}
  for row in rows:
    key = row['kind'], tuple(row['axes']), row['why']
    into = total.setdefault(key, row | dict(runs_per_step=0,
                                            bytes_sent_per_device=0.0))
    for name in ('runs_per_step', 'bytes_sent_per_device'):
      into[name] += row[name]
  return sorted(total.values(), key=lambda r: -r['bytes_sent_per_device'])
