"""eval.py --tasks=extrapolation: which variants a length is tried with."""


import numpy as np
import pytest

import architectures
from architectures.parts import positions
from tests.helpers import models
from training.evals.tasks import extrapolation


def variants(multiple, interpolate=False, **changes):
  model = architectures.resolve(models.config(max_len=32, **changes))
  return positions.of(model).longer(model, 32, multiple, interpolate)


@pytest.mark.parametrize(
    'position', ['sinusoidal', 'alibi', 'relative', 'none'])
def test_some_encodings_go_on_as_they_are(position):
  assert list(variants(4, position=position)) == [position]


def test_learned_positions_refuse_or_interpolate():
  assert list(variants(1)) == ['learned']
  assert variants(2) == {'learned': None}
  stretched = variants(4, interpolate=True)
  assert stretched['learned'] is None
  assert stretched['learned, interpolated'].learned.stretch == 4


def test_rope_is_tried_with_each_scaling():
  tried = variants(8, position='rope')
  assert list(tried) == ['rope', 'rope, linear', 'rope, ntk', 'rope, llama3',
                         'rope, yarn']
  assert tried['rope'].rope.scaling == 'none'
  for name, model in list(tried.items())[1:]:
    assert f'rope, {model.rope.scaling}' == name
    assert (model.rope.factor, model.rope.original_len) == (8, 32)
  alone = variants(8, position='rope', rope=dict(scaling='ntk', factor=2.0))
  assert list(alone) == ['rope, ntk'] and alone['rope, ntk'].rope.factor == 2


def test_the_table_and_the_picture(tmp_path):
  """Half of the longest rows is not reached, and one token reaches the last
  position that is: it counts as one."""
  curves = {'rope': {m: np.full(32 * m, float(m)) for m in (1, 2, 4, 8)},
            'learned': {1: np.ones(32), 2: None, 4: None, 8: None},
            'stretched': {m: np.ones(32 * m) for m in (2, 4)}}
  tokens = {m: np.full(32 * m, 9) for m in (1, 2, 4, 8)}
  tokens[8][127:] = 0
  tokens[8][126] = 1
  curves['rope'][8][126] = 27.0
  curves['rope'][8][127:] = np.nan
  texts = {m: extrapolation.Text(n, n / n.sum()) for m, n in tokens.items()}
  lines = extrapolation.table(curves, texts, 32).splitlines()
  rows = [line.split() for line in lines
          if line.startswith(('rope', 'learn', 'tok'))]
  stretched = [line.split() for line in lines if line.startswith('stretched')]
  assert stretched == [['stretched', '—', '1.000', '1.000', '—'],
                       ['stretched', *'—' * 8]]
  all_, last = 126 * 9 + 1, 30 * 9 + 1
  assert rows[0][1:] == ['1.000', '2.000', '4.000',
                         f'{(126 * 9 * 8 + 27) / all_:.3f}']
  assert rows[1][1:] == ['1.000', 'refused', 'refused', 'refused']
  assert rows[2][1:] == ['288', '576', '1,152', f'{all_:,}']
  assert rows[3][1:5] == ['8.000'] * 3 + [
      f'{(30 * 9 * 8 + 27) / last:.3f}']
  assert rows[3][5:] == ['no', 'text'] * 4
  assert rows[5][1:] == ['288'] * 3 + [f'{last}'] + ['0'] * 4
  extrapolation.plot(curves, texts, 32, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
