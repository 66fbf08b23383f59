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
# The modules and packages of the project.
OWN_MODULES = {path.name.removesuffix('.py') for path in ROOT.iterdir()}
# What JAX and Python read of the environment, they read when they start.
PREFIXES_READ_AT_START = ('JAX_', 'PYTHON')


def run(*words: str, cwd: pathlib.Path = ROOT, stdin: str = '',
        timeout: float = 300, meanwhile: Callable[[int], None] | None = None
        ) -> subprocess.CompletedProcess:
  """Runs `python WORDS`, which begin with a file, -m MODULE or -c CODE.

  Args:
    *words: the file, module or code, and the arguments of the program.
    cwd: the folder that it runs in.
    stdin: what it reads from its standard input.
    timeout: in seconds.
    meanwhile: called with the number of its process once that has started.

  Raises:
    subprocess.TimeoutExpired: it has not ended after `timeout` seconds.
  """
  # The process that is forked has its own values of what is read at a start.
  words = [str(word) for word in words]
  if words[0] == '-c' or _read_at_start(os.environ) != _server()[1]:
    assert meanwhile is None
    return subprocess.run([sys.executable, *words], cwd=cwd, input=stdin,
                          text=True, capture_output=True, timeout=timeout)

  # Run in a fork, which reads from files and writes to files.
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
    out = pathlib.Path(files['out']).read_text()
    err = pathlib.Path(files['err']).read_text()
  return subprocess.CompletedProcess(words, code, out, err)


def _read_at_start(environment) -> dict[str, str]:
  """Returns the variables of an environment that a program reads as it starts.
  """
  return {name: value for name, value in environment.items()
          if name.startswith(PREFIXES_READ_AT_START)}


@functools.cache
def _server() -> tuple[subprocess.Popen, dict[str, str]]:
  """Starts the process to fork, once; returns it, and what it read of the
  environment as it started."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'tests.helpers.forked'], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  atexit.register(process.stdin.close)  # which ends it
  return process, _read_at_start(os.environ)


def _ask(request: dict) -> int:
  """Asks the server for a fork; returns the number of the process in which the
  program runs."""
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
  """Forks for each request that comes in as a line of JSON, and prints the
  number of the fork and then its exit code; returns the request in the fork
  only."""
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
  """Turns this process into `python WORDS`.

  Args:
    words: the file, or -m and the module, and the arguments of the program.
    cwd: the folder that it runs in.
    env: its environment.
    stdin, out, err: the files of its input, output and errors.
  """
  # The folder, the environment and the files.
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(env)
  write = os.O_WRONLY | os.O_CREAT
  for descriptor, path, mode in ((0, stdin, os.O_RDONLY), (1, out, write),
                                 (2, err, write)):
    os.dup2(os.open(path, mode), descriptor)

  # In a copy of the project, forget its modules: the copy has its own.
  forgotten = {'tests'}
  if pathlib.Path(cwd) != ROOT:
    forgotten = OWN_MODULES
  for name in list(sys.modules):
    if name.split('.')[0] in forgotten:
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
