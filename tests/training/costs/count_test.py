"""Parameter counts and costs against published figures and hand sums."""

import json

from architectures.parts.moe.routing import MoEConfig
from configs import bert, gpt, llama, mixtral, t5
import pytest

from tests.helpers import forked
from tools import count
from training import runs
from training.costs import totals, flops

# Over 2 %, as the lab notes explain.
EXPLAINED = {
    'gshard:600b': 0.0328, 'gshard:150b': 0.0369, 'gshard:37b': 0.0676,
    'switch:base-16': -0.0251, 'transformer:base': -0.0295,
}


@pytest.mark.long
def test_every_size_is_near_its_published_figure():
  rows = list(count.count_all_sizes())
  assert [row['size'].split()[0] for row in rows] == [
      ':'.join(names) for names in count.list_all_sizes()]
  assert len(rows) > 200
  assert all(row['training_flops_per_token'] > 0 for row in rows)
  inexact = [r['size'] for r in rows
             if isinstance(r['published'], int) and r['difference']]
  assert not inexact  # a whole number is a checkpoint's own count
  assert all(r['active_parameters'] <= r['parameters'] for r in rows)
  far = {r['size']: r['difference'] for r in rows
         if r['difference'] is not None and abs(r['difference']) > 0.02}
  assert far == pytest.approx(EXPLAINED, abs=1e-4)


def test_what_a_publication_leaves_out_is_in_no_figure(monkeypatch):
  monkeypatch.setattr(totals.flops, 'training_flops_of_row', lambda *_: {})
  for size in ('base', 'large'):
    row = count.count_size('bert', size)
    assert row['parameters'] == row['active_parameters'] == row['published']


@pytest.mark.parametrize('module, size, tokens, warmup, decay, rate', [
    # Brown et al. 2020, table 2.1 and appendix B; Devlin et al. 2019, appendix
    # A.2; Touvron et al. 2023, table 2; Raffel et al. 2020, section 3.1.
    (gpt, 'gpt3-175b', 3.2e6, 375e6, 260e9, 0.6e-4),
    (bert, 'large', 256 * 512, 1e4 * 256 * 512, 0, 1e-4),
    (llama, '65b', 4e6, 2000 * 4e6, 0, 1.5e-4),
    (t5, '11b', 128 * 512, 1e4 * 128 * 512, 0, 0.01)])
def test_a_published_size_is_trained_as_its_paper_says(
    module, size, tokens, warmup, decay, rate):
  config = module.get_config(size)
  step = config.data.batch_size * config.data.length
  optim = config.optim
  assert optim.lr == rate
  assert (step, step * optim.warmup_steps, step * optim.decay_steps) == (
      pytest.approx((tokens, warmup, decay), rel=0.05))


@pytest.mark.parametrize('fields, active', [
    # Two layers of 3 x 128 x 172 an expert: 8, of which 2 are at work.
    (dict(), 2), (dict(shared_experts=2), 4), (dict(router='hash'), 2),
    # A quarter of the choices multiply nothing.
    (dict(top_k=4, num_experts=6, zero_experts=2), 3),
    (dict(router='expert_choice', capacity_factor=1.5), 3)])
def test_the_experts_at_work_for_a_token(fields, active):
  config = mixtral.get_config('tiny')
  if fields.get('router') == 'expert_choice':  # not in a decoder
    config = bert.get_config('tiny')
    config.model.update(ffn='moe', ffn_bias=False)
    fields = fields | {'ffn': 'swiglu'}
  config.model.moe.update(fields)
  model = runs.resolve_model_without_tokenizer(config)
  moe = model.part(MoEConfig)
  one = 3 * model.d_model * moe.d_ff * model.num_layers
  figures = totals.count_costs(config)
  every = moe.num_experts + moe.shared_experts
  assert figures['by_part']['ffn'] == every * one
  assert figures['active_by_part']['ffn'] == active * one
  assert figures['active_parameters'] == (
      figures['parameters'] - (every - active) * one)
  assert totals.count_parameters(model) == (figures['parameters'],
                                            figures['active_parameters'])
  # And so many products: two FLOPs a parameter at work.
  wider = model.with_part(MoEConfig, d_ff=2 * moe.d_ff)
  assert flops.forward_flops(wider, 8)['weights'] - flops.forward_flops(
      model, 8)['weights'] == 2 * 8 * active * one


def test_training_of_an_encoder_decoder_is_that_of_its_rows():
  """A row of 64 tokens is a source of 58 and a target of 14 where 15 % of them
  are cut out in spans of 3, and an end each (Raffel et al. 2020)."""
  config = t5.get_config('tiny')
  figures = totals.count_costs(config, 64)
  assert figures['training_lengths'] == [58, 14]
  forward = flops.forward_flops(runs.resolve_model_without_tokenizer(config),
                                58, 14)
  assert figures['flops_per_token']['training'] == pytest.approx(
      3 * sum(forward.values()) / (58 + 14))
  assert totals.count_briefly(config)['training_flops_per_token'] == (
      totals.count_costs(config)['flops_per_token']['training'])
  config.objective = 'causal'
  with pytest.raises(ValueError, match='does not train model.arch'):
    totals.count_costs(config)


def test_parts_add_up_and_costs_are_gpt2s():
  figures = totals.count_costs(gpt.get_config('gpt2'), 1024)
  assert figures['parameters'] == sum(
      figures['by_part'].values()) == 124_439_808
  assert figures['active_parameters'] == figures['parameters']
  assert figures['kv_cache_bytes_per_token'] == 2 * 12 * 768 * 2
  # 24 D^2 a layer and token for weights, 4 D keys for attention, the head.
  keys = (1024 + 1) / 2
  forward = 12 * (24 * 768 ** 2 + 4 * 768 * keys) + 2 * 768 * 50257
  assert figures['flops_per_token']['prefill'] == pytest.approx(forward)
  assert figures['flops_per_token']['training'] == pytest.approx(3 * forward)
  assert figures['parameter_bytes'] == 4 * figures['parameters']
  json.dumps(figures)
  # Without a length it is that of the data, as far as there are positions.
  config = gpt.get_config('tiny')
  for positions, length in ((16, 16), (64, 32)):
    config.model.max_len, config.data.length = positions, 32
    assert totals.count_costs(config)['length'] == length


@pytest.mark.parametrize('tied', [True, False])
def test_what_is_looked_up_is_told_from_what_multiplies(tied):
  """A table that is the matrix of the head as well is both."""
  config = gpt.get_config('tiny')
  config.model.tie_embeddings = tied
  model = runs.resolve_model_without_tokenizer(config)
  tokens = model.vocab_size * model.d_model
  positions = model.max_len * model.d_model
  total, _ = totals.count_parameters(model)
  multiplied, looked_up = totals.count_parameters_by_use(model)
  assert looked_up == tokens + positions
  assert multiplied == total - positions - (0 if tied else tokens)


def test_a_prefix_lm_reads_its_prompt_in_both_directions():
  config = gpt.get_config('tiny')
  config.objective = 'prefix'
  model = runs.resolve_model_without_tokenizer(config)
  layer = 4 * model.d_model * 32 ** 2  # all pairs of 32 tokens
  parts = flops.forward_flops(model, 32, prompt=True)
  assert parts['attention'] == model.num_layers * layer
  assert totals.count_costs(config, 32)['flops_per_token']['prefill'] == (
      pytest.approx(sum(parts.values()) / 32))


def test_the_memory_of_an_encoder_is_kept_by_each_layer_of_the_decoder():
  """Also by one that reads the keys of its own tokens from another layer."""
  config = t5.get_config('tiny')
  config.model.update(pattern='own,reads', kinds=dict(
      own={}, reads=dict(kv_sharing=True)))
  model = runs.resolve_model_without_tokenizer(config)
  size = 2 * model.num_heads * model.head_dim * 4
  figures = totals.count_costs(config, 32)
  assert figures['memory_cache_bytes_per_token'] == (
      size * model.num_decoder_layers)
  assert figures['kv_cache_bytes_per_token'] == (
      size * model.num_decoder_layers // 2)


@pytest.mark.slow
def test_a_count_says_where_a_model_is_not_the_system_that_it_names():
  words = '-m', 'tools.count', '--config=configs/gpt.py:tiny'
  out = forked.run(*words, '--config.model.arch=bloom').stdout.splitlines()
  assert out[1].startswith('not as published: bloom with embed_norm=False in ')
  out = json.loads(forked.run(
      *words, '--json', '--config.model.norm=rmsnorm').stdout)
  assert out['not_as_published'] == [
      {'field': 'norm', 'value': 'rmsnorm', 'published': 'layernorm'}]
  refused = forked.run(*words, '--config.model.rope.theta=3')
  assert refused.returncode == 2 and 'model does not read' in refused.stderr
