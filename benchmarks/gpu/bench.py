"""One call of the benchmark: its budget, its results, and their file."""

from collections.abc import Callable, Mapping
import datetime
import time
from typing import Any

from benchmarks.gpu import workers
from tools.plan.chips import CHIPS

Row = dict[str, Any]
WINDOW, TOY_WINDOW = 2.0, 0.01  # seconds that several steps are timed for
# A section may take PATIENCE times as long as expected, and SPARE seconds more.
PATIENCE, SPARE = 3.0, 30.0


class Missing(Exception):
  """What a section needs is not there; the text says what."""


class Bench:
  """Runs sections in a budget; what they find is written as it comes.

  Attributes:
    results: what --json writes.
    toy: whether the sizes are toys.
    window: seconds that several steps are timed for.
  """

  def __init__(self, minutes: float, toy: bool, write: Callable[[Row], None],
               torch_python: str = '', earlier: Row | None = None):
    self._end = time.monotonic() + 60 * minutes
    self._write, self._python = write, torch_python
    self.toy, self.window = toy, TOY_WINDOW if toy else WINDOW
    self._section: Row = {}
    self.results: Row = dict(
        started=f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC',
        minutes=minutes, toy=toy, machine={}, cases={}, chosen={}, sections={})
    if earlier:
      self.results |= {name: earlier[name] for name in ('cases', 'chosen')}
      self.results['sections'] = {
          name: section | dict(earlier=True)
          for name, section in earlier['sections'].items()
          if section['status'] == 'done' and name != 'install'}

  def plan(self, name: str, title: str, seconds: float) -> None:
    """Names a section that is to run; what an earlier call has done stays."""
    done = self.results['sections'].pop(name, None)
    self.results['sections'][name] = done or dict(
        title=title, guess_s=seconds, seconds=0.0, status='not reached',
        why='', rows=[])

  def run(self, name: str, section: Callable[['Bench'], None]) -> Row:
    """Runs a section that is planned, unless it does not fit; returns it."""
    self._section = own = self.results['sections'][name]
    if own['status'] == 'done':
      return own
    if own['guess_s'] > self.left():
      own |= dict(status='skipped', why=f'it takes about {own["guess_s"]:.0f} '
                  f's, and {max(self.left(), 0):.0f} s were left')
    else:
      own['status'] = 'running'
      self.save()
      start = time.monotonic()
      try:
        section(self)
      except Missing as missing:
        own |= dict(status='failed' if name == 'install' else 'skipped',
                    why=str(missing))
      else:
        own |= _ended(own['rows'])
      own['seconds'] = time.monotonic() - start
    self.save()
    return own

  def left(self) -> float:
    """Returns the seconds that are left of the budget."""
    return self._end - time.monotonic()

  def limit(self) -> float:
    """Returns the seconds after which a process of this section is ended."""
    most = PATIENCE * self._section['guess_s'] + SPARE
    return max(1.0, self.left() if self.toy else min(self.left(), most))

  def ask(self, side: str, request: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of a side's answer, at least one."""
    how = (dict(python=self._python) if side == 'theirs' and self._python
           else {})
    return workers.ask(side, dict(request, toy=self.toy), self.limit(),
                       **how) or [dict(error='it answered nothing')]

  def add(self, **row: Any) -> None:
    """Puts a row into the section that runs."""
    self._section['rows'].append(row)
    self.save()

  def add_step(self, case: str, **row: Any) -> None:
    """Adds a training step, with its FLOP/s and their share of the peak."""
    if 'tokens_per_s' in row:
      sizes, peak = self.results['cases'][case], self.results['machine']['peak']
      row['flops_per_s'] = row['tokens_per_s'] * sizes['flops_per_token']
      row['mfu'] = row['flops_per_s'] / peak if peak else None
    self.add(case=case, **row)

  def add_writing(self, **row: Any) -> None:
    """Adds a generation, with the most that the memory's speed allows."""
    if row['side'] == 'ours' and 'bytes_per_step' in row:
      rate = bandwidth(self.results['machine'].get('card', ''))
      row['limit_per_s'] = (row['batch'] * rate / row['bytes_per_step']
                            if rate else None)
    self.add(**row)

  def rows(self, case: str, side: str) -> list[Row]:
    """Returns the steps of a case that a side has taken, in that order."""
    return [row for section in self.results['sections'].values()
            for row in section['rows']
            if (row.get('case'), row.get('side')) == (case, side)
            and 'tokens_per_s' in row]

  def sizes(self, case: str) -> Row:
    """Returns a case's sizes on this card; raises Missing without them."""
    found = self.results['cases'].get(case, {})
    if 'model' not in found:
      raise Missing(found.get('error') or 'the section install has not said '
                    f'the sizes of {case}')
    return found

  def needs_torch(self) -> None:
    """Raises Missing where PyTorch is not here, or does not see the GPU."""
    said = self.results['machine'].get('torch', {})
    if 'torch' not in said:
      raise Missing('PyTorch or transformers is not here: '
                    f'{said.get("error", "install has not run")}')
    if not self.toy and said['card'] == 'none':
      raise Missing(f'PyTorch {said["torch"]} sees no GPU')

  def save(self) -> None:
    """Writes all that was found so far."""
    self._write(self.results)


def _ended(rows: list[Row]) -> Row:
  """Returns how a section ended: it failed where it has no figure."""
  errors = [row['error'] for row in rows if 'error' in row]
  if errors and len(errors) == len(rows):
    return dict(status='failed', why=errors[-1])
  return dict(status='done', why='')


def bandwidth(card: str) -> float | None:
  """Returns the bytes a second of a card's memory; None: it is not known."""
  return next((chip.hbm_rate for chip in CHIPS.values() if chip.kind == card),
              None)
