"""The heads of tasks, against their equations in NumPy and published counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import architectures
from architectures.parts import heads
from configs.errors import RequestError
from tests.helpers import models
from training import cli
from training.costs import totals

HEADS = {'sequence': 3, 'tokens': 5, 'span': 0}


def _made(system, head, **changes):
  return models.make(system, head=head, num_labels=HEADS[head], **changes)


def _run(module, params, tokens_BL, **kwargs):
  return jax.jit(lambda p: module.apply({'params': p}, tokens_BL, **kwargs))(
      params)


def _product(params, x):
  kernel_DU = np.asarray(params['task']['kernel'])
  return np.asarray(x) @ kernel_DU + np.asarray(params['task'].get('bias', 0.0))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('shape, dtype', [
    ((3, 1), jnp.float32), ((heads.FEW,), jnp.float32),
    ((heads.FEW + 1,), jnp.float32), ((3, 1), jnp.bfloat16)])
def test_a_tied_head_reads_its_table_as_it_lies(tied, shape, dtype):
  """Where tokens are few and float32; logits and gradients stay the same."""
  table = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)
  x = jnp.array(np.random.default_rng(1).normal(size=(*shape, 8)), dtype)
  def logits(table_VD, x):
    return heads.Head(table_VD.T, jnp.arange(11.0), 0.5, tied=tied).logits(x)
  want = 0.5 * (np.asarray(x, np.float32) @ table.T + np.arange(11))
  got = logits(table, x)
  assert got.dtype == jnp.float32 and got.shape == want.shape
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
  assert ('optimization_barrier' in str(jax.make_jaxpr(logits)(table, x))) == (
      tied and dtype == jnp.float32 and math.prod(shape) <= heads.FEW)
  d_table = jax.grad(lambda t: logits(t, x).sum())(table)
  np.testing.assert_allclose(
      d_table, np.broadcast_to(0.5 * np.asarray(x, np.float32).reshape(
          -1, 8).sum(0), (11, 8)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('system, head', [
    ('bert', 'tokens'), ('llama', 'span')])
def test_each_token_is_scored_by_a_product_with_a_bias(system, head):
  module, params = _made(system, head)
  output = _run(module, params, models.tokens())
  scores = output.extra['scores']
  assert scores.shape == (2, 16, HEADS[head] or 2)
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, _product(params, output.hidden),
                             rtol=1e-4, atol=1e-5)
  assert 'bias' in params['task']
  assert not {'head', 'pooler', 'transform', 'nsp'} & params.keys()


def test_bert_scores_a_row_off_its_pooler():
  """Devlin et al. 2019, section 4: classes are read off C, the pooled [CLS]."""
  module, params = _made('bert', 'sequence')
  output = _run(module, params, models.tokens())
  first_BD = np.asarray(output.hidden[:, 0])
  pooled_BD = np.tanh(first_BD @ np.asarray(params['pooler'])
                      + np.asarray(params['pooler_bias']))
  np.testing.assert_allclose(output.extra['scores'],
                             _product(params, pooled_BD),
                             rtol=1e-4, atol=1e-5)
  assert not {'head', 'transform', 'nsp'} & params.keys()


@pytest.mark.parametrize('size, head, labels, published', [
    # transformers' num_parameters() of bert-base-uncased and gpt2.
    ('configs/bert.py:base', 'sequence', 2, 109_483_778),
    ('configs/bert.py:base', 'span', 0, 108_893_186),
    ('configs/bert.py:base', 'tokens', 9, 108_898_569),
    ('configs/gpt.py:gpt2', 'sequence', 2, 124_441_344)])
def test_parameters_are_as_many_as_published(size, head, labels, published):
  config = cli.load_config_file(size)
  config.model.update(head=head, num_labels=labels)
  counted = totals.count(config)
  assert counted['parameters'] == published
  assert counted['by_part']['task'] > 0
  assert counted['flops_per_token']['decode'] is None
  assert counted['kv_cache_bytes_per_token'] is None


def test_one_vector_tells_all_tokens_as_mads_decoder_does():
  """Of rows of 16, 9 and 2 tokens; its equations in NumPy, its sinusoids as
  published: sines, then cosines, from place 0 on."""
  module, params = models.make('llama', head='vector')
  tokens_BL = np.asarray(models.tokens(3, 16))
  lengths_B = np.array([16, 9, 2])
  ids_BL = (np.arange(16) < lengths_B[:, None]).astype(np.int32)
  output = _run(module, params, tokens_BL, segment_ids_BL=ids_BL)
  bare = models.make('llama', head='tokens', num_labels=2)[0]
  states_BLD = _run(bare, params | {'task': {
      'kernel': np.zeros((32, 2)), 'bias': np.zeros(2)}}, tokens_BL,
                    segment_ids_BL=ids_BL).hidden
  x_BD = np.asarray(states_BLD)[np.arange(3), lengths_B - 1]
  angle_L = np.arange(16)[:, None] * 10000.0 ** -(np.arange(16) / 15)
  x_BLD = x_BD[:, None] + np.concatenate([np.sin(angle_L), np.cos(angle_L)], 1)
  task = jax.tree.map(np.asarray, params['task'])

  def normed(x, name):
    y = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + module.config.norm_eps)
    return y * task[name]['scale'] + task[name].get('bias', 0.0)

  for i in range(2):
    y = normed(x_BLD, f'norm_{i}') @ task[f'kernel_{i}'] + task[f'bias_{i}']
    x_BLD = y * special.ndtr(y)
  np.testing.assert_allclose(
      output.logits, normed(x_BLD, 'norm_2') @ task['kernel'] + task['bias'],
      rtol=1e-3, atol=1e-4)


def test_the_dropout_of_a_head_is_of_what_it_is_applied_to():
  module, params = _made('gpt', 'tokens', head_dropout=0.5)
  params = jax.tree.map(jnp.zeros_like, params) | {
      'task': {'kernel': jnp.ones((32, 5)), 'bias': jnp.zeros(5)}}
  params['decoder']['final_norm']['bias'] = jnp.ones(32)
  run = lambda **kw: module.apply({'params': params}, models.tokens(), **kw)
  np.testing.assert_allclose(run().extra['scores'], 32.0)
  drawn = run(deterministic=False, rngs={'dropout': jax.random.key(0)})
  scores = np.asarray(drawn.extra['scores'])
  np.testing.assert_allclose(drawn.hidden, 1.0)
  assert (scores % 2 == 0).all() and scores.std() > 1
  assert scores.mean() == pytest.approx(32, rel=0.1)


def test_in_mup_scores_are_divided_by_the_widening():
  """Yang et al. 2022, definition 4.1, as those of a vocabulary are."""
  made = dict(head='sequence', num_labels=3, mup_base_width=16)
  module, params = models.make('gpt', parametrization='mup', **made)
  output = _run(module, params, models.tokens())
  np.testing.assert_allclose(
      output.extra['scores'], _product(params, output.hidden[:, -1]) / 2,
      rtol=1e-4, atol=1e-5)


def test_a_row_is_read_off_the_mean_of_what_is_no_padding():
  module, params = _made('bert', 'sequence', pooling='mean')
  segments_BL = (np.arange(16)[None] < [[16], [11]]).astype(int)
  output = _run(module, params, models.tokens(), segment_ids_BL=segments_BL)
  rows = [np.asarray(output.hidden[0]).mean(0),
          np.asarray(output.hidden[1, :11]).mean(0)]
  read = np.tanh(np.stack(rows) @ np.asarray(params['pooler'])
                 + np.asarray(params['pooler_bias']))
  np.testing.assert_allclose(output.extra['scores'], _product(params, read),
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('system, changes, said', [
    ('gpt', dict(head='sequence', num_labels=2, pooling='mean'),
     "pooling 'mean' has no meaning with model.arch 'gpt'"),
    ('bert', dict(head='sequence', num_labels=2, pooling='max'),
     "unknown model.pooling 'max'"),
    ('gpt', dict(head='sequence'), 'num_labels is 0: .* needs 1 or more'),
    ('gpt', dict(head='tokens'), 'num_labels is 0'),
    ('gpt', dict(head='sequnce', num_labels=2), "Did you mean 'sequence'"),
    ('gpt', dict(head='sequence,tokens', num_labels=2), 'unknown model.head'),
    ('t5', dict(head='sequence', num_labels=2), 'answers in text')])
def test_what_a_head_cannot_be_is_refused(system, changes, said):
  with pytest.raises(RequestError, match=said):
    architectures.resolve(models.config(system, **changes))
