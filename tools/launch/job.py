"""What every place starts: train.py's words, checked, and its environment."""

import dataclasses
import pathlib
import re
import shlex

from absl import flags

from configs.errors import RequestError
from training import cli, storage

STOPPED = 75  # the exit code of a run that has more to do

# (kind, name, default, what it says): flags of every place. They are defined
# by the program alone, for train.py has some of the same name.
FLAGS = (
    ('string', 'profile_steps', '', 'See train.py.'),
    ('bool', 'allow_config_change', False, 'See train.py.'),
    ('bool', 'dry_run', False, 'Print what would be done; do nothing.'),
    ('integer', 'max_restarts', 3, 'After failures; a run that was preempted '
     'is always started again.'),
    ('string', 'compile_cache', '', 'Where compiled programs are kept, for all '
     'processes; default: jax_cache beside the workdir.'),
    ('string', 'logs', '', 'Where the output of each process goes, on disk; '
     'default: logs in the workdir, or logs/NAME here for one in a bucket.'),
)
# Of the flags, those that are train.py's own.
_OF_TRAIN = ('config', 'workdir', 'profile_steps', 'allow_config_change')


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to launch.

  Attributes:
    name: of letters, digits and dashes.
    words: the command: python, train.py and its flags.
    workdir: of the run.
    logs: the folder of the processes' output.
    env: what each process finds in its environment, beside who it is.
    max_restarts: after failures.
    dry_run: only print.
  """
  name: str
  words: tuple[str, ...]
  workdir: str
  logs: str
  env: dict[str, str]
  max_restarts: int
  dry_run: bool

  @property
  def command(self) -> str:
    return shlex.join(self.words)


def make(argv: list[str], num_devices: int, slices: int = 1) -> Job:
  """Returns the job that the flags describe.

  Args:
    argv: the command line, parsed already.
    num_devices: of all processes; 0: not known here.
    slices: of them.

  Raises:
    ValueError: where train.py would refuse it, as far as can be seen here.
  """
  args = flags.FLAGS
  if args.config is None or not args.workdir:
    raise RequestError('pass both --config FILE.py:SIZE and --workdir DIR')
  if args.max_restarts < 0:
    raise RequestError(
        f'--max_restarts is {args.max_restarts}: choose 0 or more')
  storage.check(args.workdir)
  if storage.in_bucket(args.logs):
    raise RequestError(f'--logs is {args.logs!r}: choose a folder on disk')
  storage.try_folder(args.logs or '.', '--logs')
  _check(args.config, num_devices, slices)
  workdir = args.workdir.rstrip('/')
  parent = workdir.rpartition('/')[0] or '.'
  name = _name(workdir.rpartition('/')[2])
  logs = (f'logs/{name}' if storage.in_bucket(workdir) else f'{workdir}/logs')
  return Job(
      name=name,
      words=('python', '-u', 'train.py', *cli.words(argv, _OF_TRAIN),
             f'--stopped_exit_code={STOPPED}'),
      workdir=workdir, logs=args.logs or logs,
      env={
          'JAX_COMPILATION_CACHE_DIR':
              args.compile_cache or f'{parent}/jax_cache',
          # JAX leaves out what compiles within a second.
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
      max_restarts=args.max_restarts, dry_run=args.dry_run)


def _name(text: str) -> str:
  """Returns what every place takes as a name: a DNS label."""
  name = re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')[:40].strip('-')
  return name if name[:1].isalpha() else f'run-{name}'.rstrip('-')


def _check(config, num_devices: int, slices: int) -> None:
  """Refuses a config that cannot run, and a mesh that does not fit."""
  from training import devices, runs
  runs.check(config)
  if not num_devices:
    return
  shape = devices.mesh_shape(config.mesh, num_devices)
  devices.check(runs.resolve_alone(config), config.data.batch_size,
                config.train.grad_accumulation, shape)
  if shape['data'] % slices:
    raise RequestError(f'mesh.data is {shape["data"]}, which the {slices} '
                       f'slices do not divide: choose a multiple of {slices}')


def require_shared(job: Job, places: str, mount: str = '') -> None:
  """Raises ValueError where the hosts would each have a workdir, or compiled
  programs, of their own: both belong into a bucket, or under `mount`."""
  for name, folder in (
      ('--workdir', job.workdir),
      ('--compile_cache', job.env['JAX_COMPILATION_CACHE_DIR'])):
    under = mount and pathlib.PurePath(folder).is_relative_to(mount)
    if not storage.in_bucket(folder) and not under:
      raise RequestError(f'{name} is {folder!r}, and every host must find it '
                         f'at the same place: choose {places}')


def exports(env: dict[str, str]) -> str:
  """Returns the environment as lines of a shell script."""
  return '\n'.join(f'export {name}={shlex.quote(value)}'
                   for name, value in env.items())


def define(table, args: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of a place: only of the one that is launched on, since
  some of them have flags of the same name."""
  for kind, name, default, text in table:
    getattr(flags, f'DEFINE_{kind}')(name, default, text, flag_values=args)


def positive(args: flags.FlagValues, *names: str) -> None:
  """Raises ValueError where one of these flags is below 1."""
  for name in names:
    if args[name].value < 1:
      raise RequestError(f'--{name} is {args[name].value}: choose 1 or more')
