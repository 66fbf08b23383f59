"""This project's side of a comparison: train.py's step, and generation."""

import jax
import jax.numpy as jnp

from benchmarks import rival
from training import generate, objectives, runs
from training.distributed import cpu
from training.objectives import pipeline
from training.workdir import run_config


class Trainer:
  """A run's state, its compiled step and one batch."""

  def __init__(self, request):
    """Builds the run of a request's config, and compiles its training step.

    Args:
      request: `config`, the config of the run, as JSON has it.
    """
    # Build the run, and load its first batch.
    cpu.configure_cpu()
    config = run_config.config_from_json(request['config'])
    config = objectives.fill_in_labels(config)
    tokenizer = rival.load_tokenizer(config)
    model, _ = runs.resolve_model(config, tokenizer)
    self.run = runs.build(config, model)
    self.batch = self.run.put(
        pipeline.make_training_loader(config, tokenizer).batch(0))

    # Initialise the state and compile the step. The memory that both have freed
    # is given back to the system, so that the peak is that of training.
    with self.run.context():
      self.state = self.run.new_state()
      cpu.release_free_memory()
      self.compiled = self.run.train_step().lower(
          self.state, self.batch).compile()
    cpu.release_free_memory()

  def step(self) -> float:
    """Takes a training step, and returns its loss."""
    self.state, metrics = self.compiled(self.state, self.batch)
    return float(metrics['loss'])

  def generate(self, prompt: int, new: int) -> None:
    """Continues the batch's first `prompt` tokens greedily by `new`."""
    prompts_BL = self.batch['tokens'][:, :prompt]
    with self.run.context():
      jax.block_until_ready(generate.generate(
          self.run.module, self.state.params, prompts_BL,
          jnp.full(prompts_BL.shape[:1], prompt), jax.random.key(0),
          max_new_tokens=new, sampling=generate.Sampling(temperature=0)))
