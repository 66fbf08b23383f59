"""tools.tokenize as an array of jobs: what SLURM is given."""

import re
import shlex
import sys

import pytest

from configs.errors import RequestError
from tools.compare import slurm_array
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


def test_what_is_documented_for_clusters_is_taken(capsys):
  text = re.sub(r'\\\n\s*', ' ', command.__doc__)
  documented = re.findall(r'python -m tools.tokenize (.* --launcher .*)', text)
  assert len(documented) == 1
  for words in documented:
    assert command.main([*shlex.split(words), '--dry_run']) == 0


@pytest.mark.parametrize('words, sentence', [
    (['--dry_run'], '--dry_run is for --launcher=slurm, and --launcher '
     'is here'),
    (['--slurm='], '--slurm is for --launcher=slurm'),
    (['--launcher=slurm', '--job=0'], '--job is for --launcher=here'),
    (['--verify'], '--verify reads .*: leave --tokenizer, --holdout_every, '
     '--shard_mib, --processes, --jobs out'),
    (['--verify', '--launcher=here'], 'leave .*, --launcher out')])
def test_a_flag_that_is_not_read_is_refused(words, sentence, monkeypatch):
  for name in ('tokenise', 'verify'):
    monkeypatch.setattr(work, name, lambda _: pytest.fail('it worked'))
  with pytest.raises(RequestError, match=sentence):
    command.main([*WORDS, *words])
