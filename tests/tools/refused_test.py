"""What the tools refuse of their command lines, before any work: a case for
each sentence."""

import pytest

from tests.helpers import programs

GPT = '--config=configs/gpt.py:tiny'
PLAN = ['tools.plan', GPT, '--topology=v5e:2x2']
LAUNCH = ['tools.launch', 'local']
PACKAGES = ('tools.compare', 'tools.launch', 'tools.plan', 'tools.probes')

REFUSED = [
    (['tools.chat'], 'pass either --workdir DIR, the folder of a run, or'),
    (['tools.chat', '--workdir=a', '--folder=b'], 'pass either --workdir DIR'),
    (['tools.chat', '--folder=b', '--step=3'], 'b is no run: it has no --step'),
    (['tools.count'], 'pass --config FILE.py:SIZE, or --all'),
    (['tools.count', '--all', GPT], 'pass --config FILE.py:SIZE, or --all'),
    (['tools.count', '--all', '--length=8'], 'pass --config FILE.py:SIZE, or'),
    (['tools.explain_sharding'], 'pass --config FILE.py:SIZE'),
    (['tools.explain_sharding', GPT, '--mesh=context=99999'],
     'a mesh of 99,999 devices is asked for: choose one of '),
    (LAUNCH, 'pass both --config FILE.py:SIZE and --workdir DIR'),
    ([*LAUNCH, GPT], 'pass both --config FILE.py:SIZE and --workdir DIR'),
    ([*LAUNCH, GPT, '--workdir=a', '--logs=gs://b/c'],
     "--logs is 'gs://b/c': choose a folder on disk"),
    (['tools.plan', GPT], 'pass both --config FILE.py:SIZE and --topology'),
    (['tools.plan', '--topology=v5e:2x2'], 'pass both --config FILE.py:SIZE'),
    ([*PLAN, '--search=3', '--mesh=fsdp=4'], '--search chooses the mesh, and'),
    ([*PLAN, '--search=3', '--programs=prefill'], '--search chooses the mesh'),
    ([*PLAN, '--programs='], '--programs names none: choose from train'),
    (['tools.probes', 'run', '--workdir=a'], 'write run CONFIG --workdir DIR'),
    (['tools.probes', 'run', 'configs/gpt.py'], 'write run CONFIG --workdir'),
    (['tools.compare', 'run', 'a.py', '--milestones',
      '--launcher=slurm', '--workdir=a'],
     '--milestones is of --launcher=local, which is slurm'),
    (['tools.compare', 'report'], 'say once which workdir: WORKDIR, or --work'),
    (['tools.compare', 'report', 'a', '--workdir=a'], 'say once which workdir'),
    (['tools.compare', 'fit', 'a', '--budgets=1e3,x'],
     "--budgets is '1e3,x': write numbers of FLOPs"),
    (['tools.compare', 'fit', 'a', '--budgets=1e3,0'],
     "--budgets is '1e3,0': a budget must be > 0"),
    (['tools.compare', 'fit', 'a', '--budgets=inf'],
     "--budgets is 'inf': a budget must be > 0"),
    (['train'], 'pass both --config FILE.py:SIZE and --workdir DIR'),
    (['train', GPT], 'pass both --config FILE.py:SIZE and --workdir DIR'),
    (['train', '--workdir=a'], 'pass both --config FILE.py:SIZE and --work'),
    (['eval'], 'pass --workdir DIR, the folder of a run'),
    (['eval', '--workdir=a', '--tasks='], "--tasks is '', so nothing is"),
    (['eval', '--workdir=a', '--tasks=samples', '--stride=3'],
     '--stride is read by loss alone: add it to --tasks'),
    (['eval', '--workdir=a', '--tasks=samples', '--text=text:b'],
     "--text is 'text:b', which samples would not read"),
    (['eval', '--workdir=a', 'b'], "unexpected argument 'b': every setting"),
]


@pytest.mark.parametrize('words, sentence', REFUSED)
def test_a_wrong_command_line_is_one_sentence(words, sentence):
  program, *arguments = words
  if program in PACKAGES:
    program += '.__main__'
  code, text = programs.run(program, arguments)
  assert code == 2, text
  assert sentence and sentence in text.splitlines()[-1], text
