"""The models that are compared: small, random, of many shapes.

SYSTEMS[arch] names transformers' classes, the fields common to all cases and
those of each case. `kind` says how the model is called (compare.KINDS). To
record a case is to keep it for the tests that have no PyTorch.
"""

from typing import NamedTuple


class System(NamedTuple):
  """Attributes:
    config, model: the names of transformers' classes.
    kind: decoder, bert, encoder_decoder: what goes in and comes out.
    common: fields of the config.
    cases: further fields, by the name of the case.
  """
  config: str
  model: str
  kind: str
  common: dict
  cases: dict[str, dict]


NO_IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)

SYSTEMS = {
    'gpt': System(
        'GPT2Config', 'GPT2LMHeadModel', 'decoder',
        dict(vocab_size=61, n_embd=20, n_head=4, n_layer=2, n_positions=80,
             **NO_IDS),
        {
            'plain': {},
            'odd_heads': dict(n_head=5, n_layer=3, n_inner=24),
            'untied': dict(tie_word_embeddings=False, n_layer=1,
                           activation_function='gelu',
                           layer_norm_epsilon=1e-3),
        }),
}


def all_cases() -> list[tuple[str, str]]:
  """Returns every (system, case)."""
  return [(system, case) for system, row in SYSTEMS.items()
          for case in row.cases]
