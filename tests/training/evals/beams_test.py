"""--beams of eval.py: the texts are those of training/generate.py."""

import pytest

from configs.errors import RequestError
from tests.helpers import evaluations
from training import evals


@pytest.mark.parametrize('task, options, said', [
    ('samples', dict(beams=2, temperature=0.5), 'leave out the flags'),
    ('samples', dict(beams=2, top_k=3), 'leave out the flags'),
    ('samples', dict(beams=2, sample_seed=3), 'leave out the flags'),
    ('samples', dict(beams=2, samples=3), '--samples is 3.*--beams=2'),
    ('samples', dict(penalty='none'), "penalty.*'none'.*gnmt"),
    ('samples', dict(penalty='power'), "--penalty is 'power', .* --beams"),
    ('exact', dict(length_penalty=1.0), '--length_penalty is 1.0, .* --beams'),
    ('exact', dict(early_stopping=True), '--early_stopping is True, .*--beams'),
    ('exact', dict(beams=2, length_penalty=99.0), 'length_penalty is 99.0')])
def test_what_cannot_be_searched_is_refused(task, options, said):
  with pytest.raises(RequestError, match=said):
    evals.TASKS[task].check(evaluations.flags(**options))
  evals.TASKS[task].check(evaluations.flags(beams=2, temperature=0.0))
