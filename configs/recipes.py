"""What the configs of systems have in common: the sizes of a system as a table,
and how a run of its smallest size and of a published size is set."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import ml_collections

import architectures
from common.errors import one_of
from configs import base

# Of one CPU core, in minutes.
TINY = dict(batch_size=16, steps=300, lr=3e-3, warmup_steps=30)
# The model of most such sizes of decoders.
SMALL = dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=344,
             max_len=256)
# LLaMA 2's batch in tokens, tokens and rates, where a paper has no others.
PUBLISHED = dict(batch=2**22, tokens=500_000 * 2**22, lr=3e-4,
                 warmup_steps=2000)
# Of a size, what are no fields of config.model.
OF_TRAINING = ('batch', 'batch_size', 'tokens', 'steps', 'warmup', 'decay',
               'length', *(x.name for x in dataclasses.fields(base.Optim)))


def table(names: str, rows: Mapping[str, Sequence[Any]], **same: Any
          ) -> dict[str, dict[str, Any]]:
  """Returns sizes by their names.

  Args:
    names: of the columns: fields of config.model, dotted in a group of fields,
      OF_TRAINING, others of the config as 'train.z_loss', and `parameters`, the
      published count.
    rows: the values of each size, by its name.
    **same: what all of them have.
  """
  return {size: same | dict(zip(names.split(), row, strict=True))
          for size, row in rows.items()}


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
    sizes: what a size has, by its name; see `table`.
    model: fields of config.model of all sizes.
    run: other fields of the config, dotted, of all sizes.
    remat: model.remat of a published size.
    **training: of all published sizes, before what theirs says: `batch` in
      tokens, or `batch_size` in rows; `tokens` in all, or `steps`; `warmup` and
      `decay` in tokens, or `warmup_steps`; `length` of a row, where it is not
      model.max_len; and fields of config.optim.
  """
  one_of('size', size, sizes)
  size_fields = {
      name: x for name, x in sizes[size].items() if name != 'parameters'}
  taken = lambda names: {name: size_fields.pop(name) for name in names
                         if name in size_fields}
  how = (TINY if size == 'tiny' else PUBLISHED | training) | taken(OF_TRAINING)
  run = dict(run or {}) | taken(base.FIELDS)
  c = base.base()
  if size != 'tiny':
    c.model.update(dtype='bfloat16', remat=remat)
  for fields in (architectures.system(arch).PARTS, model or {}, size_fields):
    c.model.update({k: x for k, x in fields.items() if '.' not in k})
    c.model.update_from_flattened_dict(
        {k: x for k, x in fields.items() if '.' in k})
  c.model.arch = arch
  if architectures.stack(c.model) == 'encoder-decoder':
    c.model.num_decoder_layers = c.model.num_layers
  length = how.pop('length', c.model.max_len)
  batch, tokens = how.pop('batch', 0), how.pop('tokens', 0)
  rows = how.pop('batch_size', batch // length)
  c.data.update(length=length, batch_size=rows)
  c.train.steps = how.pop('steps', int(tokens / (rows * length)))
  for part in {'warmup', 'decay'} & how.keys():
    how[f'{part}_steps'] = int(how.pop(part) / (rows * length))
  c.optim.update(how)
  c.update_from_flattened_dict(run)
  return c


def of(arch: str, sizes: Mapping[str, Mapping[str, Any]], *args: Any,
       **kwargs: Any) -> Callable[..., ml_collections.ConfigDict]:
  """Returns the get_config of a system whose sizes are all set alike, by the
  arguments of `config`."""
  return lambda size='tiny': config(arch, size, sizes, *args, **kwargs)
