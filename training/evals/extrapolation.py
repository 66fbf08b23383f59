"""Loss by position at 1, 2, 4 and 8 times the training length.

Each position encoding goes past its training length in its own way:
sinusoidal, ALiBi, T5's relative bias and none as they are; RoPE as it is and
with each scaling, its factor the multiple of the length; learned positions
end at max_len, and are stretched only on request (--interpolate).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.config import ROPE_SCALINGS
from configs.errors import require
from training import data
from training import devices
from training import evals
from training import losses
from training import objectives
from training import progress

FILE = 'extrapolation.png'
MULTIPLES = (1, 2, 4, 8)
TOKENS = 2 ** 17  # at each length, at least
BUCKETS = 8  # of the positions of the longest, in the table


def check(options, config, workdir) -> None:
  require(config.objective == 'causal', f'objective {config.objective!r}: '
          'extrapolation is measured for next-token prediction')
  evals.needs_plot(workdir / FILE)


def run(evaluation) -> dict:
  """Prints the table; writes extrapolation.png into the workdir."""
  config = evaluation.run.config
  length = config.data.length
  curves = {}
  for multiple in MULTIPLES:
    batches = list(_batches(evaluation, length * multiple, multiple))
    for name, model in variants(evaluation.run.model, length, multiple,
                                evaluation.options.interpolate).items():
      curves.setdefault(name, {})[multiple] = None if model is None else (
          _by_position(evaluation, model, batches))
  print(table(curves, length))
  path = evaluation.workdir / FILE
  plot(curves, length, path)
  print(f'loss by position: {path}')
  return {'length': length, 'curves': {
      name: {str(m): None if c is None else c.tolist()
             for m, c in by.items()} for name, by in curves.items()}}


def variants(model, length: int, multiple: int, interpolate: bool) -> dict:
  """Returns {name: model config}, None where the model refuses the length."""
  if model.position == 'learned':
    if length * multiple <= model.max_len:
      return {'learned': model}
    stretch = length * multiple / model.max_len
    return {'learned': None} | ({'learned, interpolated': dataclasses.replace(
        model, learned_stretch=stretch)} if interpolate else {})
  if model.position != 'rope':
    return {model.position: model}
  result = {'rope' + ('' if model.rope.scaling == 'none'
                      else f', {model.rope.scaling}'): model}
  if model.rope.scaling == 'none':
    for scaling in ROPE_SCALINGS:
      if scaling != 'none':
        result[f'rope, {scaling}'] = dataclasses.replace(
            model, rope=dataclasses.replace(
                model.rope, scaling=scaling, factor=float(multiple),
                original_len=length)) if multiple > 1 else model
  return result


def _batches(evaluation, length: int, multiple: int):
  """The same held-out text at each length, in as many tokens a batch as the
  mesh allows."""
  config = evaluation.run.config.copy_and_resolve_references()
  shards = math.prod(evaluation.run.mesh.shape.values())
  rows = max(config.data.batch_size // multiple // shards, 1) * shards
  config.data.update(length=length, batch_size=rows)
  index, count = devices.batch_shard(evaluation.run.place, rows)
  loader = data.load(config, evaluation.tokenizer, 'eval', index, count)
  batches = -(-TOKENS // (rows * length))
  return loader.iterate(0, min(batches, loader.num_batches))


def _by_position(evaluation, model, batches) -> np.ndarray:
  """Mean loss at each position, [L], in nats."""
  module = architectures.build(model)
  objective = objectives.OBJECTIVES['causal']

  @jax.jit
  def step(params, batch):
    output = objective.apply(module, params, batch)
    loss_BL = losses.token_losses(output.hidden, output.head,
                                  batch['targets']).loss
    weights_BL = batch['weights']
    return jnp.sum(loss_BL * weights_BL, 0), weights_BL.sum(0)

  total = None
  rows = f'evaluating rows of {batches[0]["tokens"].shape[1]:,} tokens'
  for batch in progress.each(batches, rows):
    sums = jax.device_get(step(evaluation.params, devices.put(
        batch, evaluation.run.place)))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  return total[0] / np.maximum(total[1], 1e-9)


def table(curves: dict, length: int) -> str:
  """Mean loss at each length, then by position at the longest."""
  longest = max(MULTIPLES)
  edges = [length * longest * i // BUCKETS for i in range(BUCKETS + 1)]
  lines = ['loss in nats per token at multiples of the training length '
           f'{length}',
           f'{"":<24}' + ''.join(f'{f"{m}x":>9}' for m in MULTIPLES)]
  for name, by in curves.items():
    lines.append(f'{name:<24}' + ''.join(
        f'{_mean(by.get(m)):>9}' for m in MULTIPLES))
  lines += [f'by position at {longest}x, up to position',
            f'{"":<24}' + ''.join(f'{e:>9,}' for e in edges[1:])]
  for name, by in curves.items():
    curve = by.get(longest)
    lines.append(f'{name:<24}' + ''.join(
        f'{_mean(None if curve is None else curve[a:b]):>9}'
        for a, b in zip(edges, edges[1:])))
  return '\n'.join(lines)


def _mean(curve) -> str:
  return 'refused' if curve is None else f'{np.mean(curve):.3f}'


def plot(curves: dict, length: int, path) -> None:
  """Draws the loss by position at the longest length that each one takes."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
  for name, by in curves.items():
    taken = {m: c for m, c in by.items() if c is not None}
    if not taken:
      continue
    curve = taken[max(taken)]
    edges = np.unique(np.geomspace(1, len(curve), 25).astype(int))
    axes.plot(np.sqrt(edges[:-1] * edges[1:]),  # the middle of each bin
              [curve[a:b].mean() for a, b in zip(edges, edges[1:])],
              label=name)
  axes.axvline(length, color='grey', linestyle='--', linewidth=1)
  axes.annotate('training length', (length, 1), xycoords=('data',
                'axes fraction'), xytext=(-4, -12), textcoords='offset points',
                ha='right', color='grey')
  axes.set(xlabel='position in tokens', ylabel='loss in nats per token',
           title='held-out loss by position, of the longest text that each '
           'encoding takes')
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper')
  with path.open('wb') as file:
    figure.savefig(file, dpi=150, format='png')
  pyplot.close(figure)
