"""A layer of Gated DeltaNet, and transformers' on the same numbers.

`python -m tests.helpers.recorded_deltanet` writes what transformers computes to
tests/data/layers; it needs PyTorch and transformers, which the tests do not.
The row is longer than a piece, and heads of keys serve two heads of values.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import architectures
from architectures import qwen3_next
from architectures.parts import mixers
from architectures.parts.context import Context
from architectures.parts.hf import tensor_map
from tests.helpers import models

FILE = pathlib.Path(__file__).parents[1] / 'data/layers/deltanet.safetensors'
SIZES = dict(key_heads=2, value_heads=4, key_dim=6, value_dim=5, conv=4)
WIDTH, LENGTH = 8, 70
THEIRS = 'model.layers.0.linear_attn.'


def config(dtype: str = 'float32') -> architectures.ModelConfig:
  return architectures.resolve(models.config(
      'qwen3_next', d_model=WIDTH, num_layers=1, dtype=dtype, deltanet=SIZES,
      pattern='linear', kinds=dict(linear=dict(mixer='deltanet'))))


def drawn() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """Returns the parameters by path, an input, and the gradient of the output.
  """
  J, H, K, U, W = SIZES.values()
  draw = np.random.RandomState(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  params = dict(
      query=normal(WIDTH, J, K), key=normal(WIDTH, J, K),
      value=normal(WIDTH, H, U), output_gate=normal(WIDTH, H, U),
      rate=normal(WIDTH, H), decay=normal(WIDTH, H), query_conv=normal(W, J, K),
      key_conv=normal(W, J, K), value_conv=normal(W, H, U),
      decay_scale=normal(H), decay_bias=normal(H) - 2, out=normal(H, U, WIDTH),
      **{'out_norm/scale': 1 + 0.2 * normal(U)})
  params = {name: x if x.ndim < 2 or 'conv' in name else 0.4 * x
            for name, x in params.items()}
  return params, normal(1, LENGTH, WIDTH), normal(1, LENGTH, WIDTH)


def ours(dtype: str = 'float32') -> dict[str, np.ndarray]:
  """Returns the output, and the gradients of the input `x` and of the
  parameters."""
  c = config(dtype)
  params, x, d = drawn()
  scale = params.pop('out_norm/scale')
  layer = mixers.MIXERS['deltanet'].module(c.of_kind('linear'),
                                           c.layer_pattern()[0])

  @jax.jit
  def run(params, x, d):
    def apply(params, x):
      ctx = Context(jnp.arange(LENGTH)[None])
      return layer.apply({'params': params}, x, ctx, None)[0]
    y, back = jax.vjp(apply, params, x)
    return y, *back(d)

  y, grads, dx = run(params | dict(out_norm=dict(scale=scale)),
                     jnp.asarray(x, dtype), jnp.asarray(d, dtype))
  grads['out_norm/scale'] = grads.pop('out_norm')['scale']
  return {name: np.asarray(value, np.float32) for name, value in (
      grads | dict(output=y, x=dx)).items()}


def theirs(dtype: str = 'float32') -> dict[str, np.ndarray]:
  """Returns the same of transformers' layer."""
  import torch
  from transformers.models.qwen3_next import configuration_qwen3_next as fields
  from transformers.models.qwen3_next import modeling_qwen3_next as modeling
  c, (params, x, d) = config(), drawn()
  J, H, K, U, W = SIZES.values()
  layer = modeling.Qwen3NextGatedDeltaNet(fields.Qwen3NextConfig(
      hidden_size=WIDTH, num_hidden_layers=1, rms_norm_eps=c.norm_eps,
      linear_num_key_heads=J, linear_num_value_heads=H, linear_key_head_dim=K,
      linear_value_head_dim=U, linear_conv_kernel_dim=W,
      layer_types=['linear_attention']), 0)
  at = 'decoder/layers/block_0/attention/'
  tensors = tensor_map.expand(
      [row for row in qwen3_next.HF.rows(c) if row[0].startswith(at)],
      {at + name: (1, *value.shape) for name, value in params.items()})
  named = dict(layer.named_parameters())
  for t in tensors:
    named[t.name.removeprefix(THEIRS)].data.copy_(torch.tensor(
        t.join([params[path.removeprefix(at)] for path in t.paths])))
  assert len(tensors) == len(named)
  kind = getattr(torch, dtype)
  layer = layer.to(kind)
  given = torch.tensor(x, dtype=kind, requires_grad=True)
  y = layer(given)
  y.backward(torch.tensor(d, dtype=kind))
  of = lambda tensor: tensor.detach().float().numpy()
  found = dict(output=of(y), x=of(given.grad))
  for t in tensors:
    grad = of(named[t.name.removeprefix(THEIRS)].grad)
    for which, path in enumerate(t.paths):
      found[path.removeprefix(at)] = t.part(
          grad.__getitem__, which, {a: (0, t.sizes[a]) for a in t.ours[which]})
  return found


def recorded() -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(FILE)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference over the largest value."""
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


if __name__ == '__main__':
  safetensors.numpy.save_file(
      {name: np.ascontiguousarray(x) for name, x in theirs().items()}, FILE)
