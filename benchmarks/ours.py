"""This project's side of a comparison: the step of train.py, its generation
and its loop, on random tokens."""

import contextlib
import io
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import rival
from training import generate
from training import loop
from training import objectives
from training import runs
from training.data import pipeline
from training.data import tokenizers
from training.distributed import cpu
from training.workdir import run_config


class Trainer:
  """A run's state, its compiled step and one batch."""

  def __init__(self, tree):
    self.config = objectives.with_labels(run_config.from_json(tree))
    ids = rival.tokenizer(self.config)
    model, _ = runs.resolve(self.config, ids)
    self.run = runs.build(self.config, model)
    self.batch = self.run.put(rival.batch(self.config, ids))

  def create(self, options=None):
    """Makes the state and compiles the step; returns the seconds of tracing
    and of compiling, for which XLA has options of its own."""
    run = self.run
    with run.context():
      self.state = run.new_state()
      cpu.trim()
      start = time.perf_counter()
      lowered = run.train_step().lower(self.state, self.batch)
      traced = time.perf_counter()
      self.compiled = lowered.compile(
          compiler_options=dict(options) if options else None)
      compiled = time.perf_counter()
    cpu.trim()
    return traced - start, compiled - traced

  def step(self) -> float:
    return float(self.dispatch()['loss'])

  def dispatch(self):
    """Starts a step; returns its figures, which need not be there yet."""
    self.state, metrics = self.compiled(self.state, self.batch)
    return metrics

  def steps(self, count: int) -> int:
    """Takes `count` steps, of which only the last is waited for; returns the
    most bytes that a GPU has held, 0 on a CPU."""
    for _ in range(count):
      metrics = self.dispatch()
    float(metrics['loss'])
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get('peak_bytes_in_use', 0)

  def generate(self, prompt: int, new: int) -> None:
    """Continues the batch's first `prompt` tokens greedily by `new`."""
    prompts_BL = self.batch['tokens'][:, :prompt]
    with self.run.context():
      jax.block_until_ready(generate.generate(
          self.run.module, self.state.params, prompts_BL,
          jnp.full(prompts_BL.shape[:1], prompt), jax.random.key(0),
          max_new_tokens=new, sampling=generate.Sampling(temperature=0)))

  def loop(self, count: int) -> list[float]:
    """Returns the seconds of a step of training/loop.py, and those of CPU time:
    of `count` steps, without the first, which waits for the compiler, and
    without a save or evaluation."""
    config = self.config.copy_and_resolve_references().unlock()
    config.train.steps = count
    config.eval.every_steps = 0
    run = runs.build(config, self.run.model, self.run.mesh)
    tokenizer = tokenizers.load(config.data.tokenizer)
    batches = _Batches(pipeline.training_loader(config, tokenizer))
    held_out, saves = pipeline.held_out(config, tokenizer), _NoSaves()
    with run.context():
      state = run.new_state()
    with tempfile.TemporaryDirectory() as folder:
      with contextlib.redirect_stdout(io.StringIO()):
        loop.train(run, state, 0, batches, held_out, saves,
                   pathlib.Path(folder))
    # A batch is fetched once its predecessor's step has been dispatched.
    return [(end - start) / (count - 2)
            for start, end in zip(batches.times[2], saves.called)]


class _Batches:
  """Those of a loader; notes when each was asked for."""

  def __init__(self, loader):
    self._loader, self.times = loader, []

  def __getattr__(self, name):
    return getattr(self._loader, name)

  def iterate(self, start, stop):
    batches = self._loader.iterate(start, stop)
    for _ in range(start, stop):
      self.times.append(_now())
      yield next(batches)


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


class _NoSaves:
  """Checkpoints that are never due; notes when the last step was done."""
  called, best, newest = (), None, None

  def due(self, step):
    return False

  def save(self, step, state, **kwargs):
    jax.block_until_ready(state)
    self.called = _now()

  def wait(self):
    pass


def jobs(request):
  """Returns what a worker can be asked to do, by name."""
  cpu.prepare()
  trainer = Trainer(request['config'])
  if request['kind'] == 'compile':
    return {'compile': trainer.create}
  trainer.create(request.get('compiler'))
  trainer.step()
  prompt, new = request['prompt'], request['new']
  return {'step': trainer.step,
          'steps': lambda: trainer.steps(request['count']),
          'loop': lambda: trainer.loop(request['count']),
          'generate': lambda: trainer.generate(prompt, new)}
