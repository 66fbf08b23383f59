"""A system is its page and its config: two files, and no other edit.

docs/howto/add_a_system.md has what a newcomer would write for StableLM, a
decoder that is not here. The tests put its two files on the path of their
packages and find everything else in place.
"""

import dataclasses
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts.config import ModelConfig
from configs.errors import RequestError
from tests.architectures import pages_test
from tests.helpers import adding, models
from tests.training import step_test
from tools.compare import cost
from training import weights
from training.costs import totals
from training.hf import config as hf_config

DOC = pathlib.Path(__file__).parents[1] / 'docs/howto/add_a_system.md'
PAGE, CONFIG = re.findall(r'^```py\n(.*?)^```', DOC.read_text(), re.M | re.S)
# https://huggingface.co/stabilityai/stablelm-3b-4e1t, "Model Architecture".
PUBLISHED = 2_795_443_200


@pytest.fixture(scope='module', autouse=True)
def system(tmp_path_factory):
  with adding.files(tmp_path_factory.mktemp('added'), {
      'architectures/stablelm.py': PAGE, 'configs/stablelm.py': CONFIG}):
    yield


@pytest.fixture(scope='module')
def made(system):
  return models.make('stablelm')


def config(size='tiny'):
  return importlib.import_module('configs.stablelm').get_config(size)


def test_it_is_found_by_name_and_among_the_choices():
  assert 'stablelm' in architectures.systems()
  assert 'stablelm' in architectures.files('decoder')
  for said in ('choose from .*, mixtral, .*, stablelm', 'mean .stablelm.?'):
    with pytest.raises(RequestError, match=f"model.arch 'stablelmm'.*{said}"):
      architectures.build(models.config('gpt', arch='stablelmm'))
  # And in other choices, of which it is one by its stack.
  with pytest.raises(RequestError, match='no rules for .*mixtral, .*stablelm'):
    architectures.build(models.config('bert', parametrization='mup',
                                      mup_base_width=16))


def test_its_page_says_what_every_page_must():
  pages_test.test_a_page_names_the_parts_that_its_config_has('stablelm')
  pages_test.test_a_system_is_its_page_and_its_config('stablelm')
  pages_test.test_names_are_of_parameters_and_axes_of_the_legend('stablelm')
  pages_test.test_a_record_names_nothing_that_is_not_there('stablelm')


def test_it_is_counted():
  figures = totals.count(config('3b'))
  assert figures['parameters'] == PUBLISHED
  assert sys.modules['configs.stablelm'].PUBLISHED == {'3b': PUBLISHED}
  # Two for each weight of a matrix (the embedding is looked up) and for each
  # product with a key or a value, half of which are seen; in training thrice.
  width, layers, keys = 2560, 32, (4096 + 1) / 2
  matrices = width * (50304 + layers * (4 * width + 3 * 6912))
  assert figures['flops_per_token']['training'] == pytest.approx(
      3 * 2 * (matrices + layers * 2 * width * keys), rel=1e-6)


def test_it_is_causal_and_the_scan_is_the_loop(made):
  module, params = made
  tokens_BL = models.tokens()
  logits = models.logits(module, params, tokens_BL)
  later = tokens_BL.at[:, 9:].set((tokens_BL[:, 9:] + 1) % models.VOCAB)
  changed = models.logits(module, params, later)
  np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
  assert (jnp.abs(logits - changed)[:, 9:].max(-1) > 1e-4).all()
  loop = architectures.build(
      dataclasses.replace(module.config, scan_layers=False))
  models.close(logits, models.logits(loop, params, tokens_BL))


@pytest.mark.long
def test_a_step_on_eight_devices_is_the_step_on_one():
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.config('stablelm')
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(state.params, alone.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
  assert jax.device_count() == 8


def test_weights_go_out_and_come_back(made, tmp_path):
  module, params = made
  weights.to_hf(module, params, tmp_path)
  again, found = weights.from_hf(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  hf_config.check_same(module.config, again.config, 'read back')
  assert isinstance(again.config, ModelConfig)
  with pytest.raises(RequestError, match='use_qkv_bias True: only False'):
    hf_config.read(hf_config.write(module.config) | dict(use_qkv_bias=True))


def test_its_memory_is_planned_without_a_compiler():
  one, eight = (cost.bytes_per_device(config('3b'), n) for n in (1, 8))
  assert one['parameters'] == 4 * PUBLISHED
  assert sum(one.values()) > sum(eight.values()) > 0


@pytest.mark.slow
def test_transformers_computes_its_logits(made, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  module, params = made
  weights.to_hf(module, params, tmp_path)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, dtype=torch.float32, attn_implementation='eager')
  tokens_BL = models.tokens()
  with torch.no_grad():
    logits = theirs(torch.as_tensor(np.asarray(tokens_BL)).long()).logits
  models.close(jnp.asarray(logits.numpy()),
               models.logits(module, params, tokens_BL))
