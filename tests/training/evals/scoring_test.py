"""Log-probabilities of tokens, against the softmax of each text alone;
perplexity with a stride, against a loop over the tokens; and lm_eval, as far as
it goes without lm_eval: `make verify` compares answers with its own backend."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import types

import jax
import numpy as np
import pytest

from common.errors import RequestError
from tests.helpers import evaluations, models
from training import evals, objectives, runs
from training.data import tokenizers
from training.evals import items, scoring
from training.evals.lm_eval_tasks import local
from training.evals.scoring import Continuation
from training.evals.tasks import lm_eval

SMALL = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=0, d_ff=24,
             head_dim=0, max_len=12)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec('lm_eval') is None,
    reason='lm_eval is not installed')


def _questions(seed=1, count=14, most=12):
  """Some share their first tokens, some are the beginning of others."""
  rng = np.random.default_rng(seed)
  stem = rng.integers(0, 256, most + 1)
  questions = []
  for i in range(count):
    ids = rng.integers(0, 256, int(rng.integers(2, most + 2)))
    if i % 3:
      shared = int(rng.integers(1, len(ids)))
      ids[:shared] = stem[:shared]
    num_scored = int(rng.integers(1, len(ids)))
    questions.append(Continuation(ids.astype(np.int32), num_scored))
  # Two of one text, of which other numbers of tokens are known.
  return [*questions, questions[-1]._replace(num_scored=1)]


def _alone(evaluation, questions, prefix):
  """The same by a softmax over the vocabulary at every place of every text."""
  tokens_BL = np.zeros((len(questions), SMALL['max_len']), np.int32)
  for row, question in zip(tokens_BL, questions):
    row[:len(question.tokens) - 1] = question.tokens[:-1]
  known_B = np.array([len(q.tokens) - q.num_scored for q in questions])
  logits_BLV = np.asarray(jax.jit(lambda params: models.logits(
      evaluation.run.module, params, tokens_BL,
      **dict(prefix_B=known_B) if prefix else {}))(evaluation.params))
  for question, logits_LV in zip(questions, logits_BLV):
    targets = question.tokens[1:]
    logits_LV = logits_LV[:len(targets)]
    log_p = (logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True)))[
        np.arange(len(targets)), targets]
    greedy = np.argmax(logits_LV, -1) == targets
    yield log_p[-question.num_scored:], greedy[-question.num_scored:]


def _answers(evaluation, questions):
  with evaluation.run.context():
    return scoring.score_continuations(questions, evaluation, 'scoring')


@pytest.mark.slow
@pytest.mark.parametrize('system, objective', [
    ('gpt', 'causal'), ('llama', 'prefix'),
    pytest.param('mixtral', 'causal', marks=pytest.mark.long)])
def test_each_answer_is_that_of_its_text_alone(system, objective):
  """Of a prefix LM the tokens that are known see each other; of experts with a
  capacity none takes another text's room."""
  moe = dict(moe=dict(
      num_experts=4, d_ff=24, dispatch='sorted', capacity_factor=0.5,
      eval_capacity_factor=0.5)) if system == 'mixtral' else {}
  # In one layer, a token after the prefix sees the same with and without it.
  evaluation = evaluations.make_evaluation(evaluations.make_config(
      system, objective, **SMALL | dict(num_layers=2), **moe))
  questions = _questions()
  answers = _answers(evaluation, questions)
  if system == 'mixtral':  # whose own forward pass drops tokens
    evaluation = evaluations.make_evaluation(evaluations.make_config(
        system, objective, **SMALL | dict(num_layers=2),
        moe=dict(num_experts=4, d_ff=24)))
  for answer, (log_p, greedy) in zip(answers, _alone(
      evaluation, questions, objective == 'prefix'), strict=True):
    np.testing.assert_allclose(answer.log_probs, log_p, atol=2e-5)
    np.testing.assert_array_equal(answer.is_greedy, greedy)


@pytest.mark.slow
def test_several_devices_answer_as_one():
  """Whose rows are cut over data and fsdp, and the vocabulary over tensor."""
  c = evaluations.make_config('gpt', 'causal', **SMALL)
  one = evaluations.make_evaluation(c)
  c.mesh.update(fsdp=2, tensor=2)
  run = runs.build(c, one.run.model)
  assert run.mesh.size == 8
  several = dataclasses.replace(
      one, run=run, programs={}, params=jax.device_put(
          jax.device_get(one.params), run.shardings.params))
  questions = _questions()
  for ours, theirs in zip(*(
      _answers(each, questions) for each in (several, one)), strict=True):
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
    np.testing.assert_array_equal(ours.is_greedy, theirs.is_greedy)


@pytest.mark.parametrize('shards', [1, 3])
def test_few_shapes_are_compiled_whatever_the_lengths(shards):
  questions = _questions(count=900, most=200)
  questions += [Continuation(np.append(q.tokens[:-1], np.int32(7)), 1)
                for q in questions]
  batches = list(scoring.group_into_batches(questions, 200, shards))
  assert sorted(i for _, rows in batches for row in rows for i in row) == list(
      range(len(questions)))
  for shape, rows in batches:
    assert shape.rows % shards == shape.places % shards == 0
    most_rows = scoring.TOKENS_OF_BATCH // shape.length + shards
    assert len(rows) <= shape.rows <= most_rows
    places = [questions[i].num_scored for row in rows for i in row]
    assert sum(places) <= shape.places
    for row in rows:  # of questions about one text
      assert len(row) > 1 and len({
          questions[i].tokens[:-1].tobytes() for i in row}) == 1
  assert len({shape for shape, _ in batches}) < 12
  for length in range(1, 41):  # of the lengths the least that is as long
    assert scoring.padded_length(length, 40) == min(
        x for x in (8, 12, 16, 24, 32, 40) if x >= length)


TEXT = 'What is sown is reaped ,\n and what is not is not .\n' * 2


@pytest.mark.slow
@pytest.mark.parametrize('stride', models.mark_long_except((5,), (5, 15)))
def test_each_token_is_predicted_once_from_enough(tmp_path, stride):
  """Ten lines that read the documents a token at a time."""
  texts = [TEXT, 'Ä short one']
  for name, text in zip('ab', texts):
    (tmp_path / f'{name}.txt').write_text(text)
  c = evaluations.make_config('gpt', 'causal', max_len=16, num_layers=1)
  c.data.eval_source = f'text:{tmp_path}/*.txt'
  evaluation = evaluations.make_evaluation(c, stride=stride)
  figures = evaluations.run_and_check_task('loss', evaluation)
  length = c.data.length
  first, contexts, targets = evaluation.tokenizer.separator_id, [], []
  for text in texts:
    ids = [first, *text.encode()]
    for i in range(1, len(ids)):
      # The first window that reaches the token.
      start = max(0, math.ceil((i + 1 - length) / stride)) * stride
      assert i - start >= min(length - stride, i)
      contexts.append(ids[start:i])
      targets.append(ids[i])
  tokens_BL, lengths_B = objectives.pad_prompts(contexts)
  logits_BLV = np.asarray(jax.jit(lambda params: models.logits(
      evaluation.run.module, params, tokens_BL))(evaluation.params))
  rows = np.arange(len(targets))
  last_BV = jax.nn.log_softmax(logits_BLV[rows, lengths_B - 1])
  nats, count = -float(last_BV[rows, targets].sum()), len(targets)
  words = 13 * 2 + 4 + 3  # of the lines, their ends, and the short one
  assert (figures['tokens'], figures['words']) == (count, words)
  assert figures['loss'] == pytest.approx(nats / count, rel=1e-5)
  assert figures['word_perplexity'] == pytest.approx(
      math.exp(nats / words), rel=1e-4)
  assert figures['bits_per_byte'] == pytest.approx(
      nats / math.log(2) / count, rel=1e-5)


def test_a_name_says_what_to_evaluate():
  assert evals.get_task('lm_eval:blimp_files') is evals.TASKS['lm_eval']
  for name in ('lm_eval:', 'loss:x'):
    with pytest.raises(RequestError, match=f"has {name!r}: write "):
      evals.get_task(name)
  with pytest.raises(RequestError, match='is told what to evaluate'):
    evals.check_task_without_flags('lm_eval', 'TASKS')
  for system, objective in (('bert', 'mlm'), ('t5', 'span')):
    assert f'objective {objective!r}' in lm_eval.TASKS['lm_eval'].why_unfit(
        evaluations.make_config(system, objective))


def test_pairs_are_counted_by_phenomenon(tmp_path, monkeypatch):
  """Without the package of Hugging Face's datasets."""
  local._load_documents.cache_clear()
  monkeypatch.setitem(__import__('sys').modules, 'datasets',
                      types.SimpleNamespace(Dataset=types.SimpleNamespace(
                          from_list=list)))
  row = dict(sentence_good='He sings.', sentence_bad='He sing.',
             linguistics_term='agreement', pairID='0')
  (tmp_path / 'blimp').mkdir()
  (tmp_path / 'blimp/a.jsonl').write_text(json.dumps(row))
  doc, = local.blimp(folder=str(tmp_path), version=1.0)['validation']
  assert doc == {name: row[name] for name in list(row)[:3]}
  for bad, right in ((-3.0, 1.0), (-2.0, 0.0), (-1.0, 0.0)):
    assert local.blimp_results(doc, [(-2.0, False), (bad, True)]) == {
        'acc': right, 'acc agreement': right}


def _model(workdir, config=None, step=1, **arguments):
  from training.evals import harness
  module, params = models.make_model('gpt', vocab_size=384)
  return harness.Model(evals.Evaluation(
      types.SimpleNamespace(
          config=config or evaluations.make_config('gpt', 'causal'),
          module=module, model=module.config, context=contextlib.nullcontext),
      params, step, tokenizers.load('bytes'), None, workdir, {}), **arguments)


@needs_lm_eval
def test_what_lm_eval_refuses_is_a_sentence_and_a_fault_of_ours_is_none():
  from lm_eval import tasks
  with pytest.raises(RequestError, match='lm_eval refuses it: .*no_such'):
    with lm_eval.report_failures('it'):
      tasks.TaskManager(include_defaults=False).load(['no_such'])
  with pytest.raises(TypeError), lm_eval.report_failures('it'):
    scoring.why_not_scorable()


def test_the_scores_of_a_figure_of_lm_eval_are_those_of_its_filter():
  scores = {'strict': [0, 1], 'loose': [1, 1]}
  samples = [dict(filter=name, doc_hash=str(i), exact=score)
             for name, values in scores.items()
             for i, score in enumerate(values)]
  records = items.record_lm_eval_samples(
      {'exact,strict': 0.5, 'exact,loose': 1.0, 'exact_stderr,loose': 0.0},
      samples)
  assert {name: record['scores'] for name, record in records.items()} == {
      f'exact ({name})': values for name, values in scores.items()}


@needs_lm_eval
def test_each_item_of_lm_eval_has_its_score(tmp_path):
  """Also of a task whose perplexity is no mean of its items."""
  for name, rows in (
      ('blimp', [dict(sentence_good=f'{x} b', sentence_bad=f'{x} c',
                      linguistics_term='xy'[i % 2])
                 for i, x in enumerate('defg')]),
      ('cloze', [dict(text='a b'), dict(text='c d')])):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  evaluation = evaluations.make_evaluation(
      evaluations.make_config('gpt', 'causal', num_layers=1),
      lm_eval_data=str(tmp_path))
  figures = evaluations.run_and_check_task('lm_eval:blimp_files', evaluation)
  items = figures['items']['acc']
  assert len(items['scores']) == figures['examples']['blimp_files'] == 4
  assert {*items['scores']} <= {0, 1}
  again = evaluations.run_and_check_task('lm_eval:cloze_files',
                                         evaluation)['items']
  assert again.keys() == {'acc'} and len(again['acc']['scores']) == 2


@needs_lm_eval
def test_a_text_begins_as_in_the_training_of_the_weights(tmp_path, monkeypatch):
  ids = tokenizers.load('bytes').special_ids
  begins = lambda step: _model(tmp_path, step=step).prefix_token_id
  assert ids['bos'] != tokenizers.load('bytes').separator_id
  assert (begins(0), begins(1)) == (
      ids['bos'], tokenizers.load('bytes').separator_id)
  # What was made of a trained run is at step 0, too.
  (tmp_path / 'generation.json').write_text('{"trained": true}')
  assert begins(0) == begins(1)
  # Special tokens of a text are obeyed, as transformers' tokenizers do.
  asked = _model(tmp_path)
  assert asked.tok_encode('a[SEP]b') == [97, ids['sep'], 98]
  assert asked.tok_encode('[EOS]') == [ids['eos']]
  assert asked.max_length == asked.evaluation.run.model.max_len
  # It is shown as many tokens as the model takes, or fewer.
  for length in (1, asked.max_length):
    assert _model(tmp_path, max_length=length).max_length == length
  for length in (0, -1, asked.max_length + 1):
    with pytest.raises(RequestError, match=f'max_length is {length}: the mod'):
      _model(tmp_path, max_length=length)
  # A token that is put before a text is not put before one that has it.
  framed = _model(tmp_path, add_bos_token=True, prefix_token_id=ids['bos'])
  for text in ('a', '[BOS]a'):
    assert framed.tok_encode(text) == [ids['bos'], 97]
  monkeypatch.setitem(asked._tokenizer.id_of_added_text, '[PAD]', 400)
  with pytest.raises(RequestError, match=r"'a\[PAD\]' has the id 400, which"):
    asked.tok_encode('a[PAD]')


@needs_lm_eval
def test_a_long_context_counts_as_far_as_it_fits_and_each_batch_is_drawn(
    tmp_path):
  from training.evals import harness
  evaluation = evaluations.make_evaluation(evaluations.make_config(
      'gpt', 'causal', **SMALL), tmp_path)
  asked = harness.Model(evaluation)
  questions = _questions(most=40)
  requests = []
  for tokens, num_scored in questions:
    num_scored = min(num_scored, SMALL['max_len'])
    requests.append((('', 'it'), tokens[:-num_scored], tokens[-num_scored:]))
  fitting = [Continuation(np.append(before, scored)[-SMALL['max_len'] - 1:],
                          len(scored)) for _, before, scored in requests]
  for answer, (log_p, greedy) in zip(asked._loglikelihood_tokens(requests),
                                     _alone(evaluation, fitting, False)):
    assert answer == (pytest.approx(log_p.sum(), abs=1e-4), greedy.all())
  drawn = types.SimpleNamespace(args=('a', dict(
      until=[], max_gen_toks=8, do_sample=True, temperature=1.0)))
  assert asked.generate_until([drawn]) != asked.generate_until([drawn])


@needs_lm_eval
def test_a_conversation_is_laid_out_by_the_runs_template(tmp_path):
  file = tmp_path / 'chat.jinja'
  file.write_text('{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}'
                  '[EOS]{% endfor %}{% if add_generation_prompt %}<assistant>'
                  '{% endif %}')
  config = evaluations.make_config('gpt', 'chat')
  config.data.chat_template = str(file)
  asked = _model(tmp_path, config)
  question = [dict(role='user', content='How [SEP]?')]
  answer = [*question, dict(role='assistant', content='It is ')]
  assert asked.chat_template(True) == file.read_text()
  assert asked.apply_chat_template(question) == (
      '<user>How [SEP]?[EOS]<assistant>')
  assert asked.apply_chat_template(answer, add_generation_prompt=False) == (
      '<user>How [SEP]?[EOS]<assistant>It is')
  file.write_text(file.read_text().replace(' | trim', ''))
  assert _model(tmp_path, config).apply_chat_template(answer, False).endswith(
      '<assistant>It is ')
