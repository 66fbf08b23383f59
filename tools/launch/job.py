"""What every place starts: train.py's words, checked, and its environment."""

import dataclasses
import hashlib
import os
import pathlib
import re
import shlex

from absl import flags

from configs.errors import RequestError, require
from training import cli
from training.workdir import storage

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
    ('multi_string', 'env', [], 'NAME=VALUE, for the environment of each '
     'process; may be given more than once.'),
    ('string', 'logs', '', 'Where the output of each process goes, on disk; '
     'default: logs in the workdir, or logs/NAME here for one in a bucket.'),
)
# What tells a process who it is.
_OF_THE_LAUNCHER = (
    'JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS',
    'JAX_COORDINATOR_BIND_ADDRESS', 'JAX_LOCAL_DEVICE_IDS',
    'ARCHETYPE_DEVICES')
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
  check_restarts(args)
  storage.check_folder(args.workdir)
  if storage.in_bucket(args.logs):
    raise RequestError(f'--logs is {args.logs!r}: choose a folder on disk')
  _check(args.config, num_devices, slices)
  from training import profile
  profile.parse(args.profile_steps, args.config.train.steps)
  workdir = args.workdir.rstrip('/')
  parent = workdir.rpartition('/')[0] or '.'
  name = named(workdir)
  logs = (f'logs/{name}' if storage.in_bucket(workdir) else f'{workdir}/logs')
  return Job(
      name=name,
      words=('python', '-u', 'train.py', *cli.words(argv, _OF_TRAIN),
             f'--stopped_exit_code={STOPPED}'),
      workdir=workdir, logs=args.logs or logs,
      env=environment(args, f'{parent}/jax_cache'),
      max_restarts=args.max_restarts, dry_run=args.dry_run)


def check_restarts(args) -> None:
  """Raises RequestError for an --max_restarts that is no such number."""
  require(0 <= args.max_restarts <= 1_000_000,
          f'--max_restarts is {args.max_restarts}: choose 0 to 1,000,000')


def environment(args, compile_cache: str) -> dict[str, str]:
  """Returns what each process finds in its environment.

  Args:
    args: the flags.
    compile_cache: where compiled programs are kept, unless a flag says so.

  Raises:
    ValueError: for an --env that is none, or that the launcher sets itself.
  """
  env = {
      'JAX_COMPILATION_CACHE_DIR': args.compile_cache or compile_cache,
      # JAX leaves out what compiles within a second.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  for text in args.env:
    name, equals, value = text.partition('=')
    require(bool(equals) and re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name)
            is not None, f'--env is {text!r}: write NAME=VALUE')
    require(name not in (*env, *_OF_THE_LAUNCHER), f'--env sets {name}, which '
            'the launcher sets itself: leave it out'
            + ', and use --compile_cache' * name.endswith('CACHE_DIR'))
    env[name] = value
  return env


def named(workdir: str) -> str:
  """Returns the name of the job that trains in a workdir: a DNS label, which
  every place takes. Two workdirs, which may both end in runs/a, have two names,
  and one workdir has one."""
  workdir = workdir.rstrip('/')
  if not storage.in_bucket(workdir):
    workdir = os.path.abspath(workdir)
  text = workdir.rpartition('/')[2].lower()
  label = re.sub('[^a-z0-9]+', '-', text).strip('-')[:30].strip('-')
  if not label[:1].isalpha():
    label = f'run-{label}'.rstrip('-')
  digest = hashlib.sha256(workdir.encode()).hexdigest()
  return f'{label}-{digest[:8]}'


def _check(config, num_devices: int, slices: int) -> None:
  """Refuses a config that cannot run, and a mesh that does not fit."""
  from training import runs
  from training.distributed import devices
  runs.check_config(config)
  if not num_devices:
    return
  shape = devices.mesh_shape(config.mesh, num_devices)
  model = runs.resolve_alone(config)
  runs.check_mesh(config, model, shape)
  if shape['data'] % slices:
    raise RequestError(f'mesh.data is {shape["data"]}, which the {slices} '
                       f'slices do not divide: choose a multiple of {slices}')


def require_here(job: Job) -> None:
  """Raises RequestError where this machine, which writes them, cannot write the
  workdir or the logs."""
  storage.try_folder(job.workdir)
  storage.try_folder(job.logs, '--logs')


def require_shared(job: Job, places: str, mount: str = '') -> None:
  """Raises ValueError where the hosts would each have a workdir, or compiled
  programs, of their own: both belong into a bucket, or under `mount`."""
  for name, folder in (
      ('--workdir', job.workdir),
      ('--compile_cache', job.env['JAX_COMPILATION_CACHE_DIR'])):
    if not storage.in_bucket(folder):
      _require_under(name, folder, places, mount)


def _require_under(name: str, folder: str, places: str, mount: str) -> None:
  path = pathlib.PurePath(folder)
  require(bool(mount) and path.is_relative_to(mount) and '..' not in path.parts,
          f'{name} is {folder!r}, and every host must find it at the same '
          f'place: choose {places}')


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
