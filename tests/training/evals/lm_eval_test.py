"""The task lm_eval, as far as it goes without lm_eval: what is refused, and the
files that tasks of ours read. `make verify` compares answers with lm_eval's own
backend."""

import contextlib
import importlib.util
import json
import types

import pytest

from configs.errors import RequestError
from training.evals.lm_eval_tasks import local
from tests.helpers import evaluations
from tests.helpers import models
from training import evals
from training.data import tokenizers
from training.evals.tasks import lm_eval

HERE = importlib.util.find_spec('lm_eval') is not None


def _check(name, **options):
  evals.check_without_flags(name, 'TASKS') if not options else evals.task(
      name).check(evaluations.flags(**options))


def test_a_name_says_what_to_evaluate():
  assert evals.task('lm_eval:blimp_files') is evals.TASKS['lm_eval']
  options = evals._options(
      lm_eval.TASKS['lm_eval'], 'lm_eval:blimp_files',
      evaluations.flags(lm_eval='other'))
  assert options.lm_eval == 'blimp_files'
  for name in ('lm_eval:', 'loss:x'):
    with pytest.raises(RequestError, match=f"has {name!r}: write "):
      evals.task(name)
  with pytest.raises(RequestError, match='is told what to evaluate'):
    _check('lm_eval')


@pytest.mark.parametrize('system, objective', [
    ('bert', 'mlm'), ('t5', 'span')])
def test_what_gives_no_probability_to_a_text_is_refused(system, objective):
  c = evaluations.config(system, objective)
  assert f'objective {objective!r}' in lm_eval.TASKS['lm_eval'].unfit(c)
  assert not lm_eval.TASKS['lm_eval'].unfit(evaluations.config('gpt', 'causal'))


@pytest.fixture
def dataset(monkeypatch):
  """Stands in for the package of Hugging Face's datasets."""
  local._documents.cache_clear()
  monkeypatch.setitem(__import__('sys').modules, 'datasets',
                      types.SimpleNamespace(Dataset=types.SimpleNamespace(
                          from_list=list)))


def _write(folder, name, *rows):
  (folder / name).mkdir()
  (folder / name / 'a.jsonl').write_text('\n'.join(
      row if isinstance(row, str) else json.dumps(row) for row in rows))


def test_pairs_are_counted_by_phenomenon(tmp_path, dataset):
  row = dict(sentence_good='He sings.', sentence_bad='He sing.',
             linguistics_term='agreement', pairID='0')
  _write(tmp_path, 'blimp', row)
  doc, = local.blimp(folder=str(tmp_path), version=1.0)['validation']
  assert doc == {name: row[name] for name in list(row)[:3]}
  for bad, right in ((-3.0, 1.0), (-2.0, 0.0), (-1.0, 0.0)):
    assert local.blimp_results(doc, [(-2.0, False), (bad, True)]) == {
        'acc': right, 'acc agreement': right}


def test_a_tokenizer_says_what_hugging_face_puts_before_a_text(tmp_path):
  import tokenizers as library
  pipeline = library.Tokenizer(library.models.WordLevel(
      {'<s>': 0, '</s>': 1, 'a': 2, '?': 3}, '?'))
  pipeline.add_special_tokens(['<s>', '</s>'])
  for template, added in (('$A', ()), ('<s> $A', (0,)), ('$A </s>', ())):
    pipeline.post_processor = library.processors.TemplateProcessing(
        single=template, special_tokens=[('<s>', 0), ('</s>', 1)])
    pipeline.save(str(tmp_path / 'tokenizer.json'))
    loaded = tokenizers.load(str(tmp_path))
    assert loaded.added_ids == added
    assert loaded.encode('a').tolist() == [2]


def _model(workdir, config=None, step=1):
  from training.evals import harness
  module, params = models.make('gpt', vocab_size=384)
  return harness.Model(types.SimpleNamespace(
      run=types.SimpleNamespace(
          config=config or evaluations.config('gpt', 'causal'),
          module=module, model=module.config, context=contextlib.nullcontext),
      tokenizer=tokenizers.load('bytes'), params=params, step=step,
      workdir=workdir))


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_a_text_begins_as_in_the_training_of_the_weights(tmp_path):
  ids = tokenizers.load('bytes').special_ids
  begins = lambda step: _model(tmp_path, step=step).prefix_token_id
  assert ids['bos'] != tokenizers.load('bytes').separator_id
  assert (begins(0), begins(1)) == (
      ids['bos'], tokenizers.load('bytes').separator_id)
  # What was made of a trained run is at step 0, too.
  (tmp_path / 'generation.json').write_text('{"trained": true}')
  assert begins(0) == begins(1)


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_special_tokens_of_a_text_are_obeyed(tmp_path, monkeypatch):
  """As transformers' tokenizers obey them."""
  ids = tokenizers.load('bytes').special_ids
  asked = _model(tmp_path)
  assert asked.tok_encode('a[SEP]b') == [97, ids['sep'], 98]
  assert [row.tolist() for row in asked._encode(['[EOS]', 'a'])] == [
      [ids['eos']], [97]]
  monkeypatch.setattr(asked._tokens, 'special_ids', ids | {'pad': 400})
  with pytest.raises(RequestError, match=r"'a\[PAD\]' has the id 400, which"):
    asked.tok_encode('a[PAD]')


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_a_conversation_is_laid_out_by_the_runs_template(tmp_path):
  file = tmp_path / 'chat.jinja'
  file.write_text('{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}'
                  '[EOS]{% endfor %}{% if add_generation_prompt %}<assistant>'
                  '{% endif %}')
  config = evaluations.config('gpt', 'chat')
  config.data.chat_template = str(file)
  asked = _model(tmp_path, config)
  said = [dict(role='user', content='How [SEP]?')]
  answer = [*said, dict(role='assistant', content='It is ')]
  assert asked.chat_template(True) == file.read_text()
  assert asked.apply_chat_template(said) == '<user>How [SEP]?[EOS]<assistant>'
  assert asked.apply_chat_template(answer, add_generation_prompt=False) == (
      '<user>How [SEP]?[EOS]<assistant>It is')
  file.write_text(file.read_text().replace(' | trim', ''))
  assert _model(tmp_path, config).apply_chat_template(answer, False).endswith(
      '<assistant>It is ')
  with pytest.raises(RequestError, match="by the name 'other': a run has one"):
    asked.chat_template('other')
  with pytest.raises(RequestError, match="its tokenizer 'bytes' has one"):
    _model(tmp_path).apply_chat_template(said)
