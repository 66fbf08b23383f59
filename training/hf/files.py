"""Files of weights: tensors by name, one at a time.

safetensors are mapped into memory, sharded ones through their index. A .bin
is a pickle, from which PyTorch takes tensors and refuses code (weights_only).
Whatever is wrong with a file is a RequestError that names it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import json
import pathlib
from typing import Any
import zipfile

import numpy as np

from common.errors import RequestError, require, shorten
from training import hub
from training.workdir import storage

# The types of weights that are read and written, and their names in
# safetensors.
DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
_DTYPE_OF_SAFETENSORS = {theirs: ours for ours, theirs in DTYPES.items()}
SAFE = 'model.safetensors'
BIN = 'pytorch_model.bin'
INDEX = f'{SAFE}.index.json'  # of several files


class Files:
  """The tensors of a folder, of a file, or arrays by name: `name in files`, and
  files.cut(name, slices), which reads no more than that."""

  def __init__(self, source: pathlib.Path | Mapping[str, np.ndarray]):
    """Lists the tensors of a model without reading them.

    Args:
      source: the folder of the model or one of its files, or the tensors by
        name.
    """
    # _open has the tensors of each file that has been opened, _file_of the file
    # of each tensor. Tensors that are given are in a file called None.
    self._open: dict[Any, Any] = {}
    self._file_of: dict[str, Any] = {}
    if isinstance(source, Mapping):
      self._open[None] = source
      self._file_of.update(dict.fromkeys(source))
      return
    for file, names in _open_files(source):
      if names is None:
        names = self._tensors(file).keys()
      self._file_of.update(dict.fromkeys(names, file))

  def __iter__(self):
    return iter(self._file_of)

  def __contains__(self, name: str) -> bool:
    return name in self._file_of

  def __getitem__(self, name: str) -> np.ndarray:
    x = self._find(name)
    if isinstance(x, np.ndarray):
      return x
    return self._tensors(self._file_of[name]).get_tensor(name)

  def cut(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Returns `files[name][slices]`."""
    return self._find(name)[slices]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns a tensor's shape, of which nothing else is read."""
    x = self._find(name)
    if isinstance(x, np.ndarray):
      return x.shape
    return tuple(x.get_shape())

  def dtype(self, name: str) -> str:
    """Returns a tensor's type: a name of numpy's, if it is one of DTYPES."""
    x = self._find(name)
    if isinstance(x, np.ndarray):
      return x.dtype.name
    theirs = x.get_dtype()
    return _DTYPE_OF_SAFETENSORS.get(theirs, theirs)

  def _find(self, name: str) -> Any:
    """Returns an array, or what reads a part of a tensor of safetensors."""
    file = self._file_of[name]
    tensors = self._tensors(file)
    if name not in tensors.keys():
      raise RequestError(f'{file} has no {name}, though its index says so')
    if isinstance(tensors, Mapping):
      return tensors[name]
    return tensors.get_slice(name)

  def _tensors(self, file: Any) -> Any:
    """Returns the tensors of a file, which is opened once."""
    if file not in self._open:
      if file.suffix == '.bin':
        self._open[file] = _open_bin(file)
      else:
        self._open[file] = _open_safetensors(file)
    return self._open[file]


def _open_safetensors(file: pathlib.Path) -> Any:
  """Returns the tensors of a safetensors file, mapped into memory."""
  import safetensors
  try:
    return safetensors.safe_open(file, 'numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise RequestError(
        f'{file} is no whole safetensors file: {error}') from error


def _open_bin(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file that PyTorch has pickled.

  Args:
    file: a file of torch.save.

  Returns:
    {name: array}.

  Raises:
    RequestError: where PyTorch is not installed, or the file holds anything but
      tensors by name.
  """
  try:
    # PyTorch is an optional package.
    import torch
  except ImportError as error:
    raise RequestError(
        f'{file} is a pickle, which PyTorch reads: pip install '
        "'archetype[verify]', or have it as safetensors") from error
  try:
    # weights_only: torch refuses a pickle that would run code.
    tensors = torch.load(file, map_location='cpu', weights_only=True,
                         mmap=zipfile.is_zipfile(file))
  except Exception as error:  # torch raises several kinds of its own
    lines = str(error).splitlines() or [type(error).__name__]
    raise RequestError(f'{file} holds more than tensors, or is damaged: '
                       f'{lines[0]}') from error
  # The content must be {name: a dense array}.
  no_table = RequestError(f'{file} is no table of tensors by name')
  if not isinstance(tensors, dict):
    raise no_table
  arrays = {}
  for name, x in tensors.items():
    is_tensor = isinstance(name, str) and isinstance(x, torch.Tensor)
    if not is_tensor or x.layout != torch.strided:
      raise no_table
    arrays[name] = _as_numpy(x.detach())
  return arrays


def _as_numpy(tensor: Any) -> np.ndarray:
  """Returns a tensor of PyTorch's as an array in the same memory."""
  import ml_dtypes
  import torch
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _open_files(path: pathlib.Path) -> list[tuple[pathlib.Path, Any]]:
  """Finds the weight files of a model.

  Args:
    path: the folder of the model, or one .safetensors or .bin file.

  Returns:
    (file, names of its tensors) for each file. The names are None if there is
    no index, so that the file must be opened to know them.

  Raises:
    RequestError: where there are no weights.
  """
  if path.is_file():
    require(path.suffix in ('.safetensors', '.bin'),
            f'{path} is neither .safetensors nor .bin')
    return [(path, None)]
  hub.check_exists(path)
  # Look for several files with an index, then for one file.
  for name in (SAFE, BIN):
    index = path / f'{name}.index.json'
    if index.is_file():
      return _files_of_index(index)
    if (path / name).is_file():
      return [(path / name, None)]
  raise RequestError(f'{path} has no weights: looked for {SAFE}, {BIN}, and '
                     'either of them with .index.json')


def _files_of_index(index: pathlib.Path
                    ) -> list[tuple[pathlib.Path, list[str]]]:
  """Reads the index of a model whose weights are in several files.

  Args:
    index: the path of the index, a JSON file.

  Returns:
    (file, names of its tensors) for each file.

  Raises:
    RequestError: for a damaged index, and for a file that is missing.
  """
  tree = read_json_object(index)
  weight_map = tree.get('weight_map')
  if not isinstance(weight_map, dict):
    raise RequestError(f"{index} is damaged: it has no 'weight_map'")
  names_of_file: dict[pathlib.Path, list[str]] = {}
  for name, file in weight_map.items():
    # The index may come from anywhere: it must not name files outside its
    # folder.
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise RequestError(
          f'{index} names the file {file!r}: it must lie in that folder')
    names_of_file.setdefault(index.parent / file, []).append(name)
  for file in names_of_file:
    require(file.is_file(), f'{file} is missing, though the index names it')
  return [*names_of_file.items()]


def read_json_object(path: pathlib.Path) -> dict:
  """Returns the object that a JSON file holds.

  Raises:
    RequestError: if it holds none.
  """
  return storage.read_json(path)


def split_into_files(sizes: Mapping[str, int], shard_bytes: int
                     ) -> dict[str, list[str]]:
  """Distributes tensors over files of a limited size.

  Args:
    sizes: the number of bytes of each tensor, by its name.
    shard_bytes: the limit of a file. A single tensor may exceed it.

  Returns:
    {name of the file: names of its tensors}, with the names that transformers
    gives such files.
  """
  # Fill one file after another, keeping the order of the tensors.
  groups: list[list[str]] = [[]]
  bytes_of_group = 0
  for name, size in sizes.items():
    if groups[-1] and bytes_of_group + size > shard_bytes:
      groups.append([])
      bytes_of_group = 0
    groups[-1].append(name)
    bytes_of_group += size

  # Name the files, as model-00001-of-00002.safetensors if there are several.
  if len(groups) == 1:
    return {SAFE: groups[0]}
  stem, suffix = SAFE.split('.')
  files = {}
  for i, names in enumerate(groups, 1):
    files[f'{stem}-{i:05d}-of-{len(groups):05d}.{suffix}'] = names
  return files


def write_files(folder: pathlib.Path, files: Mapping[str, list[str]],
                make: Callable[[str], np.ndarray]) -> None:
  """Writes tensors to safetensors files, and an index if there are several
  files. Only the tensors of one file are in memory at once.

  Args:
    folder: the folder to write to.
    files: {name of the file: names of its tensors}, from `split_into_files`.
    make: returns the tensor with a given name.
  """
  from safetensors.numpy import save_file
  # Make the tensors of a file, write them, and free them before the next file.
  total_bytes = 0
  file_of_tensor = {}
  for file, names in files.items():
    tensors = {name: np.asarray(make(name), order='C') for name in names}
    total_bytes += sum(x.nbytes for x in tensors.values())
    save_file(tensors, folder / file, metadata={'format': 'pt'})
    file_of_tensor |= dict.fromkeys(names, file)
  # The index says in which file each tensor is.
  if len(files) > 1:
    tree = dict(metadata=dict(total_size=total_bytes),
                weight_map=file_of_tensor)
    text = json.dumps(tree, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + '\n')


# Patterns of the files that transformers may take for the weights of a model,
# or for how it is to be loaded.
LOADED_BY_TRANSFORMERS = (
    '*.safetensors', '*.safetensors.index.json', 'pytorch_model*.bin',
    'pytorch_model*.bin.index.json', 'adapter_*', 'tf_model*.h5',
    'flax_model*.msgpack', 'generation_config.json')


def refuse_files_left(folder: pathlib.Path, written: Collection[str],
                      patterns: Iterable[str] = LOADED_BY_TRANSFORMERS) -> None:
  """Refuses a folder in which files of another model would stay beside those
  that are about to be written, and might be loaded with them.

  Args:
    folder: the folder to write to, which need not exist.
    written: the names of the files that are written.
    patterns: patterns of the names of files that might be loaded.

  Raises:
    RequestError: where there are such files.
  """
  other_files: set[str] = set()
  for pattern in patterns:
    for file in folder.glob(pattern):
      other_files.add(str(file.relative_to(folder)))
  other_files -= {*written}
  require(not other_files, f'{folder} holds '
          f'{shorten(", ".join(sorted(other_files)))}, which would stay and '
          'may be loaded with what is written: choose another folder, or '
          'remove them')
