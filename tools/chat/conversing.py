"""Lines in, answers out: at a terminal, and through a pipe."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
from typing import Any

from configs.errors import RequestError, require

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


def in_terminal(session: Any) -> None:
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
