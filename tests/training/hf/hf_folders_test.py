"""Hugging Face folders that are malformed, or say what is not done here: each
is refused in one sentence and at once, or told."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from configs.errors import RequestError
from tests.helpers import models
from training.step import abstract_params
from training.hf import config as hf_config, files as hf_files, weights

INDEX = f'{hf_files.SAFE}.index.json'
# What a field may hold by mistake, of every type that JSON has.
WRONG = (
    '2', '', [], [1], {}, {'a': 1}, True, -1, 0, 1, 1.5, 10**9, 10**400,
    float('nan'), float('inf'), 'x' * 5000)


def _model(system, **changes):
  return models.config(system, **dict(dict(
      d_ff=128, head_dim=8, moe=dict(eval_capacity_factor=0.0)), **changes))


def _random(module):
  """Parameters without an initialisation, which would have to be compiled."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(draw.random(x.shape, np.float32)),
      nn.meta.unbox(abstract_params(module)))


def _write(folder, system, **changes):
  module = architectures.build(_model(system, **changes))
  weights.to_hf(module, _random(module), folder)
  return folder


def _refused(call, *words):
  """Checks that `call` fails in one sentence, at once, with these words."""
  start = time.process_time()
  with pytest.raises(RequestError) as caught:
    call()
  said = str(caught.value)
  assert len(said.splitlines()) == 1 and len(said) < 900, said
  for word in words:
    assert word in said, said
  assert time.process_time() - start < 5, said


@pytest.mark.parametrize('system', models.FEW)
def test_every_field_is_of_its_type_or_refused(system, monkeypatch):
  tree = hf_config.write(architectures.resolve(_model(system)))
  readers, make = [], hf_config.Reader.__init__
  def remember(self, *args):
    make(self, *args)
    readers.append(self)
  monkeypatch.setattr(hf_config.Reader, '__init__', remember)
  hf_config.read(tree)
  monkeypatch.undo()
  fields = [(r._name, name) for r in readers for name in sorted(r.asked)]
  assert len(fields) > 8
  refused = 0
  for section, name in fields:
    for value in WRONG:
      part = dict(tree.get(section) or {}) if section else dict(tree)
      part[name] = value
      try:
        hf_config.read(dict(tree, **{section: part}) if section else part)
      except RequestError as error:
        refused += 1
        said = str(error)
        assert '\n' not in said and len(said) < 900, said
  assert refused > 6 * len(fields)


DAMAGES = {
    'no JSON': ('config.json', '{"a": ', 'config.json is damaged'),
    'deep': ('config.json', '[' * 100_000, 'config.json is damaged'),
    'a list': ('config.json', '[]', 'must be an object'),
    'no text': ('config.json', b'\xff\xfe\x00', 'config.json is damaged'),
    'empty': ('config.json', '', 'config.json is damaged'),
    'index a list': (INDEX, '[]', 'must be an object'),
    'index empty': (INDEX, '{}', "it has no 'weight_map'"),
    'index null': (INDEX, '{"weight_map": null}', 'must be an object'),
    'index to numbers': (INDEX, '{"weight_map": {"a": 1}}', 'weight_map.a'),
    'index to nothing': (INDEX, '{"weight_map": {"a": ""}}', 'must be a'),
    'index to a text': (INDEX, '{"weight_map": {"a": "config.json"}}',
                        'must be a .safetensors'),
    'index above': (INDEX, '{"weight_map": {"a": ".."}}', 'must be a'),
    'empty weights': (hf_files.SAFE, '', 'no whole safetensors file'),
    'text for weights': (hf_files.SAFE, 'x' * 100, 'no whole safetensors'),
    'weights of nothing': (hf_files.SAFE, b'\x02' + bytes(7) + b'{}',
                           'the files have no'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_malformed_folder_is_one_sentence(damage, tmp_path):
  file, content, words = DAMAGES[damage]
  folder = _write(tmp_path, 'gpt')
  (folder / file).write_bytes(
      content if isinstance(content, bytes) else content.encode())
  if damage == 'weights of nothing':  # many lines, one for each tensor
    with pytest.raises(RequestError, match=words):
      weights.from_hf(folder)
  else:
    _refused(lambda: weights.from_hf(folder), words)


@pytest.mark.parametrize('content', [
    b'', b'x', 'list', 'numbers', 'names', 'sparse', 'int8'])
def test_a_malformed_pickle_is_one_sentence(content, tmp_path):
  torch = pytest.importorskip('torch')
  folder = _write(tmp_path, 'gpt')
  good = {k: torch.as_tensor(v)
          for k, v in load_file(folder / hf_files.SAFE).items()}
  (folder / hf_files.SAFE).unlink()
  if isinstance(content, bytes):
    (folder / hf_files.BIN).write_bytes(content)
  else:
    torch.save(dict(
        list=[1], numbers={'a': 1}, names={1: torch.ones(1)},
        sparse={'a': torch.ones(2, 2).to_sparse()},
        int8={k: v.to(torch.int8) for k, v in good.items()})[content],
               folder / hf_files.BIN)
  _refused(lambda: weights.from_hf(folder),
           'is of type int8' if content == 'int8' else hf_files.BIN)


@pytest.mark.parametrize('dtype, said', [
    (np.int8, 'I8'), (np.float64, 'F64'), (np.int32, 'I32'),
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3')])
def test_a_tensor_that_is_no_array_of_weights_is_refused(dtype, said,
                                                         tmp_path):
  folder, name = _write(tmp_path, 'gpt'), 'transformer.h.1.ln_1.bias'
  tensors = load_file(folder / hf_files.SAFE)
  tensors[name] = tensors[name].astype(dtype)
  # A mask of old files, which is not read, may be of whole numbers.
  tensors['transformer.h.0.attn.bias'] = np.ones((1, 1, 8, 8), np.uint8)
  save_file(tensors, folder / hf_files.SAFE)
  _refused(lambda: weights.from_hf(folder), f'{name} is of type {said}')
  _refused(lambda: weights.from_hf(folder, partial=True), f'{name} is of type')


def test_an_export_that_would_overflow_is_refused(tmp_path):
  module = architectures.build(_model('gpt'))
  params = jax.tree.map(lambda x: x * 1e6, _random(module))
  call = lambda dtype: weights.to_hf(module, params, tmp_path / 'out',
                                     dtype=dtype)
  _refused(lambda: call('float16'), 'float16 ends at 65504')
  assert not (tmp_path / 'out').exists()
  call('bfloat16')



@pytest.mark.parametrize('extra, read', [
    (dict(), (64, 2, 4)), (dict(num_attention_heads=8), (64, 2, 8)),
    (dict(num_hidden_layers=3), (64, 3, 4)), (dict(n_embed=32), (32, 2, 4)),
    (dict(n_embed=None), (64, 2, 4))])
def test_of_two_names_for_one_thing_transformers_own_counts(extra, read):
  """BloomConfig: its attribute_map, and n_embed in its __post_init__."""
  c = hf_config.read(dict(model_type='bloom', hidden_size=64, n_layer=2,
                          n_head=4) | extra)
  assert (c.d_model, c.num_layers, c.num_heads) == read
