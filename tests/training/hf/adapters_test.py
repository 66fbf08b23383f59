"""Low-rank adapters on their way: a run starts from a model without them, is
merged, and is written and read in PEFT's format. PEFT itself is compared by
`make verify` (tests/parity/lora.py)."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import architectures
from architectures.parts import paths
from common.errors import RequestError
from tests.helpers import evaluations, models
from tools import convert
from training import parameters, runs
from training.hf import peft, weights
from training.workdir import run_config

LORA = dict(rank=2, alpha=4.0, targets='all-linear')


@pytest.fixture(scope='module')
def made():
  module, params = models.make_model('llama', vocab_size=384, num_layers=1)
  return module, jax.device_get(params)


@pytest.fixture(scope='module')
def folder(made, tmp_path_factory):
  folder = tmp_path_factory.mktemp('plain')
  weights.to_hf(*made, folder)
  return folder


@pytest.fixture(scope='module')
def imported(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('imported') / 'run'
  convert.import_model(folder, workdir, partial=False, seed=0)
  return workdir


def start(source, workdir, lora):
  """Returns (run, parameters) of a run that starts from `source`."""
  config = run_config.load_config(workdir).copy_and_resolve_references()
  with config.unlocked():
    config.init_from = str(source)
    config.model.lora.update(lora)
  run = runs.build(config, architectures.resolve(config.model),
                   evaluations.one_device_mesh())
  return run, parameters.create_state(run, config.init_from).params


@pytest.fixture(scope='module')
def started(imported):
  return start(imported, imported, LORA)


def test_a_run_starts_from_a_model_without_adapters(
    made, folder, imported, started):
  """Of Hugging Face's format and of a workdir: the weights are theirs, A is
  drawn and B is zero."""
  for _, params in (start(folder, imported, LORA), started):
    jax.tree.map(np.testing.assert_array_equal, weights.remove_adapters(params),
                 made[1])
    flat = paths.flatten_by_path(params)
    names = [path for path in flat if weights.is_adapter(path)]
    assert len(names) == 2 * 7
    assert all(flat[path].any() == path.endswith('a') for path in names)


@pytest.mark.slow
@pytest.mark.long
def test_merged_it_is_a_model_like_any_other(imported, started, tmp_path):
  """By `export`, from which other runs start: the same logits to the rounding
  of float32. Its adapters are not those that it was drawn with, which do
  nothing."""
  run, params = started
  params = jax.tree_util.tree_map_with_path(
      lambda path, x, new: (
          new if weights.is_adapter(paths.path_to_string(path)) else x),
      params, models.draw_parameters(params))
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.init_from = ''
  convert._write_workdir(tmp_path / 'run', config, params, None, True, '')
  tokens = models.random_tokens()
  logits = lambda module, params: jax.device_get(jax.jit(
      lambda params: models.logits(module, params, tokens))(params))
  want = logits(run.module, params)
  convert.export(tmp_path / 'run', tmp_path / 'hf', step=None)
  plain, merged = weights.from_hf(tmp_path / 'hf')
  assert plain.config.lora.rank == 0
  models.assert_trees_close(want, logits(plain, merged), rtol=1e-5)
  _, other = start(tmp_path / 'hf', imported, dict(LORA, rank=3))
  jax.tree.map(np.testing.assert_array_equal, weights.remove_adapters(other),
               merged)
  _, same = start(tmp_path / 'run', imported, LORA)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  with pytest.raises(RequestError, match='begin with its export'):
    start(tmp_path / 'run', imported, dict(LORA, rank=3))


@pytest.mark.parametrize('system, targets', [
    ('llama', 'all-linear'), ('mixtral', 'key,out'), ('t5', 'query,value'),
    # With experts in one tensor; whose parts are counted as layers, of which
    # some alone have an adapter.
    ('llama4', 'query,out'), ('nemotron_h', 'up,down'),
    # Whose first layer lacks products.
    pytest.param('kimi_linear', 'all-linear', marks=pytest.mark.long),
    ('gpt', 'out,up,down')])
def test_pefts_format_there_and_back(system, targets, tmp_path):
  module, params = models.make_model(
      system, lora=dict(rank=3, alpha=6.0, targets=targets))
  size = peft.write_adapters(module.config, params, tmp_path, 'base')
  model, tree = peft.read_adapters(weights.without_adapters(module.config),
                                   tmp_path)
  assert weights.same_adapters(model, module.config)
  flat = {path: x for path, x in paths.flatten_by_path(params).items()
          if weights.is_adapter(path)}
  assert size == sum(x.size for x in flat.values())
  tree = paths.flatten_by_path(tree)
  assert tree.keys() == flat.keys()
  for path, x in flat.items():
    np.testing.assert_array_equal(x, tree[path])


def test_pefts_names_and_the_order_of_its_axes(tmp_path):
  module, params = models.make_model('llama', lora=LORA, num_kv_heads=2)
  peft.write_adapters(module.config, params, tmp_path, 'base')
  tensors = load_file(tmp_path / peft.WEIGHTS)
  flat = paths.flatten_by_path(params)
  name = 'base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight'
  layer = 'decoder/layers/block_0/attention/'
  np.testing.assert_array_equal(
      tensors[name.format('k', 'A')], flat[f'{layer}key_lora_a'][1].T)
  np.testing.assert_array_equal(  # [heads * size, rank]
      tensors[name.format('k', 'B')],
      flat[f'{layer}key_lora_b'][1].reshape(2, -1).T)
  np.testing.assert_array_equal(
      tensors[name.format('o', 'A')],
      flat[f'{layer}out_lora_a'][1].reshape(-1, 2).T)
  tree = json.loads((tmp_path / peft.CONFIG).read_text())
  assert (tree['r'], tree['lora_alpha'], tree['task_type']) == (
      2, 4, 'CAUSAL_LM')
  assert len(tree['target_modules']) == 2 * 7


def test_an_adapter_is_named_as_the_layer_that_it_adapts(tmp_path):
  """Of a Mamba-2 and its network, a Mamba-2 alone, another with a network, and
  attention with one, the networks are the parts 1, 4 and 6."""
  module, params = models.make_model('nemotron_h', num_layers=4,
                                     lora=LORA | dict(
      targets='down'))
  peft.write_adapters(module.config, params, tmp_path, 'base')
  names = {name.partition('.lora_')[0] for name in load_file(
      tmp_path / peft.WEIGHTS)}
  assert names == {f'base_model.model.model.layers.{n}.mixer.down_proj'
                   for n in (1, 4, 6)}


@pytest.mark.parametrize('change, words', [
    (dict(use_dora=True), 'has use_dora True: only False is known'),
    (dict(r='8'), "r of .*adapter_config.json is '8', of type str: it must be"),
    (dict(r=float('inf')), 'r of .* is inf, of type float: it must be of type'),
    (dict(r=0), 'r of .* is 0: it must be >= 1'),
    (dict(lora_alpha=10**400), 'lora_alpha of .* is a number of about 398 dig'),
    (dict(lora_alpha=float('inf')), 'lora_alpha of .* is inf: it must be > 0'),
    (dict(lora_dropout='x'), "lora_dropout of .* is 'x', of type str: it must"),
    (dict(r=5), r'lora_A.weight is \(2, 32\) in the files and \(5, 32\) in'),
    *((dict(init_lora_weights=init), f"has init_lora_weights '{init}'")
      for init in ('pissa_niter_4', 'OLoRA')),
    # Of a tensor.
    (np.float32('nan'), r'lora_.\.weight has a value that is no finite number'),
    (np.float32('inf'), r'lora_.\.weight has a value that is no finite number'),
    (np.int32(1), r'lora_.\.weight is of type I32: weights are read from')])
def test_an_adapter_of_another_kind_is_refused(change, words, tmp_path):
  module, params = models.make_model('llama', lora=LORA)
  peft.write_adapters(module.config, params, tmp_path, 'base')
  file = tmp_path / peft.CONFIG
  if isinstance(change, dict):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
  else:
    tensors = load_file(tmp_path / peft.WEIGHTS)
    tensors[max(tensors)] = np.full(tensors[max(tensors)].shape, change)
    save_file(tensors, tmp_path / peft.WEIGHTS)
  with pytest.raises(RequestError, match=words):
    peft.read_adapters(weights.without_adapters(module.config), tmp_path)


@pytest.mark.parametrize('system, fields, words', [
    ('llama', {}, 'no low-rank adapters: its model.lora.rank is 0'),
    ('gpt', dict(head='sequence', num_labels=2, lora=LORA),
     "model.head is 'sequence': the adapters alone would leave out the head")])
def test_a_model_without_adapters_of_its_own_writes_none(
    system, fields, words, tmp_path):
  config = architectures.resolve(models.small_config(system, **fields))
  with pytest.raises(RequestError, match=words):
    peft.write_adapters(config, {}, tmp_path / 'folder', 'base')
  assert not (tmp_path / 'folder').exists()


def test_each_adapter_is_there_and_there_is_no_other(tmp_path):
  module, params = models.make_model('llama', lora=LORA)
  peft.write_adapters(module.config, params, tmp_path, 'base')
  plain = weights.without_adapters(module.config)
  file = tmp_path / peft.WEIGHTS
  tensors = load_file(file)
  first = min(tensors)

  missing = {name: x for name, x in tensors.items() if name != first}
  save_file(missing, file)
  with pytest.raises(RequestError, match=f'has no {re.escape(first)}, though'):
    peft.read_adapters(plain, tmp_path)
  save_file(tensors | {'other.lora_A.weight': tensors[first]}, file)
  with pytest.raises(RequestError, match='has other.lora_A.weight, which is'):
    peft.read_adapters(plain, tmp_path)
  save_file({'other.lora_A.weight': tensors[first]}, file)
  with pytest.raises(RequestError, match="no product of model.arch 'llama'"):
    peft.read_adapters(plain, tmp_path)
  (tmp_path / peft.CONFIG).unlink()
  with pytest.raises(RequestError, match='is missing: it says what the adapt'):
    peft.read_adapters(plain, tmp_path)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(tmp_path):
  """By alpha / sqrt(rank) (Kalajdzievski 2023), as PEFT scales them."""
  module, params = models.make_model('llama',
                                     lora=dict(LORA, rank=9, alpha=6.0))
  peft.write_adapters(module.config, params, tmp_path, 'base')
  file = tmp_path / peft.CONFIG
  file.write_text(json.dumps(
      json.loads(file.read_text()) | dict(use_rslora=True)))
  model, _ = peft.read_adapters(weights.without_adapters(module.config),
                                tmp_path)
  assert model.lora.scale == pytest.approx(6 / 9 ** 0.5)
  peft.write_adapters(model, params, tmp_path, 'base')
  again, _ = peft.read_adapters(weights.without_adapters(module.config),
                                tmp_path)
  assert again.lora.scale == model.lora.scale
