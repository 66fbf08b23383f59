"""Router x capacity of a small mixture of experts, beside its dense twin.

Lab note. The base is dense. Each mixture has 4 experts in every layer, of a
width that makes a token cost what it costs the base: half of d_ff where a
token has two experts, all of it where it has one. So what differs is the
parameters that do not work for a token, and who chooses. Capacity 0 drops
nothing; evaluation never does. expert_choice is left out: in a decoder its
choice for a token depends on later ones. sigmoid balances by its bias alone,
topk, sinkhorn and switch by Switch's loss. Each run owes the task of routing.
One run takes a good minute on one CPU core.
"""

from configs.sweeps import helpers

TASKS = ('routing',)
_CAPACITIES = (0.0, 1.0)
# Router: experts of a token.
_ROUTERS = {'topk': 2, 'sigmoid': 2, 'sinkhorn': 2, 'switch': 1, 'hash': 1}


def get_config():
  c = helpers.small_gpt_config(400, every=50, batches=32)
  c.model.d_ff = 256
  c.model.moe.update(num_experts=4, ffn='gelu_tanh')
  return c


def sweep(add):
  add('dense')
  for router, experts in _ROUTERS.items():
    for capacity in _CAPACITIES:
      add(f'{router}-{f"capacity={capacity}" if capacity else "dropless"}', **{
          'model.ffn': 'moe', 'model.moe.router': router,
          'model.moe.top_k': experts, 'model.moe.d_ff': 256 // experts,
          'model.moe.capacity_factor': capacity,
          'model.moe.balance_loss': (
              'none' if router in ('sigmoid', 'hash') else 'switch')})
