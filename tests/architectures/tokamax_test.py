"""Tokamax's kernels are asked for what ours compute, by its own form for XLA,
and what they cannot do is refused. Tests that need the package run with
`make plan-test`, which installs it."""

import functools
from types import SimpleNamespace

import jax
from jax.extend import backend
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import sharding, tokamax_kernels
from architectures.parts.attention import kernels
from architectures.parts.config import LayerKind
from architectures.parts.moe import grouped
from common.errors import RequestError
from tests.architectures.parts_test import normal
from tests.helpers import models

B, L, H, J, K = 2, 64, 4, 2, 16


@pytest.fixture
def on_xla(monkeypatch):
  """Tokamax's own form for XLA in place of those for GPUs."""
  pytest.importorskip('tokamax', reason='extra `tokamax`')
  for name in ('attention', 'grouped_product'):
    monkeypatch.setattr(tokamax_kernels, name, functools.partial(
        getattr(tokamax_kernels, name), implementation='xla'))


@pytest.fixture
def on_card(monkeypatch):
  """Returns a function that says which GPU there is."""
  def pretend(capability, kind='a GPU'):
    monkeypatch.setattr(sharding, 'traced_platform', lambda: 'gpu')
    monkeypatch.setattr(tokamax_kernels.importlib.util, 'find_spec',
                        lambda name: name)
    monkeypatch.setattr(
        backend, 'get_default_device', lambda: SimpleNamespace(
            compute_capability=capability, device_kind=kind))
  return pretend


@pytest.mark.plan
@pytest.mark.parametrize('name', ['causal', 'banded', 'documents', 'full'])
def test_attention_equals_ours(on_xla, name):
  """Of shared keys: outputs and gradients, with a softcap."""
  ids_BL, place_1L = None, np.arange(L)[None]
  kind = LayerKind('banded' if name == 'banded' else 'global', 'gelu',
                   causal=name != 'full')
  window = 5 if name == 'banded' else 0
  if name == 'documents':
    ids_BL = jnp.asarray(1 + (place_1L > np.array([[20], [41]])))
  seen_BLM = kernels.visible_keys(
      kind, SimpleNamespace(diffusion_block=0, sliding_window=window),
      place_1L, place_1L, ids_BL, ids_BL)
  mask = kernels.Mask(ids_BL, ids_BL, causal=kind.causal, window=window)
  q, k, v, w = (normal(i, B, L, heads, K)
                for i, heads in enumerate((H, J, J, H)))

  def ours(q, k, v):
    return (w * kernels.attend(q, k, v, mask_BLM=seen_BLM, scale=0.3,
                               softcap=2.0)).sum()

  def theirs(q, k, v):
    return (w * kernels.KERNELS['tokamax'].run(
        q, k, v, mask, seen_BLM, scale=0.3, softcap=2.0, sink_H=None)).sum()

  want, result = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v)
                  for f in (ours, theirs))
  models.assert_trees_close(want, result)


@pytest.mark.plan
def test_products_of_experts_equal_a_loop(on_xla, monkeypatch):
  """And rows past the counts are 0, where a kernel for GPUs writes nothing."""
  import tokamax
  counts, multiply = [3, 0, 6, 2], tokamax.ragged_dot
  monkeypatch.setattr(tokamax, 'ragged_dot', lambda *args, **options: multiply(
      *args, **options).at[sum(counts):].set(jnp.nan))
  x_PI, m_EIO, d_PO = normal(0, 16, 64), normal(1, 4, 64, 128), normal(
      2, 16, 128)
  product = grouped.grouped_product_of_kernel('tokamax', even_rows=4)

  def loss(x_PI, m_EIO):
    y_PO = product(x_PI, m_EIO, jnp.array(counts, jnp.int32))
    return (d_PO * y_PO).sum(), y_PO

  (_, y_PO), (dx_PI, dm_EIO) = jax.jit(jax.value_and_grad(
      loss, (0, 1), has_aux=True))(x_PI, m_EIO)
  want = [np.zeros(a.shape) for a in (d_PO, x_PI, m_EIO)]
  for e, end in enumerate(np.cumsum(counts)):
    rows = slice(end - counts[e], end)
    want[0][rows] = x_PI[rows] @ m_EIO[e]
    want[1][rows] = d_PO[rows] @ m_EIO[e].T
    want[2][e] = x_PI[rows].T @ d_PO[rows]
  models.assert_trees_close(want, [y_PO, dx_PI, dm_EIO])


def _choose(length=64, **changes):
  fields = dict(attention_kernel='tokamax', dtype='bfloat16') | changes
  config = architectures.resolve(models.small_config(**fields))
  return kernels.choose_attention_kernel(
      config, kernels.Mask(causal=True), length, length)


def test_it_is_taken_by_name_alone(on_card):
  for capability in ('9.0', '10.0'):
    on_card(capability)
    assert _choose() == 'tokamax'
    assert _choose(attention_kernel='auto') == 'xla'  # there is no cuDNN here


@pytest.mark.parametrize('capability, changes, sentence', [
    ('9.0', dict(dtype='float32'), 'computes in bfloat16'),
    ('9.0', dict(attention_sinks=True), 'no model.attention_sinks'),
    ('9.0', dict(head_dim=256), 'up to 128, and model.head_dim is 256'),
    ('9.0', dict(length=65), 'multiples of 64, and 65 queries'),
    ('8.0', {}, r'capability 9.x and 10.x, and JAX computes on a GPU'),
], ids=str)
def test_what_its_attention_cannot_do_is_refused(
    on_card, capability, changes, sentence):
  on_card(capability)
  with pytest.raises(RequestError, match=sentence):
    _choose(**changes)


def test_what_its_products_cannot_do_is_refused(on_card, monkeypatch):
  moe = SimpleNamespace(grouped_kernel='tokamax')
  with pytest.raises(RequestError, match='runs on gpu, and this program is fo'):
    grouped.choose_grouped_kernel(moe)
  on_card('10.0', 'NVIDIA B200')  # it lacks the gradient of the matrices there
  with pytest.raises(RequestError, match='9.x, and JAX computes on NVIDIA B2'):
    grouped.choose_grouped_kernel(moe)
  on_card('9.0')
  assert grouped.choose_grouped_kernel(moe) == 'tokamax'
  monkeypatch.setattr(tokamax_kernels.importlib.util, 'find_spec',
                      lambda name: None)
  with pytest.raises(RequestError, match='install the extra `tokamax`'):
    grouped.choose_grouped_kernel(moe)


@pytest.mark.plan
def test_an_error_of_tokamax_is_a_request_refused():
  pytest.importorskip('tokamax', reason='extra `tokamax`')
  with pytest.raises(RequestError, match='of 64, and those of experts are 64'):
    tokamax_kernels.grouped_product(
        normal(0, 16, 64), normal(1, 2, 64, 96), jnp.array([8, 8]))
  arrays = [normal(i, 1, 64, 2, 8) for i in range(3)]
  with pytest.raises(RequestError, match='attention_kernel is tokamax, which'):
    tokamax_kernels.attention(
        *arrays, scale=1.0, softcap=0.0, mask=None, is_causal=True,
        local_window_size=None)
