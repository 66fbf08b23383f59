r"""A conversation with a model, in a terminal or through a pipe.

  python -m tools.chat --workdir runs/chat
  python -m tools.chat --folder models/smollm2 --system='Answer in one line.'
  echo 'Name three colours.' | python -m tools.chat --folder models/smollm2

Each line is a message; the model answers it, and keeps the conversation in its
cache. A run that learned to chat is asked by its template, a Hugging Face
folder by its own chat template, and any other model goes on from the text. How
a folder's answers are drawn and end is what its generation_config.json says;
the flags say otherwise.

Commands: /reset begins a new conversation, /system TEXT sets the system text,
/save FILE adds the conversation to a file as a line of JSON, /help, /exit.
Ctrl-C ends an answer, not the program. Through a pipe, each line of standard
input is a message, and standard output has the answers alone.

Exit code 2: a wrong request, such as a message for which the model has no
room; 1: a failure.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import types
from typing import Any

from absl import flags

from configs.errors import RequestError, require
from training import cli
from training.evals.tasks import samples

cli.define_workdir()
flags.DEFINE_string('folder', '', 'Instead of --workdir: a folder in the '
                    'Hugging Face format.')
flags.DEFINE_string('step', None, 'Which checkpoint: the number of a step, or '
                    'best, of a run with eval.best; default: the newest.')
flags.DEFINE_string('template', '', 'A chat template instead of the model\'s '
                    'own: a Jinja file, or a Hugging Face folder.')
flags.DEFINE_string('system', '', 'The system text.')
flags.DEFINE_integer('context', 0, 'Tokens of the whole conversation; 0: '
                     'max_len of the model, 2048 at most.', 0, 2**24)
flags.DEFINE_integer('max_new_tokens', 512, 'Tokens of an answer.', 1, 2**24)
flags.DEFINE_integer('seed', 0, 'The seed of the draws.', 0, 2**32 - 1)
for _flag in samples.SAMPLING:
  _define: Callable = {int: flags.DEFINE_integer, float: flags.DEFINE_float,
                       str: flags.DEFINE_string}[type(_flag.default)]
  _define(_flag.name, None, _flag.help,
          **({} if _flag.least is None else dict(lower_bound=_flag.least,
                                                 upper_bound=_flag.most)))

CONTEXT = 2048
HELP = """\
/reset          begins a new conversation
/system TEXT    sets the system text; without TEXT, removes it
/save FILE      adds the conversation to FILE, as a line of JSON
/help           shows this
/exit           ends the program, as Ctrl-D does
//TEXT          is the message /TEXT
Ctrl-C ends an answer."""
NOTES = {'length': 'cut off at --max_new_tokens',
         'context': 'the tokens of --context are full: /reset begins a new '
                    'conversation',
         'interrupted': 'stopped'}


def main() -> int | None:
  cli.parse(__doc__)
  args = flags.FLAGS
  require(bool(args.workdir) != bool(args.folder), 'pass either --workdir DIR, '
          'the folder of a run, or --folder DIR, in the Hugging Face format')
  require(args.step is None or not args.folder,
          f'{args.folder} is no run: it has no --step')
  given = {flag.name: args[flag.name].value for flag in samples.SAMPLING
           if args[flag.name].value is not None}
  samples.sampling(_options({}, given))  # which refuses what is out of range
  sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]
  in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  with contextlib.redirect_stdout(sys.stderr):
    session, about = _session(args, given)
  if in_terminal:
    print(about, file=sys.stderr)
    return with_terminal(session)
  return through_pipe(session)


def _options(said: dict[str, Any], given: dict[str, Any]
             ) -> types.SimpleNamespace:
  """Returns the options of samples.SAMPLING.

  Args:
    said: what a folder's generation_config.json says; {}: nothing.
    given: those that were set on the command line.
  """
  usual = {flag.name: flag.default for flag in samples.SAMPLING}
  draws = {'temperature', 'top_k', 'top_p', 'min_p'}
  if said and not draws & given.keys():
    if said.get('do_sample'):  # what transformers takes where it says nothing
      usual |= {'top_k': 50} | {name: said[name] for name in draws
                                if said.get(name) is not None}
    else:
      usual['temperature'] = 0.0
  if said.get('repetition_penalty') is not None:
    usual['repetition_penalty'] = said['repetition_penalty']
  return types.SimpleNamespace(**usual | given)


def _session(args: Any, given: dict[str, Any]) -> tuple[Any, str]:
  """Returns the session, and what a reader should know of it."""
  import jax

  from training import chat
  from training.workdir import checkpoints, storage
  speaker = (chat.of_folder(storage.path(args.folder, '--folder'),
                            args.template) if args.folder else
             chat.of_run(storage.path(args.workdir),
                         checkpoints.named_step(args.step), args.template))
  model = speaker.module.config
  options = _options(speaker.options, given)
  context = args.context or min(model.max_len, CONTEXT)
  require(1 < context <= model.max_len, f'--context is {context}, and the '
          f'model takes max_len {model.max_len} tokens: choose 2 to '
          f'{model.max_len}')
  sampling = samples.sampling(options)
  session = chat.Session(
      chat.Engine(speaker.module, speaker.params, context, sampling,
                    args.seed),
      speaker.tokenizer, speaker.talk, most=args.max_new_tokens,
      stops=samples.stops(options), system=args.system)
  count = sum(x.size for x in jax.tree.leaves(speaker.params))
  usual = {flag.name: flag.default for flag in samples.SAMPLING}
  drawn = [f'{name} {value}' for name, value in vars(options).items()
           if name != 'temperature' and value != usual[name]]
  how = ('the likeliest token each time' if not sampling.temperature else
         f'drawn at temperature {sampling.temperature:g}')
  return session, (
      f'{args.folder or args.workdir}: {count:,} parameters; '
      f'{speaker.talk.words}\n{", ".join([how, *drawn])}; room for '
      f'{context:,} tokens; /help for commands')


def with_terminal(session: Any) -> None:
  """Talks with who sits at the terminal, until they go."""
  with contextlib.suppress(ImportError):
    import readline as _  # noqa: F401  lines can be edited, and come back
  while True:
    try:
      line = input('\n> ')
    except KeyboardInterrupt:
      print('\n/exit or Ctrl-D ends the program', file=sys.stderr)
      continue
    except EOFError:
      print()
      return
    except UnicodeDecodeError as error:
      print(f'error: the line is no text: {error}', file=sys.stderr)
      continue
    try:
      if not line.strip():
        continue
      if _is_command(line):
        if not _command(session, line.strip()):
          return
        continue
      with interrupts() as stopped:
        _show(session.ask(_message(line), stopped))
    except (RequestError, OSError) as error:
      print(f'error: {error}', file=sys.stderr)
      continue
    if note := NOTES.get(session.ended, ''):
      _say(note)


def through_pipe(session: Any) -> None:
  """Answers each line of standard input."""
  from training.data import texts
  for number, data in enumerate(sys.stdin.buffer, 1):
    line = texts.decoded(data, f'standard input, line {number},').rstrip('\r\n')
    if not line.strip():
      continue
    if not _is_command(line):
      _show(session.ask(_message(line)))
    elif not _command(session, line.strip()):
      return


def _show(pieces: Iterator[str]) -> None:
  for piece in pieces:
    print(piece, end='', flush=True)
  print(flush=True)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
  """While the `with` block runs, Ctrl-C is kept for the function that it
  yields: an answer ends between two tokens, with its cache as it should be."""
  came = []
  before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
  try:
    yield lambda: bool(came)
  finally:
    signal.signal(signal.SIGINT, before)


def _is_command(line: str) -> bool:
  return line.startswith('/') and not line.startswith('//')


def _message(line: str) -> str:
  from training.data import texts
  return texts.checked(line[1:] if line.startswith('//') else line,
                       'the message')


def _command(session: Any, line: str) -> bool:
  """Does what a command says; returns whether the program goes on."""
  name, _, rest = line.partition(' ')
  rest = rest.strip()
  require(name in COMMANDS, f'there is no command {name}: choose from '
          f'{", ".join(COMMANDS)}; a message that begins with / is written '
          f'/{line}')
  return COMMANDS[name](session, rest) is not False


def _save(session: Any, name: str) -> None:
  require(bool(name), '/save needs the name of a file')
  require(bool(session.messages), 'there is nothing to save yet')
  try:
    with open(os.path.expanduser(name), 'a', encoding='utf-8') as file:
      file.write(session.line())
  except OSError as error:
    raise RequestError(f'/save cannot write {name!r}: {error.strerror}; name '
                       'a file in a folder that is there') from error
  _say(f'{len(session.messages)} messages are in {name} now')


def _system(session: Any, text: str) -> None:
  session.instruct(text)
  if session.messages:
    _say('the conversation so far stays: /reset begins a new one')


def _reset(session: Any, _: str) -> None:
  session.reset()
  _say('a new conversation')


def _say(note: str) -> None:
  print(f'[{note}]', file=sys.stderr)


# Each takes the session and the text after its name; False ends the program.
COMMANDS: dict[str, Callable[[Any, str], Any]] = {
    '/reset': _reset,
    '/system': _system,
    '/save': _save,
    '/help': lambda session, _: print(HELP, file=sys.stderr),
    '/exit': lambda session, _: False,
}


if __name__ == '__main__':
  cli.run(main)
