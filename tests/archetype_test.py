"""The Python API: what it gives is what the module computes."""

import dataclasses
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archetype
from common.errors import RequestError
from tests.helpers import data_files, evaluations, models
from tools import convert
from training import objectives
from training.data import tokenizers
from training.evals.tasks import labels as labels_task
from training.hf import generation as hf_generation, weights


def _model(system='gpt', **changes):
  module, params = models.make_model(system, **changes)
  return archetype.Model(module, params)


@pytest.fixture(scope='module')
def gpt():
  return _model()


def test_logits_are_the_modules(gpt):
  tokens_BL = models.random_tokens(2, 7)
  np.testing.assert_allclose(
      gpt(tokens_BL), models.logits(gpt.module, gpt.params, tokens_BL),
      atol=1e-6)
  np.testing.assert_array_equal(gpt(list(range(5))), gpt([list(range(5))]))


def test_the_last_hidden_state_leads_to_the_logits(gpt):
  """By the final norm and the tied table, written out in numpy."""
  tokens_BL = models.random_tokens(2, 7)
  states = np.asarray(gpt.hidden_states(tokens_BL), np.float64)
  assert states.shape == (3, 2, 7, 32)
  norm = gpt.params['decoder']['final_norm']
  x = states[-1]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + gpt.config.norm_eps)
  x = x * np.asarray(norm['scale']) + np.asarray(norm['bias'])
  logits = x @ np.asarray(gpt.params['embed']['tokens'], np.float64).T
  np.testing.assert_allclose(gpt(tokens_BL), logits, atol=1e-4)


def test_padding_changes_nothing(gpt):
  short_1L, long_1L = models.random_tokens(1, 5), models.random_tokens(1, 9)
  long_1L = long_1L.at[:, :5].set(short_1L)
  mask = [[1] * 5 + [0] * 4]
  np.testing.assert_allclose(gpt(long_1L, mask=mask)[:, :5], gpt(short_1L),
                             atol=1e-5)
  weights = gpt.attention_weights(long_1L, mask=mask)
  np.testing.assert_allclose(weights[..., :5, :5],
                             gpt.attention_weights(short_1L), atol=1e-6)


@pytest.mark.slow
def test_a_folder_and_a_run_are_loaded_as_they_were_saved(tmp_path):
  model = _model('gpt')
  tokens_BL = models.random_tokens(2, 6)
  model.save(tmp_path / 'hf')
  folder = archetype.load(tmp_path / 'hf')
  np.testing.assert_allclose(folder(tokens_BL), model(tokens_BL), atol=1e-5)
  assert folder.tokenizer is None
  convert.import_model(
      tmp_path / 'hf', epath.Path(tmp_path / 'run'), partial=False,
      seed=0)
  run = archetype.load(tmp_path / 'run')
  assert jax.tree.all(jax.tree.map(
      lambda a, b: bool((a == b).all()), folder.params, run.params))
  assert run.run.model.arch == run.config.arch == model.config.arch
  assert run.decode(run.encode('ab')) == 'ab'
  assert archetype.build(run.run).config == run.config


def test_a_folder_is_saved_with_its_labels_and_what_it_says(tmp_path):
  module, params = models.make_model('bert', head='sequence', num_labels=3)
  generation = hf_generation.Generation(
      dict(pad_token_id=5), dict(eos_token_id=[7, 9], temperature=0.6))
  weights.to_hf(module, params, tmp_path / 'one', generation=generation,
                labels=('neg', 'neu', 'pos'))
  archetype.load(tmp_path / 'one').save(tmp_path / 'two')
  one, two = ({file.name: json.loads(file.read_text())
               for file in (tmp_path / name).glob('*.json')}
              for name in ('one', 'two'))
  assert one == two and two['config.json']['pad_token_id'] == 5
  assert two['config.json']['id2label']['2'] == 'pos'
  assert two['generation_config.json']['eos_token_id'] == [7, 9]


@pytest.mark.slow
def test_a_part_is_swapped_and_the_rest_stays(gpt):
  assert gpt.with_parts(norm='layernorm').drawn == ()
  gated = gpt.with_parts(ffn='swiglu', seed=3)
  assert gated.drawn == ('decoder/layers/block_0/ffn/gate',
                         'decoder/layers/block_0/ffn/gate_bias')
  old, new = (m.params['decoder']['layers']['block_0'] for m in (gpt, gated))
  np.testing.assert_array_equal(new['ffn']['up'], old['ffn']['up'])
  again = gpt.with_parts(ffn='swiglu', seed=4).params['decoder']['layers']
  assert (again['block_0']['ffn']['gate'] != new['ffn']['gate']).any()
  fewer = gpt.with_parts(position='none', num_kv_heads=2)
  assert 'positions' not in fewer.params['embed']
  assert gpt.with_parts(num_layers=1).config.num_decoder_layers == 1
  assert 'decoder/layers/block_0/attention/key' in fewer.drawn


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_logits():
  model = archetype.build('configs/gpt.py:tiny', num_layers=1)
  text = model.generate('Peace', max_new_tokens=3, temperature=0)
  row = [model.tokenizer.separator_id, *model.tokenizer.encode('Peace'),
         0, 0, 0]
  for i in (-3, -2, -1):  # of what comes after it a token sees nothing
    row[i] = int(np.argmax(model(row)[0, i - 1]))
  assert text == model.decode(row[-3:])
  options = dict(max_new_tokens=3, temperature=0)
  assert model.generate(['Peace'], **options) == [text]
  assert text and model.generate('Peace', stop=text + '!', **options) == text


def test_count_is_what_there_is(gpt):
  figures = gpt.count()
  assert figures['parameters'] == sum(
      x.size for x in jax.tree.leaves(gpt.params))
  assert sum(figures['by_part'].values()) == figures['parameters']


def _bytes(model):
  return dataclasses.replace(
      model, tokenizer=archetype.tokenizers.load('bytes'))


REFUSALS = {
    'part': (lambda m: m.with_parts(norm='rmsnrom'), "'rmsnorm'"),
    'type': (lambda m: m.with_parts(norm=3), 'norm is 3'),
    'size': (lambda m: m.with_parts(d_model=64), 'build a model'),
    'id': (lambda m: m([[3, 61]]), 'has the id 61, .* are 0 to 60'),
    'id that is cut off': (lambda m: m(np.array([2**32 + 5])),
                           'has the id 4294967301, '),
    'fraction': (lambda m: m([1.7]), 'tokens has numbers of float64'),
    'padding at the start': (lambda m: m([[1, 1], [3, 4]],
                                         mask=[[1, 0], [0, 1]]),
                             'mask has a 0 before a 1: '),
    'no text': (lambda m: _bytes(m).generate('\ud800'), 'the prompt is not'),
    'no prompt': (lambda m: _bytes(m).generate([]), 'prompts is empty: pass'),
    'a stop of nothing': (lambda m: _bytes(m).generate('A', stop=['x', '']),
                          'stop is .*every text begins'),
    'no tokenizer': (
        lambda m: dataclasses.replace(m, tokenizer=None).generate('A'),
        'came without a tokenizer: load it with'),
    'encoder': (lambda m: _bytes(_model('bert')).generate('A'),
                'writes no text'),
    'no model': (lambda m: archetype.load('no/such/folder'), 'no/such/folder'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_a_wrong_request_is_a_sentence(name, gpt):
  call, part = REFUSALS[name]
  with pytest.raises(RequestError, match='(?s).*' + part):
    call(gpt)


def test_ids_and_masks_that_are_traced_go_through(gpt):
  ids, mask = models.random_tokens(1, 5), jnp.array([[1, 1, 1, 1, 0]])
  traced = jax.jit(lambda ids, mask: gpt.hidden_states(ids, mask=mask))(
      ids, mask)
  np.testing.assert_allclose(traced, gpt.hidden_states(ids, mask=mask),
                             atol=1e-5)


def _tagger(objective, tmp_path, **data):
  """Returns a small BERT with the head of a task, whose rows have 64 tokens."""
  sources = data_files.write_sources_with_and_without_labels(tmp_path)
  source, bare = sources[objective]
  c = evaluations.make_config('bert', objective, num_layers=1, max_len=64)
  c.data.update(dict(source=source, eval_source=bare, length=64) | data)
  return archetype.build(objectives.fill_in_labels(c), seed=1)


def test_a_classifier_reads_a_text_between_cls_and_sep(tmp_path):
  """Whatever stands beside it; the types tell the second text from the first.
  """
  model = _tagger('classification', tmp_path)
  cls, sep = model.tokenizer.cls_id, model.tokenizer.sep_id
  a, b = (model.tokenizer.encode(text) for text in ('one text', 'b'))
  rows = [([cls, *a, sep], [0] * 10), ([cls, *b, sep], [0] * 3),
          ([cls, *a, sep, *b, sep], [0] * 10 + [1] * 2)]
  predictions = model.predict(['one text', 'b', ('one text', 'b')])
  for (tokens, types), prediction in zip(rows, predictions, strict=True):
    scores = model.module.apply(
        {'params': model.params}, jnp.array([tokens]),
        type_ids_BL=jnp.array([types])).extra['scores'][0]
    assert list(prediction.probabilities) == ['0', '1', '2']
    np.testing.assert_allclose([*prediction.probabilities.values()],
                               jax.nn.softmax(scores), rtol=1e-5)
    assert prediction.label == str(int(scores.argmax()))
  assert model.predict('b').label == predictions[1].label
  named = dataclasses.replace(model, run=None, labels=('x', 'y', 'z'))
  assert [*named.predict('b').probabilities] == ['x', 'y', 'z']


@pytest.mark.parametrize('objective', [
    'regression', 'token_classification', 'question_answering'])
def test_what_is_predicted_is_what_the_task_writes(
    objective, tmp_path, monkeypatch):
  model = _tagger(objective, tmp_path)
  evaluation = evaluations.make_evaluation(
      model.run, predictions=str(tmp_path / 'out.csv'))
  evaluation = dataclasses.replace(evaluation, params=model.params)
  tables = []
  monkeypatch.setattr(labels_task, '_write_predictions', lambda path, results:
                      tables.extend(results[0].table))
  evaluations.run_and_check_task('labels', evaluation)
  if objective == 'regression':
    rows = [row['text'] for row in tables]
    expected = [row['predicted'] for row in tables]
    np.testing.assert_allclose(model.predict(rows), expected, rtol=1e-5)
    return
  if objective == 'token_classification':
    rows = [[] for _ in range(tables[-1]['sentence'])]
    for row in tables:
      rows[row['sentence'] - 1].append(row['word'])
    predictions = model.predict([' '.join(words) for words in rows])
    said = [x for one in predictions for x in zip(one.labels,
                                                  one.probabilities)]
  else:
    context = {f'{i}-{j}': text for i, text in enumerate(data_files.CONTEXTS)
               for j in range(3)}
    said = [(one.text, one.probability) for one in model.predict(
        [(row['question'], context[row['id']]) for row in tables])]
  assert [name for name, _ in said] == [row['predicted'] for row in tables]
  np.testing.assert_allclose([p for _, p in said],
                             [row['probability'] for row in tables], rtol=1e-5)


@pytest.mark.parametrize('objective, rows, message', [
    ('classification', [], 'rows is empty'),
    ('classification', ['a', ' '], 'row 1 has an empty text'),
    ('classification', [('a', 'b', 'c')], 'row 0 is .*: pass a text, or a'),
    ('token_classification', [[1]], 'row 0 is 1, not a string'),
    ('question_answering', ['ab'], "row 0 is 'ab': pass a pair of a question"),
    ('regression', 3, 'rows is 3, of type int')])
def test_a_row_that_cannot_be_read_is_a_sentence(
    objective, rows, message, tmp_path):
  with pytest.raises(RequestError, match=message):
    _tagger(objective, tmp_path).predict(rows)


def test_a_language_model_predicts_no_labels(gpt):
  with pytest.raises(RequestError, match='its objective is causal'):
    gpt.predict(['a'])


@pytest.mark.parametrize('kind', ['bytes', 'wordpiece'])
def test_a_model_is_saved_with_its_tokenizer(kind, tmp_path):
  """Also where the file that it was loaded from is gone."""
  spec = kind
  if kind != 'bytes':
    spec = data_files.write_wordpiece_tokenizer(tmp_path)
  module, params = models.make_model('gpt', vocab_size=384)
  model = archetype.Model(module, params, tokenizers.load(spec))
  model.save(tmp_path / 'one')
  (tmp_path / 'tokenizer.json').unlink(missing_ok=True)
  model.save(tmp_path / 'two')
  text = 'Ana Ruiz, naïve 日本\n [SEP] <extra_id_3>'
  for folder in ('one', 'two'):
    loaded = archetype.load(tmp_path / folder)
    np.testing.assert_array_equal(loaded.encode(text), model.encode(text))
    assert loaded.decode(loaded.encode(text)) == model.decode(
        model.encode(text))
    for name in ('special_ids', 'sentinel_ids', 'vocab_size'):
      assert getattr(loaded.tokenizer, name) == getattr(model.tokenizer, name)
    # Over its own files, and not over those of another.
    loaded.save(tmp_path / folder)
  (tmp_path / 'two' / 'vocab.txt').write_text('a')
  with pytest.raises(RequestError, match='vocab.txt., which would stay'):
    model.save(tmp_path / 'two')


def test_bytes_that_stand_in_for_a_tokenizer_are_not_saved(tmp_path):
  model = _model(vocab_size=384)
  model.save(tmp_path / 'one')
  stand_in = archetype.load(tmp_path / 'one', tokenizer='bytes')
  stand_in.save(tmp_path / 'two')
  assert archetype.load(tmp_path / 'two').tokenizer is None


def test_a_folder_that_cannot_be_is_a_sentence(gpt, tmp_path):
  (tmp_path / 'file').write_text('')
  for folder, reason in (('', 'name a folder'),
                         (tmp_path / 'file', 'Not a directory'),
                         (tmp_path / 'file' / 'a', 'Not a directory'),
                         (tmp_path / ('x' * 300), 'File name too long')):
    with pytest.raises(RequestError, match=reason):
      gpt.save(folder)


@pytest.mark.parametrize('path, how, message', [
    ('gpt2', {}, 'no folder or file gpt2: .* is written hf://gpt2$'),
    ('openai/gpt2', {}, 'is written hf://openai/gpt2$'),
    ('/no/such', {}, 'there is no folder or file /no/such$'),
    ('', {}, "path is '': name the folder"),
    ('gpt2', dict(step='bets'), "^step is 'bets': write the number"),
    ('gpt2', dict(step='best'), 'gpt2 is no run: it has no step best')])
def test_what_is_no_model_is_a_sentence(path, how, message, tmp_path,
                                        monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(RequestError, match=message):
    archetype.load(path, **how)


def test_numbers_of_numpy_are_numbers():
  fields = dict(d_model=16, num_layers=1, norm_eps=0.5, pattern='a',
                kinds={'a': dict(window=3)})
  module = archetype.build('gpt:tiny', **fields).module
  fields |= dict(d_model=np.int64(16), num_layers=np.int32(1),
                 norm_eps=np.float64(0.5), kinds={'a': dict(
                     window=np.int16(3))})
  assert archetype.build('gpt:tiny', **fields).module == module


@pytest.mark.parametrize('fields, message', [
    (dict(d_model=10**18), 'model.d_model is 10000.*: it must be > 0 and <= '),
    (dict(d_model=2**63), 'model.d_model is 9223372036854775808: it must be'),
    (dict(vocab_size=10**20), 'model.vocab_size is 100.* <= 2,147,483,647'),
    (dict(attention_conv=10**20), 'model.attention_conv is 100.* <= 256'),
    (dict(num_layers=10**6), 'num_layers is 1000000: it must be .* <= 10,000'),
    (dict(mtp_depth=99999999999), 'model.mtp_depth is 99999999999: .* <= 64'),
    (dict(d_model=2**20), 'the parameters have [0-9,.]+ GiB on a cpu'),
    (dict(d_ff=2**31 - 1), 'the parameters have [0-9,.]+ GiB on a cpu'),
    (dict(vocab_size=2**31 - 1), 'the parameters have [0-9,.]+ GiB on a cpu'),
    (dict(kinds={None: {}}), 'has a kind called None: call it by letters')])
def test_a_size_that_cannot_be_is_refused_before_any_work(fields, message):
  with pytest.raises(RequestError, match=message):
    archetype.build('gpt:tiny', **fields)
