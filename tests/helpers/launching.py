"""A run to launch, and stand-ins for what a cluster has."""

import json
import os
import pathlib
import sys
import textwrap
import time

from absl import flags

from tools.launch import job

# A run that notes its environment, and ends with the codes that a file lists,
# a word for each start: 75, 1, ... or `wait`, for SIGTERM.
PROGRAM = '''
    import json, os, pathlib, signal, sys, time
    folder, me = pathlib.Path(__file__).parent, os.environ.get(
        'JAX_PROCESS_ID', os.environ.get('WORKER', '0'))
    starts = folder / f'starts-{os.environ.get("slice", "0")}-{me}'
    n = len(starts.read_text().splitlines()) if starts.exists() else 0
    note = {k: v for k, v in os.environ.items() if k.startswith(
        ('JAX', 'XLA', 'MEGASCALE'))} | {
            'argv': sys.argv[1:], 'pid': os.getpid()}
    code = (folder / 'codes').read_text().split()[n]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    with open(starts, 'a') as file:
      print(json.dumps(note), file=file)
    print('output of', me, flush=True)
    time.sleep(60 if code == 'wait' else 0)
    sys.exit(int(code))
    '''
# What a shell, sbatch, ssh or a here-document would take for its own.
HOSTILE = """a b'\\"$(touch {0})`touch {0}`;touch {0} # %j ~ $HOME
touch {0}
REMOTE
touch {0}
"""


def args_of(module, *words):
  args = flags.FlagValues()
  job.define_flags(job.FLAGS + module.FLAGS, args)
  args(['launch', *words])
  return args


def make_job(folder, codes, workdir=None, **changes):
  """Returns a job whose program ends with the given codes."""
  (folder / 'program.py').write_text(textwrap.dedent(PROGRAM))
  (folder / 'codes').write_text(codes)
  return job.Job(**dict(
      name='a-run', words=(sys.executable, str(folder / 'program.py'), "'"),
      workdir=workdir or str(folder / 'run'), logs=str(folder / 'run/logs'),
      env={'JAX_COMPILATION_CACHE_DIR': str(folder / 'a cache')},
      max_restarts=1, dry_run=False) | changes)


def hostile_job(folder, **changes):
  """Returns a job whose every word is hostile, and the word."""
  word = HOSTILE.format(folder / 'executed')
  return make_job(folder, '0', **dict(
      words=(sys.executable, str(folder / 'program.py'), word, '--x=' + word),
      env={'JAX_X': word, 'JAX_COMPILATION_CACHE_DIR': '/c'}) | changes), word


def starts(folder, who='0-0'):
  path = folder / f'starts-{who}'
  return [json.loads(line) for line in path.read_text().splitlines()]


def is_running(pid):
  """Whether a process is there, and not merely waited for by nobody."""
  path = pathlib.Path(f'/proc/{pid}/stat')
  try:
    return path.read_text().rpartition(')')[2].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


def stand_in(folder, name, text):
  """Makes an executable of the cluster; returns the environment in which it is
  found first."""
  path = folder / 'bin' / name
  path.parent.mkdir(exist_ok=True)
  path.write_text(textwrap.dedent(text))
  path.chmod(0o755)
  return {'PATH': f'{path.parent}:{os.environ["PATH"]}'}


def wait_for(path):
  """Waits until a file holds something."""
  until = time.monotonic() + 60
  while not path.exists() or not path.stat().st_size:
    assert time.monotonic() < until, f'no {path}'
    time.sleep(0.02)
