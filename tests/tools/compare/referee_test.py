"""The referee: files as the programs that make them write them, tests beside
scipy's, and the looks at a run that is read at every step."""

import argparse
import csv
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from common.errors import RequestError
from tools.compare import certificate, foreign, referee, statistics

STEPS = (100, 200, 300)
TRACK3 = pathlib.Path(__file__).parents[4] / 'shared/data/track3'


def _losses(effect, seed, num_runs=4):
  """Returns the loss of each run at STEPS, whose noise is that of a seed."""
  noise = np.random.default_rng(seed).normal(0, 0.01, (num_runs, 1))
  return (4 - effect - 0.003 * np.array(STEPS) + noise).round(5)


ENTRIES = {'base': _losses(0, 0), 'better': _losses(0.05, 1)}


def _judge(capsys, *words):
  parser = argparse.ArgumentParser()
  referee.add_arguments(parser)
  words = [str(word) for word in words]
  assert referee.main(parser.parse_args([*words, '--json'])) == 0
  return json.loads(capsys.readouterr().out)


def _write_csv(file, rows):
  with open(file, 'w', newline='') as opened:
    csv.writer(opened).writerows(rows)


def _write_nanogpt(folder, entry, losses):
  """As its print0: below the source, whose own print holds no number."""
  lines = [f"print(f'step:{{step}}/{STEPS[-1]} val_loss:{{val_loss:.5f}}')"]
  time = {'base': '9.1s'}.get(entry, '18200ms')
  for run in losses:  # one after the other in one file
    lines += [f'step:{step}/{STEPS[-1]} val_loss:{loss:.5f} train_time:{time} '
              'step_avg:157.01ms' for step, loss in zip(STEPS, run)]
  (folder / f'{entry}.txt').write_text('\n'.join(lines))


def _write_printed(folder, entry, losses):
  """As nanoGPT prints them, a log a run."""
  (folder / entry).mkdir()
  for seed, run in enumerate(losses):
    lines = [f'step {step}: train loss 9.1, val loss {loss}\niter {step}: loss '
             '9.0000, time 1.00ms' for step, loss in zip(STEPS, run)]
    (folder / entry / f'run{seed}.log').write_text('\n'.join(lines))


def _write_trainer(folder, entry, losses):
  """By transformers, with an earlier checkpoint of each run."""
  callback = pytest.importorskip('transformers.trainer_callback',
                                 reason='no transformers')
  for seed, run in enumerate(losses):
    history = []
    for step, loss in zip(STEPS, run):
      history += [{'loss': 9.0, 'epoch': 0.1, 'step': step},
                  {'eval_loss': float(loss), 'epoch': 0.1, 'step': step}]
      checkpoint = folder / entry / f'seed-{seed}' / f'checkpoint-{step}'
      checkpoint.mkdir(parents=True)
      state = callback.TrainerState(
          log_history=history, global_step=step,
          total_flos=step * 1e10 * (1 + (entry == 'better')))
      state.save_to_json(str(checkpoint / 'trainer_state.json'))


def _write_events(folder, entry, losses):
  """By TensorBoard's own writers, of both kinds of scalars; each run in two
  files, as one that was resumed."""
  from tensorboard.compat.proto import event_pb2, summary_pb2
  from tensorboard.plugins.scalar import summary_v2
  from tensorboard.summary.writer import event_file_writer
  for seed, run in enumerate(losses):
    for split in ('train', 'validation'):  # as Keras does
      for part in (slice(0, 2), slice(2, 3)):
        writer = event_file_writer.EventFileWriter(
            str(folder / entry / f'seed-{seed}' / split),
            filename_suffix=f'.{part.start}')
        for step, loss in zip(STEPS[part], run[part] - (split == 'train')):
          summary = summary_v2.scalar_pb('epoch_loss', float(loss))
          if entry == 'base':
            summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(
                tag='epoch_loss', simple_value=float(loss))])
          writer.add_event(event_pb2.Event(step=step, summary=summary))
        writer.close()


def _write_wandb_chart(folder, entry, losses):
  rows = [['Step']]
  for seed in range(len(losses)):
    name = f'{entry}-seed{seed} - val/loss'
    rows[0] += [name, f'{name}__MIN', f'{name}__MAX']
  for step, at_step in zip(STEPS, losses.T):
    rows.append([step, *np.repeat(at_step, 3)])
  _write_csv(folder / f'{entry}.csv', rows)


def _write_history(folder, entry, losses):
  """As wandb.Api().run(...).history().to_csv(), or trackio's, a file a run."""
  for seed, run in enumerate(losses):
    rows = [['', '_step', '_timestamp', 'train/loss', 'val/loss']]
    for i, (step, loss) in enumerate(zip(STEPS, run)):
      rows += [[2 * i, step - 1, 1e9, 9.0, ''],
               [2 * i + 1, step, 1e9, '', loss]]
    (folder / entry).mkdir(exist_ok=True)
    _write_csv(folder / entry / f'seed_{seed}.csv', rows)


def _write_plain(folder, entry, losses):
  rows = [['run', 'seed', 'step', 'loss']]
  for seed, run in enumerate(losses):
    rows += [[entry, seed, step, loss] for step, loss in zip(STEPS, run)]
  _write_csv(folder / f'{entry}.csv', rows)


def _write_json_lines(folder, entry, losses):
  """As a loop of one's own writes them, a file a run, whose first line says
  what the run was given."""
  (folder / entry).mkdir()
  for seed, run in enumerate(losses):
    lines = [json.dumps({'params': 100 + 100 * (entry == 'better')})]
    for step, loss in zip(STEPS, run):
      lines += [json.dumps({'step': step, 'split': 'train', 'loss': 9.0}),
                json.dumps({'step': step, 'split': 'eval', 'loss': loss})]
    (folder / entry / f'seed{seed}.jsonl').write_text('\n'.join(lines))


def _write_loop(folder, entry, losses):
  """As a loop of one's own prints and logs them, in three ways, one of which
  counts epochs."""
  (folder / entry).mkdir()
  words = {'base': 'epoch {step}/300: Train Loss 9.0, Validation Loss = {loss}',
           'better': '10:00:01 INFO train: global_step={step} epoch=0.12 '
                     'train_loss=9.0 val_loss={loss} acc: 0.25'}[entry]
  for seed, run in enumerate(losses):
    lines = ['124.4M parameters, loss scale 1', *(
        words.format(step=step, loss=loss) for step, loss in zip(STEPS, run))]
    (folder / entry / f'seed_{seed}.txt').write_text('\n'.join(lines))


@pytest.mark.parametrize('write, has_seeds, unlike', [
    (_write_json_lines, True, {'params': '100 -> 200, +100.0%'}),
    (_write_loop, True, {}),
    (_write_nanogpt, False, {'seconds': '9.1 -> 18.2, +100.0%'}),
    (_write_printed, False, {}),
    (_write_trainer, True, {'flops': '3e+12 -> 6e+12, +100.0%'}),
    (_write_events, True, {}), (_write_wandb_chart, True, {}),
    (_write_history, True, {}), (_write_plain, True, {})])
def test_each_format_gives_scipys_test_of_the_same_runs(
    tmp_path, capsys, write, has_seeds, unlike):
  sources = []
  for entry, losses in ENTRIES.items():
    write(tmp_path, entry, losses)
    sources += [path for path in sorted(tmp_path.iterdir())
                if path.stem == entry]
  row, = _judge(capsys, *sources)['comparisons']
  base, better = (losses[:, -1] for losses in ENTRIES.values())
  test = stats.ttest_ind(better, base, equal_var=False)
  if has_seeds:
    test = stats.ttest_rel(better, base)
  interval = test.confidence_interval()
  assert (row['effect'], row['p'], row['low'], row['high']) == pytest.approx(
      ((better - base).mean(), test.pvalue, interval.low, interval.high),
      rel=1e-3)
  assert (row['runs'], row['step'], row['verdict']) == (4, 300, 'better')
  # What the program itself writes of the run.
  assert row['unlike'] == unlike


def test_a_figure_that_comes_again_at_a_step_begins_another_run(tmp_path):
  lines = [(0, 'train_loss:9.0'), (0, 'val_loss:8.0'), (5, 'val_loss:7.0'),
           (5, 'val_loss:6.5 train_loss:6.0'), (9, 'val_loss:5.0')]
  (tmp_path / 'a.log').write_text(''.join(
      f'step:{step}/9 {figures}\n' for step, figures in lines))
  first, second = foreign.read_source(tmp_path / 'a.log')
  assert first.curves == {'train_loss': {0: 9.0}, 'val_loss': {0: 8.0, 5: 7.0}}
  assert second.curves == {'train_loss': {5: 6.0},
                           'val_loss': {5: 6.5, 9: 5.0}}


def test_samples_of_lm_eval_are_paired_item_by_item(tmp_path, capsys):
  """By the writer of lm-eval itself."""
  loggers = pytest.importorskip('lm_eval.loggers', reason='no lm_eval')
  right = np.random.default_rng(0).integers(2, size=(1, 40)).repeat(2, axis=0)
  right[1, :24], right[1, 24] = 1, 1 - right[0, 24]
  for entry, scores in zip(ENTRIES, right):
    tracker = loggers.EvaluationTracker(output_path=str(tmp_path / entry))
    tracker.general_config_tracker.model_name_sanitized = 'model'
    tracker.date_id = '2026-01-01T00-00-00.000000'
    samples = [{'doc_id': i, 'doc': {}, 'target': 0, 'arguments': [('a', 'b')],
                'resps': [[1]], 'filtered_resps': [1], 'filter': 'none',
                'metrics': ['acc'], 'doc_hash': f'h{i}', 'prompt_hash': '',
                'target_hash': '', 'acc': float(score)}
               for i, score in enumerate(scores)]
    tracker.save_results_samples('arc_easy', samples)
  answer = _judge(capsys, tmp_path / 'base', tmp_path / 'better')
  row, = answer['comparisons']
  wins, losses = np.sum(right[1] > right[0]), np.sum(right[1] < right[0])
  assert row['metric'] == 'arc_easy/acc' and row['effect'] > 0
  assert row['p'] == pytest.approx(stats.binomtest(
      int(wins), int(wins + losses)).pvalue)
  assert row['verdict'] == 'better' and row['test'] == 'McNemar, 40 items'

  # Of other items, such as of another limit, no pair is made.
  file, = (tmp_path / 'base').rglob('*.jsonl')
  file.write_text(''.join(file.read_text().splitlines(keepends=True)[:30]))
  row, = _judge(capsys, tmp_path / 'base', tmp_path / 'better')['comparisons']
  assert row['p'] == pytest.approx(stats.ttest_ind(
      right[1], right[0, :30], equal_var=False).pvalue)


def test_noise_of_all_entries_and_holm_over_all_of_them(tmp_path, capsys):
  """One run is compared by the noise of the others; a saved step is charged."""
  rows = [['entry', 'seed', 'step', 'loss']]
  random = np.random.default_rng(3)
  values = {'a': random.normal(3, 0.01, 6), 'b': random.normal(2.98, 0.01, 5),
            'c': [2.97]}
  for entry, losses in values.items():
    step = 100 if entry == 'a' else 90
    # The seeds of b are others than those of a: they are no pairs.
    rows += [[entry, f'{seed + 50 * (entry == "b")}', step, loss]
             for seed, loss in enumerate(losses)]
  _write_csv(tmp_path / 'runs.csv', rows)

  own = _judge(capsys, tmp_path / 'runs.csv')
  welch = stats.ttest_ind(values['b'], values['a'], equal_var=False).pvalue
  assert [row['p'] for row in own['comparisons']] == [
      pytest.approx(welch), None]
  assert own['comparisons'][1]['verdict'] == 'noise unknown'
  assert 'not charged' in own['summary'] and '--pooled' in own['summary']

  pooled = _judge(capsys, tmp_path / 'runs.csv', '--pooled',
                  '--loss_per_step=0.0005')['comparisons']
  sd = np.sqrt((5 * np.var(values['a'], ddof=1)
                + 4 * np.var(values['b'], ddof=1)) / 9)
  p_values = []
  for entry in 'bc':
    effect = np.mean(values[entry]) - np.mean(values['a']) - 0.005
    se = sd * np.sqrt(1 / 6 + 1 / len(values[entry]))
    p_values.append(2 * stats.t.sf(abs(effect) / se, 9))
  assert [row['p'] for row in pooled] == pytest.approx(p_values)
  assert [row['p_corrected'] for row in pooled] == pytest.approx(
      statistics.correct_p_values(p_values))


def test_what_the_logs_tell_that_runs_were_given_is_named(tmp_path, capsys):
  """By columns, at the step that is read; SAME is as the base has it."""
  rows = [['entry', 'seed', 'step', 'loss', 'tokens', 'params', 'code',
           'recipe', 'devices']]
  for seed in range(3):
    for step in (1, 2):
      rows += [['a', seed, step, 3 - step, 500 * step, 70, '1e9', 'adam', ''],
               ['b', seed, step, 2.9 - step + seed / 100, 600 * step, 70, 'v2',
                'muon', 'H100'],
               ['c', seed, step, 3 - step, '', 'same', 'same', 'same', '',
                'a cell too many']]
  _write_csv(tmp_path / 'runs.csv', rows)
  answer = _judge(capsys, tmp_path / 'runs.csv', '--entries=a@1,b@1,c@1')
  assert [row['unlike'] for row in answer['comparisons']] == [
      {'tokens': '500 -> 600, +20.0%', 'recipe': 'adam -> muon',
       'code': '1e9 -> v2', 'devices': 'known of one side alone'},
      {'tokens': 'known of one side alone'}]
  assert 'not alike in code: b (1e9 -> v2)' in answer['summary']
  assert 'Unknown of every entry, and so not compared: model, parameters ' in (
      answer['summary'])
  asked = _judge(capsys, tmp_path / 'runs.csv', '--about=recipe,tokens')
  assert [*asked['comparisons'][0]['unlike']] == ['code', 'devices']
  # Where several are compared, an effect must be larger to be found.
  by_itself = _judge(capsys, tmp_path / 'runs.csv', '--entries=a@1,b@1,c@1',
                     '--uncorrected')
  assert by_itself['comparisons'][0]['detectable'] < (
      answer['comparisons'][0]['detectable'])


def test_what_nobody_tells_of_runs_of_ones_own_is_unknown_by_name(
    tmp_path, capsys):
  """Logs that tell losses alone, and then a table of what the runs were
  given: each fact is alike, not alike, or unknown of one or of both."""
  for entry, losses in ENTRIES.items():
    _write_loop(tmp_path, entry, losses)
  sources = [tmp_path / entry for entry in ENTRIES]
  answer = _judge(capsys, *sources)
  all_but_seeds = [*certificate.QUANTITIES]
  all_but_seeds.remove('seeds')
  row, = answer['comparisons']
  assert (row['verdict'], row['unlike'], row['unknown']) == (
      'better', {}, all_but_seeds)
  for name in all_but_seeds:
    assert certificate.QUANTITIES[name].title in answer['summary']

  _write_csv(tmp_path / 'given.csv', [
      ['entry', 'params', 'flops_per_token', 'tokens', 'batches', 'tuning'],
      ['base', '1e6', '6e6', '1e9', 'shuffled', '3 rates'],
      ['better', '1.2e6', '6e6', '2e9', 'same', '']])
  told = f'--given={tmp_path / "given.csv"}'
  answer = _judge(capsys, *sources, told)
  row, = answer['comparisons']
  assert row['unlike'] == {
      'params': '1e+06 -> 1.2e+06, +20.0%',
      'flops': '6e+15 -> 1.2e+16, +100.0%',
      'tokens': '1e+09 -> 2e+09, +100.0%',
      'tuning': 'known of one side alone'}
  assert sorted(answer['alike']) == ['batches', 'flops_per_token', 'seeds']
  assert 'Unknown of better or of the base, and so not compared: tuning.' in (
      answer['summary'])
  assert {'tuning', 'code', 'model'} < {*row['unknown']}
  assert not {'params', 'flops', 'batches'} & {*row['unknown']}
  asked = _judge(capsys, *sources, told, '--about=params,tokens,flops')
  assert [*asked['comparisons'][0]['unlike']] == ['tuning']
  for rows, words in (([['entry', 'size'], ['base', 1]], "'size'"),
                      ([['entry'], ['other']], "'other'"),
                      ([['params'], [1]], 'no column entry')):
    _write_csv(tmp_path / 'given.csv', rows)
    with pytest.raises(RequestError, match=words):
      _judge(capsys, *sources, told)


def test_metrics_of_a_run_of_this_project_are_read_beside_others(
    tmp_path, capsys):
  """metrics.jsonl, whose rows are of a split each."""
  for entry, losses in ENTRIES.items():
    for seed, run in enumerate(losses):
      rows = []
      for step, loss in zip(STEPS, run):
        rows += [dict(step=step, split='train', loss=9.0, seconds=None),
                 dict(step=step, split='eval', loss=loss)]
      folder = tmp_path / entry / f'seed-{seed}'
      folder.mkdir(parents=True)
      (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
      (folder / 'log.txt').write_text('step 100: loss 3.0')
  sources = [tmp_path / entry for entry in ENTRIES]
  row, = _judge(capsys, *sources, '--format=jsonl')['comparisons']
  base, better = ENTRIES.values()
  assert row['metric'] == 'eval/loss' and row['test'] == '4 pairs of seeds'
  assert row['effect'] == pytest.approx((better - base)[:, -1].mean())
  with pytest.raises(RequestError, match='of loop, jsonl'):
    _judge(capsys, *sources)


def test_a_table_of_means_and_the_runs_that_are_left_out(tmp_path, capsys):
  _write_csv(tmp_path / 'means.csv', [
      ['model', 'mean', 'n', 'std'], ['a', 3.0, 5, 0.01], ['b', 2.98, 4, 0.02]])
  row, = _judge(capsys, tmp_path / 'means.csv')['comparisons']
  assert row['p'] == pytest.approx(stats.ttest_ind_from_stats(
      2.98, 0.02, 4, 3.0, 0.01, 5, equal_var=False).pvalue)

  # One run of b ended early, one diverged, one is longer, and one is there
  # twice; a run is of an entry by its name.
  rows = [['run', 'step', 'val_loss']]
  for name, last_step, last_loss in (
      ('a-1', 4, 3.0), ('a-2', 4, 3.1), ('b-1', 4, 2.0), ('b-2', 2, 2.5),
      ('b-3', 4, 'nan'), ('b-4', 5, 2.2), ('b-1/copy', 4, 2.0)):
    rows += [[name, step, 5 - step / 9] for step in range(last_step)]
    rows.append([name, last_step, last_loss])
  _write_csv(tmp_path / 'runs.csv', rows)
  answer = _judge(capsys, tmp_path / 'runs.csv', '--entries=a,b', '--sd=0.1')
  row, = answer['comparisons']
  assert (row['step'], row['runs'], row['base_runs']) == (4, 2, 2)
  assert 'b: 2 of 4 runs are left out' in answer['summary']
  assert 'b: 1 of its logs are copies' in answer['summary']


def test_the_runs_that_are_needed_and_what_so_many_find():
  """Against simulated tests of two groups of runs."""
  base = np.random.default_rng(0).normal(0, 1, 8)
  difference = statistics.difference_of_groups(
      statistics.describe_group(base + 0.8), statistics.describe_group(base))
  runs = difference.runs_needed(level=0.05, power=0.8)
  random, sd = np.random.default_rng(1), np.std(base, ddof=1)
  for effect, n in ((0.8, runs), (difference.detectable(0.05, 0.8), 8)):
    samples = random.normal(0, sd, (2, 4000, n)) + [[[0.0]], [[effect]]]
    p = stats.ttest_ind(samples[0], samples[1], axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)
  # Of a known deviation: 2 sd^2 (z(0.975) + z(0.8))^2 / d^2 of each group.
  known = statistics.difference_with_deviation(
      *(statistics.GroupOfRuns(mean, 3, None) for mean in (0.8, 0.0)),
      statistics.PooledDeviation(sd=1.5, df=np.inf))
  z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
  assert known.runs_needed(0.05, 0.8) == np.ceil(2 * (1.5 * z / 0.8) ** 2)


def test_looks_at_every_step_are_counted_by_their_correlation(monkeypatch):
  """The mean is never below the target: whoever takes the first step that
  passes claims so in more than 5 % of cases, and who counts looks does not.
  Looks that are all the same are one."""
  monkeypatch.setattr(statistics, 'NUM_DRAWS_OF_LOOKS', 2 ** 11)
  random = np.random.default_rng(0)
  num_false = np.zeros(2)
  for _ in range(400):
    # Half of the variance of a run is its own at each of 20 looks.
    losses_RL = random.normal(size=(8, 1)) + random.normal(size=(8, 20))
    looks = statistics.p_values_of_looks(losses_RL, target=0.0,
                                         known_deviation=2 ** 0.5)
    num_false += [min(looks.p) <= 0.05, min(looks.p_counted) <= 0.05]
  assert num_false[0] > 60 and num_false[1] < 32

  same = np.repeat(random.normal(-0.5, 1, size=(8, 1)), 20, axis=1)
  looks = statistics.p_values_of_looks(same, target=0.0)
  assert looks.p[0] == pytest.approx(stats.ttest_1samp(
      same[:, 0], 0, alternative='less').pvalue)
  assert looks.p_counted[0] == pytest.approx(looks.p[0], rel=0.3)
  # So far out that no draw is larger, a look has still its own p.
  far = statistics.p_values_of_looks(same - 9, 0.0, known_deviation=1.0)
  assert (far.p_counted >= far.p).all() and far.p[0] > 0

  # One run says nothing of a correlation: its looks count as independent.
  alone = statistics.p_values_of_looks(np.array([[0.0, -3.0, -9.0]]), 0.0, 1.0)
  np.testing.assert_allclose(alone.p, stats.norm.sf([0, 3, 9]))
  np.testing.assert_allclose(alone.p_counted, np.minimum(3 * alone.p, 1))


def test_wrong_requests_are_refused(tmp_path, capsys):
  _write_plain(tmp_path, 'base', ENTRIES['base'])
  with pytest.raises(RequestError, match='one entry alone'):
    _judge(capsys, tmp_path / 'base.csv')
  with pytest.raises(RequestError, match="no runs of 'other'"):
    _judge(capsys, tmp_path / 'base.csv', '--entries=other')
  _write_nanogpt(tmp_path, 'log', ENTRIES['base'])
  with pytest.raises(RequestError, match='several formats'):
    foreign.read_source(tmp_path)
  assert len(foreign.read_source(tmp_path, 'csv')) == len(ENTRIES['base'])
  (tmp_path / 'page.md').write_text('no runs')
  with pytest.raises(RequestError, match='has no runs that are known'):
    foreign.read_source(tmp_path / 'page.md')
  _write_csv(tmp_path / 'two.csv', [
      ['run', 'step', 'a', 'b'], ['x', 1, 2, 3], ['y', 1, 2, 3]])
  with pytest.raises(RequestError, match='choose one with --metric'):
    _judge(capsys, tmp_path / 'two.csv')


@pytest.mark.skipif(not TRACK3.is_dir(), reason='the runs of track 3 of '
                    'modded-nanogpt are not there')
def test_the_records_of_track_3(tmp_path, capsys):
  """By the rule of the benchmark 8 of 19 are better than the one before:
  (difference + 0.000045 a step) / sqrt(1/n + 1/m) >= 0.004."""
  with open(TRACK3 / 'records.csv', newline='') as file:
    records = [row for row in csv.DictReader(file) if row['record'] == '1']
  _write_csv(tmp_path / 'records.csv',
             [[*records[0]], *([*row.values()] for row in records)])
  num_better = 0
  for old, new in zip(records, records[1:]):
    saved = int(old['steps']) - int(new['steps'])
    gain = (float(old['mean_loss']) - float(new['mean_loss'])
            + 0.000045 * saved)
    runs = 1 / int(old['n']) + 1 / int(new['n'])
    num_better += gain / runs ** 0.5 >= 0.004
  answer = _judge(capsys, tmp_path / 'records.csv', '--successive',
                  '--sd=0.0013', '--loss_per_step=0.000045', '--uncorrected',
                  '--alpha=0.0021')
  verdicts = [row['verdict'] for row in answer['comparisons']]
  assert verdicts.count('better') == num_better == 8

  # By the runs, whose noise is pooled; and where all looks are counted.
  with open(tmp_path / 'logs.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    writer.writerows(records[:-1])
  runs = TRACK3 / 'curves.csv', f'--entries={tmp_path / "logs.csv"}'
  answer = _judge(capsys, *runs, '--successive', '--pooled',
                  '--loss_per_step=0.000045')
  verdicts = [row['verdict'] for row in answer['comparisons']]
  assert verdicts.count('better') == 9 and verdicts[0] == 'better'
  assert '0.00105 (197 degrees' in answer['summary']
  others = [row['runs_needed'] for row in answer['comparisons']
            if row['verdict'] != 'better']
  assert sorted(others) == [45, 48, 59, 72, 112, 252, 284, 444, 671]
  looks = _judge(capsys, *runs, '--target=3.28', '--sd=0.0013',
                 '--alpha=0.00105')['steps']
  passed = [row for row in looks if row['step'] is not None]
  later = [row['counted_step'] - row['step'] for row in passed
           if row['counted_step'] is not None]
  assert len(passed) == 16 and later.count(0) == 7
  assert (len(later), min(filter(None, later)), max(later)) == (12, 4, 25)
