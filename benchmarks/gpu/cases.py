"""The models that are measured, at their sizes and at toy ones.

All numbers of a case are here, so that both sides read the same. The card's
memory decides how many layers a stack has: parameters, gradients and AdamW's
two moments take 16 bytes a parameter, and `share` of the memory is for them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

STATE_BYTES = 16  # of a parameter in float32, with its gradient and moments
# What the backward pass computes again, from the fastest to the smallest.
REMAT = ('none', 'dots', 'full')
DENSE_GOAL, EXPERTS_GOAL = 0.55, 0.40  # of the card's peak, in model FLOPs
RIVAL_GOAL = 1.0  # tokens a second, over those of torch.compile


class Case(NamedTuple):
  """A model that is trained.

  Attributes:
    title: what it is, for a reader.
    config: a file of configs/ and its size, as 'gpt:gpt2-xl'.
    model: the fields of config.model that differ from that config.
    length: tokens of a row.
    batch: rows of a step that are tried first; a batch that does not fit the
      card's memory is halved.
    share: the share of the card's memory that is for parameters, gradients and
      moments: the model has as many layers as fit; 0: all layers of the config.
    layers: the most layers that it has then; read where `share` is not 0.
    goal: the share of the peak FLOP/s that a step should reach.
    precision: of PyTorch's side: autocast, with parameters in float32 as ours
      are, or bfloat16, with parameters and moments in bfloat16.
  """
  title: str
  config: str
  model: dict[str, Any]
  length: int
  batch: int
  share: float
  layers: int
  goal: float
  precision: str


_TOY = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=0, d_ff=64,
            vocab_size=64, max_len=32, dtype='bfloat16')

CASES = {
    # nanoGPT rounds the vocabulary of 50,257 up to a multiple of 64, because
    # GPUs multiply odd sides slowly.
    'gpt2': Case('GPT-2 1.5B', 'gpt:gpt2-xl', dict(vocab_size=50304), 1024, 8,
                 0, 0, DENSE_GOAL, 'autocast'),
    'llama': Case("LLaMA-2-7B's layers", 'llama:2-7b', {}, 4096, 4, 0.6, 32,
                  DENSE_GOAL, 'autocast'),
    # transformers' product of experts takes no part in autocast, and multiplies
    # parameters in float32 as TF32: bfloat16 is its fast way.
    'mixtral': Case("Mixtral-8x7B's layers", 'mixtral:8x7b',
                    dict(max_len=4096), 4096, 4, 0.7, 32, EXPERTS_GOAL,
                    'bfloat16'),
}
_LENGTH, _BATCH = 32, 4
TOYS = {
    'gpt2': CASES['gpt2']._replace(
        config='gpt:tiny', model=_TOY, length=_LENGTH, batch=_BATCH),
    'llama': CASES['llama']._replace(
        config='llama:tiny', model=_TOY, length=_LENGTH, batch=_BATCH,
        layers=2),
    'mixtral': CASES['mixtral']._replace(
        config='mixtral:tiny', model=_TOY, length=_LENGTH, batch=_BATCH,
        layers=2),
}


class Writing(NamedTuple):
  """A model that writes, with all numbers and parameters in bfloat16.

  Attributes:
    title, config, model: as of a Case.
    batches: rows that are written at once, each measured.
    prompt: tokens of a row that are there.
    new: tokens that are written to each.
  """
  title: str
  config: str
  model: dict[str, Any]
  batches: tuple[int, ...]
  prompt: int
  new: int


WRITING = Writing('LLaMA-2-7B', 'llama:2-7b', dict(max_len=512), (8, 1), 128,
                  256)
TOY_WRITING = WRITING._replace(config='llama:tiny', model=_TOY, batches=(2, 1),
                               prompt=8, new=8)

# Ways to multiply the rows of experts: fields of model.moe, options of XLA's
# compiler, and options of JAX. Each drops no token but the last, which is
# another function: it is measured, and never chosen for the comparison.
EXPERTS = {
    'ragged_dot': {},
    'ragged_dot, fused by XLA with Triton': dict(compiler=dict(
        xla_gpu_experimental_use_ragged_dot_fusion=True)),
    'ragged_dot, grouped product of cuBLAS': dict(compiler=dict(
        xla_gpu_experimental_use_ragged_dot_grouped_gemm=True)),
    "ragged_dot, JAX's Triton kernel": dict(
        jax=dict(jax_ragged_dot_use_gpu_pallas_triton_lowering=True)),
    'megablox': dict(moe=dict(grouped_kernel='megablox')),
    'padded to a capacity of 1.25': dict(drops=True, moe=dict(
        capacity_factor=1.25, eval_capacity_factor=1.25, dispatch='sorted')),
}


def chosen(toy: bool) -> tuple[Mapping[str, Case], Writing]:
  """Returns the cases at their sizes, or at toy ones."""
  return (TOYS, TOY_WRITING) if toy else (CASES, WRITING)
