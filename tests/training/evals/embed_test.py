"""eval.py --tasks=embed: what a vector is of, and that a text's neighbours in
the file do not change it."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from architectures.parts.moe.layer import without_capacity
from configs.errors import RequestError
from tests.helpers import evaluations
from tests.helpers import models
from training.evals.tasks import embed

TEXTS = ('a', 'quick brown', 'jumps', 'over the', 'dog and cat', 'away')
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


def asked(tmp_path, kind, texts=TEXTS, **options):
  system, objective, fields, *_ = KINDS[kind]
  (tmp_path / 'texts.txt').write_text('\n'.join(texts) + '\n')
  return evaluations.make(
      evaluations.config(system, objective, **fields),
      texts=str(tmp_path / 'texts.txt'), vectors=str(tmp_path / 'out.npy'),
      **options)


def written(tmp_path, evaluation, texts=TEXTS):
  (tmp_path / 'texts.txt').write_text('\n'.join(texts) + '\n')
  figures = evaluations.run('embed', evaluation)
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
@pytest.mark.parametrize('kind', KINDS)
def test_a_vector_is_pooled_of_the_text_alone(tmp_path, kind):
  """In a batch with longer texts, too: padding is neither seen nor counted. A
  decoder's separator sees nothing of the text, and is not counted either."""
  evaluation = asked(tmp_path, kind)
  skipped = len(KINDS[kind][3]) if kind != 'encoder' else 0
  pools = {'mean': lambda x: x[skipped:].mean(0), 'last': lambda x: x[-1]}
  if kind not in ('decoder', 'experts'):
    pools['first'] = lambda x: x[skipped]
  own = {i: states(evaluation, kind, TEXTS[i]) for i in (0, 4)}
  for name, pool in pools.items():
    evaluation.options.pooling = name
    together_ND = written(tmp_path, evaluation)
    for i, x_LD in own.items():
      np.testing.assert_allclose(together_ND[i], pool(x_LD), atol=3e-6,
                                 err_msg=f'{name} of {TEXTS[i]!r}')
  evaluation.options.pooling = 'mean'
  together_ND = written(tmp_path, evaluation)
  alone_ND = np.concatenate([
      written(tmp_path, evaluation, [text]) for text in TEXTS])
  models.close(together_ND, alone_ND, rtol=1e-6)


@pytest.mark.slow
def test_a_model_of_masked_diffusion_reads_a_text_as_in_training(tmp_path):
  """It never saw [CLS] and [SEP]: a document begins after a separator."""
  evaluation = asked(tmp_path, 'encoder')
  texts = [('a.txt, line 1', 'ab')]
  row, = embed.laid_out(texts, evaluation)
  assert row.tolist() == [260, *b'ab', 261]
  evaluation.run.config.objective = 'masked_diffusion'
  row, = embed.laid_out(texts, evaluation)
  assert row.tolist() == [258, *b'ab']


@pytest.mark.parametrize('name, content, said', [
    ('a.txt', b'a\n\nb', 'a.txt, line 2, is empty'),
    ('a.txt', b'a\n  \t\n', 'a.txt, line 2, is empty'),
    ('a.txt', b'', 'which is empty'),
    ('a.txt', b'a\n\xff', 'line 2, is not UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n\n', 'a.jsonl, line 2, is empty'),
    ('a.jsonl', b'{"text": "a"}\n{"text": " "}', 'line 2, is empty'),
    ('a.jsonl', b'{"txt": "a"}', "line 1, is no JSON object with a field 'te"),
    ('a.jsonl', b'["a"]', 'line 1, is no JSON object'),
    ('a.jsonl', b'{"text": 3}', "line 1, field 'text', is 3, not a string"),
    ('a.jsonl', b'{', 'line 1, is broken JSON')])
def test_a_line_without_a_text_is_refused(tmp_path, name, content, said):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(RequestError, match=said):
    embed.read(str(tmp_path / name))
