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

from collections.abc import Callable
import contextlib
import sys
import types
from typing import Any

from absl import flags

from configs.errors import require
from tools.chat import conversing
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
    return conversing.in_terminal(session)
  return conversing.through_pipe(session)


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

  from training.chat import engine, load
  from training.chat.session import Session
  from training.workdir import checkpoints, storage
  speaker = (load.of_folder(storage.path(args.folder, '--folder'),
                            args.template) if args.folder else
             load.of_run(storage.path(args.workdir),
                         checkpoints.named_step(args.step), args.template))
  model = speaker.module.config
  options = _options(speaker.options, given)
  context = args.context or min(model.max_len, CONTEXT)
  require(1 < context <= model.max_len, f'--context is {context}, and the '
          f'model takes max_len {model.max_len} tokens: choose 2 to '
          f'{model.max_len}')
  sampling = samples.sampling(options)
  session = Session(
      engine.Engine(speaker.module, speaker.params, context, sampling,
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


if __name__ == '__main__':
  cli.run(main)
