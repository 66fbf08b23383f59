"""eval.py --tasks=embed, fill_mask and inspect: what a vector is of, what a
mask is filled with, and what a page shows."""

import base64
import contextlib
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as hf

import archetype
from architectures.parts.moe.layer import without_capacity
from common.errors import RequestError
from tests.helpers import evaluations
from tests.helpers import models
from training import evals
from training.evals import inspection
from training.data import tokenizers
from training.evals.tasks import inspect, reading

TEXTS = ('abcd', 'quick brown', 'jumps', 'over the', 'dog and cat', 'away')
# A capacity that leaves tokens out wherever a batch is not even.
MOE = dict(num_layers=1, num_kv_heads=2, moe=dict(
    num_experts=4, d_ff=24, capacity_factor=0.5, eval_capacity_factor=0.5))
# (system, objective, fields of the model, tokens before a text, after it)
KINDS = {
    'decoder': ('gpt', 'causal', {}, [258], []),
    'prefix': ('llama', 'prefix', dict(num_kv_heads=2), [258], []),
    'experts': ('mixtral', 'causal', MOE, [258], []),
    'encoder': ('bert', 'mlm', {}, [260], [261]),
    'encoder-decoder': ('t5', 'span', {}, [], [258]),
}


def written(tmp_path, evaluation, texts=TEXTS):
  (tmp_path / 'texts.txt').write_text('\n'.join(texts) + '\n')
  figures = evaluations.run_and_check_task('embed', evaluation)
  vectors_ND = np.load(figures['vectors'])
  assert vectors_ND.dtype == np.float32
  assert vectors_ND.shape == (len(texts), figures['size'])
  return vectors_ND


def states(evaluation, kind, text):
  """The last layer's outputs of one text alone, unpadded: [L, D]."""
  _, _, _, before, after = KINDS[kind]
  tokens = jnp.array([[*before, *text.encode(), *after]])
  module, variables = evaluation.run.module, {'params': evaluation.params}
  module = module.clone(config=without_capacity(module.config))
  more = dict(prefix_B=jnp.array([tokens.shape[1]])) if kind == 'prefix' else {}

  @jax.jit
  def run(variables):
    if kind == 'encoder-decoder':
      return module.apply(variables, tokens, method='encode')[0][0]
    output = module.apply(variables, tokens, **more)
    return output.extra['hidden'][0] if kind == 'encoder' else output.hidden[0]

  return run(variables)


@pytest.mark.slow
@pytest.mark.parametrize('kind', models.mark_long_except(
    ('decoder',), KINDS))
def test_a_vector_is_pooled_of_the_text_alone(tmp_path, kind):
  """In a batch with longer texts, too: padding is neither seen nor counted. A
  decoder's separator sees nothing of the text, and is not counted either."""
  system, objective, fields, before, _ = KINDS[kind]
  evaluation = evaluations.make_evaluation(
      evaluations.make_config(system, objective, **fields),
      texts=str(tmp_path / 'texts.txt'), vectors=str(tmp_path / 'out.npy'))
  skipped = len(before) if kind != 'encoder' else 0
  pools = {'mean': lambda x: x[skipped:].mean(0), 'last': lambda x: x[-1]}
  if kind not in ('decoder', 'experts'):
    pools['first'] = lambda x: x[skipped]
  x_LD = np.asarray(states(evaluation, kind, TEXTS[5]))  # of the last batch
  for name, pool in pools.items():
    evaluation.options.pooling = name
    together_ND = written(tmp_path, evaluation)
    np.testing.assert_allclose(together_ND[5], pool(x_LD), atol=3e-6)
  models.assert_trees_close(together_ND[:1],
                            written(tmp_path, evaluation, TEXTS[:1]))


@pytest.mark.parametrize('name, content, sentence', [
    ('a.txt', b'a\n\nb', 'a.txt, line 2, is empty'),
    ('a.txt', b'', 'which is empty'),
    ('a.jsonl', b'{"txt": "a"}', "line 1, field 'text', is None, not a string"),
])
def test_a_line_without_a_text_is_refused(tmp_path, name, content, sentence):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(RequestError, match=sentence):
    reading.read_texts(str(tmp_path / name))


VOCAB = ('[PAD] [UNK] [CLS] [SEP] [MASK] paris is the capital of france a city '
         'in germany . ##s').split()
PROMPTS = 'Paris is the [MASK] of France', 'A [MASK] city [MASK]'


def test_a_mask_is_filled_with_the_likeliest_words(
    tmp_path, capsys, monkeypatch):
  file = str(tmp_path / 'tokenizer.json')
  hf.BertWordPieceTokenizer({word: i for i, word in enumerate(VOCAB)}
                            ).save(file)
  evaluation = evaluations.make_evaluation(evaluations.make_config(
      'bert', 'mlm_nsp', file, max_len=16), prompt='|||'.join(PROMPTS))
  figures = evaluations.run_and_check_task('fill_mask', evaluation)['prompts']
  rows = ['[CLS] paris is the [MASK] of france [SEP]',
          '[CLS] a [MASK] city [MASK] [SEP]']
  lines = []
  for prompt, text, row in zip(figures, PROMPTS, rows):
    assert prompt['prompt'] == text
    ids = np.array([VOCAB.index(word) for word in row.split()])
    logits_LV = jax.jit(lambda params, ids=ids: models.logits(
        evaluation.run.module, params, ids[None])[0])(evaluation.params)
    expected = np.asarray(jax.nn.softmax(logits_LV))[ids == 4]  # [MASK]
    assert len(prompt['masks']) == len(expected)
    for fillings, p_V in zip(prompt['masks'], expected):
      best = np.argsort(-p_V)[:5]
      assert [(one['id'], one['text']) for one in fillings] == [
          (i, VOCAB[i]) for i in best]
      np.testing.assert_allclose([one['probability'] for one in fillings],
                                 p_V[best], atol=1e-5)
      lines += [f'{p_V[i]:.4f}  {VOCAB[i]}' for i in best]
  shown = capsys.readouterr().out
  assert [line.strip() for line in shown.splitlines()
          if line.startswith('  ')] == lines
  letters = tokenizers.load('bytes')
  spelled = [reading.spell_token_visibly(i, letters)
             for i in letters.encode(' \n')]
  assert spelled == ['␣', '↵']
  evaluation.options.prompt = '[MASK] ' + 'a ' * 13 + 'a'
  monkeypatch.setattr(evals, 'load_evaluation', lambda *_, **__: evaluation)
  with pytest.raises(RequestError, match='has 17 tokens.*max_len 16'):
    evals.evaluate_run(tmp_path, ['loss', 'fill_mask'], evaluation.options)
  assert capsys.readouterr().out == ''  # before the loss is computed


def given(*names):
  """The flags of all tasks, of which a command line has `names`."""
  return {flag.name: types.SimpleNamespace(
      present=flag.name in names,
      value='set' if flag.name in names else flag.default)
          for task in evals.TASKS.values() for flag in task.flags}


def test_a_flag_that_no_task_reads_is_refused():
  """Whichever it is: each asks for its task, or is refused without it."""
  for flag in {flag.name for task in evals.TASKS.values()
               for flag in task.flags}:
    readers = evals.find_tasks_reading_flag(flag)
    for name, reader in readers.items():
      needs = [reader.needed_flag] if reader.needed_flag else []
      assert evals.choose_tasks([name], given(flag, *needs)) == [name]
      with pytest.raises(RequestError, match=f'--{flag} is read beside --'
                         ) if needs else contextlib.nullcontext():
        evals.choose_tasks([name], given(flag))
    asks = [name for name, reader in readers.items() if reader.requests_task]
    if asks:
      chosen = evals.choose_tasks(['routing'], given(flag))
      assert {*chosen} == {'routing', *asks}
      continue
    with pytest.raises(RequestError, match=rf'--{flag} is read by') as e:
      evals.choose_tasks(['routing'], given(flag))
    assert all(name in str(e.value) for name in readers)


@pytest.mark.parametrize('name, objective, flag, beside', [
    ('labels', 'regression', 'max_answer_length', {}),
    ('samples', 'next_token', 'top_k', {'temperature': 0}),
    ('samples', 'next_token', 'top_p', {'beams': 2})])
def test_a_flag_of_what_is_not_done_is_refused(name, objective, flag, beside):
  row, config = evals.get_task(name), types.SimpleNamespace(objective=objective)
  options = {one.name: one.default for one in row.flags} | beside
  row.check(types.SimpleNamespace(**options), config)
  with pytest.raises(RequestError, match=f'--({flag}|top_k|temperature)'):
    row.check(types.SimpleNamespace(**options | {flag: 0.5}), config)


PROMPT = 'My fellow, my'


def look(system, objective, folder, **options):
  """Returns the evaluation, its figures, and what the page draws."""
  evaluation = evaluations.make_evaluation(
      evaluations.make_config(system, objective), folder,
      **dict(prompt=PROMPT) | options)
  figures = evaluations.run_and_check_task('inspect', evaluation)
  page = (folder / 'inspect.html').read_text()
  # Nothing is fetched: no address stands in it.
  assert not re.search(r'(src|href)="(?!#)|https?:|@import|url\(', page)
  data = re.search(r'id="data">(.*?)</script>', page)[1]
  return (archetype.Model(evaluation.run.module, evaluation.params), figures,
          json.loads(data))


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  return look('gpt', 'causal', tmp_path_factory.mktemp('run'))


def test_figures_of_heads_are_those_of_the_first_row():
  """Of two layers, two rows, two heads and three queries. The first query of
  a decoder can only attend to the first token."""
  rng = np.random.default_rng(0)
  entropy, first_token, sink = rng.uniform(0.1, 1.0, (3, 2, 2, 2, 3))
  previous_token = rng.uniform(size=(2, 2, 2))
  records = {}
  for name in ('decoder', 'cross'):
    records[name] = inspection.AttentionRecord(
        weights=np.zeros((2, 2, 2, 3, 3)), entropy=entropy,
        first_token=first_token, sink=sink, previous_token=previous_token)
  inspected = types.SimpleNamespace(
      attention=records, is_real={'decoder': np.ones((2, 3), bool)})
  figures = inspect.figures_by_head(inspected, induction_NH=None)
  for name, first_query in (('decoder', 1), ('cross', 0)):
    expected = {
        'entropy': entropy[:, 0].mean(-1),
        'first token': first_token[:, 0, :, first_query:].mean(-1),
        'learned sink': sink[:, 0].mean(-1),
        'previous token': previous_token[:, 0]}
    assert figures[name].keys() == expected.keys()
    for figure, values in expected.items():
      np.testing.assert_allclose(figures[name][figure], values)


def test_a_decoder_reads_the_prompt_after_the_separator(gpt):
  model, figures, data = gpt
  assert figures['tokens']['decoder'] == [
      '[EOS]', *PROMPT.replace(' ', '␣')] == data['tokens']['decoder']
  result = model.inspect([258, *PROMPT.encode()])
  attention = result.attention['decoder']
  by_head = figures['attention']['decoder']
  np.testing.assert_allclose(
      by_head['entropy'], attention.entropy.mean(-1)[:, 0], atol=1e-4)
  np.testing.assert_allclose(
      by_head['first token'], attention.first_token[..., 1:].mean(-1)[:, 0],
      atol=1e-5)
  np.testing.assert_allclose(by_head['previous token'],
                             attention.previous_token[:, 0], atol=1e-5)
  np.testing.assert_allclose(figures['stream']['decoder']['norms'],
                             result.stream['decoder'].norms[:, 0], rtol=1e-4)
  top = [[cell[0]['id'] for cell in layer] for layer in figures['lens']]
  assert top == result.lens.ids[:, 0, :, 0].tolist()
  # The page holds the maps to four digits.
  (drawn,) = data['maps']
  weights = np.frombuffer(base64.b64decode(drawn['weights']), '<u2') / 65535
  assert drawn['shape'] == list(attention.weights[:, 0].shape)
  np.testing.assert_allclose(weights.reshape(drawn['shape']),
                             attention.weights[:, 0], atol=1e-5)


def test_induction_is_that_of_random_tokens_that_come_twice(gpt):
  model, figures, _ = gpt
  random, size = np.random.default_rng(0), 15  # max_len is 32
  usual = np.setdiff1d(np.arange(384), [*range(256, 262), *range(284, 384)])
  drawn = [random.choice(usual, size, replace=False) for _ in range(4)]
  rows = [[258, *row, *row] for row in drawn]
  weights = np.asarray(model.attention_weights(rows))
  expected = np.mean([weights[..., 1 + size + i, 2 + i]
                      for i in range(size)], 0).mean(1)
  np.testing.assert_allclose(figures['attention']['decoder']['induction'],
                             expected, atol=1e-5)


def test_a_decoder_is_shown_what_it_writes_up_to_its_end(monkeypatch):
  tokenizer = tokenizers.load('bytes')
  evaluation = types.SimpleNamespace(
      tokenizer=tokenizer, options=types.SimpleNamespace(target=''),
      run=types.SimpleNamespace(module=None, model=types.SimpleNamespace(
          max_len=9)), params=None)
  monkeypatch.setattr(
      inspect.generate, 'generate', lambda *args, max_new_tokens, **kwargs:
      np.array([[97, tokenizer.separator_id, 98] + max_new_tokens * [99]]))
  prompts = types.SimpleNamespace(tokens=np.array([[4]]), lengths=None,
                                  arguments={})
  ids_1L, note = inspect._decoder_tokens(evaluation, prompts)
  assert ids_1L.tolist() == [[4, 97]] and "the 1 tokens" in note


@pytest.mark.slow
def test_an_encoder_reads_masks_between_its_marks(tmp_path):
  model, figures, _ = look('bert', 'mlm', tmp_path, prompt='a [MASK] b')
  assert figures['tokens'] == {'encoder': [
      '[CLS]', 'a', '␣', '[MASK]', '␣', 'b', '[SEP]']}
  result = model.inspect([[260, 97, 32, 259, 32, 98, 261]])
  assert [[c[0]['id'] for c in layer] for layer in figures['lens']] == (
      result.lens.ids[:, 0, :, 0].tolist())
  with pytest.raises(RequestError, match='33 tokens, and 32 can be shown'):
    look('gpt', 'causal', tmp_path, prompt='x' * 32)
