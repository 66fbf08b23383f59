"""Weights in the Hugging Face format, in and out: training/hf/weights.py.

  module, params = weights.from_hf(folder)
  weights.to_hf(module, params, folder)
"""

from training.hf.weights import from_hf, to_hf

__all__ = ['from_hf', 'to_hf']
