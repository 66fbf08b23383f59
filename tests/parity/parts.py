"""Parts that no system here has, beside those of transformers: the mixture of
LongCat-Flash, the attention of Inkling, the per-layer embedding of Gemma 4
beside a layer of it, and a gated norm and steps of heads of newer ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import layers, lookup
from architectures.parts.attention import steps
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.attention.multi_head import SelfAttention
from architectures.parts.config import LayerKind
from architectures.parts.context import Context, SharedArrays
from architectures.parts.moe.layer import MoE
from configs import base
from tests.parity import compare

D, LENGTH = 32, 12


def per_layer() -> list[compare.Finding]:
  """Compares what a layer adds to its output with the modules of Gemma 4, in a
  model of one layer."""
  import torch
  from transformers.models import gemma4
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  size, vocab = 8, 128
  config = gemma4.Gemma4TextConfig(
      hidden_size=D, hidden_size_per_layer_input=size, num_hidden_layers=1,
      vocab_size=vocab, vocab_size_per_layer_input=vocab, num_attention_heads=2,
      num_key_value_heads=2, head_dim=8, global_head_dim=8,
      intermediate_size=8, layer_types=['full_attention'])
  theirs = gemma4.modeling_gemma4.Gemma4TextModel(config)
  layer = theirs.layers[0]
  weights = dict(
      table=theirs.embed_tokens_per_layer,
      input=theirs.per_layer_model_projection,
      input_norm=theirs.per_layer_projection_norm,
      gate=layer.per_layer_input_gate, out=layer.per_layer_projection,
      out_norm=layer.post_per_layer_input_norm)
  params: dict = {}
  with torch.no_grad():
    for name, module in weights.items():
      x = normal(*module.weight.shape)
      module.weight.copy_(torch.tensor(x))
      params[name] = (dict(scale=x) if name.endswith('norm') else
                      x if name == 'table' else x.T)
  x, x0, tokens = normal(2, LENGTH, D), normal(2, LENGTH, D), draw.integers(
      0, vocab, (2, LENGTH))
  model = base.base().model
  model.update(d_model=D, vocab_size=vocab, max_len=LENGTH, norm='rmsnorm',
               norm_eps=1e-6, memory='per_layer')
  model.per_layer.size = size
  ours = lookup.PerLayer(architectures.resolve(model)).apply(
      {'params': params}, x, Context(
          jnp.arange(LENGTH)[None], tokens_BL=jnp.asarray(tokens),
          embedded_BLD=jnp.asarray(x0),
          row_scale_S=params['input_norm']['scale']))
  with torch.no_grad():
    ids, x0, x = map(torch.tensor, (tokens, x0, x))
    e = theirs.project_per_layer_inputs(
        x0, theirs.get_per_layer_inputs(ids, x0))[:, :, 0]
    y = layer.post_per_layer_input_norm(layer.per_layer_projection(
        layer.act_fn(layer.per_layer_input_gate(x)) * e))
  return [compare.Finding('output', compare.error(ours, y.numpy()),
                          compare.LIMITS['output'])]


EXPERTS, NONE, HIDDEN, CHOICES, SCALE = 5, 3, 8, 2, 1.5


def experts() -> list[compare.Finding]:
  """Compares what a mixture with zero experts returns, and the gradients, with
  weights drawn from a fixed seed."""
  import torch
  from transformers.models import longcat_flash
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, ffn='moe',
               ffn_bias=False)
  model.moe.update(router='softmax_bias', num_experts=EXPERTS, top_k=CHOICES,
                   d_ff=HIDDEN, ffn='swiglu', gate_scale=SCALE,
                   zero_experts=NONE, normalize_gates=False)
  params, y, grads, dx = _ours(
      MoE(architectures.resolve(model)), normal, x, d)
  config = longcat_flash.LongcatFlashConfig(
      hidden_size=D, expert_ffn_hidden_size=HIDDEN, n_routed_experts=EXPERTS,
      moe_topk=CHOICES, routed_scaling_factor=SCALE, zero_expert_num=NONE)
  theirs = longcat_flash.modeling_longcat_flash.LongcatFlashMoE(config)
  tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
  with torch.no_grad():
    for name, value in _longcat(params).items():
      tensors[name].copy_(torch.tensor(value))
  at = torch.tensor(x, requires_grad=True)
  out = theirs(at)
  out.backward(torch.tensor(d))
  return _findings([('output', y, out), ('x', dx, at.grad), *(
      (name, value, tensors[name].grad) for name, value in _longcat(
          grads).items() if tensors[name].requires_grad)])


def _longcat(p: dict) -> dict:
  """Returns our parameters by the names of theirs, which has weights of experts
  that are none, too."""
  up, gate, down = (np.pad(np.swapaxes(p[name], 1, 2),
                           ((0, NONE * (name != 'down')), (0, 0), (0, 0)))
                    for name in ('up', 'gate', 'down'))
  return {'experts.gate_up_proj': np.concatenate([gate, up], 1),
          'experts.down_proj': down,
          'router.classifier.weight': p['router'].T,
          'router.e_score_correction_bias': p['router_bias']}


def router() -> list[compare.Finding]:
  """Compares a mixture of Zaya, whose router has a state and the state before,
  and one of whose experts is a skip."""
  import torch
  from transformers.models.zaya import configuration_zaya, modeling_zaya
  draw = np.random.default_rng(2)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d, state = normal(2, LENGTH, D), normal(2, LENGTH, D), normal(2, LENGTH, 7)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, ffn='moe',
               ffn_bias=False)
  model.moe.update(router='softmax_bias', num_experts=EXPERTS, top_k=1,
                   d_ff=HIDDEN, ffn='swiglu', router_dim=7, zero_experts=1,
                   zero_experts_skip=True)

  def weights(*shape):
    """Draws a bias of the experts that is small beside probabilities."""
    return normal(*shape) * (0.1 if shape == (EXPERTS + 1,) else 2)

  params, y, grads, dx = _ours(
      MoE(architectures.resolve(model)), weights, x, d,
      shared=SharedArrays(router_BLU=state))
  config = configuration_zaya.ZayaConfig(
      hidden_size=D, moe_intermediate_size=HIDDEN, num_experts=EXPERTS,
      router_hidden_size=7)
  theirs = modeling_zaya.ZayaSparseMoeBlock(config, layer_idx=1)
  tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
  with torch.no_grad():
    for name, value in _zaya_mixture(params).items():
      tensors[name].copy_(torch.tensor(value))
  at = torch.tensor(x, requires_grad=True)
  out, _ = theirs(at, torch.tensor(state))
  out.backward(torch.tensor(d))
  skips = (out == 0).all(-1)
  assert skips.any() and not skips.all()
  return _findings([('output', y, out), ('x', dx, at.grad), *(
      (name, value, tensors[name].grad)
      for name, value in _zaya_mixture(grads).items()
      if tensors[name].requires_grad)])


def _zaya_mixture(p: dict) -> dict:
  """Returns our parameters by the names of theirs."""
  up, gate, down = (np.swapaxes(p[name], 1, 2)
                    for name in ('up', 'gate', 'down'))
  products = {'down_proj': 'router_down', 'router_mlp.fc1': 'router_hidden_1',
              'router_mlp.fc2': 'router_hidden_2'}
  return {'experts.gate_up_proj': np.concatenate([gate, up], 1),
          'experts.down_proj': down,
          'gate.router_states_scale': p['router_factor'],
          'gate.balancing_biases': p['router_bias'],
          'gate.router_mlp.norm.weight': p['router_norm'],
          'gate.router_mlp.out_proj.weight': p['router'].T,
          **{f'gate.{name}.weight': p[mine].T
             for name, mine in products.items()},
          **{f'gate.{name}.bias': p[f'{mine}_bias']
             for name, mine in products.items()}}


def attention() -> list[compare.Finding]:
  """Compares what a layer of attention returns, and the gradients, with weights
  drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, attention_bias=False,
               norm_eps=1e-6, num_heads=8, num_kv_heads=4, head_dim=8,
               position='relative_by_token', qk_clip=1.5, dynamic_conv=3)
  model.profiles.update(rank=4, extent=7)
  c = architectures.resolve(model)
  module = SelfAttention(c, LayerKind('global', 'gelu', causal=True))
  params, y, grads, dx = _ours(module, normal, x, d, None)
  import torch
  leaves = {name: torch.tensor(value, requires_grad=True)
            for name, value in dict(params, x=x).items()}
  out = _inkling(c, **leaves)
  out.backward(torch.tensor(d))
  return _findings([('output', y, out), *(
      (name, grad, leaves[name].grad)
      for name, grad in dict(grads, x=dx).items())])


def results_of_heads() -> list[compare.Finding]:
  """Compares queries with a learned scale of their position (Mistral Large 4),
  and results of heads without their own value (NeoMME), then normalised (Muse
  Spark), with weights and inputs drawn from a fixed seed."""
  import torch
  from transformers.models.mistral_large4 import modeling_mistral_large4
  from transformers.models.muse_spark import modeling_muse_spark
  from transformers.models.neomme import modeling_neomme
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  o, q, d = (normal(2, LENGTH, 8, 8) for _ in range(3))
  v, alpha, slope, offset = normal(2, LENGTH, 4, 8), *map(normal, (8, 8, 8))
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, norm_eps=1e-6,
               num_heads=8, num_kv_heads=4, head_dim=8, context_norm=True,
               learned_log_scale=True, attention_exclusive='learned')
  module = Results(architectures.resolve(model))
  params = dict(exclusive=alpha, log_scale=slope, log_scale_bias=offset)
  outputs, vjp = jax.vjp(
      lambda *given: module.apply({'params': params}, *given), o, v, q)
  grads = vjp((d, d))

  o, v, q = (torch.tensor(x, requires_grad=True) for x in (o, v, q))
  sizes = type('', (), dict(num_attention_heads=8, num_key_value_heads=4))
  exclusive = modeling_neomme.NeoMMEExclusiveSelfAttention(sizes)
  scaling = modeling_mistral_large4.MistralLarge4TextSoftmaxScaling(8)
  with torch.no_grad():
    for parameter, value in ((exclusive.alpha, alpha), (scaling.scale, slope),
                             (scaling.bias, offset)):
      parameter.copy_(torch.tensor(value))
  norm = modeling_muse_spark.MuseSparkRMSNorm(eps=1e-6, with_scale=False)
  theirs = (norm(exclusive(o, v.transpose(1, 2))), scaling(
      q, torch.arange(LENGTH)[None], head_dim_first=False))
  torch.autograd.backward(theirs, (torch.tensor(d), torch.tensor(d)))
  return _findings([
      *(('output', mine, value) for mine, value in zip(outputs, theirs)),
      *((name, grad, leaf.grad)
        for name, grad, leaf in zip('ovq', grads, (o, v, q)))])


def convolved_attention() -> list[compare.Finding]:
  """Compares compressed convolutional attention, and its gradients, with that
  of Zaya, with weights drawn from a fixed seed."""
  import torch
  from transformers.models import zaya
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, attention_bias=True,
               attention_out_bias=True, num_heads=4, num_kv_heads=2, head_dim=8,
               position='rope', cca=True, cca_taps=3, cca_head_taps=2)
  model.rope.fraction = 0.5
  module = SelfAttention(architectures.resolve(model),
                         LayerKind('global', 'gelu', causal=True))
  params, y, grads, dx = _ours(module, normal, x, d, None)

  config = zaya.ZayaConfig(
      hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
      num_hidden_layers=1, cca_time0=3, cca_time1=2, attention_bias=True,
      rope_parameters=dict(hybrid=dict(
          rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5)))
  config._attn_implementation = 'eager'
  theirs = zaya.modeling_zaya.ZayaAttention(config, 0)
  tensors = dict(theirs.named_parameters())
  with torch.no_grad():
    for name, value in _zaya_attention(params).items():
      tensors[name].copy_(torch.tensor(value))
  leaf = torch.tensor(x, requires_grad=True)
  angles = zaya.modeling_zaya.ZayaRotaryEmbedding(config)(
      leaf, torch.arange(LENGTH)[None], 'hybrid')
  mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
  out, _ = theirs(leaf, dict(causal=mask), position_embeddings=angles)
  out.backward(torch.tensor(d))
  return _findings([('output', y, out), ('x', dx, leaf.grad), *(
      (name, value, tensors[name].grad)
      for name, value in _zaya_attention(grads).items())])


def _zaya_attention(p: dict) -> dict:
  """Returns our parameters of convolved attention by the names of theirs, which
  has the heads of queries and of keys in one convolution."""
  p = {name: np.asarray(value) for name, value in p.items()}
  tensors = {'qk_norm.temp': p['key_temperature'],
             'o_proj.weight': p['out'].reshape(-1, D).T,
             'o_proj.bias': p['out_bias']}
  products = dict(q_proj='query', k_proj='key', v_proj_current='value',
                  v_proj_delayed='value_before')
  for name, mine in products.items():
    tensors[f'qkv_proj.{name}.weight'] = p[mine].reshape(D, -1).T
    tensors[f'qkv_proj.{name}.bias'] = p[f'{mine}_bias'].reshape(-1)
  # Filters [tokens, heads, features], and matrices [tokens, heads, in, out].
  joined = {name: np.concatenate([p[f'query_{name}'], p[f'key_{name}']], axis)
            for name, axis in (('taps', 1), ('mix', 1), ('taps_bias', 0),
                               ('mix_bias', 0))}
  depthwise, grouped = (f'qkv_proj.conv_qk_{name}'
                        for name in ('depthwise', 'grouped'))
  taps_UW = joined['taps'].reshape(len(joined['taps']), -1).T
  mix_HUKW = np.moveaxis(joined['mix'], (0, 3), (3, 1))
  tensors[f'{depthwise}.weight'] = taps_UW[:, None]
  tensors[f'{grouped}.weight'] = mix_HUKW.reshape(-1, *mix_HUKW.shape[2:])
  tensors[f'{depthwise}.bias'] = joined['taps_bias'].reshape(-1)
  tensors[f'{grouped}.bias'] = joined['mix_bias'].reshape(-1)
  return tensors


class Results(nn.Module):
  """The steps of heads that `results_of_heads` compares."""
  config: architectures.ModelConfig

  @nn.compact
  def __call__(self, o_BLHK, v_BLJK, q_BLHK):
    ctx = Context(jnp.arange(LENGTH)[None])
    o_BLHK = steps.remove_own_value(self, o_BLHK, v_BLJK)
    return steps.normalise_results(self, o_BLHK), (
        steps.scale_queries_by_learned_log(self, 'query', q_BLHK, ctx))


def gated_norm() -> list[compare.Finding]:
  """Compares the gated norm, and its gradients, with that of A.X K2."""
  import torch
  from transformers.models.axk2 import modeling_axk2
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, norm_eps=1e-6,
               norm='rmsnorm_gated')
  model.gated_norm.rank = 4
  module = layers.norm(architectures.resolve(model), 'norm')
  params = dict(scale=normal(D), gate_down=normal(D, 4), gate_up=normal(4, D))
  y, vjp = jax.vjp(
      lambda params, x: module.apply({'params': params}, x), params, x)
  grads, dx = vjp(d)
  sizes = type('', (), dict(hidden_size=D, gated_norm_rank=4,
                            rms_norm_eps=1e-6))
  theirs = modeling_axk2.AXK2GatedRMSNorm(sizes)
  weights = dict(scale=theirs.norm.weight, gate_down=theirs.mlp.fc1.weight,
                 gate_up=theirs.mlp.fc2.weight)
  with torch.no_grad():
    for name, weight in weights.items():
      weight.copy_(torch.tensor(params[name].T))
  leaf = torch.tensor(x, requires_grad=True)
  out = theirs(leaf)
  out.backward(torch.tensor(d))
  return _findings([('output', y, out), ('x', dx, leaf.grad), *(
      (name, grads[name].T, weight.grad) for name, weight in weights.items())])


def xielu() -> list[compare.Finding]:
  """Compares xIELU, and its gradients, with that of Apertus."""
  import torch
  from transformers.activations import XIELUActivation
  draw = np.random.default_rng(0)
  x, d = 3 * draw.standard_normal((2, 40, 40)).astype(np.float32)
  theirs = XIELUActivation(dtype=torch.float32)
  y, vjp = jax.vjp(lambda x, *learned: layers.HiddenUnits('xielu')(
      x, None, learned), x, *(
          np.float32(number) for _, number in layers.FFNS['xielu'].learned))
  leaf = torch.tensor(x, requires_grad=True)
  out = theirs(leaf)
  out.backward(torch.tensor(d))
  grads = leaf.grad, theirs.alpha_p.grad[0], theirs.alpha_n.grad[0]
  return _findings([('output', y, out), *zip(
      ('x', 'alpha_p', 'alpha_n'), vjp(d), grads)])


def _findings(compared) -> list[compare.Finding]:
  """Compares (name, ours, theirs) of an output, and of gradients."""
  return [compare.Finding(
      name, compare.error(mine, value.detach().numpy()),
      compare.LIMITS['output' if name == 'output' else 'grads'])
          for name, mine, value in compared]


def _ours(module: nn.Module, normal, x: np.ndarray, d: np.ndarray, *cache,
          **context):
  """Returns parameters that `normal` draws, what the module makes of x, and the
  gradients of its sum with d: of the parameters, and of x."""
  ctx = Context(jnp.arange(LENGTH)[None], **context)
  params = jax.tree.map(lambda leaf: 0.4 * normal(*leaf.shape), nn.meta.unbox(
      jax.eval_shape(lambda: module.init(jax.random.key(0), x, ctx, *cache)[
          'params'])))
  y, vjp = jax.vjp(lambda params, x: module.apply(
      {'params': params}, x, ctx, *cache)[0], params, x)
  return params, y, *vjp(d)


def _inkling(c, x, query, key, value, out, query_scale, profile, profiles,
             **filters):
  """Returns what transformers' parts make of our parameters."""
  import torch
  from transformers.models.inkling import modeling_inkling as inkling
  from transformers.models.inkling2 import modeling_inkling2 as inkling2
  clip = inkling2.Inkling2L2Clip(c.part(AttentionConfig).qk_clip)
  q, k, v, r = (torch.einsum('bld,dhk->blhk', x, w)
                for w in (query, key, value, profile))
  k, v = (_convolve_by_token(name, heads, x, filters)
          for name, heads in (('key', k), ('value', v)))
  bias = inkling.InklingRelativeLogits(*profiles.shape)
  del bias.proj
  bias.proj = profiles
  at = torch.arange(LENGTH)
  module = torch.nn.Module()
  module.num_key_value_groups = c.num_heads // c.num_kv_heads
  o, _ = inkling.eager_attention_forward(
      module, clip(q * query_scale).transpose(1, 2), clip(k).transpose(1, 2),
      v.transpose(1, 2), torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[
          None, None], c.head_dim ** -0.5,
      position_bias=bias(r, at, at))
  return torch.einsum('blhk,hkd->bld', o, out)


def _convolve_by_token(name, heads, x, filters):
  """Returns what transformers' convolution makes of keys or values."""
  import torch
  from transformers.models.inkling2 import modeling_inkling2 as inkling2
  static = filters[f'{name}_dynamic_conv_static'].flip(0)
  projection = filters[f'{name}_dynamic_conv'].flip(2)
  module = inkling2.Inkling2DynamicShortConvolution(
      heads[0, 0].numel(), D, heads.shape[2], len(static), 0, 0)
  del module.static_weight, module.weight_proj
  module.static_weight = static.reshape(len(static), -1)
  module.weight_proj = lambda x: torch.einsum('bld,dhw->blhw', x, projection)
  return module(heads.flatten(2), x).view(heads.shape)
