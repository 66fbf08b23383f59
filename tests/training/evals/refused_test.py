"""What eval.py's tasks refuse before anything is computed: a case for each
sentence, with the flag and its value."""

import dataclasses
import functools
import types

import pytest

from common.errors import RequestError
from tests.helpers import evaluations
from training import evals


@functools.cache
def evaluation_of(system, objective):
  """Returns an evaluation of a small model, whose flags are set later."""
  config = evaluations.make_config(system, objective, num_layers=2)
  config.data.source = 'text:none.txt'
  return evaluations.make_evaluation(config)


REFUSED = [
    ('inspect', 'gpt', 'causal', dict(prompt=' '), 'inspect reads a text'),
    ('inspect', 'gpt', 'causal', dict(prompt='a|||b'), 'shows one prompt'),
    ('inspect', 'gpt', 'causal', dict(prompt='a', target='b'),
     "--target is 'b', but a decoder has no other text"),
    ('inspect', 'gpt', 'causal', dict(prompt='a' * 40), 'tokens'),
    ('loss', 'gpt', 'causal', dict(stride=32),
     '--stride is 32, but a window has data.length 32 tokens'),
    ('loss', 'bert', 'mlm', dict(stride=4), 'leave --stride at 0'),
    ('loss', 'gpt', 'causal', dict(
        stride=4, source='0.5*text:a.txt,0.5*text:long.txt'),
     "--stride reads one source of text, which '0.5*text:a.txt"),
    ('embed', 'gpt', 'causal', dict(), 'embed reads texts: pass --texts=FILE'),
    ('embed', 'gpt', 'causal', dict(texts='a.txt', vectors='out.txt'),
     "--vectors is 'out.txt': choose a file OUT.npy"),
    ('embed', 'gpt', 'causal', dict(texts='a.txt', pooling='most'),
     "unknown --pooling 'most'"),
    ('embed', 'gpt', 'causal', dict(texts='none.txt'),
     "--texts is 'none.txt', which is no file"),
    ('embed', 'gpt', 'causal', dict(texts='empty.txt'),
     "--texts is 'empty.txt', which is empty"),
    ('embed', 'gpt', 'causal', dict(texts='blank.txt'),
     'blank.txt, line 2, is empty: each line is one text'),
    ('embed', 'gpt', 'causal', dict(texts='long.txt'),
     'long.txt, line 1, has 33 tokens, and the model takes max_len 32'),
    ('embed', 'gpt', 'causal', dict(texts='a.txt', pooling='first'),
     "--pooling is 'first', but the first token of a decoder"),
    ('embed', 'gpt', 'causal', dict(texts='a.txt', pooling='pooler'),
     "--pooling is 'pooler', which this model has not"),
    ('fill_mask', 'bert', 'mlm', dict(), 'fill_mask reads a text'),
    ('fill_mask', 'bert', 'mlm', dict(prompt='a'),
     "the prompt 'a' has no mask"),
    ('fill_mask', 'bert', 'mlm', dict(prompt='[MASK]|||b'),
     "the prompt 'b' has no mask"),
    ('fill_mask', 'bert', 'mlm', dict(prompt='[MASK]' + 'a' * 30),
     'has 33 tokens, [CLS] and [SEP] included, and the model takes max_len 32'),
    ('samples', 'gpt', 'causal', dict(prompt='a', beams=2, samples=3),
     '--samples is 3, but --beams=2 finds no more'),
    ('samples', 'gpt', 'causal', dict(prompt='a', beams=2, temperature=0.5),
     '--beams is 2, which looks for the likeliest text'),
    ('samples', 'gpt', 'causal', dict(prompt='a', beams=2, sample_seed=1),
     '--beams is 2, which looks for the likeliest text'),
    ('samples', 'gpt', 'causal', dict(prompt='a', temperature=0.0, top_k=2),
     '--temperature=0 draws no token'),
    ('samples', 'gpt', 'causal', dict(prompt='a', temperature=0.0,
                                      sample_seed=1),
     '--temperature=0 draws no token'),
    ('samples', 'gpt', 'causal', dict(prompt='a' * 40), 'max_len 32: shorten'),
]


@pytest.mark.parametrize('task, system, objective, flags, words', REFUSED)
def test_what_a_task_cannot_do_is_refused(
    task, system, objective, flags, words, tmp_path, monkeypatch):
  # Files that a flag may name.
  monkeypatch.chdir(tmp_path)
  for name, text in {'a': 'a\n', 'empty': '', 'blank': 'a\n\nb\n',
                     'long': 'a' * 32 + '\n'}.items():
    (tmp_path / f'{name}.txt').write_text(text)

  # All flags of the task, most of them with their defaults.
  values = {flag.name: flag.default for flag in evals.TASKS[task].flags}
  if task == 'embed':
    values['vectors'] = 'out.npy'
  flags = dict(flags)
  evaluation = evaluation_of(system, objective)
  evaluation.run.config.data.eval_source = flags.pop('source', '')
  assert flags.keys() <= values.keys()
  options = types.SimpleNamespace(**values | flags)
  evaluation = dataclasses.replace(evaluation, options=options)
  with pytest.raises(RequestError) as refusal, evaluation.run.context():
    evals.check_task(task, options, evaluation.run.config)
    evals.run_task(task, evaluation)
  assert words in str(refusal.value), str(refusal.value)
