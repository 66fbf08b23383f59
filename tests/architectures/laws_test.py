"""What holds of every model, whatever its parts: causality, scan = loop,
remat = plain, decode = forward, packed = apart; of an encoder-decoder, that no
padding leaks and the memory is projected once; and that two steps of training
on eight devices are those on one."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import blocks, layers
from architectures.parts.attention.kernels import visible_keys
from architectures.parts.blocks import BLOCKS
from architectures.parts.config import LayerKind
from architectures.parts.layers import NORMS
from architectures.parts.positions import POSITIONS
from common.errors import RequestError
from tests.helpers import models
from tests.training import step_test
from training import generate, runs


NGRAMS = dict(rows=40, heads=2)
ATTENTIONS = {
    'global': {},
    'grouped': dict(num_kv_heads=2, attention_exclusive='all', memory='engram',
                    forget_gate=True, cca=True, position='path', dynamic_conv=3,
                    ngrams=NGRAMS, branch_conv=2),
    'banded': dict(**models.window_in_every_other_layer(5), value_norm=True,
                   keys_as_values=True,
                   layer_scale=True, memory='over_encoding', ngrams=NGRAMS),
    'capped': dict(attention_softcap=5.0, num_kv_heads=2, residual_scale=0.5,
                   value_residual=True, value_embedding=True, branch_conv=3),
    # What adds nothing to another is tried beside it.
    'qk_norm': dict(
        qk_norm=True, learned_log_scale=True, attention_exclusive='learned',
        context_norm=True, attention_gate='headwise', memory='per_layer',
        qk_norm_scale=False, attention_chunk=4, attention_log_scale=0.2,
        attention_log_from=4, pattern='global,chunked', kinds={
            'global': {}, 'chunked': dict(attention='chunked')}),
    'sinks': dict(attention_sinks=True, qk_norm=True, num_kv_heads=2,
                  qk_clip=0.5, attention_difference=0.5,
                  qk_norm_over='projection', attention_out_bias=False,
                  attention_gate='elementwise'),
    'latent': dict(mixer='latent', attention_gate='elementwise',
                   residual='attention', streams=dict(block_size=3)),
    'indexed': dict(indexer=dict(top_k=5), pattern='indexed', kinds=dict(
        indexed=dict(attention='indexed'))),
    'blocks': dict(indexer=dict(top_k=4, block=2), pattern='indexed',
                   kinds=dict(indexed=dict(
                       attention='indexed', memory='engram')), ngrams=NGRAMS,
                   residual='gated', streams=dict(count=2, rank=3)),
}
# Mixers with a state, each in layers beside those of an attention.
STATES = [name for name in blocks.MIXERS if name not in ('attention', 'latent')]
# A layer with a mixture of experts costs most, and has tests of its own.
# The other networks are these two with another function.
ALIKE = {'relu', 'relu2', 'leaky_relu2', 'gelu_tanh', 'silu', 'reglu', 'geglu',
         'geglu_tanh', 'swiglu_clamped'}
FFNS = ('gelu', 'moe', 'swiglu', 'gelu', 'swiglu', 'gelu', 'swiglu',
        *[name for name in layers.FFNS
          if name not in {'gelu', 'swiglu', *ALIKE}])
# Reflections go with some attentions alone, and stand in one above.
PARTS = dict(position=[name for name in POSITIONS if name != 'path'],
             block=BLOCKS, norm=NORMS, ffn=FFNS, attention=ATTENTIONS,
             state=[*STATES, 'no'],
             loop=('concat', 'none', 'plain', 'gate', 'none', 'add', 'none'))
# Every value of every part but networks, one that is added too.
VARIANTS = [{part: tuple(values)[i % len(values)]
             for part, values in PARTS.items()}
            for i in range(max(map(len, PARTS.values())))]


@pytest.mark.slow
@pytest.mark.parametrize('parts',
                         models.mark_long_except(VARIANTS[::6], VARIANTS),
                         ids=lambda x: '-'.join(x.values()))
def test_laws_of_a_variant(parts):
  changes = dict(parts)
  changes |= dict(attention='global') | ATTENTIONS[changes.pop('attention')]
  state = changes.pop('state')
  if state in STATES:
    kinds = changes.get('kinds', dict(own={})) | dict(state=dict(
        mixer=state, position='rope' if blocks.MIXERS[state].positional
        else 'none'))
    changes |= dict(pattern=','.join(kinds), kinds=kinds,
                    num_layers=len(kinds))
  # Without norms, networks that square their input would overflow float32.
  if changes['block'] == 'no_norm':
    changes |= dict(residual_scale=0.1)
  module, params = models.make_model(
      **changes, loops=dict(passes=2), compressed=dict(
          window=5, csa_rate=2, hca_rate=3, out_groups=2))
  check_laws(module, params)
  # A step of training on eight devices, up to its compiling.
  run = runs.build(step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
                   module.config)
  with run.context():
    run.train_step().lower(run.abstract_state, step_test.batch())


# Parts that take arrays from layer to layer or, with a cache, from token to
# token, beside the residual stream.
PASSED_ON = {
    'skips': dict(skips=True, memory='smear', residual='embedding',
                  num_layers=5),
    'router': dict(ffn='moe', num_layers=3, residual='affine',
                   embed_affine=True, moe=dict(
        router='softmax_bias', num_experts=4, top_k=1, router_dim=6,
        zero_experts=1, zero_experts_skip=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PASSED_ON)
def test_laws_of_arrays_that_layers_pass_on(name):
  check_laws(*models.make_model('llama', **PASSED_ON[name]))


def check_laws(module, params):
  tokens = np.asarray(models.random_tokens())
  apply = jax.jit(functools.partial(models.logits, module))
  logits = apply(params, tokens)
  # Causality: a later token does not change an earlier prediction.
  changed = tokens.copy()
  changed[:, 9] = (changed[:, 9] + 1) % models.VOCAB
  changed = apply(params, changed)
  np.testing.assert_array_equal(logits[:, :9], changed[:, :9])
  assert not np.allclose(logits[:, 9:], changed[:, 9:])
  # Decoding through the cache = the forward pass, and a loop over layers, which
  # decodes here after a scan over them, = the scan, on the same parameters.
  other = architectures.build(
      dataclasses.replace(module.config, scan_layers=False))
  models.assert_trees_close(logits,
                            models.decode_with_cache(module, params, tokens,
                                                     stepped=other),
                            rtol=3e-5)


@pytest.mark.slow
def test_remat_equals_plain_and_computes_again_what_it_says():
  """In training, where dropout draws: the same loss and gradients; `full`
  takes every product of a layer again in the backward pass, `dots` none."""
  tokens, lowered, products = models.random_tokens(), {}, {}
  for remat in ('none', 'full', 'dots'):
    module, params = models.make_model(
        dropout=0.1, remat=remat, position='rope', block='sandwich')
    def loss(p, module=module):
      return jnp.square(models.logits(
          module, p, tokens, deterministic=False,
          rngs=dict(dropout=jax.random.key(3)))).mean()
    lowered[remat] = jax.jit(jax.value_and_grad(loss)).lower(params)
    products[remat] = lowered[remat].as_text().count('dot_general')
  models.assert_trees_close(*(lowered[remat].compile()(params)
                              for remat in ('none', 'full')), rtol=3e-5)
  assert products['full'] > products['dots'], products


WINDOW = types.SimpleNamespace(  # of a config
    diffusion_block=0, sliding_window=2, attention_chunk=2)
PICTURES = {
    ('global', True): ['x....', 'xx...', 'xxx..', 'xxxx.', 'xxxxx'],
    ('global', False): None,
    ('banded', True): ['x....', 'xx...', '.xx..', '..xx.', '...xx'],
    ('banded', False): ['xx...', 'xxx..', '.xxx.', '..xxx', '...xx'],
    ('chunked', True): ['x....', 'xx...', '..x..', '..xx.', '....x'],
}


@pytest.mark.parametrize('attention, causal', PICTURES)
def test_masks_as_pictures(attention, causal):
  positions = jnp.arange(5)[None]
  mask = visible_keys(
      LayerKind(attention, 'gelu', causal), WINDOW, positions, positions)
  assert _picture(mask) == PICTURES[attention, causal]


def test_masks_of_documents_and_prefixes():
  positions, segments = jnp.arange(5)[None], jnp.array([[1, 1, 2, 2, 2]])
  kind = LayerKind('global', 'gelu')
  assert _picture(visible_keys(
      kind, WINDOW, positions, positions, segments, segments)
                  ) == ['x....', 'xx...', '..x..', '..xx.', '..xxx']
  assert _picture(visible_keys(
      kind, WINDOW, positions, positions, prefix_B=jnp.array([3]))
                  ) == ['xxx..', 'xxx..', 'xxx..', 'xxxx.', 'xxxxx']


@pytest.mark.parametrize('system', ['bloom', 'mamba2'])
def test_a_mask_with_a_hole_is_refused_where_it_is_known(system):
  module, params = models.make_model(system)
  run = lambda **ids: jax.eval_shape(lambda params: models.logits(
      module, params, models.random_tokens(1, 6), **ids), params)
  for ids in ([1, 1, 0, 0, 1, 1], [1, 1, 2, 2, 1, 0]):
    with pytest.raises(RequestError, match='id but 0, .* lies in one piece'):
      run(segment_ids_BL=jnp.array([ids]))
  run(segment_ids_BL=jnp.array([[0, 1, 1, 2, 0, 0]]))
  with pytest.raises(AssertionError, match='rank'):
    models.logits(module, params, jnp.arange(6))


def _picture(mask):
  if mask is None:
    return None
  return [''.join('x' if seen else '.' for seen in row) for row in mask[0]]


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    dict(memory='engram', ngrams=NGRAMS, branch_conv=3, attention_conv=3,
         cca=True, key_offset=True, forget_gate=True, rope=dict(fraction=0.5)),
    ATTENTIONS['indexed'], ATTENTIONS['indexed'] | dict(mixer='latent'),
    ATTENTIONS['blocks'], *PASSED_ON.values()])
def test_packed_documents_do_not_see_each_other(changes):
  module, params = models.make_model(**dict(position='rope') | changes)
  # The second begins at an odd place, in the middle of a block of two.
  apart = models.random_tokens(2, 7, seed=4)
  places = np.arange(14)[None]

  @jax.jit
  def both(params):
    packed = models.logits(
        module, params, apart.reshape(1, 14), positions_BL=places % 7,
        segment_ids_BL=1 + places // 7)
    return packed.reshape(2, 7, -1), models.logits(module, params, apart)
  models.assert_trees_close(*both(params))


DROPLESS = dict(capacity_factor=0.0, eval_capacity_factor=0.0, num_experts=4)


def _make(system, **changes):
  changes = dict(moe=DROPLESS, head_dim=8) | changes
  return models.make_model(system, **changes)


def _apply(module, params, source, target, **kwargs):
  return module.apply({'params': params}, source, target, **kwargs)


@pytest.mark.slow
def test_padding_is_unseen_by_gradient():
  module, params = _make('t5', num_layers=1, num_decoder_layers=1)
  ids = jnp.array([[1, 1, 1, 1, 0, 0]])
  def hidden(table):  # each token its own row: the gradient tells them apart
    p = params | {'embed': {'tokens': table}}
    return _apply(module, p, jnp.arange(6)[None], 6 + jnp.arange(5)[None],
                  segment_ids_BM=ids).hidden[0].sum(-1)
  grads = jax.jit(jax.jacrev(hidden))(params['embed']['tokens'])
  seen = np.abs(grads[:, :11]).sum(-1) > 0
  picture = [''.join('x' if s else '.' for s in row) for row in seen]
  assert picture == ['xxxx..x....', 'xxxx..xx...', 'xxxx..xxx..',
                     'xxxx..xxxx.', 'xxxx..xxxxx']


@pytest.mark.slow
def test_generation_equals_asking_again_for_each_token():
  module, params = _make('transformer')
  source, lengths = models.random_tokens(2, 9), jnp.array([9, 6])
  ids = (jnp.arange(9)[None] < lengths[:, None]).astype(jnp.int32)
  start = jnp.full((2, 1), 5)
  new = generate.generate(
      module, params, start, jnp.ones(2, jnp.int32), jax.random.key(0),
      max_new_tokens=6, sampling=generate.Sampling(temperature=0),
      source_BM=source, source_lengths_B=lengths)
  best = jax.jit(lambda target: _apply(
      module, params, source, target, segment_ids_BM=ids).logits.argmax(-1))
  np.testing.assert_array_equal(
      new, best(jnp.concatenate([start, new], 1))[:, :-1])


@pytest.mark.slow
def test_the_memory_is_projected_once():
  """With a filled cache, no product has the memory's features in it."""
  module, params = _make('t5')
  memory = jnp.ones((2, 11, 32))
  cache = architectures.init_cache(module.config, 2, 4)
  first = lambda m: _apply(module, params, None, models.random_tokens(2, 1),
                           memory=m, cache=cache)
  filled = jax.eval_shape(first, memory).cache
  again = jax.make_jaxpr(lambda cache: _apply(
      module, params, None, models.random_tokens(2, 1), cache=cache,
      decoder_positions_BL=jnp.ones((2, 1), jnp.int32)).logits)(filled)
  assert 'f32[2,11,32]' in str(jax.make_jaxpr(first)(memory))
  assert 'f32[2,11,32]' not in str(again)
  with pytest.raises(ValueError, match='attends to a memory'):
    _apply(module, params, None, models.random_tokens(2, 1), cache=cache)


MODELS = {
    # Values, keys and queries of several sorts, heads of two numbers, and a
    # recurrence.
    'mixers': ('llama', dict(
        attention_conv=3, branch_conv=2, attention_gate='elementwise',
        num_kv_heads=2, attention_difference=0.3,
        num_layers=6, pattern='own,reads,state', qk_norm=True,
        qk_norm_over='projection', value_residual=True, value_embedding=True,
        kinds=dict(own={}, reads=dict(kv_sharing=True), state=dict(
            mixer='gla', position='none')),
        gla=dict(heads=4, key_dim=8, value_dim=8))),
    'deltanet': ('llama', dict(mixer='deltanet', deltanet=dict(
        key_heads=2, value_heads=4, key_dim=8, value_dim=8,
        precondition=1.5))),
    'latent': ('deepseek_v32', dict(mtp_depth=1, indexer=dict(top_k=5))),
    'entries': ('llama', dict(
        pattern='csa,hca,swa', kinds={name: dict(mixer=name) for name in (
            'csa', 'hca', 'swa')}, num_layers=3, attention_sinks=True,
        compressed=dict(window=5, csa_rate=2, hca_rate=3, out_groups=2,
                        q_rank=16), indexer=dict(top_k=2, head_dim=8))),
    'deltaproduct': ('llama', dict(mixer='deltanet', deltanet=dict(
        key_heads=2, householders=2))),
    'rwkv7': ('llama', dict(mixer='rwkv7', residual='affine')),
    'mamba': ('llama', dict(mixer='mamba', residual='balanced')),
    'path': ('llama', dict(
        position='path', dynamic_conv=3, num_kv_heads=2)),
    'mamba2': ('mamba2', {}),
    'mamba3': ('llama', dict(mixer='mamba3', residual='embedding')),
    'lfm2': ('lfm2', {}),
    **{name: ('llama', changes) for name, changes in PASSED_ON.items()},
    'llama4': ('llama4', dict(attention_chunk=4, attention_log_from=4)),
    'streams': ('llama', dict(residual='mhc', streams=dict(
        learned_end=True))),
    'qwen4_exp': ('qwen4_exp', dict(
        ngrams=NGRAMS, indexer=dict(top_k=4, block=2), streams=dict(count=2))),
    'memory': ('llama', dict(
        num_kv_heads=2, cca=True, pattern='before,after', ngrams=NGRAMS,
        kinds=dict(
            before=dict(memory='engram'), after=dict(memory='per_layer')))),
    'loops': ('llama', dict(loop='concat', loops=dict(
        passes=3, gradient_passes=2, boundary='norm'))),
    'turns': ('hrm_text', dict(num_layers=4)),
    'comba': ('llama', dict(mixer='comba', comba=dict(
        key_heads=2, value_heads=4, key_dim=8, value_dim=8))),
    'mesa': ('llama', dict(mixer='mesa', mesa=dict(
        heads=4, key_dim=8, value_dim=8, cg_steps=4))),
    'axk2': ('axk2', dict(indexer=dict(top_k=5))),
    'blocks': ('llama', dict(diffusion_block=4, self_conditioning=True)),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', MODELS)
def test_several_devices_are_one(name, capfd):
  system, changes = MODELS[name]
  c = step_test.config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  c.model = models.small_config(system, vocab_size=64, **changes)
  more = {}
  if c.model.diffusion_block:
    c.objective = 'block_diffusion'
    more = dict(segment_ids=np.ones((step_test.BATCH, step_test.LENGTH)),
                has_estimate=np.arange(step_test.BATCH) % 2.0)

  def trained(mesh=None):
    run = runs.build(c, architectures.resolve(c.model), mesh=mesh)
    with run.context():
      state = jax.device_put(models.draw_parameters(run.abstract_state),
                             run.shardings)
      step = run.train_step()
      for n in range(2):
        state, metrics = step(state, run.put(step_test.batch(n) | more))
    return jax.device_get((state.params, metrics['loss']))

  params, loss = trained()
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  alone, other = trained(step_test.one_device_mesh())
  models.assert_trees_close(alone, params, rtol=2e-4)
  assert loss == pytest.approx(other, rel=1e-4)
