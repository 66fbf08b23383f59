"""Estimates of memory, by what a kernel can do without."""

import pytest

from configs import bert, llama, mixtral, modernbert
from training import runs
from training.costs import memory

ROWS = 8


def one_layer(made, length: int, **fields) -> tuple[int, int]:
  """Returns what the largest thing of a layer is said to take on a TPU, and the
  bytes of its scores and their gradient."""
  config = made.get_config('tiny')
  config.model.update(dict(dropout=0.0, attention_dropout=0.0) | fields,
                      max_len=length, d_model=128, num_heads=8)
  config.data.update(length=length, batch_size=ROWS)
  c = runs.resolve_model_without_tokenizer(config)
  shape = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
  run = memory.run_on_described_mesh(config, c, shape)
  account = memory.estimate_peak_bytes(run, (1, 0), 'tpu')
  return account['one_layer'], 2 * 4 * ROWS * length ** 2 * c.num_heads


def test_a_token_has_the_hidden_units_of_each_of_its_experts():
  """What top_k 2 takes more than 1: three arrays of d_ff numbers a token."""
  sizes = dict(num_experts=8, d_ff=9000)
  one, _ = one_layer(mixtral, 512, moe=sizes | dict(top_k=1))
  two, _ = one_layer(mixtral, 512, moe=sizes | dict(top_k=2))
  assert two - one == 3 * 4 * ROWS * 512 * 9000


@pytest.mark.parametrize('made, length, fields, fused', [
    (llama, 512, {}, True), (bert, 512, {}, True), (modernbert, 512, {}, True),
    (llama, 512, dict(attention_dropout=0.1), False),
    (bert, 512, dict(attention_dropout=0.1), False),
    (modernbert, 500, {}, False), (llama, 512, dict(position='alibi'), False)])
def test_scores_count_where_the_kernel_cannot_do_without(
    made, length, fields, fused):
  counted, scores = one_layer(made, length, **fields)
  assert (counted < scores / 2) if fused else (scores <= counted < 1.2 * scores)
