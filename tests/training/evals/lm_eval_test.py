"""The task lm_eval, as far as it goes without lm_eval: what is refused, and the
files that tasks of ours read. `make verify` compares answers with lm_eval's own
backend."""

import contextlib
import importlib.util
import json
import types

import jax
import numpy as np
import pytest
import yaml

from configs.errors import RequestError
from training.evals.lm_eval_tasks import local
from tests.helpers import evaluations
from tests.helpers import models
from tools import lm_eval as command
from training import evals
from training import generate
from training.data import tokenizers
from training.evals.tasks import lm_eval

HERE = importlib.util.find_spec('lm_eval') is not None


def _check(name, **options):
  evals.check_without_flags(name, 'TASKS') if not options else evals.task(
      name).check(evaluations.flags(**options))


def test_a_name_says_what_to_evaluate():
  assert evals.task('lm_eval:blimp_files') is evals.TASKS['lm_eval']
  options = evals._options(
      lm_eval.TASK, 'lm_eval:blimp_files', evaluations.flags(lm_eval='other'))
  assert options.lm_eval == 'blimp_files'
  for name in ('lm_eval:', 'loss:x'):
    with pytest.raises(RequestError, match=f"has {name!r}: write "):
      evals.task(name)
  with pytest.raises(RequestError, match='is told what to evaluate'):
    _check('lm_eval')


def test_names_after_one_of_lm_eval_are_of_lm_eval():
  """Unless they are tasks of our own."""
  for text, tasks in {
      'loss': ['loss'],
      'lm_eval:a, b,c': ['lm_eval:a', 'lm_eval:b', 'lm_eval:c'],
      'loss,lm_eval:a': ['loss', 'lm_eval:a'],
      'lm_eval:a,loss,samples': ['lm_eval:a', 'loss', 'samples'],
      'lm_eval:a,lm_eval:b,c,lm_eval': ['lm_eval:a', 'lm_eval:b', 'lm_eval:c',
                                        'lm_eval'],
      'lm_eval:a,loss,b': ['lm_eval:a', 'loss', 'b']}.items():
    assert evals.listed(text) == evals.listed(text.split(',')) == tasks
    assert evals.listed(tasks) == tasks


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_a_standard_error_is_computed_without_forks(monkeypatch):
  from lm_eval.api import metrics
  monkeypatch.setenv('DISABLE_MULTIPROC', '')
  monkeypatch.setattr('multiprocessing.Pool', None)
  with lm_eval._told(['cloze_files']):
    error = metrics.bootstrap_stderr(metrics.mean, [1., 2., 3., 4.], 400)
  # Of the mean of four draws from these: their deviation of sqrt(5/4), over 2.
  assert error == pytest.approx(0.559, rel=0.15)


@pytest.mark.skipif(HERE, reason='lm_eval is here')
def test_without_the_package_there_is_a_sentence():
  with pytest.raises(RequestError, match=r"pip install -e '.\[lm-eval\]'"):
    _check('lm_eval:blimp_files')


@pytest.mark.parametrize('system, objective', [
    ('bert', 'mlm'), ('t5', 'span')])
def test_what_gives_no_probability_to_a_text_is_refused(system, objective):
  c = evaluations.config(system, objective)
  assert f'objective {objective!r}' in lm_eval.TASK.unfit(c)
  assert not lm_eval.TASK.unfit(evaluations.config('gpt', 'causal'))


def test_figures_are_called_as_lm_eval_calls_them():
  figures, errors = lm_eval._plain({
      'acc,none': 0.5, 'acc_stderr,none': 0.1, 'alias': 'x', 'n': 3,
      'exact_match,strict-match': 0.25,
      'exact_match_stderr,strict-match': 0.2})
  assert figures == {'acc': 0.5, 'exact_match (strict-match)': 0.25}
  assert errors == {'acc': 0.1, 'exact_match (strict-match)': 0.2}


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


def test_the_last_word_is_asked_for_in_bits_per_byte(tmp_path, dataset):
  _write(tmp_path, 'cloze', dict(text='He drank the café'))
  doc, = local.cloze(folder=str(tmp_path))['validation']
  assert local.cloze_results(doc, [(-3.0, True)]) == {
      'acc': 1.0, 'perplexity': -3.0, 'bits_per_byte': (-3.0, 6)}


@pytest.mark.parametrize('rows, sentence', [
    ((), 'none is named: pass --lm_eval_data=DIR, or set ARCHETYPE_DATA'),
    (('{',), 'a.jsonl, line 1, is broken JSON'),
    (({'text': 'a b'}, {'text': 3}), "line 2, has no text 'text'"),
    (({'text': 'alone '},), 'line 1, has one word alone')])
def test_wrong_files_are_named(tmp_path, monkeypatch, dataset, rows, sentence):
  monkeypatch.delenv('ARCHETYPE_DATA', raising=False)
  if rows:
    _write(tmp_path, 'cloze', *rows)
  with pytest.raises(RequestError, match=sentence):
    local.cloze(folder=str(tmp_path) if rows else '')


def test_a_folder_without_the_files_is_named(tmp_path, dataset):
  with pytest.raises(RequestError, match='blimp holds no .*jsonl'):
    local.blimp(folder=str(tmp_path))


def test_task_files_name_functions_that_are_there():
  yaml.SafeLoader.add_constructor(
      '!function', lambda loader, node: getattr(
          local, node.value.removeprefix('local.')))
  for file in lm_eval.OWN.glob('*.yaml'):
    task = yaml.load(file.read_text(), yaml.SafeLoader)
    assert task['task'] == file.stem
    assert callable(task['custom_dataset']) and callable(
        task['process_results'])
  assert len(list(lm_eval.OWN.glob('*.yaml'))) == 2


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


def _writing(monkeypatch, workdir):
  """Returns what asks a small model to write after each (context, options), in
  small batches."""
  from lm_eval.api.instance import Instance
  from training.evals import harness
  monkeypatch.setattr(harness, 'TOKENS', 32)
  asked = _model(workdir)
  return lambda requests: asked.generate_until(
      [Instance('generate_until', {}, request, i)
       for i, request in enumerate(requests)])


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_draws_of_one_context_repeat_in_no_batch_group_or_call(
    monkeypatch, tmp_path):
  ask = _writing(monkeypatch, tmp_path)
  options = dict(until=[], do_sample=True, temperature=2.0, max_gen_toks=12)
  groups = [('ab', options | dict(top_k=k)) for k in (300, 301)]
  texts = ask([group for group in groups for _ in range(6)]) + ask(groups)
  assert len(set(texts)) == len(texts) == 14


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_a_greedy_text_is_penalized_too(monkeypatch, tmp_path):
  ask = _writing(monkeypatch, tmp_path)
  options = dict(until=[], max_gen_toks=12)
  without, penalized = ask([('ab', options), (
      'ab', options | dict(repetition_penalty=1e6))])
  module, params = models.make('gpt', vocab_size=384)
  bytes_ = tokenizers.load('bytes')
  for text, penalty in ((without, 1.0), (penalized, 1e6)):
    expected = generate.generate(
        module, params, bytes_.encode('ab')[None], np.array([2]),
        jax.random.key(1), max_new_tokens=12, sampling=generate.Sampling(
            temperature=0, repetition_penalty=penalty))[0]
    assert text == bytes_.decode(generate.until(
        np.asarray(expected), bytes_.eos_id))
  assert without != penalized


def _script(monkeypatch, *tokens):
  """Lets the model write these tokens, up to the first that ends a text."""
  def written(*args, max_new_tokens, stop_token, **options):
    row = list(tokens[:max_new_tokens])
    ends = [n for n, token in enumerate(row) if token in stop_token]
    kept = row[:ends[0] + 1] if ends else row
    return np.array([kept + [stop_token[0]] * (max_new_tokens - len(kept))])
  monkeypatch.setattr(generate, 'generate', written)


@pytest.mark.skipif(not HERE, reason='lm_eval is not installed')
def test_a_special_token_ends_a_text_by_its_name_or_as_the_folder_says(
    monkeypatch, tmp_path):
  sep = tokenizers.load('bytes').sep_id
  _script(monkeypatch, *b'ab', sep, *b'cd')
  until = lambda *stops: ('x', dict(until=list(stops), max_gen_toks=5))
  ask = _writing(monkeypatch, tmp_path)
  assert ask([until()]) == ['abcd']
  assert ask([until('[SEP]')]) == ['ab']
  assert ask([until('c')]) == ['ab']
  (tmp_path / 'generation.json').write_text(json.dumps(
      {'fields': {'eos_token_id': 3}, 'options': {'eos_token_id': [257, sep]},
       'bare': False}))
  assert _writing(monkeypatch, tmp_path)([until()]) == ['ab']


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


def test_its_command_line_gets_what_it_does_not_say():
  told = {'--model_args', '-t'}
  assert command._defaults(told) == [
      '--model', 'archetype', '--include_path', str(lm_eval.OWN)]
  assert not command._defaults({*told, '-M', '--include_path'})
  assert not command._defaults({'--config'})
  for missing in told:
    with pytest.raises(RequestError, match='pass --'):
      command._defaults(told - {missing})
