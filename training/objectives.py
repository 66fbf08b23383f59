"""The loss side of an objective: a batch in, the means of its losses out.

A loss is a mean, or for BERT a sum of two, each over what it is of: tokens to
predict, or rows. `Objective.figures` returns every figure as a Mean, a sum and
its weight, because micro-batches, batches and hosts add up: a figure is
sum(total) / sum(weight), however its batch was cut. Of nothing it is nan, not
0. The numpy side, which makes the batch, is training/data/examples.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from architectures.parts.skeletons import Output
from training import losses


class Mean(NamedTuple):
  """A mean that has yet to be taken; both of its numbers add up.

  Attributes:
    total: the weighted sum.
    weight: the sum of the weights.
  """
  total: jax.Array
  weight: jax.Array


def targets(batch) -> jax.Array:
  """The tokens to predict, by their weights."""
  return batch['weights'].astype(jnp.float32).sum()


def rows(batch) -> jax.Array:
  """The rows that are not padding."""
  return _real_B(batch).sum()


def _real_B(batch) -> jax.Array:
  return (batch['segment_ids'] != 0).any(1).astype(jnp.float32)


class Objective(NamedTuple):
  """What a model is given of a batch, and the loss of what it returns.

  Attributes:
    inputs: batch keys, the module's positional arguments.
    options: batch key, if there: keyword of the module.
    seen: batch keys whose entries tell tokens from padding, which is 0.
    figures: (output, batch, config) -> {name: Mean}, in nats where a loss.
    terms: what of a batch each mean in the loss is over, by its figure's name;
      the loss is their sum. The first is the mean over tokens to predict.
    generates: whether the model writes text after a prompt.
  """
  inputs: tuple[str, ...]
  options: dict[str, str]
  seen: tuple[str, ...]
  figures: Callable
  terms: Mapping[str, Callable]
  generates: bool

  def apply(self, module, params, batch, **kwargs) -> Output:
    """Runs `module` on what this objective shows it of the batch."""
    options = {keyword: batch[key] for key, keyword in self.options.items()
               if key in batch}
    return module.apply({'params': params},
                        *[batch[key] for key in self.inputs], **options,
                        **kwargs)

  @property
  def main(self) -> str:
    """The figure that is the loss of a token to predict."""
    return next(iter(self.terms))

  def weights(self, batch) -> dict[str, jax.Array]:
    """Returns what each term of the loss is divided by in this batch."""
    return {name: of(batch) for name, of in self.terms.items()}

  def tokens(self, batch) -> jax.Array:
    """Returns how many tokens of a batch the model sees, padding apart."""
    return sum((batch[key] != 0).astype(jnp.float32).sum()
               for key in self.seen)

  def loss(self, output: Output, batch, config, whole=None
           ) -> tuple[jax.Array, dict[str, Mean]]:
    """Returns a batch's share in whole[main] times the loss, and its figures.

    The shares of micro-batches add up, and so do their gradients.

    Args:
      output: the model's.
      batch: a batch, or a micro-batch.
      config: the run's.
      whole: `weights` of the whole batch; None: this is the whole.
    """
    figures = self.figures(output, batch, config)
    whole = self.weights(batch) if whole is None else whole
    share = figures[self.main].total
    for name in self.terms:
      if name != self.main:
        share += figures[name].total * (whole[self.main] / whole[name])
    return share, figures

  def means(self, figures: Mapping[str, Mean]) -> dict[str, Any]:
    """Returns the figures' values, `loss` among them."""
    values = {name: mean.total / mean.weight
              for name, mean in figures.items()}
    return values | {'loss': sum(values[name] for name in self.terms)}


def given_token(output: Output, batch, config) -> dict[str, Mean]:
  """Cross-entropy of targets [B, L], where weights [B, L] count: of the next
  tokens, or of the masked ones."""
  train = config.train
  loss_sum, sums = losses.cross_entropy(
      output.hidden, output.head, batch['targets'], batch['weights'],
      z_loss=train.z_loss, label_smoothing=train.label_smoothing,
      chunk=train.loss_chunk)
  weight = sums.pop('weight')
  return {name: Mean(total, weight)
          for name, total in (sums | {'loss': loss_sum}).items()}


def mlm_nsp(output: Output, batch, config) -> dict[str, Mean]:
  """BERT's losses: of the masked words, and of whether the second text
  follows. One is a mean over these words, the other over rows."""
  figures = given_token(output, batch, config)
  for name in ('loss', 'accuracy'):
    figures[f'mlm_{name}'] = figures.pop(name)
  real_B = _real_B(batch)
  logits_B2 = output.extra['nsp_logits']
  targets_B1 = batch['nsp_targets'][:, None]
  nsp_B = -jnp.take_along_axis(
      jax.nn.log_softmax(logits_B2, -1), targets_B1, 1)[:, 0]
  right_B = jnp.argmax(logits_B2, -1) == batch['nsp_targets']
  return figures | {
      'nsp_loss': Mean((real_B * nsp_B).sum(), real_B.sum()),
      'nsp_accuracy': Mean((real_B * right_B).sum(), real_B.sum())}


_TOKENS = {'loss': targets}
ENCODER_DECODER = Objective(
    ('tokens', 'decoder_tokens'),
    {'segment_ids': 'segment_ids_BM',
     'decoder_segment_ids': 'decoder_segment_ids_BL'},
    ('segment_ids', 'decoder_segment_ids'), given_token, _TOKENS,
    generates=True)

OBJECTIVES = {
    # Every token of a window but its padding is one to predict from.
    'causal': Objective(
        ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL',
         'weights': 'valid_BL'}, ('weights',), given_token, _TOKENS,
        generates=True),
    'prefix': Objective(
        ('tokens',), {'prefix': 'prefix_B', 'valid': 'valid_BL'}, ('valid',),
        given_token, _TOKENS, generates=True),
    'chat': Objective(('tokens',), {'valid': 'valid_BL'}, ('valid',),
                      given_token, _TOKENS, generates=True),
    'span': ENCODER_DECODER,
    'seq2seq': ENCODER_DECODER,
    'mlm': Objective(
        ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL'},
        ('segment_ids',), given_token, _TOKENS, generates=False),
    'mlm_nsp': Objective(
        ('tokens',),
        {'types': 'type_ids_BL', 'segment_ids': 'segment_ids_BL'},
        ('segment_ids',), mlm_nsp, {'mlm_loss': targets, 'nsp_loss': rows},
        generates=False),
}
