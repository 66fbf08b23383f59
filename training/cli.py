"""The part of the command line that the programs share: flags, config files,
errors, exit codes.

Exit codes: 0 all is done; 75 not all is: a signal came, and what was under way
is saved (Stopped; train.py has --stopped_exit_code for it, by default 0), or
others have it; 2 a wrong request (RequestError, or a file's name that is too
long, printed as one sentence; of train.py also a loss that is not finite); 1 a
failure, either of the environment (EnvironmentFailure or another OSError, one
sentence) or a bug (any other exception, with its traceback); 128 + n ended by
signal n.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import argparse
import ast
import errno
import importlib
import math
import os
import re
import signal
import sys
import textwrap
import tokenize
import traceback
import types
from typing import Any

from absl import flags
import ml_collections
import numpy as np

from architectures.parts import flat
from common.errors import EnvironmentFailure, RequestError, STOPPED, Stopped
from common.errors import suggest_name, one_of, cut_long_words, require, short
from common.fields import DeclaredField, check_number
import configs
from configs import base
from training import plugins

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# Called with the exit code of a program that fails, once its sentence is
# printed: a run of several processes does not wait for the others then.
exit_after_failure: Callable[[int], None] = sys.exit


def run(main: Callable[[], int | None]) -> None:
  """Calls main() and exits with its code, None for 0, or with that of its
  failure: see the head of this file."""
  try:
    code = main() or 0
    sys.stdout.flush()
    sys.exit(code)
  except BrokenPipeError:  # `| head` has read enough
    # Python would fail once more at its exit, with a code of its own.
    for stream in (1, 2):
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    exit_after_failure(128 + signal.SIGPIPE)
  except (Exception, KeyboardInterrupt) as error:
    failure = _exit_code_and_sentence(error)
    if failure is None:
      raise
    code, sentence = failure
  print(cut_long_words(sentence), file=sys.stderr, flush=True)
  exit_after_failure(code)


def _exit_code_and_sentence(error: BaseException) -> tuple[int, str] | None:
  """Returns the exit code of a failure and its sentence; None for a bug."""
  if isinstance(error, RequestError):
    return 2, f'error: {error}'
  if isinstance(error, Stopped):
    return STOPPED, 'stopped: the same command goes on'
  if isinstance(error, KeyboardInterrupt):
    return 128 + signal.SIGINT, '\nSIGINT: ended'
  if isinstance(error, (EnvironmentFailure, OSError)):
    # A name that is too long for a disk is too long at each further try.
    if getattr(error, 'errno', None) == errno.ENAMETOOLONG:
      return 2, f'error: {error}'
    return 1, f'error: {error}'
  if isinstance(error, MemoryError):
    reason = ''
    why = str(error).partition('\n')[0]
    if why:
      reason = f' ({why})'
    return 1, (f'error: this machine has no memory left{reason}: end other '
               'programs, read smaller files, or take a machine with more')
  if is_out_of_memory(error):
    why = str(error).splitlines()[0]
    return 1, ('error: a device has no memory left: take a smaller '
               'data.batch_size, a larger train.grad_accumulation, '
               'model.remat=full, or more devices over which mesh.fsdp cuts '
               f'the state ({why})')
  return None


def is_out_of_memory(error: BaseException) -> bool:
  """Whether XLA could not have the memory of a device that it asked for."""
  jax = sys.modules.get('jax')  # not imported for this alone
  if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
    return False
  return 'RESOURCE_EXHAUSTED' in str(error)


class HelpFormatter(argparse.RawDescriptionHelpFormatter,
                    argparse.ArgumentDefaultsHelpFormatter):
  """--help of a program with subcommands: the text keeps its layout, and each
  flag shows its default."""

  def _get_help_string(self, action: argparse.Action):
    if action.nargs == 0 or _needs_no_default(action.help, action.default):
      return action.help
    return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
  """A parser of the words of one program, or of one of its subcommands."""

  def __init__(self, **how: Any):
    super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **how)
    self.register('action', None, _StoreOnce)
    self.register('type', float, _parse_finite_number)

  def error(self, message: str):
    super().error(cut_long_words(message))


class _StoreOnce(argparse.Action):
  """Stores the value of an option, which may be given once: of two values one
  would not be read."""

  is_given = False

  def __call__(self, parser: argparse.ArgumentParser,
               namespace: argparse.Namespace, values: Any,
               option_string: str | None = None) -> None:
    if self.is_given and option_string:
      raise argparse.ArgumentError(self, 'is given twice: give it once')
    self.is_given = True
    setattr(namespace, self.dest, values)


def _parse_finite_number(text: str) -> float:
  """Returns the finite number that a text says."""
  number = float(text)
  if not math.isfinite(number):
    raise argparse.ArgumentTypeError(f'{text} is not a finite number')
  return number


def run_subcommand(prog: str, doc: str | None,
                   commands: Mapping[str, tuple[str, str]]) -> int:
  """Runs a program with subcommands; returns its exit code.

  Args:
    prog: the words by which the program is called.
    doc: the description that --help prints.
    commands: by the name of a subcommand, a module that has
      add_arguments(parser) and main(args), and what the subcommand does.
  """
  parser = Parser(prog=prog, description=doc)
  subparsers = parser.add_subparsers(dest='command', required=True)
  for name, (module, text) in commands.items():
    subparser = subparsers.add_parser(name, help=text, description=text)
    importlib.import_module(module).add_arguments(subparser)
  args = parser.parse_args()
  module, _ = commands[args.command]
  return importlib.import_module(module).main(args)


def _needs_no_default(text: str | None, default: object) -> bool:
  """Whether a flag's --help needs no default behind its text: there is none,
  or the text says what it means."""
  return default in (None, '', []) or 'default:' in (text or '')


# Flags.

# The parts of the command line that `parse` has read: FILE.py:SIZE, and the
# texts that were given for fields of the config, by dotted name.
_config_file: list[str] = []
_text_of_overridden_field: dict[str, str] = {}


def define_config(text: str = 'A file of configs/ and its size, as gpt:tiny, '
                  'or the path of a file, FILE.py:SIZE; any field is a flag: '
                  '--config.optim.lr=3e-4.') -> None:
  """Defines --config for the program that calls; once, so that one process
  may import several programs."""
  if 'config' not in flags.FLAGS:
    flags.DEFINE_string('config', None, text)


def define_workdir() -> None:
  """Defines --workdir, likewise."""
  if 'workdir' not in flags.FLAGS:
    flags.DEFINE_string('workdir', '', 'The folder of the run.')


def define_choices(name: str, default: Sequence[str], choices: Collection[str],
                   text: str) -> None:
  """Defines a flag of names that are separated by commas, each of `choices`;
  `text` says what they are."""
  flags.DEFINE_list(name, [*default], f'{text} Of {", ".join(choices)}.')

  @flags.validator(name)
  def check(values: Sequence[str]) -> bool:
    for value in values:
      one_of(f'--{name}', value, choices)
    return True


def parse(doc: str, argv: Sequence[str] | None = None) -> None:
  """Parses absl flags; afterwards flags.FLAGS.config is the config of the file
  that --config names, with the fields that --config.FIELD flags set.

  Args:
    doc: the program's docstring, printed by --help above the flags.
    argv: the command line; default: the process's own.
  """
  if argv is None:
    argv = sys.argv
  if {'--help', '-h', '-help', '--helpfull'}.intersection(argv[1:]):
    _print_help(doc)
    sys.exit(0)
  try:
    _read_flags(list(argv))
  except RequestError as error:
    _exit_with_error(str(error))
  except flags.Error as error:  # the lines after its first repeat the usage
    first_line = str(error).splitlines()[0]
    _exit_with_error(first_line.removeprefix('ERROR:: '))


def _print_help(doc: str) -> None:
  """Prints what --help says: the program's docstring and its flags."""
  print(doc.strip(), '\n\nflags:')
  for name in _flags_of_program():
    print(_describe_flag(flags.FLAGS[name]))


def _read_flags(argv: list[str]) -> None:
  """Gives the flags the values of a command line, and checks them."""
  program_flags = _flags_of_program()
  for name in program_flags:
    flags.FLAGS[name].allow_overwrite = False

  # absl's own search for flags with a similar name fails at a long one, so it
  # gives back what it does not know, and the first such word is refused here.
  expanded = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  _, *unknown = flags.FLAGS(_take_out_overrides(expanded), known_only=True)
  if unknown:
    _refuse_unknown_word(unknown[0])

  for name in program_flags:
    _check_value(f'--{name}', flags.FLAGS[name].value)
  if 'config' in flags.FLAGS:
    _load_config_of_flag(flags.FLAGS['config'])
  elif _text_of_overridden_field:
    _refuse_unknown_word(f'--config.{next(iter(_text_of_overridden_field))}')


def _check_value(flag: str, value: Any) -> None:
  """Raises RequestError for a number that is not finite, and for a list that
  names something twice."""
  if isinstance(value, float):
    check_number(flag, value, ())
  if isinstance(value, list) and len(set(value)) < len(value):
    raise RequestError(f'{flag} is {short(",".join(value))}: name each once')


def overridden_fields() -> tuple[str, ...]:
  """Returns the fields that --config.FIELD flags set, by dotted name. After
  `parse`."""
  return tuple(_text_of_overridden_field)


def words_to_repeat_command(names: Sequence[str]) -> list[str]:
  """Returns what sets the flags `names` and fields of the config again, each as
  --name=value. After `parse`."""
  result = [f'--config={_config_file[0]}']
  for name, text in _text_of_overridden_field.items():
    result.append(f'--config.{name}={text}')
  for name in names:
    if name == 'config' or name not in flags.FLAGS:
      continue
    if flags.FLAGS[name].present:
      result.append(flags.FLAGS[name].serialize())
  return result


def _refuse_unknown_word(word: str):
  """Raises RequestError for a word that is no flag of the program."""
  name = word.partition('=')[0].lstrip('-')
  if not word.startswith('-') or not name:
    raise RequestError(f'unexpected argument {short(word)}: every setting is a '
                       '--flag')
  # A misspelt word may be meant for a flag, or for a field of the config.
  known = {flag: flags.FLAGS[flag].help for flag in _flags_of_program()}
  sentences = dict(known)
  if 'config' in known:
    for field, text in base.SENTENCES.items():
      sentences[f'config.{field}'] = text
  raise RequestError(f'unknown flag --{name}: choose from {", ".join(known)}.'
                     + suggest_name(name, sentences, '--'))


def _exit_with_error(sentence: str):
  """Prints why a command line is refused, and exits."""
  print(f'error: {cut_long_words(sentence)}', file=sys.stderr, flush=True)
  sys.exit(2)


def _flags_of_program() -> list[str]:
  """Returns the names of the flags that the program itself defines."""
  program = sys.modules['__main__']
  key_flags = flags.FLAGS.get_key_flags_for_module(program)
  return sorted(flag.name for flag in key_flags)


def _describe_flag(flag: flags.Flag) -> str:
  """Returns the lines of --help for one flag, with its default."""
  name = f'[no]{flag.name}' if flag.boolean else flag.name
  text = f'--{name}: {flag.help}'
  if not _needs_no_default(flag.help, flag.default):
    default = flag.default
    if isinstance(default, list):
      default = ','.join(default)
    text += f' (default: {default})'
  return textwrap.fill(
      text, width=80, initial_indent='  ', subsequent_indent='      ',
      break_long_words=False, break_on_hyphens=False)


def _take_out_overrides(argv: Sequence[str]) -> list[str]:
  """Returns the words that set no field of the config; notes the others."""
  _text_of_overridden_field.clear()
  rest: list[str] = []
  following = iter(argv)
  for word in following:
    match = re.fullmatch(r'--?(no)?config\.([^=]+)(?:=(.*))?', word, re.S)
    if not match:
      rest.append(word)
      continue
    no, name, text = match.groups()

    # --config.NAME and --noconfig.NAME set a field that is true or false.
    leaf = base.find(name)
    is_bool = leaf is not None and leaf.type is bool
    if is_bool and text is None:
      text = 'False' if no else 'True'
    elif no:
      raise RequestError(f'{word}: write --config.{name}=VALUE')
    require(name not in _text_of_overridden_field,
            f'--config.{name} is given twice: give it once')

    # Without an equals sign, the value is the next word.
    if text is None:
      text = next(following, '')
    _text_of_overridden_field[name] = text
  return rest


def _load_config_of_flag(flag: flags.Flag) -> None:
  """Gives --config the config that its value names."""
  if flag.value is None:
    if _text_of_overridden_field:
      name = next(iter(_text_of_overridden_field))
      raise RequestError(f'--config.{name} needs --config FILE.py:SIZE')
    return
  _config_file[:] = [flag.value]
  config = load_config_file(flag.value)
  for name, text in _text_of_overridden_field.items():
    _set_config_field(config, name, text)
  flag.value = config.lock()


def _set_config_field(config: ml_collections.ConfigDict, name: str,
                      text: str) -> None:
  """Sets a field of a config as a command line says."""
  leaf = declare_field(config, name)
  default: Any = {}  # of model.kinds, which is a group and no field
  if leaf is not None:
    default = leaf.default
  elif name != 'model.kinds':
    raise RequestError(f'--config.{name} is no field of the config.'
                       + suggest_name(name, base.SENTENCES, '--config.')
                       + _sentence_of_fields_in_group(name))
  # A group is read as a whole, from its dict.
  value = parse_value(text, default, f'--config.{name}')
  if leaf is None:
    flat.check_kinds(value)
    value = ml_collections.ConfigDict(value)
  config.update_from_flattened_dict({name: value})


def _sentence_of_fields_in_group(name: str) -> str:
  """Returns a sentence that lists the fields of the group in which a name
  stands; '' where there is no such group."""
  group = name.rpartition('.')[0]
  fields = [x for x in base.FIELDS if x.rpartition('.')[0] == group]
  if not fields:
    return ''
  return f' There are {", ".join(fields)}.'


_BOOLEAN_OF_TEXT = {'true': True, 't': True, '1': True, 'false': False,
                    'f': False,
                    '0': False}
# How a message names the values of a type; any other is a group of fields.
_WORDS_FOR_TYPE = {bool: 'True or False', int: 'a whole number',
                   float: 'a number',
                   tuple: "a tuple, as ('a', 'b')"}


def parse_value(text: str, default: Any, flag: str) -> Any:
  """Returns a value of the type that the default of a field has.

  Args:
    text: the value as a user writes it.
    default: the default of the field.
    flag: the name of the flag, for messages.

  Raises:
    RequestError: for a text that is no value of that type.
  """
  kind = type(default)
  try:
    if kind is bool:
      return _BOOLEAN_OF_TEXT[text.lower()]
    if kind in (int, float, str):
      return kind(text)
    value = ast.literal_eval(text)
    if kind is tuple and not isinstance(value, tuple | list):
      value = (value,)
    return kind(value)
  except (KeyError, ValueError, SyntaxError, TypeError, MemoryError,
          RecursionError) as error:  # the last two for too deep a nesting
    wanted = _WORDS_FOR_TYPE.get(kind, "a group of fields, as {'NAME': VALUE}")
    raise RequestError(f'{flag} is {short(text)}: it must be {wanted}'
                       ) from error


# Config files as a user writes them, refused with file and line.


def load_config_file(spec: str) -> ml_collections.ConfigDict:
  """Returns the config that FILE.py:SIZE describes; FILE.py is a path, or the
  name of a file of configs/, such as `gpt`.

  Raises:
    RequestError: where the file is missing, fails, or returns no config; the
      message gives the file and the line.
  """
  name, colon, size = spec.partition(':')
  file = configs.file_of(name, '--config')
  module = run_user_file(file)
  require(hasattr(module, 'get_config'), f'--config {file!r} is no config: it '
          'has no get_config()')
  # A get_config without a size has its own default.
  if colon:
    config = call_user_function(file, module.get_config, size)
  else:
    config = call_user_function(file, module.get_config)
  check_config(config, f'{file}: get_config()')
  return config


def run_user_file(file: str) -> types.ModuleType:
  """Returns the module that a Python file of the user defines, and takes up
  the parts that it declares (plugins.py).

  Raises:
    RequestError: where the file fails, with the line.
  """
  text = call_user_function(file, read_python_file, file)
  module = call_user_function(file, plugins.execute_file, file, text)
  plugins.declare_parts(file, text, module)
  return module


def read_python_file(file: str) -> str:
  """Returns what a Python file holds."""
  with tokenize.open(file) as opened:  # in the encoding that it names
    return opened.read()


def call_user_function(file: str, function: Callable, *args):
  """Calls a function of a user's file.

  Raises:
    RequestError: where it fails, with the file, the line and the reason.
  """
  try:
    return function(*args)
  except RequestError:
    raise  # which is a sentence already
  except (Exception, SystemExit) as error:  # whatever the user's code raises
    # The last line of the file that was run; there is none where the file
    # fails before.
    where = file
    for frame in traceback.extract_tb(error.__traceback__):
      if frame.filename == file:
        where = f'{file}, line {frame.lineno}'
    if isinstance(error, SyntaxError) and error.filename == file:
      where = f'{file}, line {error.lineno}'
    reason = ' '.join(str(error).split()) or 'no message'
    raise RequestError(f'{where}: {type(error).__name__}: {reason}') from error


def check_config(config: Any, who: str) -> None:
  """Raises RequestError unless `config` has the fields of configs/base.py, each
  of the type and in the range that is declared there."""
  if not isinstance(config, ml_collections.ConfigDict):
    raise RequestError(
        f'{who} returned {short(config)}, which is no ConfigDict: end it with '
        '`return c`, where c began as base.base()')
  missing = base.FIELDS.keys() - flat.flatten_groups(config)
  if missing:
    raise RequestError(
        f'{who}: the fields {short(sorted(missing))} are missing: begin with '
        'base.base() of configs/base.py')
  base.check(config.to_dict(), f'{who}: ')


def declare_field(config: ml_collections.ConfigDict,
                  full: str) -> DeclaredField | None:
  """Returns the field that a dotted name stands for, so that it can be set;
  None: there is no such field. A field of a kind of layer, which may be a new
  kind, gets the model's value where it had none.

  Args:
    config: the config of a run.
    full: the dotted name.

  Raises:
    RequestError: for a field that a kind does not have.
  """
  match = re.fullmatch(r'model\.kinds\.(\w+)\.([\w.]+)', full)
  if match is None:
    return base.find(full)

  # The field of a kind, and the model's field or group of that meaning.
  kind, field = match.groups()
  name, _, inner = field.partition('.')
  of_model = flat.FIELDS_OF_LAYER_KINDS.get(name, '')
  choices: Collection[str] = flat.FIELDS_OF_LAYER_KINDS
  if of_model in flat.GROUPS:
    choices = [f'{name}.{x}' for x in flat.default_tree()[of_model]]
  one_of(f'field of model.kinds.{kind}', field, choices)
  flat.check_kinds({kind: {}})

  model = config.model
  with model.unlocked():
    value = model[of_model]
    group = _get_or_add_group(model.kinds, kind)
    if inner:
      value = value[inner]
      group = _get_or_add_group(group, name)
      name = inner
    if name not in group:
      group[name] = value
  return base.find(full)


def _get_or_add_group(config: ml_collections.ConfigDict, name: str
                      ) -> ml_collections.ConfigDict:
  """Returns the group of that name in a config, an empty one if it is new."""
  if name not in config:
    config[name] = ml_collections.ConfigDict()
  return config[name]


def set_model_fields(model: ml_collections.ConfigDict, fields: Mapping[str, Any]
                     ) -> None:
  """Sets fields of config.model, and of the groups in it.

  Raises:
    RequestError: for an unknown field, or a value that it cannot have.
  """
  fields = _with_python_numbers(fields)
  flat.check_fields(fields)
  if 'kinds' in fields:
    model.kinds = ml_collections.ConfigDict(fields.pop('kinds'))
  model.update(fields)


def _with_python_numbers(value: Any) -> Any:
  """Returns a value, or a tree of values, with numpy's numbers as Python's."""
  if isinstance(value, np.generic):
    return value.item()
  if hasattr(value, 'items'):
    return {name: _with_python_numbers(x) for name, x in value.items()}
  return value
