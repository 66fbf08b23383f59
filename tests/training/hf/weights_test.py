"""Weights in Hugging Face's format: what goes in comes out, or is refused in
one sentence and at once."""

import gc
import json
import re
import time
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from architectures import bert
from architectures.parts import hf, layers, paths
from architectures.parts.hf import tensor_map
from common.errors import RequestError
from tests.helpers import models
from tests.parity import recording
from training import runs
from training.distributed import devices
from training.hf import config as hf_config, files as hf_files
from training.hf import generation as hf_generation, weights


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _refused(call, *words):
  """Checks that `call` fails in one sentence, at once, with these words."""
  start = time.process_time()
  with pytest.raises(RequestError) as caught:
    call()
  message = str(caught.value)
  assert len(message.splitlines()) == 1 and len(message) < 900, message
  for word in words:
    assert word in message, message
  assert time.process_time() - start < 5, message


@pytest.fixture(scope='module')
def gpt(tmp_path_factory):
  folder = tmp_path_factory.mktemp('gpt')
  module, params = jax.device_get(models.make_model('gpt', num_layers=3))
  weights.to_hf(module, params, folder)
  return module, params, folder


def _edit(folder, tmp_path, **changes):
  """Returns a copy of `folder` whose config.json has other fields."""
  tree = json.loads((folder / 'config.json').read_text()) | changes
  (tmp_path / 'config.json').write_text(json.dumps(tree))
  (tmp_path / hf_files.SAFE).write_bytes((folder / hf_files.SAFE).read_bytes())
  return tmp_path


# Rows of one tensor of theirs: the parameters by path and axes, and its axes.
ROWS = [
    ({'q|k|v': (4, 2, 3)}, 'DHK', 'H3K D'),
    ({'q|k|v': (4, 2, 3)}, 'DHK', 'HK3 D'),
    # Grouped heads in one matrix, as Phi-3 has them.
    ({'q': (5, 4, 3), 'k': (5, 2, 3), 'v': (5, 2, 3)}, 'DHK|DJK|DJK',
     'HK+JK+JK D'),
    # Filters as torch.nn.Conv1d has them.
    ({'v': (4, 3, 5), 'k': (4, 1, 2)}, 'WHK|WJU', 'HK+JU 1 W'),
    # As Kimi Linear has the decays of heads.
    ({'a': (4, 3)}, 'HK', '1 1 K 1 H'),
    # As Qwen3-Next has them: of each group its query, key and values.
    ({'q': (5, 2, 3), 'k': (5, 2, 3), 'v': (5, 6, 2)}, 'DJK|DJK|DHU',
     'J(K+K+RU) D')]


@pytest.mark.parametrize('shapes, axes, theirs', ROWS, ids=lambda x: str(x))
def test_parts_of_a_tensor_join_to_it(shapes, axes, theirs):
  """Each place of theirs goes to one of ours and back, and a part of an axis is
  read as that part of the whole; a slice of theirs is all that is asked for."""
  shapes = {name: shape for names, shape in shapes.items()
            for name in names.split('|')}
  row = ('|'.join(shapes), axes, 'x', theirs)
  tensor, = tensor_map.map_tensors([row], shapes)
  x = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
  whole = [{a: (0, n) for a, n in zip(letters, shapes[path])}
           for letters, path in zip(tensor.ours, tensor.paths)]
  parts = [tensor.read_parameter(lambda at: x[at], i, ranges)
           for i, ranges in enumerate(whole)]
  assert [part.shape for part in parts] == [*shapes.values()]
  assert sorted(np.concatenate([part.ravel() for part in parts])) == list(
      range(x.size))
  np.testing.assert_array_equal(tensor.join_parameters(parts), x)
  for i, ranges in enumerate(whole):
    for axis, (_, size) in ranges.items():
      if size == 1:
        continue
      asked = []
      def cut(at, asked=asked):
        asked.append(x[at].size)
        return x[at]
      part = tensor.read_parameter(cut, i, ranges | {axis: (1, size)})
      place = tensor.ours[i].index(axis)
      np.testing.assert_array_equal(
          part, np.take(parts[i], range(1, size), axis=place))
      assert asked[0] <= x.size


def test_a_number_that_a_model_has_not_has_no_tensor():
  row = 'norm/alpha', '', 'alpha', ''
  assert tensor_map.count_tensors([row], {'norm/alpha': ()}) == 1
  assert tensor_map.count_tensors([row], {}) == 0
  with pytest.raises(RequestError, match='no Hugging Face name for norm/beta:'):
    tensor_map.map_tensors([row], {'norm/alpha': (), 'norm/beta': ()})


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


@pytest.mark.parametrize('changes, words', [
    (dict(activation_function='mish'), "activation_function 'mish'.*gelu"),
    (dict(scale_attn_by_inverse_layer_idx=True), 'only False is known'),
    (dict(tie_last_hidden_states=7), 'tie_last_hidden_states 7'),
    (dict(model_type='rwkv'), "'rwkv'.*choose from"),
    (dict(derived={}), 'the folder of a run, which --workdir takes'),
    (dict(n_embd=64), r'is \(61, 32\) in the files and \(61, 64\)'),
    (dict(n_layer=2), 'h.2.* has no place in the model'),
    (dict(n_layer=4), 'the files have no transformer.h.3'),
])
def test_what_cannot_be_honoured_is_refused_by_name(gpt, tmp_path, changes,
                                                    words):
  with pytest.raises(ValueError, match=words):
    weights.from_hf(_edit(gpt[2], tmp_path, **changes))


INDEX = hf_files.INDEX
DAMAGES = {
    'no JSON': ('config.json', '{"a": ', 'config.json is damaged'),
    'deep': ('config.json', '[' * 100_000, 'config.json is damaged'),
    'a list': ('config.json', '[]', 'must be an object'),
    'index empty': (INDEX, '{}', "it has no 'weight_map'"),
    'index to numbers': (INDEX, '{"weight_map": {"a": 1}}',
                         'must lie in that folder'),
    'index elsewhere': (INDEX, '{"weight_map": {"a": "../a.safetensors"}}',
                        'must lie in that folder'),
    'index above': (INDEX, '{"weight_map": {"a": ".."}}', 'is missing'),
    'text for weights': (hf_files.SAFE, 'x' * 100, 'no whole safetensors'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_malformed_folder_is_one_sentence(damage, gpt, tmp_path):
  file, content, words = DAMAGES[damage]
  folder = _edit(gpt[2], tmp_path)
  (folder / file).write_text(content)
  _refused(lambda: weights.from_hf(folder), words)


class _Code:
  def __reduce__(self):
    return print, ('code of a pickle was run',)


def test_a_pickle_gives_tensors_and_runs_no_code(gpt, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  folder = _edit(gpt[2], tmp_path)
  good = {k: torch.as_tensor(v)
          for k, v in load_file(folder / hf_files.SAFE).items()}
  (folder / hf_files.SAFE).unlink()
  torch.save(good, folder / hf_files.BIN)
  _equal(weights.from_hf(folder)[1], gpt[1])
  for content, words in (
      ({'x': _Code()}, 'holds more than tensors'), ({'a': 1}, 'no table'),
      ({'a': torch.ones(2, 2).to_sparse()}, 'no table'),
      ({k: v.to(torch.int8) for k, v in good.items()}, 'is of type int8')):
    torch.save(content, folder / hf_files.BIN)
    _refused(lambda: weights.from_hf(folder), words)
  assert 'was run' not in capsys.readouterr().out


@pytest.mark.parametrize('dtype, words', [
    (np.int8, 'I8'), (np.float64, 'F64'),
    (ml_dtypes.float8_e4m3fn, 'F8_E4M3')])
def test_a_tensor_that_is_no_array_of_weights_is_refused(dtype, words, gpt,
                                                         tmp_path):
  folder, name = _edit(gpt[2], tmp_path), 'transformer.h.1.ln_1.bias'
  tensors = load_file(folder / hf_files.SAFE)
  tensors[name] = tensors[name].astype(dtype)
  # A mask of old files, which is not read, may be of whole numbers.
  tensors['transformer.h.0.attn.bias'] = np.ones((1, 1, 8, 8), np.uint8)
  save_file(tensors, folder / hf_files.SAFE)
  _refused(lambda: weights.from_hf(folder), f'{name} is of type {words}')
  _refused(lambda: weights.from_hf(folder, partial=True), f'{name} is of type')


def test_an_export_that_would_overflow_is_refused(gpt, tmp_path):
  params = jax.tree.map(lambda x: x * 1e7, gpt[1])
  call = lambda dtype: weights.to_hf(gpt[0], params, tmp_path / 'out',
                                     dtype=dtype)
  _refused(lambda: call('float16'), 'float16 ends at 65504')
  assert not (tmp_path / 'out').exists()
  call('bfloat16')


@pytest.mark.parametrize('system, moe', [
    ('switch', dict(eval_capacity_factor=2.0)),
    ('gshard', dict(eval_capacity_factor=0.5, group_size=16)),
    ('mixtral', dict(eval_capacity_factor=1.0)),
])
def test_experts_that_drop_tokens_are_not_exported_as_if_they_did_not(system,
                                                                      moe):
  moe = dict(num_experts=8, capacity_factor=1.0) | moe
  read = lambda **fields: architectures.resolve(
      models.small_config(system, head_dim=8, moe=moe | fields))
  with pytest.raises(ValueError, match='eval_capacity_factor.*--dropless'):
    hf_config.config_json_of_model(read())
  hf_config.config_json_of_model(read(eval_capacity_factor=0.0))
  most = 8.0 if system == 'switch' else 4.0  # room for every token
  hf_config.config_json_of_model(read(eval_capacity_factor=most))


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


class CountedFiles(hf_files.Files):
  """Files that count the bytes that are read of them."""
  num_bytes = 0

  def cut(self, name, slices):
    part = super().cut(name, slices)
    self.num_bytes += part.nbytes
    return part


def peak_memory(function):
  """Returns the most bytes that a function held at a time, and its result."""
  tracemalloc.start()
  result = function()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return peak, result


@pytest.mark.long
def test_host_memory_of_an_import_is_a_tensor_and_shards(tmp_path, monkeypatch):
  """The experts of all layers are one parameter, over eight devices whose
  memory is not the host's; every byte is read once."""
  module = architectures.build(models.small_config(
      'mixtral', d_model=128, d_ff=512, num_layers=4, vocab_size=384,
      moe=dict(num_experts=8, d_ff=512)))
  params = jax.device_put(
      models.draw_parameters(runs.parameter_shapes(module)))
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  largest = max(sizes)
  slack = 600_000  # names, headers, and what JAX itself holds

  weights.to_hf(module, params, tmp_path)
  files = CountedFiles(tmp_path)
  tensor = max(4 * np.prod(files.shape(name)) for name in files)
  assert 8 * tensor <= largest < sum(sizes) / 3

  # JAX's copy of a shard is its own, and the host's is let go of at once.
  put = jax.device_put

  def put_and_let_go(x, to):
    y = jax.block_until_ready(put(x, to, may_alias=False))
    gc.collect()
    return y
  monkeypatch.setattr(jax, 'device_put', put_and_let_go)
  mesh = devices.make_mesh(dict(data=1, fsdp=8, expert=1, context=1, tensor=1))
  boxed = runs.abstract_params(module)
  shardings = devices.param_shardings(boxed, mesh, 'default')
  like = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      nn.meta.unbox(boxed), shardings)
  weights.read_params(module, CountedFiles(tmp_path), like=like)  # warm

  # The shard that is filled, and up to three that JAX has not let go of; on a
  # busy machine it lets go of them later, so the least of three counts.
  peaks = []
  for files in [CountedFiles(tmp_path) for _ in range(3)]:
    peak, loaded = peak_memory(lambda files=files: weights.read_params(
        module, files, like=like))
    peaks.append(peak)
  assert min(peaks) < 5 * largest / 8 + tensor + slack < largest
  assert files.num_bytes == sum(4 * np.prod(files.shape(n)) for n in files)
  _equal(loaded.params, params)


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
  flat = paths.flatten_by_path(loaded.params)
  old = paths.flatten_by_path(params)
  assert not flat.pop('decoder/final_norm/bias').any()
  old.pop('decoder/final_norm/bias')
  _equal(flat, old)


def test_layers_whose_differences_are_not_of_their_depth_are_refused(tmp_path):
  module, params = models.make_model('diffllama', num_layers=8)
  with pytest.raises(ValueError, match='of layer 4 is 0.2.*a diffllama config'):
    weights.to_hf(module, params, tmp_path)


def test_weights_in_bfloat16(gpt, tmp_path):
  module, params, folder = gpt
  weights.to_hf(module, params, tmp_path, dtype='bfloat16')
  assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == (
      'bfloat16')
  _equal(weights.from_hf(tmp_path)[1], jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
  module, imported = weights.from_hf(folder, dtype='bfloat16')
  assert module.config.param_dtype == 'bfloat16'
  _equal(imported, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize('name', [
    'pytorch_model-00001-of-00002.bin', 'adapter_config.json'])
def test_weights_that_would_stay_are_refused(name, gpt, tmp_path):
  (tmp_path / name).touch()
  with pytest.raises(RequestError, match=f'holds .{name}.*would stay'):
    weights.to_hf(*gpt[:2], tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_export_may_be_made_again(gpt, tmp_path):
  how = hf_generation.Generation({}, dict(eos_token_id=7))
  for shard_bytes in 10**9, 20_000:
    folder = tmp_path / str(shard_bytes)
    for _ in range(2):
      weights.to_hf(*gpt[:2], folder, shard_bytes=shard_bytes, generation=how)
  assert len(list((tmp_path / '20000').glob('*.safetensors'))) > 1
  (tmp_path / '20000/README.md').touch()
  weights.to_hf(*gpt[:2], tmp_path / '20000', shard_bytes=20_000,
                generation=how)
  with pytest.raises(RequestError, match='holds .model-00001-of'):
    weights.to_hf(*gpt[:2], tmp_path / '20000', generation=how)


@pytest.mark.parametrize('system', [
    system for system in recording.systems()
    if hf.MASKED_WORD_HEAD in architectures.hugging_face(system).optional])
def test_what_an_encoder_may_lack_is_known_by_the_names_of_its_tensors(system):
  page = architectures.hugging_face(system)
  parts = {}
  for path, _, tensor, _ in page.names:
    first = re.split('[/_]', path)[0]
    for part, pattern in page.optional.items():
      if re.fullmatch(pattern, tensor):
        parts.setdefault(part, set()).add(first)
  expected = {hf.MASKED_WORD_HEAD: {'transform', 'head'}}
  if isinstance(page, bert.TwoTasks):
    expected['pooler'] = {'pooler'}
    second_task, = set(page.optional) - {'pooler', hf.MASKED_WORD_HEAD}
    expected[second_task] = {'nsp'}
  if system == 'electra':
    expected['head of replaced tokens'] = {'detector'}
  assert parts == expected


@pytest.mark.parametrize('system', ['t5', 'mt5', 'umt5'])
def test_networks_of_one_form_have_the_same_tensors(system):
  """Whatever function their hidden units go through."""
  page = architectures.hugging_face(system)
  _, _, words = page.fields['ffn']
  names = {True: set(), False: set()}
  for ffn in words.values():
    config = architectures.resolve(models.small_config(system, ffn=ffn))
    names[layers.FFNS[ffn].gated].add(tuple(page.rows_of_model(config)))
  assert all(len(rows) <= 1 for rows in names.values())


@pytest.mark.parametrize('field', [True, False])
def test_the_head_of_an_mt5_is_tied_where_it_has_no_tensor(field, tmp_path):
  """Whatever tie_word_embeddings says, as in transformers, which does not scale
  the logits of either."""
  module, params = jax.device_get(models.make_model('mt5'))
  weights.to_hf(module, params, tmp_path / 'whole')
  folder = _edit(tmp_path / 'whole', tmp_path, tie_word_embeddings=field)
  untied, its_params = weights.from_hf(folder)
  assert not untied.config.tie_embeddings
  _equal(its_params, params)

  tensors = load_file(folder / hf_files.SAFE)
  del tensors['lm_head.weight']
  save_file(tensors, folder / hf_files.SAFE)
  tied, its_params = weights.from_hf(folder)
  assert tied.config.tie_embeddings and tied.config.logits_scale == 1
  del params['head']
  _equal(its_params, params)
