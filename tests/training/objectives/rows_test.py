"""How the rows of labelled data are laid out, to which length a batch is
padded, which loss it has, and that its scores hang on nothing but the row; and
that the shapes that a plan takes for a batch are the loader's."""

import json
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tokenizers as hf

import architectures
from common.errors import RequestError
from common.fields import SAFE
from configs import base
from tests.helpers import data_files as files
from tools.compare import certificate, cost, spec
from training import objectives
from training.data import records, tokenizers
from training.objectives import labelled, pipeline
from training.workdir import run_config

BYTES = tokenizers.load('bytes')
CLS, SEP, END, PAD = (BYTES.special_ids[x] for x in ('cls', 'sep', 'eos',
                                                     'pad'))


@pytest.mark.parametrize('objective, fields', [
    ('causal', {}), ('causal', dict(document_mask=True)), ('prefix', {}),
    ('mlm', {}), ('mlm', dict(document_mask=True)), ('mlm_nsp', {}),
    ('mlm_sop', {}), ('span', {}), ('seq2seq', dict(target_length=24)),
    ('chat', dict(length=256))])
def test_shapes_are_the_loaders(objective, fields, tmp_path):
  text = ' '.join('abcdefg'[i % 7] * (1 + i % 5) for i in range(900))
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(text)
  (tmp_path / 'b.jsonl').write_text(json.dumps({'messages': [
      {'role': 'user', 'content': text[:40]},
      {'role': 'assistant', 'content': text[:60]}]}) + '\n')
  c = base.base()
  c.objective = objective
  c.data.update(dict(
      source=(f'jsonl:{tmp_path}/b.jsonl:messages' if objective == 'chat'
              else f'text:{tmp_path}/*.txt'),
      cache_dir=str(tmp_path / 'cache'), length=64, batch_size=4,
      holdout_every=0) | fields)
  batch = pipeline.make_training_loader(c, BYTES).batch(0)
  got = {key: (x.shape, x.dtype) for key, x in batch.items()}
  assert got == objectives.shapes_of_batch(c)
  if objective in ('span', 'seq2seq'):
    c.model.update(arch='t5', d_model=32)
  seen = sum(batch[key].size for key in ('tokens', 'decoder_tokens')
             if key in batch)
  assert cost.cost_of_run(c).tokens == seen * c.train.steps


def test_rows_are_laid_out_as_pictured(tmp_path):
  def rows(arch, text):
    (tmp_path / 'one.tsv').write_text(text)
    batch = pipeline.make_training_loader(files.make_run_config(
        f'labelled:{tmp_path}/one.tsv', 'classification', 8, arch,
        batch_size=2), BYTES).batch(0)
    order = np.argsort(batch['targets'])
    return {key: value[order].tolist() for key, value in batch.items()}

  a, b, c = map(ord, 'abc')
  assert rows('bert', 'ab\tx\nc\ty\n') == dict(
      tokens=[[CLS, a, b, SEP] + [PAD] * 4, [CLS, c, SEP] + [PAD] * 5],
      types=[[0] * 8] * 2, segment_ids=[[1] * 4 + [0] * 4, [1] * 3 + [0] * 5],
      targets=[0, 1], weights=[1, 1])
  pair = rows('bert', 'a\tbc\tx\nabcabc\tb\ty\n')
  assert pair['tokens'] == [[CLS, a, SEP, b, c, SEP, PAD, PAD],
                            [CLS, a, b, c, a, SEP, b, SEP]]
  assert pair['types'] == [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 6 + [1] * 2]
  decoder = rows('gpt', 'a\tbc\tx\nabcabc\tb\ty\n')
  assert decoder['tokens'] == [[END, a, END, b, c, END, PAD, PAD],
                               [END, a, b, c, a, END, b, END]]
  assert decoder['segment_ids'] == pair['segment_ids']
  assert 'types' not in decoder


def test_the_ids_of_a_row_are_those_that_the_model_has(tmp_path):
  """Where it lacks the last ones of its tokenizer: numbers are no ids."""
  (tmp_path / 'a.tsv').write_text('ab\t1000\nc\t-1000\n')
  c = files.make_run_config(f'labelled:{tmp_path}/a.tsv', 'regression', 8,
                            'bert', batch_size=2)
  c.model.vocab_size = BYTES.vocab_size - 1
  batch = pipeline.make_training_loader(c, BYTES).batch(0)
  assert sorted(batch['targets']) == [-1000, 1000]
  c.model.vocab_size = int(batch['tokens'].max())
  with pytest.raises(RequestError, match=f'is {c.model.vocab_size}, and the'):
    pipeline.make_training_loader(c, BYTES).batch(0)


def test_a_batch_is_as_long_as_its_longest_row_needs(tmp_path):
  """A hundred texts of 1 to 50 letters, on any number of processes."""
  rng = np.random.default_rng(0)
  rows = [f'{"ab"[i % 2] * int(n)}\t{"ab"[i % 2]}\n' for i, n in enumerate(
      rng.integers(1, 20, 96))] + ['a' * 50 + '\ta\n'] * 4
  (tmp_path / 'a.tsv').write_text(''.join(rows))
  c = files.make_run_config(f'labelled:{tmp_path}/a.tsv', 'classification',
                            arch='bert')
  loader = pipeline.make_training_loader(c, BYTES)
  parts = [pipeline.make_training_loader(c, BYTES, i, 4) for i in range(4)]
  c = c.copy_and_resolve_references()
  c.data.length_buckets = 1
  whole = pipeline.make_training_loader(c, BYTES)
  seen = set()
  for n in range(50):
    batch = loader.batch(n)
    longest = int((batch['tokens'] != PAD).sum(1).max())
    size = batch['tokens'].shape[1]
    assert size == -(-longest // 16) * 16
    seen.add(size)
    pieces = [part.batch(n) for part in parts]
    for key, value in whole.batch(n).items():  # padding is all that differs
      kept = value[:, :size] if value.ndim > 1 else value
      np.testing.assert_array_equal(kept, batch[key])
      np.testing.assert_array_equal(
          np.concatenate([piece[key] for piece in pieces]), batch[key])
  assert len(seen) > 2


PAIRS = [('an ant', 'ran'), ('a', 'an an an an an an an an an'),
         ('what is an anagram of nap, then?', 'pan'), ('a an a an', 'an a an')]


@pytest.mark.parametrize('length', [12, 64])
def test_pairs_equal_those_of_the_package_tokenizers(length, tmp_path):
  """As RoBERTa was shown them: two separators between them."""
  folder = files.write_roberta_tokenizer(tmp_path)
  theirs = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  theirs.enable_truncation(length)
  (tmp_path / 'a.tsv').write_text(''.join(
      f'{a}\t{b}\t{i % 2}\n' for i, (a, b) in enumerate(PAIRS)))
  c = files.make_run_config(f'labelled:{tmp_path}/a.tsv', 'classification',
                            length,
                            'roberta', tokenizer=str(folder))
  view = records.Classes(files.read_corpus(c))
  record, ours = objectives.find_objective(c), tokenizers.load(str(folder))
  rows = [files.make_batch_row(record, item, np.random.default_rng(0), c,
                               ours)['tokens'][
      :record.length(item)].tolist() for item in view.items]
  assert rows == [theirs.encode(*pair).ids for pair in PAIRS]
  assert view.cut == (3 if length == 12 else 0)
  for arch, between in (('roberta', 2), ('bert', 1), ('gpt', 1)):
    c.model.arch = arch
    assert records.separators_between_texts(c) == between
  transformers = pytest.importorskip('transformers')
  slow = transformers.RobertaTokenizerFast.from_pretrained(str(folder))
  assert rows == [slow(*pair, truncation=True, max_length=length).input_ids
                  for pair in PAIRS]


@pytest.mark.parametrize('arch, between', [('bert', 1), ('roberta', 2)])
@pytest.mark.parametrize('objective', ['classification', 'question_answering'])
def test_all_separators_count_where_a_pair_is_cut(arch, between, objective,
                                                  tmp_path):
  """Two texts fill a row to its last token. In a row that is one token shorter
  one of them is cut, or a paragraph takes two rows."""
  texts = 'a' * 5, 'b' * 9
  if objective == 'classification':
    (tmp_path / 'a.tsv').write_text(''.join(
        '\t'.join((*texts, label)) + '\n' for label in 'xy'))
    source = f'labelled:{tmp_path}/a.tsv'
    num_rows = 2
  else:
    question = dict(id='0', question=texts[0], is_impossible=True, answers=[])
    paragraph = dict(context=texts[1], qas=[question])
    (tmp_path / 'a.json').write_text(json.dumps(
        dict(data=[dict(paragraphs=[paragraph])])))
    source = f'squad:{tmp_path}/a.json'
    num_rows = 1
  full = sum(map(len, texts)) + 2 + between
  sizes = {}
  for length in (full, full - 1):
    c = objectives.fill_in_labels(
        files.make_run_config(source, objective, length, arch, stride=1))
    record = objectives.find_objective(c)
    view = record.view(files.read_corpus(c))
    sizes[length] = [record.length(item) for item in view.items]
    for item, size in zip(view.items, sizes[length]):
      row = files.make_batch_row(record, item, None, c, BYTES)
      assert (row['segment_ids'] != 0).sum() == size
      assert (row['tokens'] == SEP).sum() == 1 + between
  assert sizes[full] == [full] * num_rows
  if objective == 'classification':
    assert sizes[full - 1] == [full - 1] * num_rows
  else:
    assert sizes[full - 1] == [full - 1, full - 7]


def _asked(tmp_path, objective, arch='bert', length=64):
  source = (f'conll:{files.write_conll(tmp_path / "a.conll")}'
            if objective == 'token_classification' else
            f'squad:{files.write_squad(tmp_path / "a.json")}')
  c = objectives.fill_in_labels(
      files.make_run_config(source, objective, length, arch, stride=16))
  record = objectives.find_objective(c)
  view = record.view(files.read_corpus(c))
  return record, c, [
      files.make_batch_row(record, item, None, c,
                           BYTES) for item in view.items], view


def test_words_are_laid_out_as_pictured(tmp_path):
  (tmp_path / 'a').write_text('ab\tB-x\nc\tO\n')
  c = files.make_run_config(f'conll:{tmp_path}/a', 'token_classification', 8)
  for arch, before, after in ('bert', CLS, SEP), ('gpt', END, END):
    c.model.arch = arch
    record = objectives.find_objective(c)
    item, = records.Sentences(files.read_corpus(c)).items
    row = {key: value.tolist() for key, value in files.make_batch_row(
        record, item, None, c, BYTES).items()}
    assert row == dict(
        tokens=[before, *b'ab c', after, PAD, PAD],
        segment_ids=[1] * 6 + [0] * 2, labels=[0, 0, 0, 0, 1, 0, 0, 0],
        weights=[0, 1, 0, 0, 1, 0, 0, 0])
    assert record.length(item) == 6


def test_questions_are_laid_out_as_pictured(tmp_path):
  record, _, rows, view = _asked(tmp_path, 'question_answering', length=128)
  asked, context = b'How many gulls?', files.CONTEXTS[0].encode()
  row, first = rows[0], 2 + len(asked)
  size = first + len(context) + 1
  assert row['tokens'].tolist() == [
      CLS, *asked, SEP, *context, SEP] + [PAD] * (128 - size)
  assert row['types'].tolist() == [0] * first + [1] * (size - first) + [0] * (
      128 - size)
  assert bytes(row['tokens'][row['starts']:row['ends'] + 1].tolist()) == b'308'
  assert record.length(view.items[0]) == size
  assert rows[2]['starts'] == rows[2]['ends'] == 0 and rows[2]['weights'] == 1
  _, _, short, _ = _asked(tmp_path, 'question_answering')
  shown = [row for row in short if row['starts'] or row['ends']]
  assert 3 <= len(shown) < len(short)  # the others do not show the answer
  for arch in 'bert', 'gpt':  # the null token is the one that has seen all
    _, _, rows, view = _asked(tmp_path, 'question_answering', arch, 128)
    size = int((rows[2]['segment_ids'] != 0).sum())
    stack = architectures.systems()[arch].STACK
    assert rows[2]['starts'] == (0 if arch == 'bert' else size - 1) == (
        labelled.place_of_null_token(view.items[2], stack))


def test_a_window_shows_an_answer_that_it_has_whole(tmp_path):
  """Of windows of every length that ends or begins within an answer."""
  source = f'squad:{files.write_squad(tmp_path / "a.json")}'
  asked = [(question, answer, context) for context, pairs in zip(
      files.CONTEXTS, files.ASKED) for question, answer in pairs]
  cases = set()
  for length in range(30, 90):
    for item in records.Questions(files.read_corpus(files.make_run_config(
        source, 'question_answering', length, 'bert', stride=3))).items:
      question, answer, context = asked[item.asked]
      text, start = bytes(item.context.tolist()).decode(), context.find(answer)
      end = item.first + len(text)
      assert bytes(item.question.tolist()).decode() == question
      assert context[item.first:end] == text
      whole = item.first <= start and start + len(answer) <= end
      if not answer or not whole:
        assert item.answer is None
        continue
      first, last = item.answer
      assert (item.first + first, last - first + 1) == (start, len(answer))
      assert text[first:last + 1] == answer
      cases.add((start == item.first, start + len(answer) == end))
  assert {(True, False), (False, True)} <= cases


def _figures(objective, scores, batch, smooth=0.0):
  record = objectives.OBJECTIVES[objective]
  c = ml_collections.ConfigDict(dict(
      model=dict(mtp_depth=0), train=dict(label_smoothing=smooth)))
  output = types.SimpleNamespace(
      extra=dict(scores=jnp.asarray(scores, jnp.float32)))
  batch = {key: jnp.asarray(value) for key, value in batch.items()}
  return record, output, batch, c, {
      key: float(value) for key, value in record.means(
          record.figures(output, batch, c)).items()}


@pytest.mark.parametrize('smooth', [0.0, 0.2])
def test_the_loss_is_torchs_weighted_cross_entropy(smooth):
  """sum(w l) / sum(w), as torch.nn.CrossEntropyLoss(weight) has it; and by
  numpy, the smoothed targets written out; of words likewise."""
  rng = np.random.default_rng(0)
  scores, targets = rng.normal(size=(6, 3)) * 3, np.array([0, 1, 2, 2, 1, 0])
  weights = np.array([1, 2, 0.5, 0.5, 2, 0], np.float32)  # the last is padding
  *_, figures = _figures('classification', scores, dict(
      targets=targets, weights=weights), smooth)
  p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  q = np.eye(3)[targets] * (1 - smooth) + smooth / 3
  losses = -(q * np.log(p)).sum(1)
  np.testing.assert_allclose(
      figures['loss'], (weights * losses).sum() / weights.sum(), rtol=1e-5)
  np.testing.assert_allclose(  # of the five rows that are there, each once
      figures['accuracy'], (scores.argmax(1) == targets)[:5].mean(), rtol=1e-6)
  counts = (weights > 0).astype(np.float32)
  *_, words = _figures('token_classification', scores[None], dict(
      labels=targets[None], weights=counts[None]), smooth)
  np.testing.assert_allclose(words['loss'], losses[:5].mean(), rtol=1e-5)
  assert words['accuracy'] == pytest.approx(figures['accuracy'])


def test_the_loss_of_a_number_is_its_squared_error():
  *_, figures = _figures(
      'regression', np.array([[1.0], [3.0], [9.0]]),
      dict(targets=np.float32([2, 0, 0]), weights=np.float32([1, 1, 0])))
  assert figures == dict(loss=5, mean_absolute_error=2)


def test_the_loss_of_an_answer_is_that_of_both_ends_without_padding():
  rng = np.random.default_rng(0)
  scores, sizes = rng.normal(size=(3, 6, 2)) * 3, [4, 6, 5]
  starts, ends = np.array([1, 0, 2]), np.array([3, 0, 2])
  segments = (np.arange(6) < np.array(sizes)[:, None]).astype(np.int32)
  scores[1, 0] = 99  # this one is right, at both ends
  batch = dict(starts=starts, ends=ends, segment_ids=segments,
               weights=np.float32([1, 1, 0]))
  *_, figures = _figures('question_answering', scores, batch)
  losses = []
  for b in range(2):
    for side, place in enumerate((starts[b], ends[b])):
      row = scores[b, :sizes[b], side]
      losses.append(np.log(np.exp(row - row.max()).sum()) + row.max()
                    - row[place])
  assert figures['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
  assert figures['accuracy'] == 1 / 2
  scores[0, 4:] += 1000  # what a model says of padding changes nothing
  assert _figures('question_answering', scores, batch)[-1] == figures
  # Who knows nothing tells all tokens of a whole row alike.
  config = base.base()
  config.data.length = 6
  batch['segment_ids'] = np.ones((3, 6), np.int32)
  figures = _figures('question_answering', 0 * scores, batch)[-1]
  assert figures['loss'] == pytest.approx(objectives.OBJECTIVES[
      'question_answering'].loss_of_guessing(config, 0))


def _sources(folder):
  """Writes small files; returns the source of each objective that reads no
  plain text."""
  text = 'One fox ran. It saw a hen. ' * 90
  for name in 'abcd':
    (folder / f'{name}.txt').write_text(text)
  (folder / 'b.jsonl').write_text(2 * (json.dumps({'messages': [
      {'role': 'user', 'content': text[:40]},
      {'role': 'assistant', 'content': text[:60]}]}) + '\n'))
  labelled_sources = {name: source for name, (source, _) in
                      files.write_sources_with_and_without_labels(folder).items()}
  return labelled_sources | {
      'chat': f'jsonl:{folder}/b.jsonl:messages', 'probe': 'probe:recall',
      'compression': 'probe:compression'}


@pytest.mark.parametrize('objective', objectives.OBJECTIVES)
def test_an_objective_names_the_fields_that_it_reads(
    objective, tmp_path, monkeypatch):
  """Of the fields that some objectives read and others do not, a batch reads
  those that its objective names: a run may set these alone. What a held-out
  batch reads besides how training goes decides what a held-out loss is of."""
  source = _sources(tmp_path).get(objective, f'text:{tmp_path}/*.txt')
  c = files.make_run_config(source, objective, 64,
                            cache_dir=str(tmp_path / 'cache'),
                            holdout_every=2)
  for arch in ('gpt', 'bert', 't5'):
    c.model.arch = arch
    if architectures.stack(c.model) in objectives.find_objective(c).stacks:
      break
  if objective == 'block_diffusion':
    c.model.diffusion_block = 8
  c = objectives.fill_in_labels(c)
  read = set()
  get = ml_collections.ConfigDict.__getattr__
  with monkeypatch.context() as patched:
    patched.setattr(ml_collections.ConfigDict, '__getattr__',
                    lambda self, name: read.add(name) or get(self, name))
    pipeline.make_training_loader(c, BYTES).batch(0)
    read_in_training = set(read)
    read.clear()
    pipeline.make_evaluation_loaders(c, BYTES)[0].batch(0)
    read_in_evaluation = set(read)

  def last(names):
    """Returns the fields of some dotted names, those of models left out."""
    return {name.rpartition('.')[2] for name in names
            if not name.startswith('model.')}

  read_by_some = set()
  for other in objectives.OBJECTIVES.values():
    read_by_some |= last(other.reads)
  reads_of_batches = last(objectives.find_objective(c).reads)
  assert read_in_training & read_by_some == reads_of_batches

  # The size and the length of a batch change no loss of the whole text, nor
  # does how many rows of a probe there are in training.
  c.eval.batches = 0
  flat = run_config.flatten(c)
  read_names = [
      name for name, field in base.FIELDS.items()
      if name.startswith(spec.FIELDS_OF_BATCHES) and field.rule.resume.kind
      != SAFE and name.rpartition('.')[2] in read_in_evaluation - {
          'batch_size', 'length_buckets', 'examples'}]
  assert len(read_names) > 3
  for name in read_names:
    is_of_text = certificate.is_of_held_out_text(name, flat)
    ignored = name in objectives.find_objective(c).ignores
    assert is_of_text or ignored, name
