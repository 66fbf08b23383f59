"""Helpers for the configs of systems: the sizes of a system as a table, and how
a run of its smallest size and of a published size is set."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

import architectures
from common.errors import one_of
from configs import base

# The training of a small size, for minutes of one CPU core.
TINY = dict(batch_size=16, steps=300, lr=3e-3, warmup_steps=30)
# The model of most such sizes of decoders.
SMALL = dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=344,
             max_len=256)
# LLaMA 2's batch in tokens, tokens and rates, where a paper has no others.
PUBLISHED = dict(batch=2**22, tokens=500_000 * 2**22, lr=3e-4,
                 warmup_steps=2000)
# The names in a size that are no fields of config.model.
OF_TRAINING = ('batch', 'batch_size', 'tokens', 'steps', 'warmup', 'decay',
               'length', *(x.name for x in dataclasses.fields(base.Optim)))


def table(names: str, rows: Mapping[str, Sequence[Any]], **same: Any
          ) -> dict[str, dict[str, Any]]:
  """Returns sizes by their names.

  Args:
    names: the names of the columns: fields of config.model, dotted in a group
      of fields, OF_TRAINING, others of the config as 'train.z_loss', and
      `parameters`, the published count.
    rows: the values of each size, by its name.
    **same: the fields that all of them have.
  """
  sizes = {}
  for size, row in rows.items():
    sizes[size] = same | dict(zip(names.split(), row, strict=True))
  return sizes


def config(arch: str, size: str, sizes: Mapping[str, Mapping[str, Any]],
           model: Mapping[str, Any] | None = None,
           run: Mapping[str, Any] | None = None, remat: str = 'full',
           **training: Any) -> ml_collections.ConfigDict:
  """Returns the config of a size of a system.

  Its model has the parts of the system's page (architectures/), then `model`,
  then what its size says. A size that is not `tiny` computes in bfloat16.

  Args:
    arch: model.arch.
    size: the ':size' argument, a key of `sizes`.
    sizes: the fields of each size, by its name; see `table`.
    model: the fields of config.model that all sizes have.
    run: the other fields of the config, dotted, that all sizes have.
    remat: model.remat of a published size.
    **training: of all published sizes, before what theirs says: `batch` in
      tokens, or `batch_size` in rows; `tokens` in all, or `steps`; `warmup` and
      `decay` in tokens, or `warmup_steps`; `length` of a row, where it is not
      model.max_len; and fields of config.optim.
  """
  one_of('size', size, sizes)

  # A size sets fields of the training, of the run, and of the model.
  of_training = dict(PUBLISHED | training)
  if size == 'tiny':
    of_training = dict(TINY)
  of_run, of_model = dict(run or {}), {}
  for name, value in sizes[size].items():
    if name in OF_TRAINING:
      of_training[name] = value
    elif name in base.FIELDS:
      of_run[name] = value
    elif name != 'parameters':
      of_model[name] = value

  c = base.base()
  if size != 'tiny':
    c.model.update(dtype='bfloat16', remat=remat)
  for fields in (architectures.system(arch).PARTS, model or {}, of_model):
    _update(c.model, fields)
  c.model.arch = arch
  if architectures.stack(c.model) == 'encoder-decoder':
    c.model.num_decoder_layers = c.model.num_layers
  _set_training(c, of_training)
  c.update_from_flattened_dict(of_run)
  return c


def _update(model: ml_collections.ConfigDict, fields: Mapping[str, Any]
            ) -> None:
  """Sets fields of config.model; a group of fields, and then dotted ones."""
  dotted = {}
  for name, value in fields.items():
    if '.' in name:
      dotted[name] = value
  model.update({name: value for name, value in fields.items()
                if name not in dotted})
  model.update_from_flattened_dict(dotted)


def _set_training(c: ml_collections.ConfigDict, how: dict[str, Any]) -> None:
  """Sets the length, the batch, the steps and the optimiser; figures in tokens
  become rows and steps."""
  length = how.pop('length', c.model.max_len)
  batch, tokens = how.pop('batch', 0), how.pop('tokens', 0)
  rows = how.pop('batch_size', batch // length)
  c.data.update(length=length, batch_size=rows)
  c.train.steps = how.pop('steps', int(tokens / (rows * length)))
  for part in ('warmup', 'decay'):
    if part in how:
      how[f'{part}_steps'] = int(how.pop(part) / (rows * length))
  c.optim.update(how)


def of(arch: str, sizes: Mapping[str, Mapping[str, Any]], *args: Any,
       **kwargs: Any) -> Callable[..., ml_collections.ConfigDict]:
  """Returns the get_config of a system whose sizes are all set alike, by the
  arguments of `config`."""
  return lambda size='tiny': config(arch, size, sizes, *args, **kwargs)
