"""Parts that no system here has, beside those of transformers: mHC and layers
of attention beside DeepSeek-V4's; and the per-layer embedding of Gemma 4 beside
a layer of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks, lookup, paths
from architectures.parts.attention.multi_head import Attention
from architectures.parts.config import Context, LayerKind
from architectures.parts.hf import tensor_map
from architectures.parts.moe import routing
from architectures.parts.moe.layer import MoE
from configs import base
from tests.parity import compare

D, LENGTH, STREAMS = 32, 12, 3


def mhc() -> list[compare.Finding]:
  """Compares what a branch reads, the streams after it, the gradients, and what
  ends the streams, with weights drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, y, d_read, d_next = (normal(1, LENGTH, STREAMS, D), normal(1, LENGTH, D),
                          normal(1, LENGTH, D), normal(1, LENGTH, STREAMS, D))
  rows = STREAMS * (STREAMS + 2)
  fn, bias, scale = 0.3 * normal(rows, STREAMS * D), normal(rows), normal(3)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, residual='mhc',
               norm_eps=1e-6)
  model.streams.update(count=STREAMS, learned_end=True)
  c = architectures.resolve(model)
  module = blocks.Branch(c)

  def run(params, x, y):
    def through(module, x):
      read, add = module(blocks.Streams(x, jnp.int32(1), 4))
      return read, add(y).x_BLUD
    return nn.apply(through, module)({'params': params}, x)

  born = nn.meta.unbox(module.init(
      jax.random.key(0), blocks.Streams(x, jnp.int32(1), 4)))['params']
  params = born | dict(
      dynamic=fn.T.reshape(STREAMS, D, rows), dynamic_scale=scale,
      read=bias[:STREAMS],
      write=bias[STREAMS:2 * STREAMS],
      mix=bias[2 * STREAMS:].reshape(STREAMS, STREAMS))
  (read, after), vjp = jax.vjp(run, params, x, y)
  grads, dx, dy = vjp((d_read, d_next))
  of_end = slice(STREAMS)
  end = blocks.EndOfStreams(c).apply({'params': dict(
      dynamic=fn[of_end].T.reshape(STREAMS, D, STREAMS), read=bias[of_end],
      dynamic_scale=scale[:1])}, blocks.Streams(x, jnp.int32(1), 4))
  ours = dict(output=read, streams=after, end=end, x=dx, y=dy,
              scale=grads['dynamic_scale'],
              dynamic=grads['dynamic'].reshape(-1, rows).T)
  theirs = _deepseek_v4(x, y, d_read, d_next, fn, bias, scale)
  return [compare.Finding(
      name, compare.error(ours[name], theirs[name]),
      compare.LIMITS['output' if name in ('output', 'streams', 'end')
                     else 'grads'])
          for name in ours]


VOCAB = 150_000


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
          embedded_BLD=jnp.asarray(x0)))
  with torch.no_grad():
    ids, x0, x = map(torch.tensor, (tokens, x0, x))
    e = theirs.project_per_layer_inputs(
        x0, theirs.get_per_layer_inputs(ids, x0))[:, :, 0]
    y = layer.post_per_layer_input_norm(layer.per_layer_projection(
        layer.act_fn(layer.per_layer_input_gate(x)) * e))
  return [compare.Finding('output', compare.error(ours, y.numpy()),
                          compare.LIMITS['output'])]


EXPERTS, HIDDEN, CHOICES, SCALE = 5, 8, 2, 1.5
MIXTURES = {
    'sqrt_softplus': dict(shared_experts=1),
    'hash_scored': dict(shared_experts=1),
    'softmax_bias': dict(zero_experts=3, normalize_gates=False),
}


def experts(router: str) -> list[compare.Finding]:
  """Compares what a mixture returns, and the gradients, with weights drawn from
  a fixed seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  tokens = draw.integers(0, VOCAB, (2, LENGTH))
  model = base.base().model
  model.update(d_model=D, vocab_size=VOCAB, max_len=LENGTH, ffn='moe',
               ffn_bias=False)
  model.moe.update(MIXTURES[router], router=router, num_experts=EXPERTS,
                   top_k=CHOICES, d_ff=HIDDEN, ffn='swiglu', gate_scale=SCALE)
  c = architectures.resolve(model)
  module = MoE(c)
  ctx = Context(jnp.arange(LENGTH)[None], tokens_BL=jnp.asarray(tokens))
  params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), nn.meta.unbox(
      jax.eval_shape(lambda: module.init(jax.random.key(0), x, ctx)['params'])))
  if 'experts_of' in params:
    params['experts_of'] = np.asarray(routing.hashed(
        c.moe, jnp.arange(VOCAB)), np.float32)
  y, vjp = jax.vjp(lambda params, x: module.apply(
      {'params': params}, x, ctx)[0], params, x)
  grads, dx = vjp(d)
  theirs, names = (_longcat if c.moe.zero_experts else _v4)(router, c)
  tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
  import torch
  with torch.no_grad():
    for name, value in names(params).items():
      tensors[name].copy_(torch.tensor(value))
  at = torch.tensor(x, requires_grad=True)
  out = theirs(at, *[torch.tensor(tokens)] * (router == 'hash_scored'))
  out.backward(torch.tensor(d))
  compared = [('output', y, out), ('x', dx, at.grad)] + [
      (name, value, tensors[name].grad) for name, value in names(grads).items()
      if tensors[name].requires_grad]
  return _findings(compared)


def _v4(router: str, c) -> tuple:
  """Returns transformers' module, and our parameters by its names."""
  import torch
  from transformers.models import deepseek_v4
  config = deepseek_v4.DeepseekV4Config(
      hidden_size=D, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS,
      num_experts_per_tok=CHOICES, routed_scaling_factor=SCALE,
      swiglu_limit=1e9, vocab_size=VOCAB, num_hidden_layers=1,
      mlp_layer_types=['hash_moe' if router == 'hash_scored' else 'moe'])
  config._experts_implementation = 'eager'
  module = deepseek_v4.modeling_deepseek_v4.DeepseekV4SparseMoeBlock(config, 0)
  if router == 'hash_scored':
    module.gate.tid2eid.copy_(torch.tensor(np.array(
        routing.hashed(c.moe, jnp.arange(VOCAB)))))
  return module, lambda p: _experts(p) | {
      f'shared_experts.{name}_proj.weight': p['shared'][name].T
      for name in ('gate', 'up', 'down')} | {'gate.weight': p['router'].T} | (
          {'gate.e_score_correction_bias': p['router_bias']}
          if 'router_bias' in p else {})


def _longcat(router: str, c) -> tuple:
  del router
  from transformers.models import longcat_flash
  config = longcat_flash.LongcatFlashConfig(
      hidden_size=D, expert_ffn_hidden_size=HIDDEN, n_routed_experts=EXPERTS,
      moe_topk=CHOICES, routed_scaling_factor=SCALE,
      zero_expert_num=c.moe.zero_experts)
  module = longcat_flash.modeling_longcat_flash.LongcatFlashMoE(config)
  # Theirs has weights of experts that are none, too.
  more = ((0, c.moe.zero_experts), (0, 0), (0, 0))
  return module, lambda p: {
      name: np.pad(x, more) if 'gate' in name else x
      for name, x in _experts(p).items()} | {
          'router.classifier.weight': p['router'].T,
          'router.e_score_correction_bias': p['router_bias']}


def _experts(p: dict) -> dict:
  up, gate, down = (np.swapaxes(p[name], 1, 2)
                    for name in ('up', 'gate', 'down'))
  return {'experts.gate_up_proj': np.concatenate([gate, up], 1),
          'experts.down_proj': down}


HEADS_OF = dict(num_heads=8, num_kv_heads=4, head_dim=8)
ATTENTIONS = {
    'token': dict(position='relative_by_token', qk_clip=1.5),
    'difference': dict(position='rope', attention_difference=0.2),
}


def attention(name: str) -> list[compare.Finding]:
  """Compares what a layer of attention returns, and the gradients, with weights
  drawn from a fixed seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, attention_bias=False,
               norm_eps=1e-6, **HEADS_OF, **ATTENTIONS[name])
  model.profiles.update(rank=4, extent=7)
  c = architectures.resolve(model)
  module = Attention(c, LayerKind('global', 'gelu', causal=True))
  params, y, grads, dx = _ours(module, normal, x, d)
  import torch
  leaves = {name: torch.tensor(value, requires_grad=True)
            for name, value in dict(params, x=x).items()}
  out = (_inkling if name == 'token' else _diffllama)(c, **leaves)
  out.backward(torch.tensor(d))
  return _findings([('output', y, out), *(
      (name, grad, leaves[name].grad)
      for name, grad in dict(grads, x=dx).items())])


def _findings(compared) -> list[compare.Finding]:
  """Compares (name, ours, theirs) of an output, and of gradients."""
  return [compare.Finding(
      name, compare.error(mine, value.detach().numpy()),
      compare.LIMITS['output' if name == 'output' else 'grads'])
          for name, mine, value in compared]


def _ours(module: nn.Module, normal, x: np.ndarray, d: np.ndarray):
  """Returns parameters that `normal` draws, what the module makes of x, and the
  gradients of its sum with d: of the parameters, and of x."""
  ctx = Context(jnp.arange(LENGTH)[None])
  params = jax.tree.map(lambda leaf: 0.4 * normal(*leaf.shape), nn.meta.unbox(
      jax.eval_shape(lambda: module.init(jax.random.key(0), x, ctx, None)[
          'params'])))
  y, vjp = jax.vjp(lambda params, x: module.apply(
      {'params': params}, x, ctx, None)[0], params, x)
  return params, y, *vjp(d)


ENTRIES = {'swa': 'sliding_attention', 'csa': 'compressed_sparse_attention',
           'hca': 'heavily_compressed_attention'}


_ENTRY_ROWS = (
    ('query_down', 'DU', 'q_a_proj.weight', 'U D'),
    ('query_norm/scale', 'U', 'q_a_norm.weight', 'U'),
    ('query_up', 'UHK', 'q_b_proj.weight', 'HK U'),
    ('key', 'DK', 'kv_proj.weight', 'K D'),
    ('key_norm/scale', 'K', 'kv_norm.weight', 'K'),
    ('out_down', 'GHKU', 'o_a_proj.weight', 'GU HK'),
    ('out', 'GUD', 'o_b_proj.weight', 'D GU'), ('sink', 'H', 'sinks', 'H'),
    ('indexer/query', 'UHK', 'compressor.indexer.q_b_proj.weight', 'HK U'),
    ('indexer/weights', 'DH', 'compressor.indexer.scorer.weights_proj.weight',
     'H D'),
    *((f'{ours}/{name}', axes, f'compressor.{theirs}', their_axes)
      for folder, prefix in (('entries', ''), ('indexer/entries', 'indexer.'))
      for ours, name, axes, theirs, their_axes in (
          (folder, 'value', 'DU', f'{prefix}kv_proj.weight', 'U D'),
          (folder, 'score', 'DU', f'{prefix}gate_proj.weight', 'U D'),
          (folder, 'score_bias', 'PU', f'{prefix}position_bias', 'P U'),
          (folder, 'norm/scale', 'K', f'{prefix}kv_norm.weight', 'K'))))


def compressed(mixer: str) -> list[compare.Finding]:
  """Compares what a layer of DeepSeek-V4's attention returns, and the
  gradients, with weights drawn from a fixed seed. Theirs has no gradient in the
  indexer, and ours none but that of a loss in training."""
  import torch
  from transformers.models import deepseek_v4
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
  x, d = normal(2, LENGTH, D), normal(2, LENGTH, D)
  model = base.base().model
  model.update(d_model=D, vocab_size=2, max_len=LENGTH, norm='rmsnorm',
               norm_eps=1e-6, mixer=mixer, num_heads=4, head_dim=16,
               attention_sinks=True, position='rope')
  model.rope.update(fraction=0.25, interleaved=True, theta=100.0)
  model.compressed.update(window=5, q_rank=12, csa_rate=2, hca_rate=3,
                          out_groups=2, out_rank=6)
  model.indexer.update(heads=8, head_dim=8, top_k=3, interleaved=True)
  c = architectures.resolve(model)
  module = blocks.MIXERS[mixer].module(c, LayerKind('global', 'gelu'))
  params, y, grads, dx = _ours(module, normal, x, d)
  config = deepseek_v4.DeepseekV4Config(
      hidden_size=D, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
      q_lora_rank=12, o_groups=2, o_lora_rank=6, sliding_window=5,
      index_n_heads=8, index_head_dim=8, index_topk=3, rope_theta=100.0,
      compress_rope_theta=100.0, partial_rotary_factor=0.25,
      layer_types=[ENTRIES[mixer]], compress_rates={
          ENTRIES['csa']: 2, ENTRIES['hca']: 3}, attn_implementation='eager')
  layer = deepseek_v4.modeling_deepseek_v4.DeepseekV4Attention(config, 0)
  flat, flat_grads = paths.flatten(params), paths.flatten(grads)
  tensors = tensor_map.expand(
      _ENTRY_ROWS, {path: leaf.shape for path, leaf in flat.items()})
  weights = dict(layer.named_parameters())
  assert {t.name for t in tensors} == set(weights)
  joined = lambda t, leaves: t.join([np.asarray(leaves[p]) for p in t.paths])
  with torch.no_grad():
    for t in tensors:
      weights[t.name].copy_(torch.tensor(joined(t, flat)))
  at, places = torch.tensor(x, requires_grad=True), torch.arange(LENGTH)[None]
  turns = deepseek_v4.modeling_deepseek_v4.DeepseekV4RotaryEmbedding(config)
  far = (places.T - places >= 5) | (places.T < places)
  out = layer(at, {kind: turns(at, places, kind) for kind in (
      'main', 'compress')}, places.expand(2, -1), torch.zeros(
          2, 1, LENGTH, LENGTH).masked_fill(far, -torch.inf))[0]
  out.backward(torch.tensor(d))
  compared = [('output', y, out), ('x', dx, at.grad)] + [
      (t.name, joined(t, flat_grads), weights[t.name].grad)
      for t in tensors if 'indexer' not in t.name]
  return _findings(compared)


def _hidden():
  """Returns a mask that hides later keys."""
  import torch
  return torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]


def _inkling(c, x, query, key, value, out, query_scale, profile, profiles):
  """Returns what transformers' parts make of our parameters."""
  import torch
  from transformers.models.inkling import modeling_inkling as inkling
  from transformers.models.inkling2 import modeling_inkling2 as inkling2
  clip = inkling2.Inkling2L2Clip(c.qk_clip)
  q, k, v, r = (torch.einsum('bld,dhk->blhk', x, w)
                for w in (query, key, value, profile))
  bias = inkling.InklingRelativeLogits(*profiles.shape)
  del bias.proj
  bias.proj = profiles
  at = torch.arange(LENGTH)
  module = torch.nn.Module()
  module.num_key_value_groups = c.num_heads // c.num_kv_heads
  o, _ = inkling.eager_attention_forward(
      module, clip(q * query_scale).transpose(1, 2), clip(k).transpose(1, 2),
      v.transpose(1, 2), _hidden(), c.head_dim ** -0.5,
      position_bias=bias(r, at, at))
  return torch.einsum('blhk,hkd->bld', o, out)


def _diffllama(c, x, **ours):
  """Likewise."""
  import torch
  from transformers.models import diffllama
  config = diffllama.DiffLlamaConfig(
      hidden_size=D, num_attention_heads=c.num_heads, rms_norm_eps=c.norm_eps,
      num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
      attn_implementation='eager')
  layer = diffllama.modeling_diffllama.DiffLlamaAttention(config, 0)
  layer.lambda_init = c.attention_difference
  weights = {f'{theirs}_proj.weight': ours[name].reshape(D, -1).T
             for theirs, name in (('q', 'query'), ('k', 'key'),
                                  ('v', 'value'))} | {
             'o_proj.weight': ours['out'].reshape(-1, D).T} | {
      f'lambda_{theirs}': ours[f'difference_{name}'] for theirs, name in (
          ('q1', 'a1'), ('k1', 'b1'), ('q2', 'a2'), ('k2', 'b2'))}
  turn = diffllama.modeling_diffllama.DiffLlamaRotaryEmbedding(config)
  return torch.func.functional_call(
      layer, weights, (x, turn(x, torch.arange(LENGTH)[None]), _hidden()))[0]


def _deepseek_v4(x, y, d_read, d_next, fn, bias, scale) -> dict:
  """Returns the outputs and gradients of transformers' module."""
  import torch
  from transformers.models import deepseek_v4
  modeling = deepseek_v4.modeling_deepseek_v4
  config = deepseek_v4.DeepseekV4Config(
      hidden_size=D, hc_mult=STREAMS, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
  module = modeling.DeepseekV4HyperConnection(config)
  with torch.no_grad():
    for ours, weight in ((fn, module.fn), (bias, module.base),
                         (scale, module.scale)):
      weight.copy_(torch.tensor(ours))
  x, y = (torch.tensor(a, requires_grad=True) for a in (x, y))
  head = modeling.DeepseekV4HyperHead(config)
  with torch.no_grad():
    for name, value in dict(fn=module.fn[:STREAMS], scale=module.scale[:1],
                            base=module.base[:STREAMS]).items():
      getattr(head, f'hc_{name}').copy_(value)
  post, comb, read = module(x)
  after = post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(
      comb.transpose(-1, -2), x)
  torch.autograd.backward((read, after), (torch.tensor(d_read),
                                          torch.tensor(d_next)))
  results = dict(output=read, streams=after, end=head(x), x=x.grad, y=y.grad,
                 scale=module.scale.grad, dynamic=module.fn.grad)
  return {name: a.detach().numpy() for name, a in results.items()}
