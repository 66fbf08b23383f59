"""tools.tokenize as an array of jobs: what SLURM and Kubernetes are given."""

import re
import shlex
import sys

import pytest
import yaml

from configs.errors import RequestError
from tools import slurm_array
from tools.tokenize import __main__ as command
from tools.tokenize import work

WORDS = ['hf:a b:en$(x)', '--out', 'gs://bucket/c', '--tokenizer', 'bytes:64',
         '--holdout_every=7', '--shard_mib=9', '--processes=0', '--jobs=5']


def test_each_job_of_slurm_is_told_which_it_is(monkeypatch, capsys):
  submitted = []
  monkeypatch.setattr(slurm_array, 'submit',
                      lambda *args: submitted.append(args))
  words = [*WORDS, '--launcher=slurm', '--slurm=slurm_partition=cpu']
  assert command.main([*words, '--dry_run']) == 0 and not submitted
  assert command.main(words) == 0
  (commands, folder, options, name), = submitted
  assert (options, name) == ('slurm_partition=cpu', 'tokenize')
  assert str(folder).startswith('logs/tokenize-c-')
  assert [line[-2:] for line in commands] == [
      ['--job', str(i)] for i in range(5)]
  line = commands[0]
  assert line[:4] == [sys.executable, '-m', 'tools.tokenize', 'hf:a b:en$(x)']
  assert shlex.join(line) in capsys.readouterr().out
  # As a job reads it.
  args = command._parser().parse_args(line[3:])
  assert (args.tokenizer, args.holdout_every, args.shard_mib, args.processes,
          args.jobs, args.job, args.launcher) == (
              'bytes:64', 7, 9, 0, 5, 0, 'here')


def test_an_array_runs_on_submitit(tmp_path):
  pytest.importorskip('submitit')
  commands = [[sys.executable, '-c', f'open({str(tmp_path / name)!r}, "w")']
              for name in 'ab']
  jobs = slurm_array.submit(commands, tmp_path / 'logs', 'timeout_min=2', 'x',
                            'local')
  assert [job.result() for job in jobs] == [0, 0]
  assert (tmp_path / 'a').exists() and (tmp_path / 'b').exists()


def test_gke_is_given_an_indexed_job(capsys):
  words = [*WORDS, '--launcher=gke', '--image=I', '--queue=q', '--cpu=8',
           '--pvc=claim:/data', '--service_account=me', '--dry_run']
  assert command.main(words) == 0
  job = yaml.safe_load(capsys.readouterr().out)
  spec = job['spec']
  assert (job['apiVersion'], job['kind']) == ('batch/v1', 'Job')
  assert job['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'}
  assert (spec['completions'], spec['parallelism'],
          spec['completionMode']) == (5, 5, 'Indexed')
  pod = spec['template']['spec']
  container, = pod['containers']
  assert container['command'][:4] == [
      'python', '-m', 'tools.tokenize', 'hf:a b:en$$(x)']
  assert '--job' not in container['command']  # JOB_COMPLETION_INDEX says it
  assert container['resources'] == {'requests': {'cpu': '8'}}
  assert pod['restartPolicy'] == 'Never'
  assert pod['serviceAccountName'] == 'me'
  assert container['volumeMounts'] == [{'name': 'shared', 'mountPath': '/data'}]


def test_what_is_documented_for_clusters_is_taken(capsys):
  text = re.sub(r'\\\n\s*', ' ', command.__doc__)
  documented = re.findall(r'python -m tools.tokenize (.* --launcher .*)', text)
  assert len(documented) == 2
  for words in documented:
    assert command.main([*shlex.split(words), '--dry_run']) == 0


@pytest.mark.parametrize('words, sentence', [
    (['--image='], 'pass --image'),
    (['--image=I', '--pvc=claim'], '--pvc is .claim.: write CLAIM:/PATH'),
    (['--image=I', '--pvc=BAD NAME:/data'], "--pvc is 'BAD NAME:/data'"),
    (['--image=I', '--cpu=abc'], "--cpu is 'abc': write an amount"),
    (['--image=I', '--memory', '-3'], "--memory is '-3': write an amount"),
    (['--image=I', '--namespace=A B'], "--namespace is 'A B'"),
    (['--image=I', '--service_account=x y'], "--service_account is 'x y'"),
    (['--image=I', '--queue=QUEUE'], "--queue is 'QUEUE'"),
    (['--image=a b'], '--image is .a b.'),
    (['--image=I', '--out=/a'], '--out is ./a., and every pod'),
    (['--image=I', '--out=/a', '--pvc=c:/b'], '--out is ./a., and every pod')])
def test_what_pods_would_not_find_is_refused(words, sentence):
  with pytest.raises(RequestError, match=sentence):
    command.main([*WORDS, '--launcher=gke', '--dry_run', *words])


@pytest.mark.parametrize('words, sentence', [
    (['--dry_run'], '--dry_run is for --launcher=slurm or gke, and --launcher '
     'is here'),
    (['--image=I'], '--image is for --launcher=gke'),
    (['--slurm='], '--slurm is for --launcher=slurm'),
    (['--launcher=slurm', '--pvc=c:/d'], '--pvc is for --launcher=gke, and '
     '--launcher is slurm'),
    (['--launcher=gke', '--logs=logs'], '--logs is for --launcher=slurm'),
    (['--launcher=gke', '--job=0'], '--job is for --launcher=here'),
    (['--verify'], '--verify reads .*: leave --tokenizer, --holdout_every, '
     '--shard_mib, --processes, --jobs out'),
    (['--verify', '--launcher=here'], 'leave .*, --launcher out')])
def test_a_flag_that_is_not_read_is_refused(words, sentence, monkeypatch):
  for name in ('tokenise', 'verify'):
    monkeypatch.setattr(work, name, lambda _: pytest.fail('it worked'))
  with pytest.raises(RequestError, match=sentence):
    command.main([*WORDS, *words])
