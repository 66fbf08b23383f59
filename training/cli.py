"""What the programs share at the command line: flags, errors, exit codes.

Exit codes: 0 done or cleanly stopped; 2 a wrong request (RequestError, printed
as one sentence; of train.py also a loss that is not finite); 1 a failure,
either of the environment (EnvironmentFailure or OSError, one sentence) or a bug
(any other exception, with its traceback); 128 + n ended by signal n.
"""

from collections.abc import Callable, Mapping, Sequence
import argparse
import contextlib
import difflib
import importlib
import keyword
import re
import signal
import sys
import textwrap

from absl import flags
import ml_collections
from ml_collections import config_flags

from configs.errors import EnvironmentFailure, RequestError, require
from training import config_files

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# Called with the exit code of a program that fails, once its sentence is
# printed: a run of several processes does not wait for the others then.
at_failure: Callable[[int], None] = sys.exit


def run(main: Callable[[], int | None],
        around: contextlib.AbstractContextManager = contextlib.nullcontext(),
        unread: int = 0) -> None:
  """Calls main() and exits with its code, or with that of its failure: see
  the head of this file.

  Args:
    main: the program; returns its exit code, or None for 0.
    around: a context for it, such as interrupts.EndAtOnce().
    unread: the exit code where nobody reads what it prints.
  """
  try:
    for word in sys.argv[1:]:  # such a path fails where a run is saved
      require(word.encode('utf-8', 'ignore').decode() == word,
              f'the argument {word!r} is not UTF-8')
    with around:
      code = main() or 0
    sys.exit(code)
  except RequestError as error:
    code, sentence = 2, f'error: {error}'
  except BrokenPipeError:  # `| head` has read enough
    sys.stderr.close()
    (at_failure if unread else sys.exit)(unread)
  except (EnvironmentFailure, OSError) as error:
    code, sentence = 1, f'error: {error}'
  except Exception as error:
    if not is_out_of_memory(error):
      raise
    code, sentence = 1, (
        'error: a device has no memory left: take a smaller data.batch_size, '
        'a larger train.grad_accumulation, model.remat=full, or more '
        'devices over which mesh.fsdp cuts the state '
        f'({str(error).splitlines()[0]})')
  except KeyboardInterrupt:
    code, sentence = 128 + signal.SIGINT, '\nSIGINT: ended'
  print(sentence, file=sys.stderr, flush=True)
  at_failure(code)


def define_config(text: str = 'A file of configs/ and its size, FILE.py:SIZE; '
                  'any field is a flag: --config.optim.lr=3e-4.') -> None:
  """Defines --config for the program that calls; once, so that one process
  may import several programs."""
  if 'config' not in flags.FLAGS:
    try:  # which reads any --flagfile at once
      config_flags.DEFINE_config_file('config', help_string=text,
                                      sys_argv=_words_of_config)
      flags.FLAGS['config'].parser = _ConfigFile('config')
    except flags.Error as error:
      _refuse_flags(error)


# The command line as ml_collections reads it; `parse` fills it in.
_words_of_config: list[str] = []


def _spelt(word: str) -> str:
  """Returns a word of a command line as ml_collections can read it and other
  programs can be given it: --config.FIELD=False for --noconfig.FIELD, and a
  kind of layer that is called as a keyword of Python, `global`, in quotes."""
  word = re.sub(r'^--?noconfig\.([^=]*)$', r'--config.\1=False', word)
  return re.sub(r'(--?config\.model\.kinds)\.(\w+)\.', lambda m: (
      f'{m[1]}[{m[2]!r}].' if keyword.iskeyword(m[2]) else m[0]), word, count=1)


class _ConfigFile(config_flags.config_flags.ConfigFileFlagParser):
  """Loads the file of --config, for ml_collections to set what the flags say:
  kinds of layer that they name first are there then."""

  def parse(self, path: str):
    config = super().parse(path)
    if isinstance(config, ml_collections.ConfigDict):
      config_files.declare_kinds(config, _words_of_config)
    return config


def define_workdir() -> None:
  """Defines --workdir, likewise."""
  if 'workdir' not in flags.FLAGS:
    flags.DEFINE_string('workdir', '', 'The folder of the run.')


def _has_default(text: str | None, default: object) -> bool:
  """Whether a flag's --help needs no default behind its text: there is none,
  or the text says what it means."""
  return default in (None, '', []) or 'default:' in (text or '')


class HelpFormatter(argparse.RawDescriptionHelpFormatter,
                    argparse.ArgumentDefaultsHelpFormatter):
  """--help of a program with subcommands: the text keeps its layout, and each
  flag shows its default."""

  def _get_help_string(self, action: argparse.Action):
    if action.nargs == 0 or _has_default(action.help, action.default):
      return action.help
    return super()._get_help_string(action)


def run_command(prog: str, doc: str | None,
                commands: Mapping[str, tuple[str, str]]) -> int:
  """Runs a program with subcommands; returns its exit code.

  Args:
    prog: how it is called.
    doc: what --help says of it.
    commands: by name, a module that has add_arguments(parser) and main(args),
      and what it does.
  """
  parser = argparse.ArgumentParser(prog=prog, description=doc,
                                   allow_abbrev=False,
                                   formatter_class=HelpFormatter)
  own = parser.add_subparsers(dest='command', required=True)
  for name, (module, told) in commands.items():
    importlib.import_module(module).add_arguments(own.add_parser(
        name, help=told, description=told, allow_abbrev=False,
        formatter_class=HelpFormatter))
  args = parser.parse_args()
  return importlib.import_module(commands[args.command][0]).main(args)


def is_out_of_memory(error: Exception) -> bool:
  """Whether XLA could not have the memory that it asked for."""
  if isinstance(error, MemoryError):
    return True
  jax = sys.modules.get('jax')  # not imported for this alone
  return (jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
          and 'RESOURCE_EXHAUSTED' in str(error))


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
      print(_described(flags.FLAGS[name]))
    sys.exit(0)
  try:
    argv = list(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
    _check_config(argv)
    _words_of_config[:] = map(_spelt, argv)
    rest = flags.FLAGS(_words_of_config)[1:]
  except RequestError as error:
    _refuse(str(error))
  except flags.UnrecognizedFlagError as error:
    _refuse(_unknown_flag(error))
  except flags.Error as error:
    _refuse_flags(error)
  if rest:
    _refuse(f'unexpected argument {rest[0]!r}: every setting is a --flag')


def overrides() -> tuple[str, ...]:
  """Returns the fields that --config.FIELD flags set, by dotted name. After
  `parse`."""
  return tuple(re.sub(r"\['(\w+)'\]", r'.\1', name)
               for name in flags.FLAGS['config'].override_values)


def words(argv: Sequence[str], names: Sequence[str]) -> list[str]:
  """Returns the words of a command line that set the flags `names`, or, for
  'config', one of its fields; each as --name=value, those of a --flagfile too.
  After `parse`."""
  found = []
  rest = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)[1:]
  while rest:
    name, equals, value = _spelt(rest.pop(0)).lstrip('-').partition('=')
    flag = flags.FLAGS[name] if name in flags.FLAGS else None
    if not equals and flag is not None and not flag.boolean:
      equals, value = '=', rest.pop(0)
    if {name, name.split('.')[0], name.removeprefix('no')} & set(names):
      name = re.sub(r"\['(\w+)'\]", r'.\1', name)
      found.append(f'--{name}{equals}{value}')
  return found


def _refuse(sentence: str):
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  sys.exit(2)


def _refuse_flags(error: flags.Error) -> None:
  """Refuses in absl's words; the lines after the first repeat the usage. What
  is of another type than its flag is told in a sentence with the type."""
  said = str(error).splitlines()[0].removeprefix('ERROR:: ')
  if found := re.match(r"flag (--.*?)=.*: \('Non-boolean argument to boolean "
                       r"flag', (.*)\)$", said):
    said = f'{found[1]} is {found[2]}: choose from True, False'
  if found := re.match(r'flag (--.*?)=(.*): (could not convert string to float'
                       r'|invalid literal for int\(\)).*$', said):
    said = (f'{found[1]} is {found[2]!r}: it must be a '
            + ('number' if 'float' in found[3] else 'whole number'))
  elif found := re.match(r'flag (--.*?)=(.*): Failed to parse .* as a '
                         'ConfigDict: ', said):
    said = (f'{found[1]} is {found[2]!r}: it must be a group of fields, '
            "written as {'NAME': VALUE}")
  _refuse(said)


def _own_flags() -> list[str]:
  """The flags that the program itself defines."""
  return sorted(f.name for f in flags.FLAGS.get_key_flags_for_module(
      sys.modules['__main__']))


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
  near = difflib.get_close_matches(error.flagname, _own_flags(), n=1)
  hint = f' Did you mean --{near[0]}?' if near else ''
  return (f'unknown flag --{error.flagname}: choose from '
          f'{", ".join(_own_flags())}.{hint}')


def _described(flag: flags.Flag) -> str:
  """The lines of --help for one flag, with its default."""
  name = f'[no]{flag.name}' if flag.boolean else flag.name
  default = (','.join(flag.default) if isinstance(flag.default, list)
             else str(flag.default))
  default = ('' if _has_default(flag.help, flag.default)
             else f' (default: {default})')
  return textwrap.fill(f'--{name}: {flag.help}{default}', 80,
                       initial_indent='  ', subsequent_indent='      ',
                       break_long_words=False, break_on_hyphens=False)


def _check_config(argv: Sequence[str]) -> None:
  """Raises RequestError for a --config whose file is not to be used, and for
  a --config.FIELD that it has not."""
  if 'config' not in flags.FLAGS:
    return
  given = [a.partition('=')[2] or b for a, b in zip(argv, argv[1:] + [''])
           if re.fullmatch(r'--?config(=.*)?', a)]
  of_config = [a for a in argv if re.match(r'--?(no)?config(=|$|\.)', a)]
  first = (of_config or ['--config'])[0].partition('=')[0]
  require('.' not in first, f'pass --config FILE.py:SIZE before {first}')
  for spec in given:
    config_files.check_keys(config_files.load_config_file(spec), argv)
