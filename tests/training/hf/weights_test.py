"""Weights in Hugging Face's format: what goes in comes out, or is refused."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from architectures.parts.hf import tensor_map
from configs.errors import RequestError
from tests.helpers import models
from tools import convert
from training import paths
from training.step import abstract_params
from training.hf import config as hf_config, files as hf_files
from training.hf import generation as hf_generation, weights
from training.workdir import run_config


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  folder = tmp_path_factory.mktemp('gpt')
  module, params = models.make('gpt', num_layers=3)
  weights.to_hf(module, params, folder)
  return module, params, folder


def _edit(folder, tmp_path, **changes):
  """Returns a copy of `folder` whose config.json has other fields."""
  tree = json.loads((folder / 'config.json').read_text()) | changes
  (tmp_path / 'config.json').write_text(json.dumps(tree))
  (tmp_path / hf_files.SAFE).write_bytes((folder / hf_files.SAFE).read_bytes())
  return tmp_path


def _random(module):
  """Parameters without an initialisation, which would have to be compiled."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(draw.random(x.shape, np.float32)),
      nn.meta.unbox(abstract_params(module)))


@pytest.mark.slow
@pytest.mark.parametrize('system', models.FEW)
def test_import_of_an_export_is_the_model(system, tmp_path):
  # A file does not tell a prefix from a period that comes once.
  periods = dict(num_layers=7) if system == 'kimi_linear' else {}
  module = architectures.build(models.config(
      system, d_ff=128, head_dim=8, moe=dict(eval_capacity_factor=0.0),
      **periods))
  params = _random(module)
  weights.to_hf(module, params, tmp_path)
  again, found = weights.from_hf(tmp_path)
  _equal(found, params)
  hf_config.check_same(module.config, again.config, 'read back')


def test_rows_count_through_the_blocks_of_a_period():
  shapes = {f'decoder/layers/block_{b}/attention_norm/scale': (3, 8)
            for b in range(2)}
  rows = (('decoder/layers/attention_norm/scale', 'D', 'h.{n}.ln', 'D'),)
  found = {(t.paths[0], t.index[0]): t.name
           for t in tensor_map.expand(rows, shapes)}
  assert found == {
      (f'decoder/layers/block_{n % 2}/attention_norm/scale', n // 2):
      f'h.{n}.ln' for n in range(6)}


@pytest.mark.parametrize('axes, read', [
    ('H3K D', 3), ('3HK D', 3), ('HK3 D', 9)])
def test_axes_split_and_join(axes, read):
  sizes = {'H': 2, 'K': 3, 'D': 4, '3': 3}
  tensor = tensor_map.Tensor(
      'x', axes, ('q', 'k', 'v'), ('DHK',) * 3, (), sizes)
  theirs = np.arange(72).reshape(18, 4)
  whole = {a: (0, n) for a, n in sizes.items()}
  q, k, v = (tensor.part(lambda at: theirs[at], i, whole) for i in range(3))
  assert q.shape == (4, 2, 3)
  row = {'H3K D': 1 * 9 + 1 * 3 + 2, '3HK D': 1 * 6 + 1 * 3 + 2,
         'HK3 D': 1 * 9 + 2 * 3 + 1}[axes]
  assert k[1, 1, 2] == theirs[row, 1]  # head 1, key, feature 2
  np.testing.assert_array_equal(tensor.join([q, k, v]), theirs)
  # Of one head and half of D, only its rows and columns are asked for.
  asked = []
  def cut(at):
    asked.append(theirs[at].shape)
    return theirs[at]
  np.testing.assert_array_equal(
      tensor.part(cut, 1, whole | dict(H=(1, 2), D=(2, 4))), k[2:, 1:])
  assert asked == [(read, 2)]


def test_shards_are_written_and_read(gpt, tmp_path):
  module, params, _ = gpt
  weights.to_hf(module, params, tmp_path, shard_bytes=20_000)
  files = list(tmp_path.glob('model-*.safetensors'))
  assert len(files) > 2
  assert all(sum(x.nbytes for x in load_file(f).values()) <= 20_000
             or len(load_file(f)) == 1 for f in files)
  _equal(weights.from_hf(tmp_path)[1], params)
  files[0].unlink()
  with pytest.raises(ValueError, match=f'{files[0].name} is missing'):
    weights.from_hf(tmp_path)


def test_an_index_may_not_point_elsewhere(gpt, tmp_path):
  _edit(gpt[2], tmp_path)
  (tmp_path / f'{hf_files.SAFE}.index.json').write_text(
      json.dumps({'weight_map': {'a': '../a.safetensors'}}))
  with pytest.raises(ValueError, match='must lie in that folder'):
    weights.from_hf(tmp_path)


def test_a_damaged_file_is_refused(gpt, tmp_path):
  _edit(gpt[2], tmp_path)
  data = (tmp_path / hf_files.SAFE).read_bytes()
  (tmp_path / hf_files.SAFE).write_bytes(data[:len(data) // 2])
  with pytest.raises(ValueError, match='no whole safetensors file'):
    weights.from_hf(tmp_path)


@pytest.mark.parametrize('changes, words', [
    (dict(activation_function='mish'), "activation_function 'mish'.*gelu"),
    (dict(scale_attn_by_inverse_layer_idx=True), 'only False is known'),
    (dict(rotary_dim=64), 'rotary_dim 64'),
    (dict(model_type='rwkv'), "'rwkv'.*choose from"),
    (dict(n_embd=64), r'is \(61, 32\) in the files and \(61, 64\)'),
    (dict(n_layer=2), 'h.2.* has no place in the model'),
    (dict(n_layer=4), 'the files have no transformer.h.3'),
])
def test_what_cannot_be_honoured_is_refused_by_name(gpt, tmp_path, changes,
                                                    words):
  with pytest.raises(ValueError, match=words):
    weights.from_hf(_edit(gpt[2], tmp_path, **changes))


@pytest.mark.parametrize('system, moe', [
    ('switch', dict(eval_capacity_factor=2.0)),
    ('gshard', dict(eval_capacity_factor=0.5, group_size=16)),
    ('mixtral', dict(eval_capacity_factor=1.0)),
])
def test_experts_that_drop_tokens_are_not_exported_as_if_they_did_not(system,
                                                                      moe):
  moe = dict(num_experts=8, capacity_factor=1.0) | moe
  read = lambda **fields: architectures.resolve(
      models.config(system, head_dim=8, moe=moe | fields))
  with pytest.raises(ValueError, match='eval_capacity_factor.*--dropless'):
    hf_config.write(read())
  hf_config.write(read(eval_capacity_factor=0.0))
  most = 8.0 if system == 'switch' else 4.0  # room for every token
  hf_config.write(read(eval_capacity_factor=most))


def test_old_names_and_tied_copies(gpt, tmp_path):
  module, params, folder = gpt
  _edit(folder, tmp_path)
  tensors = {name.removeprefix('transformer.'): value for name, value in
             load_file(tmp_path / hf_files.SAFE).items()}
  tensors['h.0.attn.bias'] = np.ones((1, 1, 32, 32), np.float32)
  tensors['lm_head.weight'] = tensors['wte.weight']
  save_file(tensors, tmp_path / hf_files.SAFE)
  _equal(weights.from_hf(tmp_path)[1], params)
  tensors['lm_head.weight'] = tensors['wte.weight'] + 1
  save_file(tensors, tmp_path / hf_files.SAFE)
  with pytest.raises(ValueError, match='lm_head.weight .*differs'):
    weights.from_hf(tmp_path)


def test_partial_lists_what_it_skips(gpt, tmp_path):
  module, params, folder = gpt
  _edit(folder, tmp_path)
  tensors = load_file(tmp_path / hf_files.SAFE)
  del tensors['transformer.ln_f.bias']
  save_file(tensors | {'score': np.ones(3, np.float32)},
            tmp_path / hf_files.SAFE)
  loaded = weights.read_params(module, hf_files.Files(tmp_path), partial=True)
  assert len(loaded.skipped) == 2
  assert any('score' in line for line in loaded.skipped)
  assert any('decoder/final_norm/bias' in line for line in loaded.skipped)
  flat, old = paths.flatten(loaded.params), paths.flatten(params)
  assert not flat.pop('decoder/final_norm/bias').any()
  old.pop('decoder/final_norm/bias')
  _equal(flat, old)


class _Code:
  def __reduce__(self):
    return print, ('code of a pickle was run',)


def test_a_pickle_gives_tensors_and_runs_no_code(gpt, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  _edit(gpt[2], tmp_path)
  tensors = load_file(tmp_path / hf_files.SAFE)
  (tmp_path / hf_files.SAFE).unlink()
  torch.save({k: torch.as_tensor(v) for k, v in tensors.items()},
             tmp_path / hf_files.BIN)
  _equal(weights.from_hf(tmp_path)[1], gpt[1])
  torch.save({'x': _Code()}, tmp_path / hf_files.BIN)
  with pytest.raises(ValueError, match='holds more than tensors'):
    weights.from_hf(tmp_path)
  assert 'was run' not in capsys.readouterr().out


def test_convert_there_and_back(gpt, tmp_path):
  _, _, folder = gpt
  tree = json.loads((folder / 'config.json').read_text())
  source = _edit(folder, _folder(tmp_path / 'in'), **tree)
  convert.import_(source, tmp_path / 'run', partial=False, seed=0)
  config = run_config.load_config(tmp_path / 'run')
  assert architectures.resolve(config.model).num_layers == 3
  with pytest.raises(ValueError, match='holds a run already'):
    convert.import_(source, tmp_path / 'run', partial=False, seed=0)


def _folder(path):
  path.mkdir()
  return path


def test_weights_in_bfloat16(gpt, tmp_path):
  module, params, folder = gpt
  weights.to_hf(module, params, tmp_path, dtype='bfloat16')
  assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == (
      'bfloat16')
  _equal(weights.from_hf(tmp_path)[1], jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
  module, found = weights.from_hf(folder, dtype='bfloat16')
  assert module.config.param_dtype == 'bfloat16'
  _equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'pytorch_model-00001-of-00002.bin', 'tf_model.h5',
    'other.safetensors', 'model.safetensors.index.json', 'adapter_config.json',
    'generation_config.json'])
def test_weights_that_would_stay_are_refused(name, gpt, tmp_path):
  (tmp_path / name).touch()
  with pytest.raises(RequestError, match=f'holds .{name}.*would stay'):
    weights.to_hf(*gpt[:2], tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_export_may_be_made_again(gpt, tmp_path):
  said = hf_generation.Generation({}, dict(eos_token_id=7))
  for shard_bytes in 10**9, 20_000:
    folder = tmp_path / str(shard_bytes)
    for _ in range(2):
      weights.to_hf(*gpt[:2], folder, shard_bytes=shard_bytes, generation=said)
  assert len(list((tmp_path / '20000').glob('*.safetensors'))) > 1
  (tmp_path / '20000/README.md').touch()
  weights.to_hf(*gpt[:2], tmp_path / '20000', shard_bytes=20_000,
                generation=said)
  with pytest.raises(RequestError, match='holds .model-00001-of'):
    weights.to_hf(*gpt[:2], tmp_path / '20000', generation=said)
