"""The report of a sweep whose points do tasks, in training or after it, and may
have no held-out losses."""

import json

import pytest

from tests.helpers import sweep_folder
from tests.helpers.sweep_folder import point
from tools.compare.sweep_report import curves, measures, tables, write
from training.evals import in_training


@pytest.fixture
def sweep(tmp_path):
  labels = lambda *f1: {'labels': {
      seed: {'f1': x} for seed, x in enumerate(f1)}}
  sweep_folder.write(tmp_path, [
      point('base', tasks=labels(0.5, 0.6, 0.7)),
      point('norm', {'model.norm': 'rmsnorm'}, tasks=labels(0.6, 0.8, 0.7))],
                     states={('norm', 2): ('failed', 'no luck')})
  for file in tmp_path.rglob('config.json'):
    tree = json.loads(file.read_text())
    tree['eval']['every_steps'] = 0
    file.write_text(json.dumps(tree))
  for file in tmp_path.rglob('metrics.jsonl'):
    rows = [line for line in file.read_text().splitlines()
            if '"split": "eval"' not in line]
    file.write_text('\n'.join([*rows, '']))
  return curves.load_sweep(tmp_path)


def test_runs_that_were_to_have_no_loss_are_not_called_failed(sweep, tmp_path):
  missing = [[cell.text for cell in row] for row in tables.missing(sweep).rows]
  assert missing == [['norm', '2', 'failed', 'none', 'no luck']]
  text = write.text(sweep)
  assert 'No held-out losses were asked for' in text
  assert 'has no finished run' not in text
  assert '3/3' in text and '2/3' in text


def test_parts_of_a_task_are_figures_whenever_it_was_done():
  """As lm_eval's groups have them; not its standard errors and counts."""
  tasks = {'lm_eval:mmlu': {
      'acc': 0.5, 'mmlu_law/acc': 0.25, 'mmlu_law/acc (strict)': 0.125,
      'stderr': {'acc': 0.1, 'mmlu_law/acc': 0.2}, 'examples': {'mmlu_law': 4}},
           'labels': {'f1': 0.5, 'by_label': {'a': 0.25}}}
  row = dict(step=8, split='eval')
  for task, figures in tasks.items():
    row |= in_training.numbers_of(figures, task)
  during = curves.Run(0, 'done', '', {
      'train.steps': 8, 'eval.tasks': 'lm_eval:mmlu,labels,gone'}, (row,), {})
  after = curves.Run(0, 'done', '', {}, (), tasks)
  assert measures.of_run(during) == measures.of_run(after) == {
      'lm_eval:mmlu/acc': 0.5, 'lm_eval:mmlu/mmlu_law/acc': 0.25,
      'lm_eval:mmlu/mmlu_law/acc (strict)': 0.125, 'labels/f1': 0.5}
