"""The programs as a user meets them: help, start-up time, refusals."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from common import errors, fields
from tests.helpers import forked
from training import cli, plugins

ROOT = pathlib.Path(__file__).parents[2]
# Imported by a run that asks for them, never by `--help`.
HEAVY = ('orbax', 'grain', 'tensorboard', 'tensorflow', 'wandb', 'torch',
         'transformers', 'datasets', 'tokenizers', 'sentencepiece', 'pyarrow',
         'array_record', 'matplotlib', 'pandas', 'scipy.stats')


def _module(path):
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix(
      '.__main__')


def _is_program(path):
  """Whether the file is run by people: it has a main guard, and flags."""
  text = path.read_text()
  return '__main__' in text and re.search(r'argparse|import flags', text)


TOOLS = sorted(
    _module(path) for room in ('tools', 'benchmarks')
    for path in ROOT.glob(f'{room}/**/*.py') if _is_program(path))


def run(*words, **environment):
  return subprocess.run(
      [sys.executable, *words], cwd=ROOT, env=os.environ | environment,
      capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('program', ['train.py', 'eval.py'])
def test_help_takes_under_three_seconds_and_imports_nothing_heavy(program):
  seconds = []
  while len(seconds) < 3 and min(seconds, default=9) > 3:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run('-X', 'importtime', program, '--help')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of a core, since others may be at work on this machine.
    seconds.append(after.ru_utime - before.ru_utime
                   + after.ru_stime - before.ru_stime)
    assert result.returncode == 0, result.stderr
    imported = {line.rpartition('|')[2].strip()
                for line in result.stderr.splitlines()}
    assert 'jax' in imported and imported.isdisjoint(HEAVY)
    _shows_its_examples(program, result.stdout)
  assert min(seconds) <= 3, seconds


def test_the_help_of_eval_has_every_task_and_its_flags():
  from training import evals
  shown = ' '.join(forked.run('eval.py', '--help').stdout.split())
  for name, task in evals.TASKS.items():
    assert f'{name}: {task.help}' in shown
    for flag in task.flags:
      # Several tasks may read a flag: each says what it is to them, or some
      # together.
      assert re.search(rf'--(\[no\])?{flag.name}: ((?! --).)*\b{name}(, \w+)*: '
                       + re.escape(flag.help), shown)


@pytest.mark.slow
@pytest.mark.parametrize('tool', TOOLS)
def test_each_tool_has_help(tool):
  result = forked.run('-m', tool, '--help')
  assert result.returncode == 0, result.stderr
  assert 'Traceback' not in result.stderr
  assert len(result.stdout.splitlines()) > 2
  path = tool.replace('.', '/')
  file = f'{path}/__main__.py' if (ROOT / path).is_dir() else f'{path}.py'
  _shows_its_examples(file, result.stdout)


def _shows_its_examples(file, stdout):
  """Whether --help has each line of the examples as the source has it."""
  text = (ROOT / file).read_text().split('"""')[1]
  for line in text.splitlines():
    if line.startswith('  python') or line.endswith('\\'):
      assert line in stdout.splitlines(), line


def train(workdir, *flags, **options):
  return forked.run('train.py', '--config', 'configs/gpt.py',
                    f'--workdir={workdir}', *flags, **options)


REFUSALS = {
    'flag': (['--wrokdir=x'], ['wrokdir', 'Did you mean --workdir?']),
    'flag of a field': (['--lr=3e-4'], [
        'unknown flag --lr', 'Did you mean --config.optim.lr?']),
    'flags of several': (['--every_steps=3'], [
        'Did you mean --config.checkpoint.every_steps or --config.eval.']),
    'field without its group': (
        ['--config.lr=1'], ['Did you mean --config.optim.lr?']),
    'field of the model without its group': (
        ['--config.norm=rmsnorm'], ['Did you mean --config.model.norm?']),
    'field of a part without the model': (
        ['--config.lora.rank=2'], ['Did you mean --config.model.lora.rank']),
    'field in other words': (['--config.optim.learning_rate=1'],
                             ['Did you mean --config.optim.lr?']),
    'long flag': (['--' + 'x' * 3000], ['unknown flag --x', 'x...x']),
    'profile': (['--profile_steps=5000:5010'], ['5000:5010', 'train.steps']),
    'key beside a longer one': (
        ['--config.train.steps=2', '--config.train.step=3'],
        ['--config.train.step is no field of the config. Did you mean '
         '--config.train.steps?']),
    'value': (['--config.optim.lr=fast'],
              ["--config.optim.lr is 'fast': it must be a number"]),
    'neither true nor false': (
        ['--config.log.tensorboard=maybe'],
        ["--config.log.tensorboard is 'maybe': it must be True or False"]),
    'size': (['--config.model.d_model=1000000'],
             ['parameters and optimiser have', 'GiB on a cpu, which has']),
    'mesh': (['--config.mesh.tensor=3'], ['mesh', '3', '8']),
    'source': (['--config.data.source=text:no/such/*.txt'], ['no/such/*.txt']),
}


def test_a_field_of_the_config_is_no_flag_of_what_has_none():
  _refused(forked.run('eval.py', '--config.data.eval_source=labelled:a.tsv'),
           ['unknown flag --config.data.eval_source', 'Did you mean --text?'])


@pytest.mark.parametrize('name', REFUSALS)
def test_a_wrong_request_is_one_sentence(name, tmp_path):
  flags, parts = REFUSALS[name]
  result = train(tmp_path / 'run', *flags)
  _refused(result, parts)
  assert not list(tmp_path.glob('run/checkpoints/*'))


def test_a_python_without_the_packages_is_told_the_line_that_activates_them():
  for words in (['train.py'], ['eval.py'], ['-m', 'tools.count']):
    done = subprocess.run([sys.executable, '-S', *words], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert '. .venv/bin/activate' in done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


# Requests of which a part would not be read, and what is said of them.
PARTS_UNREAD = {
    'a field twice': (
        ['train.py', '--config=configs/gpt.py', '--config.optim.lr=1',
         '--config.optim.lr=2'], '--config.optim.lr is given twice'),
    'a flag twice': (['train.py', '--workdir=a', '--workdir=b'],
                     'flag --workdir=b: already defined as a'),
    'a flag of a launcher twice': (
        ['-m', 'tools.launch', 'local', '--max_restarts=1', '--max_restarts=2'],
        'already defined as 1'),
    'a name of a list twice': (['eval.py', '--workdir=a', '--tasks=loss,loss'],
                               '--tasks is \'loss,loss\': name each once'),
    'an axis twice': (
        ['-m', 'tools.explain_sharding', '--config=configs/gpt.py',
         '--mesh=fsdp=2,fsdp=4'], "--mesh has fsdp twice, as '2' and '4'"),
    'no number': (['eval.py', '--workdir=a', '--temperature=nan'],
                  '--temperature is nan'),
    'no end': (['-m', 'tools.coord_check', '--lr=inf'], '--lr is inf'),
    'too many devices': (
        ['-m', 'tools.explain_sharding', '--config=configs/gpt.py',
         '--mesh=context=99999'], 'a mesh of 99,999 devices'),
    'no place': (['-m', 'tools.launch', 'nope'],
                 "error: unknown place to launch on 'nope': choose from local"),
    'no rate': (['-m', 'tools.coord_check', '--lr=0'], '--lr is 0.0'),
}


@pytest.mark.parametrize('name', PARTS_UNREAD)
def test_a_request_is_read_whole_or_refused(name):
  words, sentence = PARTS_UNREAD[name]
  _refused(forked.run(*words), [sentence])


def _parser():
  parser = cli.Parser()
  parser.add_argument('--size', type=float, default=1.0)
  parser.add_argument('--names', nargs='*', default=[])
  parser.add_argument('--each', action='append')
  return parser


@pytest.mark.parametrize('words, sentence', [
    (['--size=2', '--size=2'], '--size: is given twice'),
    (['--names', 'a', '--names', 'b'], '--names: is given twice'),
    (['--size=inf'], 'inf is not a finite number'),
    (['--size=nan'], 'nan is not a finite number'),
    (['--size=x'], 'invalid')])
def test_a_parser_reads_all_words_or_refuses(words, sentence, capsys):
  args = _parser().parse_args(['--size=2', '--each=a', '--each=b'])
  assert (args.size, args.each) == (2.0, ['a', 'b'])
  with pytest.raises(SystemExit) as exit_:
    _parser().parse_args(words)
  assert exit_.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize('words, sentence', [
    (['a=1', 'b=2', 'a=1'], "a twice, as '1' and '1'"),
    (['a'], 'write it as NAME=VALUE'),
    (['=1'], 'write it as NAME=VALUE'),
    (['c=1'], "unknown name in --x 'c': choose from a, b")])
def test_each_name_is_assigned_once(words, sentence):
  with pytest.raises(errors.RequestError, match=re.escape(sentence)):
    fields.parse_assignments(words, '--x', 'ab' if 'c=1' in words else ())
  assert fields.parse_assignments(['a=1', ' b=2=3'], '--x', 'ab') == {
      'a': '1', 'b': '2=3'}


# What a user's file may do, and what is said of it.
BAD_FILES = {
    'def get_config(:': 'line 1: SyntaxError',
    'def get_config():\n  return 1 / 0': 'line 2: ZeroDivisionError: division',
    'def get_config():\n  pass': 'returned None, which is no ConfigDict',
    'from configs import base\ndef get_config():\n  c = base.base()\n'
    '  c.modle.d_model = 64\n  return c':
        'line 4: AttributeError: ',
    # What fails before a line of the file is run has no line.
    'def get_config(size, more):\n  return size':
        'mine.py: TypeError: get_config',
    'get_config = 3': "mine.py: TypeError: 'int' object is not callable",
    'a = "\0"': 'mine.py: SyntaxError: source code',
}


@pytest.mark.parametrize('text', BAD_FILES)
def test_an_error_in_a_config_file_has_its_file_and_line(text, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  with pytest.raises(errors.RequestError) as error:
    plugins.load_config_file(str(file))
  assert str(error.value).startswith(str(file))
  assert BAD_FILES[text] in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.slow
def test_kinds_of_layer_are_flags():
  """Also of a kind that is called as a keyword of Python."""
  words = ['--config.model.pattern=local,global']
  kinds = dict(local=dict(window=16), **{'global': dict(
      qk_norm=False, rope=dict(theta=1e6))})
  flags = ['--config.model.kinds.local.window=16',
           '--noconfig.model.kinds.global.qk_norm',
           '--config.model.kinds.global.rope.theta=1e6']
  for given in (flags, [f'--config.model.kinds={kinds}']):
    result = forked.run('train.py', '--config', 'configs/llama.py:tiny',
                        *words, *given, '--print_config')
    assert json.loads(result.stdout)['model']['kinds'] == kinds, result.stderr
  result = forked.run(
      'train.py', '--config', 'configs/llama.py:tiny', *words, *flags,
      '--config.model.kinds.local.position=none',
      '--config.model.kinds.local.rope.theta=9', '--print_config')
  assert result.returncode == 2
  assert ('model.kinds.local.rope.theta is 9.0, which this model does not read'
          in result.stderr)


@pytest.mark.slow
def test_ctrl_c_while_a_run_compiles_ends_it(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')

  def interrupt(pid):
    output = pathlib.Path(f'/proc/{pid}/fd/1')  # a file once it has begun
    while output.exists():
      if output.is_file() and 'compiling\n' in output.read_text():
        # By then the loop has the signal, which it hears after the compiler.
        return os.kill(pid, signal.SIGINT)
      time.sleep(0.01)
  result = train(tmp_path / 'run', '--config.data.source=text:README.md',
                 '--config.model.num_layers=1',
                 '--config.model.d_model=32', '--config.data.length=16',
                 meanwhile=interrupt)
  assert result.returncode == 0 and 'SIGINT: finishing' in result.stderr
  assert 'saved: the same command' in result.stdout


@pytest.mark.parametrize('error, code, words', [
    (errors.RequestError('no a'), 2, 'error: no a\n'),
    (errors.EnvironmentFailure('no b'), 1, 'error: no b\n'),
    (OSError(28, 'No space left'), 1, 'error: [Errno 28] No space left\n'),
    (OSError(cli.errno.ENAMETOOLONG, 'Too long'), 2, 'Too long\n'),
    (errors.Stopped(), 75, 'stopped: the same command goes on\n'),
    (MemoryError('of the host'), 1,
     'this machine has no memory left (of the host): end'),
    (MemoryError(), 1, 'this machine has no memory left: end')])
def test_each_kind_of_failure_has_its_exit_code(error, code, words, capsys):
  def fail():
    raise error
  with pytest.raises(SystemExit) as exit_:
    cli.run(fail)
  stderr = capsys.readouterr().err
  assert exit_.value.code == code and words in stderr
  assert 'Traceback' not in stderr and stderr.count('\n') == 1


def test_a_program_that_nobody_reads_any_more_ends_as_by_a_signal():
  process = subprocess.Popen(
      [sys.executable, '-c', 'from training import cli\n'
       'cli.run(lambda: print("line\\n" * 10**6))'], cwd=ROOT,
      stdout=subprocess.PIPE)
  process.stdout.readline()
  process.stdout.close()
  assert process.wait(60) == 128 + signal.SIGPIPE


def test_a_full_device_is_one_sentence(capsys):
  import jax.numpy as jnp
  with pytest.raises(SystemExit) as exit_:
    cli.run(lambda: jnp.zeros(2**46, 'int8') and 0)
  assert exit_.value.code == 1
  assert 'a device has no memory left' in capsys.readouterr().err


def _refused(result, parts):
  assert result.returncode == 2, result.stderr
  assert 'Traceback' not in result.stdout + result.stderr
  lines = [x for x in result.stderr.splitlines() if x.startswith('error: ')]
  assert len(lines) == 1, result.stderr
  for part in parts:
    assert part in lines[0], lines[0]
