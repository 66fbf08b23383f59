"""The tables of docs/architectures.md are what the configs say.

A row that begins with `system:size` is checked cell by cell, by the column's
title.

  python -m tests.docs.architectures_doc_test [NAME:SIZE ...]

prints the rows of these models as they should be, or all rows; of a model that
has none, one of the components."""

import functools
import importlib
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import architectures
from training import paths
from training.costs import totals

DOC = pathlib.Path(__file__).parents[2] / 'docs/architectures.md'


@functools.cache
def config(name):
  system, size = name.split(':')
  return importlib.import_module(f'configs.{system}').get_config(size)


@functools.cache
def model(name) -> architectures.ModelConfig:
  return totals.resolved(config(name))


@functools.cache
def figures(name):
  return totals.count(config(name))


def billions(n) -> str:
  return f'{n / 1e6:,.1f}M' if n < 1e9 else f'{n / 1e9:,.1f}B'


def stacks(name) -> str:
  return architectures.stack(model(name))


def experts(name) -> str:
  m = model(name)
  return f'{m.moe.num_experts}, top {m.moe.top_k}' if m.ffn == 'moe' else '—'


def ffn(name) -> str:
  m = model(name)
  return m.moe.ffn if m.ffn == 'moe' else m.ffn


def encoding(name) -> str:
  m = model(name)
  part = '' if m.rope.fraction == 1 else f', {m.rope.fraction:g} of a head'
  return m.position + (part if m.position == 'rope' else '')


def kinds(name) -> str:
  return '; '.join(
      f'{kind}: ' + (', '.join(f'{k}={v}' for k, v in fields.items()) or '—')
      for kind in model(name).kinds_used
      for fields in [model(name).kinds[kind]])


COLUMNS = {
    'prefix': lambda n: model(n).prefix or '—',
    'pattern': lambda n: model(n).pattern or '—',
    'suffix': lambda n: model(n).suffix or '—',
    'kinds': kinds,
    'layers': lambda n: str(model(n).num_layers),
    'width': lambda n: f'{model(n).d_model:,}',
    'heads': lambda n: str(model(n).num_heads),
    'key heads': lambda n: str(model(n).num_kv_heads),
    'd_ff': lambda n: f'{model(n).d_ff:,}',
    'd_ff / width': lambda n: '—' if model(n).ffn == 'none' else (
        f'{model(n).d_ff / model(n).d_model:.3g}'),
    'context': lambda n: f'{model(n).max_len:,}',
    'vocabulary': lambda n: f'{model(n).vocab_size:,}',
    'stacks': stacks,
    'wiring': lambda n: model(n).block,
    'norm': lambda n: model(n).norm,
    'positions': encoding,
    'ffn': ffn,
    'experts': experts,
    'parameters': lambda n: f'{figures(n)["parameters"]:,}',
    'total': lambda n: billions(figures(n)['parameters']),
    'active': lambda n: billions(figures(n)['active_parameters']),
    'active share': lambda n: (
        f'{figures(n)["active_parameters"] / figures(n)["parameters"]:.1%}'),
    'prefill GFLOPs a token': lambda n: (
        f'{figures(n)["flops_per_token"]["prefill"] / 1e9:,.1f}'),
    'cache KiB a token': lambda n: (
        f'{figures(n)["kv_cache_bytes_per_token"] / 1024:,.0f}'),
    'state MiB a row': lambda n: (
        f'{figures(n)["state_bytes_per_row"] / 2**20:,.0f}'),
}


def rows():
  """Yields (name, titles, cells) of each row that a config answers for."""
  titles = []
  for line in DOC.read_text().splitlines():
    cells = [c.strip() for c in line.strip('| ').split('|')]
    if not line.startswith('|'):
      titles = []
    elif not titles:
      titles = cells
    elif 'from' in titles:
      continue  # the lineage: tests/docs/lineage_test.py
    elif found := re.fullmatch(r'`(\w+:[\w.-]+)`(?: \(rumoured\))?', cells[0]):
      yield found[1], titles, cells


def expected(name, titles):
  note = ' (rumoured)' if name.startswith('gpt4:rumoured') else ''
  return [f'`{name}`{note}'] + [COLUMNS[t](name) for t in titles[1:]]


def line(cells) -> str:
  return '| ' + ' | '.join(cells) + ' |'


def lines(*names):
  """Yields the rows of these models, or all, as they should be."""
  found = [row for row in rows() if not names or row[0] in names]
  components = next(titles for _, titles, _ in rows() if 'wiring' in titles)
  new = [name for name in names if name not in {row[0] for row in found}]
  for name, titles in [row[:2] for row in found] + [
      (name, components) for name in new]:
    yield line(expected(name, titles))


def largest(system) -> str:
  """Returns the last size of a system, for a row that it lacks."""
  sizes = importlib.import_module(f'configs.{system}').SIZES
  return f'{system}:{list(sizes)[-1]}'


def system_of(name) -> str:
  return name.split(':')[0]


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    pytest.param(system, marks=[pytest.mark.long] * (
        system in ('gpt4', 'gshard', 'switch', 't5', 'gpt')))
    for system in sorted({system_of(n) for n, *_ in rows()})])
def test_rows_of_a_system(system):
  for name, titles, cells in rows():
    if system_of(name) == system:
      wanted = expected(name, titles)
      assert cells == wanted, f'the row should be\n{line(wanted)}'


def test_every_system_stands_in_a_table():
  stands, systems = {system_of(n) for n, *_ in rows()}, architectures.files()
  assert not stands - set(systems)
  lacking = [largest(system) for system in systems if system not in stands]
  assert not lacking, 'write, among "The components" of {}, {}'.format(
      DOC.name, ''.join('\n' + row for row in lines(*lacking)))


def test_readme_names_every_system():
  text = (DOC.parents[1] / 'README.md').read_text()
  _, _, table = text.partition('| config | system | sizes |\n')
  named = re.findall(r'^\| (\w+) \|', table.partition('\n\n')[0], re.M)
  assert sorted(named) == sorted(architectures.files())


def test_a_row_that_is_wrong_or_missing_is_printed_as_it_should_be(
    monkeypatch, tmp_path):
  text = DOC.read_text()
  name, titles, cells = next(row for row in rows() if 'wiring' in row[1])
  row, system = line(cells), system_of(name)
  page = tmp_path / DOC.name
  monkeypatch.setattr(sys.modules[__name__], 'DOC', page)
  page.write_text(text.replace(row, line([*cells[:-1], 'wrong'])))
  with pytest.raises(AssertionError) as caught:
    test_rows_of_a_system(system)
  assert row in str(caught.value)
  page.write_text('\n'.join(x for x in text.splitlines()
                            if not x.startswith(f'| `{system}:')))
  assert list(lines(name)) == [row]
  with pytest.raises(AssertionError) as caught:
    test_every_system_stands_in_a_table()
  assert line(expected(largest(system), titles)) in str(caught.value)


def test_bert_without_what_pre_training_adds():
  for size, encoder in (('base', 109_482_240), ('large', 335_141_888)):
    module = architectures.build(model(f'bert:{size}'))
    shapes = nn.meta.unbox(jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 8), int))['params'])
    assert encoder == sum(
        x.size for path, x in paths.flatten(shapes).items()
        if not path.startswith(('transform', 'nsp', 'head')))


def test_d_ff_is_four_times_the_width_in_some_systems():
  ratio = lambda name: model(name).d_ff / model(name).d_model
  four = {'transformer:base', 'bert:large', 'gpt:gpt3-175b', 'gpt_neox:20b',
          'bloom:176b', 't5:base', 'switch:base-128'}
  assert {ratio(name) for name in four} == {4}
  assert (ratio('gshard:600b'), ratio('t5:11b')) == (8, 64)
  # Three matrices of 8/3 weigh what two of 4 do; LLaMA rounds up to 256s.
  for name in ('llama:7b', 'llama:13b', 'llama:33b', 'llama:65b'):
    width = 8 * model(name).d_model // 3
    assert model(name).d_ff == -(-width // 256) * 256


def test_tests_named_are_there():
  files = sorted(DOC.parents[1].glob('tests/**/*.py'))
  source = ''.join(f.read_text() for f in files)
  named = re.findall(r'`(test_\w+)`', DOC.read_text())
  assert len(named) > 20
  assert not [t for t in named if f'def {t}(' not in source]


if __name__ == '__main__':
  for ready in lines(*sys.argv[1:]):
    print(ready, flush=True)
