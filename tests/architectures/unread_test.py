"""Fields that a model does not read: which they are, and who is told."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from architectures.parts import checks, unread
from configs import base
from configs.errors import RequestError
from tests.helpers import models
from training import limits, runs

# A value of each field that is neither its default nor what a system sets.
OTHER = {
    'sinusoid': 'fairseq', 'rope.theta': 500.0, 'rope.fraction': 0.5,
    'rope.original_len': 9, 'rope.low_freq_factor': 1.5,
    'rope.high_freq_factor': 5.0, 'rope.beta_fast': 2.0,
    'rope.beta_slow': 8.0, 'rope.short_factor': (1.0, 2.0, 3.0, 5.0),
    'rope.long_factor': (1.0, 2.0, 3.0, 6.0), 'rope.attention_factor': 3.0,
    'rope.truncate': False, 'relative.buckets': 16,
    'relative.max_distance': 99, 'init_scale': 2.0, 'ffn_dropout': 0.3,
    'moe.num_experts': 6, 'moe.top_k': 3, 'moe.router': 'sinkhorn',
    'moe.ffn': 'relu', 'moe.d_ff': 40,
    'moe.shared_experts': 2, 'moe.shared_gate': True,
    'moe.dispatch': 'dropless',
    'moe.grouped_kernel': 'xla', 'moe.capacity_factor': 1.1,
    'moe.eval_capacity_factor': 1.2, 'moe.normalize_gates': False,
    'moe.jitter': 0.1, 'moe.logit_noise': 0.2,
    'moe.balance_loss': 'importance', 'moe.balance_weight': 0.5,
    'moe.z_loss_weight': 0.1, 'moe.expert_dropout': 0.2, 'moe.group_size': 8,
    'moe.bias_rate': 0.5, 'lora.alpha': 5.0, 'lora.targets': 'out',
    'lora.dropout': 0.2, 'rope.interleaved': True, 'rope.mscale': 0.5,
    'rope.mscale_all_dim': 0.7,
    'num_kv_heads': 1, 'attention_scale': 0.3, 'qk_norm': True,
    'qk_norm_over': 'projection', 'attention_out_bias': False,
    'attention_gate': 'headwise',
    'latent.q_rank': 5, 'latent.kv_rank': 9, 'latent.nope_dim': 6,
    'latent.rope_dim': 6, 'latent.v_dim': 3, 'latent.scale': 0.3,
    'latent.norm_eps': 0.2,
    'moe.logit_bias': True, 'moe.expert_groups': 2, 'moe.top_groups': 2,
    'moe.gate_scale': 2.0, 'clamp.alpha': 1.0, 'clamp.limit': 3.0,
    'position_offset': 2, 'position': 'alibi', 'attention_kernel': 'xla',
    'attention_softcap': 2.0, 'attention_sinks': True,
    'attention_dropout': 0.2, 'attention_bias': True,
    'deltanet.key_heads': 2, 'deltanet.value_heads': 8, 'deltanet.key_dim': 6,
    'deltanet.value_dim': 6, 'deltanet.conv': 3, 'deltanet.decay': False,
    'deltanet.negative': True,
    'mamba2.heads': 16, 'mamba2.head_dim': 6, 'mamba2.groups': 4,
    'mamba2.state': 6, 'mamba2.conv': 3, 'mamba2.conv_bias': False,
    'mamba2.norm_over': 'all', 'mamba2.least_step': 0.01,
    'mamba2.most_step': 0.05, 'd_ff': 56, 'ffn_bias': True,
    'kda.key_heads': 2, 'kda.value_heads': 8, 'kda.key_dim': 6,
    'kda.value_dim': 6, 'kda.conv': 3, 'kda.rank': 5, 'kda.negative': True,
    'gla.heads': 2, 'gla.key_dim': 6, 'gla.value_dim': 6, 'gla.conv': 3,
    'gla.rank': 5, 'gla.temperature': 4.0,
    'retnet.heads': 2, 'retnet.key_dim': 6, 'retnet.value_dim': 6,
    'streams.count': 3, 'streams.dynamic': False, 'streams.iterations': 5,
    'streams.block_size': 2,
}
# Read by a kernel of a TPU, or by the optimiser's step.
NOT_IN_THE_PROGRAM = ('moe.grouped_kernel', 'moe.bias_rate')
HASH = dict(ffn='moe', moe=dict(router='hash', capacity_factor=1.0))
ROPE = dict(position='rope')
LONGROPE = dict(scaling='longrope', factor=2.0,
                short_factor=(1.0, 1.0, 1.0, 1.0),
                long_factor=(1.0, 1.5, 2.0, 4.0))
MODELS = [
    ('gpt', {}), ('gpt', dict(position='sinusoidal')), ('gpt', HASH),
    ('llama', {}),
    ('llama', dict(rope=dict(scaling='yarn', factor=2.0))),
    ('llama', dict(rope=dict(scaling='llama3', factor=2.0))),
    ('gpt', dict(position='relative')), ('mixtral', {}),
    ('llama', dict(mixer='latent')), ('llama', dict(mixer='deltanet')),
    ('llama', dict(mixer='retnet')),
    *(pytest.param('llama', dict(residual=name), marks=pytest.mark.long)
      for name in ('hyper', 'mhc', 'attention')),
    ('mixtral', dict(moe=dict(balance_loss='none'))),
    pytest.param('llama', dict(mixer='mamba2', ffn='none'),
                 marks=pytest.mark.long),
]


def _with(config, fields):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def _program(config):
  """All that a model computes: its parameters, and its outputs and losses with
  and without what is drawn."""
  module = architectures.build(config)

  def function(key, tokens_BL):
    params = nn.meta.unbox(module.init(key, tokens_BL)['params'])
    outputs = [module.apply({'params': params}, tokens_BL, deterministic=d,
                            rngs=dict(dropout=key, router=key))
               for d in (True, False)]
    return params, [(o.logits, o.aux and o.aux['losses']) for o in outputs]

  traced = jax.make_jaxpr(function)(
      jax.random.key(0), jnp.zeros((2, 16), jnp.int32))
  return str(traced), [np.asarray(x).tobytes() for x in traced.consts]


@pytest.mark.slow
@pytest.mark.parametrize('system, changes', MODELS)
def test_what_is_listed_changes_nothing(system, changes):
  config = models.config(system, num_layers=1, **changes)
  listed = unread.unread(architectures.resolve(config))
  assert listed.keys() <= OTHER.keys() | checks.STRICT.keys()
  # The others are refused by parts/checks.py.
  fields = {name: OTHER[name] for name in listed
            if name not in checks.STRICT}
  assert _program(_with(config, fields)) == _program(config)


@pytest.mark.slow
@pytest.mark.parametrize('fields, system, changes', [
    (('rope.theta', 'rope.fraction', 'rope.interleaved'), 'llama', {}),
    (('rope.original_len', 'rope.beta_fast', 'rope.beta_slow'), 'llama',
     dict(rope=dict(scaling='yarn', factor=2.0, original_len=4096))),
    pytest.param(('rope.mscale', 'rope.mscale_all_dim'), 'llama',
                 dict(rope=dict(scaling='yarn', factor=2.0)),
                 marks=pytest.mark.long),
    pytest.param(('attention_gate', *(name for name in OTHER
                                      if name.startswith('latent.'))), 'llama',
                 dict(mixer='latent'), marks=pytest.mark.long),
    pytest.param(tuple(name for name in OTHER if name.startswith('deltanet.')),
                 'llama', dict(mixer='deltanet'), marks=pytest.mark.long),
    pytest.param(tuple(name for name in OTHER if name.startswith('mamba2.')),
                 'llama', dict(mixer='mamba2', mamba2=dict(groups=2)),
                 marks=pytest.mark.long),
    *(pytest.param(tuple(n for n in OTHER if n.startswith(f'{mixer}.')),
                   'llama', dict(mixer=mixer), marks=pytest.mark.long)
      for mixer in ('kda', 'gla', 'retnet')),
    *(pytest.param(tuple(f'streams.{n}' for n in names), 'llama',
                   dict(residual=residual), marks=pytest.mark.long)
      for residual, names in (
          ('hyper', ('count', 'dynamic')), ('mhc', ('count', 'iterations')),
          ('attention', ('block_size',)))),
    (('attention_softcap', 'attention_sinks', 'attention_dropout',
      'attention_bias'), 'llama', {}),
    (('num_kv_heads', 'attention_scale', 'qk_norm', 'attention_gate'), 'llama',
     {}),
    pytest.param(('rope.low_freq_factor', 'rope.high_freq_factor'), 'llama',
                 dict(rope=dict(scaling='llama3', factor=2.0)),
                 marks=pytest.mark.long),
    pytest.param(('rope.short_factor', 'rope.attention_factor'), 'llama',
                 dict(rope=LONGROPE), marks=pytest.mark.long),
    pytest.param(('rope.long_factor',), 'llama',
                 dict(rope=dict(LONGROPE, original_len=4)),
                 marks=pytest.mark.long),
    (('sinusoid',), 'gpt', dict(position='sinusoidal')),
    (('qk_norm_over', 'attention_out_bias'), 'gpt', dict(qk_norm=True)),
    (('relative.buckets', 'relative.max_distance'), 'gpt',
     dict(position='relative')),
    (('init_scale', 'ffn_dropout'), 'llama', dict(init='fan_in')),
    pytest.param(tuple(name for name in OTHER if name.startswith('moe.')
                       and name not in (*NOT_IN_THE_PROGRAM, 'moe.shared_gate',
                                        'moe.top_groups')), 'mixtral',
                 dict(moe=dict(eval_capacity_factor=1.0)),
                 marks=pytest.mark.long),
    (('moe.top_groups',), 'mixtral', dict(moe=dict(expert_groups=2))),
    (('moe.group_size',), 'mixtral', dict(moe=dict(router='sinkhorn'))),
    (('lora.alpha', 'lora.targets', 'lora.dropout'), 'gpt',
     dict(lora=dict(rank=2))),
    (('ffn_dropout', 'moe.shared_gate'), 'mixtral',
     dict(moe=dict(shared_experts=1))),
])
def test_what_is_not_listed_changes_something(fields, system, changes):
  config = models.config(system, **changes)
  assert not unread.unread(architectures.resolve(config)).keys() & set(fields)
  before = _program(config)
  for name in fields:
    assert _program(_with(config, {name: OTHER[name]})) != before, name


def test_every_field_of_the_experts_is_unread_without_them():
  listed = unread.unread(architectures.resolve(models.config('gpt')))
  fields = {f'moe.{name}' for name in base.base().model.moe}
  assert fields <= listed.keys()
  assert {row.where for name, row in listed.items() if name in fields} == {
      'model.ffn is moe'}


def test_a_kind_whose_window_is_0_says_that_it_has_none():
  kinds = {'local': dict(window=5), 'global': dict(window=0),
           'odd': dict(attention='global', window=7)}
  listed = unread.unread(architectures.resolve(models.config(
      num_layers=3, pattern='local,global,odd', kinds=kinds)))
  assert {name for name in listed if name.startswith('kinds.')} == {
      'kinds.odd.window'}


def _config(system='gpt', **fields):
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  return _with(config, {k.replace('__', '.'): v for k, v in fields.items()})


@pytest.mark.parametrize('name, value, where', [
    ('model.rope.theta', 5e5, 'model.position is rope'),
    ('model.moe.top_k', 1, 'model.ffn is moe'),
    ('model.init_scale', 2.0, 'model.init is fan_in'),
])
def test_what_is_set_by_hand_and_not_read_is_refused(name, value, where):
  config = _config(**{name.replace('.', '__'): value})
  runs.check_config(config)  # of a file: a part may have been swapped away
  refusal = f'^{name} is {value}, .* {where}. Leave it at'
  with pytest.raises(RequestError, match=refusal):
    runs.check_config(config, [name])
  runs.check_config(_config(), [name])  # at its default
  # A grid over the part and its field has points without the part.
  decided_by = 'model.position' if 'rope' in name else (
      'model.ffn' if 'moe' in name else 'model.init')
  runs.check_config(config, [name, decided_by])


def test_a_run_says_what_it_does_not_read():
  config = _config('mixtral', model__ffn='gelu')
  model = runs.resolve_alone(config)
  [line] = runs._unread(config, model)
  assert line.startswith('not read: model.moe.num_experts=4, ')
  assert line.endswith(', unless model.ffn is moe')
  config = _config('mixtral')
  assert not limits.unread(config, runs.resolve_alone(config))


@pytest.mark.parametrize('kind, field, words', [
    (dict(mixer='deltanet'), dict(num_heads=8), 'stand in model.deltanet'),
    (dict(mixer='mamba2'), dict(head_dim=4), 'stand in model.mamba2'),
    (dict(mixer='latent'), dict(head_dim=4), 'stand in model.latent'),
    (dict(ffn='moe'), dict(d_ff=96), 'experts have model.moe.d_ff')])
def test_what_a_kind_has_no_field_of_its_own_for(kind, field, words):
  """Its parts read what follows from the model's, once for all kinds."""
  c = base.base()
  c.model = models.config('llama', pattern='a,b', kinds=dict(
      a={}, b=kind | field))
  if 'ffn' in kind:
    c.model.kinds.a, c.model.ffn = dict(ffn='dense'), 'moe'
  name, = field
  by_hand = [f'model.kinds.b.{name}']
  with pytest.raises(RequestError, match=words):
    limits.refuse_unread_of(by_hand, c, runs.resolve_alone(c))
  del c.model.kinds.b[name]
  assert f'kinds.b.{name}' not in unread.unread(runs.resolve_alone(c))


def test_dense_width_is_not_read_where_all_layers_have_experts():
  c = base.base()
  c.model = models.config('mixtral', d_ff=96)
  c.model.moe.d_ff = 32
  with pytest.raises(RequestError, match='model.moe.d_ff is 0'):
    limits.refuse_unread_of(['model.d_ff'], c, runs.resolve_alone(c))
  c.model.moe.d_ff = 0
  limits.refuse_unread_of(['model.d_ff'], c, runs.resolve_alone(c))


def test_a_scaling_is_refused_for_the_mixer_that_turns_nothing():
  with pytest.raises(RequestError, match="meaning with model.mixer 'deltanet'"):
    architectures.resolve(models.config('llama', mixer='deltanet', rope=dict(
        scaling='llama3', factor=2.0)))
