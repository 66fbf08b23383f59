"""Fused attention: splash equals ours, on a mesh too; a TPU's program holds it;
and what a kernel cannot do is refused."""

import dataclasses
import os
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

import architectures
from architectures.parts import sharding
from architectures.parts.attention import kernels
from architectures.parts.config import LayerKind
from configs import sharding as tables
from tests.architectures.gathered_test import make_mesh
from tests.architectures.parts_test import normal
from tests.helpers import models


B, L, H, J, K = 2, 256, 4, 2, 32

CASES = {  # (banded, causal, segment ids, softcap, sinks, length)
    'causal': ('global', True, False, 0.0, False, L),
    'both_sides': ('banded', False, False, 0.0, False, L),
    'documents': ('global', True, True, 5.0, True, L),
    'padded': ('banded', True, True, 0.0, True, 200),  # to whole blocks
}


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'both_sides', 'documents', 'padded',
    pytest.param('causal', marks=pytest.mark.long)])
def test_splash_equals_xla(name):
  """In interpret mode: outputs and gradients, of sinks too."""
  banded, causal, ids, softcap, sinks, length = CASES[name]
  kind = LayerKind(banded, 'gelu', causal)
  window = 50 if banded == 'banded' else 0
  place_L = np.arange(length)
  ids_BL = (np.searchsorted([100, 230], place_L, side='right').astype(np.int32)
            + 1)[None] % 3 if ids else None
  mask = kernels.Mask(ids_BL, ids_BL, causal=causal, window=window)
  q, k, v, w = (normal(i, B, length, heads, K)
                for i, heads in enumerate((H, J, J, H)))
  args = (q, k, v, *([jnp.linspace(-1, 1, H)] if sinks else []))
  options = dict(scale=K ** -0.5, softcap=softcap)

  def ours(q, k, v, sink_H=None):
    seen_BLM = kernels.visible_keys(
        kind, SimpleNamespace(diffusion_block=0, sliding_window=window),
        place_L[None], place_L[None], ids_BL, ids_BL)
    return (w * kernels.attend(q, k, v, mask_BLM=seen_BLM, sink_H=sink_H,
                               **options)).sum()

  def splash(q, k, v, sink_H=None):
    return (w * kernels.splash_attention(
        q, k, v, mask, sink_H=sink_H, interpret=True, **options)).sum()

  wrt = tuple(range(len(args)))
  models.assert_trees_close(jax.jit(jax.value_and_grad(ours, wrt))(*args),
                            jax.jit(jax.value_and_grad(splash, wrt))(*args))


@pytest.mark.parametrize('length, padded', [
    (1, 128), (200, 256), (256, 256), (2176, 2176), (2177, 2304),
    (2049, 2304)])
def test_rows_are_padded_to_blocks_where_they_are_no_lanes(length, padded):
  assert kernels._padded_length(length) == padded


@pytest.mark.parametrize('restart', [False, True])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('attention', kernels.RULES)
def test_a_kernel_is_told_of_the_same_keys(attention, causal, restart):
  """The segment ids that a fused kernel takes, with causality and the window,
  which it has itself, show what `visible` does: of packed documents of many
  sizes, one of them as long as can be, whose positions go on or begin anew."""
  kind, size = LayerKind(attention, 'gelu', causal), 4
  c = SimpleNamespace(diffusion_block=0, sliding_window=size,
                      attention_chunk=size)
  sizes = [3, 9, 1, 8, 12]
  ids = np.repeat(np.arange(1, 6), sizes)[None]
  places = np.arange(ids.size)[None]
  if restart:
    places = np.concatenate([np.arange(n) for n in sizes])[None]
    places[0, :3] += size * kernels.MOST_CHUNKS_OF_A_DOCUMENT - 3
  for segments in (ids, None):
    told = kernels.segment_ids_with_chunks(kind, c, places, segments)
    bare = dataclasses.replace(kind, attention='banded' if (
        attention == 'banded') else 'global')
    shown = kernels.visible_keys(bare, c, places, places, told, told)
    want = kernels.visible_keys(kind, c, places, places, segments, segments)
    assert (shown is None) == (want is None)
    np.testing.assert_array_equal(shown, want)


@pytest.mark.parametrize('ids', [False, True])
@pytest.mark.parametrize('in_order', [True, False])
@pytest.mark.parametrize('banded, causal', [
    ('global', True), ('global', False), ('banded', True), ('banded', False)])
def test_cudnn_is_asked_for_the_same_function(banded, causal, in_order, ids,
                                              monkeypatch):
  """By JAX's own reading of what cuDNN is given: XLA takes the same call."""
  ask = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention',
                      lambda *args, implementation, **kwargs: ask(
                          *args, implementation='xla', **kwargs))
  length, kind = 24, LayerKind(banded, 'gelu', causal)
  window = 5 if banded == 'banded' else 0
  at_BL = jnp.arange(length)[None] if in_order else (
      jnp.arange(length)[None, ::-1])
  ids_BL = (jnp.arange(length)[None] > 9).astype(int) if ids else None
  mask = kernels.Mask(ids_BL, ids_BL, causal=causal, window=window,
                      in_order=in_order)
  config = SimpleNamespace(diffusion_block=0, sliding_window=window)
  seen_BLM = kernels.visible_keys(kind, config, at_BL, at_BL, ids_BL, ids_BL)
  q, k, v = (normal(i, B, length, H, K) for i in range(3))
  models.assert_trees_close(
      kernels.attend(q, k, v, mask_BLM=seen_BLM, scale=0.2),
      kernels.cudnn_attention(q, k, v, mask, seen_BLM, scale=0.2))


@pytest.mark.parametrize('key_heads', [1, 2, 4])
def test_cudnn_on_a_mesh_equals_one_device(key_heads, monkeypatch):
  """Of heads that are split where those of the keys can be."""
  ask = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention',
                      lambda *args, implementation, **kwargs: ask(
                          *args, implementation='xla', **kwargs))
  mask = kernels.Mask(causal=True)
  arrays = [normal(i, 4, 16, heads, 8)
            for i, heads in enumerate((4, key_heads, key_heads))]

  def attend(q, k, v):
    return kernels.cudnn_attention(q, k, v, mask, None, scale=0.3)

  on_one_device = jax.jit(attend)(*arrays)
  with jax.set_mesh(make_mesh(dict(data=4, tensor=2))), (
      sharding.install_rules(tables.RULES['default'])):
    is_split = kernels._MeshLayout(*arrays[:2]).head_axes != ()
    assert is_split == (key_heads > 1)
    models.assert_trees_close(on_one_device, jax.jit(attend)(*arrays))


def _mesh(devices, **sizes):
  shape = dict.fromkeys(tables.MESH_AXES, 1) | sizes
  return Mesh(np.array(devices).reshape(tuple(shape.values())), tuple(shape),
              axis_types=(AxisType.Auto,) * len(shape))


def lowered(system, mesh, **changes):
  """The gradient of a small model, lowered for the devices of a mesh."""
  module = architectures.build(models.small_config(
      system, max_len=256, vocab_size=64, **changes))
  boxed = jax.eval_shape(module.init, jax.random.key(0),
                         models.random_tokens(1, 1))['params']
  put = lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  plain = nn.meta.unbox(boxed)
  with jax.set_mesh(mesh), sharding.install_rules(
      tables.RULES['default']):
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed))
    tokens = put(jax.ShapeDtypeStruct((8, 256), jnp.int32),
                 PartitionSpec('data'))
    loss = lambda p, t: jnp.square(module.apply({'params': p}, t).logits).sum()
    return jax.jit(jax.grad(loss)).lower(
        jax.tree.map(put, plain, specs), tokens)


def tpus(name):
  pytest.importorskip('libtpu', reason='extra `plan`')
  os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_LOG_DIR='disabled',
                    TPU_SKIP_MDS_QUERY='1')
  from jax.experimental import topologies
  return topologies.get_topology_desc(
      platform='tpu', topology_name=name).devices


# Kernel calls of a program: forward, and the gradient's two.
PROGRAMS = {
    'gpt': (dict(), 3),
    'banded': (dict(**models.window_in_every_other_layer(40), head_dim=128,
                    dtype='bfloat16'), 6),
    'dots': (dict(attention_sinks=True, remat='dots', head_dim=80,
                  attention_softcap=5.0), 3),
    'full': (dict(remat='full'), 4),  # the forward one again
    'alibi': (dict(position='alibi'), 0),
    'asked': (dict(attention_kernel='xla'), 0),
    't5': (dict(), 3),  # of cross-attention alone
}


@pytest.mark.slow
@pytest.mark.plan
@pytest.mark.parametrize('name', PROGRAMS)
def test_auto_is_splash_in_a_tpu_program(name):
  changes, calls = PROGRAMS[name]
  system = name if name in ('gpt', 't5') else 'gpt'
  mesh = _mesh(tpus('v5e:2x4'), data=4, tensor=2)
  text = lowered(system, mesh, **changes).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == calls


def _gpu(monkeypatch):
  """A GPU with cuDNN, as far as tracing and lowering look."""
  from jax._src.cudnn import fused_attention_stablehlo
  monkeypatch.setattr(sharding, 'traced_platform', lambda: 'gpu')
  monkeypatch.setattr(kernels, '_has_cudnn', lambda: True)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version',
                      lambda: 91000)


@pytest.mark.slow
@pytest.mark.parametrize('changes, call', [
    (dict(), '__cudnn$fmhaSoftmax'),
    (dict(attention='banded', sliding_window=40, num_kv_heads=2),
     '__cudnn$fmhaSoftmax'),
    (dict(attention_softcap=5.0), None), (dict(attention_dropout=0.5), None),
    pytest.param(dict(dtype='float32'), None, marks=pytest.mark.long),
], ids=str)
def test_auto_is_cudnn_in_a_gpu_program(monkeypatch, changes, call):
  _gpu(monkeypatch)
  module, params = models.make_model(**dict(dtype='bfloat16') | changes)
  loss = lambda p, t, ids: jnp.square(module.apply(
      {'params': p}, t, segment_ids_BL=ids, deterministic=False,
      rngs=dict(dropout=jax.random.key(0))).logits).sum()
  step = jax.jit(jax.grad(loss))
  tokens = models.random_tokens()
  plain, packed = (step.trace(params, tokens, ids).lower(
      lowering_platforms=('cuda',)).as_text()
                   for ids in (None, jnp.ones_like(tokens)))
  if call is None:
    assert '__cudnn' not in plain + packed
  else:
    assert plain.count(f'{call}(') == plain.count(f'{call}Backward(') == 1
    masked = call.replace('fmha', 'fmhaScaleBias')
    assert packed.count(f'{masked}(') == 1


def _refused(sentence, **changes):
  module, params = models.make_model(**changes)
  with pytest.raises(ValueError, match=sentence):
    models.logits(module, params, models.random_tokens())


@pytest.mark.slow
def test_a_named_kernel_that_cannot_is_refused(monkeypatch):
  _refused('splash, which runs on tpu, and this program is for cpu',
           attention_kernel='splash')
  _gpu(monkeypatch)
  _refused('cudnn, which computes in bfloat16, and model.dtype is float32: '
           'choose from auto, xla, splash', attention_kernel='cudnn')
  c = architectures.resolve(models.small_config(attention_kernel='cudnn',
                                                dtype='bfloat16'))
  for lengths in ((8, 7), (7, 8)):
    with pytest.raises(ValueError, match='which takes even lengths'):
      kernels.choose_attention_kernel(c, kernels.Mask(causal=True), *lengths)
  monkeypatch.setattr(sharding, 'traced_platform', lambda: 'tpu')
  c = architectures.build(models.small_config(attention_kernel='splash')).config
  for mask in (dict(in_order=False), dict(shows_later_keys=True),
               dict(has_dropout=True),
               dict(has_bias=True)):
    with pytest.raises(ValueError, match='choose from auto, xla, cudnn'):
      kernels.choose_attention_kernel(
          c, kernels.Mask(causal=True, **mask), 128, 128)
  # A row that a mesh cuts is not padded, as its shards have to be whole blocks.
  with jax.set_mesh(_mesh(jax.devices(), context=8)), (
      sharding.install_rules(
      tables.RULES['default'])), pytest.raises(ValueError, match='of 1024'):
    kernels.choose_attention_kernel(c, kernels.Mask(causal=True), 256, 256)


@pytest.mark.slow
@pytest.mark.parametrize('causal, window', [
    (True, 0), (False, 100), (False, 0)])
def test_splash_with_split_queries_equals_one_device(causal, window):
  """In interpret mode: each shard's kernel has the mask of its queries."""
  L, H, J, K = 512, 2, 1, 16
  q, k, v = (normal(i, 2, L, heads, K) for i, heads in enumerate((H, J, J)))
  ids_BL = 1 + np.int32(np.arange(L)[None] >= np.array([[150], [390]]))
  mask = kernels.Mask(ids_BL, ids_BL, causal=causal, window=window)
  def grads(q, k, v):
    return jax.value_and_grad(lambda *x: jnp.square(kernels.splash_attention(
        *x, mask, scale=0.2, interpret=True)).sum(), (0, 1, 2))(q, k, v)
  want = jax.jit(grads)(q, k, v)
  with jax.set_mesh(make_mesh(dict(data=2, context=4))), (
      sharding.install_rules(
      tables.RULES['default'])):
    models.assert_trees_close(want, jax.jit(grads)(q, k, v))
