"""What the programs share at the command line: flags, errors, exit codes.

Exit codes: 0 done or cleanly stopped; 2 a wrong request (RequestError, printed
as one sentence); 1 a failure, either of the environment (EnvironmentFailure or
OSError, one sentence) or a bug (any other exception, with its traceback);
128 + n ended by signal n.
"""

from collections.abc import Callable, Sequence
import contextlib
import difflib
import pathlib
import re
import signal
import sys

from absl import flags
from ml_collections import config_flags

from configs.errors import EnvironmentFailure, RequestError

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# Called with the sentence and the exit code before a program ends in failure:
# a run of several processes tells the others.
at_failure: list[Callable[[str, int], None]] = []


def run(main: Callable[[], int | None],
        around=contextlib.nullcontext()) -> None:
  """Calls main() and exits with its code, or with that of its failure: see
  the head of this file.

  Args:
    main: the program; returns its exit code, or None for 0.
    around: a context for it, such as interrupts.EndAtOnce().
  """
  try:
    with around:
      code = main() or 0
  except RequestError as error:
    _tell(error, 2)
    _refuse(str(error))
  except BrokenPipeError:  # `| head` has read enough
    sys.stderr.close()
    code = 0
  except (EnvironmentFailure, OSError) as error:
    _tell(error, 1)
    print(f'error: {error}', file=sys.stderr, flush=True)
    code = 1
  except KeyboardInterrupt:
    print('\nSIGINT: ended', file=sys.stderr, flush=True)
    code = 128 + signal.SIGINT
  sys.exit(code)


def define_config(text: str = 'A file of configs/ and its size, FILE.py:SIZE; '
                  'any field is a flag: --config.optim.lr=3e-4.') -> None:
  """Defines --config for the program that calls; once, so that one process
  may import several programs."""
  if 'config' not in flags.FLAGS:
    config_flags.DEFINE_config_file('config', help_string=text)


def define_workdir() -> None:
  """Defines --workdir, likewise."""
  if 'workdir' not in flags.FLAGS:
    flags.DEFINE_string('workdir', '', 'The folder of the run.')


def _tell(error: Exception, code: int):
  for call in at_failure:
    call(str(error), code)


def parse(doc: str, argv: Sequence[str] | None = None) -> None:
  """Parses absl flags, `--config` and its overrides included.

  Args:
    doc: the program's docstring, printed by --help above the flags.
    argv: the command line; default: the process's own.
  """
  argv = list(sys.argv if argv is None else argv)
  if {'--help', '-h', '-help', '--helpfull'} & set(argv[1:]):
    print(doc.strip(), '\n\nflags:')
    for name in _own_flags():
      print(f'  --{name}: {flags.FLAGS[name].help}')
    sys.exit(0)
  _check_config_file(argv)
  try:
    rest = flags.FLAGS(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    _refuse(_unknown_flag(error))
  except flags.Error as error:
    _refuse(_cause(error))
  except (AttributeError, KeyError, OSError, TypeError) as error:
    _refuse(_config_error(argv, error))
  if rest:
    _refuse(f'unexpected argument {rest[0]!r}: every setting is a --flag')


def words(argv: Sequence[str], names: Sequence[str]) -> list[str]:
  """Returns the words of a command line that set the flags `names`, or, for
  'config', one of its fields; each as --name=value. After `parse`."""
  found, rest = [], list(argv[1:])
  while rest:
    name, equals, value = rest.pop(0).lstrip('-').partition('=')
    flag = flags.FLAGS[name] if name in flags.FLAGS else None
    if not equals and flag is not None and not flag.boolean:
      equals, value = '=', rest.pop(0)
    if {name, name.split('.')[0], name.removeprefix('no')} & set(names):
      found.append(f'--{name}{equals}{value}')
  return found


def _refuse(sentence: str):
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  sys.exit(2)


def _cause(error: BaseException) -> str:
  """The sentence of the error that a config file raised, or absl's own."""
  at = error
  while at is not None and 'parsing config file' in str(at):
    at = at.__context__
  return str(at or error).splitlines()[0]


def _own_flags() -> list[str]:
  """The flags that the program itself defines."""
  return sorted(f.name for f in flags.FLAGS.get_key_flags_for_module(
      sys.modules['__main__']))


def _unknown_flag(error) -> str:
  near = difflib.get_close_matches(error.flagname, _own_flags(), n=1)
  hint = f' Did you mean --{near[0]}?' if near else ''
  return (f'unknown flag --{error.flagname}: choose from '
          f'{", ".join(_own_flags())}.{hint}')


def _check_config_file(argv: Sequence[str]) -> None:
  """Refuses a --config whose file is not there, which absl finds out late."""
  given = [a.partition('=')[2] or b for a, b in zip(argv, argv[1:] + [''])
           if re.fullmatch(r'--?config(=.*)?', a)]
  for file in (value.split(':')[0] for value in given):
    path = pathlib.Path(file)
    if not path.is_file() or 'get_config' not in path.read_text():
      shared = '__init__', 'base', 'errors', 'sharding'
      files = sorted(str(p) for p in pathlib.Path('configs').glob('*.py')
                     if p.stem not in shared)
      near = difflib.get_close_matches(file, files, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      what = ('is no config: it has no get_config()' if path.is_file()
              else 'is no file')
      _refuse(f'--config {file!r} {what}; choose from '
              f'{", ".join(files)}.{hint}')


def _config_error(argv, error) -> str:
  """A sentence for a --config.key that is not there."""
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  key = re.search(r"'(\w+)'", str(error).replace('\\', ''))
  if key and 'onfig' not in key[1]:
    name = key[1]
    flag = next((a.split('=')[0] for a in argv if f'.{name}' in a), name)
    return (f'{flag}: no config field {name!r}. '
            f'{_near_field(config, flag, name)}')
  return str(error).strip('"\'').splitlines()[0]


def _near_field(config, flag: str, name: str) -> str:
  """The fields beside the one that `flag` misspells."""
  from configs import base
  at = config if config is not None else base.base()
  for part in flag.removeprefix('--config.').split('.'):
    if part not in at:
      break
    at = at[part]
  near = difflib.get_close_matches(name, list(at), n=1)
  hint = f'Did you mean {near[0]!r}? ' if near else ''
  return f'{hint}There are {", ".join(sorted(at))}.'
