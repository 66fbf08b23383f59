"""What a training step must send, before anything is compiled."""

import functools
import math

import numpy as np

import architectures
from architectures.parts import remat
from architectures.parts.ffn import NONE
from tools.plan import collectives
from training import objectives, paths, runs
from training.costs import memory


def sent(run: runs.Run, host_of: np.ndarray) -> list[collectives.Collective]:
  """Returns what a step must send: weights gathered, gradients reduced,
  products summed over `tensor`, tokens to experts and back.

  Args:
    run: on the topology's devices.
    host_of: as of collectives.read.
  """
  c, shape, accumulation = (run.model, run.mesh.shape,
                            run.config.train.grad_accumulation)
  itemsize, passes = c.compute_dtype.itemsize, 2 + remat.of(c).again
  batch = ('data', 'fsdp', 'expert')
  found = []

  def add(kind, axes, payload, times, why):
    size, hosts = _group(tuple(shape.items()), axes, host_of.tobytes())
    if size > 1:
      found.append(collectives.Collective(
          kind, axes, size, hosts, c.dtype, 0, payload, times, True, why))

  times = memory.gathers(run)
  for path, x in paths.flatten(run.abstract.params).items():
    used = memory.axes(x.sharding)
    shard = math.prod(x.sharding.shard_shape(x.shape)) * itemsize
    held = shard
    for axis in reversed(memory.gathered(x.sharding)):  # one after the other
      add('reduce-scatter', (axis,), held, accumulation, 'gradients')
      held *= shape[axis]
      add('all-gather', (axis,), held, times[path] * accumulation,
          'weights before use')
    rest = tuple(a for a in batch if a not in used)
    add('all-reduce', rest, shard, accumulation, 'gradients')
  tokens = run.config.data.batch_size * sum(
      objectives.of(run.config).row_lengths(run.config))
  one = tokens * c.d_model * itemsize / math.prod(shape[a] for a in batch)
  both = architectures.stack(c) == 'encoder-decoder'
  counts = [c.num_layers, c.num_decoder_layers][:1 + both]
  parts = sum(1 + (kind.ffn != NONE) for n in counts for kind in
              c.layer_kinds(n))
  length, tensor = run.config.data.length, shape['tensor']
  if length % (shape['context'] * tensor):
    add('all-reduce', ('tensor',), one, passes * parts, 'sums of products')
  else:  # between the products, they lie over tensor: see configs/sharding.py
    for kind in ('reduce-scatter', 'all-gather'):
      add(kind, ('tensor',), one / tensor, passes * parts, 'sums of products')
  keys = 2 * c.num_kv_heads * c.head_dim / c.d_model / tensor
  add('all-gather', ('context',), keys * one, passes * sum(counts),
      'keys and values')
  if c.has_experts:
    crossings = 4 if c.remat == 'none' else 6  # see parts/dispatch.py
    add('all-to-all', ('expert',), c.moe.top_k * one,
        crossings * sum(kind.ffn == 'moe' for n in counts
                        for kind in c.layer_kinds(n)),
        'tokens to their experts and back')
  return found


@functools.lru_cache
def _group(shape: tuple, axes: tuple[str, ...], host_of: bytes):
  """Returns (devices, hosts) of a group along some axes of a mesh."""
  names, sizes = zip(*shape)
  at = [names.index(axis) for axis in axes]
  hosts = np.frombuffer(host_of, np.int64).reshape(sizes)
  count = math.prod(sizes[i] for i in at)
  rows = np.moveaxis(hosts, at, range(-len(at), 0)).reshape(-1, count)
  return count, max(len(set(row)) for row in rows.tolist())
