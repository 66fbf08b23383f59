"""The bound of a plan: its arithmetic, by hand counts."""

from configs import gpt
from configs.errors import RequestError
import jax
import pytest

from tests.tools.plan.plan_test import small
from tools.plan import analyse, chips
from tools.plan import roofline, search


def test_a_precision_without_a_published_peak_is_refused():
  config, t = small(gpt.get_config()), chips.parse('v5p:2x2x2')
  config.model.dtype = 'float32'
  with jax.default_matmul_precision('highest'):
    for ask in (lambda: analyse.run_on(config, t, 'dp'),
                lambda: search.candidates(config, t)):
      with pytest.raises(RequestError, match="PRECISION is 'highest'.*float32"):
        ask()
    assert roofline.peak_flops(t, 'bfloat16') == 459e12
