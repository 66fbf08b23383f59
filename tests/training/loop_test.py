"""The rules of the training loop, with a program that computes nothing: what
is dispatched, read, saved and evaluated, and how each member ends."""

import contextlib
import json
import math
import types

import jax
import jax.numpy as jnp
import pytest

from common.errors import RequestError
from configs import base
from training import begin, description, hook, hooks, loop, objectives
from training import parameters, preflight, program, steps, writer
from training.distributed import signals
from training.evals import held_out, in_training
from training.workdir import checkpoints, metrics

STEPS = 6


class Fake(program.Program):
  """What a run is to the loop; the state is how many steps were taken.

  Args:
    rows: for each run {step: figures that differ from a good step's}.
    config: of each run.
  """

  def __init__(self, rows, config):
    self.rows, self.done = rows, []
    super().__init__(types.SimpleNamespace(
        config=config, model=types.SimpleNamespace(dtype='float32'),
        parameters_to_evaluate=lambda state: 'average'), self.own)
    if len(rows) > 1:
      self.figures = {'runs_at_once': len(rows)}

  devices = ()
  own = ()  # hooks beside the usual ones

  def make_train_step(self):
    return _Compiled(self._train)

  def make_eval_step(self):
    return _Compiled(lambda params, batches: None)

  def context(self):
    return contextlib.nullcontext()

  def put(self, *batches):
    return batches

  def _train(self, state, batches):
    self.done.append(('dispatch', state.step + 1))
    each = [dict(loss=1.0, param_norm=1.0, bad_in_row=0) | row.get(
        state.step + 1, {}) for row in self.rows]
    return _state(state.step + 1), {
        name: jnp.array([row[name] for row in each]) for name in each[0]}

  def split_by_run(self, state):
    step = getattr(state, 'step', None)  # of a state, and not of parameters
    return [(row, step) for row in range(len(self.rows))]

  def figures_of_run(self, figures, row):
    if row == 0 and 'loss' in figures:
      self.done.append(('read', self.done[-1][1]))
    return {name: x[row] for name, x in figures.items()}


class _Compiled:

  def __init__(self, call):
    self._call = call

  def lower(self, *args):
    return self

  def compile(self):
    return self._call


def _state(step):
  return types.SimpleNamespace(step=step, params='live')


class Loader:
  objective = objectives.OBJECTIVES['causal']
  tokenizer = None

  def batch(self, n):
    return {}

  def iterate(self, start, stop):
    for n in range(start, stop):
      yield self.batch(n)


class Saved:
  """Checkpoints that are due at some steps; notes what is saved."""

  def __init__(self, due=()):
    self.saves, self.newest, self.best, self._due = [], None, None, due

  def is_due(self, step):
    return step in self._due

  def save(self, step, state, *, next_batch, tokens, config, good, best):
    assert (next_batch, tokens) == (step, 4 * step)
    self.saves.append((step, state, good))
    self.newest, self.best = step, best

  def wait(self):
    pass


@pytest.fixture(name='train')
def _train(tmp_path, monkeypatch):
  """Returns a function that trains; see `Fake`."""
  monkeypatch.setattr(
      steps.flops, 'training_flops_of_row',
      lambda config, model, lengths: {'weights': float(sum(lengths))})
  monkeypatch.setattr(description, 'describe_run', lambda *_, **__: 'a program')

  def train(*rows, due=(), stop=None, start=0, best=None, **fields):
    config = base.base()
    config.train.update(steps=STEPS, max_bad_steps=2)
    config.data.update(batch_size=1, length=4)
    config.eval.every_steps = 0
    config.log.every_steps = 1
    config.update_from_flattened_dict(
        {name.replace('__', '.'): value for name, value in fields.items()})
    if stop is not None:
      monkeypatch.setattr(signals.Stop, 'should_stop', lambda _, n: n == stop)
    fake = Fake(rows, config)
    several = len(rows) > 1
    members = [loop.RunWriter(config, tmp_path / str(i), Saved(due),
                              f'run {i}' if several else '')
               for i in range(len(rows))]
    for member in members:
      member.saved.best = best
    n = loop.train_runs(fake, members, _state(start), start,
                        [Loader()], [Loader()])
    return n, members, fake

  return train


def _rows(member, split):
  lines = (member.workdir / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['split'] == split]


def _steps(member, split='train'):
  return [row['step'] for row in _rows(member, split)]


def bad(*steps):
  """Figures of steps in a row that were bad."""
  return {step: dict(bad_in_row=i) for i, step in enumerate(steps, 1)}


def test_a_step_is_dispatched_before_the_one_before_it_is_read(train):
  n, (member,), program = train({})
  assert n == STEPS
  assert program.done == [('dispatch', 1)] + [
      each for n in range(2, STEPS + 1)
      for each in (('dispatch', n), ('read', n))] + [('read', STEPS)]
  assert member.code == 0 and not member.sentence
  assert _steps(member) == [1, 2, 3, 4, 5, 6]
  assert member.saved.saves == [(6, (0, 6), True)]


def test_too_many_bad_steps_are_saved_as_bad_and_end_the_run(train):
  """The second is read when step 5 is under way, which is saved, and counts
  no more: it would be good."""
  n, (member,), _ = train(bad(3, 4))
  assert (n, member.code) == (5, loop.DIVERGED)
  assert member.saved.saves == [(5, (0, 5), True)]
  assert '2 steps in a row' in member.sentence
  assert 'newest checkpoint is of step 5' in member.sentence
  n, (member,), _ = train(bad(3, 4, 5))
  assert member.saved.saves == [(5, (0, 5), False)]
  assert '2 steps in a row' in member.sentence


def test_parameters_that_are_not_finite_are_not_saved(train, capsys):
  """A last step that makes them so has diverged, without one bad step."""
  nan = dict(param_norm=math.nan)
  n, (member,), _ = train({5: nan, 6: nan}, due=(4, 5))
  assert (n, member.code) == (STEPS, loop.DIVERGED)
  assert member.saved.saves == [(4, (0, 4), True)]
  assert 'after the last step, 6' in member.sentence
  assert 'newest checkpoint is of step 4' in member.sentence
  assert 'step 5 is not saved' in capsys.readouterr().out


def test_a_stop_saves_and_says_what_the_run_goes_on_from(train):
  n, (member,), _ = train({}, stop=3)
  assert (n, member.code) == (3, loop.STOPPED)
  assert member.saved.saves == [(3, (0, 3), True)]
  assert member.sentence == (
      'stopped after step 3, saved: the same command goes on from it.')
  n, (member,), _ = train({3: dict(param_norm=math.nan)}, stop=3, due=(2,))
  assert member.sentence == (
      'stopped after step 3, not saved: the same command goes on from step 2.')
  n, (member,), _ = train({}, stop=STEPS)
  assert (n, member.code) == (STEPS, 0)


def test_a_member_that_ends_leaves_the_others_alone(train):
  n, members, program = train({}, bad(2, 3), {}, due=(2,))
  assert [m.code for m in members] == [0, loop.DIVERGED, 0]
  assert [_steps(m)[-1] for m in members] == [6, 4, 6]
  assert [m.saved.saves for m in members] == [
      [(2, (row, 2), row != 1), (last, (row, last), True)]
      for row, last in ((0, 6), (1, 4), (2, 6))]
  n, members, _ = train(bad(2, 3), bad(3, 4))
  assert [m.code for m in members] == [loop.DIVERGED] * 2
  assert n == 5  # where the last one ended


def _signal(monkeypatch, at_once):
  """Lets a signal be there where `at_once`, of the step that was asked about,
  says so."""
  asked = [0]
  monkeypatch.setattr(signals.Stop, 'should_stop', lambda self, step: (
      asked.append(step)))
  monkeypatch.setattr(signals.Stop, 'can_stop_at_once', property(
      lambda self: at_once(asked[-1])))


@pytest.mark.parametrize('at, done', [
    (4, [2]), (STEPS, [2, 4, STEPS]), (None, [2, 4, STEPS])])
def test_a_signal_cuts_tasks_short_and_leaves_no_part(
    train, monkeypatch, at, done):
  """Of two members the first is through when the signal comes."""
  monkeypatch.setattr(
      in_training.TasksInTraining, 'run_for_member',
      lambda self, params, n, workdir, stop: (
          None if params[0] == 1 and stop() else
          in_training.TaskResults({'x/score': n + params[0]}, [])))
  _signal(monkeypatch, lambda step: step == at)
  n, members, program = train(
      {}, {}, eval__tasks='x', eval__tasks_every_steps=2)
  assert n == (at or STEPS)
  for row, member in enumerate(members):
    assert _rows(member, 'eval') == [
        {'step': step, 'split': 'eval', 'x/score': step + row}
        for step in done]
    assert member.saved.newest == n


def _scores(monkeypatch, *scores):
  """Lets the evaluation after step n find scores[row][n - 1]."""
  monkeypatch.setattr(
      in_training.TasksInTraining, 'run_for_member',
      lambda self, params, n, workdir, stop: (
          in_training.TaskResults({'x/f1': scores[params[0]][n - 1]}, [])))
  monkeypatch.setattr(in_training.TasksInTraining, 'list_figure_names',
                      lambda *_, **__: None)


BEST = dict(eval__tasks='x', eval__tasks_every_steps=1, eval__best='x/f1')


def test_the_best_step_is_saved_when_it_is_the_best_so_far(train, monkeypatch):
  _scores(monkeypatch, [math.nan, 0.3, 0.2, 0.3, 0.4, 0.1])
  _, (member,), _ = train({}, **BEST)
  assert [step for step, *_ in member.saved.saves] == [2, 5, 6]
  assert member.saved.best == dict(figure='x/f1', largest=True, step=5,
                                   value=0.4, waited=1, seen=6)
  _, (member,), _ = train({}, **BEST, eval__best_is='least')
  assert [step for step, *_ in member.saved.saves] == [2, 3, 6]


def test_a_run_that_waits_in_vain_ends_early(train, monkeypatch):
  """Each member by its own figures; an equal one is no better."""
  _scores(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.4, 0.5],
          [0.1, 0.2, 0.3, 0.1, 0.4, 0.3], [0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
  n, members, _ = train({}, {}, {}, **BEST, eval__patience=2)
  assert n == STEPS
  assert [m.code for m in members] == [loop.ENDED_EARLY, 0, loop.ENDED_EARLY]
  assert [m.saved.newest for m in members] == [4, 6, 3]
  assert members[0].sentence == (
      'ended early after step 4: x/f1 has not been better in 2 evaluations in '
      'a row (eval.patience); the best is 0.3, of step 2')
  assert _steps(members[2]) == [1, 2, 3]
  n, (member,), _ = train({}, **BEST, eval__patience=2)
  assert (n, member.code) == (4, loop.ENDED_EARLY)


@pytest.mark.parametrize('stop', [2, 3, 5])
def test_a_run_that_goes_on_decides_as_without_the_break(
    train, monkeypatch, stop):
  """Also where the signal falls on an evaluation, which is then done late."""
  _scores(monkeypatch, [0.3, 0.2, 0.35, 0.1, 0.1, 0.1])
  fields = BEST | dict(eval__patience=2)
  whole = train({}, **fields)[1][0]
  assert (whole.saved.newest, whole.best.step) == (5, 3)
  _, (first,), _ = train({}, **fields, stop=stop)
  assert first.code == loop.STOPPED and first.best.seen == stop - 1
  monkeypatch.setattr(signals.Stop, 'should_stop', lambda self, n: False)
  n, (member,), _ = train({}, **fields, start=stop, best=first.saved.best)
  assert (n, member.code) == (5, loop.ENDED_EARLY)
  assert member.best == whole.best and member.sentence == whole.sentence


def test_the_experts_panel_is_over_the_steps_since_the_last_report(
    train, monkeypatch):
  windows = []
  monkeypatch.setattr(hooks.routing, 'summarize_window', lambda load, tokens: (
      windows.append(tokens.tolist()) or {}))
  figures = {n: {'health/load_E': [n], 'health/tokens': n}
             for n in range(1, STEPS + 1)}
  train(figures, log__every_steps=4)
  assert windows == [[1, 2, 3, 4], [5, 6]]


def test_live_figures_are_of_the_parameters_themselves(train, monkeypatch):
  seen = []
  monkeypatch.setattr(
      held_out, 'sum_held_out', lambda *_, params, batches, **__: (
          seen.append((params, batches)) or [{'nll': [float(len(seen))]}]))
  monkeypatch.setattr(held_out, 'average_figures', lambda sums, _: {
      'loss': sums[0]['nll']})
  _, (member,), _ = train({}, eval__every_steps=STEPS, eval__live=True,
                          eval__batches=7)
  row, = _rows(member, 'eval')
  assert seen == [('average', 7), ('live', 7)]
  assert (row['loss'], row['live/loss']) == (1, 2)


@pytest.mark.parametrize('changes, code', [
    ([], loop.DIVERGED), (['optim.lr'], 0)])
def test_a_run_that_diverged_goes_on_with_another_config_alone(
    changes, code, monkeypatch):
  config = base.base()
  restored = checkpoints.RestoredCheckpoint(
      step=6, damaged=(), record=dict(next_batch=6, environment={}),
      state=types.SimpleNamespace(step=6, bad_in_row=10))
  monkeypatch.setattr(parameters, 'restore_run', lambda *_: restored)
  start = begin.find_starting_point(
      types.SimpleNamespace(config=config, changes=changes, workdir=''), None,
      types.SimpleNamespace(best=None))
  assert (start.code, start.step) == (code, 6)


BOTH = dict(eval__every_steps=2, eval__tasks='x', eval__tasks_every_steps=2)


@pytest.fixture(name='cheap')
def _cheap(monkeypatch):
  monkeypatch.setattr(held_out, 'sum_held_out', lambda *_, stop, **__: (
      None if stop() else [{'nll': [1.0, 1.0]}]))
  monkeypatch.setattr(held_out, 'average_figures', lambda sums, _: {
      'loss': sums[0]['nll']})
  monkeypatch.setattr(
      in_training.TasksInTraining, 'run_for_member',
      lambda self, params, n, workdir, stop: (
          None if stop() else in_training.TaskResults({'x/score': n}, [])))


@pytest.mark.parametrize('rows, stop', [(1, 3), (2, 4)])
def test_no_row_is_missing_and_none_is_there_twice(
    train, cheap, monkeypatch, stop, rows):
  """Whether or not an evaluation was due when the signal came."""
  train(*[{}] * rows, stop=stop, **BOTH)
  monkeypatch.setattr(signals.Stop, 'should_stop', lambda self, n: False)
  n, members, _ = train(*[{}] * rows, start=stop, **BOTH)
  assert n == STEPS
  for member in members:
    assert [(row['step'], row['loss'], row['x/score'])
            for row in _rows(member, 'eval')] == [
                (2, 1.0, 2), (4, 1.0, 4), (6, 1.0, 6)]


@pytest.mark.parametrize('held_out_every, tasks_every', [
    (0, 0), (0, 2), (2, 0), (3, 4)])
def test_what_is_evaluated_has_its_own_steps(train, cheap, held_out_every,
                                             tasks_every):
  """The tasks also come after the last step; the loss only if it was asked."""
  _, (member,), _ = train(
      {}, eval__tasks='x', eval__every_steps=held_out_every,
      eval__tasks_every_steps=tasks_every)
  rows = _rows(member, 'eval')
  for figure, every in ('loss', held_out_every), ('x/score', tasks_every):
    due = [n for n in range(1, STEPS) if every and n % every == 0]
    if every or figure == 'x/score':
      due.append(STEPS)
    assert [row['step'] for row in rows if figure in row] == due


@pytest.mark.parametrize('every', [0, 1, 2, 4, 5, STEPS, 99])
def test_a_rehearsal_counts_the_evaluations_that_a_run_makes(train, cheap,
                                                             every):
  _, (member,), _ = train({}, eval__every_steps=every)
  data = [types.SimpleNamespace(first=lambda most: 3),
          types.SimpleNamespace(first=lambda most: 4)]
  assert loop._count_eval_batches(member.config, data) == 7 * len(
      _steps(member, 'eval'))


def test_a_rehearsal_says_how_long_a_run_takes(train, monkeypatch):
  """By the median of the steps after the first, which is slow."""
  seconds = iter([9.0, 2.0, 4.0, 3.0, 30.0, 3.0, 0.5])
  config = base.base()
  config.train.steps = 100
  config.data.update(batch_size=1, length=4)
  config.eval.update(every_steps=50, batches=2)
  monkeypatch.setattr(loop, 'Program', lambda run, hooks: Fake([{}], config))
  monkeypatch.setattr(Fake, 'new_state', lambda self: _state(0))
  monkeypatch.setattr(loop.CompiledPerShape, 'run_timed', lambda *_: (
      (_state(0), None), next(seconds)))
  monkeypatch.setattr(
      loop.CompiledPerShape, 'bytes_per_device', lambda self: 2**30)
  data = types.SimpleNamespace(first=lambda most: most, batch=lambda n: {})
  lines = loop.rehearse_run(
      types.SimpleNamespace(config=config), Loader(), [data])
  assert lines[1:] == [
      'a step: 3 s, 1 tokens/s, 1.00 GiB on each device',
      'about 302 s in all, without saving and eval.tasks: steps 0:05:00, '
      'evaluating 0:00:02, compiling 0:00:00']


def test_a_step_of_a_ramp_is_as_much_work_as_it_has_rows(train, monkeypatch):
  config = base.base()
  config.data.update(batch_size=4, length=4, batch_ramp='2:1,4:2')
  config.train.steps = STEPS
  monkeypatch.setattr(Loader, 'batch', lambda *_: dict(tokens=jnp.ones((1, 4))))
  batches = steps.TrainingBatches(Fake([{}], config), [Loader()], 1)
  noted = []
  monkeypatch.setattr(batches.meter, 'note_work',
                      lambda step, tokens, flops: noted.append((step, tokens)))
  batches.start_streams(0)
  for n in range(STEPS):
    batches.batch_after(n)
  assert noted == [(1, 4), (2, 4), (3, 8), (4, 8), (5, 16), (6, 16)]
  assert [batches.tokens_before(n) for n in range(STEPS)] == [
      0, 4, 8, 16, 24, 40]


def test_a_signal_meanwhile_trains_no_further(
    train, cheap, monkeypatch):
  """Otherwise the evaluation of that step would never be done."""
  train({}, stop=4, **BOTH)
  _signal(monkeypatch, lambda step: True)
  n, (member,), program = train({}, start=4, **BOTH)
  assert (n, member.code) == (4, loop.STOPPED)
  assert not program.done and _steps(member) == [1, 2, 3, 4]
  _signal(monkeypatch, lambda step: False)
  n, (member,), _ = train({}, start=4, **BOTH)
  assert _steps(member, 'eval') == [2, 4, 6]


def config(**fields):
  c = base.base()
  c.eval.update(fields)
  return c


@pytest.mark.parametrize('field, value, other, read', [
    ('eval.best_is', 'least', 'eval.best', 'loss'),
    ('eval.patience', 3, 'eval.best', 'loss'),
    ('eval.live', True, 'optim.ema', 0.9),
    ('init_partial', True, 'init_from', 'a'),
    ('log.wandb_project', 'a', 'log.wandb', True),
    ('log.trackio_project', 'a', 'log.trackio', True),
    ('train.mtp_weight', 0.5, 'model.mtp_depth', 1)])
def test_a_field_is_refused_where_nothing_reads_it(field, value, other, read):
  c = base.base()
  c.update_from_flattened_dict({field: value})
  message = f'{field} is {value!r}, which is not read while {other} is not set'
  with pytest.raises(RequestError, match=message):
    preflight.check_config(c)
  c.update_from_flattened_dict({other: read})
  try:
    preflight.check_config(c)
  except RequestError as error:  # of a tracker that is not installed
    assert 'is not read' not in str(error)


@pytest.mark.parametrize('fields, words', [
    (dict(best='labels/f1'), "eval.tasks has no 'labels': it has none"),
    (dict(best='loss', every_steps=0), 'eval.every_steps is 0: nothing'),
    (dict(best='labels/f1', tasks='loss, labels', patience=2),
     'eval.patience 2, but eval.tasks_every_steps is 0'),
    (dict(best='surprise'), 'set eval.best_is to least or largest'),
    (dict(best='extrapolation/loss', tasks='extrapolation'),
     'the figures of task extrapolation are length')])
def test_a_best_that_cannot_be_meant_is_refused(fields, words):
  with pytest.raises(RequestError, match=words):
    preflight.check_config(config(**fields))


def test_another_figure_begins_anew():
  kept = writer.BestEvaluation('loss', False, 1, 4, 0.5, 3).record()
  assert writer.BestEvaluation.begin_or_resume(config(best='loss', patience=9),
                                               kept).waited == 3
  assert writer.BestEvaluation.begin_or_resume(config(best='perplexity'),
                                               kept).step is None
  assert not writer.explain_if_ended_early(config(best='loss', patience=4),
                                           kept, 8)
  assert 'is 0.5, of step 4' in writer.explain_if_ended_early(
      config(best='loss', patience=3), kept, 8)
  # So does another best value of it; to say what it has been does not.
  other = dict(best='loss', best_is='largest', patience=3)
  begun = writer.BestEvaluation.begin_or_resume(config(**other), kept)
  assert (begun.largest, begun.step, begun.waited) == (True, None, 0)
  assert not writer.explain_if_ended_early(config(**other), kept, 8)
  assert writer.explain_if_ended_early(config(**other | dict(best_is='least')),
                                       kept, 8)


@pytest.mark.parametrize(
    'code', [0, loop.ENDED_EARLY, loop.STOPPED, loop.DIVERGED])
def test_to_end_early_is_to_end_well_and_only_to_diverge_is_an_error(
    code, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(loop, 'Program', lambda run, hooks: None)
  monkeypatch.setattr(loop, 'train_runs', lambda program, writers, **_: (
      writers[0].__dict__.update(code=code, sentence='why')))
  run = types.SimpleNamespace(config=base.base())
  assert loop.train_run(run, *[None] * 5, tmp_path) == (
      0 if code == loop.ENDED_EARLY else code)
  assert tuple(capsys.readouterr()) == (
      'why\n' * (code in (loop.ENDED_EARLY, loop.STOPPED)),
      'error: why\n' * (code == loop.DIVERGED))


@pytest.mark.parametrize('first, last, wanted', [
    (0, 20, ['start 10', 'stop 13', 'push 13']),
    (11, 20, ['start 11', 'stop 13', 'push 13']),  # resumed inside the range
    (0, 11, ['start 10', 'stop end', 'push end']),  # it ends inside the range
    (13, 20, []),  # resumed past it
])
def test_when_the_trace_starts_and_stops(first, last, wanted, monkeypatch,
                                         tmp_path):
  calls, seen = [], []
  monkeypatch.setattr(jax.profiler, 'start_trace',
                      lambda folder: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  profiler = hooks.Profile('10:13', tmp_path)
  monkeypatch.setattr(profiler._files, 'push', lambda: calls.append('push'))
  state = jnp.zeros(())
  for step in range(first, last):
    profiler.before_step(types.SimpleNamespace(n=step, state=state))
    seen += [f'{call} {step}' for call in calls[len(seen):]]
  profiler.end(types.SimpleNamespace(n=last, state=state))
  assert seen + [f'{call} end' for call in calls[len(seen):]] == wanted


@pytest.mark.parametrize('losses, lines', [
    ({}, []), ({10: 3.0, 20: 2.0}, []),
    ({10: 2.0, 20: 3.0}, ['held-out loss was lowest at step 10, 2.0000, and is '
                          '3.0000 at step 20'])])
def test_a_run_says_where_the_held_out_loss_was_lowest(losses, lines, tmp_path):
  files = metrics.JsonlWriter(tmp_path, 0)
  for step, loss in losses.items():
    files.write(step, 'eval', {'loss': loss})
  run = loop.RunWriter(None, tmp_path, None)
  run.best = None
  said = [line.partition(': ')[0] for line in run.describe_lowest_loss()]
  assert said == lines


class Notes(hook.Hook):
  """Notes the moments at which it is called, with the steps done."""

  def __init__(self):
    self.moments = []

  def check(self, loop):
    self.moments.append(('check', loop.n))

  def begin(self, loop):
    self.moments.append(('begin', loop.n))

  def before_step(self, loop):
    self.moments.append(('before', loop.n))

  def after_step(self, loop, figures):
    self.moments.append(('after', loop.n))
    if loop.n == 2:
      loop.stopped = True

  def on_figures(self, loop, writer, n, figures):
    self.moments.append(('figures', n))

  def more_figures(self, loop, writer):
    return {'noted': len(self.moments)}

  def on_evaluation(self, loop, writer, n, figures):
    self.moments.append(('evaluation', n))

  def end(self, loop):
    self.moments.append(('end', loop.n))


def test_a_hook_of_ones_own_is_called_at_each_moment(train, cheap, monkeypatch):
  notes = Notes()
  monkeypatch.setattr(Fake, 'own', [notes])
  n, (member,), _ = train({}, eval__every_steps=2)
  assert (n, member.code) == (2, loop.STOPPED)  # the hook has stopped it
  assert notes.moments == [
      ('check', 0), ('begin', 0), ('before', 0), ('after', 1), ('before', 1),
      ('figures', 1), ('figures', 2), ('evaluation', 2), ('after', 2),
      ('end', 2)]
  assert [row['noted'] for row in _rows(member, 'train')] == [6, 7]


@pytest.mark.parametrize('text, words', [
    ('hooks.py', 'write FILE.py:CLASS'), ('none.py:A', "no file 'none.py'"),
    ('hooks.py:Nine', "unknown train.hooks of hooks.py 'Nine': choose from "
     'One'), ('broken.py:A', 'broken.py, line 1: ZeroDivisionError')])
def test_hooks_that_are_none_are_refused(text, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'broken.py').write_text('1 / 0\n')
  (tmp_path / 'hooks.py').write_text(
      'from training.hook import Hook\nclass One(Hook):\n  pass\n')
  c = base.base()
  c.train.hooks = text
  with pytest.raises(RequestError, match=words):
    preflight.check_config(c)
