"""The benchmark of one GPU: its budget, its verdicts, what it keeps when it is
killed, and all of it at toy sizes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import bench, cases, report, sections, timing, workers
from configs.errors import EnvironmentFailure, RequestError

PEAK = 1000e12
CARD = dict(platform='gpu', card='NVIDIA H100 80GB HBM3', peak=PEAK,
            backend='cuda')
SIZES = dict(layers=2, parameters=10, flops_per_token=2e9, model={})


def answer(side, request, seconds, python=''):
  """A card that is quick: 60 % of its peak, PyTorch at half of that, and with
  room for half of the rows."""
  del seconds, python
  job, theirs = request['job'], side == 'theirs'
  if job == 'check':
    return [dict(torch='2', card=CARD['card'])] if theirs else [
        CARD, *(dict(case=name, **SIZES) for name in (*cases.CASES, 'write'))]
  if job == 'kernels':
    ways = dict(xla=2.0, cudnn=1.0)
    return [dict(part='attention', case='gpt2', way=way, step_s=s,
                 flops_per_s=1.0) for way, s in ways.items()] + [
        dict(part='experts', case='mixtral', way=way, **row)
        for way, row in {
            'ragged_dot': dict(step_s=3.0, flops_per_s=1.0),
            "ragged_dot, JAX's Triton kernel": dict(
                step_s=2.0, flops_per_s=1.0),
            'megablox': dict(error='refused'),
            'padded to a capacity of 1.25': dict(
                step_s=1.0, flops_per_s=1.0, drops=True)}.items()]
  if job == 'write':
    return [dict(batch=8, prompt=1, new=2, tokens_per_s=100.0, compile_s=1.0,
                 **({} if theirs else dict(bytes_per_step=3.35e12 / 10)))]
  batch = request['batch'] or 8
  batch = batch // 2 if theirs and batch == 8 else batch
  return [dict(
      batch=batch, length=1024, layers=2, parameters=10, step_s=0.1, remat='',
      tokens_per_s=0.6 * PEAK / 2e9 * (batch / 8) / (1 + theirs), notes=[],
      compile_s=1.0, peak_bytes=2**30, **(
          dict(compiled=True, precision='autocast') if theirs else {}))]


def call(monkeypatch, tmp_path, *flags, ask=answer):
  """Returns what --json and --page say."""
  monkeypatch.setattr(workers, 'ask', ask)
  monkeypatch.setattr(sections, 'read_tests', lambda text: [])
  files = tmp_path / 'found.json', tmp_path / 'found.html'
  monkeypatch.setattr(sys, 'argv', [
      'gpu', f'--json={files[0]}', f'--page={files[1]}', *flags])
  try:
    program.main()
  finally:
    found = json.loads(files[0].read_text()), files[1].read_text()
  return found


ALL_BUT_TESTS = ','.join(name for name in sections.SECTIONS if name != 'tests')


def test_figures_become_verdicts(monkeypatch, tmp_path, capsys):
  found, page = call(monkeypatch, tmp_path, f'--sections={ALL_BUT_TESTS}')
  assert {own['status'] for own in found['sections'].values()} == {'done'}
  gpt2 = found['sections']['gpt2']['rows'][0]
  assert gpt2['mfu'] == pytest.approx(0.6)
  # PyTorch had room for half of the rows: ours runs again with as many.
  theirs, ours = found['sections']['gpt2_torch']['rows']
  assert (theirs['batch'], ours['batch'], ours['side']) == (4, 4, 'ours')
  assert found['chosen'] == dict(attention=dict(gpt2='cudnn'), experts=dict(
      mixtral="ragged_dot, JAX's Triton kernel"))
  assert gpt2['attention'] == 'cudnn'
  share, ratio, *_ = found['verdicts']
  assert share['reached'] and share['found'] == pytest.approx(0.6)
  assert ratio['reached'] and ratio['found'] == pytest.approx(2.0)
  write = found['sections']['write']['rows'][0]
  assert write['limit_per_s'] == pytest.approx(80)  # 8 rows of 10 a second
  for text in (page, capsys.readouterr().out):
    assert '60.0 %' in text and '2.00' in text and 'reached' in text
    assert 'at the batch of the other side' in text


def test_a_step_that_drops_tokens_has_a_verdict_of_its_own(monkeypatch,
                                                           tmp_path):
  found, _ = call(monkeypatch, tmp_path, '--sections=mixtral_padded')
  assert found['sections']['mixtral_padded']['rows'][0]['mfu'] > 0.5
  share, ratio, padded = found['verdicts'][4:]
  assert padded['reached'] and 'drops tokens' in padded['goal']
  assert share['found'] is ratio['found'] is None
  assert share['why'] == ratio['why'] == 'it was not asked for'


def test_what_does_not_fit_is_skipped_and_named(monkeypatch, tmp_path):
  found, page = call(monkeypatch, tmp_path, '--minutes=1.05')
  ran = {name for name, own in found['sections'].items()
         if own['status'] == 'done'}
  assert ran == {'install', 'kernels', 'gpt2', 'mixtral', 'llama',
                 'mixtral_padded'}
  assert list(found['sections']) == list(sections.SECTIONS)
  for name in set(sections.SECTIONS) - ran:
    own = found['sections'][name]
    assert own['status'] == 'skipped' and not own['rows']
    assert f'about {own["guess_s"]:.0f} s' in own['why']
    assert own['title'].replace("'", '&#x27;') in page
  assert found['verdicts'][1]['why'].startswith('skipped: it takes about 120')


def test_what_fails_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
  def ask(side, request, seconds, python=''):
    if request['job'] == 'kernels':
      return [dict(error='exit code -6: no such flag')]
    if request['job'] == 'check' and side == 'theirs':
      return [dict(error="ModuleNotFoundError: No module named 'torch'")]
    return answer(side, request, seconds)
  found, page = call(monkeypatch, tmp_path, f'--sections={ALL_BUT_TESTS}',
                     ask=ask)
  own = found['sections']
  assert (own['kernels']['status'], own['kernels']['why']) == (
      'failed', 'exit code -6: no such flag')
  assert own['gpt2']['status'] == own['write']['status'] == 'done'
  assert own['gpt2']['rows'][0]['attention'] == 'auto'
  for name in ('gpt2_torch', 'write_torch', 'again'):
    assert own[name]['status'] == 'skipped'
    assert "No module named 'torch'" in own[name]['why']
  assert 'no such flag' in page and 'No module named' in page


def test_without_a_gpu_it_ends_and_says_so(monkeypatch, tmp_path, capsys):
  def ask(side, request, seconds):
    return [dict(platform='cpu', card='cpu', backend='none', peak=None)]
  with pytest.raises(EnvironmentFailure, match='JAX sees no GPU, but cpu'):
    call(monkeypatch, tmp_path, ask=ask)
  found = json.loads((tmp_path / 'found.json').read_text())
  assert found['sections']['install']['status'] == 'failed'
  assert found['sections']['gpt2']['status'] == 'not reached'


def test_an_earlier_call_is_not_run_again(monkeypatch, tmp_path):
  call(monkeypatch, tmp_path, '--sections=gpt2')
  earlier = tmp_path / 'earlier.json'
  (tmp_path / 'found.json').rename(earlier)
  asked = []
  def ask(side, request, seconds, python=''):
    asked.append((side, request['job'], request.get('case')))
    return answer(side, request, seconds)
  flags = f'--after={earlier}', '--sections=gpt2,llama'
  found, page = call(monkeypatch, tmp_path, *flags, ask=ask)
  assert asked == [('ours', 'check', None), ('theirs', 'check', None),
                   ('ours', 'step', 'llama')]
  assert found['verdicts'][0]['reached'] and 'by an earlier call' in page
  monkeypatch.setitem(CARD, 'card', 'NVIDIA H200')
  with pytest.raises(RequestError, match='of NVIDIA H100 80GB HBM3, and this'):
    call(monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize('flag, sentence', [
    ('--minutes=0', 'minutes is 0'), ('--sections=gtp2', "'gtp2'.*'gpt2'"),
    ('--after=no.json', 'no.json, which is no file'),
    ('--torch_python=no-python', "'no-python', which is no program")])
def test_what_cannot_be_is_refused(flag, sentence, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['gpu', flag])
  with pytest.raises(RequestError, match=sentence):
    program.main()


KILLED = '''
import sys, time
from benchmarks.gpu import __main__ as program, workers
from tests.benchmarks.gpu_benchmark_test import answer
def ask(side, request, seconds, python=''):
  if request.get('case') == 'llama':
    time.sleep(600)
  return answer(side, request, seconds)
workers.ask = ask
program.main()
'''


def test_a_kill_leaves_what_was_done(tmp_path):
  file = tmp_path / 'found.json'
  process = subprocess.Popen(
      [sys.executable, '-c', KILLED, '--sections=gpt2,llama,write',
       f'--json={file}', f'--page={tmp_path / "page.html"}'],
      cwd=workers.ROOT, stdout=subprocess.DEVNULL,
      env=os.environ | dict(PYTHONPATH=str(workers.ROOT)))
  def status(name):
    return json.loads(file.read_text())['sections'][name]['status'] if (
        file.exists()) else ''
  end = time.monotonic() + 60
  while status('llama') != 'running' and time.monotonic() < end:
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  found = json.loads(file.read_text())
  assert found['verdicts'][0]['reached']
  assert [own['status'] for own in found['sections'].values()] == [
      'done', 'done', 'running', 'not reached']
  assert '60.0 %' in (tmp_path / 'page.html').read_text()


def test_a_side_that_is_missing_late_or_dead_is_an_answer(monkeypatch):
  dead = workers.ask('theirs', dict(job='check'), 60, python='/bin/false')
  assert dead == [dict(error='exit code 1: it printed nothing')]
  assert workers.rows('{"a": 1}\nwarning\n{"b": \n{c}\n{"d": 2}') == [
      dict(a=1), dict(d=2)]
  monkeypatch.setattr(workers.tether, 'words', lambda words: [
      sys.executable, '-c', 'import time; print(\'{"a": 1}\', flush=True); '
      'time.sleep(60)'])
  assert workers.ask('ours', {}, 1.0) == [
      dict(a=1), dict(error='it was ended after 1 s')]


def test_tests_are_read_from_their_report():
  rows = sections.read_tests('''<testsuites><testsuite>
    <testcase name="a"/><testcase name="b"><failure message="off by 1"/>
    </testcase><testcase name="c"><skipped message="no GPU"/></testcase>
    </testsuite></testsuites>''')
  assert [(row['outcome'], row['why']) for row in rows] == [
      ('passed', ''), ('failed', 'off by 1'), ('skipped', 'no GPU')]


def test_a_failing_test_stands_above_the_figures():
  rows = [dict(test='a', outcome='passed', why=''),
          dict(test='b', outcome='passed', why=''),
          dict(test='c', outcome='failed', why='off by 1')]
  results = dict(toy=False, sections=dict(tests=dict(
      title='Tests', status='done', why='', rows=rows)))
  assert report.warnings(results)[0].startswith('1 of the tests failed')
  assert [[cell.text for cell in row]
          for row in report.test_table(results).rows] == [
              ['2 tests', 'passed', ''], ['c', 'failed', 'off by 1']]


def test_a_window_holds_steps_that_are_not_waited_for(monkeypatch):
  clock, pending = [0.0], []
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])
  def wait(step):
    clock[0] += len(pending)  # a second each
    pending.clear()
  found = timing.windows(lambda: pending.append(1), wait, 4.0)
  assert found == dict(step_s=1.0, least_s=1.0, steps=4 * timing.WINDOWS)


def test_a_stack_has_as_many_layers_as_its_share_of_memory_holds(monkeypatch):
  from benchmarks.gpu import ours
  from training.costs import totals
  case = cases.TOYS['llama']._replace(share=0.5, layers=8)
  bytes_of = lambda n: cases.STATE_BYTES * totals.parameters(
      totals.resolved(ours.config_of(case, n)))[0]
  for room, layers in ((2 * bytes_of(3), 3), (2 * bytes_of(4) - 2, 3),
                       (1, 1), (10**12, 8)):
    monkeypatch.setattr(ours, 'device_memory', lambda room=room: room)
    assert ours.sizes(case)['layers'] == layers


def test_a_new_token_reads_weights_and_what_is_there():
  from benchmarks.gpu import ours
  from training.costs import totals
  case = cases.TOY_WRITING
  config = ours._writing_config(case)
  model = totals.resolved(config)
  D, F, V, N = 32, 64, 64, 2  # in bfloat16, as its keys and values are
  weights = N * (4 * D * D + 3 * D * F + 2 * D) + D + D * V
  there = case.prompt + case.new / 2
  assert ours.read(totals.count(config, 16), model, case, 3) == (
      2 * (weights + 3 * there * N * 2 * D))


def test_what_the_memory_has_no_room_for_is_made_smaller(monkeypatch):
  import jax
  from benchmarks.gpu import ours
  def timed(config, seconds, compiler):
    if config.data.batch_size == 4 and config.model.remat != 'full':
      raise ours._TooLarge('9 GiB by the compiler, of 8')
    if config.data.batch_size == 4:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of it')
    return dict(step_s=1.0)
  monkeypatch.setattr(ours, '_timed', timed)
  request = dict(toy=True, case='gpt2', layers=2, seconds=0)
  row, = ours.step(request)
  assert (row['batch'], row['remat']) == (2, 'none')
  assert row['notes'] == [
      f'batch 4, remat {remat}: 9 GiB by the compiler, of 8'
      for remat in ('none', 'dots')] + ['batch 4, remat full: out of memory']
  row, = ours.step(dict(request, way=dict(jax=dict(jax_no_such=True))))
  assert 'has no option jax_no_such' in row['error']


def test_theirs_is_made_smaller_too(monkeypatch):
  torch = pytest.importorskip('torch')
  from benchmarks.gpu import theirs
  def timed(request, batch, experts):
    if batch > 2:
      raise torch.OutOfMemoryError('none left')
    if request['compiled']:
      raise RuntimeError('no compiler')
    return dict(step_s=1.0)
  monkeypatch.setattr(theirs, '_timed', timed)
  row, = theirs.step(dict(case='llama', batch=8, compiled=True, length=1,
                          precision='', model=dict(num_layers=2)))
  assert (row['batch'], row['compiled']) == (2, False)
  assert row['notes'] == ['batch 8: out of memory', 'batch 4: out of memory',
                          'batch 2: RuntimeError: no compiler']


def test_both_sides_have_the_same_parameters():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from benchmarks.gpu import ours, theirs
  for name, case in cases.TOYS.items():
    sizes = ours.sizes(case)
    model = theirs.model_of(name, sizes['model'], 'eager')
    assert sum(p.numel() for p in model.parameters()) == sizes['parameters']


def toy(tmp_path, *flags):
  result = subprocess.run(
      [sys.executable, '-m', 'benchmarks.gpu', '--toy',
       f'--json={tmp_path / "a.json"}', f'--page={tmp_path / "a.html"}',
       *flags], cwd=workers.ROOT, capture_output=True, text=True,
      # One device, and programs that are compiled soon.
      env=os.environ | dict(XLA_FLAGS='--xla_backend_optimization_level=0'))
  assert result.returncode == 0, result.stderr
  return json.loads((tmp_path / 'a.json').read_text())


@pytest.mark.long
@pytest.mark.slow
def test_toy_steps_run_on_a_cpu(tmp_path):
  found = toy(tmp_path, '--sections=gpt2')
  row, = found['sections']['gpt2']['rows']
  assert row['tokens_per_s'] > 0 and row['loss'] > 0 and row['mfu'] is None
  assert row['parameters'] == found['cases']['gpt2']['parameters']
  assert found['verdicts'][0]['why'] == 'no peak of this card is known'
  assert 'toy sizes' in (tmp_path / 'a.html').read_text()


@pytest.mark.slow
@pytest.mark.long
def test_every_section_runs_at_toy_sizes(tmp_path):
  """Without PyTorch its sections are skipped, with the reason."""
  found = toy(tmp_path)
  torch = 'torch' in found['machine']['torch']
  for name, own in found['sections'].items():
    other = name.endswith('_torch') or name == 'again'
    assert own['status'] == ('skipped' if other and not torch else 'done'), own
    if other and not torch:
      assert 'No module named' in own['why']
  kinds = {(row['part'], row['way']): 'step_s' in row
           for row in found['sections']['kernels']['rows']}
  assert kinds['attention', 'xla'] and kinds['experts', 'ragged_dot']
  assert not (kinds['attention', 'cudnn'] or kinds['experts', 'megablox'])
  assert {row['outcome'] for row in found['sections']['tests']['rows']} == {
      'skipped'}
  if torch:
    for row in report.steps(found):
      assert row['tokens_per_s'] > 0
      assert row['parameters'] == found['cases'][row['case']]['parameters']
    assert all(found['verdicts'][i]['found'] for i in (1, 3, 5))


def test_the_memory_of_both_cards_is_known():
  for card in ('NVIDIA H100 80GB HBM3', 'NVIDIA H200'):
    assert bench.bandwidth(card) > 3e12
  assert bench.bandwidth('cpu') is None
