"""The manifest of a run on GKE: a JobSet, and when it is started again."""

from tools.launch import job as job_lib
from tools.launch import pods

PORT = 8476


def jobset(job: job_lib.Job, args) -> dict:
  """Returns the manifest."""
  job_lib.require_shared(job, 'a bucket (gs://BUCKET/NAME), or a path under '
                         'that of --pvc', pods.volume(args)[1])
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {
          'name': job.name, 'namespace': args.namespace,
          'labels': pods.labels(args),
          # Each slice has a node pool for itself.
          'annotations': {} if args.gpu else {
              'alpha.jobset.sigs.k8s.io/exclusive-topology':
                  'cloud.google.com/gke-nodepool'}},
      'spec': {
          'failurePolicy': {
              'maxRestarts': job.max_restarts, 'rules': _jobset_rules()},
          'network': {'enableDNSHostnames': True,
                      'publishNotReadyAddresses': True},
          'replicatedJobs': [{
              'name': 'slice', 'replicas': 1 if args.gpu else args.slices,
              'template': {'spec': _job_spec(job, args)}}]}}


# Of a Job, by exit code; what no rule matches is a failure like any other.
_POD_RULES = (
    {'action': 'FailJob', 'onExitCodes': {
        'containerName': pods.CONTAINER, 'operator': 'In', 'values': [2]}},
    {'action': 'FailJob', 'onExitCodes': {
        'containerName': pods.CONTAINER, 'operator': 'In',
        'values': [job_lib.STOPPED]}},
    {'action': 'FailJob', 'onPodConditions': [
        {'type': 'DisruptionTarget', 'status': 'True'}]},
)


def _jobset_rules() -> list[dict]:
  """Returns what a failed Job means, told by the rule above that matched."""
  return [
      {'name': 'wrongRequest', 'action': 'FailJobSet',
       'onJobFailureReasons': ['PodFailurePolicy'],
       'onJobFailureMessagePatterns': ['matching FailJob rule at index 0$']},
      {'name': 'preempted', 'action': 'RestartJobSetAndIgnoreMaxRestarts',
       'onJobFailureReasons': ['PodFailurePolicy'],
       'onJobFailureMessagePatterns': [
           'matching FailJob rule at index [12]$']}]


def _job_spec(job: job_lib.Job, args) -> dict:
  hosts = pods.hosts(args)[0]
  command = [*job.words, *([] if args.gpu else ['--cluster'])]
  env = pods.environment(job.env) + (_gpu_env(job, hosts) if args.gpu else [])
  return {'parallelism': hosts, 'completions': hosts,
          'completionMode': 'Indexed', 'backoffLimit': 0,
          'podFailurePolicy': {'rules': list(_POD_RULES)},
          'template': pods.pod(command, env, args)}


def _gpu_env(job: job_lib.Job, hosts: int) -> list[dict]:
  """Returns who a pod is; TPU pods hear it from GKE (--cluster)."""
  return [
      pods.field('POD_IP', 'status.podIP'),
      pods.field('JAX_PROCESS_ID', "metadata.annotations['batch.kubernetes.io/"
                 "job-completion-index']"),
      {'name': 'JAX_NUM_PROCESSES', 'value': str(hosts)},
      {'name': 'JAX_COORDINATOR_ADDRESS',
       'value': f'{job.name}-slice-0-0.{job.name}:{PORT}'},
      # Its own name may not be known yet when process 0 listens on it.
      {'name': 'JAX_COORDINATOR_BIND_ADDRESS', 'value': f'$(POD_IP):{PORT}'}]
