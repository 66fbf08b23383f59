"""Masked diffusion, of whole rows and block by block: its rows, its loss, the
bound, and what it writes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import skeletons
from architectures.parts.attention import kernels
from common.errors import RequestError
from tests.helpers import data_files as files
from tests.helpers import evaluations, models
from tests.training import generate_test
from training import generate, objectives
from training.costs import flops
from training.evals.tasks import loss as loss_task
from training.objectives import causal, mlm

BYTES = files.BYTES


@pytest.fixture(name='texts')
def _texts(tmp_path, monkeypatch):
  return files.write_texts_of_letters(tmp_path, monkeypatch)


def test_a_row_masks_each_token_with_the_probability_that_it_drew():
  """What each row drew is read off its weights, 1 / t."""
  ids = np.arange(201, dtype=np.int32)
  config = files.make_run_config('', 'masked_diffusion', 200)
  shares, excess = [], []
  for seed in range(600):
    row = mlm.MaskedDiffusion().example(
        causal.Window(ids, 201), np.random.default_rng(seed), config, BYTES)
    masked = row['tokens'] == BYTES.mask_id
    assert (row['tokens'][~masked] == ids[1:][~masked]).all()
    assert (row['targets'] == ids[1:]).all()
    assert (row['weights'][~masked] == 0).all() and (
        row['segment_ids'] == 1).all()
    if not masked.any():
      continue
    t = 1 / row['weights'].max()
    assert (row['weights'][masked] == row['weights'].max()).all()
    shares.append(t)
    excess.append((masked.sum() - 200 * t) / (200 * t * (1 - t)) ** 0.5)
  # Uniform: the distance of Kolmogorov and Smirnov, by its 0.1 % quantile; and
  # the numbers of masks have the mean and the spread of a binomial's.
  steps = np.arange(1, len(shares) + 1) / len(shares)
  assert np.abs(np.sort(shares) - steps).max() < 1.95 / len(shares) ** 0.5
  assert abs(np.mean(excess)) < 4 / len(excess) ** 0.5
  assert 0.9 < np.std(excess) < 1.1


def test_each_block_of_a_row_draws_a_share_of_its_own():
  ids = np.arange(23, dtype=np.int32)
  config = files.make_run_config('', 'block_diffusion', 22)
  config.model.update(diffusion_block=4, self_conditioning=True)
  weights, estimates = [], []
  for seed in range(400):
    row = mlm.BlockDiffusion().example(
        causal.Window(ids, 23), np.random.default_rng(seed), config, BYTES)
    masked = row['tokens'] == BYTES.mask_id
    assert ((row['weights'] > 0) == masked).all()
    assert (row['targets'] == ids[1:]).all()
    shares = [set(row['weights'][b:b + 4]) - {0} for b in range(0, 22, 4)]
    assert max(map(len, shares)) == 1
    weights.append(np.minimum(row['weights'], 20))
    estimates.append(row['has_estimate'])
    if masked[:4].any() and masked[4:8].any():
      assert shares[0] != shares[1]
  # A token is masked with probability t and counts 1 / t, but for the bound.
  error = np.std(weights, 0) / 20
  assert (np.abs(np.mean(weights, 0) - 0.975) < 4.5 * error).all()
  assert 0.4 < np.mean(estimates) < 0.6


def make_block_model(size, **fields):
  """Returns a small LLaMA that denoises blocks of `size` tokens, and its
  parameters."""
  return models.make_model('llama', vocab_size=270, diffusion_block=size,
                           **fields)


def mask_by_loops(L, size):
  """Returns which keys a query sees, by the three cases of BD3-LM's mask."""
  seen = np.zeros((2 * L, 2 * L), bool)
  for q in range(2 * L):
    for k in range(2 * L):
      q_block, k_block = q % L // size, k % L // size
      if k < L:
        seen[q, k] = q < L and q_block == k_block
      else:
        seen[q, k] = k_block < q_block + (q >= L)
  return seen


@pytest.mark.parametrize('size, rule', [(1, {}), (4, {}), (5, {}), (12, {}), (
    4, dict(attention='banded', sliding_window=3)), (
        4, dict(attention='chunked', attention_chunk=6))])
def test_the_mask_of_blocks_and_how_many_pairs_it_shows(size, rule):
  L = 12
  config = architectures.resolve(
      models.small_config('llama', diffusion_block=size, **rule))
  kind = config.layer_kinds(1)[0]
  positions = jnp.arange(2 * L)[None] % L
  seen = np.asarray(kernels.visible_keys(
      kind, config, positions, positions, has_clean_copy=True)[0])
  want = mask_by_loops(L, size)
  q, k = np.divmod(np.arange(4 * L * L).reshape(2 * L, 2 * L), 2 * L)
  if rule.get('sliding_window'):
    want &= abs(q % L - k % L) < 3
  if rule.get('attention_chunk'):
    want &= q % L // 6 == k % L // 6
  np.testing.assert_array_equal(seen, want)
  assert kernels.count_useful_pairs(
      kind, config, 2 * L, 2 * L, has_clean_copy=True)[0] == want.sum()


@pytest.mark.parametrize('fields', [
    {}, dict(self_conditioning=True), dict(position='alibi'),
    dict(attention='banded', sliding_window=6), dict(num_kv_heads=1)])
def test_one_pass_over_noised_and_clean_tokens_is_block_by_block(fields):
  """Beside a cache of the clean blocks before each, with no clean copy."""
  size, L, rng = 4, 12, np.random.default_rng(0)
  module, params = make_block_model(size, **fields)
  clean = rng.integers(0, 250, (2, L)).astype(np.int32)
  noised = np.where(rng.random((2, L)) < 0.5, BYTES.mask_id, clean)
  estimate = None
  if module.config.self_conditioning:
    estimate = rng.normal(size=(2, L, module.config.d_model))
  whole = models.logits(module, params, noised, clean_BL=clean,
                        estimate_BLD=estimate)
  cache = architectures.init_cache(module.config, 2, L)
  for start in range(0, L, size):
    block = slice(start, start + size)
    options = dict(positions_BL=np.arange(start, start + size)[None],
                   cache=cache)
    if estimate is not None:
      options['estimate_BLD'] = estimate[:, block]
    alone = models.logits(module, params, noised[:, block], **options)
    np.testing.assert_allclose(whole[:, block], alone, atol=2e-5)
    cache = module.apply({'params': params}, clean[:, block], **(
        options | dict(estimate_BLD=None))).cache


def test_blocks_of_one_token_are_a_text_from_left_to_right():
  """The bound is then no bound: it is the loss, whatever is drawn."""
  module, params = make_block_model(1)
  ids, L = np.array([[10, 200, 97, 4]], np.int32), 4
  nats = 0.0
  for i in range(L):
    shown = np.append(ids[:, :i], [[BYTES.mask_id]], 1)
    logits = np.asarray(models.logits(module, params, shown)[0, -1], np.float64)
    nats += np.log(np.exp(logits).sum()) - logits[ids[0, i]]
  config = files.make_run_config('', 'block_diffusion', L)
  batch = dict(tokens=ids, targets=ids, segment_ids=np.ones_like(ids),
               weights=np.zeros((1, L), np.float32))
  program = jax.jit(
      loss_task.make_bound_function(module, config, BYTES.mask_id, 3))
  sums = np.asarray(program(params, batch, np.uint32(0)))
  assert sums[0] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize('arch, model, message', [
    ('mamba', dict(diffusion_block=4), 'left to right.*mamba'),
    ('llama', dict(diffusion_block=4, forget_gate=True), 'left to right'),
    ('llama', dict(diffusion_block=4, attention='indexed'), 'chooses the keys'),
    ('llama', dict(self_conditioning=True), 'diffusion_block is 0'),
    ('llama', dict(diffusion_block=4, mtp_depth=1), 'see later ones'),
    ('bert', dict(diffusion_block=4), 'no meaning with model.arch')])
def test_models_that_cannot_denoise_blocks_are_refused(arch, model, message):
  with pytest.raises(RequestError, match=message):
    architectures.resolve(models.small_config(arch, **model))


@pytest.mark.parametrize('objective, size, packed, message', [
    ('causal', 4, False, 'diffusion_block is 4, which objective'),
    ('block_diffusion', 0, False, 'set it to 1 or more'),
    ('block_diffusion', 4, True, 'document_mask is True, which objective')])
def test_objectives_and_blocks_go_together(objective, size, packed, message):
  config = files.make_run_config('', objective, 22, arch='llama')
  config.model.diffusion_block = size
  config.data.document_mask = packed
  with pytest.raises(RequestError, match=message):
    objectives.check_objective(config)


def test_flops_of_noised_rows_by_hand():
  """A row is read twice, its head once; the pass of the estimate has no
  gradient, and multiplies its probabilities with the embedding."""
  L, c = 12, make_block_model(4, self_conditioning=True)[0].config
  D, F, V, N = c.d_model, c.d_ff, c.vocab_size, c.num_layers
  heads = 2 * c.num_heads + 2 * c.num_kv_heads
  layer = D * c.head_dim * heads + 3 * D * F
  once = 2 * L * (2 * N * layer + D * V + 3 * D * F)
  pairs = 2 * (4 * 4 + 4 * 8 + 4 * 12)
  assert flops.training_flops(c, L) == dict(
      weights=4 * once + 2 * L * V * D,
      attention=4 * N * 4 * pairs * c.num_heads * c.head_dim)


@pytest.mark.slow
def test_the_loss_is_that_of_equation_3():
  """By numpy, over a row and a half; whatever stands in the padding."""
  module, params = models.make_model('bert', vocab_size=270)
  rng = np.random.default_rng(0)
  targets = rng.integers(0, 256, (2, 12)).astype(np.int32)
  t_B1 = np.array([[0.3], [0.8]])
  masked = rng.random((2, 12)) < t_B1
  segments = np.ones((2, 12), np.int32)
  segments[1, 6:] = 0
  masked &= segments != 0
  batch = dict(tokens=np.where(masked, BYTES.mask_id, targets),
               targets=targets, segment_ids=segments,
               weights=(masked / t_B1).astype(np.float32))
  objective = objectives.OBJECTIVES['masked_diffusion']
  config = files.make_run_config('', 'masked_diffusion', 12)
  whole = objective.weights(batch)

  @jax.jit
  def judge(batch):
    output = objective.apply(module, params, batch)
    return (output.logits, objective.figures(output, batch, config),
            objective.loss(output, batch, config, whole)[0])

  logits, figures, _ = jax.device_get(judge(batch))
  figures, logits = objective.means(figures), logits.astype(np.float64)
  nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
      logits, targets[..., None], -1)[..., 0]
  want = sum((nats[b] * masked[b]).sum() / t_B1[b, 0] for b in range(2)) / 18
  assert figures['loss'] == pytest.approx(want, rel=1e-5)
  # A micro-batch counts by its tokens, not by how many are masked.
  halves = [{key: x[b:b + 1] for key, x in batch.items()} for b in range(2)]
  shares = [judge(half)[2] for half in halves]
  assert sum(shares) / whole['loss'] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('system, objective, model', [
    ('bert', 'masked_diffusion', {}),
    ('llama', 'block_diffusion', dict(diffusion_block=3))])
def test_the_bound_is_the_loss_of_a_text_in_a_random_order(
    system, objective, model):
  """Of three tokens there are six orders, of which every conditional is one of
  the model's (LLaDA, appendix A.2). One block is a row of masked diffusion."""
  module, params = models.make_model(system, vocab_size=270, **model)
  ids, L = np.array([10, 200, 97], np.int32), 3
  segments = np.ones((1, L), np.int32)
  logits_of = jax.jit(lambda shown: models.logits(
      module, params, shown, segment_ids_BL=segments)[0])
  nats = {}  # of token i where the tokens of a set are masked
  for hidden in itertools.product((False, True), repeat=L):
    shown = np.where(hidden, BYTES.mask_id, ids)[None]
    logits = np.asarray(logits_of(shown), np.float64)
    nats[hidden] = np.log(np.exp(logits).sum(-1)) - logits[range(L), ids]
  orders = []
  for order in itertools.permutations(range(L)):
    hidden, total = [True] * L, 0.0
    for i in order:
      total += nats[tuple(hidden)][i]
      hidden[i] = False
    orders.append(total)
  config = files.make_run_config('', objective, L)
  rows = 512
  batch = dict(tokens=np.tile(ids, (rows, 1)), targets=np.tile(ids, (rows, 1)),
               segment_ids=np.ones((rows, L), np.int32),
               weights=np.zeros((rows, L), np.float32))
  program = jax.jit(
      loss_task.make_bound_function(module, config, BYTES.mask_id, 6))
  sums = np.asarray(program(params, batch, np.uint32(0)), np.float64)
  assert sums[[1, 4, 5]].tolist() == [rows * L, rows * L ** 2, rows]
  bound = sums[0] / rows
  # A third of the draws masks one, two or three of the three tokens; which
  # ones is chance, whose spread says how far their mean may be away.
  kinds = [[nats[hidden][list(hidden)].sum() * L / sum(hidden)
            for hidden in nats if sum(hidden) == many] for many in (1, 2, 3)]
  assert np.mean([np.mean(x) for x in kinds]) == pytest.approx(np.mean(orders))
  error = (np.mean([np.var(x) for x in kinds]) / (rows * 6)) ** 0.5
  assert bound == pytest.approx(np.mean(orders), abs=4 * error)
  # Every row is the same text, so that they differ by their draws alone.
  estimate = loss_task.standard_error_of_bound(*sums) * L
  assert estimate < 1.1 * error < 0.01 * np.mean(orders)
  if system == 'bert':
    assert np.ptp([np.mean(x) for x in kinds]) > 8 * error


def test_the_error_of_a_bound_is_that_of_a_ratio_over_rows():
  rng = np.random.default_rng(0)
  errors, ratios = [], []
  for _ in range(400):
    n = rng.integers(5, 20, 60).astype(float)
    x = n * rng.normal(2, 0.3, 60)
    ratios.append(x.sum() / n.sum())
    errors.append(loss_task.standard_error_of_bound(
        x.sum(), n.sum(), (x ** 2).sum(), (x * n).sum(), (n ** 2).sum(), 60))
  assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)
  assert np.isnan(loss_task.standard_error_of_bound(3.0, 2.0, 9.0, 6.0, 4.0, 1))


def by_numpy(module, params, prompt, new, steps, mask):
  """Algorithm 5 for one row, the likeliest token each time."""
  ids, L = np.array([*prompt, *[mask] * new]), len(prompt)
  logits_of = jax.jit(lambda ids: models.logits(
      module, params, ids[None],
      segment_ids_BL=np.ones((1, len(ids)), np.int32))[0])
  for s in range(1, steps + 1):
    logits = np.array(logits_of(ids), np.float64)
    logits[:, mask] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    masked = np.flatnonzero(ids == mask)
    sure = masked[np.argsort(-p[masked].max(-1), kind='stable')]
    stay = sure[:new * s // steps - (new - len(masked))]
    ids[stay] = p[stay].argmax(-1)
  return ids[L:]


@pytest.mark.slow
def test_what_it_is_surest_of_stays():
  """Prompts of two lengths, each as it would be alone, beside numpy."""
  module, params = models.make_model('bert', vocab_size=270)
  prompts = [[5, 9, 70, 8], [200, 3]]
  padded = np.array([[5, 9, 70, 8], [200, 3, 0, 0]], np.int32)
  write = jax.jit(lambda params: generate.generate_by_unmasking(
      module, params, jnp.asarray(padded), jnp.array([4, 2]),
      jax.random.key(0), new=7, steps=3, mask=BYTES.mask_id,
      temperature=0.0))
  got = np.asarray(write(params))
  for row, prompt in zip(got, prompts):
    want = by_numpy(module, params, prompt, 7, 3, BYTES.mask_id)
    assert row.tolist() == want.tolist()
    assert BYTES.mask_id not in row


@pytest.mark.slow
@pytest.mark.parametrize('conditions', [False, True])
def test_blocks_are_written_one_after_another(conditions):
  """Prompts of two lengths, each as it would be alone, beside the one pass over
  noised and clean tokens that has no cache."""
  size, new, steps = 4, 7, 3
  module, params = make_block_model(size, self_conditioning=conditions)
  prompts = [[5, 9, 70, 8, 31, 7], [200, 3]]
  padded = np.array([prompts[0], [200, 3, 0, 0, 0, 0]], np.int32)
  got = np.asarray(jax.jit(lambda params: generate.generate_by_blocks(
      module, params, jnp.asarray(padded), jnp.array([6, 2]),
      jax.random.key(0), new=new, steps=steps, mask=BYTES.mask_id,
      temperature=0.0))(params))

  @jax.jit
  def denoise(noised, clean, estimate):
    output = module.apply({'params': params}, noised, clean_BL=clean,
                          estimate_BLD=estimate)
    if not conditions:
      return output.logits, None
    return output.logits, skeletons.embed_predictions(
        module.config, params, output)

  for row, prompt in zip(got, prompts):
    text = np.array([[*prompt, *[BYTES.mask_id] * (16 - len(prompt))]])
    for start in range(0, len(prompt) + new, size):
      block = np.arange(start, start + size)
      to_write = (text[0, block] == BYTES.mask_id).sum()
      estimate = np.zeros((1, 16, module.config.d_model)) if conditions else (
          None)
      for step in range(1, steps + 1):
        logits, estimate = denoise(text, text, estimate)
        logits = np.array(logits[0, block], np.float64)
        logits[:, BYTES.mask_id] = -np.inf
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        masked = np.flatnonzero(text[0, block] == BYTES.mask_id)
        sure = masked[np.argsort(-p[masked].max(-1), kind='stable')]
        stay = sure[:to_write * step // steps - (to_write - len(masked))]
        text[0, block[stay]] = p[stay].argmax(-1)
    assert row.tolist() == text[0, len(prompt):len(prompt) + new].tolist()


def _draws(logits_V, new=12, steps=1, seed=0, temperature=1.0):
  """Returns 100 texts of a model that says the same of every place; its last
  token is the mask."""
  V = len(logits_V)
  module, params = models.make_bigram(np.tile(logits_V, (1, V, 1)))
  return np.asarray(jax.jit(lambda key: generate.generate_by_unmasking(
      module, params, jnp.zeros((100, 1), jnp.int32), jnp.ones(100, jnp.int32),
      key, new=new, steps=steps, mask=V - 1, temperature=temperature))(
          jax.random.key(seed)))


def test_each_token_is_a_draw_of_its_own():
  """By its probability over the temperature, and never the mask, however
  likely; another key is another text."""
  logits_V = np.array([0.5, -1.0, 1.0, 0.0, 3.0])
  weight_V = np.exp(logits_V / 0.7) * (np.arange(5) < 4)
  p_V = weight_V / weight_V.sum()
  text = _draws(logits_V, temperature=0.7)
  generate_test.chance(text, p_V)
  generate_test.alike(text, _draws(logits_V, temperature=0.7, seed=1), p_V)


def test_each_step_has_draws_of_its_own():
  """The first three of twelve tokens, all alike sure, are those of one step;
  the others are as like them as chance has it."""
  at_once, in_four = (_draws(np.zeros(5), steps=steps) for steps in (1, 4))
  p_V = np.array([0.25] * 4)
  generate_test.chance(in_four, p_V)
  np.testing.assert_array_equal(in_four[:, :3], at_once[:, :3])
  generate_test.alike(in_four[:, 3:], at_once[:, 3:], p_V)


@pytest.mark.slow
@pytest.mark.parametrize('system, objective, model', [
    ('bert', 'masked_diffusion', {}),
    ('llama', 'block_diffusion', dict(diffusion_block=4,
                                      self_conditioning=True))])
def test_tasks_tell_the_bound_and_write(
    texts, capsys, system, objective, model):
  """The draws of many masks are near the one that an evaluation has."""
  config = evaluations.make_config(system, objective, num_layers=1, **model)
  config.data.update(source=texts, eval_source=texts, holdout_every=0,
                     batch_size=32)
  evaluation = evaluations.make_evaluation(
      config, bound_samples=4, prompt='aa|||b', max_new_tokens=5,
      diffusion_steps=2)
  plain = evaluations.run_and_check_task('loss', evaluation)
  figures = evaluations.run_and_check_task('diffusion_bound', evaluation)
  assert figures['loss'] == pytest.approx(plain['loss'], rel=0.2)
  assert figures['bits_per_byte'] / figures['loss'] == pytest.approx(
      plain['bits_per_byte'] / plain['loss'], rel=1e-5)
  assert figures['tokens'] == plain['tokens'] and figures['samples'] == 4
  assert 0 < figures['standard_error'] < figures['loss']
  # The draws of a row are those of every evaluation and batch.
  config.data.batch_size = 3
  again = evaluations.run_and_check_task('diffusion_bound',
                                         evaluations.make_evaluation(
      config, bound_samples=4))
  assert again == pytest.approx(figures, rel=1e-5)
  written = evaluations.run_and_check_task('diffusion_samples', evaluation)
  assert [row['prompt'] for row in written['samples']] == ['aa', 'b']
  assert 'sample 2 of 2:\nb' in capsys.readouterr().out
