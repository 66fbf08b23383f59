"""A record of what a model computes as it reads some tokens, as numpy arrays.

The model returns its arrays, from which the figures are worked out on the host.
The letters of the shapes are those of README; N counts layers, and N + 1 what
the first layer is given, too. The maps weights[..., l, m] are the weight that
query l gives key m. A row sums to 1, less the share of a learned sink, where
the model has one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import architectures
from architectures.parts.config import ModelConfig
from architectures.parts.heads import GeneratorConfig

NUM_LENS_TOKENS = 5  # likeliest tokens of each layer in the logit lens
# Dettmers et al. 2022 (LLM.int8(), section 3): a feature is an outlier where
# its magnitude reaches 6, in at least a quarter of the layers and for at least
# 6 % of all tokens of all layers.
OUTLIER_MAGNITUDE = 6.0
OUTLIER_SHARE_OF_LAYERS = 0.25
OUTLIER_SHARE_OF_TOKENS = 0.06


class AttentionRecord(NamedTuple):
  """The attention weights of the layers of a stack, and figures of them.

  The stack (an encoder or a decoder) attends to its own tokens, or to the
  encoder's output.

  Attributes:
    weights: [N, B, H, L, M], the weight that query l gives key m.
    entropy: [N, B, H, L], the entropy of each query's weights, in nats.
    first_token: [N, B, H, L], the weight on the first token.
    sink: [N, B, H, L], the share of a learned sink.
    previous_token: [N, B, H], the mean weight on the token before the query;
      None where a decoder attends to the encoder's output.
    induction: [N, B, H], the score of `induction_score`, nan where no token
      repeats; None where a decoder attends to the encoder's output.
  """
  weights: np.ndarray
  entropy: np.ndarray
  first_token: np.ndarray
  sink: np.ndarray
  previous_token: np.ndarray | None = None
  induction: np.ndarray | None = None


class ResidualStream(NamedTuple):
  """Figures of the residual stream of a stack: of what the first layer is
  given, and of what each layer returns. Padding counts in none but `norms`.

  Attributes:
    norms: [N + 1, B, L], the Euclidean norm of each token's state.
    median: [N + 1, B], the median magnitude of a feature.
    rms: [N + 1, B], the root of the mean square of a feature.
    peaks: [N + 1, B, D], the largest magnitude of each feature over tokens.
    outliers: bool [B, D], the features that are outliers by the criterion of
      Dettmers et al. 2022; see `find_outlier_features`.
  """
  norms: np.ndarray
  median: np.ndarray
  rms: np.ndarray
  peaks: np.ndarray
  outliers: np.ndarray


class LogitLens(NamedTuple):
  """The logit lens (nostalgebraist 2020): final norm and head, applied to what
  each layer returns. The last entry is the model's own prediction.

  Attributes:
    ids: int [N + 1, B, L, top], the likeliest tokens, the best first.
    probabilities: float32 [N + 1, B, L, top], their probabilities.
  """
  ids: np.ndarray
  probabilities: np.ndarray


class ExpertRouting(NamedTuple):
  """The decisions of the routers of a stack's layers of experts.

  Attributes:
    layers: [n], the numbers of these n layers in the stack.
    probabilities: [n, B, L, E], the probabilities of the router.
    chosen: bool [n, B, L, E], whether a token goes to an expert.
    gates: [n, B, L, E], the weight of the expert's output: 0 where it was not
      chosen, and where it was but had no room.
  """
  layers: np.ndarray
  probabilities: np.ndarray
  chosen: np.ndarray
  gates: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inspection:
  """The record of a model that has read some tokens, by `inspect_model`.

  The keys are 'decoder' or 'encoder', or both in an encoder-decoder, whose
  attention to the encoder's output has the key 'cross'.

  Attributes:
    tokens: int [B, L], the tokens that each stack reads.
    is_real: bool [B, L], which of them are no padding.
    attention: the attention of the layers.
    stream: the residual stream.
    lens: the logit lens of the stack that the head reads; None: the model has
      no head over the vocabulary.
    experts: the routing, of stacks that have layers of experts.
  """
  tokens: dict[str, np.ndarray]
  is_real: dict[str, np.ndarray]
  attention: dict[str, AttentionRecord]
  stream: dict[str, ResidualStream]
  lens: LogitLens | None
  experts: dict[str, ExpertRouting]


@functools.partial(jax.jit, static_argnames=('module', 'top'))
def _run_and_keep_layers(module: nn.Module, params: Any,
                         arrays: Mapping[str, jax.Array], top: int
                         ) -> dict[str, Any]:
  """Runs a model once, and keeps the states of its layers and the tokens that
  its head would predict from each of them (the logit lens).

  The suffixes name axes: B batch, L length, D d_model, V tokens in the
  vocabulary.

  Args:
    module: the Flax module of a model.
    params: its parameters, a tree of arrays.
    arrays: {name: array} of the module's arguments.
    top: the number of likeliest tokens that the logit lens has; 0: there is
      none.

  Returns:
    A dict with what the model has of these: `layers`, the states of the
    residual stream; `attention` and `cross_attention`, the attention weights;
    `experts`, the decisions of the routers; `lens`, (probabilities, token ids)
    for each layer.
  """
  output: Any = module.apply({'params': params}, keep_layers=True,
                             keep_attention=True, **arrays)
  kept = {}
  for name in ('layers', 'attention', 'cross_attention', 'experts'):
    if name in output.aux:
      kept[name] = output.aux[name]

  # A logit lens needs a head that predicts tokens from the layers. That of
  # ELECTRA's generator does not read those of the encoder.
  has_generator = module.config.find_part(GeneratorConfig)
  if output.head is None or has_generator or not top:
    return kept

  def likeliest_tokens(x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the probabilities and the ids of the likeliest tokens of the
    states of one layer, [B, L, tokens]."""
    logits_BLV = output.head.logits(x_BLD)
    num_tokens = min(top, logits_BLV.shape[-1])
    return jax.lax.top_k(jax.nn.softmax(logits_BLV, -1), num_tokens)

  # jax.lax.map takes one layer at a time: the logits of all would be large.
  kept['lens'] = jax.lax.map(likeliest_tokens, output.aux['readouts'])
  return kept


def inspect_model(module: nn.Module, params: Any, arrays: Mapping[str, Any],
                  top: int = NUM_LENS_TOKENS) -> Inspection:
  """Runs a model on some tokens, and returns the record of its layers.

  Args:
    module: any model.
    params: its parameters, a tree of arrays.
    arrays: the module's arguments by name.
    top: the number of tokens that the logit lens gives; 0: there is none.
  """
  kept = jax.device_get(_run_and_keep_layers(module, params, dict(arrays), top))
  config: ModelConfig = module.config  # type: ignore[attr-defined]
  tokens, is_real = _tokens_by_stack(config, arrays)

  # The arrays of each stack: in those of the model, the layers of the stacks
  # follow one another.
  layer_kinds = _layers_by_stack(config)
  num_layers = [len(kinds) for kinds in layer_kinds.values()]
  num_states = [count + 1 for count in num_layers]
  states = _split_by_stack(kept['layers'], num_states)
  weights = _split_by_stack(kept['attention'], num_layers)

  # The figures of each stack.
  attention = {}
  stream = {}
  for i, stack in enumerate(tokens):
    attention[stack] = _measure_attention(weights[i])._replace(
        previous_token=previous_token_weight(weights[i], is_real[stack]),
        induction=induction_score(weights[i], tokens_BL=tokens[stack],
                                  is_real_BL=is_real[stack]))
    stream[stack] = _measure_stream(states[i], is_real[stack])
  if 'cross_attention' in kept:
    cross_weights = np.asarray(kept['cross_attention'])
    attention['cross'] = _measure_attention(cross_weights)
  lens = None
  if 'lens' in kept:
    probabilities, ids = kept['lens']
    lens = LogitLens(ids=ids, probabilities=probabilities)
  experts = _routing_by_stack(layer_kinds, kept.get('experts', {}))
  return Inspection(tokens=tokens, is_real=is_real, attention=attention,
                    stream=stream, lens=lens, experts=experts)


def _routing_by_stack(layer_kinds: Mapping[str, Sequence],
                      choices: Mapping[str, Any]) -> dict[str, ExpertRouting]:
  """Returns the decisions of the routers of each stack that has layers of
  experts, by the name of the stack.

  Args:
    layer_kinds: the kind of each layer of each stack, by its name.
    choices: the decisions in all layers of experts of the model, those of the
      first stack first: the arrays of ExpertRouting, by the names of its fields
      except for `layers`.
  """
  # Find the numbers of the layers with experts, counted in their stack.
  layers_by_stack = {}
  for stack, kinds in layer_kinds.items():
    has_experts = [kind.ffn == 'moe' for kind in kinds]
    layers_by_stack[stack] = np.flatnonzero(has_experts)

  # Cut each array into one for each stack, in the order of the stacks.
  counts = [len(layers) for layers in layers_by_stack.values()]
  arrays_by_name = {}
  for name, arrays_of_layers in choices.items():
    arrays_of_stacks = _split_by_stack(arrays_of_layers, counts)
    arrays_by_name[name] = dict(zip(layers_by_stack, arrays_of_stacks))

  routing = {}
  for stack, layers in layers_by_stack.items():
    if len(layers):
      arrays = {}
      for name, array_of_stack in arrays_by_name.items():
        arrays[name] = array_of_stack[stack]
      routing[stack] = ExpertRouting(layers=layers, **arrays)
  return routing


def _layers_by_stack(config: ModelConfig) -> dict[str, Sequence]:
  """Returns {'encoder' or 'decoder': the kind of each of its layers}, in the
  order in which the model returns their arrays. A layer's kind is the fields of
  the config that differ between layers."""
  stack = architectures.stack(config)
  if stack != 'encoder-decoder':
    return {stack: config.layer_kinds(config.num_layers)}
  return {'encoder': config.layer_kinds(config.num_layers, causal=False),
          'decoder': config.layer_kinds(config.num_decoder_layers, cross=True)}


def _tokens_by_stack(config: ModelConfig, arrays: Mapping[str, Any]
                     ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the tokens that each stack of a model reads, and which of them are
  no padding. A model has an encoder, a decoder, or both.

  Args:
    config: the config of the model.
    arrays: {name: array} of the arguments of its module.

  Returns:
    {'encoder' or 'decoder': int [B, L]}, the tokens; and {'encoder' or
    'decoder': bool [B, L]}, which of them are no padding.
  """
  # Find the names of the arguments with the tokens of each stack, and of those
  # that are 0 on padding.
  token_argument: dict[str, str]
  mask_arguments: dict[str, tuple[str, ...]]
  stack = architectures.stack(config)
  if stack == 'encoder-decoder':
    token_argument = {'encoder': 'tokens_BM', 'decoder': 'decoder_tokens_BL'}
    mask_arguments = {'encoder': ('segment_ids_BM',),
                      'decoder': ('decoder_segment_ids_BL',)}
    # A decoder that is given no tokens reads those of the encoder.
    arrays = {'decoder_tokens_BL': arrays['tokens_BM'], **arrays}
  else:
    token_argument = {stack: 'tokens_BL'}
    mask_arguments = {stack: ('segment_ids_BL', 'valid_BL')}

  # A token is padding if one of the given masks is 0 there.
  tokens = {}
  is_real = {}
  for name in token_argument:
    tokens[name] = np.asarray(arrays[token_argument[name]])
    is_real[name] = np.ones(tokens[name].shape, bool)
    for mask in mask_arguments[name]:
      if mask in arrays:
        is_real[name] &= np.asarray(arrays[mask]) != 0
  return tokens, is_real


def _split_by_stack(arrays_of_layers: Any, counts: list[int]
                    ) -> list[np.ndarray]:
  """Groups the arrays of layers by the stack that they belong to, such as
  encoder and decoder, and stacks each group to one array.

  Args:
    arrays_of_layers: the array of each layer, those of the first stack first.
    counts: the number of layers of each stack.

  Returns:
    An array [count, ...] for each stack; an empty one for a count of 0.
  """
  stacks = []
  start = 0
  for count in counts:
    end = start + count
    if count:
      stacks.append(np.stack(arrays_of_layers[start:end]))
    else:
      stacks.append(np.zeros(0))
    start = end
  return stacks


def _measure_attention(weights_NBHLM: np.ndarray) -> AttentionRecord:
  """Measures for each query how its attention is spread: its entropy, the
  weight on the first token, and the share that no key gets (an attention sink).

  Args:
    weights_NBHLM: the attention weights of N layers, B rows, H heads, L queries
      and M keys. Over the keys they add up to 1, or to less if there is a sink.

  Returns:
    The weights with these figures, each [N, B, H, L].
  """
  # The sink has the rest to 1. Rounding might make it negative.
  sink_NBHL = np.maximum(1 - weights_NBHLM.sum(-1, dtype=np.float64), 0)

  # Compute the entropy, -sum p log p, where a sink counts as a key. Where p is
  # 0, its logarithm is replaced by 0.
  p_NBHLM = np.concatenate([weights_NBHLM, sink_NBHL[..., None]], -1,
                           dtype=np.float64)
  log_p_NBHLM = np.log(np.where(p_NBHLM > 0, p_NBHLM, 1))
  entropy_NBHL = -(p_NBHLM * log_p_NBHLM).sum(-1)

  # Models without a sink often use the first token as one (Xiao et al. 2023).
  return AttentionRecord(
      weights=weights_NBHLM, entropy=entropy_NBHL,
      first_token=weights_NBHLM[..., 0], sink=sink_NBHL)


def _measure_stream(states_NBLD: np.ndarray, is_real_BL: np.ndarray
                    ) -> ResidualStream:
  """Measures the size of the hidden states between layers (the residual
  stream).

  Args:
    states_NBLD: the input of the first layer and the output of each layer: N
      states, B rows, L tokens, D features.
    is_real_BL: bool, which tokens are no padding.

  Returns:
    The norm of each token. And of the real tokens of each row, the median and
    the root mean square of the features, the largest magnitude of each feature,
    and which features are outliers.
  """
  # Measure the rows one by one, as they differ in their number of real tokens.
  states_NBLD = np.asarray(states_NBLD, np.float32)
  median = []
  rms = []
  peaks = []
  outliers = []
  for b, is_real_L in enumerate(is_real_BL):
    # Take the magnitudes of the T real tokens of the row.
    magnitudes_NTD = np.abs(states_NBLD[:, b, is_real_L])
    median.append(np.median(magnitudes_NTD, (1, 2)))
    square_N = np.square(magnitudes_NTD).mean((1, 2))
    rms.append(np.sqrt(square_N))
    peaks.append(magnitudes_NTD.max(1))
    outliers.append(find_outlier_features(magnitudes_NTD))
  return ResidualStream(
      norms=np.linalg.norm(states_NBLD, axis=-1),
      median=np.stack(median, 1), rms=np.stack(rms, 1),
      peaks=np.stack(peaks, 1), outliers=np.stack(outliers))


def previous_token_weight(weights_NBHLM: np.ndarray, is_real_BL: np.ndarray
                          ) -> np.ndarray:
  """Returns the mean attention weight on the token just before the query,
  [N, B, H]; the first token, which has none, and padding do not count."""
  previous_NBHL = np.diagonal(weights_NBHLM, offset=-1, axis1=-2, axis2=-1)
  return mean_over_queries(previous_NBHL, is_real_BL[:, 1:])


def induction_score(weights_NBHLM: np.ndarray, tokens_BL: np.ndarray,
                    is_real_BL: np.ndarray) -> np.ndarray:
  """Computes the prefix-matching score of each attention head, by which
  induction heads are recognised (Olsson et al. 2022).

  If the token of a query has occurred before in the row, an induction head
  attends to the token that followed it there. The score is the attention weight
  on such tokens, averaged over the queries that have one; nan if there are
  none. On random tokens that come twice, the paper calls a head with a score
  near 1 an induction head.

  Args:
    weights_NBHLM: the attention weights of N layers, B rows, H heads, L queries
      and M keys.
    tokens_BL: the tokens, which are both queries and keys.
    is_real_BL: bool, which tokens are no padding.

  Returns:
    The score, [N, B, H].
  """
  # follows_BLM[b, l, m] says that key m comes before query l and follows a
  # token that is the same as that of the query. So it is "same token", shifted
  # by one key, below the diagonal. Queries that are padding do not count.
  L = tokens_BL.shape[1]
  same_BLM = tokens_BL[:, :, None] == tokens_BL[:, None]
  follows_BLM = np.zeros_like(same_BLM)
  follows_BLM[..., 1:] = same_BLM[..., :-1]
  follows_BLM &= np.tri(L, k=-1, dtype=bool)
  follows_BLM &= is_real_BL[:, :, None]

  # Add up the weight on these keys. Queries without any do not count.
  matched_NBHL = (weights_NBHLM * follows_BLM[None, :, None]).sum(-1)
  return mean_over_queries(matched_NBHL, follows_BLM.any(-1))


def mean_over_queries(values_NBHL: np.ndarray, counted_BL: np.ndarray
                      ) -> np.ndarray:
  """Averages a value of each query over some of the queries.

  Args:
    values_NBHL: the value for N layers, B rows, H heads and L queries.
    counted_BL: bool, which queries of each row count.

  Returns:
    The mean [N, B, H]; nan if no query of a row counts.
  """
  # 0 / 0 gives nan, as it should: numpy need not warn.
  counted_BHL = np.broadcast_to(counted_BL[:, None], values_NBHL.shape[1:])
  sums_NBH = (values_NBHL * counted_BHL).sum(-1, dtype=np.float64)
  with np.errstate(invalid='ignore'):
    return sums_NBH / counted_BHL.sum(-1)


def find_outlier_features(states_NLD: np.ndarray) -> np.ndarray:
  """Finds the features of hidden states that are outliers by the criterion of
  Dettmers et al. 2022: they are large in many layers and for many tokens.

  Args:
    states_NLD: the input of the first layer and the output of each layer for
      one row without padding: N states, L tokens, D features.

  Returns:
    bool [D], whether each feature is an outlier.
  """
  is_large_NLD = np.abs(states_NLD) >= OUTLIER_MAGNITUDE
  # For each feature, compute the share of layers in which it is large for at
  # least one token, and the share of all tokens and layers in which it is
  # large.
  share_of_layers_D = is_large_NLD.any(1).mean(0)
  share_of_tokens_D = is_large_NLD.mean((0, 1))
  in_many_layers_D = share_of_layers_D >= OUTLIER_SHARE_OF_LAYERS
  of_many_tokens_D = share_of_tokens_D >= OUTLIER_SHARE_OF_TOKENS
  return in_many_layers_D & of_many_tokens_D
