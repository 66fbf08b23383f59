"""The heads, which read the last layer for the next token, or for the answer
to a task.

`model.head` names an entry of HEADS. The head of a language model is a product
with the vocabulary, `Output.head`. Each other head is a product with a few
outputs, `Output.extra['scores']` in float32, and stands in its place: the model
then has neither a matrix of its own for the vocabulary nor its bias, nor what
else its pre-training alone needed.

  'sequence'  [B, K]     of a row: K classes, or, with K = 1, a number
  'tokens'    [B, L, K]  of each token: K labels
  'span'      [B, L, 2]  of each token: that the answer starts here, and ends

They are those that are published: BERT reads the row off its pooler (Devlin et
al. 2019, section 4), a decoder off the last token of a row that is not padding
(Radford et al. 2018, section 3.2), without a bias, as transformers'
GPT2ForSequenceClassification has it. With `model.pooling` 'mean', an encoder
reads the mean of the row's tokens where it would read the first one (Reimers
and Gurevych 2019, section 3; classifier_pooling of ModernBERT's config.json).

'replaced' has one score for each token, of a product after a product and an
activation: that it is none of the text, but was drawn by a generator, a smaller
network for masked words (ELECTRA: Clark et al. 2020, arXiv 2003.10555), which
stands in the model beside it while it is trained (model.generator). They share
the embedding; or (generator.sharing 'apart': DeBERTa-v3, arXiv 2111.09543,
section 4.2) the encoder reads sg(E) + A, of the generator's table E, to which
it sends no gradient, and a table A of its own, which is 0 at first.

'vector' gives logits of tokens as 'lm' does, but of the row's own: each token
is to be told from the last one's vector alone, which has to hold them all.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import positions
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.layers import norm
from common.errors import require
from common.fields import field, RUN, SHAPES, ReadIf

# tokens, at most, of which a tied head reads the table as it lies
# Up to this number of tokens, XLA's CPU backend is faster where the table of a
# tied head is the first operand of the product: see Head.logits.
MOST_TOKENS_WITH_TABLE_FIRST = 32


@struct.dataclass
class Head:
  """The output projection: logits = softcap(scale * (x W + b))."""
  kernel_DV: jax.Array
  bias_V: Optional[jax.Array] = None
  scale: float = struct.field(pytree_node=False, default=1.0)
  softcap: float = struct.field(pytree_node=False, default=0.0)
  # Whether the kernel is the transpose of the table of embeddings.
  tied: bool = struct.field(pytree_node=False, default=False)

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Computes the logits of vectors: their product with the head's matrix, and
    then its bias, scale and bound.

    The suffixes name axes: B batch, L length, D d_model, V vocabulary (or the
    scores of a task), T tokens.

    Args:
      x_BLD: the vectors, [..., D].

    Returns:
      The logits, float32 [..., V].
    """
    # The usual product. On CPU, a few tokens are multiplied by a tied table in
    # another way, below.
    num_tokens = x_BLD.size // x_BLD.shape[-1]
    is_table_first = (
        self.tied and num_tokens <= MOST_TOKENS_WITH_TABLE_FIRST
        and x_BLD.dtype == jnp.float32 and sharding.is_single_cpu())
    if not is_table_first:
      logits_BLV = layers.einsum('...D,DV->...V', x_BLD, self.kernel_DV,
                                 dtype=x_BLD.dtype, out_dtype=jnp.float32)
      return self.finish_logits(logits_BLV)
    # The transposed product. XLA's CPU backend copies the second operand of a
    # product and reads the first as it lies. So the table stands first, which
    # saves a copy of it for each token that is generated. The barrier keeps XLA
    # from exchanging the operands again.
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits_VT = layers.einsum('VD,TD->VT', self.kernel_DV.T, x_TD,
                              dtype=x_BLD.dtype, out_dtype=jnp.float32)
    logits_VT = jax.lax.optimization_barrier(logits_VT)
    return self.finish_logits(logits_VT.T.reshape(*x_BLD.shape[:-1], -1))

  def finish_logits(self, product_BLV: jax.Array) -> jax.Array:
    """Returns the logits, of the product x W alone: with the bias, the scale
    and the bound."""
    logits_BLV = product_BLV
    if self.bias_V is not None:
      logits_BLV = layers.add_bias(logits_BLV, self.bias_V)
    logits_BLV = logits_BLV * self.scale
    if self.softcap:
      logits_BLV = self.softcap * jnp.tanh(logits_BLV / self.softcap)
    return logits_BLV


class TaskHead(nn.Module):
  """The head of a task, which gives scores: dropout, then a product.

  Attributes:
    config: the model.
    bias: whether a bias is added.
  """
  config: ModelConfig
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
    """Computes the scores of a task, such as the logits of its classes.

    The suffixes name axes: B batch, L length, D d_model, U scores.

    Args:
      x: a vector for each row, [B, D], or for each token, [B, L, D].
      deterministic: whether there is no dropout, as outside of training.

    Returns:
      The scores, float32 [B, U] or [B, L, U].
    """
    config = self.config
    num_scores = HEADS[config.head].outputs(config)
    # The scores take the place of the vocabulary V in Head, so that its product
    # and scale are those of a language model.
    kernel_DU = layers.weight(self, 'kernel',
                              shape=(config.d_model, num_scores),
                              axes=('embed', None), output=True, tuned=True)
    bias_U = None
    if self.bias:
      bias_U = layers.bias(self, 'bias', shape=(num_scores,), axes=(None,),
                           output=True, tuned=True)
    x = layers.Dropout(config.head_dropout)(x, deterministic=deterministic)
    head = Head(kernel_DV=kernel_DU, bias_V=bias_U, scale=1 / config.widening)
    return head.logits(x)


class Unfold(nn.Module):
  """The head that predicts all tokens of a row from one vector.

  The vector plus a sinusoidal encoding of each place goes twice through a norm,
  a product and gelu, and then through a norm and a product with the vocabulary.
  It is the decoder of MAD's compression task (Poli et al. 2024, as in the code
  published with it), in which no place sees another.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BD: jax.Array, length: int) -> tuple[jax.Array, Head]:
    """Predicts all tokens of a row from a single vector. For each place in the
    row, a small network is applied to the vector plus the place's position.

    The suffixes name axes: B batch, L length, D d_model (E in an einsum), V
    vocabulary.

    Args:
      x_BD: the vector of each row.
      length: L, how many tokens are predicted.

    Returns:
      The input of the head, [B, L, D]; and the Head, whose logits are
      [B, L, V].
    """
    config = self.config
    # Sinusoidal positions tell the places apart. The layout 'fairseq' adds 2 to
    # positions, and the published model's begin at 0, so 2 is subtracted.
    places_LD = positions.sinusoidal_encoding(
        jnp.arange(length) - 2, config.d_model, 'fairseq')
    x_BLD = x_BD[:, None] + places_LD[None].astype(x_BD.dtype)
    # The network: twice a norm, a product and a GELU.
    for i in range(2):
      normed_BLD = norm(config, f'norm_{i}')(x_BLD)
      w_DD = layers.weight(self, f'kernel_{i}',
                           shape=(config.d_model, config.d_model),
                           axes=('embed', 'features'), tuned=True)
      b_D = layers.bias(self, f'bias_{i}', shape=(config.d_model,),
                        axes=('features',), tuned=True)
      product_BLD = layers.einsum('BLD,DE->BLE', normed_BLD, w_DD,
                                  dtype=normed_BLD.dtype,
                                  out_dtype=normed_BLD.dtype)
      x_BLD = layers.gelu(layers.add_bias(product_BLD, b_D))
    # The product with the vocabulary.
    kernel_DV = layers.weight(self, 'kernel',
                              shape=(config.d_model, config.vocab_size),
                              axes=('embed', 'vocab'), output=True, tuned=True)
    bias_V = layers.bias(self, 'bias', shape=(config.vocab_size,),
                         axes=('vocab',), output=True, tuned=True)
    head = Head(kernel_DV=kernel_DV, bias_V=bias_V, scale=1 / config.widening)
    return norm(config, 'norm_2')(x_BLD), head


def pool_last_token(x_BLD: jax.Array, valid_BL: Optional[jax.Array],
                    segment_ids_BL: Optional[jax.Array]) -> jax.Array:
  """Picks the vector of the last token of each row that is no padding.

  The suffixes name axes: B batch, L length, D d_model.

  Args:
    x_BLD: the vectors of the tokens.
    valid_BL: 0 on padding; None: `segment_ids_BL` says what is padding.
    segment_ids_BL: 0 on padding; None: there is no padding.

  Returns:
    The vectors, [B, D]. For a row that is all padding, this is its first one.
  """
  not_padding_BL = segment_ids_BL
  if valid_BL is not None:
    not_padding_BL = valid_BL
  if not_padding_BL is None:
    return x_BLD[:, -1]
  # Padding counts as index 0, so the largest index is that of the last token.
  index_L = jnp.arange(x_BLD.shape[1])
  last_B = jnp.where(not_padding_BL != 0, index_L[None], 0).max(1)
  return jnp.take_along_axis(x_BLD, last_B[:, None, None], 1)[:, 0]


def pool_mean_of_tokens(x_BLD: jax.Array, segment_ids_BL: Optional[jax.Array]
                        ) -> jax.Array:
  """Averages the vectors of each row's tokens, without padding.

  The suffixes name axes: B batch, L length, D d_model.

  Args:
    x_BLD: the vectors of the tokens.
    segment_ids_BL: 0 on padding; None: there is no padding.

  Returns:
    The means, [B, D], in the dtype of x; 0 for a row that is all padding.
  """
  if segment_ids_BL is None:
    return x_BLD.mean(1)
  is_token_BL1 = (segment_ids_BL != 0)[..., None]
  sum_BD = (x_BLD * is_token_BL1).sum(1, dtype=jnp.float32)
  # At least 1, so that a row of padding alone does not divide by 0.
  num_tokens_B1 = jnp.maximum(is_token_BL1.sum(1), 1)
  return (sum_BD / num_tokens_B1).astype(x_BLD.dtype)


def pool_first_token(x_BLD: jax.Array, segment_ids_BL: Optional[jax.Array]
                     ) -> jax.Array:
  """Returns the first token of each row, [B, D]."""
  del segment_ids_BL
  return x_BLD[:, 0]


# A pooling makes a vector of an encoder's row, which a head reads:
# (tokens [B, L, D], segments [B, L]) -> [B, D].
POOLINGS = {'cls': pool_first_token, 'mean': pool_mean_of_tokens}


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
  """The fields of head replaced: the generator, whose tokens the model tells
  from those of the text."""
  GROUP = 'generator'
  num_layers: int = field(0, 'its layers; 0: there is no generator',
                          resume=SHAPES)
  d_model: int = field(0, "its width; derived: the model's", resume=SHAPES)
  num_heads: int = field(0, "its heads; derived: the model's", resume=SHAPES)
  d_ff: int = field(0, 'its hidden units; derived: 4 generator.d_model',
                    resume=SHAPES)
  sharing: str = field(
      'whole', 'What the encoder has of its embedding: whole, all of it; '
      'apart, the table of tokens, without a gradient, plus one of its own.',
      choices=('whole', 'apart'))
  loss_weight: float = field(
      50.0, "of the encoder's loss beside that of the generator", least=0,
      about=RUN)

  def derived(self, config: ModelConfig) -> 'GeneratorConfig':
    width = self.d_model or config.d_model
    return dataclasses.replace(
        self, d_model=width, num_heads=self.num_heads or config.num_heads,
        d_ff=self.d_ff or 4 * width)

  def conditions_of_reading(self, config: ModelConfig) -> dict[str, ReadIf]:
    """Returns the fields that nothing reads as long as another field has its
    value, each with that field and what it would have to be."""
    del config
    if self.num_layers:
      return {}
    without = ReadIf('generator.num_layers', 'is set')
    return {x.name: without for x in dataclasses.fields(self)
            if x.name != 'num_layers'}


def _check_generator(config: ModelConfig) -> None:
  """Checks the sizes of ELECTRA's generator, the small network that replaces
  masked tokens by others, which the model learns to find.

  Args:
    config: the config of the model, which has the sizes of a generator.

  Raises:
    RequestError: if the number of heads does not divide the generator's width,
      or if the model has several kinds of layer, whose pattern a generator with
      another number of layers could not follow.
  """
  generator = config.part(GeneratorConfig)
  require(generator.d_model % generator.num_heads == 0,
          f'model.generator.num_heads is {generator.num_heads}, which does not '
          f'divide model.generator.d_model {generator.d_model}: choose a '
          'divisor')
  require(not generator.num_layers or not config.kinds,
          f'model.generator.num_layers is {generator.num_layers}, and '
          f'model.kinds has {", ".join(config.kinds)}: a generator has layers '
          'of one kind, as its model must')


class HeadKind(NamedTuple):
  """An entry of HEADS.

  Attributes:
    outputs: ModelConfig -> how many scores it has; 0: it has logits of the
      vocabulary.
    is_for_rows: whether a row has the scores, and not each of its tokens.
    has_logits_of_tokens: whether it is an Unfold, with logits of all tokens of
      a row and no scores.
    has_detector: whether a product and an activation come before it.
    settings: the group of fields of the model that it reads.
    fields: the fields of the model that not every head reads.
    check: ModelConfig -> None; raises RequestError for what it cannot be;
      None: it fits every model.
  """
  outputs: Callable[[ModelConfig], int]
  is_for_rows: bool = False
  has_logits_of_tokens: bool = False
  has_detector: bool = False
  settings: Optional[type] = None
  fields: tuple[str, ...] = ()
  check: Optional[Callable[[ModelConfig], None]] = None


def _check_num_labels(config: ModelConfig) -> None:
  """Raises RequestError for the head of a task without labels."""
  require(config.num_labels > 0, f'model.num_labels is {config.num_labels}: '
          f'model.head {config.head!r} needs 1 or more (derived from the '
          'labels of the training data at the start of a run)')


def _count_labels(config: ModelConfig) -> int:
  """Returns the number of scores of a head with one for each label."""
  return config.num_labels


_FIELDS_OF_LABEL_HEADS = ('num_labels', 'head_dropout')
_FIELDS_OF_LOGITS = (
    'tie_embeddings', 'logits_bias', 'logits_scale', 'logits_softcap')
HEADS = {
    'lm': HeadKind(
        lambda c: 0, fields=(*_FIELDS_OF_LOGITS, 'next_sentence', 'mtp_depth',
                             'diffusion_block')),
    'replaced': HeadKind(
        lambda c: 1, has_detector=True, settings=GeneratorConfig,
        fields=_FIELDS_OF_LOGITS, check=_check_generator),
    'sequence': HeadKind(
        _count_labels, is_for_rows=True,
        fields=(*_FIELDS_OF_LABEL_HEADS, 'pooling'), check=_check_num_labels),
    'tokens': HeadKind(
        _count_labels, fields=_FIELDS_OF_LABEL_HEADS, check=_check_num_labels),
    'span': HeadKind(lambda c: 2, fields=('head_dropout',)),
    'vector': HeadKind(
        lambda c: 0, is_for_rows=True, has_logits_of_tokens=True,
        check=positions.check_width_for_sinusoids),
}
