"""Pairs of texts as RoBERTa was shown them: two separators between them."""

import json

import numpy as np
import pytest
import tokenizers as hf

from configs import base
from configs.errors import RequestError
from tests.helpers import labelled_files as files
from tests.training.data import roberta_files
from training import objectives, runs
from training.data import pipeline, questions, records, tokenizers
from training.objectives import question_answering
from training.workdir import run_config

PAIRS = [('an ant', 'ran'), ('a', 'an an an an an an an an an'),
         ('what is an anagram of nap, then?', 'pan'), ('a an a an', 'an a an')]
WINDOWS = (96, 16), (40, 10)  # (data.length, data.stride)


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  return roberta_files.write(tmp_path_factory.mktemp('roberta'))


def _config(source, folder, objective, arch='roberta', **data):
  config = files.config(source, str(folder), objective, **data)
  config.model.arch = arch
  return config


def _labelled(tmp_path, folder, objective='classification', length=16,
              pairs=True, **changes):
  lines = [f'{a}\t{b}\t{i % 2}\n' if pairs else f'{a}\t{i % 2}\n'
           for i, (a, b) in enumerate(PAIRS)]
  (tmp_path / 'a.tsv').write_text(''.join(lines))
  return _config(f'labelled:{tmp_path}/a.tsv', folder, objective,
                 length=length, **changes)


def _rows(config, view):
  """Returns the tokens of each row, as they are and as a batch has them."""
  row, tokenizer = objectives.of(config), tokenizers.load(config.data.tokenizer)
  for item in view.items:
    whole = files.row(row, item, np.random.default_rng(0), config,
                      tokenizer)
    size = row.length(item)
    assert whole['segment_ids'].tolist() == (
        [1] * size + [0] * (config.data.length - size))
    yield whole, whole['tokens'][:size].tolist()


@pytest.mark.parametrize('objective', ['classification', 'regression'])
@pytest.mark.parametrize('length', [12, 64])
def test_pairs_equal_those_of_the_package_tokenizers(objective, length, folder,
                                                     tmp_path):
  config = _labelled(tmp_path, folder, objective, length)
  view = objectives.of(config).view(files.corpus(config))
  theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  theirs.enable_truncation(length)
  expected = [theirs.encode(*pair).ids for pair in PAIRS]
  assert [ids for _, ids in _rows(config, view)] == expected
  assert view.lengths.tolist() == list(map(len, expected))
  assert view.cut == (3 if length == 12 else 0)
  one = _labelled(tmp_path, folder, objective, length, pairs=False)
  view = objectives.of(one).view(files.corpus(one))
  assert [ids for _, ids in _rows(one, view)] == [
      theirs.encode(text).ids for text, _ in PAIRS]


@pytest.mark.parametrize('length, stride', WINDOWS)
def test_windows_equal_those_of_the_package_tokenizers(length, stride, folder,
                                                       tmp_path):
  config = _config(f'squad:{files.squad(tmp_path / "a.json")}', folder,
                   'question_answering', length=length, stride=stride)
  view = questions.Questions(files.corpus(config))
  theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  theirs.enable_truncation(length, stride=stride, strategy='only_second')
  expected = []
  for question, (context, _) in zip(view.questions, view.contexts):
    encoded = theirs.encode(question.question, context)
    expected += [encoded, *encoded.overflowing]
  rows = list(_rows(config, view))
  assert [ids for _, ids in rows] == [part.ids for part in expected]
  assert any(item.answer for item in view.items)
  for item, part, (row, _) in zip(view.items, expected, rows):
    first = part.sequence_ids.index(1)
    assert question_answering.begin(item) == first
    assert row['starts'] == (first + item.answer[0] if item.answer else 0)
    assert (row['types'] == 1).argmax() == first


def test_a_pair_equals_transformers_own(folder, tmp_path):
  """Of its RobertaTokenizer, by the files that it reads itself."""
  transformers = pytest.importorskip('transformers')
  theirs = transformers.RobertaTokenizerFast.from_pretrained(str(folder))
  config = _labelled(tmp_path, folder, length=12)
  view = records.Classes(files.corpus(config))
  for (_, ids), pair in zip(_rows(config, view), PAIRS, strict=True):
    assert ids == theirs(*pair, truncation=True, max_length=12).input_ids
  ours = tokenizers.load(str(folder))
  for kind, i in ours.special_ids.items():
    assert i == getattr(theirs, f'{kind}_token_id'), kind


@pytest.mark.every_system
@pytest.mark.parametrize('arch, given, between', [
    ('roberta', 0, 2), ('roberta', 1, 1), ('bert', 0, 1), ('bert', 2, 2),
    ('modernbert', 0, 1), ('gpt', 0, 1)])
def test_separators_of_each_system(arch, given, between, folder, tmp_path):
  config = _labelled(tmp_path, folder, arch=arch, pair_separators=given)
  assert records.separators(config) == between
  (_, ids), *_ = _rows(config, records.Classes(files.corpus(config)))
  inner = np.array(ids)[1:-1]
  assert (inner == 2).sum() == between


def test_what_reads_no_pairs_refuses_their_separators():
  config = base.base()
  config.data.pair_separators = 2
  with pytest.raises(RequestError, match='data.pair_separators'):
    runs.check_config(config)
  config.objective = 'classification'
  config.data.pair_separators = 3
  with pytest.raises(RequestError, match='data.pair_separators is 3'):
    runs.check_config(config)


@pytest.mark.every_system
@pytest.mark.parametrize('arch, objective, kept', [
    ('roberta', 'classification', True), ('roberta', 'regression', True),
    ('roberta', 'question_answering', True), ('roberta', 'mlm', False),
    ('bert', 'classification', False)])
def test_a_run_of_one_separator_goes_on_with_it(arch, objective, kept, folder,
                                                tmp_path):
  """A config.json without data.pair_separators is of that time."""
  config = _labelled(tmp_path, folder, objective, arch=arch)
  run_config.save(tmp_path, config)
  tree = json.loads((tmp_path / 'config.json').read_text())
  del tree['data']['pair_separators']
  (tmp_path / 'config.json').write_text(json.dumps(tree))
  old = run_config.load_config(tmp_path)
  assert old.data.pair_separators == (1 if kept else 0)
  changes = run_config.compare(old, config)
  assert bool(changes) == kept
  if kept:  # the other layout must be asked for
    with pytest.raises(ValueError, match='data.pair_separators=1 is that'):
      run_config.refuse(changes, allow_config_change=False)
    config.data.pair_separators = 1
    assert not run_config.compare(old, config)
  if (arch, objective) == ('roberta', 'classification'):
    tokens = pipeline.training_loader(old, tokenizers.load(str(folder))).batch(
        0)['tokens']
    assert ((tokens == 2).sum(1) == 2).all()


@pytest.mark.every_system
@pytest.mark.parametrize('pairs, source, kept', [
    (False, 'labelled:{}', 0), (True, 'labelled:{}', 1),
    (False, '0.5*labelled:{},0.5*labelled:{}:0+1', 0),
    (False, '0.5*labelled:{},0.5*labelled:{}:0+0+1', 1),
    (False, 'labelled:/gone/*.tsv:text+label', 0),
    (False, 'labelled:/gone/*.tsv', 1),
    (False, 'hf:glue:sst2:train:sentence+label', 0),
    (False, 'hf:glue:rte::sentence1+sentence2+label', 1)])
def test_a_run_without_pairs_goes_on_as_it_is(pairs, source, kept, folder,
                                              tmp_path):
  """It has no separators between texts, however many they would be."""
  config = _labelled(tmp_path, folder, pairs=pairs)
  config.data.source = source.replace('{}', f'{tmp_path}/a.tsv')
  tree = run_config.to_json(config)
  del tree['data']['pair_separators']
  assert run_config.from_json(tree).data.pair_separators == kept
  assert bool(run_config.compare(run_config.from_json(tree), config)) == kept
  tree['data']['eval_source'] = 'labelled:/gone/pairs.tsv:a+b+label'
  assert run_config.from_json(tree).data.pair_separators == 1
