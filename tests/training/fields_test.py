"""Fields of a model that is there, changed by name."""

import jax
import jax.numpy as jnp
import pytest

import archetype
import architectures
from tests.helpers import models
from training import runs

GPT = architectures.resolve(models.config('gpt'))


@pytest.mark.slow
@pytest.mark.parametrize('changes, alpha', [
    (dict(rank=8), 8),
    pytest.param(dict(rank=8, alpha=16.0), 16, marks=pytest.mark.long)])
def test_adapters_that_are_added_can_learn(changes, alpha):
  """With alpha 0, as a model without adapters has it, they could not."""
  c = archetype.changed_model(GPT, dict(lora=changes))
  assert c.lora.alpha == alpha
  module = architectures.build(c)
  tokens = models.tokens()
  params = module.init(jax.random.key(0), tokens)['params']
  slopes = jax.jit(jax.grad(lambda params: jnp.square(
      models.logits(module, params, tokens)).sum()))(params)
  found = {jax.tree_util.keystr(path): jnp.abs(x).max() for path, x in
           jax.tree_util.tree_leaves_with_path(slopes)}
  assert any('lora' in name and size > 0 for name, size in found.items()), found


def test_a_rank_of_their_own_takes_alpha_along():
  eight = archetype.changed_model(GPT, dict(lora=dict(rank=8)))
  assert archetype.changed_model(eight, dict(lora=dict(rank=4))).lora.alpha == 4
  other = archetype.changed_model(
      GPT, dict(lora=dict(rank=8, alpha=32.0)))
  other = archetype.changed_model(other, dict(lora=dict(rank=4)))
  assert other.lora.alpha == 32


def test_what_is_zero_is_derived_as_in_a_config():
  c = archetype.changed_model(GPT, dict(
      embed_scale=0.0, logits_scale=0.0, num_kv_heads=0, d_ff=0))
  assert (c.embed_scale, c.num_kv_heads, c.d_ff) == (
      GPT.d_model ** 0.5, GPT.num_heads, 4 * GPT.d_model)
  assert c.logits_scale == GPT.d_model ** -0.5
  assert archetype.changed_model(c, {}) == c


@pytest.mark.parametrize('named, left', [
    ('splash', 'auto'), ('cudnn', 'auto'), ('auto', 'auto'), ('xla', 'xla')])
def test_a_model_that_is_used_names_no_kernel(named, left):
  model = models.config('mixtral', attention_kernel=named)
  model.moe.grouped_kernel = 'megablox'
  runs._name_no_kernel(model)
  assert (model.attention_kernel, model.moe.grouped_kernel) == (left, 'auto')
