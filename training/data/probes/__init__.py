"""Probes: small tasks with exact answers, by name in PROBES.

`data.source='probe:NAME'` with objective 'probe' trains on one. To add a task,
write a subclass of record.Probe in a file of this folder, and an object of it
in a table PROBES of that file. Which rows are in batch n is a function of
(seed, n), as for text: row i of a pass is drawn from (seed, i), and rows that
are held out from another stream, which is the same for all seeds.
"""

import functools
import hashlib
import importlib
import pkgutil

import ml_collections
import numpy as np

from common.errors import RequestError, check_choice, require
from training.data import labelled
from training.data.probes.record import Level, Probe, Row, Settings

PROBES: dict[str, Probe] = {}
for _file in pkgutil.iter_modules(__path__):
  if _file.name != 'record':
    PROBES |= importlib.import_module(f'{__name__}.{_file.name}').PROBES

PREFIX_OF_SOURCE = 'probe:'
KIND_OF_SOURCE = labelled.PROBE_ROWS
_STREAM_OF_SPLIT = {'train': 0, 'eval': 1}
_SEED_OF_HELD_OUT_PART = {'': 0, 'first': 1, 'second': 2}  # by eval.part
_NUM_HASHED_ROWS = 8  # of each split
# The fields of config.probe that the published settings of a probe fill in.
DERIVED_FIELDS = ('levels', 'vocab', 'examples', 'held_out')
FIELDS = (*DERIVED_FIELDS, 'random_non_queries')


def find_probe(config: ml_collections.ConfigDict) -> Probe:
  """Returns the probe (a small task) that data.source names.

  Args:
    config: the config of a run.

  Raises:
    RequestError: if data.source names no probe.
  """
  return PROBES[parse_probe_name(config.data.source)]


def parse_probe_name(source: str) -> str:
  """Returns the NAME in a data.source 'probe:NAME', which names a small task
  with exact answers.

  Args:
    source: the value of data.source.

  Raises:
    RequestError: if the source is of another kind, or no probe has this name.
  """
  require(source.startswith(PREFIX_OF_SOURCE),
          f'data.source is {source!r}, and '
          "objective 'probe' reads a probe: write probe:NAME, with a NAME of "
          f'{", ".join(PROBES)}')
  name = source.removeprefix(PREFIX_OF_SOURCE)
  check_choice('probe', name, PROBES)
  return name


def read_settings(config: ml_collections.ConfigDict) -> Settings:
  """Returns the settings with which a run's probe (a small task) draws its
  rows.

  Args:
    config: the config of the run. A field of config.probe that is empty or 0
      stands for the setting that the paper of the probe has.
  """
  probe = find_probe(config)
  fields = config.probe
  return Settings(
      length=config.data.length, levels=tuple(fields.levels) or probe.levels,
      vocab=fields.vocab or probe.vocab,
      examples=fields.examples or probe.examples,
      held_out=fields.held_out or probe.held_out,
      random_non_queries=fields.random_non_queries)


def held_out_seed(config: ml_collections.ConfigDict) -> int:
  """Returns the seed with which held-out rows are drawn. It is the same for all
  runs, and another one for each value of eval.part."""
  return _SEED_OF_HELD_OUT_PART[config.eval.part]


def check_probe(config: ml_collections.ConfigDict) -> None:
  """Checks the settings of a run that trains on a probe (a small task).

  Args:
    config: the config of the run.

  Raises:
    RequestError: for settings with which no row can be drawn, and for a field
      that is set although the probe of the run does not read it.
  """
  name = parse_probe_name(config.data.source)
  probe = PROBES[name]
  settings = read_settings(config)

  # A field that the probe does not read must keep its default: a user who sets
  # it believes that it has an effect. A probe without letters has vocab 0.
  require(bool(probe.vocab) or not config.probe.vocab,
          f'probe.vocab is {config.probe.vocab}, which probe {name!r} does not '
          'read: leave it at 0')
  require(probe.fills or not config.probe.random_non_queries,
          'probe.random_non_queries is True, which probe '
          f'{name!r} does not read: leave it at False')

  # Rows of every level must exist. Four letters are enough for any probe, and a
  # probe without letters needs none.
  fewest_letters = min(4, probe.vocab)
  require(settings.vocab >= fewest_letters,
          f'probe.vocab is {settings.vocab}: probe {name!r} has '
          f'at least {fewest_letters} letters')
  for level in settings.levels:
    check_level(name, level=level, settings=settings)


def check_level(name: str, level: Level, settings: Settings) -> None:
  """Checks that a probe can draw rows of a level of difficulty.

  Args:
    name: the name of the probe.
    level: the level, such as a number of letters.
    settings: the settings of the probe, with the length that a row must fit
      into.

  Raises:
    RequestError: for a level that cannot be drawn.
  """
  probe = PROBES[name]
  location = f'probe {name!r} with {level!r} {probe.level}'

  # A level must be a number. type() is compared because isinstance would accept
  # True as 1. Levels may be fractions if the least level is written as one
  # (0.0).
  takes_fractions = type(probe.least) is float
  is_number = type(level) is int or (type(level) is float and takes_fractions)
  if not is_number or level < probe.least:
    number = 'number' if takes_fractions else 'whole number'
    raise RequestError(f'{location}: a level is a {number} of at least '
                       f'{probe.least}')

  # A row of this level must exist at all, and fit into data.length.
  reason = probe.reason_against(settings, level)
  require(not reason, f'{location}: {reason}')
  size = probe.min_length(level, settings)
  require(size <= settings.length,
          f'{location} has rows of {size} tokens or '
          f'more, and data.length is {settings.length}: set it to {size} or '
          'more')


@functools.cache
def digest_probe(name: str) -> str:
  """Returns a hash of the first rows of a probe, which identifies its version.

  Args:
    name: the name of the probe.

  Returns:
    The hash of rows of training and of held-out rows, drawn with the published
    settings and seed 0, in hexadecimal digits.
  """
  probe = PROBES[name]
  published = Settings(
      length=probe.length, levels=probe.levels, vocab=probe.vocab,
      examples=probe.examples, held_out=probe.held_out)

  # A change of the probe, of numpy's generator or of the stream that rows are
  # drawn from changes these rows. int64 makes the hash the same everywhere.
  digest = hashlib.blake2b(digest_size=16)
  for split in _STREAM_OF_SPLIT:
    rows = Rows(probe, settings=published, split=split, seed=0)
    for number in range(_NUM_HASHED_ROWS):
      for array in rows[number]:
        digest.update(array.astype(np.int64).tobytes())
  return digest.hexdigest()


class Rows:
  """The rows of one split of a probe, as a sequence. A row is drawn when it is
  read.

  Args:
    probe: the task.
    settings: the settings with which it draws rows.
    split: 'train' or 'eval'.
    seed: the seed of the rows.
    levels: the levels of its rows; (): settings.levels.
  """

  def __init__(self, probe: Probe, settings: Settings, split: str, seed: int,
               levels: tuple[Level, ...] = ()):
    """Counts the rows, of which none is drawn yet."""
    self._probe = probe
    self._settings = settings._replace(test=split == 'eval')
    self._levels = levels or settings.levels
    self._key = (_STREAM_OF_SPLIT[split], seed)
    self._len = settings.held_out if split == 'eval' else settings.examples
    self.num_tokens = self._len * settings.length
    self.num_bytes = 0  # there is no text

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> Row:
    """Draws row i, at a random one of the levels.

    Raises:
      IndexError: if there is no such row.
    """
    if not 0 <= i < self._len:
      raise IndexError(f'row {i} of {self._len}')
    # A row has a generator of its own, so that it is the same in whichever
    # order rows are read.
    rng = np.random.default_rng([*self._key, int(i)])
    level = self._levels[rng.integers(len(self._levels))]
    return self._probe.draw(rng, level, self._settings)
