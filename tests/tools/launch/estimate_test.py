"""What a dry run says of memory and cost."""

import json
import re
import subprocess
import sys
import types

from configs import gpt
import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import launching
from tools.launch import estimate, gke, slurm
from tools.plan import chips
from tools.plan import topology as topologies

WORDS = ('python', 'train.py', '--config=configs/gpt.py', '--workdir=gs://b/a',
         '--config.mesh.fsdp=4', '--config.data.batch_size=32')
HERE = ['--image=i', '--topology=v5e:4x4', '--slices=2']


@pytest.mark.parametrize('words, told', [
    ([], ['32 chip-hours an hour; --hours and --price give the cost']),
    (['--hours=24'], ['32 chips x 24 hours = 768 chip-hours; --price']),
    (['--hours=1.5', '--price=2.25'],
     ['32 chips x 1.5 hours = 48 chip-hours, x 2.25 a chip-hour = 108.00'])])
def test_cost_is_chips_by_hours_by_the_price_that_is_given(words, told):
  args = launching.args_of(gke, *HERE, *words)
  gke.size(args)
  lines = estimate.text(gke.place(args), None, (), args).splitlines()
  assert lines[0] == '# 32 chips (v5e, 2 x 4x4)' and len(lines) == 2
  assert told[0] in lines[1]


@pytest.mark.parametrize('words, told', [
    (['--price=2'], '--price is 2.0: pass --hours too'),
    (['--hours=-1'], '--hours is -1.0'), (['--hours=nan'], '--hours is nan'),
    (['--hours=1', '--price=inf'], '--price is inf')])
@pytest.mark.parametrize('module, here', [(gke, HERE), (slurm, [])])
def test_a_cost_that_is_none_is_refused(module, here, words, told):
  with pytest.raises(RequestError, match=re.escape(told)):
    module.size(launching.args_of(module, *here, *words))


@pytest.mark.parametrize('words, count, devices, topology', [
    (['--topology=tpu7x:2x2x1'], 4, 8, 'tpu7x:2x2x1'),
    (['--gpu=nvidia-h100-80gb:8', '--nodes=3'], 24, 24, 'h100:1x3x8'),
    (['--gpu=nvidia-b200:3'], 3, 3, ''), (['--gpu=nvidia-l4:1'], 1, 1, '')])
def test_a_place_is_what_is_asked_for(words, count, devices, topology):
  args = launching.args_of(gke, '--image=i', *words)
  place = gke.place(args)
  assert (place.chips, place.devices, place.topology) == (
      count, devices, topology)
  assert gke.size(args)[0] == place.devices


def told_by(monkeypatch, result, config=None):
  """What a dry run says where tools.plan ends so, and its command."""
  asked = []
  monkeypatch.setattr(topologies, 'compiler', lambda _: 'libtpu 1')
  monkeypatch.setattr(subprocess, 'run', lambda words, **_: (
      asked.append(words), result)[1])
  args = launching.args_of(gke, *HERE, '--hours=2')
  config = config or gpt.get_config('tiny')
  return estimate.text(gke.place(args), config, WORDS, args), asked[0]


def test_memory_is_that_of_a_plan_where_one_can_be_made(monkeypatch):
  plan = dict(chips=32, compiler='libtpu 1', programs=[dict(
      memory=dict(peak=3 * 2 ** 30, hbm=16 * 2 ** 30),
      roofline=dict(step_seconds=1.8))])
  result = types.SimpleNamespace(returncode=0, stderr='',
                                 stdout='a line\n' + json.dumps(plan))
  config = gpt.get_config('tiny')
  config.train.steps = 10_000
  said, asked = told_by(monkeypatch, result, config)
  assert 'needs 3.0 GiB of its 16.0 GiB at its peak, by libtpu 1' in said
  # 10,000 steps of 1.8 s are 5 hours, of 32 chips.
  assert '10,000 steps take 5 hours at the least, 160 chip-hours' in said
  assert asked == [sys.executable, '-m', 'tools.plan', '--json',
                   '--topology=v5e:4x4', '--slices=2',
                   '--config=configs/gpt.py', '--config.mesh.fsdp=4',
                   '--config.data.batch_size=32']
  config.data.batch_ramp = '100:16'
  assert 'at the least' not in told_by(monkeypatch, result, config)[0]


@pytest.mark.parametrize('code, kind', [(2, RequestError),
                                        (1, EnvironmentFailure)])
def test_a_plan_that_fails_is_told(monkeypatch, code, kind):
  result = types.SimpleNamespace(returncode=code, stdout='',
                                 stderr='a\nerror: train does not fit\n')
  with pytest.raises(kind, match='^tools.plan: train does not fit$'):
    told_by(monkeypatch, result)


SMALL = dict(num_layers=2, d_model=32, num_heads=2, max_len=16)


@pytest.mark.slow
def test_without_a_compiler_memory_is_estimated(monkeypatch, capsys):
  """As `check` of a sweep does it."""
  from tools.sweep import cost
  monkeypatch.setattr(topologies, 'compiler', lambda _: '')
  config = gpt.get_config('tiny')
  config.model.update(SMALL)
  config.data.update(batch_size=32, length=16)
  args = launching.args_of(gke, '--image=i', '--gpu=nvidia-h100-80gb:8')
  said = estimate.text(gke.place(args), config, WORDS, args)
  peak = cost.bytes_per_device(config, 8)['peak'] / 2 ** 30
  about, = re.findall(r'a device needs about ([0-9.]+) GiB of its 79.1', said)
  assert float(about) == pytest.approx(peak, abs=0.05)
  assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_kernel_of_the_place_is_estimated_where_it_does_not_run(monkeypatch):
  from configs import mixtral
  from tools.sweep import cost
  monkeypatch.setattr(topologies, 'compiler', lambda _: '')
  args = launching.args_of(gke, '--image=i', '--topology=v5e:2x2')
  said = set()
  for kernels in ('auto', 'auto'), ('splash', 'megablox'):
    config = mixtral.get_config('tiny')
    config.model.update(SMALL, num_kv_heads=2, attention_kernel=kernels[0])
    config.model.moe.grouped_kernel = kernels[1]
    config.data.update(batch_size=4, length=16)
    said.add((estimate.text(gke.place(args), config, WORDS, args),
              cost.bytes_per_device(config, 4)['peak']))
  (text, _), = said
  assert 'a device needs about' in text


@pytest.mark.slow
def test_a_dry_run_ends_with_the_cost():
  result = subprocess.run(
      [sys.executable, '-m', 'tools.launch', 'gke', '--image=i', '--dry_run',
       '--gpu=nvidia-h100-80gb:8', '--noplan', '--hours=3', '--price=1.5',
       '--workdir=gs://b/a', '--config=configs/gpt.py',
       *(f'--config.model.{name}={value}' for name, value in SMALL.items()),
       '--config.data.length=16'],
      capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  *_, chip, memory, cost = result.stdout.splitlines()
  assert chip == '# 8 chips (nvidia-h100-80gb, 1 x 8)'
  assert 'by an estimate; python -m tools.plan compiles it' in memory
  assert cost == ('# 8 chips x 3 hours = 24 chip-hours, x 1.5 a chip-hour = '
                  '36.00')


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.skipif(not topologies.compiler(chips.parse('v5e:2x2')), reason=(
    "libtpu is not installed: pip install -e '.[plan]'"))
def test_a_dry_run_compiles_where_it_can():
  words = ['--topology=v5e:2x2', '--config=configs/gpt.py', '--workdir=gs://b/a',
           '--config.mesh.fsdp=4']
  result = subprocess.run(
      [sys.executable, '-m', 'tools.launch', 'gke', '--image=i', '--dry_run',
       *words], capture_output=True, text=True, timeout=600)
  assert result.returncode == 0, result.stderr
  assert re.search('a device needs 0.[0-9] GiB of its 15.8 GiB at its peak, by '
                   'libtpu', result.stdout)
  assert re.search('steps take .* hours at the least, .* chip-hours: real',
                   result.stdout)
