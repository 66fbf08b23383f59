"""--beams of eval.py: the texts are those of training/beam.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import evaluations
from training import beam
from training import evals
from training import generate
from training.data import pipeline
from training.evals.tasks import exact


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
    tokens, _ = beam.search(
        evaluation.run.module, evaluation.params, row, jnp.array([len(row[0])]),
        max_new_tokens=4, stop_token=end, beams=beam.Beams(3, 1.0, 'power'))
    expected += [tokenizer.decode(generate.until(np.asarray(ids), end))
                 for ids in tokens[0, :2]]
  assert [row['text'] for row in found] == expected


@pytest.mark.long
def test_targets_are_the_best_texts_of_their_sources(tmp_path):
  lines = [f'{"ab" * (i % 5 + 1)}\tb{i}' for i in range(40)]
  (tmp_path / 'pairs.tsv').write_text('\n'.join(lines))
  c = evaluations.config('t5', 'seq2seq')
  c.data.update(source=f'parallel:{tmp_path}/pairs.tsv', target_length=8,
                length=16, holdout_every=4)
  evaluation = evaluations.make(c, beams=3, length_penalty=0.6)
  (loader,) = pipeline.held_out(c, evaluation.tokenizer)
  batch = next(iter(loader.iterate(0, 1)))
  found = exact.translate(evaluation.run.module, evaluation.params, batch,
                          evaluation.tokenizer, beam.Beams(3))
  lengths = batch['segment_ids'].sum(1)
  for i, (text, _, _) in enumerate(found):
    tokens, _ = jax.device_get(beam.search(
        evaluation.run.module, evaluation.params,
        jnp.array([[evaluation.tokenizer.pad_id]]), jnp.ones(1, int),
        max_new_tokens=8, stop_token=evaluation.tokenizer.separator_id,
        beams=beam.Beams(3), source_BM=jnp.asarray(batch['tokens'][i:i + 1]),
        source_lengths_B=jnp.asarray(lengths[i:i + 1])))
    assert text == evaluation.tokenizer.decode(generate.until(
        tokens[0, 0], evaluation.tokenizer.separator_id))
  every = evaluations.run('exact', evaluation)
  assert every['targets'] == 10 and 0 <= every['exact'] <= 1


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


def test_more_tokens_than_a_model_has_places_for_are_refused_at_once():
  """4 bytes after a separator, and 60 more, fill 65 places of 65."""
  config = evaluations.config('gpt', 'causal', max_len=65)
  fits = lambda **more: evals.check_task('samples', evaluations.flags(
      prompt='a|||four', **more), config, None)
  fits(max_new_tokens=60)
  with pytest.raises(RequestError, match=(
      '--max_new_tokens is 61, the prompt has 5 tokens .* 65 positions')):
    fits(max_new_tokens=61)
  config.model.position = 'rope'
  fits(max_new_tokens=61)
