"""What a reference was given and gave back, in memory and as one file.

The recordings are the cases: the name of a file is SYSTEM-CASE, and the
config.json of the model is in it.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / 'data'
HALF = ml_dtypes.bfloat16  # the weights are of this precision, stored so


@dataclasses.dataclass
class Recording:
  """One case of one system.

  Attributes:
    config: its config.json.
    weights: tensors by their Hugging Face names.
    inputs: token numbers and the like, by name.
    outputs: what the reference makes of them, by name.
    grads: of compare.objective, by Hugging Face name.
    greedy: {row: the tokens that follow that row's prompt}; may be empty.
    layers: what each stack's embedding gives and each layer returns.
    attention: by name, the attention weights of each layer.
  """
  config: dict
  weights: dict[str, np.ndarray]
  inputs: dict[str, np.ndarray]
  outputs: dict[str, np.ndarray]
  grads: dict[str, np.ndarray]
  greedy: dict[str, np.ndarray]
  layers: list[np.ndarray] = dataclasses.field(default_factory=list)
  attention: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


_PARTS = ('weights', 'inputs', 'outputs', 'grads', 'greedy')


def save_recording(recording: Recording, path: pathlib.Path) -> None:
  from safetensors.numpy import save_file
  tensors = {f'{part}/{name}': np.ascontiguousarray(value)
             for part in _PARTS
             for name, value in getattr(recording, part).items()}
  for name, value in tensors.items():
    if name.startswith('weights/') and value.dtype.kind == 'f':
      tensors[name] = value.astype(HALF)
      assert (tensors[name].astype(value.dtype) == value).all(), name
  save_file(tensors, path, metadata=dict(config=json.dumps(recording.config)))


def files(system: str = '') -> list[pathlib.Path]:
  """Returns the recordings, of one system or of all."""
  return sorted((FOLDER / 'parity').glob(f'{system or "*"}-*.safetensors'))


def systems() -> list[str]:
  return list(dict.fromkeys(path.stem.partition('-')[0] for path in files()))


def load_insides(recording: Recording, path: pathlib.Path) -> Recording:
  """Returns the recording with the layers and attention weights of a file."""
  from safetensors.numpy import load_file
  arrays = load_file(path)
  count = sum(name.startswith('layers/') for name in arrays)
  return dataclasses.replace(
      recording, layers=[arrays[f'layers/{n}'] for n in range(count)],
      attention={name.removeprefix('attention/'): x
                 for name, x in arrays.items() if 'attention/' in name})


def load_recording(path: pathlib.Path) -> Recording:
  import safetensors
  parts = {part: {} for part in _PARTS}
  with safetensors.safe_open(path, 'numpy') as file:
    meta = file.metadata()
    for key in file.keys():
      part, _, name = key.partition('/')
      value = file.get_tensor(key)
      parts[part][name] = (value.astype(np.float32) if value.dtype == HALF
                           else value)
  return Recording(json.loads(meta['config']), **parts)
