"""A process with limits for what files of a folder make other libraries do.

A chat template can loop without an end. A tokenizer.json of a few lines can
write a gigabyte for a word, or end the process that reads it. So a template is
rendered, and the files of a tokenizer are read before they are read here, in a
process that may take MOST_SECONDS of the processor's time and MOST_BYTES of
memory, and WAITING_FACTOR times as long in all. It does not import JAX.
"""

from collections.abc import Mapping, Sequence
import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from common.errors import require
from training.data import texts

MOST_SECONDS = 10
MOST_BYTES = 2**30
# A process that waits for something is ended after so many times MOST_SECONDS.
WAITING_FACTOR = 30
# A template may write so many characters, and so many times what is said; a
# tokenizer so many times a text.
ALLOWED_CHARACTERS = 2**20
MOST_GROWTH = 8
# A rule that makes texts long, or a regular expression slow, does so with some
# of these.
_LONG_TEXT = ''.join(chr(i) * 32 for i in [*range(1, 0x180), 0x2581, 0x65e5])
_ONE_AT_A_TIME = threading.Lock()


def call_with_limits(subject: str, function: str, *args: Any,
                     keep: bool = False) -> Any:
  """Calls a function of this file in another process, with limits of time and
  memory. It is for work on files that anybody may have published, such as chat
  templates.

  Args:
    subject: the beginning of a message, which says what fails.
    function: the name of the function, a key of _FUNCTIONS.
    *args: its arguments, which must fit into JSON.
    keep: whether the process stays alive for the next call. If not, its memory
      is freed, of which a large vocabulary takes much.

  Returns:
    What the function returns, after a way through JSON: tuples become lists.

  Raises:
    RequestError: where the function fails or runs into a limit.
  """
  # Threads take turns, as the process answers one call after another. If it has
  # not answered, for instance because of Ctrl-C, it is killed: a late answer
  # would be taken for that to the next call.
  with _ONE_AT_A_TIME:
    process = _start_limited_process(os.getpid())
    reply = ''
    try:
      # Write the call as one line, and read one line as the reply. It is empty
      # if the process has ended.
      with contextlib.suppress(BrokenPipeError):
        print(json.dumps([function, *args]), file=process.stdin, flush=True)
      reply = process.stdout.readline()
    finally:
      if not (keep and reply):
        process.kill()
        process.communicate()
        _start_limited_process.cache_clear()

  # A process that has ended without a reply has run into a limit.
  value, why = json.loads(reply or '[null, "MemoryError"]')
  require(
      why != 'MemoryError',
      f'{subject}: it takes more than {MOST_SECONDS} seconds '
      f'or {MOST_BYTES >> 20:,} MiB of memory, or ends the process it is in')
  require(not why, f'{subject}: {why}')
  return value


@functools.cache
def _start_limited_process(_: int) -> Any:
  """Starts the process with limits of time and memory, or returns it if it runs
  already (the function has a cache).

  Args:
    _: the id of the calling process, by which the cache looks up the process
      with limits: so a forked process starts another one.

  Returns:
    The process, a subprocess.Popen whose stdin and stdout are text.
  """
  paths = os.pathsep.join(map(os.path.abspath, sys.path))
  return subprocess.Popen(
      [sys.executable, '-P', '-m', __name__,
       *map(str, (MOST_SECONDS, MOST_BYTES, WAITING_FACTOR * MOST_SECONDS))],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
      text=True, env=os.environ | {'PYTHONPATH': paths})


# In the process with limits.


def render(template: str, chat: Sequence[Mapping[str, str]],
           options: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
  """Renders a conversation by a Jinja chat template, as transformers does.

  Args:
    template: the text of the template.
    chat: the messages, each as {field: text}, such as role and content.
    options: the keyword arguments of transformers' render_jinja_template.

  Returns:
    The text; and the (first character, end) of each part of it that stands in a
    {% generation %} block of the template.

  Raises:
    RequestError: for a text that is far longer than the messages.
  """
  utils = texts.import_extra('transformers.utils.chat_template_utils',
                             subject='it', extra='hf')
  (text,), spans = utils.render_jinja_template(
      [chat], chat_template=template, **options)

  # A malicious template may write so much that it fills the memory of the
  # process that has called this one.
  num_chars = 0
  for message in chat:
    num_chars += sum(map(len, message.values()))
  require(len(text) <= ALLOWED_CHARACTERS + MOST_GROWTH * num_chars,
          'it writes ' f'{len(text):,} characters where {num_chars:,} are said')
  text = texts.check_text(text, 'its text')
  if not spans:
    return text, []
  return text, spans[0]


def read_json(file: str) -> None:
  """Reads a tokenizer.json, and tries to encode and to decode with it."""
  import tokenizers
  _try_tokenizer(tokenizers.Tokenizer.from_file(file))


def read_others(folder: str, kinds: Sequence[str]
                ) -> tuple[str, dict[str, int | None]]:
  """Reads a tokenizer by transformers, from a folder without a tokenizer.json.

  Args:
    folder: the path of the folder.
    kinds: kinds of special tokens, such as eos.

  Returns:
    The text of the tokenizer.json that transformers makes of it; and {kind: id}
    of its special tokens, with None for those that it lacks.
  """
  transformers = texts.import_extra('transformers', subject='it', extra='hf')
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True)
  _try_tokenizer(hf_tokenizer.backend_tokenizer)
  ids = {kind: getattr(hf_tokenizer, f'{kind}_token_id') for kind in kinds}
  return hf_tokenizer.backend_tokenizer.to_str(), ids


def _try_tokenizer(pipeline: Any) -> None:
  """Uses a tokenizer once in this process, which has limits. A tokenizer that
  takes too much time or memory fails here.

  Args:
    pipeline: the tokenizer, of the package tokenizers.

  Raises:
    RequestError: for a normaliser that makes texts much longer.
  """
  pipeline.decode(pipeline.encode('a', 'b').ids)
  if pipeline.normalizer:
    size = len(pipeline.normalizer.normalize_str(_LONG_TEXT))
    require(size <= MOST_GROWTH * len(_LONG_TEXT),
            f'it makes {size:,} characters ' f'of {len(_LONG_TEXT):,}')

  # A tokenizer with a small alphabet may refuse the long text. That is no
  # fault.
  with contextlib.suppress(Exception):
    pipeline.decode(pipeline.encode(_LONG_TEXT).ids)


# What `call_with_limits` may call, by name.
_FUNCTIONS = {
    'render': render,
    'read_json': read_json,
    'read_others': read_others,
}


def main() -> None:
  """Runs the process with limits: reads one call a line from standard input
  and writes one reply a line, until the process that calls has ended.

  The program has three arguments, in this order: the seconds of the processor's
  time that a call may take, the bytes of memory that the process may take, and
  the seconds that a call may take in all.

  A call is the JSON list [name of the function, its arguments ...]; a reply is
  the JSON list [what the function returns, why it has failed].
  """
  cpu_seconds, memory_bytes, total_seconds = map(int, sys.argv[1:])
  # Set the limits that hold for all calls: no core dump, and `memory_bytes` of
  # memory. Ignore signals from the terminal: the calling process ends this one.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
  _, hard_cpu_limit = resource.getrlimit(resource.RLIMIT_CPU)

  # Lines that a library prints must not be taken for a reply: send them to
  # standard error.
  replies = sys.stdout
  sys.stdout = sys.stderr
  for line in sys.stdin:
    name, *args = json.loads(line)
    # Limit the processor time of this call; the system counts it from the start
    # of the process. An alarm limits the time of a call that only waits.
    user_seconds, system_seconds = os.times()[:2]
    used_cpu_seconds = int(user_seconds + system_seconds)
    cpu_limit = used_cpu_seconds + 1 + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, hard_cpu_limit))
    signal.alarm(total_seconds)
    try:
      value = _FUNCTIONS[name](*args)
      reply = json.dumps([value, ''])
    except BaseException as error:
      # Reply to all errors. A panic of Rust is a BaseException.
      why = ' '.join(str(error).split())[:200] or type(error).__name__
      reply = json.dumps([None, why])
    signal.alarm(0)  # the call is over
    print(reply, file=replies, flush=True)


if __name__ == '__main__':
  main()
