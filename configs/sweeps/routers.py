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
_CAPACITY_FACTORS = (0.0, 1.0)
_EXPERTS_OF_TOKEN_BY_ROUTER = {
    'topk': 2, 'sigmoid': 2, 'sinkhorn': 2, 'switch': 1, 'hash': 1}
_ROUTERS_WITHOUT_LOSS = ('sigmoid', 'hash')  # that balance experts otherwise


def get_config():
  config = helpers.small_gpt_config(400, eval_every=50, eval_batches=32)
  config.model.d_ff = 256
  config.model.moe.update(num_experts=4, ffn='gelu_tanh')
  return config


def sweep(add):
  """Adds the dense base, and a mixture of experts for each router, without and
  with a capacity (a limit on the tokens of an expert).

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('dense')
  for router, experts_of_token in _EXPERTS_OF_TOKEN_BY_ROUTER.items():
    balance_loss = 'switch'
    if router in _ROUTERS_WITHOUT_LOSS:
      balance_loss = 'none'
    for capacity in _CAPACITY_FACTORS:
      name = f'{router}-dropless'
      if capacity:
        name = f'{router}-capacity={capacity}'
      add(name, **{
          'model.ffn': 'moe',
          'model.moe.router': router,
          'model.moe.top_k': experts_of_token,
          # A token costs what it costs the dense base, whose width is 256.
          'model.moe.d_ff': 256 // experts_of_token,
          'model.moe.capacity_factor': capacity,
          'model.moe.balance_loss': balance_loss})
