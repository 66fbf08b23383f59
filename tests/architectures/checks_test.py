"""What has no meaning is refused in a sentence, a plain swap of parts not."""

import copy
import dataclasses

import pytest

import architectures
from architectures.parts import blocks, checks, positions
from configs import base
from configs.errors import RequestError
from tests.helpers import models
from training.workdir import run_config

MOE = dict(ffn='moe')
ROPE = dict(position='rope')
RELATIVE = dict(position='relative')
# system: (what is changed, what the sentence says).
WRONG = [
    ('mixtral', dict(moe=dict(bias_rate=0.5)), 'bias_rate 0.5 has no meaning'),
    ('gpt', dict(norm='batchnorm'), "unknown model.norm 'batchnorm'.*rmsnorm"),
    ('gpt', dict(num_heads=5), 'does not divide model.d_model 32'),
    ('gpt', dict(num_kv_heads=3), 'model.num_kv_heads is 3'),
    ('gpt', dict(norm_eps=0.0), 'model.norm_eps is 0.0: it must be > 0'),
    ('gpt', dict(dropout=1.0), r'model.dropout is 1.0: choose it in \[0, 1\)'),
    # Layers.
    ('gpt', dict(num_decoder_layers=1), "model.num_decoder_layers 1 has no "
     "meaning with model.arch 'gpt'.*set it to 2, .*t5, transformer"),
    ('bert', dict(num_decoder_layers=1), 'num_decoder_layers 1 has no meaning'),
    ('gpt', dict(type_vocab_size=2), "type_vocab_size 2 has no .*from bert"),
    ('t5', dict(type_vocab_size=2), 'type_vocab_size 2 has no meaning'),
    # Attention.
    ('gpt', dict(attention='banded'), 'sliding_window is 0'),
    ('gpt', dict(sliding_window=4), "meaning with model.attention 'global'"),
    ('gpt', dict(attention='global,banded', sliding_window=4, num_layers=3),
     'num_layers is 3: the rest must be a multiple of the 2 layers'),
    ('gpt', dict(attention_softcap=-1.0), 'softcap is -1.0: it must be >= 0'),
    ('gpt', dict(attention_scale=-1.0), 'scale is -1.0: it must be > 0'),
    # Positions.
    ('gpt', ROPE | dict(learned_stretch=2.0), "no meaning .*position 'rope'"),
    ('gpt', ROPE | dict(rope=dict(fraction=0.4)), 'must be even'),
    ('gpt', ROPE | dict(rope=dict(fraction=1.5)), r'choose it in \(0, 1\]'),
    ('gpt', dict(rope=dict(scaling='yarn', factor=2.0)),
     "scaling 'yarn' has no meaning with model.position 'learned'"),
    ('gpt', ROPE | dict(rope=dict(factor=8.0)),
     "factor 8.0 has no meaning with model.rope.scaling 'none'.*linear, ntk"),
    ('gpt', ROPE | dict(rope=dict(scaling='linear', factor=0.0)),
     'factor is 0.0: it must be >= 1'),
    ('gpt', ROPE | dict(rope=dict(scaling='ntk', factor=-1.0)),
     'factor is -1.0: it must be >= 1'),
    ('gpt', ROPE | dict(rope=dict(scaling='ntk', factor=2.0, fraction=0.25)),
     'needs 4 or more'),
    ('gpt', ROPE | dict(rope=dict(scaling='llama3', low_freq_factor=4.0)),
     'high_freq_factor is 4.0: llama3 needs it above'),
    ('gpt', ROPE | dict(rope=dict(scaling='yarn', beta_slow=32.0)),
     'beta_fast is 32.0: yarn needs it above'),
    ('gpt', RELATIVE | dict(relative=dict(max_distance=16)),
     'max_distance is 16: of model.relative.buckets 32, 16 are of one'),
    ('gpt', RELATIVE | dict(relative=dict(buckets=1)), 'even number, 2 or'),
    ('t5', dict(relative=dict(buckets=2)), 'arch t5 needs an even number, 4'),
    ('gpt', dict(position='sinusoidal', sinusoid='fairseq', d_model=2,
                 num_heads=1), 'fairseq, need it even and at least 4'),
    # Experts.
    ('gpt', dict(moe=dict(num_experts=2, top_k=7)), 'choose 1 to .*experts 2'),
    ('gpt', dict(moe=dict(router='swich')), "Did you mean 'switch'"),
    ('gpt', MOE | dict(moe=dict(router='expert_choice')),
     'router expert_choice has no meaning in the decoder of model.arch gpt'),
    ('switch', dict(moe=dict(router='expert_choice')), 'decoder of .* switch'),
    ('gpt', MOE | dict(moe=dict(router='gshard', normalize_gates=False)),
     "normalize_gates False has no meaning with model.moe.router 'gshard'"),
    ('gpt', MOE | dict(moe=dict(router='uniform', normalize_gates=False)),
     "no meaning with model.moe.router 'uniform'"),
    ('gpt', MOE | dict(moe=dict(router='hash', logit_noise=0.1)),
     "logit_noise 0.1 has no meaning with model.moe.router 'hash'"),
]


def _id(value):
  """'gpt-position=rope-rope.factor=8.0' of a row of WRONG."""
  if isinstance(value, str):
    return value if value in models.SYSTEMS else ''
  return '-'.join(
      f'{name}.{k}={v}' if k else f'{name}={v}' for name, x in value.items()
      for k, v in (x.items() if isinstance(x, dict) else [('', x)]))


@pytest.mark.every_system
@pytest.mark.parametrize('system, changes, sentence', WRONG, ids=_id)
def test_what_has_no_meaning_is_refused(system, changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    architectures.build(models.config(system, **changes))


# Parts that a file of configs/ has set, and that are swapped away.
SWAPS = [
    ('mixtral', dict(ffn='gelu')), ('switch', dict(ffn='relu')),
    ('switch', dict(moe=dict(router='hash'))),
    ('switch', dict(moe=dict(router='uniform', top_k=2))),
    ('gpt_neox', dict(position='alibi')),
    ('bert', MOE | dict(moe=dict(router='expert_choice'))),
] + [(system, dict(position=position)) for position in positions.POSITIONS
     for system in ('gshard', 'llama', 't5', 'bert')]


@pytest.mark.every_system
@pytest.mark.parametrize('system, changes', SWAPS, ids=_id)
def test_a_swapped_part_leaves_its_fields_behind(system, changes):
  assert architectures.build(models.config(system, **changes))


def test_every_number_of_the_model_has_a_range():
  """So that a new field is not forgotten."""
  free = {  # any number is meant
      'embed_scale', 'logits_scale'}
  ranged = {field for *_, fields in checks.RANGES for field in fields}
  flat = run_config.flatten(base.base().model)
  numbers = {name for name, value in flat.items() if type(value) is float}
  assert numbers - ranged - free == {'rope.high_freq_factor', 'rope.beta_fast'}


@pytest.mark.every_system
@pytest.mark.parametrize('changes', [
    {}, dict(attention_scale=0.5),
    dict(parametrization='mup', mup_base_width=16, attention_scale=0.0)])
@pytest.mark.parametrize('system', models.SYSTEMS)
def test_a_resolved_config_resolves_to_itself(system, changes):
  """As --print_config prints it; and what it was made of stays as it was."""
  if 'parametrization' in changes and system not in models.MUP:
    pytest.skip('muP has no rules for it')
  fields = models.config(system, **changes).to_dict()
  given = copy.deepcopy(fields)
  c = architectures.resolve(fields)
  assert fields == given
  assert architectures.resolve(dataclasses.asdict(c)) == c
  assert architectures.resolve(c) is c


@pytest.mark.parametrize('system, changes, sentence', [
    ('gpt', dict(residual='mhc'), "model.residual is 'mhc', which model.block "
     "'plain' has no equation for: choose 'plain', or model.block from pre_no"),
    ('gpt', dict(ffn='none'), "model.ffn is 'none', and model.block 'plain' "
     'has no equation without .*choose it from pre_norm'),
    ('t5', {}, "model.block is 'plain', which has no cross-attention, and "
     "model.arch 't5' is an encoder-decoder: choose it from pre_norm")])
def test_a_wiring_is_refused_what_it_does_not_say_that_it_can(
    monkeypatch, system, changes, sentence):
  class Plain(blocks.Block):
    """x + A(x); x + F(x)."""
  monkeypatch.setitem(blocks.BLOCKS, 'plain', Plain)
  architectures.resolve(models.config('gpt', block='plain'))
  with pytest.raises(RequestError, match=sentence):
    architectures.resolve(models.config(system, block='plain', **changes))


def test_a_config_that_was_changed_is_checked_again():
  c = architectures.resolve(models.config('gpt'))
  with pytest.raises(ValueError, match="unknown model.norm 'rmsnrm'"):
    architectures.build(dataclasses.replace(c, norm='rmsnrm'))
