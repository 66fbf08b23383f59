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
from common.arguments import PositiveSize, Seed, typed
from common.errors import RequestError, one_of, require
from training import progress
from training.hf import config as hf_config
from training.hf import files as hf_files
from training.hf import generation as hf_generation
from training.workdir import checkpoints, storage

SHARD_BYTES = 5 * 10**9
TASK = 'task/'  # of the paths of a task's head


class Loaded(NamedTuple):
  """Parameters, and a line for each thing of either side that was skipped."""
  params: Any
  skipped: list[str]


@typed
def from_hf(path: str | os.PathLike, *, partial: bool = False, seed: Seed = 0,
            dtype: str = ''):
  """Returns (module, params) of a Hugging Face folder, or a file in one.

  Args:
    path: the folder, or a .safetensors or .bin file beside a config.json.
    partial: whether parameters that the files lack are drawn from `seed`, and
      tensors that the model lacks passed over.
    seed: for these.
    dtype: of the parameters, model.param_dtype; '': float32.

  Raises:
    ValueError: naming what the files have that the architecture does not
      honour, or lack.
  """
  one_of('dtype', dtype, ('', *DTYPES))
  path = pathlib.Path(path)
  folder = path.parent if path.is_file() else path
  files = hf_files.Files(path)
  config = hf_config.read(hf_config.load_config_json(folder), set(files))
  module = architectures.build(dataclasses.replace(
      config, param_dtype=dtype or config.param_dtype))
  loaded = read_params(module, files, partial=partial, seed=seed)
  for line in loaded.skipped:
    warnings.warn(line, stacklevel=2)
  return module, loaded.params


def read_params(module: nn.Module, source: hf_files.Files, *, like: Any = None,
                partial: bool = False, seed: int = 0, new_head: bool = False
                ) -> Loaded:
  """Returns the parameters of `module`, from tensors by their HF names.

  Args:
    module: the model.
    source: the tensors.
    like: the parameters' shapes with shardings, as in TrainState; none: on
      one device.
    partial, seed: as for from_hf.
    new_head: whether the head of a task is drawn where the files lack it, and
      that of a language model passed over.
  """
  page = architectures.hugging_face(module.config.arch)
  like = nn.meta.unbox(like or parameter_shapes(module))
  shapes = {path: leaf.shape for path, leaf in paths.flatten(like).items()}
  rows = page.rows(module.config)
  needed, count = tensor_map.count(rows, shapes), len(list(source))
  require(partial or needed <= 2 * count + 100, f'config.json is of a model of '
          f'{needed:,} tensors, of which the files hold {count:,}')
  tensors = tensor_map.expand(rows, shapes)
  names = Names(page, source, module.config)
  fills: dict[str, list] = {path: [] for path in shapes}
  drawn_paths: set[str] = set()
  heads = names.there(names_left_out(module)) if new_head else []
  passed = [f'{name} of the files is of the head of a language model'
            for name in heads]
  there, ours = set(source) - set(heads), [tensor.name for tensor in tensors]
  placed, new_names = [*heads], set()
  for words, pattern in page.optional.items():
    theirs, wanted = _matching(pattern, there), _matching(pattern, ours)
    if theirs and not wanted:
      placed += theirs
      passed.append(f'the model has no {words}, so these of the files are '
                    f'passed over: {", ".join(theirs)}')
    elif wanted and not theirs:
      new_names.update(wanted)
      new = dict.fromkeys(path for tensor in tensors if tensor.name in wanted
                          for path in tensor.paths)
      passed.append(f'the files have no {words}, so these parameters are new, '
                    f'drawn from the seed: {", ".join(new)}')
  skipped = names.unused(tensors, placed)
  for tensor in tensors:
    if tensor.name in new_names:
      drawn_paths.update(tensor.paths)
    elif wrong := names.wrong(tensor):
      new = (new_head and tensor.paths[0].startswith(TASK)
             and not names.there([tensor.name]))
      (passed if new else skipped).append(wrong + ', so it is drawn' * new)
      drawn_paths.update(tensor.paths)
    for i, path in enumerate(tensor.paths):
      fills[path].append((tensor, i))
  require(partial or not skipped, 'the weights and the model differ:\n  '
          + '\n  '.join(skipped[:20])
          + ('\n  ...' if len(skipped) > 20 else ''))
  drawn = draw(module, like, drawn_paths, seed) if drawn_paths else {}
  with progress.during('reading parameters', len(shapes)) as advance:

    def read(key: Any, leaf: Any):
      path = paths.join(key)
      x = (drawn[path] if path in drawn_paths
           else _fill(leaf, fills[path], names))
      advance()
      return x

    params = jax.tree_util.tree_map_with_path(read, like)
  return Loaded(params, passed + skipped)


def _matching(pattern: str, names: Collection[str]) -> list[str]:
  return [name for name in names if re.fullmatch(pattern, name)]


class Names:
  """Tensors by their names, as the files spell them: some leave a prefix out.
  """

  def __init__(self, page: hf.HuggingFace, source: hf_files.Files,
               config: ModelConfig):
    self._page, self._source = page, source
    self._constants = page.constants(config)
    self._spellings = page.spellings_of(config)

  def find(self, name: str) -> str:
    """Returns the spelling under which the files have `name`, or `name`."""
    spellings = [name]
    for usual, other in self._spellings:
      spellings += [s.replace(usual, other, 1) for s in spellings
                    if usual in s]
    return next((s for s in spellings if s in self._source), name)

  def cut(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    return self._source.cut(self.find(name), slices)

  def wrong(self, tensor: tensor_map.Tensor) -> str:
    """Returns what stands against reading `tensor`, or ''.

    Raises:
      RequestError: for one that is no array of weights: one of whole numbers,
        or of a type that a quantisation has left.
    """
    name = self.find(tensor.name)
    if name not in self._source:
      return f'{" and ".join(tensor.paths)}: the files have no {tensor.name}'
    dtype, shape = self._source.dtype(name), self._source.shape(name)
    integers = dtype in ('I64', 'int64') and re.fullmatch(
        self._page.integers, tensor.name)
    if dtype not in hf_files.DTYPES and not integers:
      raise RequestError(f'{name} is of type {dtype}: weights are read from '
                         f'{", ".join(hf_files.DTYPES)}')
    if shape == tensor.shape:
      return ''
    return (f'{tensor.name} is {shape} in the files and {tensor.shape} in the '
            'model')

  def there(self, names: Collection[str]) -> list[str]:
    """Returns the spellings of those of `names` that the files have."""
    return sorted({self.find(name) for name in names} & set(self._source))

  def unused(self, tensors: Sequence[tensor_map.Tensor], passed: Sequence[str]
             ) -> list[str]:
    """Returns a line for each tensor of the files that has no place, but those
    that are passed over."""
    used = {self.find(tensor.name) for tensor in tensors} | set(passed)
    tied = {self.find(name): twin for name, twin in self._page.tied.items()}
    lines = []
    for name in self._source:
      if name in used or any(re.fullmatch(pattern, name)
                             for pattern in self._page.ignored):
        continue
      if name in self._constants:
        if not np.array_equal(self._source[name], self._constants[name]):
          lines.append(f'{name} of the files is not as config.json has it')
      elif name not in tied:
        lines.append(f'{name} of the files has no place in the model')
      elif not np.array_equal(self._source[name],
                              self._source[self.find(tied[name])]):
        lines.append(f'{name} of the files differs from {tied[name]}, to which '
                     'the model ties it')
    return lines


def _fill(leaf: Any, fills: list, names: Names) -> jax.Array:
  """Returns one parameter, each shard read once and where it lies."""
  sharding = getattr(leaf, 'sharding', None) or (
      jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  shard = functools.cache(
      lambda *ranges: _shard(leaf.dtype, ranges, fills, names))
  return jax.make_array_from_callback(
      leaf.shape, sharding, lambda index: shard(*(
          s.indices(n)[:2] for s, n in zip(index, leaf.shape))))


def _shard(dtype: np.dtype, ranges: tuple, fills: list, names: Names
           ) -> np.ndarray:
  """Returns the part of a parameter that lies in `ranges`, (start, stop)s."""
  shard = np.empty([stop - start for start, stop in ranges], dtype)
  for tensor, which in fills:
    lead = len(tensor.index)
    if all(a <= i < b for i, (a, b) in zip(tensor.index, ranges)):
      place = tuple(i - a for i, (a, _) in zip(tensor.index, ranges))
      part = tensor.part(functools.partial(names.cut, tensor.name), which,
                         dict(zip(tensor.ours[which], ranges[lead:])))
      check_range(names.find(tensor.name), part, dtype)
      shard[place] = part
  return shard


def check_range(name: str, x: np.ndarray, dtype: np.dtype) -> None:
  """Raises RequestError where `x`, which becomes an array of `dtype`, has a
  value that is not finite, or that `dtype` does not reach."""
  with np.errstate(invalid='ignore'):  # NumPy's warning of a NaN
    largest = float(max(x.max(), -x.min(), key=abs)) if x.size else 0.0
  most = float(jnp.finfo(dtype).max)
  if not np.isfinite(largest):
    raise RequestError(f'{name} has a value that is no finite number')
  if largest > most:
    raise RequestError(
        f'{name} has the value {largest:g}, and {np.dtype(dtype).name} ends at '
        f'{most:g}: choose another dtype')


def draw(module: nn.Module, like: Any, wanted: set[str], seed: int
         ) -> dict[str, jax.Array]:
  """Returns the initial values of the parameters `wanted` alone, by path."""

  def init(key: jax.Array):
    flat = paths.flatten(nn.meta.unbox(module.init(
        key, jnp.zeros((1, 1), jnp.int32))['params']))
    return {path: flat[path] for path in wanted}

  flat = paths.flatten(like)
  shardings = {path: getattr(flat[path], 'sharding', None) for path in wanted}
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


@typed
def to_hf(module: nn.Module, params: Mapping[str, Any],
          folder: str | os.PathLike, *, dtype: str = '',
          shard_bytes: PositiveSize = SHARD_BYTES,
          generation: hf_generation.Generation | None = None,
          labels: Sequence[str] = ()) -> None:
  """Writes config.json and safetensors, which transformers loads; low-rank
  adapters are merged into the weights.

  Args:
    module: the model.
    params: its parameters, all of them addressable from this process.
    folder: where to; made if it isn't there.
    dtype: of the tensors written; '': that of each parameter.
    shard_bytes: no file is larger, unless one tensor is.
    generation: token ids and options; none: of those that transformers must
      have, any that are in the vocabulary.
    labels: what the outputs of the head of a task stand for.

  Raises:
    ValueError: naming a part of the model that transformers does not have, or
      what the folder holds: a run, or weights that would stay.
  """
  one_of('dtype', dtype, ('', *DTYPES, 'float16'))
  storage.try_folder(folder, 'the folder')
  storage.refuse_run(folder, 'the folder')
  module, params = without_generator(*merge(module, params))
  config: ModelConfig = module.config
  page = architectures.hugging_face(config.arch)
  flat = paths.flatten(nn.meta.unbox(params))
  tree = hf_config.write(config, labels)
  options = generation and generation.options
  tree |= generation.fields if generation else {}
  tensors = {tensor.name: tensor for tensor in tensor_map.expand(
      page.rows(config), {path: x.shape for path, x in flat.items()})}
  dtypes = {name: np.dtype(dtype or flat[tensor.paths[0]].dtype)
            for name, tensor in tensors.items()}
  join = lambda name: tensors[name].join([
      np.asarray(flat[path][tensors[name].index])
      for path in tensors[name].paths])
  for name, tensor in tensors.items():
    check_range(' and '.join(tensor.paths), join(name), dtypes[name])
  dtypes |= {name: np.dtype('int64') for name in tensors
             if re.fullmatch(page.integers, name)}
  constants = page.constants(config)
  files = hf_files.shards({
      name: math.prod(tensor.shape) * dtypes[name].itemsize
      for name, tensor in tensors.items()} | {
          name: x.nbytes for name, x in constants.items()}, shard_bytes)
  folder = pathlib.Path(folder)
  hf_files.refuse_left(folder, {
      *files, *[hf_files.INDEX] * (len(files) > 1),
      *[hf_generation.FILE] * (options is not None)})
  folder.mkdir(parents=True, exist_ok=True)
  with progress.during('writing tensors', len(tensors)) as advance:

    def make(name: str) -> np.ndarray:
      if name in constants:
        return constants[name]
      advance()
      return join(name).astype(dtypes[name], copy=False)

    hf_files.write(folder, files, make)
  tree['dtype'] = dtype or config.param_dtype
  storage.write_json(folder / 'config.json', tree)
  if options is not None:
    storage.write_json(folder / hf_generation.FILE, options)


def is_new_head(ours: ModelConfig, theirs: ModelConfig) -> bool:
  """Whether `ours` has the head of a task, and `theirs` predicts tokens."""
  pretrained = 'lm', 'replaced'
  return ours.head not in pretrained and theirs.head in pretrained


def left_out(module: nn.Module, theirs: ModelConfig
             ) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the parameters, by path, that the model `theirs` has
  and `module`, with its head of a task, has not."""
  ours = paths.flatten(parameter_shapes(module))
  return {path: x.shape for path, x in paths.flatten(parameter_shapes(
      architectures.build(theirs))).items() if path not in ours}


def without_generator(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """Returns (module, parameters) of an encoder that tells replaced tokens, or
  of any other model, without what draws these."""
  c = module.config
  drawn_by = c.find(GeneratorConfig)
  if drawn_by is None or not drawn_by.num_layers:
    return module, params
  flat = {path: x for path, x in paths.flatten(nn.meta.unbox(params)).items()
          if not path.startswith(('generator/', f'embed/{skeletons.APART}'))}
  added = flat.pop(f'embed/{skeletons.ADDED}', None)
  if added is not None:
    flat['embed/tokens'] = flat['embed/tokens'] + added
  alone = c.with_part(GeneratorConfig, num_layers=0)
  return architectures.build(alone), checkpoints.nest(flat)


def names_left_out(module: nn.Module) -> set[str]:
  """Returns their names in Hugging Face's format."""
  lm = dataclasses.replace(module.config, head='lm', num_labels=0,
                           head_dropout=0.0, pooling='cls')
  page = architectures.hugging_face(lm.arch)
  shapes = left_out(module, lm)
  rows = [row for row in page.rows(lm) if row[0] in shapes]
  return {tensor.name for tensor in tensor_map.expand(rows, shapes)} | set(
      page.tied)


def without_adapters(model: ModelConfig) -> ModelConfig:
  """Returns the same model without adapters."""
  return dataclasses.replace(model, lora=LoraConfig())


def same_adapters(one: ModelConfig, other: ModelConfig) -> bool:
  """Whether two models have the same adapters, or none."""
  fields = lambda c: (c.lora.rank, c.lora.rank and (c.lora.scale, *(
      name for name in tables.products(c) if layers.adapted(c, name))))
  return fields(one) == fields(other)


def is_adapter(path: str) -> bool:
  """Whether the parameter at `path` is A or B of an adapter."""
  return path.endswith((layers.LORA_A, layers.LORA_B))


def without(params: Any) -> Any:
  """Returns the parameters that are no adapters."""
  return checkpoints.nest({path: x for path, x in paths.flatten(params).items()
                         if not is_adapter(path)})


def beside(params: Any, others: Any) -> Any:
  """Returns `params` with the adapters of `others` beside them."""
  return checkpoints.nest(paths.flatten(params) | {
      path: x for path, x in paths.flatten(others).items()
      if is_adapter(path)})


def merge(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
  """Returns (module, parameters) of the same function without adapters.

  The sum is made in float32 and rounded once to the type of the weight.

  Args:
    module: the model, with adapters or without.
    params: its parameters.
  """
  c = module.config
  if not c.lora.rank:
    return module, params
  flat = paths.flatten(nn.meta.unbox(params))
  merged = {path: _merged(path, x, flat, c.lora.scale)
            for path, x in flat.items() if not is_adapter(path)}
  return architectures.build(without_adapters(c)), checkpoints.nest(merged)


def _merged(path: str, w: jax.Array, flat: Mapping[str, jax.Array],
            scale: float) -> jax.Array:
  if path + layers.LORA_A not in flat:
    return w
  a, b = (jnp.asarray(flat[path + name], jnp.float32)
          for name in (layers.LORA_A, layers.LORA_B))
  stacked = a.ndim + b.ndim - 2 - w.ndim  # axes in front of the inputs
  lead, rank = w.shape[:stacked], a.shape[-1]
  inputs = math.prod(a.shape[stacked:-1])
  product = jnp.matmul(a.reshape(*lead, inputs, rank),
                       b.reshape(*lead, rank, -1),
                       precision=jax.lax.Precision.HIGHEST)
  return (jnp.asarray(w, jnp.float32) + scale * product.reshape(w.shape)
          ).astype(w.dtype)
