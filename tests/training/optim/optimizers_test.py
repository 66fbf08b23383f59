"""Optimisers and path patterns, against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import architectures
from architectures.parts import paths
from architectures.parts.sharding import Role
from configs import base
from tests.helpers import models
from training.optim import optimizers
from training.runs import parameter_roles, parameter_shapes


def optim(**fields):
  config = base.base().optim
  config.update(fields)
  return config


MODULE = architectures.build(models.small_config(
    'mixtral', d_model=128, vocab_size=160, attention_bias=True,
    moe=dict(d_ff=136)))


def roles():
  """Of `params`."""
  return parameter_roles(MODULE)


def params(dtype=np.float32):
  """A tree with every kind of parameter that a shape rule must tell."""
  shapes = parameter_shapes(MODULE)
  return jax.tree.map(lambda x: (0.1 * x).astype(dtype), gradients(shapes, 0))


def plain(tree):
  """The roles of a tree of hidden matrices, and of vectors."""
  return jax.tree.map(lambda x: Role(('embed', 'mlp'), (0,)) if x.ndim == 2
                      else Role(('embed',)), tree)


def gradients(tree, seed=1):
  random = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: random.standard_normal(x.shape).astype(x.dtype), tree)


def stepping(tx):
  """Returns jitted step(gradients, state, tree) -> (tree, state)."""
  def step(grads, state, tree):
    updates, state = tx.update(grads, state, tree)
    return optax.apply_updates(tree, updates), state
  return jax.jit(step)


def run(tx, tree, steps=3):
  state, step = jax.jit(tx.init)(tree), stepping(tx)
  for i in range(steps):
    tree, state = step(gradients(tree, i), state, tree)
  return tree


@pytest.mark.parametrize('fields, words', [
    (dict(name='adamv'), ("unknown optim.name 'adamv'", 'muon',
                          "Did you mean 'adamw'")),
    (dict(momentum=0.5), ('optim.momentum is 0.5', 'muon, normuon, sgd')),
    (dict(decay_time=0.5), ('optim.decay_time is 0.5', 'weight_decay 0.1')),
    (dict(decay_time=0.5, weight_decay=0.0, lr=0.0), ('optim.lr 0.0, at',)),
    (dict(decay_mask=(('.*', 2),)), ('optim.decay_mask is', '1 or 0')),
    (dict(decay_mask=(('.*', 1, 1),)), ('optim.decay_mask is', '1 or 0')),
    (dict(decay_mask=(('.*', 1), '.*')), ('optim.decay_mask is', '1 or 0')),
    (dict(decay_steps=10, warmup_steps=10), ('optim.decay_steps is 10',)),
    (dict(decay_mask=(('.*bias', 1),)), ("parameter 'decoder/", '.*bias')),
    (dict(decay_mask=(('(', 1),)), ("'('", 'regular expression')),
])
def test_what_cannot_be_honoured_is_refused(fields, words):
  with pytest.raises(ValueError) as error:
    optimizers.check_optim(optim(**fields))
    optimizers.make_optimizer(optim(**fields), 10, roles())
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('selector, table', [
    ('name', optimizers.OPTIMIZERS), ('schedule', optimizers.SCHEDULES)])
def test_a_field_is_taken_by_those_that_read_it_alone(selector, table):
  fields = {field for entry in table.values() for field in entry.reads}
  default = optim()
  for choice, entry in table.items():
    for field in sorted(fields):
      other = default[field] + type(default[field])(10**6)
      config = optim(**{selector: choice, field: other})
      if field in entry.reads:
        optimizers.check_optim(config)
        continue
      message = f'^optim.{field} is .*{choice!r} does not read'
      with pytest.raises(ValueError, match=message):
        optimizers.check_optim(config)


@pytest.mark.slow
@pytest.mark.parametrize('name', models.mark_long_except(
    ('adamw', 'muon'), optimizers.OPTIMIZERS))
def test_decay_is_decoupled_and_masked(name):
  """With a gradient of zero, p becomes p * (1 - lr * decay), or stays."""
  config = optim(name=name, lr=0.5, warmup_steps=0, schedule='constant',
                 weight_decay=0.1)
  tree = params()
  tx = optimizers.make_optimizer(config, 10, roles())
  after = paths.flatten_by_path(stepping(tx)(
      jax.tree.map(np.zeros_like, tree), jax.jit(tx.init)(tree), tree)[0])
  for path, before in paths.flatten_by_path(tree).items():
    factor = 1.0 if any(w in path for w in ('norm', 'bias', 'embed')) else 0.95
    np.testing.assert_allclose(after[path], before * factor, rtol=1e-6,
                               err_msg=path)


@pytest.mark.parametrize('lr, steps', [(0.1, 50), (0.4, 50), (0.1, 500)])
def test_decay_forgets_in_a_share_of_the_run(lr, steps):
  """Without gradients, a parameter is 1 / e of itself after tau steps, at every
  rate and in muP at every width (arXiv 2405.13698, equation 3)."""
  config = optim(lr=lr, warmup_steps=0, schedule='constant', weight_decay=0.0,
                 decay_time=0.4, decay_mask=(('.*', 1),))
  optimizers.check_optim(config)
  tree = {'kernel': jnp.ones(2)}
  tx = optimizers.make_optimizer(config, steps, plain(tree), {'kernel': 0.25})
  zero = {'kernel': jnp.zeros(2)}
  def step(state, _):
    tree, state = state
    updates, state = tx.update(zero, state, tree)
    return (optax.apply_updates(tree, updates), state), None
  tau = round(0.4 * steps)
  (tree, _), _ = jax.lax.scan(step, (tree, tx.init(tree)), length=tau)
  np.testing.assert_allclose(tree['kernel'], (1 - 1 / tau) ** tau, rtol=1e-4)


def test_adamw_by_hand():
  config = optim(lr=0.1, warmup_steps=0, schedule='constant', b1=0.8, b2=0.9,
                 weight_decay=0.2, clip_norm=0.5, decay_mask=(('.*', 1),))
  p, m, v = np.float64([1.0, -2.0]), 0.0, 0.0
  tree = {'kernel': jnp.asarray(p, jnp.float32)}
  tx = optimizers.make_optimizer(config, 10, plain(tree))
  state = tx.init(tree)
  for t, g in enumerate(([3.0, 4.0], [0.1, -0.1]), start=1):
    updates, state = tx.update({'kernel': jnp.float32(g)}, state, tree)
    tree = optax.apply_updates(tree, updates)
    g = np.float64(g) * min(1.0, 0.5 / np.linalg.norm(g))
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    u = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
    p = p - 0.1 * (u + 0.2 * p)
    np.testing.assert_allclose(tree['kernel'], p, rtol=1e-5)


def test_a_cautious_decay_leaves_what_the_step_makes_larger():
  config = optim(name='sgd', momentum=0.0, lr=0.1, warmup_steps=0, clip_norm=0,
                 schedule='constant', weight_decay=0.5, cautious_decay=True,
                 decay_mask=(('.*', 1),))
  tree = {'kernel': jnp.float32([2.0, 2.0, -2.0, -2.0])}
  g = np.float32([1.0, -1.0, 1.0, -1.0])
  tx = optimizers.make_optimizer(config, 10, plain(tree))
  updates, _ = tx.update({'kernel': g}, tx.init(tree), tree)
  np.testing.assert_allclose(
      updates['kernel'], [-0.1 - 0.1, 0.1, -0.1, 0.1 + 0.1], rtol=1e-6)


def test_ademamix_by_hand():
  config = optim(name='ademamix', lr=0.1, warmup_steps=0, schedule='constant',
                 b1=0.8, b2=0.9, b3=0.99, alpha=3.0, weight_decay=0.0,
                 clip_norm=0.0)
  p, m, s, v = np.float64([1.0, -2.0]), 0.0, 0.0, 0.0
  tree = {'kernel': jnp.asarray(p, jnp.float32)}
  tx = optimizers.make_optimizer(config, 10, plain(tree))
  state = tx.init(tree)
  for t, g in enumerate(np.float64([[3.0, 4.0], [0.1, -0.1]]), start=1):
    updates, state = tx.update({'kernel': jnp.float32(g)}, state, tree)
    tree = optax.apply_updates(tree, updates)
    m, s, v = (0.8 * m + 0.2 * g, 0.99 * s + 0.01 * g, 0.9 * v + 0.1 * g * g)
    p = p - 0.1 * (m / (1 - 0.8**t) + 3.0 * s) / (
        np.sqrt(v / (1 - 0.9**t)) + 1e-8)
    np.testing.assert_allclose(tree['kernel'], p, rtol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_a_hyperball_keeps_the_norm_of_each_matrix(name):
  """Two layers in one array, which are matrices of their own, and a vector."""
  config = optim(name=name, lr=0.1, warmup_steps=0, schedule='constant',
                 weight_decay=0.5, clip_norm=0.0, hyperball=True)
  config.update(dict(momentum=0.0) if name == 'sgd' else {})
  random = np.random.default_rng(0)
  w, g = random.normal(size=(2, 2, 5, 3))
  tree = {'w': jnp.float32(w), 'b': jnp.ones(3), 'zero': jnp.zeros((5, 3))}
  grads = {'w': jnp.float32(g), 'b': jnp.ones(3), 'zero': jnp.float32(g[0])}
  matrix = Role(('embed', 'mlp'), (0,))
  tx = optimizers.make_optimizer(
      config, 10, {'w': matrix, 'b': Role(('embed',)), 'zero': matrix})
  after, _ = stepping(tx)(grads, tx.init(tree), tree)
  for i in range(2):
    u, R = np.sign(g[i]) if name == 'adamw' else g[i], np.linalg.norm(w[i])
    moved = w[i] - 0.1 * R * u / np.linalg.norm(u)
    np.testing.assert_allclose(
        after['w'][i], R * moved / np.linalg.norm(moved), rtol=1e-5, atol=1e-6)
  # A vector moves as ever. A matrix that is 0 takes a step of the length lr.
  np.testing.assert_allclose(after['b'], 0.9, rtol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(after['zero']), 0.1, rtol=1e-5)


def test_lion_and_sgd_by_hand():
  flat = dict(lr=0.1, warmup_steps=0, schedule='constant', weight_decay=0.0,
              clip_norm=0.0)
  g = {'kernel': jnp.float32([3.0, -0.5])}
  tree = {'kernel': jnp.float32([1.0, 1.0])}
  # Lion: the sign alone, so the size of the gradient is lost.
  tx = optimizers.make_optimizer(optim(name='lion', **flat), 10, plain(tree))
  updates, _ = tx.update(g, tx.init(tree), tree)
  np.testing.assert_allclose(updates['kernel'], [-0.1, 0.1], rtol=1e-6)
  # SGD: m = g + momentum * m, without clipping.
  tx = optimizers.make_optimizer(
      optim(name='sgd', momentum=0.5, **flat), 10, plain(tree))
  first, state = tx.update(g, tx.init(tree), tree)
  second, _ = tx.update(g, state, tree)
  np.testing.assert_allclose(first['kernel'], [-0.3, 0.05], rtol=1e-6)
  np.testing.assert_allclose(second['kernel'], [-0.45, 0.075], rtol=1e-6)


@pytest.mark.parametrize('size', [1.0, 1e-15], ids=str)
def test_adafactor_equals_optax_on_plain_matrices(size):
  """Of gradients of two sizes, the second so small that their squares meet
  epsilon_1; and of parameters near and below the least root mean square."""
  tree = {'wide': params()['embed']['tokens'], 'small': jnp.ones((4, 200)),
          'vector': jnp.linspace(0.1, 1.0, 300), 'zero': jnp.zeros((130, 140)),
          'none': jnp.zeros(9), 'tiny': jnp.full(50, 9e-4),
          'more': jnp.full(50, 1.2e-3)}
  config = optim(name='adafactor', lr=0.01, warmup_steps=0, clip_norm=0.0,
                 weight_decay=0.0, schedule='constant')
  moved = []
  for tx in (optimizers.make_optimizer(config, 10, plain(tree)),
             optax.adafactor(0.01)):
    state, step, after = tx.init(tree), stepping(tx), tree
    for i in range(3):
      grads = jax.tree.map(lambda g: g * size, gradients(tree, i))
      after, state = step(grads, state, after)
    moved.append(jax.tree.map(lambda a, b: a - b, after, tree))
  ours, theirs = moved
  for name, theirs_here in theirs.items():
    np.testing.assert_allclose(ours[name], theirs_here, rtol=1e-3, atol=(
        1e-4 * np.abs(theirs_here).max()), err_msg=name)
    assert np.abs(theirs_here).max() > 0


@pytest.mark.slow
def test_a_stack_learns_as_its_layers_do():
  """Layers (and experts) in one array move as each would on its own. (Of Muon,
  NorMuon and SOAP in matrices_test.py.)"""
  config = optim(name='adafactor', lr=0.01, warmup_steps=0, clip_norm=0.0)
  # Layers of unlike sizes: a statistic taken over all of them would show.
  whole, stack = params(), lambda tree: tree['decoder']['layers']
  whole['decoder']['layers'] = jax.tree.map(
      lambda x: x * np.float32([1, 2]).reshape((-1,) + (1,) * (x.ndim - 1)),
      stack(whole))
  stacked = run(optimizers.make_optimizer(config, 10, roles()), whole)

  def layer(tree, i):
    return jax.tree.map(lambda x: x[i:i + 1], stack(tree))

  tx = optimizers.make_optimizer(config, 10, stack(roles()))
  init, step = jax.jit(tx.init), stepping(tx)
  for i in range(2):
    tree = layer(whole, i)
    state = init(tree)
    for n in range(3):
      tree, state = step(layer(gradients(whole, n), i), state, tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        tree, layer(stacked, i))


@pytest.mark.slow
@pytest.mark.parametrize('name', models.mark_long_except(
    ('adamw',), ('adamw', 'adafactor', 'muon', 'soap')))
def test_update_if(name):
  """Not ok: every bit stays. ok: all move, and no type or shape changes."""
  tree = params(jnp.bfloat16)
  tx = optimizers.make_optimizer(
      optim(name=name, warmup_steps=0, lr=0.1), 10, roles())
  step = jax.jit(lambda ok, *args: optimizers.update_if(ok, tx, *args))
  g = gradients(tree)
  state = jax.jit(tx.init)(tree)
  kept, kept_state = step(False, g, state, tree)
  jax.tree.map(np.testing.assert_array_equal, (kept, kept_state),
               (tree, state))
  moved, moved_state = step(True, g, state, tree)
  if name == 'soap':  # whose first gradient only makes its bases
    moved, moved_state = step(True, g, moved_state, moved)
  shapes = lambda x: jax.tree.map(lambda a: (a.shape, a.dtype), x)
  assert shapes((moved, moved_state)) == shapes((tree, state))
  for path, value in paths.flatten_by_path(jax.device_get(moved)).items():
    assert np.isfinite(value).all(), path
    assert not np.array_equal(value, paths.flatten_by_path(tree)[path]), path


@pytest.mark.slow
@pytest.mark.parametrize('name', models.mark_long_except(
    ('adafactor',), ('adamw', 'adafactor')))
def test_state_lies_where_the_parameters_lie(name):
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tree = params()
  sharding = lambda *spec: jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*spec))
  where = jax.tree.map(lambda x: sharding(*[None] * (x.ndim - 1), 'fsdp'),
                       tree)
  where['decoder']['layers']['block_0']['attention']['query'] = sharding(
      None, 'fsdp', 'tensor')
  shapes = jax.eval_shape(lambda: tree)
  tx = optimizers.make_optimizer(optim(name=name, clip_norm=0.0), 10, roles())
  state = optimizers.opt_state_shardings(tx, shapes, where)
  placed = jax.device_put(tree, where)
  born = jax.jit(tx.init, out_shardings=state)(placed)
  wanted = paths.flatten_by_path(where)
  shape_of = {path: x.shape
              for path, x in paths.flatten_by_path(shapes).items()}
  moments = 0
  for path, leaf in paths.flatten_by_path(born).items():
    match = [p for p in wanted if path.endswith(p)]
    if not match:
      assert leaf.sharding.is_fully_replicated, path
      continue
    moments += 1
    spec, whole = (tuple(x.spec) + (None,) * leaf.ndim
                   for x in (leaf.sharding, wanted[match[0]]))
    for axis, size in enumerate(leaf.shape):
      same = size == shape_of[match[0]][axis]
      assert spec[axis] == (whole[axis] if same else None), path
  assert moments >= len(wanted)
  # One step on the mesh equals one on a single device.
  updates, after = jax.jit(tx.update, out_shardings=(where, state))(
      jax.device_put(gradients(tree), where), born, placed)
  alone = jax.jit(lambda: tx.update(gradients(tree), tx.init(tree), tree)[0])()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=2e-4, atol=1e-7), updates, alone)
  assert jax.tree.map(lambda x: x.sharding, after) == state


# Rate at updates 1, 5, 10, 55, 100 and past the end, of 100, lr 2, warm-up 10.
@pytest.mark.parametrize('fields, rates', [
    (dict(schedule='constant'), (0.2, 1.0, 2.0, 2.0, 2.0, 2.0)),
    (dict(schedule='linear', final_fraction=0.5),
     (0.2, 1.0, 2.0, 1.5, 1.0, 1.0)),
    (dict(schedule='linear', final_fraction=0.5, decay_steps=55),
     (0.2, 1.0, 2.0, 1.0, 1.0, 1.0)),
    (dict(schedule='cosine', final_fraction=0.1),
     (0.2, 1.0, 2.0, 1.1, 0.2, 0.2)),
    (dict(schedule='cosine', final_fraction=0.1, decay_steps=55),
     (0.2, 1.0, 2.0, 0.2, 0.2, 0.2)),
    (dict(schedule='rsqrt'),
     (0.2, 1.0, 2.0, 0.852803, 0.632456, 0.447214)),
    (dict(schedule='wsd', decay_fraction=0.45, final_fraction=0.1),
     (0.2, 1.0, 2.0, 2.0, 0.2, 0.2)),
])
def test_schedules_by_hand(fields, rates):
  config = optim(lr=2.0, warmup_steps=10, **fields)
  optimizers.check_optim(config)
  rate = optimizers.learning_rate(config, 100)
  got = [float(rate(t - 1)) for t in (1, 5, 10, 55, 100, 200)]
  np.testing.assert_allclose(got, rates, rtol=1e-5, atol=1e-7)
