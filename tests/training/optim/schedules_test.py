"""Learning rates by hand, and what a schedule refuses."""

import numpy as np
import pytest

from configs import base
from training.optim import schedules


def optim(**fields):
  config = base.base().optim
  config.update(fields)
  return config


# Rate at updates 1, 5, 10, 55, 100 and past the end, of 100, lr 2, warm-up 10.
@pytest.mark.parametrize('fields, rates', [
    (dict(schedule='constant'), (0.2, 1.0, 2.0, 2.0, 2.0, 2.0)),
    (dict(schedule='linear', final_fraction=0.0),
     (0.2, 1.0, 2.0, 1.0, 0.0, 0.0)),
    (dict(schedule='linear', final_fraction=0.5),
     (0.2, 1.0, 2.0, 1.5, 1.0, 1.0)),
    (dict(schedule='cosine', final_fraction=0.1),
     (0.2, 1.0, 2.0, 1.1, 0.2, 0.2)),
    (dict(schedule='cosine', final_fraction=0.1, decay_steps=55),
     (0.2, 1.0, 2.0, 0.2, 0.2, 0.2)),
    (dict(schedule='rsqrt'),
     (0.2, 1.0, 2.0, 0.852803, 0.632456, 0.447214)),
    (dict(schedule='wsd', decay_fraction=0.9, final_fraction=0.0),
     (0.2, 1.0, 2.0, 1.0, 0.0, 0.0)),
    (dict(schedule='wsd', decay_fraction=0.45, final_fraction=0.1),
     (0.2, 1.0, 2.0, 2.0, 0.2, 0.2)),
])
def test_schedules_by_hand(fields, rates):
  rate = schedules.rate(optim(lr=2.0, warmup_steps=10, **fields), 100)
  got = [float(rate(t - 1)) for t in (1, 5, 10, 55, 100, 200)]
  np.testing.assert_allclose(got, rates, rtol=1e-5, atol=1e-7)
