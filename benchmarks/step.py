"""Times whole training steps, and beside them PyTorch's of the same model.

  python -m benchmarks.step --compare=pytorch
  python -m benchmarks.step --dtype=bfloat16 --compare=pytorch --json=FILE
  python -m benchmarks.step --config=configs/bert.py:tiny --compare=pytorch
  python -m benchmarks.step --config=configs/gpt.py:tiny --sections=loop

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

import json
import shutil
import statistics

from absl import flags

from benchmarks.worker import Worker
from configs.errors import one_of, require
from training import cli

# What PyTorch may run: in bfloat16, with float32 parameters or without.
RIVALS = {'float32': ('float32',), 'bfloat16': ('autocast', 'bfloat16')}


def define_flags():
  """Defines the flags of the command, when it runs: a test imports this module
  beside other programs, whose flags have the same names."""
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


def default_config():
  """The shape of docs/performance.md, 35.4M parameters."""
  from configs import gpt
  config = gpt.get_config('tiny')
  config.model.update(d_model=512, num_layers=6, num_heads=8,
                      vocab_size=32000, max_len=256)
  config.data.update(batch_size=8, length=256)
  return config


def main():
  define_flags()
  cli.parse(__doc__)
  args = flags.FLAGS
  import architectures
  from benchmarks import rival
  from training import preflight, runs
  from training.data import tokenizers
  from training.workdir import run_config, storage
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
    config.model.vocab_size = runs.vocab_size(
        config, tokenizers.load(config.data.tokenizer))
  if 'generate' in args.sections:
    stack = architectures.stack(runs.resolve_alone(config))
    require(stack == 'decoder', '--sections=generate needs a decoder, and '
            f'model.arch {config.model.arch!r} is an {stack}')
    require(args.prompt <= config.data.length, f'--prompt is {args.prompt}, '
            f'and rows have data.length={config.data.length} tokens')
  request = dict(kind='step', config=run_config.to_json(config), count=20,
                 prompt=args.prompt, new=args.new)
  told = rival.request(config) if args.compare else {}
  figures = {'dtype': args.dtype}
  for name in args.sections:
    figures[name] = SECTIONS[name](request, args, told)
  if json_file:
    storage.write(json_file, json.dumps(figures, indent=1) + '\n')


def _step(request, args, told):
  data = request['config']['data']
  return _against(request, args, told, 'step', 'tokens/s',
                  data['batch_size'] * data['length'])


def _generate(request, args, told):
  return _against(request, args, told, 'generate', 'new tokens/s',
                  request['config']['data']['batch_size'] * args.new)


def _against(request, args, told, job, unit, amount):
  """Times ours and each rival in turns; prints and returns the figures.

  `told` is what a rival is told of the model.
  """
  sides = {'ours': ('ours', request)}
  if args.compare:
    # Generation goes through transformers' own loop, which is not compiled.
    ways = (False, True) if args.torch_compile and job == 'step' else (False,)
    sides |= {f'{args.compare} {dtype}{", compiled" * compiled}':
              (args.compare, request | told | dict(
                  dtype=dtype, compiled=compiled))
              for dtype in RIVALS[args.dtype] for compiled in ways}
  workers = {}
  answers = {name: [] for name in sides}
  try:
    for name, side in reversed(sides.items()):  # ours last: others may refuse
      workers[name] = Worker(*side)
    for _ in range(args.pairs + 1):
      for name in sides:
        answers[name].append(workers[name].do(job))
  finally:
    for worker in workers.values():
      worker.close()
  figures = {}
  for name, given in answers.items():
    given = given[1:]  # the first is the warm-up
    times = [answer['seconds'] for answer in given]
    median = statistics.median(times)
    ratio, cpu_ratio = (statistics.median(
        other[key] / own[key] for other, own in zip(given, answers['ours'][1:])
        ) for key in ('seconds', 'cpu_seconds'))
    figures[name] = dict(
        median_s=median, min_s=min(times), per_s=amount / median,
        cpu_s=statistics.median(answer['cpu_seconds'] for answer in given),
        peak_bytes=given[-1]['peak_bytes'], ours_is_faster_by=ratio,
        ours_is_faster_by_cpu_time=cpu_ratio)
    print(f'{job} {name:27} {median * 1e3:8.0f} ms  (least '
          f'{min(times) * 1e3:.0f}; of CPU {figures[name]["cpu_s"] * 1e3:.0f})'
          f'  {amount / median:8.0f} {unit}  peak '
          f'{given[-1]["peak_bytes"] / 2**20:.0f} MiB' + (
              '' if name == 'ours' else f'  ours is {ratio:.2f} x as fast '
              f'({cpu_ratio:.2f} x by CPU time)'),
          flush=True)
  return figures


def _loop(request, args, told):
  """The loop's seconds a step over those of the bare step, alternated."""
  del told
  count = request['count']
  bare, loop = [], []
  with Worker('ours', request) as worker:
    for _ in range(args.pairs):
      done = worker.do('steps')
      bare.append([done[key] / count for key in ('seconds', 'cpu_seconds')])
      loop.append(worker.do('loop')['result'])
  added, of_cpu = (statistics.median(b[i] / a[i] - 1
                                     for a, b in zip(bare, loop))
                   for i in range(2))
  (bare, bare_cpu), (loop, loop_cpu) = (
      map(statistics.median, zip(*pairs)) for pairs in (bare, loop))
  print(f'loop: {loop * 1e3:.2f} ms a step, bare {bare * 1e3:.2f} ms: '
        f'{added:+.1%}  (of CPU {loop_cpu * 1e3:.2f} and '
        f'{bare_cpu * 1e3:.2f} ms: {of_cpu:+.1%})', flush=True)
  return dict(bare_s=bare, loop_s=loop, added=added, bare_cpu_s=bare_cpu,
              loop_cpu_s=loop_cpu, added_of_cpu=of_cpu)


def _compile(request, args, told):
  """Seconds to trace and compile, with 8 times the layers and as it is."""
  del told
  deep = json.loads(json.dumps(request))
  model = request['config']['model']
  for stack in ('num_layers', 'num_decoder_layers'):
    deep['config']['model'][stack] *= 8
  ratios, seconds = [], []
  for _ in range(args.pairs):
    pair = []
    for side in (request, deep):
      with Worker('ours', side | dict(kind='compile')) as worker:
        pair.append(sum(worker.do('compile')['result']))
    seconds.append(pair)
    ratios.append(pair[1] / pair[0])
  shallow, deep = map(statistics.median, zip(*seconds))
  ratio = statistics.median(ratios)
  print(f'trace and compile: {shallow:.2f} s for {model["num_layers"]} '
        f'layers, {deep:.2f} s for {model["num_layers"] * 8}: {ratio:.2f} x',
        flush=True)
  return dict(shallow_s=shallow, deep_s=deep, ratio=ratio)


SECTIONS = {'step': _step, 'generate': _generate, 'loop': _loop,
            'compile': _compile}


if __name__ == '__main__':
  cli.run(main)
