"""A GGUF file as a Hugging Face folder: transformers reads the one and writes
the other. Quantised weights are written as the float32 that they stand for.
"""

import importlib
import pathlib

import numpy as np

from configs.errors import RequestError, require
from training.workdir import storage


def write_folder(file: pathlib.Path, folder: pathlib.Path) -> int:
  """Writes config.json, the weights, the tokenizer and its chat template.

  Args:
    file: the GGUF file.
    folder: where to; made if it is not there.

  Returns:
    the number of parameters.

  Raises:
    RequestError: where a package is missing, for a file that transformers
      does not read, and for a folder that holds a run.
  """
  storage.refuse_run(folder, 'DIR')
  require(file.is_file(), f'{file} is no file')
  with open(file, 'rb') as start:
    require(start.read(4) == b'GGUF', f'{file} is no GGUF file: it does not '
            'begin with GGUF')
  try:
    importlib.import_module('gguf')  # which transformers imports late
    import torch
    import transformers
  except ImportError as error:
    raise RequestError('a GGUF file is read by the packages torch, '
                       "transformers and gguf: pip install 'archetype[verify]' "
                       'gguf') from error
  where = dict(pretrained_model_name_or_path=str(file.parent),
               gguf_file=file.name)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32)
  except (ValueError, KeyError) as error:
    raise RequestError(f'transformers does not read {file}: '
                       f'{str(error).splitlines()[0]}') from error
  # The weights are whole numbers no longer, and save_pretrained refuses what
  # still says so.
  model.hf_quantizer = None
  if hasattr(model.config, 'quantization_config'):
    del model.config.quantization_config
  # A GGUF file has 1e-5 as the float32 nearest to it, 9.9999997e-6.
  for name, value in vars(model.config).items():
    if isinstance(value, float):
      setattr(model.config, name, float(str(np.float32(value))))
  tokenizer.save_pretrained(folder)
  model.save_pretrained(folder)
  return sum(x.numel() for x in model.parameters())
