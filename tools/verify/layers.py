"""Parts that no system here has, beside the layer of transformers that has
them: the gate on attention's heads, in Qwen3-Next's attention."""

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.attention.multi_head import Attention
from architectures.parts.config import LayerKind
from architectures.parts.context import Context
from configs import base
from tools.verify import compare

D, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 32, 4, 2, 8, 12


def findings() -> list[compare.Finding]:
  """Compares the outputs of one layer, and the gradients of its input and of
  its weights, which are drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  x, d = (draw.standard_normal((2, LENGTH, D)).astype(np.float32)
          for _ in range(2))
  theirs, weights = _qwen3_next(x, d)
  q_DHK = weights['q_proj'].T.reshape(D, HEADS, 2 * HEAD_DIM)
  params = dict(
      query=q_DHK[..., :HEAD_DIM], output_gate=q_DHK[..., HEAD_DIM:],
      key=weights['k_proj'].T.reshape(D, KV_HEADS, HEAD_DIM),
      value=weights['v_proj'].T.reshape(D, KV_HEADS, HEAD_DIM),
      out=weights['o_proj'].T.reshape(HEADS, HEAD_DIM, D),
      **{f'{name}_norm': {'offset': weights[f'{name[0]}_norm']}
         for name in ('query', 'key')})
  model = base.base().model
  model.update(d_model=D, num_heads=HEADS, num_kv_heads=KV_HEADS,
               head_dim=HEAD_DIM, vocab_size=2, max_len=LENGTH,
               position='rope', norm='rmsnorm_1p', norm_eps=1e-6,
               qk_norm=True, attention_bias=False,
               attention_gate='elementwise')
  model.rope.fraction = 0.5
  module = Attention(architectures.resolve(model), LayerKind('global', 'gelu'))

  def run(params, x):
    ctx = Context(jnp.arange(LENGTH)[None], length=LENGTH)
    return module.apply({'params': params}, x, ctx, None)[0]

  y, vjp = jax.vjp(run, params, x)
  grads, dx = vjp(d)
  ours = dict(output=y, x=dx, gate=grads['output_gate'], out=grads['out'])
  theirs['gate'] = theirs.pop('q_proj').T.reshape(
      D, HEADS, 2 * HEAD_DIM)[..., HEAD_DIM:]
  theirs['out'] = theirs.pop('o_proj').T.reshape(HEADS, HEAD_DIM, D)
  return [compare.Finding(
      name, compare.error(ours[name], theirs[name]),
      compare.LIMITS['output' if name == 'output' else 'grads'])
          for name in ours]


def _qwen3_next(x: np.ndarray, d: np.ndarray) -> tuple[dict, dict]:
  """Returns the output and gradients of transformers' layer, and its weights
  by name."""
  import torch
  from transformers.models.qwen3_next import configuration_qwen3_next as fields
  from transformers.models.qwen3_next import modeling_qwen3_next as modeling
  config = fields.Qwen3NextConfig(
      hidden_size=D, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
      head_dim=HEAD_DIM, max_position_embeddings=LENGTH, rms_norm_eps=1e-6,
      attention_bias=False, rope_parameters=dict(
          rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5),
      attn_implementation='eager')
  torch.manual_seed(0)
  layer = modeling.Qwen3NextAttention(config, 0)
  for weight in layer.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  x_BLD = torch.tensor(x, requires_grad=True)
  turns = modeling.Qwen3NextRotaryEmbedding(config)(
      x_BLD, torch.arange(LENGTH)[None])
  mask = torch.full((LENGTH, LENGTH), -1e30).triu(1)[None, None]
  y_BLD, _ = layer(x_BLD, turns, mask)
  y_BLD.backward(torch.tensor(d))
  named = {name.removesuffix('.weight'): weight
           for name, weight in layer.named_parameters()}
  found = {name: named[name].grad.numpy() for name in ('q_proj', 'o_proj')}
  return ({'output': y_BLD.detach().numpy(), 'x': x_BLD.grad.numpy()} | found,
          {name: weight.detach().numpy() for name, weight in named.items()})
