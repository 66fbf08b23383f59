"""An export into a folder that is there leaves nothing that would be loaded
with it, or instead of it."""

import pytest

from configs.errors import RequestError
from tests.helpers import models
from training import weights
from training.hf import generation as hf_generation


@pytest.fixture(scope='module')
def made():
  return models.make('llama', lora=dict(rank=2, alpha=2.0, targets='query'))


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'pytorch_model-00001-of-00002.bin', 'tf_model.h5',
    'other.safetensors', 'model.safetensors.index.json', 'adapter_config.json',
    'generation_config.json'])
def test_weights_that_would_stay_are_refused(name, made, tmp_path):
  (tmp_path / name).touch()
  with pytest.raises(RequestError, match=f'holds .{name}.*would stay'):
    weights.to_hf(*made, tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_export_may_be_made_again(made, tmp_path):
  said = hf_generation.Generation({}, dict(eos_token_id=7))
  for shard_bytes in 10**9, 20_000:
    folder = tmp_path / str(shard_bytes)
    for _ in range(2):
      weights.to_hf(*made, folder, shard_bytes=shard_bytes, generation=said)
  assert len(list((tmp_path / '20000').glob('*.safetensors'))) > 1
  (tmp_path / '20000/README.md').touch()
  weights.to_hf(*made, tmp_path / '20000', shard_bytes=20_000, generation=said)
  with pytest.raises(RequestError, match='holds .model-00001-of'):
    weights.to_hf(*made, tmp_path / '20000', generation=said)
