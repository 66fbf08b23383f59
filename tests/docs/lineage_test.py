"""The lineage in docs/architectures.md is what the configs say: which fields of
config.model differ between a system and the one that it comes from.

  python -m tests.docs.lineage_test [NAME:SIZE PARENT:SIZE]

prints its rows as they should be, or a new one."""

import dataclasses
import itertools
import re
import sys

import pytest

import architectures
from architectures.parts import unread
from tests.docs import architectures_doc_test as doc
from training.hf import config as hf_config
from training.workdir import run_config

TITLES = ['size', 'from', 'year', 'what it changed', 'in the config']
# Sizes, what follows from them, and what only trains.
SIZES = re.compile('|'.join((
    'arch', 'd_model', 'num_layers', 'num_decoder_layers', 'num_heads',
    'head_dim', 'd_ff', 'vocab_size', 'max_len', 'norm_eps', 'attention_scale',
    r'latent\..*_(rank|dim)', 'latent.scale', r'(deltanet|kda)\..*_(heads|dim)',
    r'(gla|retnet)\.(heads|.*_dim)', r'(kda|gla)\.rank',
    r'mamba2\.(heads|head_dim|groups|state)',
    r'rope\.(original_len|factor)',
    r'relative\..*', r'moe\.(num_experts|d_ff|top_k|shared_experts|top_groups'
    r'|expert_groups|gate_scale)', 'kinds', 'sliding_window',
    hf_config.RUN_ONLY.pattern)))
# Of a part that only one of two has, its choice says it all.
OF_A_PART = re.compile(r'(moe|rope|latent|deltanet|mamba2|kda|gla|retnet|clamp'
                       r'|relative)\..*'
                       '|learned_stretch|sinusoid|position_offset|qk_norm_over'
                       '|attention_out_bias')


def lineage():
  """Yields the cells of each row."""
  titles = []
  for line in doc.DOC.read_text().splitlines():
    cells = [c.strip() for c in line.strip('| ').split('|')]
    if not line.startswith('|'):
      titles = []
    elif not titles:
      titles = cells
    elif titles == TITLES and not set(line) <= set('|- '):
      yield cells


def parts(name) -> dict:
  """Returns what a model is made of, by field; None: it does not read it."""
  c = doc.model(name)
  skipped = unread.unread(c)
  found = {field: None if field in skipped else value
           for field, value in run_config.flatten_dict(
               dataclasses.asdict(c)).items()
           if not SIZES.fullmatch(field) and not field.startswith('kinds.')}
  return found | dict(
      stack=architectures.stack(c),
      num_kv_heads='all' if c.num_kv_heads == c.num_heads else 'fewer',
      embed_scale=_scale(c.embed_scale, c), logits_scale=_scale(
          c.logits_scale, c))


def _scale(value, c) -> str:
  """Returns a factor in words: those of the width grow with it."""
  words = {c.d_model ** 0.5: '√width', c.d_model ** -0.5: '1/√width'}
  return next((word for x, word in words.items() if abs(value / x - 1) < 1e-6),
              f'{value:g}')


def changed(name, parent) -> str:
  """Returns the last cell of a row."""
  ours, theirs = parts(name), parts(parent)
  fields = [field for field, value in ours.items()
            if value != theirs[field] and not (
                OF_A_PART.fullmatch(field)
                and None in (value, theirs[field]))]
  return ', '.join(f'{field}={_short(ours[field])}' for field in fields
                   if ours[field] is not None) or '—'


def _short(value) -> str:
  if isinstance(value, str) and ',' in value:  # a pattern, of several layers
    runs = [(name, len(list(group)))
            for name, group in itertools.groupby(value.split(','))]
    return re.sub(  # of several runs that repeat
        r'(?<!\S)((?:\S+ )+?\S+)((?: \1)+)(?!\S)',
        lambda m: f'({m[1]})×{1 + m[2].count(m[1])}',
        ' '.join(f'{name}×{n}' if n > 1 else name for name, n in runs))
  if type(value) is float:
    return f'{value:,.0f}' if value >= 1000 else f'{value:g}'
  return str(value) or '—'


def _name(cell) -> str:
  return cell.partition(' (')[0].strip('`')


def test_the_last_column_is_what_the_configs_say():
  wrong = [doc.line([*cells[:-1], expected]) for cells in lineage()
           if cells[1] != '—' and cells[-1] != (
               expected := changed(_name(cells[0]), _name(cells[1])))]
  assert not wrong, '\n'.join(['the rows should be', *wrong])


def test_every_system_has_a_row_and_comes_from_one_above():
  seen, systems = set(), set()
  for name, parent, year, words, _ in lineage():
    assert not seen or _name(parent) in seen, name
    assert re.fullmatch(r'20\d\d', year) and len(words) > 10, name
    seen.add(_name(name))
    systems.add(doc.system_of(_name(name)))
  assert not systems - set(architectures.files())
  lacking = [doc.largest(x) for x in architectures.files() if x not in systems]
  assert not lacking, (
      f'{doc.DOC.name} has no row for {", ".join(lacking)} under "Lineage": '
      'python -m tests.docs.lineage_test NAME:SIZE PARENT:SIZE prints one')


def test_a_changed_field_would_be_seen(monkeypatch):
  cells = next(cells for cells in lineage() if cells[0] == '`roberta:base`')
  assert 'next_sentence=False' in cells[-1]
  real = doc.model
  other = dataclasses.replace(real('roberta:base'), norm='rmsnorm')
  monkeypatch.setattr(doc, 'model', lambda name: (
      other if name == 'roberta:base' else real(name)))
  with pytest.raises(AssertionError):
    test_the_last_column_is_what_the_configs_say()


if __name__ == '__main__':
  new = [[f'`{sys.argv[1]}`', f'`{sys.argv[2]}`', 'YEAR', 'WHAT IT CHANGED', '']
         ] if sys.argv[1:] else []
  for row in new or lineage():
    if row[1] != '—':
      row[-1] = changed(_name(row[0]), _name(row[1]))
    print(doc.line(row))
