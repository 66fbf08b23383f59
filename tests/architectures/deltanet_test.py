"""Gated DeltaNet against its definition in numpy and transformers' layer, and
what it promises: a state of one size, in which documents begin anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.recurrent import deltanet, short_conv
from architectures.parts.attention import Context
from configs import base
from configs import sharding as tables
from tests.helpers import models, recorded_deltanet
from tests.training import step_test
from training import beam, generate, runs
from training.chat import engine
from training.costs import flops, totals
from training.distributed import devices
from training.evals import scoring

SIZES = dict(key_heads=2, value_heads=4, key_dim=6, value_dim=5, conv=4)
DELTA = dict(mixer='deltanet', deltanet=SIZES)
HYBRID = dict(num_layers=4, deltanet=SIZES, pattern='delta,whole',
              kinds=dict(delta=dict(mixer='deltanet'), whole={}))
GREEDY = generate.Sampling(temperature=0)


def make(dtype='float32', seed=0, **changes):
  return models.make('llama', dtype=dtype, seed=seed, **DELTA | changes)


def layer_of(dtype='float32', **changes):
  """Returns (layer, its parameters)."""
  module, params = make(dtype, num_layers=1, deltanet=SIZES | changes)
  p = params['decoder']['layers']['block_0']['attention']
  return deltanet.DeltaNet(module.config, None), jax.tree.map(
      lambda x: x[0], p)


def applied(layer, p, x_BLD):
  return layer.apply({'params': p}, x_BLD,
                     Context(jnp.arange(x_BLD.shape[1])[None]), None)[0]


def _definition(p, x_LD, *, decay=True, negative=False, eps=1e-5):
  """One row in float64, a head and a token at a time."""
  silu = lambda x: x / (1 + np.exp(-x))
  L, H = len(x_LD), p['value'].shape[1]
  def convolved(name):
    x, w = np.einsum('ld,dhk->lhk', x_LD, p[name]), p[f'{name}_conv']
    y = np.zeros(x.shape)
    for at in range(L):
      for back in range(min(len(w), at + 1)):
        y[at] += w[len(w) - 1 - back] * x[at - back]
    return silu(y)
  q, k, v = map(convolved, ('query', 'key', 'value'))
  unit = lambda x: x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
  q, k = unit(q) / np.sqrt(q.shape[-1]), unit(k)
  rate = (1 + negative) / (1 + np.exp(-x_LD @ p['rate']))
  a = np.ones((L, H)) if not decay else np.exp(-np.exp(p['decay_scale']) * (
      np.log1p(np.exp(x_LD @ p['decay'] + p['decay_bias']))))
  y_LD = np.zeros(x_LD.shape)
  for h in range(H):
    j = h // (H // q.shape[1])
    S = np.zeros((v.shape[2], k.shape[2]))  # as the paper has it, [U, K]
    for t in range(L):
      outer = rate[t, h] * np.outer(k[t, j], k[t, j])
      S = a[t, h] * S @ (np.eye(len(outer)) - outer) + (
          rate[t, h] * np.outer(v[t, h], k[t, j]))
      o = S @ q[t, j]
      o = o / np.sqrt(np.square(o).mean() + eps) * p['out_norm']['scale']
      z = np.einsum('d,du->u', x_LD[t], p['output_gate'][:, h])
      y_LD[t] += (o * silu(z)) @ p['out'][h]
  return y_LD


@pytest.mark.parametrize('changes', [
    {}, dict(negative=True, conv=1, key_heads=4), dict(decay=False)],
                         ids=['gated', 'negative', 'deltanet'])
def test_a_layer_equals_its_definition(changes):
  layer, p = layer_of(**changes)
  x_BLD = jax.random.normal(jax.random.key(3), (2, 9, 32))
  p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  said = {k: v for k, v in changes.items() if k in ('decay', 'negative')}
  want = np.stack([_definition(p64, np.asarray(x, np.float64), **said)
                   for x in x_BLD])
  got = jax.jit(lambda p, x: applied(layer, p, x))(p, x_BLD)
  np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def test_a_layer_equals_that_of_qwen3_next():
  """Outputs and all gradients, on the same weights, of transformers' torch
  code, as they are recorded: its chunks of 64, where a row has two pieces
  here."""
  found, want = recorded_deltanet.ours(), recorded_deltanet.recorded()
  assert found.keys() == want.keys() and len(want) == 15
  errors = {name: recorded_deltanet.error(found[name], x)
            for name, x in want.items()}
  assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize('dtype, most', [('float32', 1e-5),
                                         ('bfloat16', 3e-2)])
def test_a_layer_equals_that_of_qwen3_next_live(dtype, most):
  pytest.importorskip('torch')
  pytest.importorskip('transformers.models.qwen3_next.modeling_qwen3_next')
  found, want = recorded_deltanet.ours(dtype), recorded_deltanet.theirs(dtype)
  errors = {name: recorded_deltanet.error(found[name], x)
            for name, x in want.items()}
  assert max(errors.values()) < most, errors
  if dtype == 'float32':  # and the recording is of this release
    for name, x in recorded_deltanet.recorded().items():
      assert recorded_deltanet.error(x, want[name]) < 1e-6, name


def decoded(module, params, tokens, first=6):
  """Logits by the cache: `first` tokens at once, then one by one."""
  @jax.jit
  def whole(params, tokens):
    cache = architectures.init_cache(module.config, *tokens.shape)
    out = module.apply({'params': params}, tokens[:, :first], cache=cache)
    def step(cache, i):
      token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, 1)
      out = module.apply({'params': params}, token, cache=cache,
                         positions_BL=jnp.full((1, 1), i))
      return out.cache, out.logits[:, 0]
    _, rest = jax.lax.scan(step, out.cache,
                           jnp.arange(first, tokens.shape[1]))
    return jnp.concatenate([out.logits, jnp.swapaxes(rest, 0, 1)], 1)
  return whole(params, tokens)


# In bfloat16 the forward pass itself is 5.5e-2 away from that in float32.
@pytest.mark.parametrize('dtype, rtol', [
    ('float32', 1e-5), pytest.param('bfloat16', 6e-2, marks=pytest.mark.slow)])
def test_decoding_token_by_token_is_the_forward_pass(dtype, rtol):
  module, params = make(dtype)
  tokens = models.tokens(2, 12)
  # The prompt may be shorter than the convolutions are wide.
  for first in (6, 2):
    models.close(models.logits(module, params, tokens),
                 decoded(module, params, tokens, first), rtol)


@pytest.mark.parametrize('fields', [DELTA, HYBRID], ids=['alone', 'hybrid'])
def test_packed_documents_are_those_apart(fields):
  """Neither the state nor the convolutions see over the end of one."""
  module, params = models.make('llama', **fields)
  a, b = models.tokens(1, 7, seed=4), models.tokens(1, 9, seed=5)
  apply = jax.jit(lambda t, how: models.logits(module, params, t, **how))
  packed = apply(jnp.concatenate([a, b], 1), dict(
      positions_BL=jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None],
      segment_ids_BL=jnp.array([[1] * 7 + [2] * 9])))
  models.close(jnp.concatenate([apply(a, {}), apply(b, {})], 1), packed)


def test_documents_shorter_than_the_convolution_is_wide():
  x_BLHK = jax.random.normal(jax.random.key(0), (2, 6, 1, 3))
  w_WHK = jax.random.normal(jax.random.key(1), (4, 1, 3))
  ids = jnp.array([[1, 2, 2, 3, 3, 3]])
  y, _ = short_conv.convolve(x_BLHK, w_WHK, segment_ids_BL=ids)
  apart = [short_conv.convolve(x_BLHK[:, part], w_WHK)[0]
           for part in (slice(0, 1), slice(1, 3), slice(3, 6))]
  np.testing.assert_allclose(y, jnp.concatenate(apart, 1), atol=1e-6)


@pytest.mark.parametrize('fields', [
    DELTA, pytest.param(HYBRID, marks=pytest.mark.slow)],
                         ids=['alone', 'hybrid'])
def test_prompts_of_several_lengths_go_on_as_each_would_alone(fields):
  """Their padding is no part of a state."""
  module, params = models.make('llama', **fields)
  prompts, lengths = models.tokens(2, 7), jnp.array([3, 7])
  write = lambda rows, lengths: generate.generate(
      module, params, rows, lengths, jax.random.key(0), max_new_tokens=4,
      sampling=GREEDY)
  both = write(prompts, lengths)
  alone = [write(prompts[i:i + 1, :n], jnp.array([n]))
           for i, n in enumerate((3, 7))]
  np.testing.assert_array_equal(both, jnp.concatenate(alone))
  best, _ = beam.search(module, params, prompts, lengths, max_new_tokens=4,
                        beams=beam.Beams(count=1))
  np.testing.assert_array_equal(both, best[:, 0])


@pytest.mark.slow
def test_beams_are_those_of_a_model_that_reads_each_text_anew():
  """A beam takes its state from the one that it goes on from."""
  module, params = models.make('llama', **HYBRID)
  params = jax.tree.map(lambda x: 2 * x, params)
  prompt = models.tokens(1, 5)
  texts, scores = beam.search(
      module, params, prompt, jnp.array([5]), max_new_tokens=4,
      beams=beam.Beams(count=3, length_penalty=0.0))
  for text, score in zip(texts[0], scores[0]):
    row = jnp.concatenate([prompt, text[None]], 1)
    log_p = jax.nn.log_softmax(models.logits(module, params, row))[0, 4:-1]
    assert float(log_p[jnp.arange(4), text].sum()) == pytest.approx(
        float(score), abs=1e-4)


@pytest.mark.slow
def test_a_conversation_that_changes_is_read_again_from_its_start(
    monkeypatch):
  monkeypatch.setattr(engine, 'PIECES', (1, 4, 8))
  module, params = models.make('llama', **HYBRID)
  own = engine.Engine(module, params, 24, GREEDY)
  def drawn(ids):
    tokens = jnp.array([ids])
    assert own.draw(ids) == int(models.logits(
        module, params, tokens)[0, -1].argmax())
    return own.num_read
  ids = [5, 17, 3, 44, 9, 12, 13]
  assert drawn(ids) == 7  # in pieces, the last with padding
  assert drawn([*ids, 8, 8]) == 9
  assert drawn([*ids[:4], 1]) == 14


def test_a_state_has_one_size_and_is_float32():
  c = architectures.resolve(models.config('llama', dtype='bfloat16', **DELTA))
  for length in (7, 1000):
    cache, = architectures.init_cache(c, 3, length)
    assert cache.state_BHKU.shape == (2, 3, 4, 6, 5)
    assert cache.state_BHKU.dtype == jnp.float32
    assert cache.key_BWJK.shape == (2, 3, 3, 2, 6)
    assert cache.value_BWHU.shape == (2, 3, 3, 4, 5)
  config = base.base()
  config.model = models.config('llama', dtype='bfloat16', **HYBRID)
  config.model.num_kv_heads = 4
  figures = totals.count(config, 16)
  # Of 2 of 4 layers each; a convolution keeps 3 tokens.
  assert figures['kv_cache_bytes_per_token'] == 2 * 2 * 2 * 32
  assert figures['state_bytes_per_row'] == 2 * (
      4 * 4 * 6 * 5 + 2 * 3 * (2 * 2 * 6 + 4 * 5))


def test_flops_are_those_of_the_products():
  c = models.config('llama', **DELTA)
  D, F, N, L, V = 32, 48, 2, 16, models.VOCAB
  J, H, K, U, W = 2, 4, 6, 5, 4
  weights = N * (D * (2 * J * K + 2 * H * U + 2 * H) + H * U * D
                 + W * (2 * J * K + H * U) + 3 * D * F) + D * V
  found = flops.forward_flops(c, L)
  assert found['weights'] == 2 * weights * L
  # A row of one piece: the weights, the system (less its diagonal), its
  # inverse by substitution, that with values and keys, and what is written;
  # then the state's.
  half, less = L * (L + 1) / 2, L * (L - 1) / 2
  solved = sum(i - j - 1 for i in range(L) for j in range(i))
  pieces = J * K * (half + less) + H * (2 * U + K) * half + H * solved
  assert found['attention'] == pytest.approx(
      2 * N * (pieces + 3 * H * K * U * L))
  found = flops.decode_flops(c, L)
  assert found['weights'] == 2 * weights
  assert found['attention'] == 2 * N * 3 * H * K * U
  assert found == flops.decode_flops(c, 30)  # whatever came before


@pytest.mark.slow
def test_hybrids_scan_their_period_and_decode():
  """Layers of a recurrence and of attention with rotary positions."""
  module, params = models.make('llama', **HYBRID)
  other, _ = models.make('llama', **HYBRID, scan_layers=False)
  tokens = models.tokens(2, 12)
  logits = jax.jit(lambda p: models.logits(module, p, tokens))(params)
  models.close(logits, models.logits(other, params, tokens), 2e-5)
  models.close(logits, decoded(module, params, tokens), 2e-5)
  blocks = params['decoder']['layers']
  assert 'decay_scale' in blocks['block_0']['attention']
  assert blocks['block_1']['attention']['key'].shape == (2, 32, 2, 8)
  kinds = [(row['kind'], row['kv_cache_bytes_per_token'] > 0,
            row['state_bytes_per_row'] > 0)
           for row in totals.kinds_of_layer(module.config)]
  assert kinds == [('delta', False, True), ('whole', True, False)]


def test_a_tree_of_texts_is_laid_out_as_a_row_each():
  rows = scoring.batches([scoring.Question(np.array([1, 2, 3, end]), 1)
                          for end in (4, 5)] * 4, 32, 1, 64, True)
  assert not any(shape.trees for shape, _ in rows)


@pytest.mark.slow
def test_sharded_equals_single_device(capfd):
  c = step_test.config(data__document_mask=True)
  c.model = models.config('llama', **HYBRID | dict(num_layers=2))
  c.model.num_kv_heads = 4
  single = step_test.train(c, step_test.one_device())
  c.mesh.update(tables.PRESETS['fsdp_tp'])
  run, state, metrics = step_test.train(c)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.close(single[1].params, state.params, rtol=1e-4)
  models.close(single[2], metrics, rtol=1e-4)
  p = run.shardings.params['decoder']['layers']['block_0']['attention']
  assert p['value'].spec == jax.P(None, 'fsdp', 'tensor', None)
  assert p['decay_scale'].spec == jax.P(None, 'tensor')


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('preset', ['ep', 'tp', 'ep_fsdp_tp'])
def test_a_hybrid_with_experts_is_the_same_on_a_mesh(preset, capfd):
  """Qwen3-Next: gated attention, and a shared expert that has a gate."""
  c = step_test.config()
  c.model = models.config(
      'qwen3_next', num_kv_heads=4, moe=dict(num_experts=8, top_k=3),
      deltanet=dict(key_heads=4, value_heads=8, key_dim=6, value_dim=5),
      pattern='linear,full', kinds=dict(
          linear=dict(mixer='deltanet'), full={}))
  single = step_test.train(c, step_test.one_device())
  c.mesh.update(tables.PRESETS[preset])
  _, state, metrics = step_test.train(c)
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  models.close(single[1].params, state.params, rtol=1e-4)
  for one, other in zip(single[2], metrics, strict=True):
    models.close(*({name: x for name, x in found.items()
                    if name != 'health/shard_imbalance'}  # it is of the mesh
                   for found in (one, other)), rtol=1e-4)


def test_mup_is_the_standard_form_at_its_base():
  tokens = models.tokens()
  found = [models.logits(*make(parametrization=name, mup_base_width=base),
                         tokens) for name, base in (('standard', 0),
                                                    ('mup', 32))]
  models.close(*found, 1e-6)


@pytest.mark.parametrize('system, changes, sentence', [
    ('t5', {}, 'is an encoder-decoder: choose attention'),
    ('bert', {}, 'is an encoder: choose attention'),
    ('llama', dict(attention='banded', sliding_window=4), 'has no window'),
    ('llama', dict(position='relative'), 'has no scores for the bias'),
    ('llama', dict(deltanet=dict(key_heads=3, value_heads=4)),
     'which does not divide'),
    ('llama', dict(deltanet=dict(conv=0)), 'conv is 0: it must be >= 1'),
    ('llama', dict(lora=dict(rank=2, targets='kv_up')), "'kv_up', a product"),
])
def test_what_cannot_be_is_refused(system, changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.resolve(models.config(system, **DELTA | changes))


def test_what_a_run_of_it_cannot_be_is_refused():
  module, params = models.make('llama', **HYBRID)
  c = module.config
  shape = dict.fromkeys(tables.MESH_AXES, 1)
  with pytest.raises(ValueError, match='rows stay on one device'):
    devices.check_mesh(c, 8, 1, shape | dict(context=2))
  with pytest.raises(ValueError, match='not divide model.deltanet.key_heads'):
    devices.check_mesh(c, 8, 1, shape | dict(tensor=4))
  with pytest.raises(ValueError, match='reads a row in one direction'):
    runs._check_objective('prefix', module)
  runs._check_objective('causal', module)
  with pytest.raises(ValueError, match='no attention weights to show'):
    module.apply({'params': params}, models.tokens(), keep_attention=True)
