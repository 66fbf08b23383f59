"""Gemma 4, dense and of text: `--config configs/gemma4.py:SIZE`.

Lab note. Google 2026: widths, heads, layers, windows and positions are those of
the text_config in the config.json of Gemma-4-31B, Gemma-4-E4B and Gemma-4-E2B.
Of their training nothing is set as published: batch, tokens and learning rate
are those of LLaMA 2, and rows have 4,096 tokens. The counts are those of
transformers' class of text, with a number for each layer that multiplies it,
which is a buffer there. In E2B, 2.3B parameters are tables of the layers, and
in E4B 2.8B.

`tiny` has windows of 128 in 256 tokens, in every other layer.
"""

from architectures import gemma4
from configs import base

LOCAL_ROPE = gemma4.ROPE_OF_LAYER_TYPE[gemma4.SLIDING]


def _layers_that_share_keys(num_with_keys: int, num_without_keys: int,
                            d_ff_without_keys: int, period: int) -> dict:
  """Returns the fields of the layers of the sizes e2b and e4b. The first layers
  compute keys and values, and the layers above them compute none: they attend
  to the keys and values of a layer below.

  Args:
    num_with_keys: how many layers compute keys and values.
    num_without_keys: how many layers do not.
    d_ff_without_keys: the hidden units of the feed-forward networks of the
      layers that compute no keys.
    period: one layer in so many has global attention; the others have a window.

  Returns:
    The fields of config.model, by name.
  """
  # The last layer of each period has global attention.
  kinds_of_period = ['local'] * (period - 1) + ['global']
  kinds_without_keys = [kind + '_shared' for kind in kinds_of_period]
  num_periods_with_keys = num_with_keys // period

  local_layer = dict(window=512, rope=LOCAL_ROPE)
  global_layer = dict(window=0, head_dim=512)
  without_keys = dict(kv_sharing=True, d_ff=d_ff_without_keys)
  return dict(
      num_layers=num_with_keys + num_without_keys,
      # The kinds of the first layers, and the kinds that the others repeat.
      prefix=','.join(kinds_of_period * num_periods_with_keys),
      pattern=','.join(kinds_without_keys),
      kinds={
          'local': local_layer,
          'global': global_layer | dict(keys_as_values=False),
          'local_shared': local_layer | without_keys,
          'global_shared': global_layer | without_keys})


SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff parameters',
    rows={'31b': (5376, 60, 32, 16, 256, 21504, 30_697_345_340)},
    max_len=262_144, vocab_size=262_144,
    pattern='local,local,local,local,local,global', kinds={
        'local': dict(window=1024),
        'global': dict(num_kv_heads=4, head_dim=512)})
SIZES |= base.table_of_sizes(
    'd_model num_kv_heads d_ff parameters', rows={
        'e2b': (1536, 1, 6144, 4_628_569_379),
        'e4b': (2560, 2, 10240, 7_463_013_418)},
    num_heads=8, head_dim=256, max_len=131_072, vocab_size=262_144,
    memory='per_layer', per_layer=dict(size=256))
SIZES['e2b'] |= _layers_that_share_keys(
    num_with_keys=15, num_without_keys=20, d_ff_without_keys=2 * 6144, period=5)
SIZES['e4b'] |= _layers_that_share_keys(
    num_with_keys=24, num_without_keys=18, d_ff_without_keys=10240, period=6)
SIZES['tiny'] = base.SMALL_DECODER | {
    'kinds.global.num_kv_heads': 1, 'kinds.global.head_dim': 64}

get_config = base.make_get_config(
    'gemma4', SIZES, dict(norm_eps=1e-6), length=4096)
