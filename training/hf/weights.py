"""Weights in the Hugging Face format, in and out, by the pages' name tables.

  module, params = weights.from_hf(folder)
  weights.to_hf(module, params, folder)

In: the parameters are made one by one, each device's shard by itself, and of a
tensor is read what falls into the shard: host memory holds no more than the
largest tensor and what the devices here have of a parameter. Out: file by file,
of which host memory holds one. Nothing is left out in silence: a tensor or
parameter without a counterpart is an error or, with `partial`, listed.

BertForMaskedLM has no pooler, BertModel no head; what fine-tuning or
sentence-transformers writes is one of them. So what a page calls optional may
be missing as a whole and is drawn, or be there without a place in the model and
is passed over. Both are told. A part of it that is missing is damage.

Low-rank adapters are merged where weights go out: W + (alpha / rank) A B is a
weight like any other, by which the model without adapters computes the same
function (Hu et al. 2021, section 4.1), to the rounding of a sum that is added
up in another order.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import functools
import math
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import hf, layers, skeletons, tables
from architectures.parts import paths
from architectures.parts.config import DTYPES, ModelConfig
from architectures.parts.heads import GeneratorConfig
from architectures.parts.hf import tensor_map
from architectures.parts.lora import LoraConfig
from architectures.parts.sharding import parameter_shapes
from common.fields import PositiveSize, Seed, check_argument_types
from common.errors import RequestError, check_choice
from training import progress
from training.hf import config as hf_config
from training.hf import files as hf_files
from training.hf import generation as hf_generation
from training.workdir import checkpoints, storage

MOST_BYTES_OF_A_FILE = 5 * 10**9
TASK_HEAD_FOLDER = 'task/'  # The paths of a task's head begin with it.


class Loaded(NamedTuple):
  """Parameters, and a line for each thing of either side that was skipped."""
  params: Any
  skipped: list[str]


@check_argument_types
def from_hf(path: str | os.PathLike, *, partial: bool = False, seed: Seed = 0,
            dtype: str = ''):
  """Builds the model that a Hugging Face folder describes, and reads its
  weights.

  Args:
    path: the folder, or a .safetensors or .bin file beside a config.json.
    partial: whether the files and the model may differ: parameters that the
      files lack are then drawn from `seed`, and tensors that the model lacks
      are ignored with a warning.
    seed: the seed of parameters that are drawn.
    dtype: the type of the parameters, model.param_dtype; '': float32.

  Returns:
    (module, params): the Flax module and its parameters.

  Raises:
    ValueError: for anything in the files that the model cannot honour, and for
      weights that they lack.
  """
  # Build the module that the config.json describes.
  check_choice('dtype', value=dtype, choices=('', *DTYPES))
  path = pathlib.Path(path)
  folder = path.parent if path.is_file() else path
  files = hf_files.Files(path)
  config = hf_config.model_of_config_json(hf_config.load_config_json(folder),
                                          set(files))
  module = architectures.build(dataclasses.replace(
      config, param_dtype=dtype or config.param_dtype))

  # Read its parameters, of which some may be drawn.
  loaded = read_params(module, source=files, partial=partial, seed=seed)
  for line in loaded.skipped:
    warnings.warn(line, stacklevel=2)
  return module, loaded.params


def read_params(module: nn.Module, source: hf_files.Files, *, like: Any = None,
                partial: bool = False, seed: int = 0, new_head: bool = False
                ) -> Loaded:
  """Returns the parameters of `module`, read from tensors that have Hugging
  Face's names.

  Args:
    module: the Flax module of the model.
    source: the tensors of a folder, by name.
    like: the parameters' shapes with shardings, as in TrainState; none: on
      one device.
    partial: whether parameters that the files lack are drawn from `seed`, and
      tensors that the model lacks passed over.
    seed: the seed of the parameters that are drawn.
    new_head: whether the head of a task is drawn where the files lack it, and
      that of a language model passed over.
  """
  hf_format = architectures.hugging_face(module.config.arch)
  like = nn.meta.unbox(like or parameter_shapes(module))
  shapes = {path: leaf.shape
            for path, leaf in paths.flatten_by_path(like).items()}

  # A config.json with far too many layers is refused before all are listed.
  rows = hf_format.rows(module.config)
  num_needed = tensor_map.count_tensors(rows, shapes)
  num_in_files = len(list(source))
  if not partial and num_needed > 2 * num_in_files + 100:
    raise RequestError(
        f'config.json is of a model of {num_needed:,} tensors, of which the '
        f'files hold {num_in_files:,}')
  tensors = tensor_map.map_tensors(rows, shapes)
  finder = TensorFinder(hf_format, source=source, config=module.config)

  # Tensors that one of the two has and the other has not.
  comparison = _Comparison()
  if new_head:
    comparison.pass_head(finder.find_all(names_of_replaced_head(module)))
  comparison.pass_optional(hf_format.optional, set(source), tensors)
  comparison.skipped += finder.find_unused(tensors, comparison.placed)
  comparison.compare(tensors, finder, new_head)
  if comparison.skipped and not partial:
    lines = comparison.skipped[:20]
    if len(comparison.skipped) > 20:
      lines.append('...')
    raise RequestError('the weights and the model differ:\n  '
                       + '\n  '.join(lines))

  # Each parameter is drawn, or read from one or more tensors.
  drawn = {}
  if comparison.drawn:
    drawn = draw_parameters(
        module, abstract_params=like, paths_to_draw=comparison.drawn, seed=seed)
  tensors_of_path: dict[str, list] = {path: [] for path in shapes}
  for tensor in tensors:
    for number, path in enumerate(tensor.paths):
      tensors_of_path[path].append((tensor, number))
  with progress.show_task('reading parameters', len(shapes)) as advance:

    def draw_or_read(key: Any, leaf: Any) -> jax.Array:
      """Returns a parameter, by its path in the tree and its shape."""
      path = paths.path_to_string(key)
      if path in drawn:
        x = drawn[path]
      else:
        x = _read_parameter(leaf, tensors=tensors_of_path[path], finder=finder)
      advance()
      return x

    params = jax.tree_util.tree_map_with_path(draw_or_read, like)
  return Loaded(params=params,
                skipped=comparison.passed + comparison.skipped)


class _Comparison:
  """A comparison of the tensors of a folder with those of a model.

  Attributes:
    drawn: the paths of the parameters that no tensor fills, which are drawn.
    placed: the names of tensors of the files that the model may lack.
    passed: a line for each thing that may be missing on one side, and is.
    skipped: a line for each thing that should not be.
  """

  def __init__(self):
    self.drawn: set[str] = set()
    self.placed: list[str] = []
    self.passed: list[str] = []
    self.skipped: list[str] = []
    self._new_names: set[str] = set()

  def pass_head(self, names: Sequence[str]) -> None:
    """Notes that the model lacks the head of a language model, whose tensors
    have these names in the files."""
    self.placed += names
    for name in names:
      self.passed.append(f'{name} of the files is of the head of a language '
                         'model')

  def pass_optional(self, optional: Mapping[str, str], source: set[str],
                    tensors: Sequence[tensor_map.Tensor]) -> None:
    """Excuses optional parts of a model, such as a pooler, that only the files
    or only the model has. A part of which both have some tensors is left to be
    compared tensor by tensor.

    Args:
      optional: {name of the part in words: a pattern of the names of its
        tensors}.
      source: the names of the tensors in the files.
      tensors: the tensors of the model.
    """
    names_in_files = source - {*self.placed}
    names_in_model = [tensor.name for tensor in tensors]
    for part, pattern in optional.items():
      part_in_files = _filter_by_pattern(pattern, names_in_files)
      part_in_model = _filter_by_pattern(pattern, names_in_model)
      # If the model lacks the part, its tensors in the files are ignored.
      if part_in_files and not part_in_model:
        self.placed += part_in_files
        self.passed.append(
            f'the model has no {part}, so these of the files are passed over: '
            f'{", ".join(part_in_files)}')
      # If the files lack the part, its parameters are drawn.
      elif part_in_model and not part_in_files:
        self._new_names.update(part_in_model)
        new_paths: list[str] = []
        for tensor in tensors:
          if tensor.name in part_in_model:
            new_paths += tensor.paths
        self.passed.append(
            f'the files have no {part}, so these parameters are new, drawn '
            f'from the seed: {", ".join(dict.fromkeys(new_paths))}')

  def compare(self, tensors: Sequence[tensor_map.Tensor],
              finder: 'TensorFinder', new_head: bool) -> None:
    """Finds the tensors of the model that cannot be read from the files. Their
    parameters are to be drawn.

    Args:
      tensors: the tensors of the model.
      finder: finds tensors in the files.
      new_head: whether the files may lack the head of a task. If not, a missing
        head is a fault like any other.
    """
    for tensor in tensors:
      # A tensor of an optional part that the files lack is no fault.
      if tensor.name in self._new_names:
        self.drawn.update(tensor.paths)
        continue
      fault = finder.find_fault(tensor)
      if not fault:
        continue
      self.drawn.update(tensor.paths)
      # Nor is the head of a new task, for which the files were not trained.
      is_in_task_head = tensor.paths[0].startswith(TASK_HEAD_FOLDER)
      is_missing = not finder.find_all([tensor.name])
      if new_head and is_in_task_head and is_missing:
        self.passed.append(f'{fault}, so it is drawn')
      else:
        self.skipped.append(fault)


def _filter_by_pattern(pattern: str, names: Collection[str]) -> list[str]:
  """Returns the names that match a pattern as a whole."""
  return [name for name in names if re.fullmatch(pattern, name)]


class TensorFinder:
  """The tensors of a folder, found by the names that transformers gives them:
  some files spell a name in another way, or leave its prefix out.

  Args:
    hf_format: how the architecture is written in the Hugging Face format.
    source: the tensors of the folder, by name.
    config: the config of the model.
  """

  def __init__(self, hf_format: hf.HuggingFace, source: hf_files.Files,
               config: ModelConfig):
    self._hf_format = hf_format
    self._source = source
    self._constants = hf_format.constants(config)
    self._ignored = hf_format.ignored_in(config)
    self._spellings = hf_format.spellings_with_head(config)

  def find_spelling(self, name: str) -> str:
    """Returns the name under which the files have a tensor. Files of different
    age spell some names differently.

    Args:
      name: the usual name of the tensor.

    Returns:
      The name in the files; the usual one if they lack the tensor.
    """
    # List all spellings: each of the known replacements is made or not made.
    spellings = [name]
    for usual, replacement in self._spellings:
      new_spellings = []
      for spelling in spellings:
        if usual in spelling:
          new_spellings.append(spelling.replace(usual, replacement, 1))
      spellings += new_spellings
    for spelling in spellings:
      if spelling in self._source:
        return spelling
    return name

  def cut(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Returns a slice of the tensor `name`."""
    return self._source.cut(self.find_spelling(name), slices)

  def find_fault(self, tensor: tensor_map.Tensor) -> str:
    """Says why a tensor of the model cannot be read from the files: it is
    missing, or has another shape.

    Args:
      tensor: a tensor of the model.

    Returns:
      A sentence; '' for a tensor that can be read.

    Raises:
      RequestError: for a tensor of a type that is not read as weights, such as
        integers or quantised numbers.
    """
    name = self.find_spelling(tensor.name)
    if name not in self._source:
      return f'{" and ".join(tensor.paths)}: the files have no {tensor.name}'
    dtype = self._source.dtype(name)
    shape = self._source.shape(name)
    # Some architectures have tensors of integers, such as a table of ids.
    may_be_integers = dtype in ('I64', 'int64') and re.fullmatch(
        self._hf_format.integers, tensor.name)
    if dtype not in hf_files.DTYPES and not may_be_integers:
      raise RequestError(f'{name} is of type {dtype}: weights are read from '
                         f'{", ".join(hf_files.DTYPES)}')
    if shape == tensor.shape:
      return ''
    return (f'{tensor.name} is {shape} in the files and {tensor.shape} in the '
            'model')

  def find_all(self, names: Collection[str]) -> list[str]:
    """Returns the names, as the files spell them, of those tensors among
    `names` that the files have."""
    spellings = {self.find_spelling(name) for name in names}
    return sorted(spellings & set(self._source))

  def find_unused(self, tensors: Sequence[tensor_map.Tensor],
                  passed: Sequence[str]) -> list[str]:
    """Finds the tensors of the files that are not read: the model has no place
    for them, or computes them itself and they have another value.

    Args:
      tensors: the tensors of the model.
      passed: the names of tensors that the model may lack.

    Returns:
      A sentence for each such tensor.
    """
    used = {self.find_spelling(tensor.name) for tensor in tensors} | set(passed)
    tied_to = {}
    for name, twin_name in self._hf_format.tied.items():
      tied_to[self.find_spelling(name)] = twin_name
    lines = []
    for name in self._source:
      if name in used or self._is_ignored(name):
        continue
      # A constant, such as rotary frequencies, must be what follows from the
      # config.
      if name in self._constants:
        if not np.array_equal(self._source[name], self._constants[name]):
          lines.append(f'{name} of the files is not as config.json has it')
      elif name not in tied_to:
        lines.append(f'{name} of the files has no place in the model')
      else:
        # Tied weights may be stored twice, but must be equal.
        twin_name = tied_to[name]
        twin = self._source[self.find_spelling(twin_name)]
        if not np.array_equal(self._source[name], twin):
          lines.append(f'{name} of the files differs from {twin_name}, to '
                       'which the model ties it')
    return lines

  def _is_ignored(self, name: str) -> bool:
    """Whether a tensor holds no weights."""
    return any(re.fullmatch(pattern, name) for pattern in self._ignored)


def _read_parameter(leaf: Any, tensors: list, finder: TensorFinder
                    ) -> jax.Array:
  """Reads one parameter of a model from weight files. Only what the devices of
  this process hold is read.

  Args:
    leaf: the shape and dtype of the parameter, and maybe its sharding.
    tensors: (tensor, number) of each tensor of the files that holds a part of
      the parameter, such as one of its layers or experts. A tensor may hold
      several parameters, of which this one has the number.
    finder: finds tensors in the files.
  """
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  # Find the devices for each part of the parameter, as (start, stop) along each
  # axis. Several devices may hold the same part, which is read only once.
  devices_of_ranges: dict[tuple, list[jax.Device]] = {}
  indices = sharding.addressable_devices_indices_map(leaf.shape)
  for device, index in indices.items():
    ranges = tuple(part.indices(size)[:2]
                   for part, size in zip(index, leaf.shape))
    devices_of_ranges.setdefault(ranges, []).append(device)

  # Read one part after another, so that the host holds only one of them.
  # jax.make_array_from_callback would read all parts first.
  shards = []
  for ranges, devices in devices_of_ranges.items():
    shard = _read_shard(
        leaf.dtype, ranges=ranges, tensors=tensors, finder=finder)
    shards += [jax.device_put(shard, device) for device in devices]
  return jax.make_array_from_single_device_arrays(
      leaf.shape, sharding, shards)


def _read_shard(dtype: np.dtype, ranges: tuple, tensors: list,
                finder: TensorFinder) -> np.ndarray:
  """Reads the part of a parameter that one device holds.

  Args:
    dtype: the type of the parameter.
    ranges: (start, stop) of the part along each axis of the parameter.
    tensors: (tensor, number) of each tensor of the files that holds some of the
      parameter, such as one layer or expert. A tensor may hold several
      parameters, of which this one has the number.
    finder: finds tensors in the files.
  """
  shard = np.empty([stop - start for start, stop in ranges], dtype)
  for tensor, number in tensors:
    # A tensor holds one index of the leading axes of the parameter, such as one
    # layer and one expert. Skip it if that index is not in the part.
    index = tensor.indices[number]
    num_leading = len(index)
    leading_ranges = ranges[:num_leading]
    is_inside = [start <= i < stop
                 for i, (start, stop) in zip(index, leading_ranges)]
    if not all(is_inside):
      continue
    index_in_shard = tuple(
        i - start for i, (start, _) in zip(index, leading_ranges))

    # Along the other axes, read only the range that is in the part.
    cut = functools.partial(finder.cut, tensor.name)
    inner_ranges = dict(zip(tensor.ours[number], ranges[num_leading:]))
    part = tensor.read_parameter(cut, number, inner_ranges)
    check_values_fit(finder.find_spelling(tensor.name), part, dtype=dtype)
    shard[index_in_shard] = part
  return shard


def check_values_fit(name: str, x: np.ndarray, dtype: np.dtype) -> None:
  """Checks that all values of an array are finite, and that a type can hold
  them.

  Args:
    name: the name of the array, with which the message begins.
    x: the array of numbers, of any shape.
    dtype: the type that it is to have.

  Raises:
    RequestError: for a value that is not finite, or too large.
  """
  largest = 0.0
  if x.size:
    with np.errstate(invalid='ignore'):  # NumPy's warning of a NaN
      largest = float(max(x.max(), -x.min(), key=abs))
  limit = float(jnp.finfo(dtype).max)
  if not np.isfinite(largest):
    raise RequestError(f'{name} has a value that is no finite number')
  if largest > limit:
    raise RequestError(
        f'{name} has the value {largest:g}, and {np.dtype(dtype).name} ends at '
        f'{limit:g}: choose another dtype')


def draw_parameters(module: nn.Module, abstract_params: Any,
                    paths_to_draw: set[str], seed: int
                    ) -> dict[str, jax.Array]:
  """Draws random initial values of some parameters of a model. They are the
  values that these parameters would have in a new model.

  The whole model is initialised inside one compiled function. So the parameters
  that are not returned are never in memory.

  Args:
    module: the Flax module of the model.
    abstract_params: the shapes of its parameters, with their shardings.
    paths_to_draw: the paths of the parameters to return.
    seed: the seed of the draw.

  Returns:
    {path: array}.
  """

  def init(key: jax.Array) -> dict[str, jax.Array]:
    tokens_BL = jnp.zeros((1, 1), jnp.int32)
    params = module.init(key, tokens_BL)['params']
    flat = paths.flatten_by_path(nn.meta.unbox(params))
    return {path: flat[path] for path in paths_to_draw}

  flat = paths.flatten_by_path(abstract_params)
  shardings = {path: getattr(flat[path], 'sharding', None)
               for path in paths_to_draw}
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


@check_argument_types
def to_hf(module: nn.Module, params: Mapping[str, Any],
          folder: str | os.PathLike, *, dtype: str = '',
          shard_bytes: PositiveSize = MOST_BYTES_OF_A_FILE,
          generation: hf_generation.Generation | None = None,
          labels: Sequence[str] = ()) -> None:
  """Writes config.json and safetensors, which transformers loads; low-rank
  adapters are merged into the weights.

  Args:
    module: the Flax module of the model.
    params: its parameters, all of them addressable from this process.
    folder: where to; made if it isn't there.
    dtype: the type of the tensors written; '': that of each parameter.
    shard_bytes: no file is larger, unless one tensor is.
    generation: token ids and options; none: of those that transformers must
      have, any that are in the vocabulary.
    labels: the names of the labels that the outputs of a task's head stand for.

  Raises:
    ValueError: naming a part of the model that transformers does not have, or
      what the folder holds: a run, or weights that would stay.
  """
  check_choice('dtype', value=dtype, choices=('', *DTYPES, 'float16'))
  storage.check_folder_is_writable(folder, 'the folder')
  storage.refuse_folder_of_run(folder, 'the folder')
  module, params = merge_adapters(module, params)
  module, params = without_generator(module, params)
  config: ModelConfig = module.config

  # config.json and generation_config.json.
  tree = hf_config.config_json_of_model(config, labels)
  options = None
  if generation is not None:
    tree |= generation.fields
    options = generation.options

  # The tensors, of which the range of each is checked before any is written.
  export = _Export(config, flat=paths.flatten_by_path(nn.meta.unbox(params)),
                   dtype=dtype)
  export.check_ranges()
  files = hf_files.split_into_files(export.sizes(), shard_bytes)

  # The files.
  folder = pathlib.Path(folder)
  written = [*files]
  if len(files) > 1:
    written.append(hf_files.INDEX)
  if options is not None:
    written.append(hf_generation.FILE_IN_FOLDER)
  hf_files.refuse_files_left(folder, written)
  folder.mkdir(parents=True, exist_ok=True)
  with progress.show_task('writing tensors', len(export.tensors)) as advance:

    def make(name: str) -> np.ndarray:
      if name in export.tensors:
        advance()
      return export.make(name)

    hf_files.write_files(folder, files=files, make=make)
  tree['dtype'] = dtype or config.param_dtype
  storage.write_json(folder / 'config.json', tree)
  if options is not None:
    storage.write_json(folder / hf_generation.FILE_IN_FOLDER, options)


class _Export:
  """The tensors of a model in the Hugging Face format, made one by one.

  Attributes:
    tensors: the tensors that are made of parameters, by their name in the files
      of transformers.
    constants: the arrays that follow from the config, such as rotary
      frequencies, by the same names.
    dtypes: {name: the type in which the tensor is written} of `tensors`.
  """

  def __init__(self, config: ModelConfig, flat: Mapping[str, Any], dtype: str):
    """Lists the tensors of the files and chooses the type of each. No tensor is
    made yet.

    Args:
      config: the config of the model.
      flat: the parameters, by path.
      dtype: the type to write them in; '': the type that each has.
    """
    hf_format = architectures.hugging_face(config.arch)
    self._parameters = flat
    # Each row of the table says which parameters one tensor holds, or several.
    rows = hf_format.rows(config)
    shapes = {path: x.shape for path, x in flat.items()}
    tensors = tensor_map.map_tensors(rows, shapes)
    self.tensors = {tensor.name: tensor for tensor in tensors}
    self.constants = hf_format.constants(config)

    # By default a tensor has the type of its first parameter. A tensor of whole
    # numbers, such as a table of ids, is written as int64, though its parameter
    # is of floats.
    self.dtypes: dict[str, np.dtype] = {}
    self._float_dtypes: dict[str, np.dtype] = {}
    for tensor in tensors:
      float_dtype = np.dtype(dtype or flat[tensor.paths[0]].dtype)
      self._float_dtypes[tensor.name] = float_dtype
      has_integers = re.fullmatch(hf_format.integers, tensor.name)
      self.dtypes[tensor.name] = (
          np.dtype('int64') if has_integers else float_dtype)

  def check_ranges(self) -> None:
    """Raises RequestError for a parameter with a value that is not finite, or
    too large for the type that it is written in."""
    for name, tensor in self.tensors.items():
      check_values_fit(' and '.join(tensor.paths), self._join(name),
                       dtype=self._float_dtypes[name])

  def sizes(self) -> dict[str, int]:
    """Returns the number of bytes of each tensor, by name."""
    sizes = {}
    for name, tensor in self.tensors.items():
      sizes[name] = math.prod(tensor.shape) * self.dtypes[name].itemsize
    for name, x in self.constants.items():
      sizes[name] = x.nbytes
    return sizes

  def make(self, name: str) -> np.ndarray:
    """Returns a tensor as it is written."""
    if name in self.constants:
      return self.constants[name]
    return self._join(name).astype(self.dtypes[name], copy=False)

  def _join(self, name: str) -> np.ndarray:
    """Makes a tensor out of the parameters that it holds, in their type."""
    tensor = self.tensors[name]
    parameters = []
    for path, index in zip(tensor.paths, tensor.indices):
      # A layer or an expert is one index of the parameter's leading axes.
      parameters.append(np.asarray(self._parameters[path][index]))
    return tensor.join_parameters(parameters)


def is_new_head(ours: ModelConfig, theirs: ModelConfig) -> bool:
  """Whether `ours` has the head of a task, and `theirs` predicts tokens."""
  pretrained = 'lm', 'replaced'
  return ours.head not in pretrained and theirs.head in pretrained


def shapes_only_in_other_model(module: nn.Module, other: ModelConfig
                               ) -> dict[str, tuple[int, ...]]:
  """Returns the shapes, by path, of the parameters that another model has and
  `module` has not."""
  our_shapes = paths.flatten_by_path(parameter_shapes(module))
  other_module = architectures.build(other)
  only_in_other = {}
  for path, x in paths.flatten_by_path(parameter_shapes(other_module)).items():
    if path not in our_shapes:
      only_in_other[path] = x.shape
  return only_in_other


def without_generator(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """Removes the generator from a model of ELECTRA: the small masked language
  model that is trained beside the encoder, and not needed afterwards.

  Args:
    module: the Flax module of the model.
    params: its parameters, a tree of arrays.

  Returns:
    The encoder alone, and its parameters; any other model as it is.
  """
  config = module.config
  generator = config.find_part(GeneratorConfig)
  if generator is None or not generator.num_layers:
    return module, params

  # Keep the parameters that are not the generator's.
  generator_folders = 'generator/', f'embed/{skeletons.PREFIX_OF_GENERATOR}'
  encoder_params = {}
  for path, x in paths.flatten_by_path(nn.meta.unbox(params)).items():
    if not path.startswith(generator_folders):
      encoder_params[path] = x

  # The encoder may share the generator's embedding of tokens and add a table of
  # its own to it. Without the generator, the sum is its embedding.
  addition = encoder_params.pop(f'embed/{skeletons.NAME_OF_ADDED_TABLE}', None)
  if addition is not None:
    encoder_params['embed/tokens'] = encoder_params['embed/tokens'] + addition
  encoder = config.with_part(GeneratorConfig, num_layers=0)
  return architectures.build(encoder), checkpoints.nest_by_path(encoder_params)


def names_of_replaced_head(module: nn.Module) -> set[str]:
  """Returns the names in Hugging Face's format of the tensors that the module's
  head of a task replaces: those of the head of a language model."""
  lm = dataclasses.replace(module.config, head='lm', num_labels=0,
                           head_dropout=0.0, pooling='cls')
  hf_format = architectures.hugging_face(lm.arch)
  shapes = shapes_only_in_other_model(module, lm)
  rows = [row for row in hf_format.rows(lm) if row[0] in shapes]
  names = {tensor.name for tensor in tensor_map.map_tensors(rows, shapes)}
  return names | set(hf_format.tied)


def without_adapters(model: ModelConfig) -> ModelConfig:
  """Returns the same model without adapters."""
  return dataclasses.replace(model, lora=LoraConfig())


def same_adapters(one: ModelConfig, other: ModelConfig) -> bool:
  """Whether two models have the same adapters, or none."""
  if not (one.lora.rank or other.lora.rank):
    return True
  return (one.lora.rank == other.lora.rank
          and one.lora.scale == other.lora.scale
          and _adapted_products(one) == _adapted_products(other))


def _adapted_products(config: ModelConfig) -> list[str]:
  """Returns the names of the products that have an adapter."""
  return [name for name in tables.products_of_model(config)
          if layers.has_adapter(config, name)]


def is_adapter(path: str) -> bool:
  """Whether the parameter at `path` is A or B of an adapter."""
  return path.endswith((layers.SUFFIX_OF_LORA_A, layers.SUFFIX_OF_LORA_B))


def remove_adapters(params: Any) -> Any:
  """Returns the parameters that are no adapters."""
  flat = paths.flatten_by_path(params)
  return checkpoints.nest_by_path(
      {path: x for path, x in flat.items() if not is_adapter(path)})


def add_adapters(params: Any, others: Any) -> Any:
  """Returns `params` with the adapters of `others` beside them."""
  flat = dict(paths.flatten_by_path(params))
  for path, x in paths.flatten_by_path(others).items():
    if is_adapter(path):
      flat[path] = x
  return checkpoints.nest_by_path(flat)


def merge_adapters(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """Adds the low-rank adapters of a model to its weights. The result is a model
  without adapters that computes the same function.

  The sums are computed in float32 and rounded once, to the type of the weight.

  Args:
    module: the model, with adapters or without.
    params: its parameters, a tree of arrays.

  Returns:
    The model without adapters, and its parameters.
  """
  config = module.config
  if not config.lora.rank:
    return module, params
  flat = paths.flatten_by_path(nn.meta.unbox(params))
  merged = {}
  for path, x in flat.items():
    if not is_adapter(path):
      merged[path] = _merge_adapter(path, w=x, flat=flat,
                                    scale=config.lora.scale)
  plain = architectures.build(without_adapters(config))
  return plain, checkpoints.nest_by_path(merged)


def _merge_adapter(path: str, w: jax.Array, flat: Mapping[str, jax.Array],
                   scale: float) -> jax.Array:
  """Adds the low-rank adapter of a weight to it: W + scale A B (Hu et al. 2021,
  section 4.1). A weight without an adapter is returned as it is.

  Args:
    path: the path of the weight.
    w: the weight W. Axes of layers and experts may come before the inputs and
      outputs.
    flat: all parameters, by path.
    scale: the factor of the product.
  """
  if path + layers.SUFFIX_OF_LORA_A not in flat:
    return w
  a = jnp.asarray(flat[path + layers.SUFFIX_OF_LORA_A], jnp.float32)
  b = jnp.asarray(flat[path + layers.SUFFIX_OF_LORA_B], jnp.float32)
  # A is [leading, inputs, rank] and B [leading, rank, outputs], each of these
  # one axis or several. Together they have the leading axes twice and the rank
  # twice, which W has once and not at all: so the difference in their numbers
  # of axes gives the number of leading ones.
  num_leading = a.ndim + b.ndim - 2 - w.ndim
  leading_shape = w.shape[:num_leading]
  rank = a.shape[-1]
  num_inputs = math.prod(a.shape[num_leading:-1])
  product = jnp.matmul(a.reshape(*leading_shape, num_inputs, rank),
                       b.reshape(*leading_shape, rank, -1),
                       precision=jax.lax.Precision.HIGHEST)
  merged = jnp.asarray(w, jnp.float32) + scale * product.reshape(w.shape)
  return merged.astype(w.dtype)
