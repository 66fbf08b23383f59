"""Options of sbatch: read from --sbatch, and written as #SBATCH lines.

sbatch splits such a line into words by rules of its own: a backslash takes the
next character as it is, within quotes too; and no line goes on after its end.
"""

import math
import re
import shlex
from typing import NamedTuple

from configs.errors import RequestError, require

# What the script relies on: which flag of the launcher sets it, or '' where
# there is nothing to choose.
OURS = {
    'nodes': '--nodes', 'N': '--nodes', 'ntasks': '--per_gpu',
    'n': '--per_gpu', 'ntasks-per-node': '--per_gpu',
    'cpus-per-task': '--cpus_per_task', 'c': '--cpus_per_task',
    'signal': '--grace_seconds', 'output': '--logs', 'o': '--logs',
    'open-mode': '', 'requeue': '', 'no-requeue': '', 'array': '', 'a': ''}
_ENDLESS = ('unlimited', 'infinite', '-1', '0')
# minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?')


class Option(NamedTuple):
  """One option, as it was written.

  Attributes:
    name: 'time' of --time, 't' of -t.
    value: '' where it has none.
    words: what was written.
  """
  name: str
  value: str
  words: tuple[str, ...]


def options(text: str) -> list[Option]:
  """Returns the options of --sbatch.

  Raises:
    ValueError: where one is set by a flag of the launcher, or is none.
  """
  try:
    rest = shlex.split(text)
  except ValueError as error:
    raise RequestError(f'--sbatch is {text!r}: {error}') from error
  found = []
  while rest:
    word = rest.pop(0)
    require(re.match('--?[a-zA-Z]', word) is not None, f'--sbatch holds '
            f'{word!r}, which is no option: write --NAME=VALUE')
    if word.startswith('--'):
      name, equals, value = word[2:].partition('=')
    else:
      name, equals, value = word[1], word[2:], word[2:]
    words = [word]
    if not equals and rest and not rest[0].startswith('-'):
      value = rest.pop(0)
      words.append(value)
    _refuse_ours(name, word)
    found.append(Option(name, value, tuple(words)))
  return found


def _refuse_ours(name: str, word: str) -> None:
  # sbatch takes the beginning of a long name for the name.
  ours = next((full for full in OURS if full == name
               or len(name) > 2 and full.startswith(name)), None)
  if ours is not None:
    raise RequestError(
        f'--sbatch holds {word!r}, which the launcher writes itself: '
        + (f'use its flag {OURS[ours]}' if OURS[ours] else 'leave it out'))


def line(*words: str) -> str:
  """Returns a #SBATCH line with these words.

  Raises:
    ValueError: for what such a line cannot hold.
  """
  for word in words:
    require(not re.search(r'[\n\r\0]', word), f'{word!r} holds a line break, '
            'which no #SBATCH line can: take it out of --workdir, --logs or '
            '--sbatch')
  return ' '.join(['#SBATCH', *(
      re.sub(r'([^\w@%+=:,./-])', r'\\\1', word) for word in words)])


def file_name(path: str) -> str:
  """Returns a path for SLURM, which puts things in place of %j and others; a
  backslash would keep it from all of that.

  Raises:
    ValueError: for a path with a backslash.
  """
  require('\\' not in path, f'{path!r} holds a backslash, which SLURM does not '
          'take in the name of a log: choose another --workdir, or --logs')
  return path.replace('%', '%%')


def seconds(limit: str) -> float:
  """Returns what a --time of sbatch stands for; inf: no limit, or one that
  only sbatch can judge."""
  found = _TIME.fullmatch(limit)
  if limit.lower() in _ENDLESS or not found:
    return math.inf
  days, *rest = (None if part is None else int(part)
                 for part in found.groups())
  first, second, third = rest
  second, third = second or 0, third or 0
  if days is not None:
    return ((24 * days + first) * 60 + second) * 60 + third
  if rest[2] is not None:
    return (first * 60 + second) * 60 + third
  return first * 60 + second


def check_time(found: list[Option], grace_seconds: int) -> None:
  """Refuses a time limit that would end the run before it has begun."""
  for option in found:
    limit = seconds(option.value)
    if option.name in ('time', 't') and limit < least_seconds(grace_seconds):
      raise RequestError(
          f'--sbatch holds {" ".join(option.words)!r}, and the run is told to '
          f'save --grace_seconds={grace_seconds} before its end, or up to a '
          'minute sooner: it would be stopped and queued again for ever; '
          f'choose {least_seconds(grace_seconds) // 60} minutes or more, or '
          'fewer --grace_seconds')


def least_seconds(grace_seconds: int) -> int:
  """Returns the shortest limit that leaves a run a minute: SLURM counts in
  minutes, and may send the signal one sooner."""
  return 60 * (math.ceil(grace_seconds / 60) + 2)
