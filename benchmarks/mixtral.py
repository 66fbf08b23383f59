"""Training a small Mixtral against transformers' on PyTorch, on this CPU.

  python -m benchmarks.mixtral

512 wide, 4 layers, 8 experts of 1,024, top-2; a step is forward, backward and
AdamW. The contenders take turns in one process, and the median counts; then
each trains alone in a process of its own, for the peak of its memory.
transformers' way of computing experts is whichever is fastest here.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

from configs.errors import one_of, require
from training import cli

BATCH, LENGTH, VOCAB = 8, 256, 4096
# Not 'batched_mm': it copies an expert's weights for each token, 25 GB here.
EXPERTS = ('eager', 'grouped_mm')
NAMED = 'transformers_{}'  # how each is called


def ours():
  """A function that trains for a step, train.py's own, and returns the loss."""
  from benchmarks.ours import Trainer
  from configs import mixtral
  from training.distributed import cpu
  from training.workdir import run_config
  cpu.prepare()
  config = mixtral.get_config('tiny')
  config.model.update(d_model=512, num_layers=4, num_heads=8, num_kv_heads=2,
                      d_ff=1024, vocab_size=VOCAB, max_len=LENGTH)
  config.model.moe.update(num_experts=8, top_k=2)
  config.data.update(batch_size=BATCH, length=LENGTH)
  trainer = Trainer(run_config.to_json(config))
  trainer.create()
  return trainer.step


def theirs(experts: str):
  """The same of transformers' MixtralForCausalLM."""
  import torch
  import transformers
  config = transformers.MixtralConfig(
      vocab_size=VOCAB, hidden_size=512, intermediate_size=1024,
      num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
      max_position_embeddings=LENGTH, num_local_experts=8,
      num_experts_per_tok=2, output_router_logits=True,
      sliding_window=None)
  model = transformers.MixtralForCausalLM._from_config(
      config, experts_implementation=experts)
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
  tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())
  return run


def peak_mib(name: str) -> float:
  """The most memory that a process took which trained `name` alone."""
  out = subprocess.run(
      [sys.executable, '-m', 'benchmarks.mixtral', '--alone', name],
      check=True, capture_output=True, text=True).stdout
  return float(out.split()[-1])


def compare(rounds: int) -> dict[str, float]:
  from benchmarks.moe import turns
  contenders = {NAMED.format(name): theirs(name) for name in EXPERTS}
  seconds = turns({'ours': ours()} | contenders, rounds)
  fastest = min(contenders, key=seconds.get)
  rate = {name: BATCH * LENGTH / s for name, s in seconds.items()}
  memory = {name: peak_mib(name) for name in ('ours', fastest)}
  return ({f'tokens_per_second_{name}': r for name, r in rate.items()}
          | {f'peak_mib_{name}': m for name, m in memory.items()}
          | {'speed_over_fastest': rate['ours'] / rate[fastest],
             'memory_over_fastest': memory['ours'] / memory[fastest]})


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.mixtral', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--rounds', type=int, default=7,
                      help='how many turns each contender takes')
  parser.add_argument('--alone', default='', metavar='NAME',
                      help='only train NAME and print its peak MiB')
  parser.add_argument('--json', action='store_true', help='print one object')
  args = parser.parse_args()
  require(args.rounds > 0, f'--rounds is {args.rounds}: it must be 1 or more')
  if args.alone:
    one_of('--alone', args.alone, ('ours', *map(NAMED.format, EXPERTS)))
  if args.alone != 'ours':
    from benchmarks import rival
    rival.need_pytorch('benchmarks.mixtral')
  if args.alone:
    run = (ours() if args.alone == 'ours'
           else theirs(args.alone.removeprefix(NAMED.format(''))))
    for _ in range(3):
      run()
    # Not getrusage, whose peak a child starts with its parent's.
    status = pathlib.Path('/proc/self/status').read_text()
    print(int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1024)
    return
  result = compare(args.rounds)
  if args.json:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f'{name:44} {value:10.2f}')


if __name__ == '__main__':
  cli.run(main)
