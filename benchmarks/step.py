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
import json
import shutil
import statistics

from absl import flags

import architectures
from benchmarks import rival
from benchmarks.worker import Worker
from configs import gpt
from configs.errors import one_of, require
from training import cli, objectives, preflight, runs
from training.data import tokenizers
from training.workdir import storage

# What PyTorch may run: in bfloat16, with float32 parameters or without.
RIVALS = {'float32': ('float32',), 'bfloat16': ('autocast', 'bfloat16')}
SECTIONS = ('step', 'generate')


def default_config():
  """The shape of docs/performance.md, 35.4M parameters."""
  config = gpt.get_config('tiny')
  config.model.update(d_model=512, num_layers=6, num_heads=8,
                      vocab_size=32000, max_len=256)
  config.data.update(batch_size=8, length=256)
  return config


def main():
  cli.define_config('A file of configs/ and its size; default: GPT with '
                    'd_model 512, 6 layers, 8 heads, vocabulary 32,000, '
                    'batch 8 x 256.')
  flags.DEFINE_enum('dtype', '', ('', *RIVALS), 'Of the computation; default: '
                    "the config's.")
  flags.DEFINE_enum('compare', '', ('', 'pytorch'),
                    'What to time beside it; it needs the extra `verify`.')
  flags.DEFINE_bool('torch_compile', bool(shutil.which('c++') or
                                          shutil.which('g++')),
                    'Whether to time the other side under torch.compile too; '
                    'default: if there is a C++ compiler.')
  flags.DEFINE_list('sections', ['step'],
                    'What to time, of ' + ', '.join(SECTIONS) + '.')
  flags.DEFINE_integer('pairs', 7, 'How often each side is timed.', 1, 1000)
  flags.DEFINE_integer('prompt', 128, 'Tokens of the prompt of a generation.',
                       1, 10**6)
  flags.DEFINE_integer('new', 64, 'Tokens that a generation adds to it.', 1,
                       10**6)
  flags.DEFINE_string('json', '', 'Write the figures to this file.')
  cli.parse(__doc__)
  args = flags.FLAGS
  json_file = storage.output(args.json, '--json')
  for name in args.sections:
    one_of('--sections', name, SECTIONS)
  config = args.config or default_config()
  config = config.copy_and_resolve_references().unlock()
  config.model.dtype = args.dtype = args.dtype or config.model.dtype
  preflight.check_config(config)
  if args.compare:
    rival.check(config)
    config = rival.alike(config)
  if not config.model.vocab_size:
    config.model.vocab_size = objectives.of(config).vocab_size(
        config, tokenizers.load(config.data.tokenizer))
  if 'generate' in args.sections:
    stack = architectures.stack(runs.resolve_alone(config))
    require(stack == 'decoder', '--sections=generate needs a decoder, and '
            f'model.arch {config.model.arch!r} is an {stack}')
    require(args.prompt <= config.data.length, f'--prompt is {args.prompt}, '
            f'and rows have data.length={config.data.length} tokens')
  request = dict(config=config.to_dict(), prompt=args.prompt, new=args.new)
  other = rival.request(config) if args.compare else {}
  figures = {'dtype': args.dtype} | {
      name: against(request, args, other, name) for name in args.sections}
  if json_file:
    storage.write(json_file, json.dumps(figures, indent=1) + '\n')


def against(request, args, other, job):
  """Times a job by ours and by each rival in turns; prints and returns the
  figures.

  Args:
    request: what our side is asked for.
    args: the flags.
    other: what the other side is told of the model besides.
    job: of SECTIONS.
  """
  data = request['config']['data']
  amount, unit = data['batch_size'] * data['length'], 'tokens/s'
  if job == 'generate':
    amount, unit = data['batch_size'] * args.new, 'new tokens/s'
  sides = {'ours': ('ours', request)}
  if args.compare:
    # Generation goes through transformers' own loop, which is not compiled.
    ways = (False, True) if args.torch_compile and job == 'step' else (False,)
    sides |= {f'{args.compare} {dtype}{", compiled" * compiled}':
              (args.compare, request | other | dict(
                  dtype=dtype, compiled=compiled))
              for dtype in RIVALS[args.dtype] for compiled in ways}
  answers = {name: [] for name in sides}
  with contextlib.ExitStack() as stack:
    # Ours last: others may refuse.
    workers = {name: stack.enter_context(Worker(*side))
               for name, side in reversed(sides.items())}
    for _ in range(args.pairs + 1):
      for name in sides:
        answers[name].append(workers[name].do(job))
  figures = {}
  for name, results in answers.items():
    results = results[1:]  # the first is the warm-up
    times = [answer['seconds'] for answer in results]
    median = statistics.median(times)
    ratio, cpu_ratio = (statistics.median(
        theirs[key] / ours[key] for theirs, ours in zip(
            results, answers['ours'][1:]))
        for key in ('seconds', 'cpu_seconds'))
    figures[name] = dict(
        median_s=median, min_s=min(times), per_s=amount / median,
        cpu_s=statistics.median(answer['cpu_seconds'] for answer in results),
        peak_bytes=results[-1]['peak_bytes'], ours_is_faster_by=ratio,
        ours_is_faster_by_cpu_time=cpu_ratio)
    print(f'{job} {name:27} {median * 1e3:8.0f} ms  (least '
          f'{min(times) * 1e3:.0f}; of CPU {figures[name]["cpu_s"] * 1e3:.0f})'
          f'  {amount / median:8.0f} {unit}  peak '
          f'{results[-1]["peak_bytes"] / 2**20:.0f} MiB' + (
              '' if name == 'ours' else f'  ours is {ratio:.2f} x as fast '
              f'({cpu_ratio:.2f} x by CPU time)'),
          flush=True)
  return figures


if __name__ == '__main__':
  cli.run(main)
