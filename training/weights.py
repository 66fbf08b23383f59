"""Weights in the Hugging Face format, in and out: training/hf/weights.py.

  module, params = weights.from_hf(folder)
  weights.to_hf(module, params, folder)

The first reads a folder, the second writes one.
"""

from training.hf.weights import from_hf, to_hf

__all__ = ['from_hf', 'to_hf']
