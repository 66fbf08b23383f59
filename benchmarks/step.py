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

Sections: `step`, and `generate` (greedy, the whole batch).
"""

import contextlib
import shutil

from absl import flags
import ml_collections

import architectures
from benchmarks import rival
from benchmarks.worker import Worker, time_in_turns
from common.errors import require
from configs import gpt
from training import cli, preflight, runs
from training.workdir import storage

# The dtypes in which PyTorch is timed, by the dtype of our side; in bfloat16,
# with float32 parameters (autocast) and without.
PYTORCH_DTYPES = {'float32': ('float32',), 'bfloat16': ('autocast', 'bfloat16')}
SECTIONS = ('step', 'generate')


def default_config() -> ml_collections.ConfigDict:
  """Returns the config that is timed where none is given: a GPT of 35.4M
  parameters, on batches of 8 rows of 256 tokens (docs/performance.md)."""
  config = gpt.get_config('tiny')
  config.model.update(d_model=512, num_layers=6, num_heads=8,
                      vocab_size=32000, max_len=256)
  config.data.update(batch_size=8, length=256)
  return config


def define_flags() -> None:
  """Defines the flags of this program."""
  cli.define_config('A file of configs/ and its size; default: GPT with '
                    'd_model 512, 6 layers, 8 heads, vocabulary 32,000, '
                    'batch 8 x 256.')
  flags.DEFINE_enum('dtype', '', ('', *PYTORCH_DTYPES), 'The dtype of the '
                    "computation; default: the config's.")
  flags.DEFINE_enum('compare', '', ('', 'pytorch'),
                    'What to time beside it; it needs the extra `verify`.')
  flags.DEFINE_bool('torch_compile', bool(shutil.which('c++') or
                                          shutil.which('g++')),
                    'Whether to time the other side under torch.compile too; '
                    'default: if there is a C++ compiler.')
  cli.define_choices('sections', choices=SECTIONS, text='What to time.',
                     default=['step'])
  flags.DEFINE_integer('pairs', 7, 'How often each side is timed.', 1, 1000)
  flags.DEFINE_integer('prompt', 128, 'Tokens of the prompt of a generation.',
                       1, 10**6)
  flags.DEFINE_integer('new', 64, 'Tokens that a generation adds to it.', 1,
                       10**6)
  flags.DEFINE_string('json', '', 'Write the figures to this file.')


def main() -> None:
  """Times each section that the flags name, and writes the figures."""
  define_flags()
  cli.parse(__doc__)
  args = flags.FLAGS
  json_file = storage.checked_output_file(args.json, '--json')

  # The config, without what PyTorch lacks where it is compared with.
  config = args.config or default_config()
  config = config.copy_and_resolve_references().unlock()
  config.model.dtype = args.dtype = args.dtype or config.model.dtype
  preflight.check_config(config)
  if args.compare:
    rival.check_pytorch_has(config)
    config = rival.keep_what_pytorch_has(config)
  if 'generate' in args.sections:
    check_generation(config, prompt_tokens=args.prompt)

  # The requests of both sides.
  our_request = dict(config=config.to_dict(), prompt=args.prompt, new=args.new)
  pytorch_request = {}
  if args.compare:
    pytorch_request = our_request | rival.request_of_pytorch(config)

  figures = {'dtype': args.dtype}
  for section in args.sections:
    figures[section] = time_section(
        section, args=args, our_request=our_request,
        pytorch_request=pytorch_request)
  storage.write_json(json_file, figures)


def check_generation(config: ml_collections.ConfigDict,
                     prompt_tokens: int) -> None:
  """Checks that a model can generate text after the first tokens of its batch.

  Args:
    config: the config of the run.
    prompt_tokens: the number of tokens of the prompt.

  Raises:
    RequestError: for a model that is no decoder, or a prompt that is longer
      than the rows of the batch.
  """
  stack = architectures.stack(runs.resolve_model_without_tokenizer(config))
  require(stack == 'decoder', '--sections=generate needs a decoder, and '
          f'model.arch {config.model.arch!r} is an {stack}')
  require(prompt_tokens <= config.data.length, f'--prompt is {prompt_tokens}, '
          f'and rows have data.length={config.data.length} tokens')


def time_section(section: str, args: flags.FlagValues, our_request: dict,
                 pytorch_request: dict) -> dict[str, dict[str, float]]:
  """Times our side and PyTorch's in turns, and prints the times.

  Args:
    section: 'step' (a training step) or 'generate' (text after a prompt).
    args: the flags.
    our_request: the request to our process: its config, and the numbers of
      tokens to generate.
    pytorch_request: the request to the processes of PyTorch; {}: PyTorch is not
      timed.

  Returns:
    The figures of each side, by its name.
  """
  # The tokens that a call of the section handles.
  data = our_request['config']['data']
  tokens = data['batch_size'] * data['length']
  unit = 'tokens/s'
  if section == 'generate':
    tokens = data['batch_size'] * args.new
    unit = 'new tokens/s'

  # Each side's module of benchmarks/ and its request, by the name of the side.
  sides = {'ours': ('ours', our_request)}
  if pytorch_request:
    sides |= pytorch_sides(pytorch_request, args, section)

  # Start a process for each side, and let them take turns. Ours starts last,
  # because PyTorch may refuse the request.
  with contextlib.ExitStack() as stack:
    workers = {}
    for name, (module, request) in reversed(sides.items()):
      workers[name] = stack.enter_context(Worker(module, request))
    contenders = {name: workers[name] for name in sides}
    times = time_in_turns(contenders, rounds=args.pairs,
                          measure=lambda worker: worker.do(section))

  # Print and return the figures of each side.
  figures = {}
  for name, row in times.items():
    tokens_per_second = tokens / row['seconds']
    figures[name] = dict(
        median_s=row['seconds'], min_s=row['least_seconds'],
        per_s=tokens_per_second, cpu_s=row['cpu_seconds'],
        peak_bytes=row['peak_bytes'], ours_is_faster_by=row['ratio'],
        ours_is_faster_by_cpu_time=row['cpu_ratio'])
    print_times(f'{section} {name:27}', times=row,
                rate=f'{tokens_per_second:8.0f} {unit}', is_ours=name == 'ours')
  return figures


def print_times(title: str, times: dict[str, float], rate: str,
                is_ours: bool) -> None:
  """Prints a line with the times of one side of a comparison (our code, or a
  variant of PyTorch), and how much faster ours is.

  Args:
    title: the text with which the line begins.
    times: the figures of the side, as `time_in_turns` returns them: medians, in
      seconds.
    rate: the tokens per second, as text with a unit.
    is_ours: whether the side is ours, which is not compared with itself.
  """
  median_ms = 1e3 * times['seconds']
  least_ms = 1e3 * times['least_seconds']
  cpu_ms = 1e3 * times['cpu_seconds']
  peak_mib = times['peak_bytes'] / 2**20
  comparison = ''
  if not is_ours:
    comparison = (f'  ours is {times["ratio"]:.2f} x as fast '
                  f'({times["cpu_ratio"]:.2f} x by CPU time)')
  print(f'{title} {median_ms:8.0f} ms  (least {least_ms:.0f}; of CPU '
        f'{cpu_ms:.0f})  {rate}  peak {peak_mib:.0f} MiB{comparison}',
        flush=True)


def pytorch_sides(request: dict, args: flags.FlagValues, section: str
                  ) -> dict[str, tuple[str, dict]]:
  """Returns the variants of PyTorch that are timed: each dtype, with
  torch.compile and without it. Generation uses the loop of transformers, which
  is never compiled.

  Args:
    request: the model and the batch, as the process that runs a variant reads
      them, without the fields `dtype` and `compiled`.
    args: the flags of this program; `args.compare` is the module of benchmarks/
      that runs PyTorch.
    section: 'step' or 'generate'.

  Returns:
    {name of the variant: (module of benchmarks/, request with all fields)}.
  """
  is_compiled_choices = [False]
  if args.torch_compile and section == 'step':
    is_compiled_choices.append(True)
  variants = {}
  for dtype in PYTORCH_DTYPES[args.dtype]:
    for is_compiled in is_compiled_choices:
      name = f'{args.compare} {dtype}'
      if is_compiled:
        name += ', compiled'
      whole_request = request | dict(dtype=dtype, compiled=is_compiled)
      variants[name] = args.compare, whole_request
  return variants


if __name__ == '__main__':
  cli.run(main)
