"""Stretches of bad steps never push the last good checkpoints out."""

import hypothesis
from hypothesis import strategies as st
import pytest

from tests.helpers import toy_run
from training.workdir import keeping
from training.workdir import restoring


@hypothesis.given(
    goods=st.dictionaries(st.integers(0, 60), st.booleans(), max_size=20),
    keep=st.integers(1, 4), keep_every=st.sampled_from([0, 1, 7]),
    best=st.none() | st.integers(0, 60))
@hypothesis.settings(deadline=None)
def test_what_is_kept(goods, keep, keep_every, best):
  kept = keeping.Policy(keep, keep_every, goods.__getitem__, lambda: best
                        ).kept(list(goods))
  assert kept <= set(goods)
  good = [step for step in sorted(goods) if goods[step]]
  assert set(good[-keep:]) <= kept
  assert not goods or max(goods) in kept
  assert best not in goods or best in kept
  for step in kept - set(good[-keep:]) - {max(goods, default=0), best}:
    assert keep_every and step % keep_every == 0
  if keep_every:
    assert {step for step in goods if step % keep_every == 0} <= kept


def test_the_best_is_kept_beside_the_newest():
  assert keeping.Policy(1, 0, lambda step: True, lambda: 3).kept(range(10)) == {
      3, 9}


def test_records_are_read_no_further_back_than_needed():
  asked = []
  def is_good(step):
    asked.append(step)
    return step != 9
  assert keeping.Policy(2, 0, is_good).kept(range(10)) == {7, 8, 9}
  assert asked == [9, 8, 7]


@pytest.mark.slow
@pytest.mark.parametrize('keep_every, left', [(0, [2, 3, 12]),
                                              (5, [2, 3, 5, 10, 12])])
def test_restarts_in_a_bad_stretch_leave_the_good_ones(
    tmp_path, keep_every, left):
  """A launcher starts the run again and again, and each time it saves."""
  state = toy_run.born(1, 1)
  with toy_run.open_store(tmp_path, keep=2, keep_every=keep_every) as store:
    for step in (1, 2, 3, 4, 5):
      toy_run.save(store, step, state, good=step < 4)
  for step in range(6, 13):
    with toy_run.open_store(tmp_path, keep=2, keep_every=keep_every) as store:
      assert store.restore(toy_run.abstract(1, 1)).step == step - 1
      toy_run.save(store, step, state, good=False)
  assert restoring.steps(restoring.directory(tmp_path)) == left
  # Once it has recovered, the newest good ones are what is kept.
  with toy_run.open_store(tmp_path, keep=2, keep_every=0) as store:
    for step in (13, 14):
      toy_run.save(store, step, state)
  assert restoring.steps(restoring.directory(tmp_path)) == [13, 14]


def test_a_record_of_an_earlier_version_is_good(tmp_path):
  """And one that cannot be read is not."""
  with toy_run.open_store(tmp_path) as store:
    toy_run.save(store, 1, toy_run.born(1, 1))
    store.wait()
    path = store.directory / '1/record/metadata'
    toy_run.edit_record(path, lambda record: record.pop('good'))
    assert restoring.is_good(store.directory, 1)
    path.write_text('{')
    assert not restoring.is_good(store.directory, 1)
