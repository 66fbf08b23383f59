"""Low-rank adapters in PEFT's format, in and out: adapter_config.json and
adapter_model.safetensors, beside the folder of the model that they adapt.

PEFT keeps A as [rank, inputs] and B as [outputs, rank], under the name of the
module that it adapts. Where transformers has query, key and value in one
tensor, an adapter of PEFT's is one of all three, which ours is not: refused.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import hf, layers
from architectures.parts import paths
from architectures.parts.config import ModelConfig
from architectures.parts.hf import tensor_map
from architectures.parts.sharding import parameter_shapes
from common.errors import RequestError, require, shorten
from common.fields import check_number, check_type
from training import hub
from training.hf import files as hf_files, weights
from training.workdir import checkpoints, storage

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # What the names of PEFT's tensors begin with.
# PEFT's task_type by the stack of a model.
TASK_OF_STACK = {'decoder': 'CAUSAL_LM', 'encoder-decoder': 'SEQ_2_SEQ_LM'}
# Fields of adapter_config.json, each with the only value of our adapters.
# A use_rslora of True is read, too.
KNOWN_VALUES = dict(
    peft_type='LORA', bias='none', use_dora=False, use_rslora=False,
    rank_pattern={}, alpha_pattern={}, modules_to_save=None,
    layer_replication=None, trainable_token_indices=None,
    target_parameters=None, lora_bias=False)
# Numbers that adapter_config.json must have: a value of their type, and bounds.
DEFAULT_AND_BOUNDS = {'r': (1, (('>=', 1), ('<=', 2**16))),
                      'lora_alpha': (1.0, (('>', 0), ('<=', 1e9))),
                      'lora_dropout': (0.0, (('>=', 0), ('<', 1)))}
# Ways to begin A and B that leave the weight of the model as it is.
KNOWN_INITIALISATIONS = (True, False, None, 'gaussian', 'eva', 'orthogonal',
                         'mica')


def rows_of_adapters(config: ModelConfig) -> Iterator[tuple[hf.Row, bool]]:
  """Lists the matrices A and B of a model's low-rank adapters, each with the
  name that its tensor has in a file of PEFT.

  Args:
    config: the model with adapters.

  Yields:
    A pair (row, has_inputs_first). The row is four texts: the path of our
    parameter, the letters of its axes, the name of PEFT's tensor, and the
    letters of its axes, with a blank between the axes of its rows and of its
    columns. has_inputs_first says whether the adapted weight lies as [inputs,
    outputs] in transformers.

  Raises:
    RequestError: for an adapter of a product that transformers computes
      together with others.
  """
  hf_format = architectures.hugging_face(config.arch)
  for our_path, our_axes, hf_name, hf_axes in hf_format.rows(config):
    # Skip weights without an adapter, and those of experts (the axis E). A path
    # such as .../query|key names parameters that are one tensor in
    # transformers.
    names = our_path.rpartition('/')[2].split('|')
    has_adapter = any(layers.has_adapter(config, name) for name in names)
    if 'E' in our_axes or not has_adapter:
      continue
    require(len(names) == 1, f'model.lora.targets is {config.lora.targets!r}: '
            f'transformers has {", ".join(names)} of model.arch '
            f'{config.arch!r} in one tensor, of which PEFT has no such '
            'adapter. Export the merged model instead')

    # Find which axes are inputs: torch.nn.Linear has a weight as [outputs,
    # inputs], GPT-2 as [inputs, outputs].
    input_axes, output_axes = hf_axes.split()
    has_inputs_first = our_axes == input_axes + output_axes
    if not has_inputs_first:
      input_axes, output_axes = output_axes, input_axes
    hf_module = hf_name.removesuffix('.weight').replace(*hf_format.module, 1)
    # The adapter adds B A to the weight. Z is the axis between A and B, whose
    # size is the rank. PEFT's matrices always lie as [outputs, inputs].
    row_of_a = (our_path + layers.SUFFIX_OF_LORA_A, f'{input_axes}Z',
                f'{PREFIX}{hf_module}.lora_A.weight', f'Z {input_axes}')
    row_of_b = (our_path + layers.SUFFIX_OF_LORA_B, f'Z{output_axes}',
                f'{PREFIX}{hf_module}.lora_B.weight', f'{output_axes} Z')
    yield row_of_a, has_inputs_first
    yield row_of_b, has_inputs_first


def tensors_of_adapters(config: ModelConfig, params: Any
                        ) -> list[tensor_map.Tensor]:
  """Lists the tensors that a file of PEFT has for the low-rank adapters of a
  model.

  Args:
    config: the model with adapters.
    params: the parameters of the model, or their shapes. They tell how many
      layers there are, as not every layer may have an adapter.
  """
  hf_format = architectures.hugging_face(config.arch)
  shapes = {path: x.shape for path, x in paths.flatten_by_path(params).items()}
  # The rows of the model are needed only to count its layers.
  all_rows = [*hf_format.rows(config)]
  for row, _ in rows_of_adapters(config):
    all_rows.append(row)
  adapters = []
  for tensor in tensor_map.map_tensors(all_rows, shapes):
    if weights.is_adapter(tensor.paths[0]):
      adapters.append(tensor)
  return adapters


def write_adapters(config: ModelConfig, params: Any, folder: pathlib.Path,
                   base: str, dtype: str = '') -> int:
  """Writes the low-rank adapters of a model into a folder, in PEFT's format.

  Args:
    config: the model.
    params: its parameters, a tree of arrays.
    folder: where to; made if it is not there.
    base: the name or the folder of the model that they adapt.
    dtype: the type of the tensors written; '': that of each parameter.

  Returns:
    How many numbers the adapters have.

  Raises:
    RequestError: for a model without adapters, with the head of a task, or
      whose adapters PEFT does not have; and for a folder that holds a run.
  """
  from safetensors.numpy import save_file
  storage.refuse_folder_of_run(folder, 'the folder')
  require(config.lora.rank,
          'this run has no low-rank adapters: its model.lora.rank is 0')
  require(config.head == 'lm',
          f'model.head is {config.head!r}: the adapters alone would leave out '
          'the head, which was trained with them. Export the merged model '
          'instead')

  # The tensors.
  flat = {}
  for path, x in paths.flatten_by_path(params).items():
    if weights.is_adapter(path):
      flat[path] = np.asarray(x)
  written = {}
  for tensor in tensors_of_adapters(config, params):
    path = tensor.paths[0]
    x = tensor.join_parameters([flat[path][tensor.indices[0]]])
    tensor_dtype = np.dtype(dtype or x.dtype)
    weights.check_values_fit(path, x, dtype=tensor_dtype)
    written[tensor.name] = x.astype(tensor_dtype, copy=False)
  hf_files.refuse_files_left(folder, (CONFIG, WEIGHTS))
  folder.mkdir(parents=True, exist_ok=True)
  save_file(written, folder / WEIGHTS, metadata={'format': 'pt'})

  # Their description.
  modules = set()
  for name in written:
    module, _, _ = name.removeprefix(PREFIX).rpartition('.lora_')
    modules.add(module)
  alpha = config.lora.alpha
  if alpha == int(alpha):
    alpha = int(alpha)
  has_inputs_first = any(
      inputs_first for _, inputs_first in rows_of_adapters(config))
  stack = architectures.stack(config)
  tree = KNOWN_VALUES | dict(
      r=config.lora.rank, lora_alpha=alpha, lora_dropout=config.lora.dropout,
      base_model_name_or_path=base.removeprefix(hub.HUB_PREFIX),
      task_type=TASK_OF_STACK.get(stack), inference_mode=True,
      target_modules=sorted(modules), fan_in_fan_out=has_inputs_first)
  storage.write_json(folder / CONFIG, tree)
  return sum(x.size for x in flat.values())


def read_adapters(config: ModelConfig, folder: pathlib.Path
                  ) -> tuple[ModelConfig, Any]:
  """Reads the low-rank adapters that PEFT has written into a folder.

  Args:
    config: the model that they adapt.
    folder: the path of the folder.

  Returns:
    The config of the model with these adapters, and their parameters.

  Raises:
    RequestError: naming what the folder has and our adapters have not.
  """
  tree = _read_description(folder / CONFIG)
  source = hf_files.Files(folder / WEIGHTS)
  config = _add_adapter_fields(config, tree=tree, names=set(source),
                               file=folder / CONFIG)
  shapes = parameter_shapes(architectures.build(config))

  # Each adapter is there, and there is no other.
  tensors = tensors_of_adapters(config, shapes)
  names_in_model = {tensor.name for tensor in tensors}
  for name in sorted(names_in_model ^ set(source)):
    require(name not in source, f'{folder / WEIGHTS} has {name}, which is no '
            'adapter of a product of this model')
    require(name in source, f'{folder / WEIGHTS} has no {name}, though it has '
            'an adapter of the same product in another layer')

  # Each is put where it stands among the layers.
  hf_format = architectures.hugging_face(config.arch)
  finder = weights.TensorFinder(hf_format, source=source, config=config)
  flat = {}
  for path, x in paths.flatten_by_path(shapes).items():
    if weights.is_adapter(path):
      flat[path] = np.zeros(x.shape, np.float32)
  for tensor in tensors:
    fault = finder.find_fault(tensor)
    require(not fault, f'{folder / WEIGHTS}: {fault}')
    x = source[tensor.name]
    weights.check_values_fit(tensor.name, x, dtype=np.dtype(config.param_dtype))
    ranges = {axis: (0, tensor.sizes[axis]) for axis in tensor.ours[0]}
    matrix = tensor.read_parameter(x.__getitem__, 0, ranges)
    flat[tensor.paths[0]][tensor.indices[0]] = matrix
  params = {}
  for path, x in flat.items():
    params[path] = jnp.asarray(x, config.param_dtype)
  return config, checkpoints.nest_by_path(params)


def _read_description(file: pathlib.Path) -> dict[str, Any]:
  """Reads and checks the adapter_config.json of a folder of PEFT.

  Args:
    file: the path of the adapter_config.json.

  Raises:
    RequestError: for adapters that do something which ours do not.
  """
  require(file.is_file(), f'{file} is missing: it says what the adapters are')
  tree = hf_files.read_json_object(file)
  # Check the fields with only one known value. alora_invocation_tokens is of
  # later versions of PEFT than the one whose format we write.
  known_values = KNOWN_VALUES | dict(alora_invocation_tokens=None)
  for name, known in known_values.items():
    value = tree.get(name, known)
    both_empty = not value and not known
    is_rslora = name == 'use_rslora' and value is True
    if value != known and not both_empty and not is_rslora:
      raise RequestError(f'{file} has {name} {shorten(value)}: only {known!r} '
                         'is known here')
  # Some initialisations also change the weights of the model itself, to which A
  # and B then belong.
  init = tree.get('init_lora_weights')
  word = init.lower() if isinstance(init, str) else init
  if word not in KNOWN_INITIALISATIONS:
    choices = ', '.join(str(x) for x in KNOWN_INITIALISATIONS if x is not None)
    raise RequestError(
        f'{file} has init_lora_weights {shorten(init)}, with which A and B '
        f"belong to other weights than the model's (choose from {choices}): "
        "save them anew by PEFT's save_pretrained with "
        'path_initial_model_for_weight_conversion, or merge them there')
  # Check that the numbers are in their ranges.
  tree.setdefault('lora_dropout', 0.0)
  for name, (value_of_type, bounds) in DEFAULT_AND_BOUNDS.items():
    check_type(tree.get(name), default=value_of_type,
               subject=f'{name} of {file}')
    check_number(f'{name} of {file}', value=tree[name], bounds=bounds)
  return tree


def _add_adapter_fields(config: ModelConfig, tree: Mapping[str, Any],
                        names: set[str], file: pathlib.Path) -> ModelConfig:
  """Returns the config of a model with the adapters of a folder: their rank and
  scale, and the products that have one by the names of the tensors.

  Args:
    config: the model.
    tree: the adapter_config.json.
    names: the names of the tensors.
    file: the path of the adapter_config.json.

  Raises:
    RequestError: where no product has an adapter.
  """
  alpha = float(tree['lora_alpha'])
  if tree.get('use_rslora'):  # x W + (alpha / sqrt(rank)) x A B
    alpha *= math.sqrt(tree['r'])
  lora = dataclasses.replace(config.lora, rank=tree['r'], alpha=alpha,
                             dropout=float(tree['lora_dropout']))

  def with_targets(targets: str) -> ModelConfig:
    """Returns the config with adapters of these products."""
    return dataclasses.replace(
        config, lora=dataclasses.replace(lora, targets=targets))

  # Products that share a tensor in transformers have no adapter there.
  fused_products: set[str] = set()
  for our_path, *_ in architectures.hugging_face(config.arch).rows(config):
    if '|' in our_path:
      fused_products.update(our_path.rpartition('/')[2].split('|'))

  # A product has an adapter in some layer: the first may have no such product.
  targets = []
  for product in layers.NAMES_OF_PRODUCTS:
    if product in fused_products:
      continue
    patterns = []
    for row, _ in rows_of_adapters(with_targets(product)):
      patterns.append(_pattern_of_row(row))
    pattern_of_product = re.compile('|'.join(patterns))
    if any(map(pattern_of_product.fullmatch, names)):
      targets.append(product)
  require(targets, f'{file.parent / WEIGHTS} has an adapter of no product of '
          f'model.arch {config.arch!r}: its tensors are such as '
          f'{", ".join(sorted(names)[:2])}')
  return architectures.resolve(with_targets(','.join(targets)))


def _pattern_of_row(row: hf.Row) -> str:
  """Returns a regular expression of the names of a row's tensors, with any
  number of a layer."""
  return re.sub(r'\\\{[mn]\\\}', r'\\d+', re.escape(row[2]))
