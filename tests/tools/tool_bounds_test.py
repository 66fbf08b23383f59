"""Numbers that a tool cannot honour are refused before it does any work."""

import pytest

from tests.helpers import forked

HUGE = 10**20


@pytest.mark.parametrize('words', [
    ('-m', 'tools.plan', '--config', 'configs/gpt.py', '--topology=v5p:2x2x1',
     f'--search={HUGE}'),
    ('-m', 'tools.sweep', 'fit', '{}', f'--draws={HUGE}'),
    ('-m', 'tools.sweep', 'fit', '{}', '--draws=39'),
    ('-m', 'tools.convert', 'import', '{}', '{}/run', f'--seed={HUGE}'),
    ('-m', 'tools.convert', 'export', '{}', '{}/out', '--shard_bytes=0'),
    ('-m', 'tools.launch', 'local', '--config', 'configs/gpt.py',
     '--workdir={}/run', f'--max_restarts={HUGE}'),
    ('-m', 'benchmarks.step', '--pairs=-1'),
], ids=lambda words: ' '.join(words[1:3]))
def test_a_number_out_of_bounds_is_a_sentence(words, tmp_path):
  result = forked.run(*(word.format(tmp_path) for word in words))
  name = words[-1].split('=')[0].lstrip('-')
  assert result.returncode == 2, result.stderr
  assert name in result.stderr.splitlines()[-1]
  assert 'Traceback' not in result.stderr
  assert not list(tmp_path.iterdir())
