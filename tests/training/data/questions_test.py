"""Questions on paragraphs, cut into rows: against the package tokenizers, which
cuts them itself."""

import numpy as np
import pytest
import tokenizers as hf

from tests.helpers import labelled_files as files
from training.data import questions, tokenizers
from training.measures import questions as measures
from training.objectives import labelled as objective


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('questions')


@pytest.fixture(scope='module')
def source(folder):
  return f'squad:{files.squad(folder / "a.json")}'


@pytest.fixture(scope='module')
def tokenizer(folder):
  return files.wordpiece(folder)


def _config(source, tokenizer, **data):
  return files.config(source, tokenizer, 'question_answering', **data)


def _view(config):
  return questions.Questions(files.corpus(config))


@pytest.mark.parametrize('length, stride', [(128, 16), (36, 10), (30, 3)])
def test_rows_equal_those_of_the_package_tokenizers(
    length, stride, source, tokenizer):
  """Its truncation `only_second` with a stride is what transformers uses; the
  ends of the answer are then found as in its run_qa.py."""
  config = _config(source, tokenizer, length=length, stride=stride)
  view = _view(config)
  theirs = hf.Tokenizer.from_file(tokenizer)
  theirs.enable_truncation(length, stride=stride, strategy='only_second')
  expected = []
  for question, (context, _) in zip(view.questions, view.contexts):
    encoded = theirs.encode(question.question, context)
    for part in [encoded, *encoded.overflowing]:
      places = [i for i, side in enumerate(part.sequence_ids) if side == 1]
      ends = 0, 0
      if question.answers:
        text, start = question.answers[0]
        inside = [i for i in places if part.offsets[i][0] < start + len(text)
                  and part.offsets[i][1] > start]
        whole = (part.offsets[places[0]][0] <= start
                 and part.offsets[places[-1]][1] >= start + len(text))
        ends = (inside[0], inside[-1]) if whole else ends
      expected.append((part.ids, part.type_ids, *ends))
  ours = tokenizers.load(tokenizer)
  rows = [objective.lay_out_question(item, None, config, ours)
          for item in view.items]
  assert [(row['tokens'].tolist(), row['types'].astype(int).tolist(),
           row['starts'], row['ends']) for row in rows] == expected
  assert len(rows) > len(view.questions) or length == 128


@pytest.mark.parametrize('kind', ['wordpiece', 'bytes'])
@pytest.mark.parametrize('length', [128, 70])
def test_what_scores_say_goes_back_to_the_text(kind, length, source, tokenizer):
  config = _config(source, tokenizer if kind == 'wordpiece' else kind,
                   length=length, stride=30 if kind == 'bytes' else 8)
  view, ours = _view(config), tokenizers.load(config.data.tokenizer)
  rng, scores, nulls, begins = np.random.default_rng(0), [], [], []
  for item in view.items:
    row = objective.lay_out_question(item, None, config, ours)
    scores_L2 = rng.normal(size=(length, 2))
    scores_L2[row['starts'], 0] = scores_L2[row['ends'], 1] = 9
    scores.append(scores_L2)
    nulls.append(objective.null_place(item, 'encoder'))
    begins.append(objective.begin(item))
  found = measures.answers(view, scores, nulls, begins, most=30, count=5,
                           threshold=0.0)
  right = [question.answers[0][0] if question.answers else ''
           for question in view.questions]
  assert [answer.text for answer in found] == right
  figures = measures.figures(view, found)
  assert figures['exact'] == figures['f1'] == figures['best_f1'] == 100
  assert (figures['total'], figures['NoAns_total']) == (4, 1)
  texts = measures.written(view, found)
  assert texts.keys() == {'', 'nbest', 'null_odds'}


def test_a_paragraph_is_held_out_with_all_of_its_questions(source, tokenizer):
  config = _config(source, tokenizer, length=64)
  corpus = files.corpus(config)
  assert len(corpus.cache) == 2 and len(_view(config).questions) == 4


def test_a_decoder_says_at_the_last_token_that_there_is_no_answer(source):
  config = _config(source, 'bytes', length=128)
  config.model.arch = 'gpt'
  view, ours = _view(config), tokenizers.load('bytes')
  row = objective.lay_out_question(view.items[2], None, config, ours)
  assert view.questions[2].answers == () and 'types' not in row
  assert row['starts'] == row['ends'] == len(row['tokens']) - 1
  assert ours.decode(row['tokens']) == 'Who swam?' + files.CONTEXTS[0]


@pytest.mark.parametrize('data, message', [
    (dict(length=8), r"a.json, question '0-0', has 10 tokens, which leave no "
     'room for its paragraph in data.length 8'),
    (dict(length=20, stride=5), 'data.stride is 5, but in data.length 20 there '
     "is room for 3 tokens of the paragraph of .*question '1-0'")])
def test_rows_that_are_too_short_are_refused(data, message, source, tokenizer):
  with pytest.raises(ValueError, match=message):
    _view(_config(source, tokenizer, **data))


def test_answers_of_two_files_with_the_same_ids_are_not_written(
    tmp_path, tokenizer):
  for name in 'ab':
    files.squad(tmp_path / f'{name}.json')
  view = _view(_config(f'squad:{tmp_path}/*.json', tokenizer, length=128))
  with pytest.raises(ValueError, match='two questions have one id'):
    measures.check_ids(view)
