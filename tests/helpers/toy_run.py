"""A small run with all that a state holds, and ways to damage its files."""

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import optax

from architectures.parts import paths
from configs import base
from training.workdir import checkpoints

OPTIMIZER = optax.adamw(1e-2)
CONFIG = base.base().lock()


def make_mesh(*shape):
  """Returns a mesh of this shape, over fsdp and tensor."""
  names = ('fsdp', 'tensor')
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2)


def init(key):
  """Returns a state as a run has it: float32 and bfloat16, counters, a flag.

  Each shard has more than the 1 KB up to which values stand, compressed, in
  the index of the files.
  """
  w1, w2, b = jax.random.split(key, 3)
  params = {
      'up': {'kernel': jax.random.normal(w1, (64, 512)),
             'bias': jax.random.normal(b, (512,))},
      'down': {'kernel': jax.random.normal(w2, (512, 64), jnp.bfloat16)}}
  return {'params': params, 'opt_state': OPTIMIZER.init(params),
          'step': jnp.int32(0), 'is_good': jnp.array([True, False])}


def abstract(*mesh_shape):
  """Returns the ShapeDtypeStructs of the state with shardings: matrices over
  both axes of a mesh of this shape, and all else replicated."""
  mesh = make_mesh(*mesh_shape)

  def add_sharding(x):
    spec = P()
    if x.ndim == 2:
      spec = P('fsdp', 'tensor')
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(add_sharding, jax.eval_shape(init, jax.random.key(0)))


def born(*mesh_shape):
  """Returns the first state of the run, made on a mesh of this shape."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract(*mesh_shape))
  return jax.jit(init, out_shardings=shardings)(jax.random.key(3))


def update(state):
  """Returns the state after a step of AdamW that trains a network of two layers
  to return its random input."""
  x_BD = jax.random.normal(
      jax.random.fold_in(jax.random.key(0), state['step']), (8, 64))
  def loss(params):
    up, down = params['up'], params['down']
    h_BF = jax.nn.gelu(x_BD @ up['kernel'] + up['bias'][None])
    y_BD = h_BF @ down['kernel'].astype(jnp.float32)
    return jnp.mean((y_BD - x_BD) ** 2)
  grads = jax.grad(loss)(state['params'])
  updates, opt_state = OPTIMIZER.update(
      grads, state['opt_state'], state['params'])
  return dict(state, params=optax.apply_updates(state['params'], updates),
              opt_state=opt_state, step=state['step'] + 1)


def trainer(*mesh_shape):
  """Returns the jitted `update` on a mesh of this shape; it donates the state
  that it is given."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract(*mesh_shape))
  return jax.jit(update, donate_argnums=0, out_shardings=shardings)


def open_store(workdir, **changes):
  """Returns the checkpoints of a folder, saved every 10 steps; `changes` are
  other options."""
  options = dict(every_steps=10, every_minutes=0.0, keep=3, keep_every=0)
  return checkpoints.Checkpoints(workdir, **{**options, **changes})


def resume(store, abstract_state, step=None):
  """Restores a state, by default the newest, and lets the store go on from it.
  """
  restored = checkpoints.restore_checkpoint(store.directory, abstract_state,
                                            step)
  store.go_on_from(restored)
  return restored


def save(store, step, state, **changes):
  """Saves a state as a run does; `changes` are other arguments of `save`."""
  return store.save(step, state, next_batch=step, tokens=64 * step,
                    config=CONFIG, **changes)


def host(state):
  """Returns copies of the arrays of a state, by path: a view would see what the
  next donated step writes."""
  return {name: np.array(x) for name, x in paths.flatten_by_path(state).items()}


def assert_bitwise(state, expected):
  """Asserts that a state has the dtypes and the bits of `host` of another."""
  arrays = host(state)
  assert arrays.keys() == expected.keys()
  for name, x in arrays.items():
    assert x.dtype == expected[name].dtype, name
    assert x.tobytes() == expected[name].tobytes(), name


def run(workdir):
  """Returns {step: state on the host} of a run saved at 10, 20 and 30."""
  state = born(4, 2)
  train_step = trainer(4, 2)
  states = {}
  with open_store(workdir) as store:
    for step in range(1, 31):
      state = train_step(state)
      if store.is_due(step):
        states[step] = host(state)
        assert save(store, step, state)
  return states


def data_files(step_dir):
  """Returns the files of a checkpoint that hold arrays, largest first."""
  files = [path for path in (step_dir / 'state').rglob('*')
           if path.parent.name == 'd']
  return sorted(files, key=lambda path: -path.stat().st_size)


def flip_in_largest(step_dir):
  """Flips a bit in the middle of the largest file of a checkpoint."""
  path = data_files(step_dir)[0]
  flip(path, path.stat().st_size // 2)


def flip(path, place, bit=4):
  """Flips a bit of the byte of a file at this place."""
  content = bytearray(path.read_bytes())
  content[place] ^= 1 << bit
  path.write_bytes(content)
