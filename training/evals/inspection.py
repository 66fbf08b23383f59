"""A record of what a model computes of some tokens, as numpy arrays.

The model returns its arrays, from which the figures are worked out on the host.
The letters of the shapes are those of README; N counts layers, and N + 1 what
the first layer is given, too. The maps weights[..., l, m] are the weight that
query l gives key m. A row sums to 1, less the share of a learned sink, where
the model has one.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import architectures
from architectures.parts.config import ModelConfig
from architectures.parts.heads import GeneratorConfig

TOP = 5  # tokens of the logit lens
# Dettmers et al. 2022 (LLM.int8(), section 3): a feature is an outlier where
# its magnitude reaches 6, in at least a quarter of the layers and for at least
# 6 % of all tokens of all layers.
MAGNITUDE = 6.0
LAYERS = 0.25
TOKENS = 0.06


class Attention(NamedTuple):
  """The attention of a stack's layers, to its own tokens or to the memory.

  Attributes:
    weights: [N, B, H, L, M], the weight that query l gives key m.
    entropy: [N, B, H, L], the entropy of each query's weights, in nats.
    first: [N, B, H, L], the weight on the first token.
    sink: [N, B, H, L], the share of a learned sink.
    previous: [N, B, H], the mean weight on the token before; attention to the
      memory has None here and in the next one.
    induction: [N, B, H], see `induction`; nan where no token repeats.
  """
  weights: np.ndarray
  entropy: np.ndarray
  first: np.ndarray
  sink: np.ndarray
  previous: np.ndarray | None = None
  induction: np.ndarray | None = None


class Stream(NamedTuple):
  """The residual stream of a stack: what the first layer is given, and what
  each layer returns. Padding counts in none but `norms`.

  Attributes:
    norms: [N + 1, B, L], the Euclidean norm of each token's state.
    median: [N + 1, B], the median magnitude of a feature.
    rms: [N + 1, B], the root of the mean square of a feature.
    peaks: [N + 1, B, D], the largest magnitude of each feature over tokens.
    outliers: bool [B, D], the features that are outliers by the criterion of
      Dettmers et al. 2022; see `outliers`.
  """
  norms: np.ndarray
  median: np.ndarray
  rms: np.ndarray
  peaks: np.ndarray
  outliers: np.ndarray


class Lens(NamedTuple):
  """The logit lens (nostalgebraist 2020): final norm and head, applied to what
  each layer returns. The last entry is the model's own prediction.

  Attributes:
    ids: int [N + 1, B, L, top], the likeliest tokens, the best first.
    probabilities: float32 [N + 1, B, L, top], their probabilities.
  """
  ids: np.ndarray
  probabilities: np.ndarray


class Experts(NamedTuple):
  """The decisions of the routers of a stack's layers of experts.

  Attributes:
    layers: [n], which layers of the stack these are.
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
  """The record of a model, which `of` returns.

  Names are 'decoder' or 'encoder', or both where the model is an
  encoder-decoder; its attention to the memory is called 'cross'.

  Attributes:
    tokens: int [B, L], by name.
    real: bool [B, L], which of them are no padding, by name.
    attention: the attention of the layers, by name.
    stream: the residual stream, by name.
    lens: the logit lens of the stack that the head reads; None: the model has
      no head over the vocabulary.
    experts: the experts of stacks that have layers of experts, by name.
  """
  tokens: dict[str, np.ndarray]
  real: dict[str, np.ndarray]
  attention: dict[str, Attention]
  stream: dict[str, Stream]
  lens: Lens | None
  experts: dict[str, Experts]


@functools.partial(jax.jit, static_argnames=('module', 'top'))
def _look(module: nn.Module, params: Any, arrays: Mapping[str, jax.Array],
          top: int) -> dict[str, Any]:
  """Returns the arrays of a model that the record is made of.

  Args:
    module: any model.
    params: its parameters.
    arrays: the module's arguments by name.
    top: how many tokens the logit lens gives; 0: there is none.
  """
  output: Any = module.apply({'params': params}, keep_layers=True,
                             keep_attention=True, **arrays)
  kept = {}
  for name in ('layers', 'attention', 'cross_attention', 'experts'):
    if name in output.aux:
      kept[name] = output.aux[name]
  # A generator's head reads no layer of the encoder.
  if output.head is None or module.config.find(GeneratorConfig) or not top:
    return kept

  def likeliest(x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the probabilities and the ids of the likeliest tokens."""
    logits_BLV = output.head.logits(x_BLD)
    count = min(top, logits_BLV.shape[-1])
    return jax.lax.top_k(jax.nn.softmax(logits_BLV, -1), count)

  # One layer at a time: logits of all would be large.
  kept['lens'] = jax.lax.map(likeliest, output.aux['readouts'])
  return kept


def of(module: nn.Module, params: Any, arrays: Mapping[str, Any],
       top: int = TOP) -> Inspection:
  """Returns the record of a model.

  Args:
    module: any model.
    params: its parameters.
    arrays: the module's arguments by name.
    top: how many tokens the logit lens gives; 0: there is none.
  """
  kept = jax.device_get(_look(module, params, dict(arrays), top))
  config: ModelConfig = module.config  # type: ignore[attr-defined]
  tokens, real = _inputs(config, arrays)

  # The arrays of each stack: the layers of all stacks follow one another.
  kinds = _layers(config)
  moe = {}
  for name, layers in kinds.items():
    moe[name] = np.flatnonzero([kind.ffn == 'moe' for kind in layers])
  counts = [len(layers) for layers in kinds.values()]
  states = _apart(kept['layers'], [count + 1 for count in counts])
  weights = _apart(kept['attention'], counts)
  routed = {}
  for field, arrays_of_layers in kept.get('experts', {}).items():
    routed[field] = _apart(arrays_of_layers, [len(n) for n in moe.values()])

  # The figures of each stack.
  attention = {}
  stream = {}
  experts = {}
  for i, name in enumerate(tokens):
    attention[name] = _attention(weights[i])._replace(
        previous=previous(weights[i], real[name]),
        induction=induction(weights[i], tokens[name], real[name]))
    stream[name] = _stream(states[i], real[name])
    if len(moe[name]):
      of_stack = {field: x[i] for field, x in routed.items()}
      experts[name] = Experts(layers=moe[name], **of_stack)
  if 'cross_attention' in kept:
    attention['cross'] = _attention(np.asarray(kept['cross_attention']))
  lens = None
  if 'lens' in kept:
    probabilities, ids = kept['lens']
    lens = Lens(ids=ids, probabilities=probabilities)
  return Inspection(tokens=tokens, real=real, attention=attention,
                    stream=stream, lens=lens, experts=experts)


def _layers(config: ModelConfig) -> dict[str, list]:
  """Returns the kind of each layer, by stack, in the order in which the model
  keeps them."""
  kinds = config.layer_kinds
  name = architectures.stack(config)
  if name != 'encoder-decoder':
    return {name: kinds(config.num_layers)}
  return {'encoder': kinds(config.num_layers, causal=False),
          'decoder': kinds(config.num_decoder_layers, cross=True)}


def _inputs(config: ModelConfig, arrays: Mapping[str, Any]
            ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns tokens, and which are no padding, by stack."""
  # The arguments that hold the tokens of a stack, and that are 0 on padding.
  ids: dict[str, str]
  masks: dict[str, tuple[str, ...]]
  name = architectures.stack(config)
  if name == 'encoder-decoder':
    ids = {'encoder': 'tokens_BM', 'decoder': 'decoder_tokens_BL'}
    masks = {'encoder': ('segment_ids_BM',),
             'decoder': ('decoder_segment_ids_BL',)}
    arrays = {'decoder_tokens_BL': arrays['tokens_BM'], **arrays}
  else:
    ids = {name: 'tokens_BL'}
    masks = {name: ('segment_ids_BL', 'valid_BL')}

  # The masks of the call tell which tokens are real; without any, all are.
  tokens = {}
  real = {}
  for stack in ids:
    tokens[stack] = np.asarray(arrays[ids[stack]])
    real[stack] = np.ones(tokens[stack].shape, bool)
    for mask in masks[stack]:
      if mask in arrays:
        real[stack] &= np.asarray(arrays[mask]) != 0
  return tokens, real


def _apart(kept: Any, counts: list[int]) -> list[np.ndarray]:
  """Returns the arrays of each stack, of layers that follow one another."""
  stacks = []
  first = 0
  for count in counts:
    end = first + count
    stacks.append(np.stack(kept[first:end]) if count else np.zeros(0))
    first = end
  return stacks


def _attention(weights_NBHLM: np.ndarray) -> Attention:
  """Returns the figures of maps of attention that hold for any tokens."""
  sink_NBHL = np.maximum(1 - weights_NBHLM.sum(-1, dtype=np.float64), 0)

  # The entropy of n keys that weigh the same is log n; a sink counts as a key.
  p_NBHLM = np.concatenate([weights_NBHLM, sink_NBHL[..., None]], -1,
                           dtype=np.float64)
  log_p_NBHLM = np.log(np.where(p_NBHLM > 0, p_NBHLM, 1))
  entropy_NBHL = -(p_NBHLM * log_p_NBHLM).sum(-1)

  # Models that have no sink keep one in the first token (Xiao et al. 2023).
  return Attention(weights=weights_NBHLM, entropy=entropy_NBHL,
                   first=weights_NBHLM[..., 0], sink=sink_NBHL)


def _stream(states_NBLD: np.ndarray, real_BL: np.ndarray) -> Stream:
  """Returns the figures of a residual stream; real_BL says which tokens are no
  padding."""
  states_NBLD = np.asarray(states_NBLD, np.float32)
  median = []
  rms = []
  peaks = []
  outlying = []
  for b, real_L in enumerate(real_BL):
    magnitudes_NTD = np.abs(states_NBLD[:, b, real_L])  # of the T real tokens
    median.append(np.median(magnitudes_NTD, (1, 2)))
    square_N = np.square(magnitudes_NTD).mean((1, 2))
    rms.append(np.sqrt(square_N))
    peaks.append(magnitudes_NTD.max(1))
    outlying.append(outliers(magnitudes_NTD))
  return Stream(
      norms=np.linalg.norm(states_NBLD, axis=-1),
      median=np.stack(median, 1), rms=np.stack(rms, 1),
      peaks=np.stack(peaks, 1), outliers=np.stack(outlying))


def previous(weights_NBHLM: np.ndarray, real_BL: np.ndarray) -> np.ndarray:
  """Returns the mean weight on the token just before the query, [N, B, H];
  the first token, which has none, and padding do not count."""
  before_NBHL = np.diagonal(weights_NBHLM, offset=-1, axis1=-2, axis2=-1)
  return mean_of_queries(before_NBHL, real_BL[:, 1:])


def induction(weights_NBHLM: np.ndarray, tokens_BL: np.ndarray,
              real_BL: np.ndarray) -> np.ndarray:
  """Returns the prefix-matching score of each head, [N, B, H]: the weight on
  the tokens that followed the query's token where it stood before, as a mean
  over the queries that stood before; nan where none did.

  On random tokens that come twice it is that of Olsson et al. 2022, of whom a
  head that scores near 1 is called an induction head.
  """
  # follows[b, l, m]: token m - 1 is that of query l, and m is not after l.
  L = tokens_BL.shape[1]
  same_BLM = tokens_BL[:, :, None] == tokens_BL[:, None]
  follows_BLM = np.zeros_like(same_BLM)
  follows_BLM[..., 1:] = same_BLM[..., :-1]
  follows_BLM &= np.tri(L, k=-1, dtype=bool)
  follows_BLM &= real_BL[:, :, None]

  matched_NBHL = (weights_NBHLM * follows_BLM[None, :, None]).sum(-1)
  return mean_of_queries(matched_NBHL, follows_BLM.any(-1))


def mean_of_queries(values_NBHL: np.ndarray, counted_BL: np.ndarray
                    ) -> np.ndarray:
  """Returns the mean over the queries that count, [N, B, H]; nan of none."""
  counted_BHL = np.broadcast_to(counted_BL[:, None], values_NBHL.shape[1:])
  sums_NBH = (values_NBHL * counted_BHL).sum(-1, dtype=np.float64)
  with np.errstate(invalid='ignore'):
    return sums_NBH / counted_BHL.sum(-1)


def outliers(states_NLD: np.ndarray) -> np.ndarray:
  """Returns which features are outliers by the criterion of Dettmers et al.
  2022, bool [D].

  Args:
    states_NLD: the residual stream of one row, without padding: what the first
      layer is given and what each layer returns.
  """
  large_NLD = np.abs(states_NLD) >= MAGNITUDE
  layers_D = large_NLD.any(1).mean(0)  # the share of layers with such a token
  tokens_D = large_NLD.mean((0, 1))  # the share of tokens of all layers
  return (layers_D >= LAYERS) & (tokens_D >= TOKENS)
