"""Runs the programs of this project as a user does, without importing JAX each
time.

To import JAX, Orbax and Grain takes longer than most programs of a test, and so
do the modules of this project. So one process imports them, and a program runs
in a fork of it, with arguments, a folder, an environment, output and an exit
code of its own. In a copy of the project it imports the modules of the copy. A
test of imports or of the time that a program takes to start has to start it for
real.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ('numpy', 'jax', 'flax.linen', 'optax', 'chex', 'orbax.checkpoint',
            'grain', 'ml_collections.config_flags', 'training.loop',
            'training.preflight', 'training.evals.held_out', 'training.cli',
            'tools.compare.study', 'tools.compare.check')
OURS = {path.name.removesuffix('.py') for path in ROOT.iterdir()}
# What JAX reads of the environment, it reads when it is imported.
READ_BY_JAX = ('JAX_', 'PYTHON')


def run(*words: str, cwd: pathlib.Path = ROOT, stdin: str = '',
        timeout: float = 300, meanwhile: Callable[[int], None] | None = None
        ) -> subprocess.CompletedProcess:
  """Runs `python WORDS`, which begin with a file, -m MODULE or -c CODE.

  Args:
    cwd: the folder that it runs in.
    stdin: what it reads from its standard input.
    timeout: in seconds.
    meanwhile: called with the number of its process once that has started.

  Raises:
    subprocess.TimeoutExpired: it has not ended after `timeout` seconds.
  """
  words = [str(word) for word in words]
  if words[0] == '-c' or _of_jax(os.environ) != _server()[1]:
    assert meanwhile is None
    return subprocess.run([sys.executable, *words], cwd=cwd, input=stdin,
                          text=True, capture_output=True, timeout=timeout)
  with tempfile.TemporaryDirectory() as folder:
    files = {name: f'{folder}/{name}' for name in ('stdin', 'out', 'err')}
    pathlib.Path(files['stdin']).write_text(stdin)
    pid = _ask(dict(words=words, cwd=str(cwd), env=dict(os.environ), **files))
    try:
      if meanwhile:
        meanwhile(pid)
      code = _answer(timeout)
    except TimeoutError:
      os.kill(pid, signal.SIGKILL)
      _answer(60)
      raise subprocess.TimeoutExpired(words, timeout) from None
    out, err = (pathlib.Path(files[name]).read_text()
                for name in ('out', 'err'))
  return subprocess.CompletedProcess(words, code, out, err)


def _of_jax(environment) -> dict[str, str]:
  return {name: value for name, value in environment.items()
          if name.startswith(READ_BY_JAX)}


@functools.cache
def _server() -> tuple[subprocess.Popen, dict[str, str]]:
  """Returns the process to fork, and what JAX has read in it."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'tests.helpers.forked'], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  atexit.register(process.stdin.close)  # which ends it
  return process, _of_jax(os.environ)


def _ask(request: dict) -> int:
  """Returns the number of the process in which the program runs."""
  process, _ = _server()
  process.stdin.write(json.dumps(request) + '\n')
  process.stdin.flush()
  return _answer(300)


def _answer(timeout: float) -> int:
  """Returns the next number that the server prints."""
  process, _ = _server()
  ready, _, _ = select.select([process.stdout], [], [], timeout)
  if not ready:
    raise TimeoutError
  return int(process.stdout.readline())


def _serve():
  """Forks for each request; returns the request in the fork only."""
  for package in PACKAGES:
    importlib.import_module(package)
  gc.freeze()
  for line in sys.stdin:
    with warnings.catch_warnings():  # JAX has no threads yet
      warnings.simplefilter('ignore')
      pid = os.fork()
    if pid == 0:
      return json.loads(line)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
  sys.exit()


def _become(words, cwd, env, stdin, out, err):
  """Turns this process into `python WORDS` in that folder."""
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(env)
  for number, path, how in ((0, stdin, os.O_RDONLY),
                            (1, out, os.O_WRONLY | os.O_CREAT),
                            (2, err, os.O_WRONLY | os.O_CREAT)):
    os.dup2(os.open(path, how), number)
  ours = OURS if pathlib.Path(cwd) != ROOT else {'tests'}
  for name in [name for name in sys.modules if name.split('.')[0] in ours]:
    del sys.modules[name]
  import runpy
  if words[0] == '-m':
    sys.argv = words[1:]
    sys.path[0] = cwd
    runpy.run_module(words[1], run_name='__main__', alter_sys=True)
  else:
    sys.argv = words
    # Programs that are helpers of tests import `tests` from the folder.
    sys.path[:1] = [str(pathlib.Path(words[0]).resolve().parent), cwd]
    runpy.run_path(words[0], run_name='__main__')


if __name__ == '__main__':
  _become(**_serve())
