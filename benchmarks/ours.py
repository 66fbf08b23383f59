"""This project's side of a comparison: the step of train.py and its generation,
on random tokens."""

import jax
import jax.numpy as jnp

from benchmarks import rival
from training import generate, objectives, runs
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
    """Makes the state and compiles the step, for which XLA has options of its
    own."""
    with self.run.context():
      self.state = self.run.new_state()
      cpu.trim()
      self.compiled = self.run.train_step().lower(
          self.state, self.batch).compile(compiler_options=options)
    cpu.trim()

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


def jobs(request):
  """Returns what a worker can be asked to do, by name."""
  cpu.prepare()
  trainer = Trainer(request['config'])
  trainer.create(request.get('compiler'))
  trainer.step()
  prompt, new = request['prompt'], request['new']
  return {'step': trainer.step,
          'steps': lambda: trainer.steps(request['count']),
          'generate': lambda: trainer.generate(prompt, new)}
