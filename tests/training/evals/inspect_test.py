"""eval.py --tasks=inspect: what is shown to a model, and what is refused."""

import dataclasses
import json
import re

import numpy as np
import pytest

import archetype
from configs.errors import RequestError
from tests.helpers import evaluations

PROMPT = 'My fellow, my'


def asked(system, objective, folder, tokenizer='bytes', fields=None, **options):
  evaluation = evaluations.make(
      evaluations.config(system, objective, tokenizer, **fields or {}),
      **dict(prompt=PROMPT) | options)
  return dataclasses.replace(evaluation, workdir=folder)


def look(evaluation):
  """Returns the figures, what the page draws, and the page."""
  figures = evaluations.run('inspect', evaluation)
  page = (evaluation.workdir / 'inspect.html').read_text()
  data = re.search(r'id="data">(.*?)</script>', page)[1]
  return figures, json.loads(data), page


def api(evaluation):
  return archetype.Model(evaluation.run.module, evaluation.params)


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  evaluation = asked('gpt', 'causal', tmp_path_factory.mktemp('run'))
  return evaluation, *look(evaluation)


def test_a_decoder_reads_the_prompt_after_the_separator(gpt):
  evaluation, figures, data, _ = gpt
  tokens = [evaluation.tokenizer.separator_id, *PROMPT.encode()]
  assert figures['tokens']['decoder'] == [
      '[EOS]', *PROMPT.replace(' ', '␣')] == data['tokens']['decoder']
  found = api(evaluation).inspect(tokens)
  attention = found.attention['decoder']
  told = figures['attention']['decoder']
  np.testing.assert_allclose(told['entropy'], attention.entropy.mean(-1)[:, 0],
                             atol=1e-4)
  np.testing.assert_allclose(
      told['first token'], attention.first[..., 1:].mean(-1)[:, 0], atol=1e-5)
  np.testing.assert_allclose(told['previous token'], attention.previous[:, 0],
                             atol=1e-5)
  assert 'learned sink' not in told
  np.testing.assert_allclose(figures['stream']['decoder']['norms'],
                             found.stream['decoder'].norms[:, 0], rtol=1e-4)
  top = [[cell[0]['id'] for cell in layer] for layer in figures['lens']]
  assert top == found.lens.ids[:, 0, :, 0].tolist()


def test_the_page_holds_the_maps_to_four_digits(gpt):
  evaluation, figures, data, page = gpt
  import base64
  (drawn,) = data['maps']
  weights = np.frombuffer(base64.b64decode(drawn['weights']), '<u2') / 65535
  tokens = [evaluation.tokenizer.separator_id, *PROMPT.encode()]
  expected = np.asarray(api(evaluation).attention_weights(tokens))[:, 0]
  assert drawn['shape'] == list(expected.shape)
  np.testing.assert_allclose(weights.reshape(expected.shape), expected,
                             atol=1e-5)
  # Nothing is fetched: no address stands in it.
  assert not re.search(r'(src|href)="(?!#)|https?:|@import|url\(', page)


def test_induction_is_that_of_random_tokens_that_come_twice(gpt):
  evaluation, figures, _, _ = gpt
  random, size = np.random.default_rng(0), 15  # max_len is 32
  usual = np.setdiff1d(np.arange(384), [*range(256, 262), *range(284, 384)])
  drawn = [random.choice(usual, size, replace=False) for _ in range(4)]
  rows = [[257 + 1, *row, *row] for row in drawn]
  weights = np.asarray(api(evaluation).attention_weights(rows))
  expected = np.mean([weights[..., 1 + size + i, 2 + i]
                      for i in range(size)], 0).mean(1)
  np.testing.assert_allclose(figures['attention']['decoder']['induction'],
                             expected, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_reads_masks_between_its_marks(tmp_path):
  evaluation = asked('bert', 'mlm', tmp_path, prompt='a [MASK] b')
  figures, data, page = look(evaluation)
  assert figures['tokens'] == {'encoder': [
      '[CLS]', 'a', '␣', '[MASK]', '␣', 'b', '[SEP]']}
  found = api(evaluation).inspect([[260, 97, 32, 259, 32, 98, 261]])
  assert [[c[0]['id'] for c in layer] for layer in figures['lens']] == (
      found.lens.ids[:, 0, :, 0].tolist())
  assert 'induction' not in figures['attention']['encoder']
  assert 'What is predicted is the token itself' in ' '.join(page.split())


def test_what_cannot_be_shown_is_refused(tmp_path):
  with pytest.raises(RequestError, match='33 tokens, and 32 can be shown: '
                     'shorten the prompt'):
    evaluations.run('inspect', asked('gpt', 'causal', tmp_path,
                                     prompt='x' * 32))
  with pytest.raises(RequestError, match='--target is .*a decoder has no'):
    evaluations.run('inspect', asked('gpt', 'causal', tmp_path, target='a'))
