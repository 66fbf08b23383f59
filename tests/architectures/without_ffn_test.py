"""Layers without a feed-forward network: model.ffn 'none'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks, norms
from architectures.parts.attention.multi_head import Attention
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from tests.helpers import flops_formulas as formulas
from tests.helpers import models
from training import paths
from training.costs import flops, totals

HALF = dict(pattern='alone,both', kinds=dict(alone=dict(ffn='none'), both={}))


def test_a_block_ends_before_its_network():
  c = architectures.resolve(models.config(norm='layernorm'))
  ctx = Context(jnp.arange(6)[None], length=6)
  x_BLD = jax.random.normal(jax.random.key(0), (2, 6, c.d_model))
  _, whole = models.make(num_layers=1, norm='layernorm', block='sandwich')
  p = jax.tree.map(lambda x: x[0], whole['decoder']['layers']['block_0'])
  n = lambda name, x: norms.layernorm(
      x, *(p[f'{name}_norm'][k] for k in ('scale', 'bias')), c.norm_eps)
  A = lambda x: Attention(c, LayerKind('global', 'none')).apply(
      {'params': p['attention']}, x, ctx, None)[0]
  want = {
      'pre_norm': x_BLD + A(n('attention', x_BLD)),
      'post_norm': n('attention', x_BLD + A(x_BLD)),
      'sandwich': x_BLD + n('attention_out', A(n('attention', x_BLD))),
      'out_norm': x_BLD + n('attention_out', A(x_BLD))}
  assert set(want) == {name for name, block in blocks.BLOCKS.items()
                       if block.WITHOUT_FFN}
  for name, y_BLD in want.items():
    got, _, aux = blocks.BLOCKS[name](c, LayerKind('global', 'none')).apply(
        {'params': p}, x_BLD, ctx, None)
    np.testing.assert_allclose(got, y_BLD, rtol=1e-5, atol=1e-6)
    assert not aux


def test_a_kind_of_layer_has_none_and_costs_none():
  module = architectures.build(models.config('llama', **HALF))
  whole = architectures.build(models.config('llama'))
  c, ffn = module.config, 3 * 32 * 48
  assert totals.parameters(c)[0] == totals.parameters(whole.config)[0] - (
      ffn + 32)  # and its norm
  found, all_of_it = (flops.forward_flops(x, 16) for x in (c, whole.config))
  assert found['weights'] == all_of_it['weights'] - 2 * 16 * ffn
  assert sum(found.values()) == pytest.approx(
      sum(formulas.forward_flops(c, 16).values()))
  assert [row['ffn'] for row in totals.kinds_of_layer(c)] == ['none', 'swiglu']
  params = paths.flatten(models.make('llama', **HALF)[1])
  assert not [path for path in params if 'block_0/ffn' in path]


@pytest.mark.parametrize('system, changes, sentence', [
    ('gpt', dict(block='parallel'),
     'choose it from pre_norm, post_norm, sandwich, out_norm'),
    ('gpt', dict(block='ffn_norm'),
     'no equation without a feed-forward network'),
    ('gpt', dict(moe=dict(ffn='none')), "unknown model.moe.ffn 'none'"),
    ('bert', {}, 'activation of the layers'),
    ('llama', dict(lora=dict(rank=2, targets='up')), "'up', a product"),
])
def test_what_cannot_be_is_refused(system, changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(system, **dict(ffn='none') | changes))
