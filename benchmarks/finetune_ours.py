"""This project's side of benchmarks.finetune: train.py and eval.py for the
scores, and for speed the step of training on the batches of its data."""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import finetune_tasks
from configs.errors import EnvironmentFailure

DROPOUT = 'model.dropout', 'model.attention_dropout', 'model.head_dropout'
ROOT = pathlib.Path(__file__).parents[1]


def fields(request: dict) -> dict:
  """Returns what the config of a run changes in that of BERT's base."""
  task = finetune_tasks.Task(**request['task'])
  weights = request['weights']
  theirs = json.loads((pathlib.Path(weights) / 'config.json').read_text())
  return {
      'seed': request['seed'], 'objective': task.objective,
      'init_from': weights, 'data.tokenizer': weights,
      'data.source': f'{task.scheme}:{request["train"]}',
      'data.eval_source': f'{task.scheme}:{request["dev"]}',
      'data.length': task.length, 'data.batch_size': task.batch,
      'model.d_model': theirs['hidden_size'],
      'model.num_layers': theirs['num_hidden_layers'],
      'model.num_heads': theirs['num_attention_heads'],
      'model.d_ff': theirs['intermediate_size'],
      'model.dropout': theirs['hidden_dropout_prob'],
      'model.attention_dropout': theirs['attention_probs_dropout_prob'],
      'model.head_dropout': task.head_dropout,
      'model.dtype': 'float32', 'model.remat': 'none',
      'train.steps': task.steps, 'optim.lr': task.lr, 'optim.eps': 1e-8,
      'optim.warmup_steps': task.steps // 10, 'optim.clip_norm': 1.0,
      'optim.weight_decay': 0.01, 'optim.b1': 0.9, 'optim.b2': 0.999,
      'optim.schedule': 'linear', 'optim.final_fraction': 0.0,
      'optim.decay_mask': (('.*(norm|bias).*', 0), ('.*', 1)),
      'data.stride': task.stride, 'eval.every_steps': 0,
      'checkpoint.every_steps': 0}


class Side:
  """A task as this project trains it."""

  def __init__(self, request: dict):
    self.request = request
    self.task = finetune_tasks.Task(**request['task'])

  def trained(self) -> dict:
    """Returns the score of a run, and its mean training loss."""
    with tempfile.TemporaryDirectory() as folder:
      workdir = pathlib.Path(folder) / 'run'
      figures = pathlib.Path(folder) / 'figures.json'
      _run('train.py', '--config=configs/bert.py:base', f'--workdir={workdir}',
           *(f'--config.{name}={value}'
             for name, value in fields(self.request).items()))
      _run('eval.py', f'--workdir={workdir}', '--tasks=labels',
           f'--json={figures}')
      found = json.loads(figures.read_text())['labels']
      lines = map(json.loads, (workdir / 'metrics.jsonl').open())
      train = [line for line in lines if line['split'] == 'train']
    return dict(score=found[self.task.figure] * self.task.percent,
                loss=sum(line['loss'] for line in train) / len(train))

  def build(self, changes: dict | None = None) -> None:
    """Builds the run, its first state and its step; `changes` are of its
    config."""
    import ml_collections

    from configs import bert
    from training import initial_state, objectives, runs, shapes
    from training.data import pipeline, tokenizers
    from training.distributed import cpu
    cpu.prepare()  # as train.py does
    config: ml_collections.ConfigDict = bert.get_config('base')
    config.update_from_flattened_dict(
        fields(self.request) | (changes or {}))
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = objectives.with_labels(config)
    self.run = runs.build(config, runs.resolve(config, tokenizer)[0])
    self.loader = pipeline.training_loader(config, tokenizer)
    self.state = initial_state.create(self.run, config.init_from)
    with self.run.context():
      self.step = shapes.PerShape(self.run.train_step(), _quiet)
    cpu.trim()

  def score(self, folder: str | pathlib.Path) -> float:
    """Returns the score of the weights in `folder`, of transformers' form."""
    import jax

    from training import weights
    from training.data import pipeline, tokenizers
    self.build()
    config = self.run.config
    loader, = pipeline.held_out(config, tokenizers.load(config.data.tokenizer),
                                in_order=True)
    _, params = weights.from_hf(folder)
    apply = jax.jit(lambda params, batch: loader.objective.apply(
        self.run.module, params, batch).extra['scores'])
    found = []
    with self.run.context():
      for batch in loader.iterate():
        found += [*jax.device_get(apply(params, self.run.put(batch)))]
    measured = loader.objective.measure(
        loader.views[0], found[:loader.num_windows], config, None)
    return measured.figures[self.task.figure] * self.task.percent

  def warm(self) -> None:
    """Compiles a program for each shape of the batches that are timed."""
    self.build()
    self._steps()

  def _steps(self) -> None:
    import jax
    with self.run.context():
      for batch in self.loader.iterate(0, self.task.timed):
        self.state, _ = self.step(self.state, self.run.put(batch))
      jax.block_until_ready(self.state.params)

  def timed(self) -> dict:
    """Returns the steps that it makes in a second, and in one of CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    self._steps()
    return dict(steps=self.task.timed / (time.perf_counter() - start),
                cpu_steps=self.task.timed / (time.process_time() - cpu))


def _quiet(batch):
  import contextlib
  del batch
  return contextlib.nullcontext()


def _run(*words: str) -> None:
  result = subprocess.run([sys.executable, *words], cwd=ROOT,
                          capture_output=True, text=True)
  if result.returncode:
    raise EnvironmentFailure(' '.join(words) + '\n' + result.stdout[-2000:]
                             + result.stderr[-2000:])


def jobs(request: dict) -> dict:
  """Returns what a worker can be asked to do, by name."""
  side = Side(request)
  return dict(trained=side.trained, warm=side.warm, timed=side.timed)
