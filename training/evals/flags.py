"""What evaluations can be told: their flags, for eval.py and for sweeps."""

from absl import flags

flags.disclaim_key_flags()  # what is defined here belongs to who calls


def define() -> None:
  """Defines the flags of all tasks."""
  flags.DEFINE_integer('samples', 1, 'Texts to write for each prompt.',
                       lower_bound=1, upper_bound=10_000)
  flags.DEFINE_string('prompt', '',
                      "What a text begins with; several: 'A|||B'.")
  flags.DEFINE_integer('max_new_tokens', 0,
                       'Tokens to write; 0: what fits, 256 at most.',
                       lower_bound=0, upper_bound=2**24)
  flags.DEFINE_float('temperature', 1.0, '0: the likeliest token.')
  flags.DEFINE_integer('top_k', 0, 'Draw of the k likeliest tokens; 0: all.',
                       lower_bound=0, upper_bound=2**26)
  flags.DEFINE_float('top_p', 1.0, 'Draw of the likeliest that reach p.')
  flags.DEFINE_integer('sample_seed', 0, 'Of the draws.', lower_bound=0,
                       upper_bound=2**32 - 1)
  flags.DEFINE_bool('interpolate', False, 'extrapolation: stretch learned '
                    'positions past max_len.')
