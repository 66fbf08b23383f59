"""Trains MiniLM here, and the Trainer on the same batches; compares each step.

  python -m benchmarks.finetune_replay --steps=30
  python -m benchmarks.finetune_replay --steps=300 --dropout=0.1 --scores

The task is wnut17 of benchmarks.finetune, with its recipe, and without dropout
unless --dropout gives its rate. Both sides begin with the same weights, the
head's included, and are shown the same rows in the same order. So what they
may differ in is the model, the loss, the clipping, AdamW and its rates, and
with dropout its draws; what is printed is by how much they do. One difference
is taken away, and --own-rates leaves it in: the Trainer has at step i the rate
that is due here at step i - 1, so that its first is 0.

--scores evaluates the weights that each side ends with, each by both sides:
their F1 of entities in percent.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import finetune, finetune_hf, finetune_ours, finetune_tasks
from configs.errors import require
from training import cli

STEPS = finetune_tasks.TASKS['wnut17'].steps


def main():
  args = _parser().parse_args()
  require(0 < args.steps <= STEPS,
          f'--steps is {args.steps}: it must be from 1 to {STEPS}')
  require(0 <= args.dropout < 1,
          f'--dropout is {args.dropout}: it must be at least 0 and below 1')
  finetune.check_packages(['ours', 'theirs'])
  require(bool(args.data), 'no folder of data sets: set $ARCHETYPE_DATA, or '
          'pass --data (docs/performance.md says which files)')
  with tempfile.TemporaryDirectory() as folder:
    first = pathlib.Path(folder) / 'first'
    request = finetune.request('wnut17', args.data, pathlib.Path(folder))
    request['seed'] = args.seed
    one = ours(request, args.steps, first, args.dropout)
    two = theirs(request, args.steps, first, one.pop('batches'),
                 args.dropout, shift=not args.own_rates)
    print(table(one, two))
    if args.scores:
      print(crossed(request, {'ours': one['last'], 'theirs': two['last']}))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.finetune_replay', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--steps', type=int, default=30,
                      help=f'how many of the {STEPS} are made')
  parser.add_argument('--data', default=os.environ.get('ARCHETYPE_DATA', ''),
                      help='the folder of the data sets; $ARCHETYPE_DATA')
  parser.add_argument('--dropout', type=float, default=0.0,
                      help='its rate at each of its places, on both sides')
  parser.add_argument('--seed', type=int, default=0,
                      help='of the order, the head and the dropout')
  parser.add_argument('--own-rates', action='store_true',
                      help="leave the Trainer's rates as they are")
  parser.add_argument('--scores', action='store_true',
                      help='evaluate the last weights of both, by both')
  return parser


def ours(request: dict, steps: int, first: pathlib.Path,
         dropout: float) -> dict:
  """Trains here; writes the weights before the first step into `first`, and
  those after the last into a folder beside it, which it returns as `last`."""
  side = finetune_ours.Side(request)
  side.build({name: dropout for name in finetune_ours.DROPOUT})
  from training import weights

  def write(folder: pathlib.Path) -> None:
    weights.to_hf(side.run.module, side.state.params, folder,
                  labels=tuple(side.run.config.data.labels))

  write(first)
  found = dict(batches=[], loss=[], norm=[], rate=[],
               last=first.with_name('ours'))
  with side.run.context():
    for batch in side.loader.iterate(0, steps):
      found['batches'].append({k: np.array(x) for k, x in batch.items()})
      side.state, figures = side.step(side.state, side.run.put(batch))
      for name, of in (('loss', 'loss'), ('norm', 'grad_norm'),
                       ('rate', 'learning_rate')):
        found[name].append(float(figures[of]))
  write(found['last'])
  return found


def rows(batches: list[dict]) -> finetune_hf.Rows:
  """Returns our batches as rows of the Trainer's data set, without padding."""
  found = finetune_hf.Rows()
  for batch in batches:
    sizes = (batch['segment_ids'] != 0).sum(1)
    labels = np.where(batch['weights'] > 0, batch['labels'], -100)
    for size, tokens, own in zip(sizes, batch['tokens'], labels):
      found.append(dict(input_ids=tokens[:size].tolist(),
                        attention_mask=[1] * int(size),
                        labels=own[:size].tolist()))
  return found


def theirs(request: dict, steps: int, first: pathlib.Path,
           batches: list[dict], dropout: float, shift: bool) -> dict:
  """Trains by the Trainer from the weights in `first`; returns what ours()
  does but the batches."""
  import torch
  import transformers
  side = finetune_hf.Side(request)
  found = dict(loss=[], norm=[], rate=[], last=first.with_name('theirs'))

  class Trainer(transformers.Trainer):
    """Keeps the figures of each step."""

    def compute_loss(self, *args, **kwargs):
      loss = super().compute_loss(*args, **kwargs)
      found['loss'].append(float(loss.detach()))
      found['rate'].append(self.optimizer.param_groups[0]['lr'])
      return loss

    def _clip_grad_norm(self, model):
      norm = super()._clip_grad_norm(model)
      found['norm'].append(float(norm))
      return norm

    def create_scheduler(self, *args, **kwargs):
      schedule = super().create_scheduler(*args, **kwargs)
      if shift:
        own = schedule.lr_lambdas[0]  # of all groups of parameters
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: own(step + 1))
        self.lr_scheduler = schedule
      return schedule

  class Stop(transformers.TrainerCallback):

    def on_step_end(self, args, state, control, **kwargs):
      control.should_training_stop = state.global_step >= steps

  seed = request['seed']
  transformers.set_seed(seed)
  model = transformers.AutoModelForTokenClassification.from_pretrained(
      first, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
      classifier_dropout=dropout)
  with contextlib.redirect_stdout(sys.stderr):
    settings = side.settings(STEPS, seed, train_sampling_strategy='sequential')
    Trainer(model, settings, train_dataset=rows(batches), callbacks=[Stop()],
            data_collator=side.data.collator()).train()
  model.save_pretrained(found['last'])
  return found


def crossed(request: dict, folders: dict[str, pathlib.Path]) -> str:
  """Returns a table of the scores of each folder's weights by each side."""
  own, other = finetune_ours.Side(request), finetune_hf.Side(request)
  lines = [f'{"weights":<10}{"by ours":>10}{"by theirs":>11}']
  for name, folder in folders.items():
    with contextlib.redirect_stdout(sys.stderr):
      scores = own.score(folder), other.score(folder)
    lines.append(f'{name:<10}{scores[0]:>10.2f}{scores[1]:>11.2f}')
  return '\n'.join(lines)


def table(one: dict, two: dict) -> str:
  """Returns a line for each ten steps."""
  lines = [f'{"steps":<10}{"loss":>10}{"differs by":>12}{"gradient":>10}'
           f'{"differs by":>12}{"rate by":>10}']
  for start in range(0, len(one['loss']), 10):
    part = slice(start, start + 10)
    apart = {name: np.abs(np.subtract(one[name][part], two[name][part])).max()
             for name in ('loss', 'norm', 'rate')}
    stop = start + len(one['loss'][part])
    lines.append(f'{f"{start + 1} to {stop}":<10}'
                 f'{np.mean(one["loss"][part]):>10.4f}{apart["loss"]:>12.1e}'
                 f'{np.mean(one["norm"][part]):>10.4f}{apart["norm"]:>12.1e}'
                 f'{apart["rate"]:>10.1e}')
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
