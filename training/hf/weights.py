"""Weights in the Hugging Face format, in and out, by the pages' name tables.

  module, params = weights.from_hf(folder)
  weights.to_hf(module, params, folder)

In: the parameters are made one by one, each device's shard by itself, and of a
tensor is read what falls into the shard: host memory holds no more than the
largest tensor and a shard, or two while one is handed over. Out: tensor by
tensor, of which host memory holds one and its rearranged copies. Nothing is
left out in silence: a tensor or parameter without a counterpart is an error or,
with `partial`, listed.

Low-rank adapters are merged where weights go out: W + (alpha / rank) A B is a
weight like any other, by which the model without adapters computes the same
function (Hu et al. 2021, section 4.1), to the rounding of a sum that is added
up in another order.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
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
from architectures.parts import checks, hf, linear
from architectures.parts.config import ModelConfig
from architectures.parts.hf import tensor_map
from configs.errors import require
from training import paths, progress
from training.hf import config as hf_config
from training.hf import files as hf_files
from training.hf import generation as hf_generation
from training.hf import heads as hf_heads
from training.step import parameter_shapes
from training.workdir import checkpoints, storage

SHARD_BYTES = 5 * 10**9
PART_BYTES = 2 ** 24  # of two tensors that are compared

Source = Mapping[str, np.ndarray] | hf_files.Files


class Loaded(NamedTuple):
  """Parameters, and a line for each thing of either side that was skipped."""
  params: Any
  skipped: list[str]


def from_hf(path: str | os.PathLike, *, partial: bool = False, seed: int = 0,
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


def read_params(module: nn.Module, source: Source, *, like: Any = None,
                partial: bool = False, seed: int = 0, new_head: bool = False
                ) -> Loaded:
  """Returns the parameters of `module`, from tensors by their HF names.

  Args:
    module: the model.
    source: the tensors: hf_files.Files, or arrays by name.
    like: the parameters' shapes with shardings, as in TrainState; none: on
      one device.
    partial, seed: as for from_hf.
    new_head: whether the head of a task is drawn where the files lack it, and
      that of a language model passed over.
  """
  page = architectures.hugging_face(module.config.arch)
  like = nn.meta.unbox(like or jax.eval_shape(
      functools.partial(_init, module), jax.random.key(0)))
  shapes = {path: leaf.shape for path, leaf in paths.flatten(like).items()}
  if not isinstance(source, hf_files.Files):
    source = hf_files.Arrays(source)
  names = _Names(page, source, module.config)
  rows = page.rows(module.config)
  _check_number(tensor_map.count(rows, shapes), source, partial)
  tensors = tensor_map.expand(rows, shapes)
  fills: dict[str, list] = {path: [] for path in shapes}
  names.check_types(tensors)
  bad: set[str] = set()
  heads = names.there(names_left_out(module)) if new_head else []
  passed = [f'{name} of the files is of the head of a language model'
            for name in heads]
  spare = hf_heads.spare(page, tensors, set(source) - set(heads))
  lacking = hf_heads.lacking(page, tensors, set(source))
  passed += [hf_heads.is_passed_over(*row) for row in spare.items()]
  passed += [hf_heads.is_new(*row) for row in lacking.items()]
  skipped = names.unused(tensors, [*heads, *sum(spare.values(), [])])
  new_names = {tensor.name for those in lacking.values() for tensor in those}
  for tensor in tensors:
    if tensor.name in new_names:
      bad.update(tensor.paths)
    elif wrong := names.wrong(tensor):
      new = (new_head and tensor.paths[0].startswith(TASK)
             and not names.there([tensor.name]))
      (passed if new else skipped).append(wrong + ', so it is drawn' * new)
      bad.update(tensor.paths)
    for i, path in enumerate(tensor.paths):
      fills[path].append((tensor, i))
  require(partial or not skipped, 'the weights and the model differ:\n  '
          + '\n  '.join(skipped[:20])
          + ('\n  ...' if len(skipped) > 20 else ''))
  drawn = draw(module, like, bad, seed) if bad else {}
  with progress.during('reading parameters', len(shapes)) as advance:

    def read(key: Any, leaf: Any):
      path = paths.join(key)
      x = drawn[path] if path in bad else _fill(leaf, fills[path], names)
      advance()
      return x

    params = jax.tree_util.tree_map_with_path(read, like)
  return Loaded(params, passed + skipped)


def _check_number(needed: int, source: Source, partial: bool) -> None:
  """Raises RequestError where the model has another size altogether than the
  files, before each of its tensors is looked for."""
  held = len(list(source))
  require(partial or needed <= 2 * held + 100,
          f'config.json is of a model of {needed:,} tensors, of which the '
          f'files hold {held:,}')


class _Names:
  """Tensors by their names, as the files spell them: some leave a prefix out.
  """

  def __init__(self, page: hf.HuggingFace,
               source: hf_files.Files | hf_files.Arrays, config: ModelConfig):
    self._page, self._source = page, source
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

  def _same(self, one: str, other: str) -> bool:
    """Whether two tensors are equal, of which parts are read."""
    shape = self._source.shape(self.find(one))
    if shape != self._source.shape(self.find(other)):
      return False
    rows = max(1, PART_BYTES // max(1, 4 * int(np.prod(shape[1:]))))
    parts = [(slice(i, min(i + rows, shape[0])),)
             for i in range(0, shape[0], rows)]
    return all(np.array_equal(self.cut(one, part), self.cut(other, part))
               for part in parts)

  def check_types(self, tensors: Sequence[tensor_map.Tensor]) -> None:
    """Raises RequestError naming a tensor that is no array of weights: one of
    whole numbers, or of a type that a quantisation has left."""
    for name in (self.find(tensor.name) for tensor in tensors):
      if name in self._source:
        found = self._source.dtype(name)
        require(found in hf_files.DTYPES, f'{name} is of type {found}: weights '
                f'are read from {", ".join(hf_files.DTYPES)}')

  def wrong(self, tensor: tensor_map.Tensor) -> str:
    """Returns what stands against reading `tensor`, or ''."""
    if self.find(tensor.name) not in self._source:
      return f'{" and ".join(tensor.paths)}: the files have no {tensor.name}'
    shape = self._source.shape(self.find(tensor.name))
    return '' if shape == tensor.shape else (
        f'{tensor.name} is {shape} in the files and {tensor.shape} in the '
        'model')

  def there(self, names: Iterable[str]) -> list[str]:
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
      if name not in tied:
        lines.append(f'{name} of the files has no place in the model')
      elif not self._same(name, tied[name]):
        lines.append(f'{name} of the files differs from {tied[name]}, to which '
                     'the model ties it')
    return lines


def _fill(leaf: Any, fills: list, names: _Names) -> jax.Array:
  """Returns one parameter, each shard read where it lies, one at a time."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  devices: dict[tuple, list] = {}
  places: Any = sharding.addressable_devices_indices_map(leaf.shape)
  for device, slices in places.items():
    ranges = tuple(s.indices(n)[:2] for s, n in zip(slices, leaf.shape))
    devices.setdefault(ranges, []).append(device)
  placed = []
  for ranges, same in devices.items():
    shard = _shard(leaf.dtype, ranges, fills, names)
    placed += jax.block_until_ready(
        [jax.device_put(shard, device) for device in same])
    del shard  # before the next one
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, placed)


def _shard(dtype: np.dtype, ranges: tuple, fills: list, names: _Names
           ) -> np.ndarray:
  """Returns the part of a parameter that lies in `ranges`, (start, stop)s."""
  shard = np.empty([stop - start for start, stop in ranges], dtype)
  for tensor, which in fills:
    lead = len(tensor.index)
    if all(a <= i < b for i, (a, b) in zip(tensor.index, ranges)):
      place = tuple(i - a for i, (a, _) in zip(tensor.index, ranges))
      part = tensor.part(functools.partial(names.cut, tensor.name), which,
                         dict(zip(tensor.ours[which], ranges[lead:])))
      name, largest = names.find(tensor.name), _largest(part)
      require(np.isfinite(largest), f'{name} has a value that is no finite '
              'number')
      most = float(jnp.finfo(dtype).max)
      require(largest <= most, f'{name} has the value {largest:g}, and '
              f'{dtype} ends at {most:g}: read it as another dtype')
      shard[place] = part
  return shard


def _largest(x: np.ndarray) -> float:
  """The largest |value|, NaN where one is NaN, without a copy of `x`."""
  with np.errstate(invalid='ignore'):  # NumPy's warning of a NaN
    return float(max(x.max(), -x.min(), key=abs)) if x.size else 0.0


def _init(module: nn.Module, key: jax.Array):
  return module.init(key, jnp.zeros((1, 1), jnp.int32))['params']


def draw(module: nn.Module, like: Any, wanted: set[str], seed: int
         ) -> dict[str, jax.Array]:
  """Returns the initial values of the parameters `wanted` alone, by path."""

  def init(key: jax.Array):
    flat = paths.flatten(nn.meta.unbox(_init(module, key)))
    return {path: flat[path] for path in wanted}

  flat = paths.flatten(like)
  shardings = {path: getattr(flat[path], 'sharding', None) for path in wanted}
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def to_hf(module: nn.Module, params: Any, folder: str | os.PathLike, *,
          dtype: str = '', shard_bytes: int = SHARD_BYTES,
          generation: hf_generation.Generation | None = None,
          labels: Sequence[str] = (), bare: bool = False) -> None:
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
    bare: whether the stack alone is written, without its head.

  Raises:
    ValueError: naming a part of the model that transformers does not have, or
      what the folder holds: a run, or weights that would stay.
  """
  storage.refuse_run(folder, 'the folder')
  module, params = merge(module, params)
  config: ModelConfig = module.config
  page = architectures.hugging_face(config.arch)
  rows = page.bare_rows(config) if bare else page.rows(config)
  tree = (hf_config.write_bare(config) if bare
          else hf_config.write(config, labels))
  if generation is not None:
    tree |= generation.fields
  flat = paths.flatten(nn.meta.unbox(params))
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  if bare:
    places = [found for _, found, *_ in tensor_map.places(rows, shapes)]
    shapes = {path: shapes[path] for path in sum(places, ())}
  tensors = tensor_map.expand(rows, shapes)
  kinds = {tensor.name: hf_files.Kind(
      tensor.shape, np.dtype(dtype or flat[tensor.paths[0]].dtype))
           for tensor in tensors}
  for tensor in tensors:
    check_range(tensor, _theirs(tensor, flat), kinds[tensor.name].dtype)
  folder = pathlib.Path(folder)
  said = generation.options if generation is not None else None
  hf_files.refuse_left(folder, {
      *hf_files.written(kinds, shard_bytes),
      *[hf_generation.FILE] * (said is not None)})
  folder.mkdir(parents=True, exist_ok=True)
  hf_files.write(
      folder, kinds,
      ((t.name, _theirs(t, flat).astype(kinds[t.name].dtype, copy=False))
       for t in progress.each(tensors, 'writing tensors')), shard_bytes)
  tree['dtype'] = dtype or config.param_dtype
  (folder / 'config.json').write_text(json.dumps(tree, indent=2) + '\n')
  if said is not None:
    (folder / hf_generation.FILE).write_text(json.dumps(said, indent=2) + '\n')


def check_range(tensor: tensor_map.Tensor, x: np.ndarray, dtype: np.dtype
                ) -> None:
  """Raises RequestError where `x`, to be written as `tensor`, has a value that
  is not finite, or that `dtype` does not reach."""
  most, largest = float(jnp.finfo(dtype).max), _largest(x)
  name = ' and '.join(tensor.paths)
  require(np.isfinite(largest), f'{name} has a value that is no finite number: '
          'export another step')
  require(largest <= most, f'{name} has the value {largest:g}, and '
          f'{dtype.name} ends at {most:g}: export it as another --dtype')


def _theirs(tensor: tensor_map.Tensor, flat: dict[str, Any]) -> np.ndarray:
  return tensor.join([np.asarray(flat[path][tensor.index])
                      for path in tensor.paths])


TASK = 'task/'  # of the paths of a task's head


def is_new_head(ours: ModelConfig, theirs: ModelConfig) -> bool:
  """Whether `ours` has the head of a task, and `theirs` predicts tokens."""
  return ours.head != 'lm' and theirs.head == 'lm'


def left_out(module: nn.Module) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the parameters, by path, that the language model has
  and `module`, with its head of a task, has not."""
  ours = _shapes(module)
  lm = architectures.build(dataclasses.replace(
      module.config, head='lm', num_labels=0, head_dropout=0.0,
      pooling='cls'))
  return {path: shape for path, shape in _shapes(lm).items()
          if path not in ours}


def names_left_out(module: nn.Module) -> set[str]:
  """Returns their names in Hugging Face's format."""
  lm = dataclasses.replace(module.config, head='lm')
  page = architectures.hugging_face(lm.arch)
  shapes = left_out(module)
  rows = [row for row in page.rows(lm) if row[0] in shapes]
  return {tensor.name for tensor in tensor_map.expand(rows, shapes)} | set(
      page.tied)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
  return {path: x.shape for path, x in paths.flatten(
      parameter_shapes(module)).items()}


def without_adapters(model: ModelConfig) -> ModelConfig:
  """Returns the same model without adapters."""
  return dataclasses.replace(model, lora=linear.LoraConfig())


def same_adapters(one: ModelConfig, other: ModelConfig) -> bool:
  """Whether two models have the same adapters, or none."""
  fields = lambda c: (c.lora.rank, c.lora.rank and (c.lora.scale, *(
      name for name in checks.products(c) if linear.adapted(c, name))))
  return fields(one) == fields(other)


def is_adapter(path: str) -> bool:
  """Whether the parameter at `path` is A or B of an adapter."""
  return path.endswith((linear.LORA_A, linear.LORA_B))


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
  if path + linear.LORA_A not in flat:
    return w
  a, b = (jnp.asarray(flat[path + name], jnp.float32)
          for name in (linear.LORA_A, linear.LORA_B))
  layers = a.ndim + b.ndim - 2 - w.ndim  # axes in front of the inputs
  lead, rank = w.shape[:layers], a.shape[-1]
  inputs = math.prod(a.shape[layers:-1])
  product = jnp.matmul(a.reshape(*lead, inputs, rank),
                       b.reshape(*lead, rank, -1),
                       precision=jax.lax.Precision.HIGHEST)
  return (jnp.asarray(w, jnp.float32) + scale * product.reshape(w.shape)
          ).astype(w.dtype)
