"""The comparison of mixers: turns that are fair, and figures of what is run."""

import json
import sys

import pytest

from benchmarks import mixers
from configs.errors import RequestError

SIZES = dict(d_model=16, num_heads=2)


def test_a_ratio_is_of_one_turn(monkeypatch):
  """A machine that is ten times as slow for one turn slows both."""
  clock = [0.0]
  for name in ('perf_counter', 'process_time'):
    monkeypatch.setattr(mixers.time, name, lambda: clock[0])
  def contender(seconds, times):
    turn = iter([99.0, 1.0, 10.0, 1.0])  # the first compiles, and is left out
    def run():
      clock[0] += seconds * next(turn)
    return mixers.Contender(run, times, 7)
  found = mixers.turns({'a': contender(2.0, 1), 'b': contender(8.0, 16)}, 3)
  assert (found['a']['seconds'], found['b']['seconds']) == (2.0, 0.5)
  assert (found['a']['ratio'], found['b']['cpu_ratio']) == (1.0, 0.25)


@pytest.mark.long
@pytest.mark.slow
def test_layers_and_decoding_are_measured_as_they_say(tmp_path, monkeypatch,
                                                      capsys):
  file = tmp_path / 'found.json'
  monkeypatch.setattr(sys, 'argv', [
      'mixers', '--mixers=attention,deltanet', '--lengths=32,64', '--rounds=1',
      '--sections=mixing,layer,decode', '--dtypes=float32', '--d_model=16',
      '--num_heads=2', f'--json={file}'])
  mixers.main()
  rows = json.loads(file.read_text())['rows']
  assert capsys.readouterr().out.count('deltanet') == 3 * 2
  assert len(rows) == 3 * 2 * 2
  assert all(row['seconds'] > 0 and row['nbytes'] > 0 for row in rows)
  nbytes = {(row['section'], row['mixer'], row['length']): row['nbytes']
            for row in rows}
  # Keys and values of 2 layers; states of 2 heads of 8 x 8, and 3 tokens of
  # their three convolutions.
  assert nbytes['decode', 'attention', 64] == 4 * 2 * 2 * 64 * 16
  assert nbytes['decode', 'attention', 32] == 4 * 2 * 2 * 32 * 16
  assert (nbytes['decode', 'deltanet', 64] == nbytes['decode', 'deltanet', 32]
          == 4 * 2 * (2 * 8 * 8 + 3 * 3 * 16))


@pytest.mark.parametrize('flag, sentence', [
    ('--mixers=atention', "'atention'"), ('--sections=lair', "'lair'"),
    ('--lengths=64,32', 'rising'), ('--lengths=16', 'above 16'),
    ('--rounds=0', 'rounds is 0'), ('--d_model=0', 'd_model is 0'),
    ('--d_model=10', 'd_model 10'),
])
def test_what_cannot_be_is_refused(flag, sentence, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['mixers', '--rounds=1', flag])
  with pytest.raises(RequestError, match=sentence):
    mixers.main()
