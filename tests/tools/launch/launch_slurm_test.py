"""The batch script of SLURM: what it holds, and how it runs on stand-ins for
SLURM's programs."""

import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import hypothesis
from hypothesis import strategies as st
import pytest

from tests.helpers.launching import args_of, hostile_job, maker, stand_in
from tests.helpers.launching import starts
from tests.helpers.launching import wait_for
from tools.launch import sbatch, slurm


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return maker(tmp_path)


SRUN = '''\
    #!{python}
    import os, re, subprocess, sys
    words = sys.argv[1:]
    output = next(w for w in words if w.startswith('--output='))[9:]
    command = words[[w.startswith('--') for w in words].index(False):]
    tasks = int(os.environ['TASKS'])
    def log(i):
      return re.sub('%(.)', lambda m: {{'t': str(i), '%': '%'}}[m[1]], output)
    running = [subprocess.Popen(
        command, stdout=open(log(i), 'ab'),
        env=os.environ | {{'SLURM_PROCID': str(i),
                           'SLURM_LOCALID': str(i % 2)}})
        for i in range(tasks)]
    with open(os.environ['PIDS'], 'w') as file:
      print(*(p.pid for p in running), file=file)
    sys.exit(max(p.wait() for p in running))
    '''


@pytest.fixture(name='slurm_job')
def _slurm_job(a_job, tmp_path):
  """Returns a function that runs the batch script as a node would."""
  env = stand_in(tmp_path, 'srun', SRUN.format(python=sys.executable))
  env |= stand_in(tmp_path, 'scontrol', f'''\
      #!/bin/bash
      if [ "$1" = show ]; then printf 'node-7\\nnode-8\\n'
      else echo "$@" >>{tmp_path}/scontrol; fi
      ''')
  def start(codes, *words, **changes):
    text = slurm.script(a_job(codes, **changes), args_of(slurm, *words))
    path = tmp_path / 'job.sh'
    path.write_text(text)
    return subprocess.Popen(
        ['bash', path], text=True, stdout=subprocess.PIPE,
        env=os.environ | env | {
            'TASKS': re.search(r'NUM_PROCESSES=(\d+)', text)[1],
            'PIDS': str(tmp_path / 'pids'), 'SLURM_JOB_ID': '4100',
            'SLURM_JOB_NODELIST': 'node-[7-8]'})
  return start


def requeued(tmp_path):
  path = tmp_path / 'scontrol'
  return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize('per_gpu', [False, True])
def test_slurm_tells_each_process_who_it_is(slurm_job, tmp_path, per_gpu):
  process = slurm_job('0', '--nodes=2', '--gpus=2', *['--per_gpu'] * per_gpu,
                      "--setup=export JAX_X='a b'")
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'complete' in out
  count = 4 if per_gpu else 2
  for i in range(count):
    [env] = starts(tmp_path, f'0-{i}')
    assert env['JAX_COORDINATOR_ADDRESS'] == 'node-7:61100'
    assert env['JAX_NUM_PROCESSES'] == str(count)
    assert env['JAX_PROCESS_ID'] == str(i) and env['JAX_X'] == 'a b'
    assert env.get('JAX_LOCAL_DEVICE_IDS') == (str(i % 2) if per_gpu else None)
    assert env['argv'] == ["'"]  # quoted all the way
    log = tmp_path / f'run/logs/process-{i}.log'
    assert log.read_text() == f'output of {i}\n'
  text = (tmp_path / 'job.sh').read_text()
  for line in ('--nodes=2', f'--ntasks-per-node={count // 2}', '--requeue',
               '--gpus-per-node=2', '--signal=TERM@300'):
    assert f'#SBATCH {line}\n' in text
  assert not requeued(tmp_path)


@pytest.mark.parametrize('codes, queued', [
    ('75', True), ('2', False), ('1 1', True)])
def test_slurm_queues_again_by_exit_code(slurm_job, tmp_path, codes, queued):
  for code in codes.split():
    process = slurm_job(codes, '--gpus=0')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == int(code)
    # The second failure is one more than max_restarts.
    assert requeued(tmp_path) == ['requeue 4100'] * queued
  assert ('giving up' in out) == (codes == '1 1')


@pytest.mark.parametrize('state, codes', [
    ('COMPLETING', '75'), ('CANCELLED', '75'), ('COMPLETING', '1')])
def test_slurm_queues_no_job_again_that_was_cancelled(slurm_job, tmp_path,
                                                      state, codes):
  stand_in(tmp_path, 'squeue', f'#!/bin/bash\necho {state}\n')
  out, _ = slurm_job(codes, '--gpus=0').communicate(timeout=60)
  assert ': cancelled' in out and not requeued(tmp_path)


def test_slurm_counts_the_failures_of_one_job(slurm_job, tmp_path):
  logs = tmp_path / 'run/logs'
  logs.mkdir(parents=True)
  (logs / 'failures-4099').write_text('7')
  slurm_job('1', '--gpus=0').communicate(timeout=60)
  assert requeued(tmp_path) == ['requeue 4100']


def test_slurm_outlives_the_signal_that_its_processes_get(slurm_job, tmp_path):
  process = slurm_job('wait', '--gpus=0')
  wait_for(tmp_path / 'starts-0-0')
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  assert process.poll() is None
  for pid in (tmp_path / 'pids').read_text().split():
    os.kill(int(pid), signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and requeued(tmp_path) == ['requeue 4100']


@pytest.mark.slow
def test_slurm_shows_process_0_until_the_job_has_left_the_queue(
    a_job, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(slurm, 'POLL_SECONDS', 0.1)
  j = a_job('0')
  stand_in(tmp_path, 'sbatch', '#!/bin/bash\necho "4100;cluster"\n')
  env = stand_in(tmp_path, 'squeue', f'''\
      #!/bin/bash
      echo "$@" >>{tmp_path}/squeue
      case $(wc -l <{tmp_path}/squeue) in
        2) echo "nobody answers" >&2; exit 1 ;;
        20) echo "Invalid job id specified" >&2; exit 1 ;;
        *) echo output of a step >>{j.logs}/process-0.log; echo 4100 RUNNING ;;
      esac
      ''')
  monkeypatch.setenv('PATH', env['PATH'])
  assert slurm.launch(j, args_of(slurm)) == 0
  assert len((tmp_path / 'squeue').read_text().splitlines()) == 20
  assert '--jobs=4100\n' in (tmp_path / 'squeue').read_text()
  assert 'output of a step' in capfd.readouterr().out
  assert (tmp_path / 'run/logs/job.sh').exists()


def test_slurm_passes_on_what_a_shell_would_execute(slurm_job, tmp_path):
  told, changes = hostile_job(tmp_path)
  logs = tmp_path / "lo gs '$(touch executed)%j%%;#"
  process = slurm_job('0', '--gpus=0', logs=str(logs), **changes)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  [env] = starts(tmp_path)
  assert env['argv'] == [told, '--x=' + told]
  assert env['JAX_X'] == env['JAX_COMPILATION_CACHE_DIR'] == told
  assert (logs / 'process-0.log').exists()
  assert not (tmp_path / 'executed').exists()
  assert not pathlib.Path('executed').exists()


def sbatch_words(line):
  """Returns what sbatch 24.11 was seen to make of a #SBATCH line."""
  words, word, quote = [], None, ''
  rest = iter(line.removeprefix('#SBATCH'))
  for c in rest:
    if c == '\\':
      word = (word or '') + next(rest)
    elif quote:
      word, quote = word + c * (c != quote), '' if c == quote else quote
    elif c in '"\'':
      word, quote = word or '', c
    elif c.isspace() or c == '#':
      words.append(word)
      word = None
      if c == '#':
        break
    else:
      word = (word or '') + c
  return [word for word in (*words, word) if word is not None]


@hypothesis.given(st.lists(st.text(' \t"\'\\#%$`;=-,é\x0bab', min_size=1),
                           min_size=1))
def test_an_sbatch_line_holds_its_words(words):
  line = sbatch.line(*words)
  assert sbatch_words(line) == words and '\n' not in line


def directives(a_job, *words, **changes):
  text = slurm.script(a_job('0', **changes), args_of(slurm, *words))
  lines = text.splitlines()
  return [sbatch_words(line) for line in lines if line.startswith('#SBATCH')]


def test_the_directives_of_slurm(a_job, tmp_path):
  found = directives(
      a_job, '--cpus_per_task=12',
      "--sbatch=--partition big --comment='two words' --mem=0 -t 30",
      logs=f'{tmp_path}/a b%j')
  assert [f'--output={tmp_path}/a b%%j/job.log'] in found
  assert ['--cpus-per-task=12'] in found
  assert found[-4:] == [['--partition', 'big'], ['--comment=two words'],
                        ['--mem=0'], ['-t', '30']]


@pytest.mark.parametrize('words, changes, told', [
    ([], dict(logs='/a\ntouch x'), "'--output=/a.*holds a line break"),
    ([], dict(logs='/a\\b'), 'holds a backslash'),
    (['--sbatch=--comment="a\nb"'], {}, 'holds a line break'),
    (['--sbatch=--comment="a'], {}, 'No closing quotation'),
    (['--sbatch=gpu'], {}, "'gpu', which is no option: write --NAME=VALUE"),
    (['--sbatch=--nodes=3'], {}, 'use its flag --nodes'),
    (['--sbatch=-N3'], {}, 'use its flag --nodes'),
    (['--sbatch=--mem=0 --sig=TERM@9'], {}, 'use its flag --grace_seconds'),
    (['--sbatch=--no-requeue'], {}, 'leave it out'),
    (['--sbatch=-c 8'], {}, 'use its flag --cpus_per_task'),
    (['--sbatch=--time=5'], {}, 'stopped and queued again for ever; choose 7'),
    (['--sbatch=-t 0:6:59'], {}, 'choose 7 minutes or more'),
    (['--sbatch=--time 1', '--grace_seconds=20'], {}, 'choose 3 minutes')])
def test_slurm_refuses(a_job, words, changes, told):
  with pytest.raises(ValueError, match=told):
    directives(a_job, *words, **changes)


@pytest.mark.parametrize('limit', ['7', '0', 'UNLIMITED', '1-0', '0:7:0'])
def test_slurm_takes_a_limit_that_leaves_time(a_job, limit):
  assert [f'--time={limit}'] in directives(a_job, f'--sbatch=--time={limit}')


@pytest.mark.parametrize('text, seconds', [  # the forms that sbatch(1) lists
    ('90', 5400), ('90:30', 5430), ('2:03:04', 7384), ('1-2', 93600),
    ('1-2:03', 93780), ('1-2:03:04', 93784), ('0', math.inf),
    ('infinite', math.inf), ('soon', math.inf)])
def test_the_forms_of_a_time_limit(text, seconds):
  assert sbatch.seconds(text) == seconds


@pytest.mark.parametrize('limit, code', [(300, 2), (419, 2), (420, 0)])
def test_slurm_ends_where_the_limit_of_its_partition_is_too_short(
    slurm_job, tmp_path, monkeypatch, limit, code):
  monkeypatch.setenv('SLURM_JOB_START_TIME', '1700000000')
  monkeypatch.setenv('SLURM_JOB_END_TIME', str(1700000000 + limit))
  process = slurm_job('0', '--gpus=0')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code and not requeued(tmp_path)
  assert ('choose 420 s or more' in out) == bool(code)
