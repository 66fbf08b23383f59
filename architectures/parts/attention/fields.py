"""The fields of plain attention (multi_head.py) and of latent attention
(latent.py), which other files read too."""

import dataclasses

from architectures.parts.sizes import Sizes
from common.fields import field, FUNCTION, MOST_TAPS, SHAPES, ReadIf


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """The fields that mixer attention reads and no other mixer does."""
  GROUP = 'plain_attention'  # whose names have no group before them
  attention_log_scale: float = field(
      0.0, 'How much queries grow with the logarithm of their position; 0: '
      'they do not.', least=0, resume=FUNCTION, of_layers=True)
  attention_log_from: int = field(
      8192, 'the position from which they grow', above=0, resume=FUNCTION)
  qk_norm: bool = field(False, 'a norm of queries and of keys', of_layers=True)
  qk_norm_over: str = field(
      'head', 'what it is over: a head, or the whole projection',
      choices=('head', 'projection'), of_layers=True)
  qk_norm_scale: bool = field(
      True, 'whether it is the norm of the model, with parameters; if not, '
      'rmsnorm_plain', of_layers=True)
  qk_clip: float = field(
      0.0, 'The greatest length of a query or a key, after a scale of each '
      'feature of a query; 0: there is none.', least=0, resume=FUNCTION,
      of_layers=True)
  attention_difference: float = field(
      0.0, 'How much of the second weights of a pair of heads is subtracted '
      'from the first at first; 0: heads are no pairs.', least=0, below=1,
      resume=FUNCTION, of_layers=True)
  attention_conv: int = field(
      0, 'Tokens that a convolution of queries, keys and values sees; 0: no '
      'convolution.', most=MOST_TAPS, resume=SHAPES, of_layers=True)
  dynamic_conv: int = field(
      0, 'Tokens that a convolution of keys and values sees whose filters each '
      'token makes; 0: no such convolution.', most=MOST_TAPS, resume=SHAPES,
      of_layers=True)
  cca: bool = field(
      False, 'Convolutions of queries and keys, which are averaged with each '
      'other and normalised, and half of the values from the token before.',
      of_layers=True)
  cca_taps: int = field(
      2, 'Tokens that the convolution of each feature sees.', least=2,
      most=MOST_TAPS, resume=SHAPES)
  cca_head_taps: int = field(
      2, 'Tokens that the one of the features of each head sees.', least=2,
      most=MOST_TAPS, resume=SHAPES)
  value_residual: bool = field(
      False, "the first layer's values are mixed into all")
  value_embedding: bool = field(
      False, "a table of tokens is added to a layer's values", of_layers=True)
  value_norm: bool = field(
      False, 'a norm of each head of values, rmsnorm_plain', of_layers=True)
  keys_as_values: bool = field(
      False, 'values are the keys, before their norm and their positions',
      of_layers=True)
  key_offset: bool = field(
      False, 'The features of a key that the position encoding does not rotate '
      'are those of the token before.', of_layers=True)
  learned_log_scale: bool = field(
      False, 'A learned factor of the queries of each head, linear in the '
      'logarithm of their position.', of_layers=True)
  forget_gate: bool = field(
      False, 'A gate of each head, made of each token, that lowers the weights '
      'of all tokens before it.', of_layers=True)
  attention_exclusive: str = field(
      'none', "The part of a head's result along its token's own value that "
      'is removed: none, all of it, or a learned share of it.',
      choices=('none', 'all', 'learned'), of_layers=True)
  context_norm: bool = field(
      False, "A norm of each head's result, before its gate: rmsnorm_plain.",
      of_layers=True)
  kv_sharing: bool = field(
      False, 'A layer reads the keys and values of one before it: of a kind of '
      'layer.', of_layers=True)

  def conditions_of_reading(self, config: Sizes) -> dict[str, ReadIf]:
    """Returns the fields of this group that have no effect as the config
    stands, because another field switches them off. A user who sets such a
    field is refused by this list, and told what would make it count.

    Args:
      config: the config of the model, which is not read: each of these
        conditions is on another field of this group.

    Returns:
      A dict by the names of the fields without effect. A value names the field
      that switches this one off, and what that would have to be, as in
      {'cca_taps': ReadIf('cca', 'is set')}.
    """
    del config
    conditions: dict[str, ReadIf] = {}
    if not self.attention_log_scale:
      conditions['attention_log_from'] = ReadIf('attention_log_scale', 'is set')
    if not self.cca:
      for name in ('cca_taps', 'cca_head_taps'):
        conditions[name] = ReadIf('cca', 'is set')
    if not self.qk_norm:
      for name in ('qk_norm_over', 'qk_norm_scale'):
        conditions[name] = ReadIf('qk_norm', 'is set')
    # A layer that reads the keys and values of an earlier one makes none, so
    # nothing that changes its own keys and values is read.
    if self.kv_sharing:
      for name in ('value_residual', 'value_embedding', 'value_norm',
                   'keys_as_values', 'key_offset', 'forget_gate',
                   'dynamic_conv'):
        conditions[name] = ReadIf('kv_sharing', 'is False')
    return conditions


@dataclasses.dataclass(frozen=True)
class PathConfig:
  """The fields of position path (path.py)."""
  rank: int = field(
      32, 'Size of the vector that reflections are made from; 0: the '
      "layer's input.", resume=SHAPES)
  conv: int = field(
      3, 'Tokens that a convolution of them sees.', least=1, most=MOST_TAPS,
      resume=SHAPES)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
  """The fields of mixer latent. What is left open: in DeepSeek-V2 the latent
  has the size of 4 heads and the turned part that of half a head (section
  3.1.2); here it is even, too."""
  q_rank: int = field(
      0, 'Size of the vector that queries are made from; 0: the layer\'s '
      'input.', resume=SHAPES)
  kv_rank: int = field(
      0, 'Size of the vector that keys and values are made from; derived: '
      '4 head_dim.', resume=SHAPES)
  q_raw: bool = field(
      False, 'Queries, and the gate of the results of heads, are made of the '
      'vector of q_rank features both after its norm and before it.',
      resume=SHAPES)
  nope_dim: int = field(
      0, "Features of a head's query and key without positions; derived: "
      'head_dim.', resume=SHAPES)
  rope_dim: int = field(
      0, 'Features with positions, of a key that all heads share; derived: '
      'half of head_dim.', resume=SHAPES)
  v_dim: int = field(0, "size of a head's value; derived: head_dim",
                     resume=SHAPES)
  scale: float = field(
      0.0, 'The factor of the scores; derived: (nope_dim + rope_dim) ** -0.5.',
      least=0, resume=FUNCTION)
  norm_eps: float = field(
      0.0, "epsilon of the latents' norms; derived: norm_eps", least=0, most=1,
      resume=FUNCTION)

  def conditions_of_reading(self, config: Sizes) -> dict[str, ReadIf]:
    """Returns the field that has no effect where queries are made of the
    layer's input."""
    del config
    if self.q_rank:
      return {}
    return {'q_raw': ReadIf('latent.q_rank', 'is set')}

  @property
  def key_dim(self) -> int:
    """The size of a head's queries and keys."""
    return self.nope_dim + self.rope_dim

  @property
  def slot_dim(self) -> int:
    """The features that a cache holds of a token: the latent and the turned
    key."""
    return self.kv_rank + self.rope_dim

  def derived(self, config: Sizes) -> 'LatentConfig':
    """Returns the fields with those that were left open (0), which follow from
    the size of a head of the model."""
    # Read config.head_dim only for a field that is left open. Where none is,
    # nothing reads model.head_dim, and a user who sets it gets an error.
    nope_dim = self.nope_dim or config.head_dim
    # Half of a head's size is turned, rounded up to an even number, since
    # features turn in pairs.
    rope_dim = self.rope_dim or 2 * -(-config.head_dim // 4)
    return dataclasses.replace(
        self, kv_rank=self.kv_rank or 4 * config.head_dim, nope_dim=nope_dim,
        rope_dim=rope_dim, v_dim=self.v_dim or config.head_dim,
        scale=self.scale or (nope_dim + rope_dim) ** -0.5,
        norm_eps=self.norm_eps or config.norm_eps)
