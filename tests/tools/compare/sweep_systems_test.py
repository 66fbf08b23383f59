"""Points of a sweep that are other systems, or are called so alone."""

import json
import pathlib
import re

import pytest

from configs.errors import RequestError
from tests.helpers import sweeps
from tools.compare import check, layout, spec, systems

PAGE = pathlib.Path('docs/tutorials/compare.md')


def described(folder, points, workdir=''):
  return check.describe(sweeps.arguments(
      sweeps.write(folder, points), '--workdir=unused'), str(workdir))


@pytest.mark.parametrize('points, one, other, arch', [
    ("  add('neox', **{'model.arch': 'gpt_neox'})\n", 'base', 'neox',
     'gpt_neox'),
    # Of another point, and a field that says what follows without it.
    ("  add('rms', **{'model.norm': 'rmsnorm'})\n"
     "  add('ours', **{'model.norm': 'rmsnorm', 'model.arch': 'llama',\n"
     "                 'model.d_ff': 128})\n", 'rms', 'ours', 'llama')])
def test_a_point_of_another_name_alone_is_refused(
    points, one, other, arch, tmp_path):
  with pytest.raises(RequestError, match=re.escape(
      f"points {one!r} and {other!r} differ in model.arch alone, 'gpt' and "
      f'{arch!r}') + f".* write add.system\\('{arch}'\\)"):
    described(tmp_path, points)


@pytest.mark.slow
def test_a_sweep_that_has_such_a_point_goes_on(tmp_path):
  points = "  add('neox', **{'model.arch': 'gpt_neox'})\n"
  workdir = tmp_path / 'run'
  told = described(tmp_path, points.replace("_neox'", "_neox', 'model.norm': "
                                            "'rmsnorm'"))
  told['points'][1]['changes'].pop('model.norm')  # as earlier versions let it
  workdir.mkdir()
  layout.save_description(workdir, told)
  assert len(described(tmp_path, points, workdir)['points']) == 2


def test_a_point_of_other_parts_or_training_is_not_refused(tmp_path):
  described(tmp_path, "  add('neox', **{'model.arch': 'gpt_neox', "
            "'model.block': 'parallel'})\n  add('lr', **{'optim.lr': 1e-3, "
            "'model.arch': 'gpt_neox'})\n")


def test_encoders_whose_pages_differ_are_not_the_same():
  from configs import bert
  one = bert.get_config('tiny')
  other = one.copy_and_resolve_references()
  other.model.arch = 'roberta'  # which has two separators between texts
  assert not systems._same(one, other) and systems._same(one, one)


def test_a_system_is_a_point_with_all_of_its_parts(tmp_path):
  told = described(tmp_path, "  add.system('llama')\n  add.system('llama', "
                   "name='tied', **{'model.tie_embeddings': True})\n")
  by_name = {point['name']: point for point in told['points']}
  parts = {'model.arch': 'llama', 'model.position': 'rope',
           'model.norm': 'rmsnorm', 'model.ffn': 'swiglu',
           'model.attention_bias': False, 'model.ffn_bias': False,
           'model.tie_embeddings': False}
  assert by_name['llama']['changes'] == parts
  assert by_name['tied']['changes'] == parts | {'model.tie_embeddings': True}
  assert 'not as published' not in check.table(told)


def test_check_says_where_a_point_is_not_the_system_that_it_names(tmp_path):
  told = described(tmp_path, "  add.system('llama', "
                   "**{'model.norm': 'layernorm'})\n")
  assert ('llama: not as published: llama with norm=layernorm in place of '
          'rmsnorm') in check.table(told)


def test_a_system_that_cannot_be_is_refused_by_the_point(tmp_path):
  with pytest.raises(RequestError, match="mini.py: point 't5': model.arch 't5' "
                     'stacks an encoder-decoder'):
    spec.read_sweep_file(sweeps.write(tmp_path, "  add.system('t5')\n"))


@pytest.mark.slow
@pytest.mark.parametrize('what', ['params', 'flops_per_token'])
def test_the_tutorials_two_systems_are_as_it_says(what, tmp_path):
  text = PAGE.read_text()
  file = tmp_path / 'two_systems.py'
  file.write_text(re.search(
      r'`two_systems.py`:\n\n```python\n(.*?)```', text, re.S)[1])
  told = check.describe(sweeps.arguments(
      str(file), '--workdir=unused', f'--match={what}'))
  gpt, llama = told['points']
  assert llama[what] == pytest.approx(gpt[what], rel=0.01)
  assert f'`model.d_ff={llama["changes"]["model.d_ff"]}`' in text
  if what == 'flops_per_token':  # which the page shows
    shown = check.table(told).splitlines()
    assert '\n'.join(shown[:-1]) in text
  assert json.dumps(told)
