"""A part is one entry of one table: nothing else is edited to add one.

Each text below is what a newcomer would write at the end of one file. The tests
run it there and find the part everywhere: among the choices, in the counts, in
the laws, in a training step on eight devices, in a plan's memory and in a sweep
of equal FLOPs.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from configs.errors import RequestError
from tests.architectures import product_test
from tests.helpers import adding, models, sweeps
from tests.training import step_test
from tools.compare import check, cost
from training.costs import flops, totals
from training.optim import schedules
from training.workdir import run_config


class Part(NamedTuple):
  """A part that is added.

  Attributes:
    what: of adding.TABLES.
    field: of the config that chooses it.
    name: of its entry.
    source: the text.
    changes: further fields of config.model.
    parameters: what it adds to the model of SMALL.
    flops: what it adds to the products of a token there, forward.
  """
  what: str
  field: str
  name: str
  source: str
  changes: dict[str, Any] = {}
  parameters: int = 0
  flops: float = 0.0


# The model that figures are of, and its length.
D, F, H, N, L, E = 32, 48, 4, 2, 16, 4
SMALL = dict(d_model=D, d_ff=F, num_heads=H, num_layers=N, max_len=L,
             norm='layernorm', position='learned', ffn='gelu',
             block='pre_norm', dropout=0.0, init='normal')
MOE = dict(ffn='moe', moe=dict(
    num_experts=E, top_k=2, d_ff=F, ffn='gelu', capacity_factor=0.0,
    eval_capacity_factor=0.0))
# Of the 16 keys of a query the mask of a causal layer shows 8.5 on average,
# that of blocks of 4 shows 2.5; each is multiplied twice, by H heads of D / H.
SEEN, SEEN_OF_4 = (L + 1) / 2, 2.5

PARTS = (
    Part('feed-forward network', 'ffn', 'reglu2', '''
def relu2(x):
  """Primer's squared ReLU (So et al. 2021), here with a gate."""
  return jax.nn.relu(x) ** 2


FFNS['reglu2'] = Kind(relu2, gated=True)
''', parameters=N * (D * F + F), flops=N * 2 * D * F),
    Part('norm', 'norm', 'l1norm', '''
class L1Norm(nn.Module):
  """y = x / mean |x| * scale (Hoffer et al. 2018)."""
  config: ModelConfig
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x):
    scale_D = declare(self, 'scale', nn.initializers.ones, x.shape[-1:],
                      Role((self.axis,)))
    size = jnp.abs(x).mean(-1, keepdims=True) + self.config.norm_eps
    return (x / size * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))
            ).astype(x.dtype)


NORMS['l1norm'] = L1Norm
''', parameters=-(2 * N + 1) * D),
    Part('position encoding', 'position', 'kerple', '''
class LogBias(nn.Module):
  """KERPLE (Chi et al. 2022): scores - a_h log(1 + b_h |i - j|)."""
  config: ModelConfig
  causal: bool

  @nn.compact
  def __call__(self, q_positions_BL, k_positions_BM):
    c = self.config
    slope_H, width_H = (
        declare(self, name, nn.initializers.ones, (c.num_heads,),
                Role(('heads',))) for name in ('slope', 'width'))
    distance_BLM = jnp.abs(
        q_positions_BL[:, :, None] - k_positions_BM[:, None])
    each_H = lambda x_H: jax.nn.softplus(x_H)[None, :, None, None]
    return -each_H(slope_H) * jnp.log1p(
        each_H(width_H) * distance_BLM[:, None].astype(jnp.float32))


POSITIONS['kerple'] = Position(stack_bias=LogBias)
''', parameters=2 * H - L * D),
    Part('kind of attention', 'attention', 'chunked', '''
KINDS['chunked'] = Kind(
    sees=lambda c, q, k: q // c.sliding_window == k // c.sliding_window,
    fields=('sliding_window',), check=_check_banded)
''', dict(sliding_window=4), flops=N * 2 * 2 * D * (SEEN_OF_4 - SEEN)),
    Part('mixer', 'mixer', 'average', '''
from flax import struct
import jax
import jax.numpy as jnp
from architectures.parts import linear
from architectures.parts.config import LayerKind


@struct.dataclass
class Seen:
  """What a layer keeps of a row: the sum of its inputs, and their number."""
  sum_BD: jax.Array
  count_B: jax.Array


class Average(nn.Module):
  """y_t = W_o mean of x up to t (Zhang, Xiong and Su 2018)."""
  FUSED = True  # there are no scores
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x_BLD, ctx, cache):
    c = self.config
    reads_BL = jnp.ones(x_BLD.shape[:2]) if cache is None else (
        jnp.broadcast_to(ctx.valid_BL != 0, x_BLD.shape[:2]))
    sum_BLD = jnp.cumsum(x_BLD * reads_BL[..., None], 1)
    count_BL = jnp.cumsum(reads_BL.astype(jnp.float32), 1)
    if cache is not None:
      sum_BLD += cache.sum_BD[:, None]
      count_BL += cache.count_B[:, None]
      cache = Seen(sum_BLD[:, -1], count_BL[:, -1])
    axes = 'heads', 'head', 'embed'
    w_HKD = linear.weight(self, 'out', (c.num_heads, c.head_dim, c.d_model),
                          axes, in_axes=(0, 1), residual=True)
    mean_BLD = (sum_BLD / count_BL.clip(1)[..., None]).astype(c.compute_dtype)
    return linear.product(
        self, 'out', 'BLHK,HKD->BLD',
        mean_BLD.reshape(*mean_BLD.shape[:2], *w_HKD.shape[:2]), w_HKD, axes,
        deterministic=ctx.deterministic), cache


MIXERS['average'] = Mixer(
    Average, lambda c, shape: Seen(jnp.zeros((*shape[:-1], c.d_model)),
                                   jnp.zeros(shape[:-1])),
    products=lambda c: {'out'}, divided=(('tensor', 'num_heads'),), state=True,
    at_once=lambda c: c.d_model, positional=False)
''', parameters=-N * (3 * D * D + 4 * D),
         flops=-N * (6 * D * D + 4 * D * SEEN)),
    Part('block wiring', 'block', 'deep_norm', '''
class DeepNorm(Block):
  """n(a x + A(x)); n(a x + F(x)), a = (2 N)^(1/4) (Wang et al. 2022)."""
  FINAL_NORM = False  # x is normalised already

  @nn.compact
  def __call__(self, x_BLD, ctx, cache):
    a = (2 * self.config.num_layers) ** 0.25
    y_BLD, cache = self.attention()(x_BLD, ctx, cache)
    x_BLD = self.norm('attention_norm')(a * x_BLD + self.drop(y_BLD, ctx))
    y_BLD, aux = self.ffn()(x_BLD, ctx)
    x_BLD = self.norm('ffn_norm')(a * x_BLD + self.drop(y_BLD, ctx))
    return residual(x_BLD), cache, aux


BLOCKS['deep_norm'] = DeepNorm
''', parameters=-2 * D),
    Part('router', 'moe.router', 'softplus', '''
def softplus(m, x):
  """The best by logit, weighed by softplus(logit)."""
  scores_TE = jax.nn.softplus(x.logits_TE)
  expert_TX = _best(scores_TE, m.top_k)
  return _routing(expert_TX, normalize(_chosen(scores_TE, expert_TX)),
                  scores_TE / scores_TE.sum(-1, keepdims=True), x.valid_T)


ROUTERS['softplus'] = Router(softplus, whole=True)
''', MOE, parameters=N * (D * E + (E - 1) * (2 * D * F + F + D)),
         flops=N * (2 * D * E + 2 * 2 * D * F)),
    Part('balance loss', 'moe.balance_loss', 'variance', '''
BALANCE_LOSSES['variance'] = Balance(
    lambda expert_A, mean_probs_E: mean_probs_E.var(), 'variance_loss',
    ('moe.balance_weight',))
''', MOE, parameters=N * (D * E + (E - 1) * (2 * D * F + F + D)),
         flops=N * (2 * D * E + 2 * 2 * D * F)),
)


def only(*names):
  """Runs a test of more of the house for these; others are `long`."""
  return pytest.mark.parametrize('part', [
      pytest.param(part, id=part.name, marks=[pytest.mark.long] * (
          part.name not in names)) for part in PARTS],
      indirect=True, scope='module')


@pytest.fixture(params=PARTS, ids=lambda part: part.name, scope='module')
def part(request):
  """Each part in turn, in the table of its file."""
  with adding.entry(request.param.what, request.param.source) as name:
    assert name == request.param.name
    yield request.param


def changes(part: Part, name: str = '') -> dict[str, Any]:
  """The fields of config.model with the part, or another `name` there."""
  fields = {key: dict(value) if isinstance(value, dict) else value
            for key, value in (SMALL | part.changes).items()}
  group, _, field = part.field.rpartition('.')
  (fields[group] if group else fields)[field] = name or part.name
  return fields


def config(part: Part):
  """A run's config with the part."""
  c = step_test.config(data__length=L)
  c.model = models.config('gpt', **changes(part))
  return c


def test_it_is_among_the_choices_and_meant_by_a_slip(part):
  slip = f'{part.name}x'
  with pytest.raises(RequestError, match=f"model.{part.field} '{slip}'.*"
                     f"{part.name}.*mean '{part.name}'"):
    architectures.build(models.config('gpt', **changes(part, slip)))


def test_it_is_counted(part):
  """Against the base, whose figures are known elsewhere, by hand."""
  figures = [totals.count(c, L) for c in (
      config(part), config(part._replace(field='norm', name='layernorm',
                                         changes={})))]
  added, plain = (f['parameters'] for f in figures)
  assert added - plain == part.parameters
  added, plain = (flops.forward_flops_per_token(f, L) for f in (
      models.config('gpt', **changes(part)), models.config('gpt', **SMALL)))
  assert added - plain == pytest.approx(part.flops)


@pytest.mark.slow
@only('reglu2', 'chunked', 'kerple')
def test_laws(part):
  """Causality, scan = loop, decode = forward; and causality by gradient."""
  module = architectures.build(models.config(
      'gpt', **changes(part) | dict(max_len=product_test.LENGTH)))
  params = product_test.drawn(module)
  product_test.check_laws_of(module, params)
  tokens_1L = jnp.arange(8)[None]  # each has a row of its own

  def at_4(table_VD):
    p = params | {'embed': params['embed'] | {'tokens': table_VD}}
    return (module.apply({'params': p}, tokens_1L).hidden[0, 4] ** 2).sum()
  reached = jnp.abs(
      jax.jit(jax.grad(at_4))(params['embed']['tokens'])).sum(-1)
  assert not reached[5:8].any() and reached[4] > 0


@pytest.mark.slow
@only()
def test_a_step_on_eight_devices_is_the_step_on_one(part):
  c = config(part)
  mesh = dict(data=2, expert=2, tensor=2) if 'moe' in part.changes else (
      dict(data=2, fsdp=2, tensor=2))
  c.mesh.update(mesh)
  _, state, metrics = step_test.train(c, steps=1)
  _, alone, other = step_test.train(c, step_test.one_device(), steps=1)
  models.close(alone.params, state.params, rtol=1e-4)
  assert metrics[0]['loss'] == pytest.approx(other[0]['loss'], rel=1e-4)
  assert jax.device_count() == 8


@only('variance', 'chunked', 'kerple')
def test_its_memory_is_planned_without_a_compiler(part):
  c = config(part)
  c.model.vocab_size = 0  # of the tokenizer
  one, two = (cost.bytes_per_device(c, n) for n in (1, 2))
  assert one['parameters'] == 4 * totals.count(c, L)['parameters']
  assert one['peak'] > two['peak'] > one['parameters']


@only()
def test_a_sweep_gives_it_the_flops_of_the_base(part, tmp_path):
  fields = run_config.flatten_dict({'model': dict(part.changes)})
  fields |= {f'model.{part.field}': part.name}
  width = 'model.moe.d_ff' if fields.pop('model.moe.d_ff', 0) else 'model.d_ff'
  parser = argparse.ArgumentParser()
  check.add_file_arguments(parser)
  description = check.describe(parser.parse_args([
      sweeps.write(tmp_path, f"  add('added', **{fields!r})\n"),
      '--match=flops_per_token', f'--match_field={width}']))
  points = {point['name']: point for point in description['points']}
  added = points.pop('added')
  [base] = points.values()
  assert added['flops_per_token'] == pytest.approx(
      base['flops_per_token'], rel=cost.TOLERANCE)
  assert added['matched'] == ([width] if part.flops else [])


OPTIMISER = '''
def _signs(optim, roles):
  """signSGD (Bernstein et al. 2018)."""
  del optim, roles
  return optax.stateless(lambda updates, params: jax.tree.map(
      jnp.sign, updates))


OPTIMIZERS['signs'] = Optimizer(_signs)
'''


@pytest.mark.slow
def test_an_optimiser_is_added_to_one_file():
  with adding.entry('optimiser', OPTIMISER) as name:
    c = step_test.config(optim__name=name, optim__lr=0.5,
                         optim__weight_decay=0.0, optim__schedule='constant')
    run, state, [metrics] = step_test.train(
        c, step_test.one_device(), steps=1)
    start = jax.device_get(run.new_state().params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b), start, state.params)
    assert np.median(moved['embed']['tokens'][:models.VOCAB]) == (
        pytest.approx(0.5, rel=1e-5))
    assert np.isfinite(metrics['loss'])
    with pytest.raises(RequestError, match="mean 'signs'"):
      step_test.train(step_test.config(optim__name='sign'), steps=1)
    c.optim.b1 = 0.5
    with pytest.raises(RequestError, match='read by adamw, lion, muon'):
      step_test.train(c, step_test.one_device(), steps=1)


KERNEL = '''
def plain(q_BLHK, k_BMHK, v_BMHK, mask, seen_BLM, *, scale, softcap, sink_H):
  """The definition: all scores are written out."""
  s_BHLM = jnp.einsum('BLHK,BMHK->BHLM', q_BLHK * scale, k_BMHK)
  s_BHLM = jnp.where(seen_BLM[:, None], s_BHLM, -jnp.inf)
  return jnp.einsum('BHLM,BMHK->BLHK', jax.nn.softmax(s_BHLM), v_BMHK)


def _refuse_plain(c, mask, queries, keys):
  if c.num_kv_heads != c.num_heads:
    return 'which takes as many keys as queries'
  return ''


KERNELS['plain'] = Kernel('cpu', _refuse_plain, plain)
'''


@pytest.mark.long
def test_an_attention_kernel_is_added_to_one_file():
  tokens = models.tokens()
  module, params = models.make(attention_kernel='xla')
  expected = models.logits(module, params, tokens)
  with adding.entry('attention kernel', KERNEL) as name:
    module, _ = models.make(attention_kernel=name)
    models.close(expected, models.logits(module, params, tokens))
    grouped, params = models.make(attention_kernel=name, num_kv_heads=2)
    with pytest.raises(RequestError, match='is plain, which takes as many .*'
                       'choose from auto, xla, splash, cudnn'):
      models.logits(grouped, params, tokens)
    auto, params = models.make(num_kv_heads=2)  # takes another where it must
    assert np.isfinite(models.logits(auto, params, tokens)).all()


SCHEDULE = '''
SCHEDULES['steps'] = Schedule(
    lambda t, steps, optim: optim.final_fraction ** (t // (steps / 2)),
    ('final_fraction',))
'''


def test_a_schedule_is_added_to_one_file():
  optim = step_test.config(optim__lr=8.0, optim__final_fraction=0.5).optim
  with adding.entry('learning-rate schedule', SCHEDULE) as name:
    optim.schedule = name
    rates = [float(schedules.rate(optim, 8)(t)) for t in range(8)]
    assert rates == [8, 8, 8, 4, 4, 4, 4, 2]  # of t + 1
    optim.decay_fraction = 0.3
    with pytest.raises(RequestError, match='read by wsd'):
      schedules.check_schedule(optim)
