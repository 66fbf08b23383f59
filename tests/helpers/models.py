"""Small models for tests, from the configs that users start from."""

import functools
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

# Changes of a config: every other layer has experts, the second first.
DENSE_AND_MOE_LAYERS = dict(prefix='', pattern='dense,moe', kinds=dict(
    dense=dict(ffn='dense'), moe={}))


def window_in_every_other_layer(window: int) -> dict:
  """Returns the changes of a config after which every other layer sees the last
  `window` tokens alone."""
  return dict(pattern='global,banded', kinds={
      'global': dict(window=0), 'banded': dict(window=window)})


SYSTEMS = architectures.files()
DECODERS = architectures.files('decoder')
# What tests of every kind of system take: each stands for others.
REPRESENTATIVE_SYSTEMS = (
    'bert', 'deepseek_v3', 'gemma3', 'gpt', 'llama', 'mamba2', 'mixtral',
    'qwen3_next', 't5')
# Those that transformers has too.
PUBLISHED_SYSTEMS = [
    architectures.file_name(arch) for arch in architectures.systems()
    if hasattr(architectures.page(arch), 'HF')]


@functools.cache
def _tiny_model(system: str):
  """Returns the model config of a system's `tiny`, which nobody may change."""
  config_file = importlib.import_module(f'configs.{system}')
  return config_file.get_config('tiny').model


def small_config(system: str = 'gpt', **changes):
  """Returns the model config of a system's `tiny`, made smaller still.

  Args:
    system: the name of its file in configs/.
    **changes: other values of fields; a dict for a group changes its fields.
  """
  # To copy a config takes a tenth of the time of making it.
  model = _tiny_model(system).copy_and_resolve_references()
  # A pattern of layers that is given is of the given kinds of layer alone. The
  # number of layers depends on it.
  if 'pattern' in changes:
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
  """Returns the names of the mixers (attention or a recurrence) of a system's
  layers."""
  config = small_config(system)
  mixers = {config.mixer}
  for layer_kind in config.kinds.values():
    mixers.add(layer_kind.get('mixer', config.mixer))
  return mixers


# Those that muP has rules for: it has none for ranks of latent attention.
SYSTEMS_WITH_MUP = [
    system for system in REPRESENTATIVE_SYSTEMS
    if system in DECODERS and 'latent' not in mixers_of(system)]


def mark_long_except(quick_cases, cases) -> list:
  """Returns the parameters of a test, all but a few of them marked `long`."""
  parameters = []
  for case in cases:
    marks = []
    if case not in quick_cases:
      marks.append(pytest.mark.long)
    parameters.append(pytest.param(case, marks=marks))
  return parameters


def random_tokens(batch: int = 2, length: int = 16, seed: int = 1
                  ) -> jax.Array:
  """Returns tokens below VOCAB, int [batch, length]."""
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def make_model(system: str = 'gpt', seed: int = 0, **changes):
  """Returns (module, params) of a small model; see `small_config` and
  `draw_parameters`."""
  module = architectures.build(small_config(system, **changes))
  return module, draw_parameters(sharding.parameter_shapes(module), seed)


def draw_parameters(shapes, seed: int = 0):
  """Returns random parameters for a tree of shapes, none at a tidy initial
  value, so that biases, norms and sinks count too. Nothing is compiled."""
  random = np.random.default_rng(seed)

  def draw(path, shape):
    """Returns values about 0; those of a norm's scale are about 1."""
    mean = 0.0
    if paths.path_to_string(path).endswith('scale'):
      mean = 1.0
    values = 0.2 * random.standard_normal(shape.shape) + mean
    return np.asarray(values, shape.dtype)

  return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


class Bigram(nn.Module):
  """A model whose next token depends on the last one and its place alone: row
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
  """Returns (module, params) of a Bigram with this table."""
  P, V, _ = table_PVV.shape
  config = architectures.resolve(small_config(
      num_layers=1, position='rope', vocab_size=V))
  params = dict(table=jnp.asarray(table_PVV, jnp.float32),
                decoder=dict(layers={}))
  return Bigram(config, P), params


def logits(module, params, tokens_BL: jax.Array, **kwargs) -> jax.Array:
  """Returns the logits that a model gives tokens, [B, L, V]."""
  return module.apply({'params': params}, tokens_BL, **kwargs).logits


def decode_with_cache(module, params, tokens_BL, first: int = 8, stepped=None):
  """Returns the logits of tokens that a model reads with its cache, [B, L, V].

  Args:
    module: the model.
    params: its parameters.
    tokens_BL: the tokens.
    first: how many of them are read at once; the others are read one by one.
    stepped: the model that reads these others; None: the same.
  """
  step_module = stepped or module

  @jax.jit
  def decode(params, tokens_BL):
    cache = architectures.init_cache(module.config, *tokens_BL.shape)
    output = module.apply({'params': params}, tokens_BL[:, :first],
                          cache=cache)

    def read_token(cache, i):
      token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BL, i, 1, 1)
      output = step_module.apply({'params': params}, token_B1, cache=cache,
                                 positions_BL=jnp.full((1, 1), i))
      return output.cache, output.logits[:, 0]

    later_places = jnp.arange(first, tokens_BL.shape[1])
    _, later_logits_LBV = jax.lax.scan(read_token, output.cache, later_places)
    later_logits_BLV = jnp.swapaxes(later_logits_LBV, 0, 1)
    return jnp.concatenate([output.logits, later_logits_BLV], 1)

  return decode(params, tokens_BL)


def assert_trees_close(expected, actual, rtol: float = 1e-5):
  """Asserts that the leaves of two trees differ by rtol of their largest value
  at most; one that is zero but for rounding, by rtol / 1000 of the tree's."""
  expected, actual = jax.device_get((expected, actual))
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))

  def check_leaf(path, expected_leaf, actual_leaf):
    scale = np.maximum(np.abs(expected_leaf).max(), 1e-3 * largest)
    error = float(np.abs(expected_leaf - actual_leaf).max() / scale)
    assert error <= rtol, f'{jax.tree_util.keystr(path)}: {error:.2e}'

  jax.tree_util.tree_map_with_path(check_leaf, expected, actual)


def list_equations(jaxpr):
  """Yields every equation of a jaxpr, those of its inner ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from list_equations(inner)
