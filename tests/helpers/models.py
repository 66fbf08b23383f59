"""Small models for tests, from the configs that users start from."""

import importlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import architectures
from architectures.parts import heads, paths, sharding, skeletons
from common import kinds

VOCAB = 61

# Every other layer has experts, the second first.
DENSE_AND_MOE_LAYERS = dict(prefix='', pattern='dense,moe', kinds=dict(
    dense=dict(ffn='dense'), moe={}))


def window_in_every_other_layer(window: int) -> dict:
  """Returns the changes of a model whose every other layer has a window."""
  return dict(pattern='global,banded', kinds={
      'global': dict(window=0), 'banded': dict(window=window)})


SYSTEMS = architectures.files()
DECODERS = architectures.files('decoder')
# What tests of every kind of system take: each stands for others.
REPRESENTATIVE_SYSTEMS = ('bert', 'deepseek_v3', 'gemma3', 'gpt', 'llama', 'mamba2', 'mixtral',
       'qwen3_next', 't5')
# Those that transformers has too.
PUBLISHED_SYSTEMS = [architectures.file_name(arch) for arch in architectures.systems()
             if hasattr(architectures.page(arch), 'HF')]


def small_config(system: str = 'gpt', **changes):
  """Returns the model config of a system's `tiny`, made smaller still."""
  model = importlib.import_module(f'configs.{system}').get_config('tiny').model
  if 'pattern' in changes:  # of its own kinds of layer alone
    model.update(pattern=changes['pattern'], prefix='')
    model.kinds = {}
  model.update(d_model=32, num_layers=kinds.fewest_layers(model, 2),
               num_heads=4, d_ff=48, max_len=32, vocab_size=VOCAB,
               dtype='float32')
  if model.num_decoder_layers:
    model.num_decoder_layers = 2
  if 'pattern' in changes:
    model.kinds = {}
  for name, value in changes.items():
    if isinstance(value, dict):
      model[name].update(value)
    else:
      model[name] = value
  return model


def mixers_of(system: str) -> set[str]:
  """Returns the mixers of a system's layers."""
  c = small_config(system)
  return {kind.get('mixer', c.mixer) for kind in ({}, *c.kinds.values())}


# Those that muP has rules for: it has none for ranks of latent attention.
SYSTEMS_WITH_MUP = [system for system in REPRESENTATIVE_SYSTEMS if system in DECODERS
       and 'latent' not in mixers_of(system)]


def mark_long_except(few, cases) -> list:
  """Returns the parameters of a test, all but a few of them long."""
  return [pytest.param(case, marks=[pytest.mark.long] * (case not in few))
          for case in cases]


def random_tokens(batch: int = 2, length: int = 16, seed: int = 1) -> jax.Array:
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def make_model(system: str = 'gpt', seed: int = 0, **changes):
  """Returns (module, params); see `drawn`."""
  module = architectures.build(small_config(system, **changes))
  return module, draw_parameters(sharding.parameter_shapes(module), seed)


def draw_parameters(shapes, seed: int = 0):
  """Returns parameters for a tree of shapes, none at a tidy initial value:
  biases, norms and sinks count too. Nothing is compiled."""
  random = np.random.default_rng(seed)
  return jax.device_put(jax.tree_util.tree_map_with_path(
      lambda path, x: np.asarray(0.2 * random.standard_normal(x.shape) + (
          paths.path_to_string(path).endswith('scale')), x.dtype), shapes))


class Bigram(nn.Module):
  """A model whose next token hangs on the last one and its place alone: row
  [p, t] of a table has the logits of what follows token t at place p. Places
  that the table does not have begin anew. It compiles in no time, and numpy
  knows all that it says."""
  config: Any
  places: int
  REREADS = False

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, cache: Any = None,
               positions_BL: Any = None, **_: Any):
    P, V = self.places, self.config.vocab_size
    table_PVV = self.param('table', nn.initializers.zeros, (P, V, V))
    if positions_BL is None:
      positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    rows_BL = positions_BL % P * V + tokens_BL
    return skeletons.Output(
        hidden=jax.nn.one_hot(rows_BL, P * V), cache=cache,
        head=heads.Head(table_PVV.reshape(P * V, V)))


def make_bigram(table_PVV: np.ndarray):
  """Returns (module, params) of a Bigram."""
  P, V, _ = table_PVV.shape
  c = architectures.resolve(small_config(
      num_layers=1, position='rope', vocab_size=V))
  return Bigram(c, P), dict(table=jnp.asarray(table_PVV, jnp.float32),
                            decoder={})


def logits(module, params, tokens_BL: jax.Array, **kwargs) -> jax.Array:
  return module.apply({'params': params}, tokens_BL, **kwargs).logits


def decode_with_cache(module, params, tokens, first: int = 8, stepped=None):
  """Returns logits by the cache: of the `first` tokens at once, then one by
  one, by the model `stepped` where it is another."""
  @jax.jit
  def whole(params, tokens):
    cache = architectures.init_cache(module.config, *tokens.shape)
    out = module.apply({'params': params}, tokens[:, :first], cache=cache)
    def step(cache, i):
      token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, 1)
      out = (stepped or module).apply({'params': params}, token, cache=cache,
                                      positions_BL=jnp.full((1, 1), i))
      return out.cache, out.logits[:, 0]
    rest = jax.lax.scan(step, out.cache, jnp.arange(first, tokens.shape[1]))[1]
    return jnp.concatenate([out.logits, jnp.swapaxes(rest, 0, 1)], 1)
  return whole(params, tokens)


def assert_trees_close(a, b, rtol: float = 1e-5):
  """Asserts that the leaves of two trees differ by rtol of their largest value
  at most; one that is zero but for rounding, by rtol / 1000 of the tree's."""
  a, b = jax.device_get((a, b))
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(a))
  def check(path, x, y):
    scale = np.maximum(np.abs(x).max(), 1e-3 * largest)
    error = float(np.abs(x - y).max() / scale)
    assert error <= rtol, f'{jax.tree_util.keystr(path)}: {error:.2e}'
  jax.tree_util.tree_map_with_path(check, a, b)


def list_equations(jaxpr):
  """Yields every equation of a jaxpr, those of its inner ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from list_equations(inner)
