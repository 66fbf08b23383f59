"""The equations of a traced program."""

from jax.extend.core import jaxprs_in_params


def equations(jaxpr):
  """Yields every equation of a jaxpr, those of its inner ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)
