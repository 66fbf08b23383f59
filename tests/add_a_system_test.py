"""A system is its page and its config: two files, and no other edit.

docs/howto/add_a_system.md has what a newcomer would write for StableLM, a
decoder that is not here. The tests put its two files on the path of their
packages and find everything else in place.
"""

import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

import architectures
from common.errors import RequestError
from tests.architectures import laws_test, pages_test
from tests.helpers import adding, models
from training.costs import totals
from training.hf import weights

DOC = pathlib.Path(__file__).parents[1] / 'docs/howto/add_a_system.md'
PAGE, CONFIG = re.findall(r'^```py\n(.*?)^```', DOC.read_text(), re.M | re.S)
# https://huggingface.co/stabilityai/stablelm-3b-4e1t, "Model Architecture".
PUBLISHED = 2_795_443_200


@pytest.fixture(scope='module', autouse=True)
def system(tmp_path_factory):
  with adding.files(tmp_path_factory.mktemp('added'), {
      'architectures/stablelm.py': PAGE, 'configs/stablelm.py': CONFIG}):
    yield


def test_it_is_among_the_choices_and_counted():
  with pytest.raises(RequestError, match='choose from .*, mixtral, .*, stablelm'
                     '.*mean .stablelm.?'):
    architectures.build(models.small_config('gpt', arch='stablelmm'))
  config = importlib.import_module('configs.stablelm').get_config('3b')
  assert totals.count_costs(config)['parameters'] == PUBLISHED
  pages_test.test_a_page_names_the_parts_that_its_config_has('stablelm')
  pages_test.test_a_record_names_nothing_that_is_not_there('stablelm')


@pytest.mark.slow
def test_it_obeys_the_laws():
  laws_test.check_laws(*models.make_model('stablelm'))


@pytest.mark.slow
def test_its_weights_go_out_and_come_back_and_transformers_reads_them(tmp_path):
  module, params = models.make_model('stablelm')
  weights.to_hf(module, params, tmp_path)
  _, imported = weights.from_hf(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, imported, params)
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, dtype=torch.float32, attn_implementation='eager')
  tokens_BL = models.random_tokens()
  with torch.no_grad():
    logits = theirs(torch.as_tensor(np.asarray(tokens_BL)).long()).logits
  models.assert_trees_close(logits.numpy(), jax.jit(
      lambda params: models.logits(module, params, tokens_BL))(params))
