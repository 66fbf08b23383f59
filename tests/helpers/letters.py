"""Texts of one letter each, and batches of them: what tests of data share."""

from configs import base
from training.data import tokenizers
from training.objectives import pipeline

BYTES = tokenizers.load('bytes')


def config(source, objective, length=64, **changes):
  c = base.base()
  c.objective = objective
  c.data.update(dict(source=source, length=length, batch_size=4,
                     holdout_every=0) | changes)
  return c


def write(tmp_path, monkeypatch) -> str:
  """Writes six texts and returns them as a source."""
  monkeypatch.setenv('ARCHETYPE_CACHE', str(tmp_path / 'cache'))
  for i, letter in enumerate('abcdef'):
    words = [letter * (1 + (i + j) % 5) for j in range(300)]
    (tmp_path / f'{letter}.txt').write_text(' '.join(words))
  return f'text:{tmp_path}/*.txt'


def pairs(source, **changes):
  """Returns 20 batches of BERT's pairs."""
  loader = pipeline.training_loader(config(source, 'mlm_nsp', **changes), BYTES)
  return [loader.batch(n) for n in range(20)]
