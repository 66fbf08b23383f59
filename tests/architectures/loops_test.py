"""Layers that loop: against the deep stack of copied weights, against each
form's equations, and what they cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import architectures
from architectures.parts import flat, layers
from architectures.parts.context import Context
from architectures.parts.loops import LoopsConfig
from architectures.parts.stack import PassedOn, Period
from common.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import generate, objectives, runs
from training.costs import flops, totals

T = 3  # passes
ENDS = dict(prefix='first', suffix='last', pattern='inner', num_layers=4,
            kinds=dict(first={}, inner={}, last={}))


def value_and_grads(module, params):
  def loss(params):
    out = module.apply({'params': params}, models.random_tokens(2, 8),
                       keep_layers=True)
    return jnp.square(out.logits).mean(), (out.logits, out.aux)
  (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return *aux, grads


@pytest.mark.slow
@pytest.mark.parametrize('system, changes', [
    pytest.param('llama', ENDS | dict(value_residual=True, ffn='moe', moe=dict(
        router='sigmoid', num_experts=4, top_k=2, capacity_factor=0.0)),
                 marks=pytest.mark.long),
    ('gpt', dict(residual='attention'))])
def test_a_loop_is_the_deep_stack_of_copied_weights(system, changes):
  """Outputs, what each layer returns and the loads of experts; the gradient of
  a weight is the sum over its copies."""
  module, params = models.make_model(system, **changes, loop='plain',
                                     loops=dict(passes=T))
  c = module.config
  periods = c.sections(c.num_layers)[-1 - bool(c.suffix)].periods
  depth = len(c.layer_kinds(c.num_layers))
  deep = architectures.build(dataclasses.replace(
      c.without_part(LoopsConfig), loop='none', num_layers=depth,
      num_decoder_layers=depth))
  copies = lambda x: jnp.concatenate([x] * T)
  stack = params['decoder']
  logits, aux, grads = value_and_grads(module, params)
  other, deep_aux, deep_grads = value_and_grads(deep, params | {
      'decoder': stack | {'layers': jax.tree.map(copies, stack['layers'])}})
  models.assert_trees_close(logits, other)
  assert len(aux['layers']) == 1 + depth
  models.assert_trees_close(aux['layers'], deep_aux['layers'])
  for path, load in aux.get('loads', {}).items():
    copies_NE = deep_aux['loads'][path]
    models.assert_trees_close(load, copies_NE.reshape(T, periods, -1).mean(
        0) if '/layers/' in path else copies_NE)
  deep_grads['decoder']['layers'] = jax.tree.map(
      lambda x: x.reshape(T, -1, *x.shape[1:]).sum(0),
      deep_grads['decoder']['layers'])
  models.assert_trees_close(grads, deep_grads, rtol=3e-5)


def by_hand(module, params, tokens):
  """Returns the last layer's state by the equations of LOOPS, one pass after
  another in the program."""
  c, stack = module.config, params['decoder']
  loops = c.part(LoopsConfig)
  loop, k = stack.get('loop', {}), loops.gradient_passes or loops.passes
  ctx = Context(jnp.arange(tokens.shape[1])[None])
  e = s = params['embed']['tokens'][tokens]

  @jax.jit  # traced once for all passes
  def run_layer(x, row):
    (x, _), _ = Period(c, c.layer_kinds(1)[:1]).apply(
        {'params': row}, (x, PassedOn()), None, ctx, {})
    return x, None

  stop = functools.partial(jax.tree.map, jax.lax.stop_gradient)
  rms = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
  for t in range(loops.passes):
    left = t - (loops.passes - k)  # until the first with a gradient
    p, inputs, w = stop((stack, e, loop)) if left < 0 else (stack, e, loop)
    if t and left <= 0:
      s = stop(s)
    if t and loops.boundary == 'norm':
      s = rms(s) * p['final_norm']['scale'][None, None]
    if c.loop == 'concat':
      x = jnp.concatenate([s if t else 0 * s, inputs], -1) @ w['join']
    elif not t:
      x = inputs
    elif c.loop == 'gate':
      r = jnp.concatenate([rms(inputs), rms(s)], -1) @ w['down']
      x = ((1 - jnp.tanh(r @ w['forget'])) * inputs
           + jnp.tanh(r @ w['message']) * s)
    else:
      x = s + inputs if c.loop == 'add' else s
    s, _ = jax.lax.scan(run_layer, x, p['layers'])
  return s, rms(s) * stack['final_norm']['scale'][None, None]


@pytest.mark.slow
@pytest.mark.parametrize('loop, loops, changes', [
    pytest.param('plain', dict(boundary='norm'), dict(remat='full'),
                 marks=pytest.mark.long),
    pytest.param('add', dict(gradient_passes=1), {}, marks=pytest.mark.long),
    ('concat', dict(gradient_passes=2, boundary='norm'), {}),
    ('gate', dict(gate_rank=5), dict(scan_layers=False))])
def test_each_form_is_its_equations(loop, loops, changes):
  module, params = models.make_model('llama', loop=loop, **changes,
                                     loops=dict(passes=T) | loops)
  tokens = models.random_tokens(2, 6)
  def ours(params):
    out = module.apply({'params': params}, tokens, keep_layers=True)
    return jnp.square(out.hidden).sum(), (out.aux['layers'][-1], out.hidden)
  def theirs(params):
    state, hidden = by_hand(module, params, tokens)
    return jnp.square(hidden).sum(), (state, hidden)
  (_, got), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
  (_, want), other = jax.jit(jax.value_and_grad(theirs, has_aux=True))(params)
  models.assert_trees_close(got, want, rtol=3e-5)
  models.assert_trees_close(grads, other, rtol=1e-4)


def turns_by_hand(module, params, tokens):
  """Returns the input of the head by the equations of Turns; the low runs that
  transformers' hrm_text has under no_grad are detached as a whole."""
  c, stack = module.config, params['decoder']
  loops = c.part(LoopsConfig)
  ctx = Context(jnp.arange(tokens.shape[1])[None])
  rms = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
  scales = stack['loop']['low_norm']['scale'], stack['final_norm']['scale']
  half_depth = c.num_layers // 2
  layers_of_halves = [
      jax.tree.map(lambda w: w[:half_depth], stack['layers']),
      jax.tree.map(lambda w: w[half_depth:], stack['layers'])]

  def run_layer(x, row):
    (x, _), _ = Period(c, c.layer_kinds(1)[:1]).apply(
        {'params': row}, (x, PassedOn()), None, ctx, {})
    return x, None

  @jax.jit  # both halves are traced once, however often they run
  def run_layers(rows, scale, x):
    x, _ = jax.lax.scan(run_layer, x, rows)
    return rms(x) * scale[None, None]

  def run(half, x):
    return run_layers(layers_of_halves[half], scales[half], x)

  high = params['embed']['tokens'][tokens]
  low = jnp.zeros_like(high)
  for n in range(loops.passes):
    k = loops.low_cycles
    if loops.gradient_passes:
      k = loops.gradient_passes if n == loops.passes - 1 else 1
    for i in range(loops.low_cycles):
      low = run(0, low + high)
      if i < loops.low_cycles - k:
        low = jax.lax.stop_gradient(low)
    high = run(1, high + low)
  return high


@pytest.mark.slow
@pytest.mark.parametrize('k', models.mark_long_except((2,), (0, 2)))
def test_two_stacks_that_take_turns_are_their_equations(k):
  module, params = models.make_model(
      'llama', loop='turns', num_layers=4, norm_eps=1e-5, loops=dict(
          passes=2, low_cycles=3, boundary='norm', gradient_passes=k))
  tokens = models.random_tokens(2, 6)
  def ours(params):
    return jnp.square(module.apply({'params': params}, tokens).hidden ** 3
                      ).sum()
  def theirs(params):
    return jnp.square(turns_by_hand(module, params, tokens) ** 3).sum()
  got, grads = jax.jit(jax.value_and_grad(ours))(params)
  want, other = jax.jit(jax.value_and_grad(theirs))(params)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  models.assert_trees_close(grads, other, rtol=1e-4)


def test_what_turns_cost():
  """Two passes of three lower runs and an upper one go through eight stacks of
  two layers, of four layers' weights; each has keys and values of its own."""
  c = step_test.config()
  c.model = models.small_config('llama', num_layers=4)
  plain = runs.resolve_model_without_tokenizer(c)
  once = totals.count_costs(c, 16)
  c.model.update(loop='turns', loops=dict(passes=2, low_cycles=3))
  model, costs = runs.resolve_model_without_tokenizer(c), totals.count_costs(
      c, 16)
  assert costs['parameters'] == once['parameters']
  cache = 'kv_cache_bytes_per_token'
  assert costs[cache] == 4 * once[cache]
  head = 2 * 32 * models.VOCAB * 16
  whole = sum(flops.forward_flops(model, 16).values()) - head
  assert whole == 4 * (sum(flops.forward_flops(plain, 16).values()) - head)
  # Of the eight runs, both upper ones and 1 + 2 lower ones have a gradient.
  some = model.with_part(LoopsConfig, gradient_passes=2)
  assert sum(flops.training_flops(some, 16).values()) == pytest.approx(
      3 * head + whole * (1 + 2 * 5 / 8))
  assert model.part(LoopsConfig).depth == 16


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    ENDS | dict(loop='concat', loops=dict(passes=T, boundary='norm')),
    dict(loop='turns', num_layers=4, loops=dict(
        passes=2, low_cycles=2, boundary='norm'))])
def test_what_is_written_token_by_token_is_likeliest_by_whole_rows(changes):
  """Each pass has its own rows of the cache, also where layers are apart."""
  module, params = models.make_model('llama', **changes)
  prompt = models.random_tokens(2, 4)
  new = generate.generate(
      module, params, prompt, jnp.full(2, 4), jax.random.key(0),
      max_new_tokens=4, sampling=generate.Sampling(temperature=0))
  rows = jnp.concatenate([prompt, new], 1)
  best = jax.jit(lambda rows: models.logits(module, params, rows).argmax(-1))
  assert (best(rows)[:, 3:-1] == new).all()


@pytest.mark.slow
def test_tokens_leave_after_the_passes_that_the_gate_says():
  """Beside models of one, two and three passes: the probabilities, the loss and
  its gradient, the pass of each token, and what is written with a cache."""
  config = step_test.config()
  model = dict(loop='plain', loops=dict(passes=T, boundary='norm'))
  modules = [models.make_model('llama', loop='plain', loops=dict(
      passes=t, boundary='norm'))[0] for t in range(1, T + 1)]
  model['loops'] |= dict(exit_gate=True, exit_threshold=0.6)
  config.model = models.small_config('llama', **model)
  module, params = models.make_model('llama', **model)
  tokens = models.random_tokens(2, 6)
  batch = dict(targets=models.random_tokens(2, 6, seed=2),
               weights=jnp.linspace(0, 1, 12).reshape(2, 6))

  def ours(params):
    output = module.apply({'params': params}, tokens, deterministic=False)
    figures = objectives.token_loss_figures(output, batch, config)
    return figures['loss'].total, output.extra['exits'][1]

  def theirs(params):
    decoder = dict(params['decoder'])
    gate = decoder.pop('exit')
    outputs = [m.apply({'params': params | {'decoder': decoder}}, tokens)
               for m in modules]
    g1, g2, _ = [jax.nn.sigmoid(
        (out.hidden @ gate['gate'])[..., 0] + gate['gate_bias'][0])
                 for out in outputs]
    p = jnp.stack([g1, g2 * (1 - g1), (1 - g1) * (1 - g2)])
    nats = jnp.stack([-jnp.take_along_axis(jax.nn.log_softmax(
        out.logits), batch['targets'][..., None], -1)[..., 0]
                      for out in outputs])
    loss = (batch['weights'] * (p * (nats + 0.1 * jnp.log(p))).sum(0)).sum()
    return loss, (p, jnp.stack([out.hidden for out in outputs]))

  (loss, log_p), grads = jax.jit(
      jax.value_and_grad(ours, has_aux=True))(params)
  (want, (p, hidden)), other = jax.jit(
      jax.value_and_grad(theirs, has_aux=True))(params)
  models.assert_trees_close(jnp.exp(log_p), p)
  models.assert_trees_close(loss, want)
  models.assert_trees_close(grads, other, rtol=1e-4)
  # Each token takes the result of its pass.
  leaves = (jnp.cumsum(p, 0) >= 0.6).at[-1].set(True).argmax(0)
  assert len(set(leaves.ravel().tolist())) > 1
  chosen = jnp.take_along_axis(hidden, leaves[None, ..., None], 0)[0]
  read = jax.jit(lambda tokens: module.apply({'params': params}, tokens))
  models.assert_trees_close(read(tokens).hidden, chosen)
  new = generate.generate(
      module, params, tokens[:, :3], jnp.full(2, 3), jax.random.key(0),
      max_new_tokens=3, sampling=generate.Sampling(temperature=0))
  rows = jnp.concatenate([tokens[:, :3], new], 1)
  best = read(rows).logits.argmax(-1)
  assert (best[:, 2:-1] == new).all()
  # The gate reads each pass, and in training the head does too.
  c, head = module.config, 2 * 6 * 32 * models.VOCAB
  forward = flops.forward_flops(c, 6)
  assert forward['weights'] - flops.forward_flops(modules[-1].config, 6)[
      'weights'] == 2 * 6 * 32 * T
  assert sum(flops.training_flops(c, 6).values()) == 3 * (
      sum(forward.values()) + (T - 1) * head)


def test_what_passes_cost():
  """FLOPs, the cache and the parameters, counted by hand from one pass."""
  c = step_test.config()
  def of(**loops):
    c.model = models.small_config('llama', loop='concat', loops=loops)
    return totals.count_costs(c, 16), runs.resolve_model_without_tokenizer(c)
  (one, once), (some, several) = of(passes=1), of(passes=T)
  D = 32
  assert one['parameters'] == some['parameters']
  assert one['by_part']['loop'] == 2 * D * D
  cache = 'kv_cache_bytes_per_token'
  assert some[cache] == T * one[cache]
  by_pass = sum(flops.forward_flops(several, 16).values()) - sum(
      flops.forward_flops(once, 16).values())
  head = 2 * D * models.VOCAB * 16
  assert by_pass == (T - 1) * (sum(
      flops.forward_flops(once, 16).values()) - head)
  whole, part = (sum(flops.training_flops(
      several.with_part(LoopsConfig, gradient_passes=k), 16).values())
                 for k in (0, 1))
  assert whole - part == pytest.approx(2 * by_pass, rel=0.02)
  assert layers.count_gathers_of_weight(
      several, 'decoder/layers/block_0/ffn/up', ()) == 2 * T
  assert several.part(LoopsConfig).depth == T * several.num_layers


@pytest.mark.parametrize('changes, words', [
    (dict(loop='add', residual='mhc'), 'several streams'),
    (dict(loop='plain', block='post_norm', loops=dict(boundary='norm')),
     'no final norm'),
    (dict(loop='plain', loops=dict(gradient_passes=1)), 'no gradient'),
    (dict(loop='add', loops=dict(gradient_passes=9)), 'choose from 1 to'),
    (dict(loop='turns', loops=dict(low_cycles=0)), 'low_cycles is 0'),
    (dict(loop='turns', num_layers=3, loops=dict(low_cycles=2)), 'two halves'),
    (dict(loop='turns', loops=dict(low_cycles=2, gradient_passes=3)),
     'choose from 1 to the 2'),
    (dict(loop='turns', loops=dict(low_cycles=2, exit_gate=True)), 'exit_gate'),
    (dict(loop='plain', keep_gathered='all'), 'keep_gathered')])
def test_what_cannot_loop_is_refused(changes, words):
  with pytest.raises(RequestError, match=words):
    architectures.resolve(flat.make_model(models.small_config('gpt',
                                                              **changes)))


def test_layers_that_loop_have_no_rate_by_depth():
  c = step_test.config(optim__layer_decay=0.9)
  c.model = models.small_config('gpt', loop='plain', vocab_size=64)
  with pytest.raises(RequestError, match='several depths'):
    runs.build(c, architectures.resolve(c.model))
