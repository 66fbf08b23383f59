"""Patterns of named kinds of layer: laws, and what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks, flat, layers, skeletons, stack
from architectures.parts.attention.multi_head import SelfAttention
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from architectures.parts.hf import tensor_map
from architectures.parts.sharding import install_rules
from common import kinds
from configs import sharding
from tests.helpers import models
from architectures.parts import paths
from training.distributed.devices import make_mesh

KINDS = dict(local=dict(window=3, rope=dict(theta=100.0)),
             far=dict(position='none', num_kv_heads=2, d_ff=24))
MIXED = dict(position='rope', num_layers=7, prefix='far',
             pattern='local,far', suffix='far,local', kinds=KINDS)


@functools.cache
def mixed(**changes):
  return models.make_model('gpt', **MIXED, **changes)


def row_of(section, block, row):
  return jax.tree.map(lambda x: np.asarray(x)[row], section[f'block_{block}'])


@pytest.mark.slow
def test_each_layer_is_that_of_its_kind():
  """A stack equals its blocks, called one after another."""
  module, params = mixed()
  c, tokens = module.config, models.random_tokens()
  layers_NBLD = jax.jit(lambda p: module.apply(
      {'params': p}, tokens, keep_layers=True).aux['layers'])(params)
  decoder = params['decoder']
  each_layer = [row_of(decoder['prefix'], 0, 0)] + [
      row_of(decoder['layers'], block, row)
      for row in range(2) for block in range(2)] + [
          row_of(decoder['suffix'], block, 0) for block in range(2)]
  names = ('far', 'local', 'far', 'local', 'far', 'far', 'local')
  assert tuple(k.name for k in c.layer_kinds(7)) == names
  ctx = Context(jnp.arange(tokens.shape[1])[None])
  @functools.partial(jax.jit, static_argnums=0)
  def alone(name, layer, x_BLD):
    config = c.layer_config(name)
    plain = stack.Period(config, config.layer_kinds(1))
    return plain.apply({'params': {'block_0': layer}},
                       (x_BLD, stack.PassedOn()), None, ctx, {})[0][0]
  for n, (name, layer) in enumerate(zip(names, each_layer)):
    models.assert_trees_close(alone(name, layer, layers_NBLD[n]),
                              layers_NBLD[n + 1])
  assert each_layer[0]['attention']['key'].shape == (32, 2, 8)
  assert each_layer[1]['attention']['key'].shape == (32, 4, 8)
  assert each_layer[0]['ffn']['up'].shape == (32, 24)


@functools.cache
def _whole_and_first():
  """Returns logits of all tokens, and of the first nine with a cache, which is
  returned too."""
  module, params = mixed()
  def read(params, tokens):
    out = module.apply({'params': params}, tokens[:, :9],
                       cache=architectures.init_cache(module.config, 2, 16))
    return models.logits(module, params, tokens), out.logits, out.cache
  return jax.jit(read)(params, models.random_tokens())


@pytest.mark.parametrize('apart', [False, True])
def test_decoding_with_a_cache_is_the_forward_pass(apart):
  module, params = mixed()
  tokens = np.asarray(models.random_tokens())
  wanted, first, cache = _whole_and_first()
  assert [x.mixer.key_BMJK.shape for x in cache] == [
      (1, 2, 16, 2, 8), (2, 2, 16, 4, 8), (2, 2, 16, 2, 8), (1, 2, 16, 2, 8),
      (1, 2, 16, 4, 8)]
  got, ours = [first], params
  if apart:
    ours, cache = jax.jit(skeletons.unstack_layers, static_argnums=0)(
        module.config, params, cache)
  step = jax.jit(lambda token, at, cache: (lambda out: (
      out.logits, out.cache))(module.apply(
          {'params': ours}, token, positions_BL=at, cache=cache,
          one_by_one=apart)))
  for i in range(9, 16):
    new, cache = step(tokens[:, i:i + 1], np.array([[i]]), cache)
    got.append(new)
  models.assert_trees_close(np.concatenate(got, 1), wanted, rtol=1e-4)


@pytest.mark.parametrize('fields, words', [
    (dict(pattern='a,b', kinds=dict(a={})), "layer 'b', .* there are a"),
    (dict(pattern='a', kinds=dict(a={}, b={})), 'has b, which no layer is'),
    (dict(pattern='a', kinds=dict(a=dict(norm='rmsnorm'))),
     'a.norm is no field of model.kinds.a: choose from num_heads, '),
    (dict(prefix='a', suffix='b', pattern='a,a,b', kinds=dict(a={}, b={})),
     'num_layers is 4: .* a multiple of the 3 layers'),
    (dict(pattern='a', kinds=dict(a=dict(position='learned'))),
     "no encoding of one layer: .* choose from rope, alibi, rel"),
    (dict(pattern='a', kinds=dict(a=dict(block='parallel', ffn='none'))),
     'kinds.a: .* choose it from pre_norm, post_norm, sandwich, out_norm'),
])
def test_what_no_pattern_can_be_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    architectures.build(models.small_config('gpt', **(
        dict(position='rope', num_layers=4) | fields)))


def test_what_follows_from_heads_is_of_their_kind():
  c = architectures.resolve(models.small_config('gpt', pattern='a,b',
                                                kinds=dict(
      a=dict(num_heads=2, head_dim=32), b={})))
  assert c.kinds['a'].overrides == dict(
      num_heads=2, num_kv_heads=2, head_dim=32, attention_scale=32 ** -0.5)
  assert c.layer_config('b').score_scale == 8 ** -0.5
  assert architectures.resolve(flat.to_dict(c)) == c
  t5 = architectures.resolve(models.small_config('t5'))
  assert t5.logits_scale == 32 ** -0.5


def test_groups_are_read_where_an_expert_has_a_capacity():
  for train, evaluation in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
    c = architectures.resolve(models.small_config('mixtral', moe=dict(
        capacity_factor=train, eval_capacity_factor=evaluation)))
    assert ('moe.group_size' in flat.fields_of_layers(c)) == (
        train + evaluation > 0)


def test_every_layer_has_one_place_and_one_name():
  _, params = mixed()
  flat = paths.flatten_by_path(params)
  stacks = paths.Stacks(flat)
  queries = [path for path in flat if path.endswith('attention/query')]
  assert stacks.counts == {'decoder': 7}
  assert {path: list(stacks.layer_numbers(path)) for path in queries} == {
      'decoder/prefix/block_0/attention/query': [0],
      'decoder/layers/block_0/attention/query': [1, 3],
      'decoder/layers/block_1/attention/query': [2, 4],
      'decoder/suffix/block_0/attention/query': [5],
      'decoder/suffix/block_1/attention/query': [6]}
  assert [stacks.path_and_row(queries[0], n) for n in range(7)] == [
      ('decoder/prefix/block_0/attention/query', 0),
      *((f'decoder/layers/block_{b}/attention/query', row)
        for row in range(2) for b in range(2)),
      *((f'decoder/suffix/block_{b}/attention/query', 0) for b in range(2))]
  row = 'decoder/layers/attention/query', 'DHK', 'h.{n}.q', 'HK D'
  tensors = tensor_map.map_tensors(
      [row], {path: flat[path].shape for path in queries})
  assert {t.name: (t.paths[0], *t.indices[0]) for t in tensors} == {
      f'h.{n}.q': stacks.path_and_row(queries[0], n) for n in range(7)}


@pytest.mark.slow
@pytest.mark.parametrize('devices, waits', [(1, 0), (8, 1)])
def test_a_gradient_waits_for_those_of_the_weights_above(devices, waits):
  """In a period of two layers, on several devices: by the jaxpr."""
  module, params = models.make_model('gpt', position='rope', num_layers=4,
                                     pattern='local,far', kinds=KINDS)
  mesh = make_mesh(
      dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=devices),
      jax.devices()[:devices])
  loss = lambda p, t: jnp.square(models.logits(module, p, t)).sum()
  with jax.set_mesh(mesh), install_rules(sharding.RULES['default']):
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, models.random_tokens(8))
  of_block = 1 + len(jax.tree.leaves(params['decoder']['layers']['block_1']))
  barriers = [eqn for eqn in models.list_equations(jaxpr.jaxpr)
              if eqn.primitive.name == 'optimization_barrier'
              and len(eqn.invars) == of_block]
  assert len(barriers) == waits


@pytest.mark.parametrize('model, last, normed', [
    ('post_norm', 'pre_norm', True), ('pre_norm', 'post_norm', False)])
def test_the_final_norm_is_what_the_last_layer_leaves_open(
    model, last, normed):
  _, params = models.make_model('llama', block=model, pattern='a,b', kinds=dict(
      a={}, b=dict(block=last)))
  assert ('final_norm' in params['decoder']) == normed


def test_what_layers_report_is_in_the_order_of_the_layers():
  """Of a prefix of one layer, twice a pattern of three of which one reports
  nothing, and a suffix of two."""
  def report(*values):
    arrays = {}
    if values:
      arrays = {'a': jnp.array(values), 'b': -jnp.array(values)}
    return layers.Report(health=arrays)

  sections = [(report(0),), (report(1, 3), report(), report(2, 4)),
              (report(5), report(6))]
  joined = stack._stack_field_by_layer(sections, 'health')
  np.testing.assert_array_equal(joined['a'], np.arange(7))
  np.testing.assert_array_equal(joined['b'], -np.arange(7))
  assert stack._stack_field_by_layer(sections, 'loads') == {}


@pytest.mark.parametrize('pattern', ['', 'c', 'c,d', 'c,d,c'])
@pytest.mark.parametrize('interval', [2, 3, 4])
def test_experts_are_placed_and_all_else_is_left(pattern, interval):
  kinds_before = {
      'a': dict(window=1), 'b': dict(window=2), 'c': dict(window=3),
      'd': dict(window=4, ffn='swiglu'), 'unused': dict(window=5)}
  model = dict(prefix='a,global', pattern=pattern, suffix='b',
               kinds=kinds_before)
  placed = kinds.place_experts(model, interval)
  names_before = pattern.split(',') if pattern else ['']
  names = placed['pattern'].split(',')
  assert len(names) == math.lcm(len(names_before), interval)
  for i, name in enumerate(names):
    expected = dict(kinds_before.get(names_before[i % len(names_before)], {}))
    if (i + 1) % interval:
      expected['ffn'] = kinds.DENSE_NETWORK
    assert placed['kinds'][name] == expected
  for name in 'ab':
    assert placed['kinds'][name] == kinds_before[name]
  assert not {'global', 'unused'} & set(placed['kinds'])


# Layers without a feed-forward network: model.ffn 'none'.


def test_a_block_ends_before_its_network():
  c = architectures.resolve(models.small_config(norm='layernorm'))
  ctx = Context(jnp.arange(6)[None])
  x_BLD = jax.random.normal(jax.random.key(0), (2, 6, c.d_model))
  _, whole = models.make_model(num_layers=1, norm='layernorm', block='sandwich')
  p = jax.tree.map(lambda x: x[0], whole['decoder']['layers']['block_0'])
  n = lambda name, x: layers.layernorm(
      x, *(p[f'{name}_norm'][k] for k in ('scale', 'bias')), c.norm_eps)
  A = lambda x: SelfAttention(c, LayerKind('global', 'none')).apply(
      {'params': p['attention']}, x, ctx, None)[0]
  want = {
      'pre_norm': x_BLD + A(n('attention', x_BLD)),
      'no_norm': x_BLD + A(x_BLD),
      'post_norm': n('attention', x_BLD + A(x_BLD)),
      'sandwich': x_BLD + n('attention_out', A(n('attention', x_BLD))),
      'out_norm': x_BLD + n('attention_out', A(x_BLD))}
  assert set(want) == {name for name, block in blocks.BLOCKS.items()
                       if block.WITHOUT_FFN}
  for name, y_BLD in want.items():
    got, _, report = blocks.BLOCKS[name](c, LayerKind('global', 'none')).apply(
        {'params': p}, x_BLD, ctx, None)
    np.testing.assert_allclose(got, y_BLD, rtol=1e-5, atol=1e-6)
    assert not jax.tree.leaves(report)



