"""What the layers of a stack report, put together in their order."""

from typing import Any

import jax
import jax.numpy as jnp

from configs.errors import require


def take_weights(caches: tuple) -> tuple[dict, tuple]:
  """Returns the attention weights that the layers put into their caches,
  [N, B, H, L, M] by name, in the layers' order; and the caches without.
  `caches` has a tuple for each section of the stack."""
  names = {'attention': 'weights_BHLM',
           'cross_attention': 'memory_weights_BHLM'}
  found = {}
  for name, field in names.items():
    if getattr(caches[0][0], field) is None:
      continue
    blocks = [[getattr(entry, field) for entry in cache] for cache in caches]
    heads_of = {w.shape[-3] for section in blocks for w in section}
    require(len(heads_of) == 1, 'attention weights are kept of layers with as '
            'many heads each, and model.kinds has layers of '
            f'{" and ".join(map(str, sorted(heads_of)))} heads')
    found[name] = _join([jnp.stack(section, 1).reshape(
        -1, *section[0].shape[1:]) for section in blocks])
  plain = dict.fromkeys(names.values())
  return found, tuple(tuple(entry.replace(**plain) for entry in cache)
                      for cache in caches)


def gather_aux(sections: tuple) -> dict:
  """Sums the layers' losses; stacks their health, and what they kept of their
  experts, in the layers' order.

  `sections` has for each section of the stack one entry a block of its period,
  whose leaves are [periods, ...].
  """
  sections = [[aux for aux in auxes if aux] for auxes in sections]
  auxes = [aux for section in sections for aux in section]
  if not auxes:
    return {}
  losses = jax.tree.map(lambda *xs: sum(x.sum() for x in xs),
                        *[aux['losses'] for aux in auxes])
  stacked = {name: jax.tree.map(lambda *xs: _join(xs), *[
      jax.tree.map(
          lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]),
          *[aux[name] for aux in section]) for section in sections if section])
             for name in ('health', 'experts') if name in auxes[0]}
  loads = {path: load_NE for aux in auxes
           for path, load_NE in aux['loads'].items()}
  return {'losses': losses, 'loads': loads} | stacked


def _join(parts: Any) -> jax.Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_losses(aux: dict, more: list[dict]) -> dict:
  """Returns what a stack reports, with the losses and the loads of layers
  beside it, of each as it reports them itself."""
  for own in more:
    aux = aux | {'losses': jax.tree.map(jnp.add, aux['losses'], own['losses']),
                 'loads': aux['loads'] | own['loads']}
  return aux
