"""Every parameter declares its role, and the optimisers go by it."""


from configs import base
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.roles import Declared, Role
from tests.helpers import models
from architectures.parts import paths
from training.runs import abstract_params


def boxes(module) -> dict[str, Declared]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      abstract_params(module),
      is_leaf=lambda x: isinstance(x, Declared))
  return {paths.join(path): box for path, box in leaves}


def test_axes_as_a_picture():
  split = lambda role, ndim: tuple(role.split(ndim))
  query = Role(('embed', 'heads', 'head'), (0,))
  assert split(query, 3) == ((), (0,), (1, 2))
  assert split(query, 4) == ((0,), (1,), (2, 3))  # of every layer
  out = Role(('heads', 'head', 'embed'), (0, 1))
  assert split(out, 4) == ((0,), (1, 2), (3,))
  expert = Role(('experts', 'embed', 'mlp'), (1,), (0,))
  assert split(expert, 4) == ((0, 1), (2,), (3,))
  last = Role(('embed', 'mlp', 'experts'), (0,), (2,))
  assert split(last, 3) == ((2,), (0,), (1,))
  bias = Role(('experts', 'mlp'), batch=(0,))
  assert split(bias, 3) == ((0, 1), (), (2,)) and not bias.matrix
  assert query.split(4).sizes((2, 3, 5, 7)) == (3, 35)


@pytest.mark.parametrize('arch', models.FEW)
@pytest.mark.parametrize('fields', [
    dict(),
    dict(ffn='swiglu', tie_embeddings=False, qk_norm=True, logits_bias=True,
         qk_norm_over='projection', attention_sinks=True, position='relative',
         attention_gate='headwise', num_kv_heads=2, value_residual=True,
         value_embedding=True),
    dict(ffn='moe', attention_gate='elementwise',
         moe=dict(router='sigmoid', shared_experts=1, shared_gate=True,
                  ffn='swiglu', logit_bias=True), **models.DENSE_MOE)])
def test_a_parameters_role_agrees_with_its_name_and_its_axes(arch, fields):
  config = base.base().model
  config.update(dict(arch=arch, vocab_size=64, max_len=16, **fields))
  module = architectures.build(config)
  matrices = 0
  for path, box in boxes(module).items():
    assert len(box.names) == box.value.ndim
    axes = box.role.split(box.value.ndim)
    named = lambda side, names=box.names: [names[i] for i in side]
    assert sorted(sum(axes, ())) == list(range(box.value.ndim)), path
    assert named(axes.batch) == [
        n for n in box.names if n in ('layers', 'experts')], path
    # A gate may be of whole heads: one number each.
    headwise = path.endswith('/value_gate') or (
        path.endswith('/output_gate') and box.value.ndim == 3)
    # Heads and what they hold are one side of a matrix.
    if box.role.matrix:
      matrices += 1
      for side in (axes.inputs, axes.outputs):
        assert ('head' in named(side)) == bool(
            {'heads', 'kv_heads'} & set(named(side))) or headwise, path
    assert box.role.matrix != any(
        w in path for w in ('norm', 'bias', 'sink', 'residual')), path
    assert (box.role.kind == 'embedding') == (
        path.startswith('embed/') or path.endswith('/value_embedding')) or (
            not box.role.matrix), path
    assert (box.role.kind == 'logits') == (
        path.startswith(('head/', 'nsp'))
        or path.endswith(('/router', '/shared_gate')) or headwise), path
  assert matrices >= 6


def test_parameters_in_bfloat16_are_drawn_in_float32():
  """JAX draws bfloat16 from 128 values, whose mean is -0.012 deviations."""
  module = architectures.build(models.config('llama', param_dtype='bfloat16',
                                             d_ff=4096))
  params = jax.jit(lambda key: nn.meta.unbox(module.init(
      key, models.tokens())['params']))(jax.random.key(0))
  x = params['decoder']['layers']['block_0']['ffn']['up']
  assert x.dtype == jnp.bfloat16
  values = np.asarray(x, np.float64).reshape(-1)
  assert len(np.unique(values)) > 300
  assert abs(values.mean()) < 4 * values.std() / np.sqrt(values.size) < (
      0.01 * values.std())
