"""The gke launcher: a Job of Kubernetes whose indices are runners on one
ledger, on a volume that all of them mount.

An index is done when its runner finds nothing left to claim. Kubernetes starts
the others again by themselves: one that was preempted or told to stop as often
as it takes, one that failed --max_restarts times. What it held goes back into
the ledger, and a run goes on from its checkpoint.
"""

from absl import flags

from configs.errors import RequestError, require
from tools.launch import estimate
from tools.launch import gke as launch_gke
from tools.launch import job as job_lib
from tools.launch import pods, programs
from tools.sweep import ledger

STOPPED = job_lib.STOPPED
RUN_FAILED = 3  # a runner's exit code: it has done its part, and a run failed
# Of the flags of `tools.launch gke`, those that a runner, a single process in a
# single pod, has no use for.
_NOT_OURS = ('nodes', 'slices', 'tail', 'plan', 'logs', 'profile_steps',
             'allow_config_change', 'dry_run')
# Kubernetes wants a limit of failed indices beyond.
MOST_JOBS = 10_000


def parse(options: str) -> flags.FlagValues:
  """Returns the flags of 'image=IMAGE,pvc=CLAIM:/PATH,spot', as `tools.launch
  gke` has them.

  Raises:
    RequestError: for one that is none, or that makes no pod for a runner.
  """
  args = flags.FlagValues()
  job_lib.define(job_lib.FLAGS + launch_gke.FLAGS, args)
  words = [f'--{option}' for option in filter(None, options.split(','))]
  try:
    args(['gke', *words])
  except flags.Error as error:
    raise RequestError(f'--gke is {options!r}: '
                       f'{" ".join(str(error).split())}') from error
  wrong = [name for name in _NOT_OURS if args[name].present]
  require(not wrong, f'--gke has {", ".join(wrong)}, and each runner is a '
          'process in a pod of its own: leave it out; --jobs says how many')
  require(bool(args.image), '--gke names no image: write image=IMAGE, with '
          'this repository as its working directory')
  require(bool(args.pvc), '--gke names no volume: write pvc=CLAIM:/PATH, for '
          'the ledger needs a folder that all runners mount')
  require(not (args.gpu and args.topology), '--gke has gpu and topology: pass '
          'one of them, or none to train on CPUs')
  job_lib.check_restarts(args)
  pods.check(args)
  estimate.check(args)
  if args.topology:
    count = pods.hosts(args)[0]
    require(count == 1, f'--gke has topology={args.topology}, which is '
            f'{count} hosts, and a runner is one process: choose a slice of '
            'one host, as v5e:2x2')
  return args


def manifest(words: list[str], workdir: str, jobs: int, args) -> dict:
  """Returns the Job.

  Args:
    words: the command of a runner, from `run` on.
    workdir: of the sweep, below the path of --pvc.
    jobs: how many runners.
    args: as `parse` returns them.
  """
  require(jobs <= MOST_JOBS,
          f'--jobs is {jobs}: choose {MOST_JOBS:,} or less on GKE')
  claim, path = pods.volume(args)
  env = job_lib.environment(args, f'{workdir}/jax_cache')
  job_lib.require_mounted('--workdir', workdir, path)
  job_lib.require_mounted('compile_cache', env['JAX_COMPILATION_CACHE_DIR'],
                          path)
  if args.gpu:  # that --parallel programs share out
    env['CUDA_VISIBLE_DEVICES'] = ','.join(map(str, range(pods.gpu(args)[1])))
  command = ['python', '-u', '-m', 'tools.sweep', *words, '--runner']
  annotations = {}
  if args.queue and jobs > 1:  # Kueue may begin with fewer runners
    annotations['kueue.x-k8s.io/job-min-parallelism'] = '1'
  return {
      'apiVersion': 'batch/v1', 'kind': 'Job',
      'metadata': {
          'name': job_lib.named(workdir, claim), 'namespace': args.namespace,
          'labels': pods.labels(args), 'annotations': annotations},
      'spec': {
          'parallelism': jobs, 'completions': jobs, 'completionMode': 'Indexed',
          'backoffLimitPerIndex': args.max_restarts,
          'podReplacementPolicy': 'Failed',  # not while the old one still saves
          'podFailurePolicy': {'rules': _rules()},
          'template': pods.pod(command, pods.environment(env) + _who(), args)}}


def _who() -> list[dict]:
  """Returns what tells the ledger who a runner is; Kubernetes adds its index,
  as ledger.INDEX."""
  return [pods.field(ledger.POD, 'metadata.name'),
          pods.field(ledger.JOB, "metadata.labels['batch.kubernetes.io/"
                     "controller-uid']")]


def _rules() -> list[dict]:
  """Returns what the end of a pod means; the first rule that matches counts,
  and what none matches is a failure of this index."""
  def exits(action: str, code: int) -> dict:
    return {'action': action, 'onExitCodes': {
        'containerName': pods.CONTAINER, 'operator': 'In', 'values': [code]}}
  return [
      # Preempted or drained: started again, and not counted.
      {'action': 'Ignore', 'onPodConditions': [
          {'type': 'DisruptionTarget', 'status': 'True'}]},
      exits('Ignore', STOPPED),
      exits('FailJob', 2),  # a wrong request is wrong for every runner
      exits('FailIndex', RUN_FAILED)]


def submit(made: dict) -> None:
  """Gives the Job to the cluster."""
  import yaml
  name, namespace = made['metadata']['name'], made['metadata']['namespace']
  programs.need('kubectl')
  delete = f'kubectl delete job {name} -n {namespace}'
  # Not apply, which would change a Job of this name that is there already.
  print(programs.ask(
      ['kubectl', 'create', '-f', '-'], yaml.safe_dump(made, sort_keys=False),
      f'where {name} exists already, this workdir has a Job: {delete} ends it, '
      'and the same command goes on with what it left'), end='')
  print(f'to see the runners: kubectl logs -n {namespace} --prefix -f '
        f'-l batch.kubernetes.io/job-name={name}\nto end it: {delete}')


def dry_run(made: dict, description: dict, args) -> str:
  """Returns the manifest, the memory of the largest point, and the cost."""
  import yaml
  spec = made['spec']
  runs = sum(len(point['seeds']) for point in description['points'])
  largest = max(description['points'], key=lambda p: p['bytes_per_device'])
  peak = largest['bytes_per_device'] / 2 ** 30
  lines = [f'{spec["completions"]} runners for {runs} runs; a device needs '
           f'about {peak:,.1f} GiB at its peak, by an estimate, for the point '
           f'{largest["name"]!r}']
  if args.gpu or args.topology:
    lines += estimate.cost(spec['completions'] * pods.hosts(args)[1],
                           args.hours, args.price)
  return (yaml.safe_dump(made, sort_keys=False)
          + '# would be given to: kubectl create -f -\n'
          + '\n'.join(f'# {line}' for line in lines))
