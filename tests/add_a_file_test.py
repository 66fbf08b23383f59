"""A new objective or evaluation task is one file: what lists or reads them
finds it, with no other edit."""

import json

import numpy as np
import pytest

from tests.helpers import adding

FILES = {
    'training/objectives/fim.py': '''
"""Fill in the middle (Bavarian et al. 2022): a text's beginning and its end,
each after a sentinel, then what stood between them."""

import numpy as np

from training import objectives
from training.objectives import causal


class Windows(causal.Windows):
  """Windows that leave room for three sentinels."""

  def __init__(self, corpus):
    super().__init__(corpus, corpus.config.data.length - 3)


def fim(window, rng, config, tokenizer):
  text = window.tokens[:window.size]
  first, last = np.sort(rng.integers(0, len(text) + 1, 2))
  beginning, end, middle = tokenizer.sentinel_ids[:3]
  ids = np.concatenate([[beginning], text[:first], [end], text[last:],
                        [middle], text[first:last]])
  told = np.arange(len(ids)) > len(ids) - 1 - (last - first)
  return dict(tokens=ids[:-1], targets=ids[1:], weights=told[1:],
              valid=np.ones(len(ids) - 1))


def arrays(config):
  row = objectives.text_arrays(config)
  return row | dict(valid=row['weights'])


OBJECTIVES = {'fim': objectives.Objective(
    ('decoder',), Windows, fim, arrays, ('tokens',), {'valid': 'valid_BL'},
    ('valid',), prompt=objectives.after_separator)}
''',
    'training/evals/tasks/among.py': '''
"""How often a target is among the likeliest tokens."""

from training.evals import Flag, Task


def run(evaluation):
  import jax

  from training import objectives
  run_, most = evaluation.run, evaluation.options.among
  objective = objectives.of(run_.config)

  def found(params, batch):
    logits_BLV = objective.apply(run_.module, params, batch).logits
    _, ids = jax.lax.top_k(logits_BLV, most)
    right = (ids == batch['targets'][..., None]).any(-1)
    return (right * batch['weights']).sum(), batch['weights'].sum()

  step = evaluation.program(found, 'among', most)
  loader, = evaluation.held_out()
  sums = [step(evaluation.params, run_.put(batch))
          for batch in loader.iterate()]
  right, count = (float(sum(one)) for one in zip(*sums))
  print(f'{right / count:.4f} of {count:,.0f} targets')
  return dict(share=right / count)


TASKS = {'among': Task(
    'the share of targets among the likeliest tokens', run, flags=(
        Flag('among', 5, 'So many of the likeliest tokens.', 1, 10_000),))}
''',
}
TEXT = 'It is a law of nature that what is sown is reaped. ' * 20
SMALL = [f'--config.{flag}' for flag in (
    'objective=fim', 'model.d_model=32', 'model.num_layers=2',
    'model.num_heads=2', 'data.length=32', 'data.batch_size=8',
    'data.holdout_every=4', 'train.steps=4', 'optim.warmup_steps=2',
    'eval.every_steps=0', 'log.every_steps=1', 'mesh.data=2', 'mesh.fsdp=4')]


@pytest.fixture(name='tree', scope='module')
def _tree(tmp_path_factory):
  return adding.copy_with(tmp_path_factory.mktemp('added') / 'tree', FILES)


@pytest.mark.long
@pytest.mark.slow
def test_an_objective_trains_and_a_task_measures_it(tree):
  for i in range(8):
    (tree / f'{i}.txt').write_text(f'Document {i}. {TEXT}')
  adding.run(tree, 'train.py', '--config', 'configs/gpt.py', '--workdir=run',
             '--config.data.source=text:*.txt', *SMALL)
  lines = (tree / 'run/metrics.jsonl').read_text().splitlines()
  losses = [row['loss'] for row in map(json.loads, lines)
            if row['split'] == 'train']
  assert len(losses) == 4 and np.isfinite(losses).all()
  result = adding.run(tree, 'eval.py', '--workdir=run', '--json=found.json',
                      '--tasks=loss,among,samples', '--among=384',  # of 384 ids
                    '--prompt=It is', '--max_new_tokens=4').stdout
  figures = json.loads((tree / 'found.json').read_text())
  assert figures['among']['share'] == 1 and 'sample 1 of 1:\nIt is' in result
  result = adding.run(tree, 'eval.py', '--workdir=run', '--tasks=exact', code=2)
  assert "objective 'fim'" in result.stderr


@pytest.mark.long
@pytest.mark.slow
def test_their_names_are_among_the_choices(tree):
  shown = ' '.join(adding.run(tree, 'eval.py', '--help').stdout.split())
  assert '--among: among: So many of the likeliest tokens. (default: 5)' in (
      shown)
  result = adding.run(tree, 'train.py', '--config', 'configs/gpt.py',
                      '--workdir=no', '--config.objective=fmi', code=2)
  assert "Did you mean 'fim'?" in result.stderr
