r"""A conversation with a model, in a terminal or through a pipe.

  python -m tools.chat --workdir runs/chat
  python -m tools.chat --folder models/smollm2 --system='Answer in one line.'
  echo 'Name three colours.' | python -m tools.chat --folder models/smollm2

Each line is a message; the model answers it, and keeps the conversation in its
cache. A run that learned to chat is asked by its template, a Hugging Face
folder by its own chat template, and any other model goes on from the text. How
a folder's answers are drawn and end is what its generation_config.json says;
the flags say otherwise.

/reset begins a new conversation; /exit or Ctrl-D ends the program, Ctrl-C an
answer. Through a pipe, each line of standard input is a message, and standard
output has the answers alone.

Exit code 2: a wrong request, such as a message for which the model has no
room; 1: a failure.
"""

from collections.abc import Iterator
import contextlib
import signal
import sys
import types
from typing import Any

from absl import flags

from common.errors import RequestError, require
from training import cli
from training.evals.tasks import writing

cli.define_workdir()
flags.DEFINE_string('folder', '', 'Instead of --workdir: a folder in the '
                    'Hugging Face format, or hf://ORG/NAME.')
flags.DEFINE_string('step', None, 'Which checkpoint: the number of a step, or '
                    'best, of a run with eval.best; default: the newest.')
flags.DEFINE_string('template', '', 'A chat template instead of the model\'s '
                    'own: a Jinja file, or a Hugging Face folder.')
flags.DEFINE_string('system', '', 'The system text.')
flags.DEFINE_integer('context', 2048, 'Tokens of the whole conversation; '
                     'max_len of the model at most.', 2, 2**24)
flags.DEFINE_integer('max_new_tokens', 512, 'Tokens of an answer.', 1, 2**24)
flags.DEFINE_integer('seed', 0, 'The seed of the draws.', 0, 2**32 - 1)
for _flag in writing.SAMPLING_FLAGS:
  _flag.define(None, _flag.help)

# The note after an answer that ended early in a terminal, by the reason.
NOTE_OF_END_REASON = {
    'length': '[cut off at --max_new_tokens]',
    'context': '[the tokens of --context are full: /reset begins a new '
               'conversation]',
    'interrupted': '[stopped]'}


def main() -> None:
  """Talks with the model that the flags name."""
  # Check the flags.
  cli.parse(__doc__)
  args = flags.FLAGS
  require(bool(args.workdir) != bool(args.folder), 'pass either --workdir DIR, '
          'the folder of a run, or --folder DIR, in the Hugging Face format')
  require(args.step is None or not args.folder,
          f'{args.folder} is no run: it has no --step')

  # Collect the options of the draws, and refuse values out of range before the
  # model is loaded.
  overrides = {}
  for flag in writing.SAMPLING_FLAGS:
    value = args[flag.name].value
    if value is not None:
      overrides[flag.name] = value
  writing.make_sampling(_sampling_options({}, overrides))

  # Standard output is for the answers alone, so what is printed while the model
  # is loaded goes to the standard error.
  sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]
  with contextlib.redirect_stdout(sys.stderr):
    session = _make_session(args, overrides)
  converse(session, sys.stdin.isatty() and sys.stdout.isatty())


def _sampling_options(generation: dict[str, Any], overrides: dict[str, Any]
                      ) -> types.SimpleNamespace:
  """Returns the options of writing.SAMPLING_FLAGS, with which tokens are drawn,
  such as the temperature and top_k.

  The command line comes first, then a folder's generation_config.json, then the
  defaults of the flags. If one of the options `temperature`, `top_k`, `top_p`
  and `min_p` is set on the command line, all of them in the file are ignored,
  because they belong together.

  Args:
    generation: the fields of a folder's generation_config.json; {}: none.
    overrides: the options that were set on the command line.
  """
  options = {flag.name: flag.default for flag in writing.SAMPLING_FLAGS}
  draw_options = {'temperature', 'top_k', 'top_p', 'min_p'}
  if generation and not draw_options & overrides.keys():
    # What the file does not say is as transformers has it: tokens are drawn
    # only with do_sample, and then from the 50 likeliest. Without do_sample,
    # the likeliest token is taken, which a temperature of 0 stands for.
    if generation.get('do_sample'):
      options['top_k'] = 50
      for name in draw_options & generation.keys():
        if generation[name] is not None:
          options[name] = generation[name]
    else:
      options['temperature'] = 0.0
  if generation.get('repetition_penalty') is not None:
    options['repetition_penalty'] = generation['repetition_penalty']
  return types.SimpleNamespace(**options | overrides)


def _make_session(args: Any, overrides: dict[str, Any]) -> Any:
  """Loads the model of a run or of a folder, and begins a conversation with it.

  In a terminal, a line that describes the model and the options is printed.

  Args:
    args: the flags.
    overrides: the options of the draws that were set on the command line.

  Returns:
    The conversation, a training.chat.ChatSession.
  """
  # Load the model and its template.
  from training import chat
  from training import hub
  from training.workdir import checkpoints, storage
  if args.folder:
    folder = storage.checked_path(hub.download_if_on_hub(args.folder),
                                  '--folder')
    speaker = chat.load_from_folder(folder, args.template)
  else:
    step = checkpoints.parse_step(args.step)
    speaker = chat.load_from_run(
        storage.checked_path(args.workdir), step=step, template=args.template)

  # Begin the conversation.
  options = _sampling_options(speaker.options, overrides)
  context = min(args.context, speaker.module.config.max_len)
  engine = chat.CachedDecoder(
      speaker.module, params=speaker.params, context=context,
      sampling=writing.make_sampling(options), seed=args.seed)
  session = chat.ChatSession(
      engine, tokenizer=speaker.tokenizer, talk=speaker.talk,
      max_new_tokens=args.max_new_tokens,
      stops=writing.split_stop_strings(options), system=args.system)

  # Describe it to a person.
  if sys.stdin.isatty():
    words = []
    for name, value in vars(options).items():
      if value:
        words.append(f'{name} {value}')
    print(f'the model {speaker.talk.words}; {", ".join(words)}; room for '
          f'{context:,} tokens')
  return session


def converse(session: Any, in_terminal: bool) -> None:
  """Reads messages and prints the answers until there are no more messages.

  Args:
    session: the training.chat.ChatSession with the model.
    in_terminal: whether a person types. Then a wrong request is printed, and
      does not end the conversation.

  Raises:
    RequestError: for a message that the model cannot answer, if no person
      types.
  """
  from training.data import texts
  for number, line in enumerate(_read_messages(in_terminal), 1):
    try:
      # A line is a command, a message, or empty.
      if line.strip() == '/exit':
        return
      if line.strip() == '/reset':
        session.reset()
      elif line.strip():
        message = texts.check_text(line.rstrip('\r\n'), f'line {number}')
        _print_answer(session, message)
        if in_terminal and session.end_reason in NOTE_OF_END_REASON:
          print(NOTE_OF_END_REASON[session.end_reason], file=sys.stderr)
    except RequestError as error:
      if not in_terminal:
        raise
      print(f'error: {error}', file=sys.stderr)


def _read_messages(in_terminal: bool) -> Iterator[str]:
  """Yields the messages, one for each line of the standard input.

  Args:
    in_terminal: whether a person types them. Then a prompt is printed before
      each, and Ctrl-C does not end the program.
  """
  # Through a pipe.
  if not in_terminal:
    from training.data import texts
    for data in sys.stdin.buffer:
      yield texts.decode_text(data, 'standard input')
    return

  # In a terminal. Once readline is imported, `input` lets lines be edited and
  # brings earlier ones back; some builds of Python are without it.
  with contextlib.suppress(ImportError):
    import readline as _  # noqa: F401
  while True:
    try:
      yield input('\n> ')
    except KeyboardInterrupt:
      print('\n/exit or Ctrl-D ends the program', file=sys.stderr)
    except EOFError:
      print()
      return


def _print_answer(session: Any, message: str) -> None:
  """Prints the answer to a message while it is generated.

  Ctrl-C ends the answer between two tokens, so that the cache of the model
  holds whole tokens.

  Args:
    session: the training.chat.ChatSession with the model.
    message: the text of the message.
  """
  # The handler only notes Ctrl-C. The session asks between tokens whether it
  # was pressed.
  interrupts: list[int] = []

  def note_interrupt(number: int, frame: types.FrameType | None) -> None:
    """Notes the number of a signal; Python calls it when the signal comes."""
    del frame
    interrupts.append(number)

  def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed since the answer began."""
    return bool(interrupts)

  handler_before = signal.signal(signal.SIGINT, note_interrupt)
  try:
    for piece in session.ask(message, stopped=was_interrupted):
      print(piece, end='', flush=True)
    print(flush=True)
  finally:
    signal.signal(signal.SIGINT, handler_before)


if __name__ == '__main__':
  cli.run(main)
