"""What Kubernetes does with an indexed Job, after its documentation ('Jobs' and
'Pod failure policy'): a pod for each index, started again by the first rule
that matches how it ended, or else as long as backoffLimitPerIndex allows."""

import os
import signal
import subprocess
import time


class IndexedJob:
  """Runs a Job's pods as processes of this machine, until `wait` returns.

  Attributes:
    starts: how often each index was started.
    failures: of each index, those that counted.
    ended: the state of each index that has ended: complete or failed.
  """

  def __init__(self, manifest: dict, command=None, env=None):
    """`command` makes of a container's words those that are run; `env` is
    added to the environment."""
    self._spec = manifest['spec']
    self._name = manifest['metadata']['name']
    self._container, = self._spec['template']['spec']['containers']
    self._command = command or (lambda words: words)
    self._env = env or {}
    count = self._spec['completions']
    assert self._spec['parallelism'] == count
    self.starts, self.failures = [0] * count, [0] * count
    self.ended: dict[int, str] = {}
    self.running: dict[int, subprocess.Popen] = {}
    self.disrupted: set[int] = set()
    for index in range(count):
      self._start(index)

  def _start(self, index: int) -> None:
    pod = f'{self._name}-{index}-{self.starts[index]:05d}'
    env = {'JOB_COMPLETION_INDEX': str(index)}
    for item in self._container['env']:
      if 'value' in item:
        env[item['name']] = item['value'].replace('$$', '$')
      else:
        env[item['name']] = {
            'metadata.name': pod,
            "metadata.labels['batch.kubernetes.io/controller-uid']": self._name,
        }[item['valueFrom']['fieldRef']['fieldPath']]
    words = [word.replace('$$', '$') for word in self._container['command']]
    self.starts[index] += 1
    self.running[index] = subprocess.Popen(
        self._command(words), env=os.environ | env | self._env)

  def preempt(self, index: int) -> None:
    """As a drained node or a preemption does: SIGTERM, and a condition."""
    self.disrupted.add(index)
    self.running[index].send_signal(signal.SIGTERM)

  def action(self, code: int, disrupted: bool) -> str:
    """Returns that of the first rule that matches, or Count."""
    for rule in self._spec['podFailurePolicy']['rules']:
      if any(condition == {'type': 'DisruptionTarget', 'status': 'True'}
             for condition in rule.get('onPodConditions', [])) and disrupted:
        return rule['action']
      exits = rule.get('onExitCodes')
      if exits and (code in exits['values']) == (exits['operator'] == 'In'):
        return rule['action']
    return 'Count'

  def step(self) -> None:
    for index, process in list(self.running.items()):
      code = process.poll()
      if code is None:
        continue
      del self.running[index]
      action = self.action(code if code >= 0 else 128 - code,
                           index in self.disrupted) if code else 'Complete'
      self.disrupted.discard(index)
      self.failures[index] += action == 'Count'
      if action == 'Complete':
        self.ended[index] = 'complete'
      elif action == 'FailJob':
        self.close()
        self.ended = dict.fromkeys(range(len(self.starts)), 'failed')
        return
      elif action == 'FailIndex' or (
          self.failures[index] > self._spec['backoffLimitPerIndex']):
        self.ended[index] = 'failed'
      else:
        self._start(index)

  def wait(self, seconds: float, until=lambda job: False) -> None:
    """Waits until every index has ended, or `until` is so."""
    end = time.monotonic() + seconds
    while len(self.ended) < len(self.starts) and not until(self):
      assert time.monotonic() < end, f'{self.starts} {self.ended}'
      self.step()
      time.sleep(0.05)

  def close(self) -> None:
    for process in self.running.values():
      process.kill()
      process.wait()
    self.running = {}
