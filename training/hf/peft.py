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
from common.errors import require, short
from common.fields import check_number, check_type
from training import hub
from training.hf import files as hf_files, weights
from training.workdir import checkpoints, storage

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
TASKS = {'decoder': 'CAUSAL_LM', 'encoder-decoder': 'SEQ_2_SEQ_LM'}
# What adapter_config.json may say of another adapter than ours. Of use_rslora
# True is read, too.
ONLY = dict(peft_type='LORA', bias='none', use_dora=False, use_rslora=False,
            rank_pattern={}, alpha_pattern={}, modules_to_save=None,
            layer_replication=None, trainable_token_indices=None,
            target_parameters=None, lora_bias=False)
# What it must say, numbers: of the type of the first, and with these bounds.
NUMBERS = {'r': (1, (('>=', 1), ('<=', 2**16))),
           'lora_alpha': (1.0, (('>', 0), ('<=', 1e9))),
           'lora_dropout': (0.0, (('>=', 0), ('<', 1)))}
# Ways to begin A and B that leave the weight of the model as it is.
INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')


def rows(c: ModelConfig) -> Iterator[tuple[hf.Row, bool]]:
  """Yields the row of each A and B of the model (architectures/parts/hf), and
  whether the weight of the module lies as [inputs, outputs].

  Raises:
    RequestError: for a product that transformers has together with others.
  """
  page = architectures.hugging_face(c.arch)
  for ours, axes, theirs, their_axes in page.rows(c):
    names = ours.rpartition('/')[2].split('|')
    if 'E' in axes or not any(layers.adapted(c, n) for n in names):
      continue
    require(len(names) == 1, f'model.lora.targets is {c.lora.targets!r}: '
            f'transformers has {", ".join(names)} of model.arch {c.arch!r} in '
            'one tensor, of which PEFT has no such adapter. Export the merged '
            'model instead')
    into, out = their_axes.split()
    lies_so = axes == into + out
    if not lies_so:
      into, out = out, into
    module = PREFIX + theirs.removesuffix('.weight').replace(*page.module, 1)
    yield ((ours + layers.LORA_A, f'{into}Z', f'{module}.lora_A.weight',
            f'Z {into}'), lies_so)
    yield ((ours + layers.LORA_B, f'Z{out}', f'{module}.lora_B.weight',
            f'{out} Z'), lies_so)


def tensors(c: ModelConfig, params: Any) -> list[tensor_map.Tensor]:
  """Returns each A and B of a model. Its other parameters, or their shapes,
  tell which layer of theirs is which: not all have an adapter."""
  page, shapes = architectures.hugging_face(c.arch), {
      path: x.shape for path, x in paths.flatten(params).items()}
  names = [*page.rows(c), *(row for row, _ in rows(c))]
  return [t for t in tensor_map.expand(names, shapes)
          if weights.is_adapter(t.paths[0])]


def write(c: ModelConfig, params: Any, folder: pathlib.Path, base: str,
          dtype: str = '') -> int:
  """Writes the adapters among `params`; returns how many numbers they have.

  Args:
    c: the model.
    params: its parameters.
    folder: where to; made if it is not there.
    base: the name or the folder of the model that they adapt.
    dtype: of the tensors written; '': that of each parameter.

  Raises:
    RequestError: for a model without adapters, with the head of a task, or
      whose adapters PEFT does not have; and for a folder that holds a run.
  """
  from safetensors.numpy import save_file
  storage.refuse_run(folder, 'the folder')
  require(c.lora.rank, 'this run has no low-rank adapters: its model.lora.rank '
          'is 0')
  require(c.head == 'lm', f'model.head is {c.head!r}: the adapters alone would '
          'leave out the head, which was trained with them. Export the merged '
          'model instead')
  flat, written = {path: np.asarray(x) for path, x in paths.flatten(
      params).items() if weights.is_adapter(path)}, {}
  for t in tensors(c, params):
    x = t.join([flat[t.paths[0]][t.index]])
    kind = np.dtype(dtype or x.dtype)
    weights.check_range(t.paths[0], x, kind)
    written[t.name] = x.astype(kind, copy=False)
  hf_files.refuse_left(folder, (CONFIG, WEIGHTS))
  folder.mkdir(parents=True, exist_ok=True)
  save_file(written, folder / WEIGHTS, metadata={'format': 'pt'})
  alpha = c.lora.alpha
  tree = ONLY | dict(
      r=c.lora.rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
      lora_dropout=c.lora.dropout,
      base_model_name_or_path=base.removeprefix(hub.PREFIX),
      task_type=TASKS.get(architectures.stack(c)), inference_mode=True,
      target_modules=sorted({
          name.removeprefix(PREFIX).rpartition('.lora_')[0]
          for name in written}),
      fan_in_fan_out=any(lies_so for _, lies_so in rows(c)))
  storage.write_json(folder / CONFIG, tree)
  return sum(x.size for x in flat.values())


def read(c: ModelConfig, folder: pathlib.Path) -> tuple[ModelConfig, Any]:
  """Returns the model with the adapters of a folder, and these.

  Args:
    c: the model that they adapt.
    folder: of PEFT's.

  Raises:
    RequestError: naming what the folder has that ours are not.
  """
  file = folder / CONFIG
  require(file.is_file(), f'{file} is missing: it says what the adapters are')
  tree = hf_files.read_object(file)
  # Adapters that begin with some tokens are of later versions than we write.
  for name, known in (ONLY | dict(alora_invocation_tokens=None)).items():
    value = tree.get(name, known)
    require(value == known or not (value or known)
            or name == 'use_rslora' and value is True, f'{file} has {name} '
            f'{short(value)}: only {known!r} is known here')
  init = tree.get('init_lora_weights')
  require((init.lower() if isinstance(init, str) else init) in INITS,
          f'{file} has init_lora_weights {short(init)}, with which A and B '
          "belong to other weights than the model's (choose from "
          f'{", ".join(str(x) for x in INITS if x is not None)}): save them '
          "anew by PEFT's save_pretrained with "
          'path_initial_model_for_weight_conversion, or merge them there')
  tree.setdefault('lora_dropout', 0.0)
  for name, (usual, bounds) in NUMBERS.items():
    check_type(tree.get(name), usual, f'{name} of {file}')
    check_number(f'{name} of {file}', tree[name], bounds)
  source = hf_files.Files(folder / WEIGHTS)
  c = _with_adapters(c, tree, set(source), file)
  shapes = parameter_shapes(architectures.build(c))
  named = tensors(c, shapes)
  for name in sorted({t.name for t in named} ^ set(source)):
    require(name not in source, f'{folder / WEIGHTS} has {name}, which is no '
            'adapter of a product of this model')
    require(name in source, f'{folder / WEIGHTS} has no {name}, though it has '
            'an adapter of the same product in another layer')
  names = weights.Names(architectures.hugging_face(c.arch), source, c)
  flat = {path: np.zeros(x.shape, np.float32) for path, x in paths.flatten(
      shapes).items() if weights.is_adapter(path)}
  for t in named:
    wrong = names.wrong(t)
    require(not wrong, f'{folder / WEIGHTS}: {wrong}')
    x = source[t.name]
    weights.check_range(t.name, x, np.dtype(c.param_dtype))
    sizes = {axis: (0, t.sizes[axis]) for axis in t.ours[0]}
    flat[t.paths[0]][t.index] = t.part(x.__getitem__, 0, sizes)
  return c, checkpoints.nest({path: jnp.asarray(x, c.param_dtype)
                              for path, x in flat.items()})


def _with_adapters(c: ModelConfig, tree: Mapping[str, Any], names: set[str],
                   file: pathlib.Path) -> ModelConfig:
  """Returns the model whose products have adapters as the file's names say."""
  alpha = float(tree['lora_alpha'])
  if tree.get('use_rslora'):  # x W + (alpha / sqrt(rank)) x A B
    alpha *= math.sqrt(tree['r'])

  def with_targets(targets: str) -> ModelConfig:
    return dataclasses.replace(c, lora=dataclasses.replace(
        c.lora, rank=tree['r'], alpha=alpha, targets=targets,
        dropout=float(tree['lora_dropout'])))

  # One that shares its tensor is found missing by the names that are left over.
  fused = {name for ours, *_ in architectures.hugging_face(c.arch).rows(c)
           if '|' in ours for name in ours.rpartition('/')[2].split('|')}
  targets = []
  for product in set(layers.PRODUCTS) - fused:
    # Of any layer: the first one may have no such product.
    theirs = [re.sub(r'\\\{[mn]\\\}', r'\\d+', re.escape(row[2]))
              for row, *_ in rows(with_targets(product))]
    if any(re.fullmatch('|'.join(theirs), name) for name in names):
      targets.append(product)
  require(targets, f'{file.parent / WEIGHTS} has an adapter of no product of '
          f'model.arch {c.arch!r}: its tensors are such as '
          f'{", ".join(sorted(names)[:2])}')
  return architectures.resolve(with_targets(','.join(
      name for name in layers.PRODUCTS if name in targets)))
