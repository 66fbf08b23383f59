"""eval.py --tasks=fill_mask, against a BERT that is written down in numpy."""

import math
import types

import jax
import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import evaluations
from training import evals

VOCAB = ('[PAD] [UNK] [CLS] [SEP] [MASK] paris is the capital of france a city '
         'in germany . ##s').split()
PROMPTS = 'Paris is the [MASK] of France', 'A [MASK] city [MASK]'


@pytest.fixture(name='wordpiece', scope='module')
def _wordpiece(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wordpiece')
  (folder / 'vocab.txt').write_text('\n'.join(VOCAB))
  return str(folder)


def asked(tokenizer, prompt, **fields):
  return evaluations.make(
      evaluations.config('bert', 'mlm_nsp', tokenizer, max_len=16, **fields),
      prompt=prompt)


def bert(params, ids_L):
  """The logits of one row, [L, V], by Devlin et al.'s equations."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x_LD, of):
    centred = x_LD - x_LD.mean(-1, keepdims=True)
    return (centred / np.sqrt(x_LD.var(-1, keepdims=True) + 1e-12)
            * of['scale'] + of['bias'])

  def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / 2 ** 0.5))

  def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  embed = p['embed']
  x_LD = norm(embed['tokens'][ids_L] + embed['positions'][:len(ids_L)]
              + embed['types'][0], embed['norm'])
  layers = p['encoder']['layers']['block_0']
  for n in range(len(layers['ffn']['up'])):
    layer = jax.tree.map(lambda x, n=n: x[n], layers)
    a = layer['attention']
    q, k, v = (np.einsum('LD,DHK->HLK', x_LD, a[name])
               + a[f'{name}_bias'][:, None] for name in ('query', 'key',
                                                         'value'))
    weights_HLM = softmax(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5)
    attended = np.einsum('HLK,HKD->LD', weights_HLM @ v, a['out'])
    x_LD = norm(x_LD + attended + a['out_bias'], layer['attention_norm'])
    f = layer['ffn']
    hidden = gelu(x_LD @ f['up'] + f['up_bias'])
    x_LD = norm(x_LD + hidden @ f['down'] + f['down_bias'], layer['ffn_norm'])
  t_LD = norm(gelu(x_LD @ p['transform'] + p['transform_bias']),
              p['transform_norm'])
  return softmax(t_LD @ embed['tokens'].T + p['head']['bias'])


def test_fillings_are_those_of_a_bert_in_numpy(wordpiece, capsys):
  evaluation = asked(wordpiece, '|||'.join(PROMPTS))
  found = evaluations.run('fill_mask', evaluation)['prompts']
  rows = ['[CLS] paris is the [MASK] of france [SEP]',
          '[CLS] a [MASK] city [MASK] [SEP]']
  lines = []
  for prompt, text, row in zip(found, PROMPTS, rows):
    assert prompt['prompt'] == text
    ids = np.array([VOCAB.index(word) for word in row.split()])
    expected = bert(evaluation.params, ids)[ids == VOCAB.index('[MASK]')]
    assert len(prompt['masks']) == len(expected)
    for fillings, p_V in zip(prompt['masks'], expected):
      best = np.argsort(-p_V)[:5]
      assert [filling['id'] for filling in fillings] == best.tolist()
      assert [filling['text'] for filling in fillings] == [
          VOCAB[i] for i in best]
      np.testing.assert_allclose(
          [filling['probability'] for filling in fillings], p_V[best],
          atol=1e-5)
      lines += [f'{p_V[i]:.4f}  {VOCAB[i]}' for i in best]
  shown = capsys.readouterr().out
  assert [line.strip() for line in shown.splitlines()
          if line.startswith('  ')] == lines
  assert 'mask 2 of 2:' in shown and 'mask 1 of 1' not in shown


@pytest.mark.parametrize('prompt, said', [
    ('Paris is', "'Paris is' has no mask"),
    ('[MASK]|||a', "'a' has no mask"),
    ('[MASK] ' + 'a ' * 13 + 'a', 'has 17 tokens.*max_len 16')])
def test_a_prompt_that_cannot_be_filled_is_refused(wordpiece, prompt, said):
  with pytest.raises(RequestError, match=said):
    evaluations.run('fill_mask', asked(wordpiece, prompt))
  evaluations.run('fill_mask', asked(wordpiece, '[MASK] ' + 'a ' * 13))


def given(*names):
  """The flags of all tasks, of which a command line has `names`."""
  return {flag.name: types.SimpleNamespace(present=flag.name in names)
          for task in evals.TASKS.values() for flag in task.flags}


def test_a_flag_that_no_task_reads_is_refused():
  """Whichever it is: each asks for its task, or is refused without it."""
  for flag in {flag.name for task in evals.TASKS.values()
               for flag in task.flags}:
    readers = {name: own for name, task in evals.TASKS.items()
               for own in task.flags if own.name == flag}
    for name in readers:
      assert evals.asked_for([name], given(flag)) == {name: 'tasks'}
    asks = [name for name, own in readers.items() if own.asks]
    if asks:
      assert {*evals.asked_for(['routing'], given(flag))} == {'routing', *asks}
      continue
    with pytest.raises(RequestError, match=rf'--{flag} is read by') as e:
      evals.asked_for(['routing'], given(flag))
    assert all(name in str(e.value) for name in readers)


def test_a_task_that_a_run_has_not_is_refused_by_the_flag_that_asked():
  config = evaluations.config('gpt', 'causal')
  for flag, said in (
      ('tasks', 'leave labels out of --tasks$'),
      ('predictions', '--predictions asks for the task labels, and '
       "objective 'causal' learns no labels: leave --predictions out, or add")):
    with pytest.raises(RequestError, match=said):
      evals.check_task('labels', evaluations.flags(), config, None, flag)
