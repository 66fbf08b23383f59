"""The job that every place starts: the words of train.py, checked, and the
environment of its processes."""

import dataclasses
import hashlib
import os
import re
import shutil

from absl import flags

from common.fields import parse_assignments
from common.errors import RequestError, STOPPED, require, shorten
from training import cli
from training.workdir import storage

# The flags of every place: (type, name, default, help text, bounds). Only the
# launcher defines them, because train.py has some of the same name.
FLAGS = (
    ('string', 'profile_steps', '', 'See train.py.'),
    ('bool', 'allow_config_change', False, 'See train.py.'),
    ('bool', 'dry_run', False, 'Print what would be done; do nothing.'),
    ('integer', 'max_restarts', 3, 'After failures; a run that was preempted '
     'is always started again.', 0, 10**6),
    ('string', 'compile_cache', '', 'Where compiled programs are kept, for all '
     'processes; default: jax_cache beside the workdir.'),
    ('multi_string', 'env', [], 'NAME=VALUE, for the environment of each '
     'process; may be given more than once.'),
    ('string', 'logs', '', 'Where the output of each process goes, on disk; '
     'default: logs in the workdir, or logs/NAME here for one in a bucket.'),
)
# The variables by which a process finds its number, the others and its devices.
_VARIABLES_OF_LAUNCHER = (
    'JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS',
    'JAX_COORDINATOR_BIND_ADDRESS', 'JAX_LOCAL_DEVICE_IDS')
# The flags that are train.py's own.
_FLAGS_OF_TRAIN = ('config', 'workdir', 'profile_steps', 'allow_config_change')


@dataclasses.dataclass(frozen=True)
class Job:
  """A run to launch.

  Attributes:
    name: the name of the job, of letters, digits and dashes.
    words: the words of its command: python, train.py and its flags.
    workdir: the folder of the run.
    logs: the folder of the processes' output.
    env: the variables of each process, without _VARIABLES_OF_LAUNCHER.
    max_restarts: how often the job is started again after failures.
    dry_run: whether only to print what would be started.
  """
  name: str
  words: tuple[str, ...]
  workdir: str
  logs: str
  env: dict[str, str]
  max_restarts: int
  dry_run: bool


def make_job(num_devices: int) -> Job:
  """Checks the flags of the command line, and returns the job that they
  describe.

  Args:
    num_devices: the number of devices of all processes together; 0: it is not
      known here.

  Returns:
    The job, which train.py would not refuse, as far as can be seen here.

  Raises:
    ValueError: if train.py would refuse the run.
  """
  # The flags of the launcher.
  args = flags.FLAGS
  if args.config is None or not args.workdir:
    raise RequestError('pass both --config FILE.py:SIZE and --workdir DIR')
  storage.check_folder_name(args.workdir)
  require(not storage.is_in_bucket(args.logs),
          f'--logs is {args.logs!r}: choose a folder on disk')

  # The config, its mesh and the steps to profile, as train.py checks them.
  from training import preflight, progress, runs
  from training.distributed import devices
  preflight.check_config(args.config, cli.overridden_fields())
  if num_devices:
    model = runs.resolve_model_without_tokenizer(args.config)
    mesh = devices.resolve_mesh_shape(args.config.mesh, num_devices)
    runs.check_mesh(args.config, model, mesh)
  progress.parse_profiled_steps(args.profile_steps, args.config.train.steps)

  # Compiled programs are kept beside the workdir. Logs are kept in the workdir,
  # or in a folder here if it is in a bucket.
  workdir = args.workdir.rstrip('/')
  parent = workdir.rpartition('/')[0] or '.'
  name = job_name_of_workdir(workdir)
  logs = args.logs or f'{workdir}/logs'
  if not args.logs and storage.is_in_bucket(workdir):
    logs = f'logs/{name}'
  return Job(
      name=name,
      words=('python', '-u', 'train.py',
             *cli.words_to_repeat_command(_FLAGS_OF_TRAIN),
             f'--stopped_exit_code={STOPPED}'),
      workdir=workdir, logs=logs,
      env=environment_of_processes(args, f'{parent}/jax_cache'),
      max_restarts=args.max_restarts, dry_run=args.dry_run)


def environment_of_processes(args: flags.FlagValues, compile_cache: str
                             ) -> dict[str, str]:
  """Returns the environment variables that every process of a job gets: the
  settings of jax's cache of compiled programs, and those of --env.

  Args:
    args: the flags of the launcher.
    compile_cache: the folder of compiled programs, unless --compile_cache names
      another.

  Returns:
    The value of each variable, by its name.

  Raises:
    RequestError: for a value of --env that is no NAME=VALUE, or whose variable
      the launcher sets itself.
  """
  # A minimum of 0 seconds makes jax keep programs that compile within a second
  # too, which it does not keep by default.
  env = {
      'JAX_COMPILATION_CACHE_DIR': args.compile_cache or compile_cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  # A user may add other variables, but not those that the launcher sets.
  reserved_names = (*env, *_VARIABLES_OF_LAUNCHER)
  env_of_user = parse_assignments(args.env, '--env')
  for name, value in env_of_user.items():
    if name.isidentifier() and name not in reserved_names:
      continue
    raise RequestError(
        f'--env is {shorten(f"{name}={value}")}: write NAME=VALUE, of a name '
        'that the launcher does not set itself, as it does '
        f'{", ".join(reserved_names)}')
  return env | env_of_user


def job_name_of_workdir(workdir: str) -> str:
  """Returns the name of the job that trains in a workdir.

  The name is a DNS label, which every launcher accepts. It ends in a hash of
  the whole path, so that two workdirs have different names even if both end in
  runs/a.

  Args:
    workdir: the path of the workdir.
  """
  if not storage.is_in_bucket(workdir):
    workdir = os.path.abspath(workdir)
  workdir = workdir.rstrip('/')
  folder_name = workdir.rpartition('/')[2]
  # A DNS label has lower-case letters, digits and dashes, 63 of them at most,
  # and neither begins nor ends in a dash.
  label = re.sub('[^a-z0-9]+', '-', folder_name.lower())
  digest = hashlib.sha256(workdir.encode()).hexdigest()
  # Two dashes stand where nothing is left of the label.
  return f'run-{label[:24].strip("-")}-{digest[:8]}'.replace('--', '-')


def check_folders_are_writable(job: Job) -> None:
  """Raises RequestError if this machine cannot write into the workdir or the
  folder of logs of a job."""
  storage.check_folder_is_writable(job.workdir)
  storage.check_folder_is_writable(job.logs, '--logs')


def require_programs(*names: str) -> None:
  """Raises RequestError if one of the named programs is not installed on this
  machine."""
  for name in names:
    require(shutil.which(name) is not None, f'{name} is not on the PATH of '
            'this machine: launch where the cluster\'s programs are installed, '
            'or only look at what would be done with --dry_run')


def define_flags(table, args: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command-line flags that a table lists.

  Each place to launch on (this machine, SLURM, TPU VMs) has a table of its own,
  and only the flags of the place that is used are defined, because two places
  may have flags of the same name.

  Args:
    table: a tuple for each flag: its type as absl names it ('string',
      'integer', ...), its name, its default, its help text, and for a number
      its bounds.
    args: the flags to which they are added.
  """
  for flag_type, name, default, text, *bounds in table:
    define_flag = getattr(flags, f'DEFINE_{flag_type}')
    define_flag(name, default, text, *bounds, flag_values=args)
