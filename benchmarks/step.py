"""Times whole training steps, and beside them PyTorch's of the same model.

  python -m benchmarks.step --compare=pytorch
  python -m benchmarks.step --dtype=bfloat16 --compare=pytorch --json=FILE
  python -m benchmarks.step --config=configs/bert.py:tiny --compare=pytorch

The other side is the class of transformers for the system, built from the
config.json of an export, with random weights and as many parameters. Both train
on one batch of the objective, by AdamW with clipping, without dropout, noise
in routers or a capacity of experts.

Each side is a process of its own. The two take turns, so that a busy machine
slows both alike: read the median of the ratios of the pairs. The first step of
a side is not timed. Peak memory is that of the process, with compiler and
libraries. CPU time is that of all threads: on a busy machine, with both sides
on one core by `taskset -c 0`, its ratio is more reliable than that of
wall-clock times.

Sections: `step`; `generate` (greedy, the whole batch); `loop` (the training
loop, its batches from data.source, against the bare step); `compile` (8 times
the layers against as many as the config has).
"""

import contextlib
import shutil

from absl import flags
import ml_collections

import architectures
from benchmarks import rival
from benchmarks.worker import Worker, turns
from common.errors import require
from configs import gpt
from training import cli, preflight, runs
from training.workdir import storage

# The dtypes of the other side; in bfloat16, with float32 parameters or without.
RIVALS = {'float32': ('float32',), 'bfloat16': ('autocast', 'bfloat16')}
SECTIONS = ('step', 'generate')


def default_config() -> ml_collections.ConfigDict:
  """Returns the config of docs/performance.md, 35.4M parameters."""
  config = gpt.get_config('tiny')
  config.model.update(d_model=512, num_layers=6, num_heads=8,
                      vocab_size=32000, max_len=256)
  config.data.update(batch_size=8, length=256)
  return config


def main():
  cli.define_config('A file of configs/ and its size; default: GPT with '
                    'd_model 512, 6 layers, 8 heads, vocabulary 32,000, '
                    'batch 8 x 256.')
  flags.DEFINE_enum('dtype', '', ('', *RIVALS), 'The dtype of the '
                    "computation; default: the config's.")
  flags.DEFINE_enum('compare', '', ('', 'pytorch'),
                    'What to time beside it; it needs the extra `verify`.')
  flags.DEFINE_bool('torch_compile', bool(shutil.which('c++') or
                                          shutil.which('g++')),
                    'Whether to time the other side under torch.compile too; '
                    'default: if there is a C++ compiler.')
  cli.define_choices('sections', ['step'], SECTIONS, 'What to time.')
  flags.DEFINE_integer('pairs', 7, 'How often each side is timed.', 1, 1000)
  flags.DEFINE_integer('prompt', 128, 'Tokens of the prompt of a generation.',
                       1, 10**6)
  flags.DEFINE_integer('new', 64, 'Tokens that a generation adds to it.', 1,
                       10**6)
  flags.DEFINE_string('json', '', 'Write the figures to this file.')
  cli.parse(__doc__)
  args = flags.FLAGS
  json_file = storage.output(args.json, '--json')
  config = args.config or default_config()
  config = config.copy_and_resolve_references().unlock()
  config.model.dtype = args.dtype = args.dtype or config.model.dtype
  preflight.check_config(config)
  if args.compare:
    rival.check(config)
    config = rival.alike(config)
  if 'generate' in args.sections:
    stack = architectures.stack(runs.resolve_alone(config))
    require(stack == 'decoder', '--sections=generate needs a decoder, and '
            f'model.arch {config.model.arch!r} is an {stack}')
    require(args.prompt <= config.data.length, f'--prompt is {args.prompt}, '
            f'and rows have data.length={config.data.length} tokens')
  request = dict(config=config.to_dict(), prompt=args.prompt, new=args.new)
  other = {}
  if args.compare:
    other = rival.request(config)
  figures = {'dtype': args.dtype}
  for name in args.sections:
    figures[name] = against(request, args, other, name)
  storage.write_json(json_file, figures)


def against(request, args, other, job):
  """Times a job by ours and by each rival in turns; prints and returns the
  figures.

  Args:
    request: the request of our side.
    args: the flags.
    other: the fields of the other side's request beside these.
    job: an entry of SECTIONS.
  """
  data = request['config']['data']
  amount, unit = data['batch_size'] * data['length'], 'tokens/s'
  if job == 'generate':
    amount, unit = data['batch_size'] * args.new, 'new tokens/s'
  sides = {'ours': ('ours', request)}
  if args.compare:
    sides |= _others(request | other, args, job)

  with contextlib.ExitStack() as stack:
    # Ours begins last: others may refuse.
    workers = {}
    for name, (side, asked) in reversed(sides.items()):
      workers[name] = stack.enter_context(Worker(side, asked))
    contenders = {name: workers[name] for name in sides}
    rows = turns(contenders, args.pairs, lambda worker: worker.do(job))

  figures = {}
  for name, row in rows.items():
    per_s = amount / row['seconds']
    figures[name] = dict(
        median_s=row['seconds'], min_s=row['least_seconds'], per_s=per_s,
        cpu_s=row['cpu_seconds'], peak_bytes=row['peak_bytes'],
        ours_is_faster_by=row['ratio'],
        ours_is_faster_by_cpu_time=row['cpu_ratio'])
    beside = ''
    if name != 'ours':
      beside = (f'  ours is {row["ratio"]:.2f} x as fast '
                f'({row["cpu_ratio"]:.2f} x by CPU time)')
    print(f'{job} {name:27} {row["seconds"] * 1e3:8.0f} ms  (least '
          f'{row["least_seconds"] * 1e3:.0f}; of CPU '
          f'{row["cpu_seconds"] * 1e3:.0f})  {per_s:8.0f} {unit}  peak '
          f'{row["peak_bytes"] / 2**20:.0f} MiB{beside}', flush=True)
  return figures


def _others(request, args, job) -> dict[str, tuple[str, dict]]:
  """Returns the other sides by their names, each with its request: in each
  dtype, and compiled too. Generation goes through transformers' own loop, which
  is not compiled."""
  ways = [False]
  if args.torch_compile and job == 'step':
    ways.append(True)
  sides = {}
  for dtype in RIVALS[args.dtype]:
    for compiled in ways:
      name = f'{args.compare} {dtype}'
      if compiled:
        name += ', compiled'
      asked = request | dict(dtype=dtype, compiled=compiled)
      sides[name] = args.compare, asked
  return sides


if __name__ == '__main__':
  cli.run(main)
