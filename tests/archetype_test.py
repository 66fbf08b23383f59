"""The Python API: what it gives is what the module computes."""

import dataclasses
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import archetype
from configs.errors import RequestError
from tests.helpers import evaluations
from tests.helpers import models
from tools import convert
from training import weights
from training.evals import checkpoint
from training.evals.tasks import embed
from training.hf import generation as hf_generation

WITH_RUNS = ['gpt', 'bert', 't5', 'mixtral']


def _model(system='gpt', **changes):
  module, params = models.make(system, **changes)
  return archetype.Model(module, params)


@pytest.fixture(scope='module')
def gpt():
  return _model()


def test_a_model_is_shown_in_a_line(gpt):
  count = sum(x.size for x in jax.tree.leaves(gpt.params))
  assert repr(gpt) == (f'Model(gpt, {count:,} parameters of float32, computed '
                       'in float32)')


def test_logits_are_the_modules(gpt):
  tokens_BL = models.tokens(2, 7)
  np.testing.assert_allclose(
      gpt(tokens_BL), models.logits(gpt.module, gpt.params, tokens_BL),
      atol=1e-6)
  np.testing.assert_array_equal(gpt(list(range(5))), gpt([list(range(5))]))


def test_the_last_hidden_state_leads_to_the_logits(gpt):
  """By the final norm and the tied table, written out in numpy."""
  tokens_BL = models.tokens(2, 7)
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
  short_1L, long_1L = models.tokens(1, 5), models.tokens(1, 9)
  long_1L = long_1L.at[:, :5].set(short_1L)
  mask = [[1] * 5 + [0] * 4]
  np.testing.assert_allclose(gpt(long_1L, mask=mask)[:, :5], gpt(short_1L),
                             atol=1e-5)
  weights = gpt.attention_weights(long_1L, mask=mask)
  np.testing.assert_allclose(weights[..., :5, :5],
                             gpt.attention_weights(short_1L), atol=1e-6)


@pytest.mark.long
def test_an_encoder_decoder_has_both_stacks():
  model = _model('t5', num_layers=3)
  source, target = models.tokens(2, 9), models.tokens(2, 6, seed=2)
  states = model.hidden_states(source, target)
  assert states['encoder'].shape == (4, 2, 9, 32)
  assert states['decoder'].shape == (3, 2, 6, 32)
  weights = model.attention_weights(source, target)
  assert {name: w.shape for name, w in weights.items()} == {
      'encoder': (3, 2, 4, 9, 9), 'decoder': (2, 2, 4, 6, 6),
      'cross': (2, 2, 4, 6, 9)}


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system != 'gpt')) for system in WITH_RUNS])
def test_a_folder_and_a_run_are_loaded_as_they_were_saved(system, tmp_path):
  model = _model(system)
  tokens_BL = models.tokens(2, 6)
  model.save(tmp_path / 'hf')
  folder = archetype.load(tmp_path / 'hf')
  np.testing.assert_allclose(folder(tokens_BL), model(tokens_BL), atol=1e-5)
  assert folder.tokenizer is None
  convert.import_(tmp_path / 'hf', epath.Path(tmp_path / 'run'), partial=False,
                  seed=0)
  run = archetype.load(tmp_path / 'run')
  assert jax.tree.all(jax.tree.map(
      lambda a, b: bool((a == b).all()), folder.params, run.params))
  assert run.run.model.arch == run.config.arch == model.config.arch
  assert run.decode(run.encode('ab')) == 'ab'


def test_a_folder_is_saved_with_its_labels_and_what_it_says(tmp_path):
  module, params = models.make('bert', head='sequence', num_labels=3)
  said = hf_generation.Generation(
      dict(pad_token_id=5), dict(eos_token_id=[7, 9], temperature=0.6))
  weights.to_hf(module, params, tmp_path / 'one', generation=said,
                labels=('neg', 'neu', 'pos'))
  archetype.load(tmp_path / 'one').save(tmp_path / 'two')
  one, two = ({file.name: json.loads(file.read_text())
               for file in (tmp_path / name).glob('*.json')}
              for name in ('one', 'two'))
  assert one == two and two['config.json']['pad_token_id'] == 5
  assert two['config.json']['id2label']['2'] == 'pos'
  assert two['generation_config.json']['eos_token_id'] == [7, 9]


@pytest.mark.long
def test_a_part_is_swapped_and_the_rest_stays(gpt):
  same = gpt.with_parts(norm='layernorm')
  assert same.drawn == () and same.config == gpt.config
  gated = gpt.with_parts(ffn='swiglu', seed=3)
  assert gated.drawn == ('decoder/layers/block_0/ffn/gate',
                         'decoder/layers/block_0/ffn/gate_bias')
  old, new = (m.params['decoder']['layers']['block_0'] for m in (gpt, gated))
  np.testing.assert_array_equal(new['ffn']['up'], old['ffn']['up'])
  again = gpt.with_parts(ffn='swiglu', seed=4)
  assert (again.params['decoder']['layers']['block_0']['ffn']['gate']
          != new['ffn']['gate']).any()
  bare = gpt.with_parts(position='none')
  assert bare.drawn == () and 'positions' not in bare.params['embed']
  assert gpt.with_parts(num_layers=1).config.num_decoder_layers == 1
  fewer = gpt.with_parts(num_kv_heads=2)
  assert 'decoder/layers/block_0/attention/key' in fewer.drawn


@pytest.mark.long
def test_a_model_is_built_as_a_run_begins():
  model = archetype.build('configs/gpt.py:tiny', seed=3, num_layers=1,
                          d_model=32, num_heads=2)
  expected = jax.jit(model.module.init)(
      jax.random.key(3), jnp.zeros((1, 1), jnp.int32))['params']
  models.close(model.params, jax.tree.map(
      lambda x: x.value, expected, is_leaf=lambda x: hasattr(x, 'value')))
  again = archetype.build(model.config, seed=3)
  models.close(again.params, model.params)
  assert model.config.num_layers == 1


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_logits():
  model = archetype.build('configs/gpt.py:tiny', num_layers=1)
  text = model.generate('Peace', max_new_tokens=3, temperature=0)
  start = np.concatenate(
      [[model.tokenizer.separator_id], model.tokenizer.encode('Peace')])
  row = list(start)
  for _ in range(3):
    row.append(int(np.argmax(model(row)[0, -1])))
  assert text == model.decode(row[len(start):])
  options = dict(max_new_tokens=3, temperature=0)
  assert model.generate(['Peace'], **options) == [text]
  assert text and model.generate('Peace', stop=text + '!', **options) == text


@pytest.mark.long
def test_a_folder_begins_and_ends_a_text_as_it_says(tmp_path):
  module, params = models.make(vocab_size=384)
  weights.to_hf(module, params, tmp_path, generation=hf_generation.Generation(
      {'bos_token_id': 7}, None))
  model = archetype.load(tmp_path, tokenizer='bytes')
  row = [7, *model.tokenizer.encode('Peace')]
  for _ in range(3):
    row.append(int(np.argmax(model(row)[0, -1])))
  options = dict(max_new_tokens=3, temperature=0)
  assert model.generate('Peace', **options) == model.decode(row[-3:])
  (tmp_path / 'generation_config.json').write_text(
      json.dumps(dict(bos_token_id=7, eos_token_id=[255, row[-2]])))
  ends = archetype.load(tmp_path, tokenizer='bytes')
  assert ends.generate('Peace', **options) == model.decode(
      row[-3:-3 + row[-3:].index(row[-2])])
  # And so does a run that was imported from it, in Python and for eval.py.
  convert.import_(tmp_path, epath.Path(tmp_path / 'run'), partial=False, seed=0)
  run = archetype.load(tmp_path / 'run')
  assert run.generate('Peace', **options) == ends.generate('Peace', **options)
  evaluation = checkpoint.load(
      epath.Path(tmp_path / 'run'), [], evaluations.flags(
          prompt='Peace', max_new_tokens=3, temperature=0.0), step=None,
      text='', programs={})
  written, = evaluations.run('samples', evaluation)['samples']
  assert written['text'] == ends.generate('Peace', **options)
  looked = evaluations.run('inspect', evaluation)
  assert looked['tokens']['decoder'][0] == '\\x07'
  assert embed.laid_out([('', 'a')], evaluation)[0].tolist() == [7, 97]
  trained = dataclasses.replace(evaluation, step=1)
  assert embed.laid_out([('', 'a')], trained)[0].tolist() == [258, 97]
  looked = evaluations.run('inspect', trained)
  assert looked['tokens']['decoder'][0] == '[EOS]'


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
    'field': (lambda m: m.with_parts(nrom='rmsnorm'), "'norm'"),
    'field of a group': (lambda m: m.with_parts(rope=dict(theat=1.0)),
                         "'theta'"),
    'unread': (lambda m: m.with_parts(rope=dict(theta=5e5)),
               'model.position is rope'),
    'size': (lambda m: m.with_parts(d_model=64), 'build a model'),
    'input': (lambda m: m([[1]], types=[[1]]), 'tokens, mask'),
    'id': (lambda m: m([[3, 61]]), 'has the id 61, .* are 0 to 60'),
    'id below 0': (lambda m: m.inspect([0, -1]), 'has the id -1, '),
    'id that is cut off': (lambda m: m(np.array([2**32 + 5])),
                           'has the id 4294967301, '),
    'no token': (lambda m: m(_bytes(m).encode('')), 'tokens is '),
    'rows': (lambda m: m([[1, 2], [3]]), r'tokens is \[\[1, 2\], \[3\]\]: '),
    'fraction': (lambda m: m([1.7]), 'tokens has numbers of float64'),
    'text': (lambda m: m.hidden_states('abc'), "tokens is 'abc': "),
    'mask': (lambda m: m([[1, 2]], mask=[[1]]),
             r'mask is of the shape \(1, 1\), and tokens of \(1, 2\)'),
    'padding at the start': (lambda m: m([[1, 1], [3, 4]],
                                         mask=[[1, 0], [0, 1]]),
                             'mask has a 0 before a 1 in row 1: '),
    'several texts': (lambda m: _bytes(m).encode(['a', 'b']),
                      r"text is \['a', 'b'\]: pass one text"),
    'dotted field': (lambda m: m.with_parts(**{'rope.theta': 5e5}),
                     r"'rope.theta' is written rope=dict\(theta=...\)"),
    'dotted field of a build': (
        lambda m: archetype.build('configs/gpt.py:tiny',
                                  **{'model.rope.theta': 5e5}),
        r"'model.rope.theta' is written rope=dict\(theta=...\)"),
    'field of a build': (lambda m: archetype.build('configs/gpt.py:tiny',
                                                   nrom='rmsnorm'),
                         "Did you mean 'norm'"),
    'top': (lambda m: m.inspect([1], top=-1), 'top is -1'),
    'length': (lambda m: m.count(-3), 'length is -3'),
    'no text': (lambda m: _bytes(m).generate('\ud800'), 'the prompt is not'),
    'id of a text': (lambda m: _bytes(m).generate('A'),
                     'the prompt has the id 258, '),
    'no prompt': (lambda m: _bytes(m).generate([]), 'prompts is \\[\\]'),
    'a prompt of ids': (lambda m: _bytes(m).generate([[1, 2]]), 'prompts is '),
    'no new token': (lambda m: _bytes(m).generate('A', max_new_tokens=0),
                     'max_new_tokens is 0: it must be at least 1'),
    'no string': (lambda m: _bytes(m).generate('A', stop=['']), "stop is"),
    'no tokenizer': (lambda m: m.generate('A'), 'without a tokenizer'),
    'no model': (lambda m: archetype.load('no/such/folder'), 'no/such/folder'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_a_wrong_request_is_a_sentence(name, gpt):
  call, part = REFUSALS[name]
  with pytest.raises(RequestError, match='(?s).*' + part):
    call(gpt)


def test_ids_and_masks_that_are_traced_go_through(gpt):
  ids, mask = models.tokens(1, 5), jnp.array([[1, 1, 1, 1, 0]])
  traced = jax.jit(lambda ids, mask: gpt.hidden_states(ids, mask=mask))(
      ids, mask)
  np.testing.assert_allclose(traced, gpt.hidden_states(ids, mask=mask),
                             atol=1e-5)


def test_a_layer_that_there_is_not_is_an_error(gpt):
  """JAX would return the last one."""
  ids = models.tokens(1, 5)
  assert gpt.attention_weights(ids)[1].shape == (1, 4, 5, 5)
  for layers in (gpt.attention_weights(ids), gpt.hidden_states(ids)):
    assert layers.dtype == np.float32
    with pytest.raises(IndexError):
      layers[gpt.config.num_layers + 1]
  half = _model(dtype='bfloat16').hidden_states(ids)
  assert half.dtype == np.float32


def test_a_folder_of_several_models_and_one_of_a_part_say_so(tmp_path):
  (tmp_path / 'sweep.json').write_text('{}')
  with pytest.raises(RequestError, match='is a sweep .* points/NAME/seed-S'):
    archetype.load(tmp_path)
  (tmp_path / 'study.json').write_text('{}')
  (tmp_path / 'sweeps/points/base/seed-1/checkpoints').mkdir(parents=True)
  with pytest.raises(RequestError, match=r'is a study .*base/seed-1 \(there'):
    archetype.load(tmp_path)
  adapter = tmp_path / 'adapter'
  adapter.mkdir()
  (adapter / 'adapter_config.json').write_text('{}')
  with pytest.raises(RequestError, match='WORKDIR --adapter=.*adapter$'):
    archetype.load(adapter)


def test_ids_of_a_target_are_checked_too():
  with pytest.raises(RequestError, match='decoder_tokens has the id 61'):
    _model('t5')([1], [61])
  with pytest.raises(RequestError, match='decoder_tokens has 2 rows'):
    _model('t5')([1], [[1], [2]])


def test_an_encoder_writes_no_text():
  for model in (_model('bert'),
                _model('llama', head='sequence', num_labels=3)):
    with pytest.raises(RequestError, match='writes no text'):
      _bytes(model).generate('A')
