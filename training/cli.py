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
from typing import Any

from absl import flags
import ml_collections

from architectures.parts import flat
from common.errors import EnvironmentFailure, RequestError, STOPPED, Stopped
from common.errors import check_choice, cut_long_words, require, shorten
from common.errors import suggest_name
from common.fields import DeclaredField, check_number
from configs import base
from training import plugins

flags.disclaim_key_flags()  # what is defined here belongs to who calls

# The function by which a program that fails exits, given its exit code. A run
# of several processes sets another one, which does not wait for the others.
exit_after_failure: Callable[[int], None] = sys.exit


def run(main: Callable[[], int | None]) -> None:
  """Runs the main function of a program, and exits the process with its exit
  code.

  An error that the user can mend is printed as one sentence, without a
  traceback.

  Args:
    main: the main function. It returns the exit code; None stands for 0.

  Raises:
    SystemExit: with the code that `main` returned; after an error with 2 for a
      wrong request, 1 for a failure of the environment (such as a full disk),
      75 for work that a signal stopped, 130 after Ctrl-C, and 141 if the reader
      of our output has closed the pipe.
    Exception: any other error of `main`, which is a bug.
  """
  try:
    code = main() or 0
    # Flush here, inside the try: a closed pipe would else only be noticed while
    # Python exits.
    sys.stdout.flush()
    sys.exit(code)
  except BrokenPipeError:  # the reader, such as `| head`, has read enough
    # Python flushes stdout and stderr when it exits. That would fail again, and
    # change the exit code. So point both (file descriptors 1 and 2) to
    # /dev/null.
    for descriptor in (1, 2):
      os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    exit_after_failure(128 + signal.SIGPIPE)
  except (Exception, KeyboardInterrupt) as error:
    failure = _exit_code_and_sentence(error)
    if failure is None:
      raise
    code, sentence = failure
  print(cut_long_words(sentence), file=sys.stderr, flush=True)
  exit_after_failure(code)


def _exit_code_and_sentence(error: BaseException) -> tuple[int, str] | None:
  """Decides how a program ends after an error.

  Args:
    error: the error that the program has raised.

  Returns:
    The exit code (2 for a wrong request, 1 for a failure of the environment,
    STOPPED for work that was saved before it was finished) and a sentence to
    print; None for a bug, whose traceback is to be printed.
  """
  # First come our own errors, and signals.
  if isinstance(error, RequestError):
    return 2, f'error: {error}'
  if isinstance(error, Stopped):
    return STOPPED, 'stopped: the same command goes on'
  if isinstance(error, KeyboardInterrupt):
    return 128 + signal.SIGINT, '\nSIGINT: ended'

  # Then come failures of the environment, such as a full disk or too little
  # memory.
  if isinstance(error, (EnvironmentFailure, OSError)):
    # A name that is too long for the disk is the user's to change.
    if getattr(error, 'errno', None) == errno.ENAMETOOLONG:
      return 2, f'error: {error}'
    return 1, f'error: {error}'
  if isinstance(error, MemoryError):
    reason = ''
    first_line = str(error).partition('\n')[0]
    if first_line:
      reason = f' ({first_line})'
    return 1, (f'error: this machine has no memory left{reason}: end other '
               'programs, read smaller files, or take a machine with more')
  if is_out_of_memory(error):
    first_line = str(error).splitlines()[0]
    return 1, ('error: a device has no memory left: take a smaller '
               'data.batch_size, a larger train.grad_accumulation, '
               'model.remat=full, or more devices over which mesh.fsdp cuts '
               f'the state ({first_line})')
  return None


def is_out_of_memory(error: BaseException) -> bool:
  """Whether XLA raised `error` because a device had no memory left."""
  jax = sys.modules.get('jax')  # not imported for this alone
  if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
    return False
  return 'RESOURCE_EXHAUSTED' in str(error)


class HelpFormatter(argparse.RawDescriptionHelpFormatter,
                    argparse.ArgumentDefaultsHelpFormatter):
  """Formats the --help of a program with subcommands: the text keeps its
  layout, and each flag shows its default."""

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
  """Stores the value of an option that may be given once. A second one is
  refused, since one of the two values would not be read."""

  is_given = False

  def __call__(self, parser: argparse.ArgumentParser,
               namespace: argparse.Namespace, values: Any,
               option_string: str | None = None) -> None:
    if self.is_given and option_string:
      raise argparse.ArgumentError(self, 'is given twice: give it once')
    self.is_given = True
    setattr(namespace, self.dest, values)


def _parse_finite_number(text: str) -> float:
  """Returns the number that a text says, which must be finite."""
  number = float(text)
  if not math.isfinite(number):
    raise argparse.ArgumentTypeError(f'{text} is not a finite number')
  return number


def run_subcommand(prog: str, doc: str | None,
                   commands: Mapping[str, tuple[str, str]]) -> int:
  """Parses the command line of a program that has subcommands, and runs the one
  that it names.

  Args:
    prog: the words by which the program is called.
    doc: the description that --help prints.
    commands: {subcommand: (module, sentence)}. The module has the functions
      add_arguments(parser) and main(args). The sentence says what the
      subcommand does.

  Returns:
    The exit code.
  """
  parser = Parser(prog=prog, description=doc)
  subparsers = parser.add_subparsers(dest='command', required=True)
  # Import every module and let it declare its flags, so that --help can list
  # them.
  for name, (module_name, sentence) in commands.items():
    subparser = subparsers.add_parser(name, help=sentence, description=sentence)
    importlib.import_module(module_name).add_arguments(subparser)
  args = parser.parse_args()
  module_name, _ = commands[args.command]
  return importlib.import_module(module_name).main(args)


def _needs_no_default(text: str | None, default: object) -> bool:
  """Whether --help shows no default after the text of a flag: where the flag
  has none, or its text says already what the default means."""
  return default in (None, '', []) or 'default:' in (text or '')


# Flags.

# The parts of the command line that `parse` has read: FILE.py:SIZE of --config,
# and the texts of the flags --config.FIELD, by the dotted name of the field.
_config_file: list[str] = []
_text_of_overridden_field: dict[str, str] = {}


def define_config(text: str = 'A file of configs/ and its size, as gpt:tiny, '
                  'or the path of a file, FILE.py:SIZE; any field is a flag: '
                  '--config.optim.lr=3e-4. train.py --print_config lists all '
                  'of them, and `make docs` says what each means.') -> None:
  """Defines the flag --config, with the help `text`. A second call does
  nothing, so that one process may import several programs."""
  if 'config' not in flags.FLAGS:
    flags.DEFINE_string('config', None, text)


def define_workdir() -> None:
  """Defines the flag --workdir. A second call does nothing."""
  if 'workdir' not in flags.FLAGS:
    flags.DEFINE_string('workdir', '', 'The folder of the run.')


def define_choices(name: str, choices: Collection[str], text: str,
                   default: Collection[str] = ()) -> None:
  """Defines a flag of absl whose value is a list of names, with commas between
  them. A name that is not among the choices is refused.

  Args:
    name: the name of the flag.
    choices: the names that are allowed.
    text: the beginning of the flag's text for --help; the choices follow.
    default: the names where the flag is not given.
  """
  flags.DEFINE_list(name, [*default], f'{text} Of {", ".join(choices)}.')

  # absl calls a validator whenever the flag is set. check_choice raises an
  # error that lists the choices.
  @flags.validator(name)
  def check_names(values: Sequence[str]) -> bool:
    for value in values:
      check_choice(f'--{name}', value=value, choices=choices)
    return True


def parse(doc: str, argv: Sequence[str] | None = None) -> None:
  """Parses the command line of a program into absl's flags.FLAGS. If the
  program has a flag --config, FLAGS.config becomes the config that the named
  file makes, with the fields that --config.FIELD flags set.

  Args:
    doc: the docstring of the program, which --help prints above the flags.
    argv: the command line, beginning with the program's name; None: that of
      this process.

  Raises:
    SystemExit: with code 0 after --help, and with code 2 after a sentence about
      a wrong flag.
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
  """Sets absl's flags from a command line, checks their values, and loads the
  config that --config names.

  Args:
    argv: the words of the command line, beginning with the name of the program.

  Raises:
    RequestError: for an unknown flag, and for a wrong value.
  """
  # Let absl refuse a flag that is given twice. By default it takes the last
  # value.
  program_flags = _flags_of_program()
  for name in program_flags:
    flags.FLAGS[name].allow_overwrite = False

  # Take out the words --config.FIELD, which absl does not know as flags, and
  # let absl parse the others. With known_only it returns the program's name and
  # all words that it does not know. Refuse the first of these here, as absl
  # itself fails at a long one while it looks for flags with similar names.
  expanded_argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  argv_of_flags = _take_out_overrides(expanded_argv)
  _, *unknown_words = flags.FLAGS(argv_of_flags, known_only=True)
  if unknown_words:
    _refuse_unknown_word(unknown_words[0])

  # Check the values, and replace --config by the config that it names.
  for name in program_flags:
    _check_value(f'--{name}', flags.FLAGS[name].value)
  if 'config' in flags.FLAGS:
    _load_config_of_flag(flags.FLAGS['config'])
  elif _text_of_overridden_field:
    first_field = next(iter(_text_of_overridden_field))
    _refuse_unknown_word(f'--config.{first_field}')


def _check_value(flag: str, value: Any) -> None:
  """Raises RequestError for a number that is not finite, and for a list that
  names something twice."""
  if isinstance(value, float):
    check_number(flag, value=value, bounds=())
  if isinstance(value, list) and len(set(value)) < len(value):
    raise RequestError(f'{flag} is {shorten(",".join(value))}: name each once')


def overridden_fields() -> tuple[str, ...]:
  """Returns the dotted names of the config's fields that the command line sets
  by --config.FIELD flags; to be called after `parse`."""
  return tuple(_text_of_overridden_field)


def words_to_repeat_command(names: Sequence[str]) -> list[str]:
  """Returns the part of this process's command line that sets the config and
  some of the flags, as words for another command. Call it after `parse`.

  Args:
    names: the names of the flags. Those that the user has not given are left
      out.
  """
  # Repeat the config and its fields as the user wrote them.
  words = [f'--config={_config_file[0]}']
  for name, text in _text_of_overridden_field.items():
    words.append(f'--config.{name}={text}')

  # Repeat the flags, except for --config.
  for name in names:
    if name == 'config' or name not in flags.FLAGS:
      continue
    if flags.FLAGS[name].present:
      words.append(flags.FLAGS[name].serialize())
  return words


def _refuse_unknown_word(word: str):
  """Refuses a word of the command line that is no flag of the program.

  Args:
    word: the word.

  Raises:
    RequestError: always. The message lists the flags of the program, and
      suggests a flag or a field of the config with a similar name.
  """
  name = word.partition('=')[0].lstrip('-')
  if not word.startswith('-') or not name:
    raise RequestError(f'unexpected argument {shorten(word)}: every setting is '
                       'a --flag')
  # The user may have misspelt a flag, or a field of the config.
  help_of_flag = {flag: flags.FLAGS[flag].help for flag in _flags_of_program()}
  sentence_of_name = dict(help_of_flag)
  if 'config' in help_of_flag:
    for field, text in base.SENTENCES.items():
      sentence_of_name[f'config.{field}'] = text
  suggestion = suggest_name(name, choices=sentence_of_name, before='--')
  raise RequestError(f'unknown flag --{name}: choose from '
                     f'{", ".join(help_of_flag)}.{suggestion}')


def _exit_with_error(sentence: str):
  """Prints the sentence that says why a command line is refused, and exits with
  code 2."""
  print(f'error: {cut_long_words(sentence)}', file=sys.stderr, flush=True)
  sys.exit(2)


def _flags_of_program() -> list[str]:
  """Returns the names of the flags that the program itself defines."""
  program = sys.modules['__main__']
  key_flags = flags.FLAGS.get_key_flags_for_module(program)
  return sorted(flag.name for flag in key_flags)


def _describe_flag(flag: flags.Flag) -> str:
  """Returns the lines that --help prints for a flag: its name, its text and its
  default.

  Args:
    flag: a flag of absl.
  """
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
  """Removes the words --config.FIELD=VALUE, which set fields of the config,
  from a command line. The texts of the values are kept in
  _text_of_overridden_field.

  Args:
    argv: the words of the command line, beginning with the name of the program.

  Returns:
    The other words.

  Raises:
    RequestError: for a field that is given twice, or in a wrong form.
  """
  _text_of_overridden_field.clear()
  other_words: list[str] = []
  remaining_words = iter(argv)
  for word in remaining_words:
    match = re.fullmatch(r'--?(no)?config\.([^=]+)(?:=(.*))?', word, re.S)
    if not match:
      other_words.append(word)
      continue
    has_no, name, text = match.groups()

    # For a boolean field, --config.NAME means True and --noconfig.NAME False.
    field = base.find_field(name)
    is_bool = field is not None and field.type is bool
    if is_bool and text is None:
      text = 'False' if has_no else 'True'
    elif has_no:
      raise RequestError(f'{word}: write --config.{name}=VALUE')
    require(name not in _text_of_overridden_field,
            f'--config.{name} is given twice: give it once')

    # Without an equals sign, the value is the next word.
    if text is None:
      text = next(remaining_words, '')
    _text_of_overridden_field[name] = text
  return other_words


def _load_config_of_flag(flag: flags.Flag) -> None:
  """Replaces the value of the flag --config, FILE.py:SIZE, by the config that
  it names, with the fields that the command line sets.

  Args:
    flag: absl's flag --config, whose value is changed.

  Raises:
    RequestError: where fields are set but --config is not given.
  """
  if flag.value is None:
    if _text_of_overridden_field:
      name = next(iter(_text_of_overridden_field))
      raise RequestError(f'--config.{name} needs --config FILE.py:SIZE')
    return
  # Load the config and set its fields. Lock it, so that no field can be added
  # by mistake.
  _config_file[:] = [flag.value]
  config = plugins.load_config_file(flag.value)
  for name, text in _text_of_overridden_field.items():
    _set_config_field(config, name, text=text)
  flag.value = config.lock()


def _set_config_field(config: ml_collections.ConfigDict, name: str, text: str
                      ) -> None:
  """Sets a field of a config to the value that the command line gives it.

  Args:
    config: the config, which is changed.
    name: the dotted name of the field.
    text: the value as the user has written it.

  Raises:
    RequestError: for an unknown field, or a wrong value.
  """
  # The type of the value is that of the field's default. model.kinds, which has
  # the named kinds of layers, is no field but a group of fields, and is given
  # as a dict.
  field = declare_field(config, name)
  default: Any = {}
  if field is not None:
    default = field.default
  elif name != 'model.kinds':
    raise RequestError(f'--config.{name} is no field of the config.'
                       + suggest_name(name, choices=base.SENTENCES,
                                      before='--config.')
                       + _sentence_of_fields_in_group(name))
  value = parse_value(text, default=default, flag=f'--config.{name}')
  if field is None:
    flat.check_kinds(value)
    value = ml_collections.ConfigDict(value)
  config.update_from_flattened_dict({name: value})


def _sentence_of_fields_in_group(name: str) -> str:
  """Returns a sentence that lists the fields of the group of `name`, as those
  of `optim` for optim.xyz; '' where there is no such group."""
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
  """Parses the text of a config field's value. The type of the value is that of
  the field's default.

  Args:
    text: the value as the user has written it.
    default: the default of the field.
    flag: the name of the flag, for messages.

  Raises:
    RequestError: for a text that is no value of that type.
  """
  value_type = type(default)
  try:
    # Booleans are looked up, as bool('False') is True.
    if value_type is bool:
      return _BOOLEAN_OF_TEXT[text.lower()]
    if value_type in (int, float, str):
      return value_type(text)
    # Tuples and groups of fields are written as Python literals, which are
    # parsed and never executed. A single value counts as a tuple of one.
    value = ast.literal_eval(text)
    if value_type is tuple and not isinstance(value, tuple | list):
      value = (value,)
    return value_type(value)
  except (KeyError, ValueError, SyntaxError, TypeError, MemoryError,
          RecursionError) as error:  # the last two for too deep a nesting
    expected = _WORDS_FOR_TYPE.get(
        value_type, "a group of fields, as {'NAME': VALUE}")
    raise RequestError(f'{flag} is {shorten(text)}: it must be {expected}'
                       ) from error


def declare_field(config: ml_collections.ConfigDict,
                  full_name: str) -> DeclaredField | None:
  """Returns the declaration of a field of the config: its type, default and
  range.

  A kind of layer, model.kinds.KIND, is a named set of only those fields that
  differ from the model's. A field that it lacks is added to it here, with the
  model's value, and so is a new kind. So the field can be set afterwards.

  Args:
    config: the config of a run, which may be changed as said.
    full_name: the dotted name of the field, such as model.kinds.local.window.

  Returns:
    The declaration; None if there is no such field.

  Raises:
    RequestError: for a field that a kind of layer cannot have.
  """
  match = re.fullmatch(r'model\.kinds\.(\w+)\.([\w.]+)', full_name)
  if match is None:
    return base.find_field(full_name)

  # Find the field or the group of fields of the model that the kind's field
  # stands for, and check the name. `field` is 'window' or, in a group,
  # 'moe.top_k'.
  layer_kind, field = match.groups()
  name, _, name_in_group = field.partition('.')
  name_in_model = flat.FIELDS_OF_LAYER_KINDS.get(name, '')
  choices: Collection[str] = flat.FIELDS_OF_LAYER_KINDS
  if name_in_model in flat.GROUPS:
    choices = [f'{name}.{x}' for x in flat.default_tree()[name_in_model]]
  check_choice(f'field of model.kinds.{layer_kind}', value=field,
               choices=choices)
  flat.check_kinds({layer_kind: {}})

  # If the kind lacks the field, add it with the model's value.
  model = config.model
  with model.unlocked():
    model_value = model[name_in_model]
    fields_of_kind = _get_or_add_group(model.kinds, layer_kind)
    if name_in_group:
      model_value = model_value[name_in_group]
      fields_of_kind = _get_or_add_group(fields_of_kind, name)
      name = name_in_group
    if name not in fields_of_kind:
      fields_of_kind[name] = model_value
  return base.find_field(full_name)


def _get_or_add_group(config: ml_collections.ConfigDict, name: str
                      ) -> ml_collections.ConfigDict:
  """Returns the group `name` of a config's fields, which is added, without a
  field, if it is not there."""
  if name not in config:
    config[name] = ml_collections.ConfigDict()
  return config[name]
