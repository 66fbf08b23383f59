"""--beams of eval.py: the texts are those of training/generate.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import evaluations
from training import evals, generate


@pytest.mark.long
@pytest.mark.slow
def test_samples_are_the_best_texts_of_each_prompt():
  evaluation = evaluations.make(
      evaluations.config('gpt', 'causal'), prompt='a|||bcd', beams=3, samples=2,
      max_new_tokens=4, length_penalty=1.0, penalty='power')
  found = evaluations.run('samples', evaluation)['samples']
  assert [row['prompt'] for row in found] == ['a', 'a', 'bcd', 'bcd']
  end, tokenizer = evaluation.tokenizer.separator_id, evaluation.tokenizer
  expected = []
  for text in (b'a', b'bcd'):  # each by itself, without padding
    row = jnp.array([[end, *text]])
    tokens, _ = generate.beam_search(
        evaluation.run.module, evaluation.params, row, jnp.array([len(row[0])]),
        max_new_tokens=4, stop_token=end, beams=generate.Beams(3, 1.0, 'power'))
    expected += [tokenizer.decode(generate.until(np.asarray(ids), end))
                 for ids in tokens[0, :2]]
  assert [row['text'] for row in found] == expected


@pytest.mark.parametrize('task, options, said', [
    ('samples', dict(beams=2, temperature=0.5), 'leave out the flags'),
    ('samples', dict(beams=2, top_k=3), 'leave out the flags'),
    ('samples', dict(beams=2, sample_seed=3), 'leave out the flags'),
    ('samples', dict(beams=2, samples=3), '--samples is 3.*--beams=2'),
    ('samples', dict(penalty='none'), "penalty.*'none'.*gnmt"),
    ('samples', dict(penalty='power'), "--penalty is 'power', .* --beams"),
    ('exact', dict(length_penalty=1.0), '--length_penalty is 1.0, .* --beams'),
    ('exact', dict(early_stopping=True), '--early_stopping is True, .*--beams'),
    ('exact', dict(beams=2, length_penalty=99.0), 'length_penalty is 99.0')])
def test_what_cannot_be_searched_is_refused(task, options, said):
  with pytest.raises(RequestError, match=said):
    evals.TASKS[task].check(evaluations.flags(**options))
  evals.TASKS[task].check(evaluations.flags(beams=2, temperature=0.0))
