"""layer_types of a config.json: which layers repeat, and which do not."""

import itertools

import pytest

import architectures
from architectures.parts.hf import layer_types
from configs import kimi_linear
from configs import kinds
from configs.errors import RequestError
from tests.helpers import models
from training.hf import config as hf_config

W, G = layer_types.WINDOW, layer_types.WHOLE


@pytest.mark.parametrize('layers, every, first, period, last', [
    (26, 6, 2, 6, 0),  # Gemma 3 1B: two layers more than four periods
    (34, 6, 4, 6, 0), (48, 6, 0, 6, 0), (62, 6, 2, 6, 0), (26, 2, 0, 2, 0),
    (4, 6, 0, 1, 0), (7, 6, 0, 7, 0)])
def test_layers_of_gemma(layers, every, first, period, last):
  names = ['local' if (n + 1) % every else 'global' for n in range(layers)]
  found = layer_types.shortest(names)
  assert [len(kinds.split(found[field])) for field in (
      'prefix', 'pattern', 'suffix')] == [first, period, last]
  c = architectures.resolve(_with(dict(
      found, kinds={name: {} for name in names}), layers))
  assert [kind.name for kind in c.layer_kinds(layers)] == names


def test_the_last_layers_may_be_other_ones_of_the_pattern():
  size = kimi_linear.get_config('48b-a3b').model
  kinds_of = [kind.name for kind in architectures.resolve(size).layer_kinds(27)]
  assert [n for n, name in enumerate(kinds_of, 1) if name == 'full'] == [
      4, 8, 12, 16, 20, 24, 27]
  assert [n for n, name in enumerate(kinds_of, 1) if 'dense' in name] == [1]
  assert layer_types.shortest(kinds_of) == {
      field: size[field] for field in ('prefix', 'pattern', 'suffix')}


def test_any_layers_are_written_as_they_were_read():
  for types in itertools.product((W, G), repeat=5):
    fields = layer_types.read(types, 5, window=7)
    written = layer_types.write(architectures.resolve(_with(fields)))
    assert written['layer_types'] == list(types)
    assert written.get('sliding_window') == (7 if W in types else None)


def _with(fields, layers=5):
  model = models.config('llama', num_layers=layers)
  model.update({name: value for name, value in fields.items()
                if name != 'kinds'})
  model.kinds = fields['kinds']
  return model


def test_further_fields_of_a_kind_are_the_models_where_all_layers_have_them():
  own = {W: dict(rope=dict(theta=5.0)), G: dict(qk_norm=True)}
  some = layer_types.read([W, G], 2, 3, own)
  assert some['kinds'] == {'local': dict(window=3, rope=dict(theta=5.0)),
                           'global': dict(window=0, qk_norm=True)}
  every = layer_types.read([W, W], 2, 3, own)
  assert not every['kinds'] and every['rope'] == dict(theta=5.0)
  assert (every['attention'], every['sliding_window']) == ('banded', 3)


@pytest.mark.parametrize('types, layers, window, words', [
    ([W], 2, 3, 'one for each of 2 layers'), ([W, 'linear'], 2, 3, 'linear'),
    ([W, 1], 2, 3, 'layer_types'), ([W, G], 2, 0, 'no sliding_window')])
def test_what_layer_types_cannot_say_is_refused(types, layers, window, words):
  with pytest.raises(RequestError, match=words):
    layer_types.read(types, layers, window)


def test_two_windows_have_no_place_in_one_config_json():
  model = _with(dict(pattern='a,b', prefix='a', kinds={
      'a': dict(window=3), 'b': dict(window=4)}))
  with pytest.raises(RequestError, match='windows of 3, 4 keys'):
    layer_types.write(architectures.resolve(model))


def test_deepseek_v2_has_experts_in_every_layer_where_its_file_does_not_say():
  """As DeepseekV2Config of transformers has it."""
  told = dict(model_type='deepseek_v2', hidden_size=32, num_hidden_layers=3,
              num_attention_heads=4, n_routed_experts=4, num_experts_per_tok=2,
              kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=8,
              qk_rope_head_dim=4, v_head_dim=8, vocab_size=50,
              intermediate_size=32, moe_intermediate_size=16)
  for dense in (None, 0, 1):
    c = hf_config.read(told | (
        {} if dense is None else dict(first_k_dense_replace=dense)))
    assert [c.of_kind(kind.name).ffn for kind in c.layer_kinds(3)] == [
        'swiglu'] * (dense or 0) + ['moe'] * (3 - (dense or 0))
