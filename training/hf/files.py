"""Files of weights: tensors by name, one at a time.

safetensors are mapped into memory, sharded ones through their index. A .bin
is a pickle, from which PyTorch takes tensors and refuses code (weights_only).
Whatever is wrong with a file is a RequestError that names it.
"""

from collections.abc import Collection, Iterable, Iterator
import json
import math
import pathlib
from typing import Any, NamedTuple
import zipfile

import numpy as np

from configs.errors import RequestError, require, short
from training.workdir import schema


# The types of weights that are read and written, and their names in
# safetensors.
DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
SAFE, BIN = 'model.safetensors', 'pytorch_model.bin'
INDEX = f'{SAFE}.index.json'  # of several files


class Files:
  """The tensors of a folder or a file: `name in files`, files[name], and
  files.cut(name, slices), which reads no more than that."""

  def __init__(self, path: pathlib.Path):
    self._open = {}
    self._file_of = {}
    for file, names in _find(path):
      if names is None:
        names = self._tensors(file).keys()
      self._file_of.update((name, file) for name in names)

  def __iter__(self):
    return iter(self._file_of)

  def __contains__(self, name: str) -> bool:
    return name in self._file_of

  def __getitem__(self, name: str) -> np.ndarray:
    file, tensors = self._holder(name)
    if file.suffix == '.bin':
      return _numpy(tensors[name])
    return tensors.get_tensor(name)

  def cut(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Returns `files[name][slices]`."""
    file, tensors = self._holder(name)
    if file.suffix == '.bin':
      return _numpy(tensors[name][slices])
    return tensors.get_slice(name)[slices]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, of which nothing else is read."""
    file, tensors = self._holder(name)
    if file.suffix == '.bin':
      return tuple(tensors[name].shape)
    return tuple(tensors.get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Returns a tensor's type: a name of numpy's, if it is one of DTYPES."""
    file, tensors = self._holder(name)
    if file.suffix == '.bin':
      return str(tensors[name].dtype).removeprefix('torch.')
    found = tensors.get_slice(name).get_dtype()
    return next((ours for ours, theirs in DTYPES.items() if theirs == found),
                found)

  def _holder(self, name: str):
    file = self._file_of[name]
    tensors = self._tensors(file)
    require(name in tensors.keys(),
            f'{file} has no {name}, though its index says so')
    return file, tensors

  def _tensors(self, file: pathlib.Path):
    if file not in self._open:
      self._open[file] = _open_bin(file) if file.suffix == '.bin' else (
          _open_safetensors(file))
    return self._open[file]


class Arrays(dict):
  """Arrays by name, which are read as the tensors of Files are."""

  def cut(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    return self[name][slices]

  def shape(self, name: str) -> tuple[int, ...]:
    return self[name].shape

  def dtype(self, name: str) -> str:
    return self[name].dtype.name


def _open_safetensors(file: pathlib.Path):
  import safetensors
  try:
    return safetensors.safe_open(file, 'numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise RequestError(
        f'{file} is no whole safetensors file: {error}') from error


def _open_bin(file: pathlib.Path):
  try:
    import torch
  except ImportError as error:
    raise RequestError(
        f'{file} is a pickle, which PyTorch reads: pip install '
        "'archetype[verify]', or have it as safetensors") from error
  try:
    found = torch.load(file, map_location='cpu', weights_only=True,
                       mmap=zipfile.is_zipfile(file))
  except Exception as error:  # torch raises several kinds of its own
    said = str(error).splitlines() or [type(error).__name__]
    raise RequestError(f'{file} holds more than tensors, or is damaged: '
                       f'{said[0]}') from error
  require(isinstance(found, dict) and all(
      isinstance(name, str) and isinstance(x, torch.Tensor)
      and x.layout == torch.strided for name, x in found.items()),
          f'{file} is no table of tensors by name')
  return found


def _numpy(tensor: Any) -> np.ndarray:
  import ml_dtypes
  import torch
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _find(path: pathlib.Path):
  """Yields (file, the names in it or None: ask the file)."""
  if path.is_file():
    require(path.suffix in ('.safetensors', '.bin'),
            f'{path} is neither .safetensors nor .bin')
    return [(path, None)]
  require(path.is_dir(), f'there is no folder or file {path}')
  for name in (SAFE, BIN):
    if (index := path / f'{name}.index.json').is_file():
      return _indexed(index)
    if (path / name).is_file():
      return [(path / name, None)]
  raise RequestError(f'{path} has no weights: looked for {SAFE}, {BIN}, and '
                     'either of them with .index.json')


def _indexed(index: pathlib.Path):
  tree = read_object(index)
  schema.check_shape(tree, {'weight_map': schema.Each(str)}, str(index))
  names = tree['weight_map']
  suffix = pathlib.Path(index.name.removesuffix('.index.json')).suffix
  by_file = {}
  for name, file in names.items():
    require(pathlib.PurePath(file).name == file,
            f'{index} names the file {file!r}: it must lie in that folder')
    require(pathlib.PurePath(file).suffix == suffix,
            f'{index} names the file {file!r}: it must be a {suffix}')
    by_file.setdefault(file, []).append(name)
  for file in by_file:
    require((index.parent / file).is_file(),
            f'{index.parent / file} is missing, though the index names it')
  return [(index.parent / file, found) for file, found in by_file.items()]


def read_object(path: pathlib.Path) -> dict:
  """Returns the object that a JSON file holds.

  Raises:
    RequestError: if it holds none.
  """
  tree = schema.parse(path.read_bytes(), str(path))
  schema.check_shape(tree, {}, str(path))
  return tree


class Kind(NamedTuple):
  """What is known of a tensor before it is there."""
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def shards(kinds: dict[str, Kind], shard_bytes: int) -> dict[str, list[str]]:
  """Returns the files that `write` makes, and the tensors of each."""
  parts: list[list[str]] = [[]]
  used = 0
  for name, kind in kinds.items():
    if parts[-1] and used + kind.nbytes > shard_bytes:
      parts.append([])
      used = 0
    parts[-1].append(name)
    used += kind.nbytes
  stem, suffix = SAFE.split('.')
  return {SAFE if len(parts) == 1 else
          f'{stem}-{i:05d}-of-{len(parts):05d}.{suffix}': names
          for i, names in enumerate(parts, 1)}


def written(kinds: dict[str, Kind], shard_bytes: int) -> list[str]:
  """Returns the names of all files that `write` makes."""
  files = [*shards(kinds, shard_bytes)]
  return files + [INDEX] * (len(files) > 1)


# What of a folder transformers may take for the weights of a model, or for how
# it is to be loaded.
LOADED = ('*.safetensors', '*.safetensors.index.json', 'pytorch_model*.bin',
          'pytorch_model*.bin.index.json', 'adapter_*', 'tf_model*.h5',
          'flax_model*.msgpack', 'generation_config.json')


def refuse_left(folder: pathlib.Path, written: Collection[str],
                patterns: Iterable[str] = LOADED) -> None:
  """Raises RequestError for files that would stay beside what is written.

  Args:
    folder: where to; it need not be there.
    written: the names of the files that are written.
    patterns: of names that matter.
  """
  left = sorted({str(file.relative_to(folder)) for pattern in patterns
                 for file in folder.glob(pattern)} - {*written})
  require(not left, f'{folder} holds {short(", ".join(left))}, which would '
          'stay and may be loaded with what is written: choose another '
          'folder, or remove them')


def write(folder: pathlib.Path, kinds: dict[str, Kind], tensors: Iterable,
          shard_bytes: int) -> None:
  """Writes `tensors`, pairs (name, array), as safetensors of `shard_bytes`.

  Args:
    folder: where to.
    kinds: by name, in the order in which `tensors` come.
    tensors: computed one by one, and written before the next.
    shard_bytes: no file is larger, unless one tensor is.
  """
  tensors = iter(tensors)
  files, index = shards(kinds, shard_bytes), {}
  for file, names in files.items():
    _write_file(folder / file, {name: kinds[name] for name in names}, tensors)
    index.update(dict.fromkeys(names, file))
  if len(files) > 1:
    total = sum(kind.nbytes for kind in kinds.values())
    (folder / INDEX).write_text(json.dumps(
        dict(metadata=dict(total_size=total), weight_map=index), indent=2,
        sort_keys=True) + '\n')


def _write_file(path: pathlib.Path, kinds: dict[str, Kind],
                tensors: Iterator) -> None:
  """Writes one file: the header's length, the header, the tensors' bytes
  (https://github.com/safetensors/safetensors, "Format"; its own writer wants
  all tensors at once)."""
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, kind in kinds.items():
    start, end = end, end + kind.nbytes
    header[name] = dict(dtype=DTYPES[kind.dtype.name], shape=kind.shape,
                        data_offsets=[start, end])
  data = json.dumps(header, separators=(',', ':')).encode()
  data += b' ' * (-len(data) % 8)
  with path.open('wb') as file:
    file.write(len(data).to_bytes(8, 'little') + data)
    for name, kind in kinds.items():
      found, x = next(tensors)
      assert (found, x.shape, x.dtype) == (name, *kind), name
      file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
