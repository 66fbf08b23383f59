"""What is held out of several sources, figures over unequal batches, the tasks
of eval.tasks, losses at longer lengths than in training, and probes."""

import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import heads, positions
from architectures.parts.loops import LoopsConfig
from architectures.parts.positions import LearnedConfig, RopeConfig
from common.errors import RequestError
from configs import base, gpt
from tests.helpers import evaluations, models
from tests.training import vectorised_test
from training import evals, generate, objectives, parameters
from training import preflight, runs
from training.data import probes, tokenizers
from training.evals import held_out, in_training, items
from training.evals.tasks import extrapolation
from training.evals.tasks import loss as loss_task
from training.evals.tasks import probe as probe_task
from training.objectives import pipeline
from training.workdir import run_config

BYTES = tokenizers.load('bytes')
texts = vectorised_test.texts
TEXT = 'It is a law of nature that what is sown is reaped. ' * 10


@pytest.fixture
def folder(tmp_path):
  """Text of a's alone, of b's, three times as long, and of many letters."""
  (tmp_path / 'a.txt').write_text('a' * 40)
  (tmp_path / 'b.txt').write_text('b' * 120)
  (tmp_path / 'c.txt').write_text(
      ''.join(chr(97 + k * k % 26) for k in range(60)))
  return tmp_path


def config_of(folder, source, **fields):
  c = base.base()
  c.model = models.small_config(**fields)
  c.model.vocab_size = 0
  c.data.update(source=source.format(folder), holdout_every=0, length=16,
                eval_source=source.format(folder), batch_size=4,
                cache_dir=str(folder / 'cache'))
  return c


def judged(c, loss_of):
  """The figures where the loss of a target is `loss_of` its id."""
  def step(_, batch):
    weights = batch['weights']
    return {'loss': objectives.Mean(
        (loss_of(batch['targets']) * weights).sum(), weights.sum())}
  loaders = pipeline.make_evaluation_loaders(c, BYTES)
  return held_out.average_figures(held_out.sum_held_out(
      step, None, loaders, 0, runs.build(
          c, runs.resolve_model(c,
                                BYTES)[0], evaluations.one_device_mesh()).put,
      lambda: False), loaders)


def test_evaluations_share_a_program_where_its_inputs_alone_differ():
  """The programs of evaluations of runs that differ in one field each."""
  programs = {}

  def program(config):
    """Returns the program of an evaluation of a run."""
    evaluation = evals.Evaluation(
        run=types.SimpleNamespace(config=config, model=None), params=None,
        step=0, tokenizer=None, options=None, workdir=None, programs=programs)
    return evaluation.jit_once(abs, 'loss')

  config = base.base()
  first = program(config)
  for name, value in run_config.flatten(config).items():
    if name == 'model.kinds':
      continue
    others = {bool: not value, int: 7, float: 0.7, str: 'other',
              tuple: ('other',)}
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({name: others[type(value)]})
    is_traced = name in runs.TYPE_OF_TRACED_FIELD
    assert (program(other) is first) == is_traced, name


def test_a_text_that_is_named_is_evaluated_whole(folder, monkeypatch):
  """Also by a run that is evaluated on a half of what it holds out."""
  c = config_of(folder, 'text:{}/a.txt')
  c.eval.part, c.data.batch_size = 'second', 8
  monkeypatch.setattr(runs, 'load_run_config', lambda _: c)
  restored = types.SimpleNamespace(state=None, step=0,
                                   which_parameters='')
  monkeypatch.setattr(
      parameters, 'read_parameters_of_run', lambda run, **_: restored)
  evaluation = evals.load_evaluation(folder, ['loss'], None, step=None,
                                     text=f'text:{folder}/[bc].txt')
  loader, = pipeline.make_evaluation_loaders(evaluation.run.config, BYTES)
  assert loader.num_tokens == 120 + 60 + 2
  with pytest.raises(RequestError, match='its layers are run once'):
    evals.load_evaluation(folder, ['loss'], None, step=None, passes=6)
  c.model.update(loop='add', loops=dict(passes=3, gradient_passes=2))
  run = evals.load_evaluation(folder, ['loss'], None, step=None, passes=6).run
  assert run.model.part(LoopsConfig).passes == 6 and c.model.loops.passes == 3


@pytest.mark.parametrize('a, b', [(0.9, 0.1), (1, 999)])
def test_the_loss_of_a_mixture_is_the_mean_of_its_sources(folder, a, b):
  """By its weights, however long each source is; 40 a's, 120 b's and an end
  each."""
  c = config_of(folder, f'{a}*text:{{0}}/a.txt,{b}*text:{{0}}/b.txt')
  figures = judged(c, lambda ids: ids * (ids < 256))
  assert [loader.share for loader in pipeline.make_evaluation_loaders(
      c, BYTES)] == pytest.approx([a / (a + b), b / (a + b)])
  losses = [40 * 97 / 41, 120 * 98 / 121]
  assert figures[f'loss/text:{folder}/a.txt'] == pytest.approx(losses[0])
  assert figures[f'loss/text:{folder}/b.txt'] == pytest.approx(losses[1])
  assert figures['loss'] == pytest.approx(np.average(losses, weights=[a, b]))
  size = np.average([40 / 41, 120 / 121], weights=[a, b])
  assert figures['bits_per_byte'] == pytest.approx(
      figures['loss'] / math.log(2) / size)


def test_bits_per_byte_are_the_bits_of_the_text_over_its_bytes(folder):
  """A token that is a toss of a coin, of ln 2 nats, is one bit."""
  figures = judged(config_of(folder, 'text:{0}/a.txt'),
                   lambda ids: math.log(2))
  assert figures.keys() == {'loss', 'perplexity', 'bits_per_byte'}
  assert figures['bits_per_byte'] == pytest.approx(41 / 40)
  assert figures['perplexity'] == pytest.approx(2)


@pytest.mark.parametrize('batches', [0, 2])
def test_each_token_that_training_evaluates_is_of_its_document(
    tmp_path, batches, monkeypatch):
  """Of documents of one letter each, whose tokens cost by their letter; of some
  rows alone, in the order in which training has them."""
  for i in range(6):
    (tmp_path / f'{i}.txt').write_text('abcdef'[i] * (10 + 7 * i))
  c = evaluations.make_config('gpt', 'causal', num_layers=1)
  source = f'text:{tmp_path}/*.txt'
  c.data.update(source=source, eval_source=source, length=16, batch_size=3)
  c.eval.batches = batches
  of_letter = lambda ids: (ids - 96) * (ids < 256) / 10
  monkeypatch.setattr(
      loss_task, 'make_token_loss_function', lambda module, config: (
      lambda params, batch: jnp.stack([
          of_letter(batch['targets']) * batch['weights'], batch['weights']])))
  figures = evaluations.run_and_check_task('documents',
                                           evaluations.make_evaluation(c))
  loader, = pipeline.make_evaluation_loaders(c, BYTES)
  rows = [batch for batch in loader.iterate(0, loader.first(batches))]
  targets, weights = (np.concatenate([row[name].ravel() for row in rows])
                      for name in ('targets', 'weights'))
  assert figures['loss'] == pytest.approx(
      np.average(of_letter(targets), weights=weights))
  # A document's tokens, and the end of each, which costs nothing.
  letters = [(weights * (targets == 97 + i)).sum() for i in range(6)]
  tokens = lambda figures: np.array(figures['items']['loss']['weights'])
  nats_of = lambda figures: (np.array(figures['items']['loss']['scores'])
                             * tokens(figures) * weights.sum())
  nats = nats_of(figures)
  assert nats == pytest.approx(
      [n * (i + 1) / 10 for i, n in enumerate(letters) if n], rel=1e-5)
  assert sum(tokens(figures)) == pytest.approx(1)
  # As it trains, a run keeps them in its folder.
  c.eval.tasks = 'documents'
  made = evaluations.make_evaluation(c, tmp_path)
  assert in_training.TasksInTraining(made.run, made.tokenizer).run_for_member(
      made.params, 3, tmp_path, lambda: False).figures == {
          'documents/loss': figures['loss']}
  assert items.read_records(tmp_path) == {
      'documents/loss': figures['items']['loss']}
  if not batches:
    assert tokens(figures) * weights.sum() == pytest.approx(
        [n + 1 for n in letters])
    monkeypatch.setattr(loss_task, 'MOST_DOCUMENT_GROUPS', 4)  # two by two
    assert nats_of(evaluations.run_and_check_task('documents',
                                                  evaluations.make_evaluation(c))
                   ) == pytest.approx(nats.reshape(3, 2).sum(1))


@pytest.mark.long
def test_extrapolation_counts_the_tokens_that_there_are(folder, capsys):
  """61 tokens at 16 to 128 a row: each length's figure is the mean loss of
  these tokens, and past the 61st there is none."""
  c = evaluations.make_config('gpt', 'causal', position='none', num_layers=1)
  source = f'text:{folder}/c.txt'
  c.data.update(source=source, eval_source=source, length=16)
  evaluation = evaluations.make_evaluation(c, folder)
  figures = evaluations.run_and_check_task('extrapolation', evaluation)
  assert (folder / 'extrapolation.png').read_bytes().startswith(b'\x89PNG')
  end = BYTES.separator_id
  ids = np.array([end, *(folder / 'c.txt').read_bytes(), end])
  rows = {line.split()[0]: line.split()[1:]
          for line in capsys.readouterr().out.splitlines()[2:4]}
  assert rows['tokens'] == ['61'] * 4
  for place, multiple in enumerate(extrapolation.LENGTH_MULTIPLES):
    tokens = figures['texts'][str(multiple)]['tokens']
    length = 16 * multiple
    assert sum(tokens) == 61 and (np.array(tokens) > 0).sum() == min(length, 61)
    curve = np.array(figures['curves']['none'][str(multiple)])
    assert (np.isnan(curve) == (np.array(tokens) == 0)).all()
    if multiple in (1, 8):
      loss = []
      for start in range(0, 61, length):
        row = ids[start:start + length + 1]
        logits = models.logits(evaluation.run.module, evaluation.params,
                               row[None, :-1])[0]
        loss += [-jax.nn.log_softmax(logits)[i, target]
                 for i, target in enumerate(row[1:])]
      figure = figures[f'loss at {multiple} × length']
      assert figure == pytest.approx(np.mean(loss), abs=1e-4)
      assert float(rows['none'][place]) == pytest.approx(figure, abs=6e-4)


def test_which_variants_a_length_is_tried_with():
  def variants(multiple, interpolate=False, **changes):
    model = architectures.resolve(models.small_config(max_len=32, **changes))
    return positions.position_of(model).variants_for_longer_rows(
        model, 32, multiple, interpolate)

  assert list(variants(4, position='alibi')) == ['alibi']
  assert list(variants(1)) == ['learned']
  assert variants(2) == {'learned': None}
  stretched = variants(4, interpolate=True)
  assert stretched['learned'] is None
  assert stretched['learned, interpolated'].part(LearnedConfig).stretch == 4
  tried = variants(8, position='rope')
  assert list(tried) == ['rope', 'rope, linear', 'rope, ntk', 'rope, llama3',
                         'rope, yarn']
  assert tried['rope'].part(RopeConfig).scaling == 'none'
  for name, model in list(tried.items())[1:]:
    rope = model.part(RopeConfig)
    assert f'rope, {rope.scaling}' == name
    assert (rope.factor, rope.original_len) == (8, 32)
  alone = variants(8, position='rope', rope=dict(scaling='ntk', factor=2.0))
  assert list(alone) == ['rope, ntk']
  assert alone['rope, ntk'].part(RopeConfig).factor == 2


def training_config(texts, **changes):
  return vectorised_test.config(texts, **dict(
      # All that is held out, each time: so the task has the same to say.
      eval__batches=0, eval__tasks='loss', eval__tasks_every_steps=2) | changes)


def test_training_is_the_same_and_goes_on_with_the_same_figures(
    texts, tmp_path, capsys):
  plain = training_config(texts, eval__tasks='', eval__tasks_every_steps=0,
                          eval__every_steps=0)
  with_tasks = training_config(texts)
  trained, rows = vectorised_test.alone, vectorised_test.rows
  assert trained(plain, tmp_path / 'plain') == 0
  assert trained(with_tasks, tmp_path / 'run') == 0
  train = [row['loss'] for row in rows(tmp_path / 'run')]
  assert train == [row['loss'] for row in rows(tmp_path / 'plain')]
  logged = rows(tmp_path / 'run', 'eval')
  assert [(row['step'], 'loss' in row, 'loss/loss' in row) for row in logged
          ] == [(2, False, True), (4, True, True), (6, False, True),
                (8, True, True)]
  for row in logged[1::2]:
    assert row['loss/loss'] == pytest.approx(row['loss'], rel=1e-6)
  shown = capsys.readouterr().out
  assert f'step 6  loss: loss {logged[2]["loss/loss"]:.4f}' in shown
  shutil.rmtree(tmp_path / 'run/checkpoints/8')
  assert trained(with_tasks, tmp_path / 'run') == 0
  assert rows(tmp_path / 'run', 'eval') == logged


@pytest.mark.parametrize('fields, sentence', [
    (dict(eval__tasks='los'), "'los'"),
    (dict(eval__tasks='embed'), 'cannot be done there: task embed reads texts'),
    (dict(eval__tasks='routing'), 'has no experts to route to: leave routing'),
    (dict(eval__tasks='exact,probe'), 'has no targets to write: leave exact'),
    (dict(eval__best='loss/loss', eval__tasks='routing'), 'no .loss.|routing'),
])
def test_what_no_training_can_do_is_refused(texts, fields, sentence):
  with pytest.raises(RequestError, match=sentence):
    preflight.check_config(training_config(texts, **fields))


def test_levels_of_training_then_longer_rows():
  settings = probes.Settings(41, tuple(range(1, 21)), 16, 100, 100)
  cells = list(probe_task.list_cells(settings, grows=True))
  assert [cell.level for cell in cells] == [1, 5, 9, 12, 16, 20, 40, 80]
  assert [cell.length for cell in cells][-3:] == [41, 82, 164]
  fixed = list(probe_task.list_cells(settings._replace(levels=(3,)),
                                     grows=False))
  assert [tuple(cell) for cell in fixed] == [
      (3, 41, 1), (3, 82, 2), (3, 164, 4)]


def test_a_constant_answer_is_not_chosen_on_what_it_is_scored_on():
  """Of 60 answers that are alike, one stands in 2.1 % of these rows."""
  config = gpt.get_config('tiny').copy_and_resolve_references()
  config.update_from_flattened_dict({
      'objective': 'probe', 'data.source': 'probe:a5', 'data.length': 24,
      'probe.levels': (1,)})
  rows = probes.Rows(
      probes.find_probe(config),
      probes.read_settings(config)._replace(held_out=probe_task.CONSTANT_ROWS),
      'eval', 0)
  counts = np.bincount([row.targets[row.asked][0] for row in rows])
  assert counts.max() / probe_task.CONSTANT_ROWS > 1 / 60 + 0.003
  score = probe_task.score_constant_answer(config)
  assert score == pytest.approx(1 / 60, abs=0.003)


def test_counts_are_those_of_numpy():
  """A model whose answer is the token itself, or 0 at every third place."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 5, (6, 9))
  asked = rng.random((6, 9)) < 0.4
  asked[5] = False  # padding
  targets = np.where(rng.random((6, 9)) < 0.8, tokens, (tokens + 1) % 5)
  answers = np.where(np.arange(9) % 3 == 0, 0, tokens)
  output = types.SimpleNamespace(
      hidden=jax.nn.one_hot(jnp.asarray(answers), 5),
      head=heads.Head(jnp.eye(5)))
  module = types.SimpleNamespace(apply=lambda *_: output)
  objective = objectives.OBJECTIVES['probe']
  counts = jax.jit(probe_task._make_count_function(module, objective))({}, dict(
      tokens=tokens, targets=targets, weights=asked.astype(np.float32)))
  right = (answers == targets)
  assert counts.tolist() == [
      [*(right & asked).sum(1)], [*asked.sum(1)]]


@pytest.mark.slow  # it compiles a model
def test_figures_of_a_probe_add_up():
  c = evaluations.make_config('gpt', 'probe', position='none', num_layers=1)
  c.data.update(source='probe:parity', length=9, batch_size=16)
  c.probe.levels = (4, 8)
  figures = evaluations.run_and_check_task('probe',
                                           evaluations.make_evaluation(c,
                                                                       probe_rows=40))
  assert [(row['level'], row['length'], row['answers'], row['rows'])
          for row in figures['table']] == [
      (4, 9, 160, 40), (8, 9, 320, 40), (16, 18, 640, 40), (32, 36, 1280, 40)]
  assert figures['accuracy'] == np.mean(list(figures['level'].values()))
  assert len(figures['items']['accuracy']['scores']) == 80
  assert {*figures['beyond']} == {'2x', '4x'}
  assert all(row['accuracy_95'][0] <= row['accuracy'] <= row['accuracy_95'][1]
             for row in figures['table'])


@pytest.mark.parametrize('size', [2, 8])
def test_a_figure_is_of_as_many_rows_whatever_the_batch(
    size, folder, monkeypatch):
  shown = []

  def write(*args, source_BM, max_new_tokens, **how):
    shown.extend(source_BM.tolist())
    return np.zeros((size, max_new_tokens), int)

  monkeypatch.setattr(generate, 'generate', write)
  (folder / 'd.txt').write_text(TEXT)
  c = evaluations.make_config('t5', 'span')
  c.data.update(eval_source=f'text:{folder}/d.txt', batch_size=size)
  figures = evaluations.run_and_check_task('exact',
                                           evaluations.make_evaluation(c,
                                                                       targets=5))
  c.data.batch_size = 5
  first, = pipeline.make_evaluation_loaders(c, BYTES)
  assert figures['targets'] == 5 and first.num_windows > 8
  assert shown[:5] == first.batch(0)['tokens'].tolist()


@pytest.mark.slow
def test_routing_is_that_of_all_held_out_text(folder):
  c = evaluations.make_config('mixtral', 'causal', num_layers=2, num_kv_heads=2,
                              moe=dict(num_experts=4, d_ff=24))
  c.data.eval_source = f'text:{folder}/*.txt'
  figures = evaluations.run_and_check_task('routing',
                                           evaluations.make_evaluation(c,
                                                                       folder))
  assert np.shape(figures['load_E']) == (2, 4) and max(figures['dropped']) == 0
  np.testing.assert_allclose(np.sum(figures['load_E'], 1), 1, rtol=1e-5)
  assert (folder / 'routing.png').read_bytes().startswith(b'\x89PNG')
