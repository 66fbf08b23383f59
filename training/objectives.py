"""The loss side of an objective: a batch in, the sum of its losses out.

Each function takes (output, batch, config) and returns (loss_sum, figures):
loss_sum in nats, weighted; `figures` are sums too, of which `weight` (what
loss_sum is divided by) is one. Sums, because micro-batches and hosts add up:
a batch's loss is sum(loss_sum) / sum(weight), however it was cut. The numpy
side, which makes the batch, is training/examples.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from architectures.parts.skeletons import Output
from training import losses


class Objective(NamedTuple):
  """What a model is given of a batch, and the loss of what it returns."""
  inputs: tuple[str, ...]  # batch keys, the module's positional arguments
  options: dict[str, str]  # batch key, if there: keyword of the module
  loss: Callable
  generates: bool  # whether the model writes text after a prompt

  def apply(self, module, params, batch, **kwargs) -> Output:
    """Runs `module` on what this objective shows it of the batch."""
    options = {keyword: batch[key] for key, keyword in self.options.items()
               if key in batch}
    return module.apply({'params': params},
                        *[batch[key] for key in self.inputs], **options,
                        **kwargs)


def given_token(output: Output, batch, config) -> tuple[jax.Array, dict]:
  """Cross-entropy of targets [B, L], where weights [B, L] count: of the next
  tokens, or of the masked ones."""
  train = config.train
  return losses.cross_entropy(
      output.hidden, output.head, batch['targets'], batch['weights'],
      z_loss=train.z_loss, label_smoothing=train.label_smoothing,
      chunk=train.loss_chunk)


def mlm_nsp(output: Output, batch, config) -> tuple[jax.Array, dict]:
  """BERT's loss: masked words, plus whether the second text follows.

  A row's second loss counts as often as the row has masked words, so that
  both are means over the same weight; rows have about as many each.
  """
  loss_sum, figures = given_token(output, batch, config)
  mlm_accuracy = figures.pop('accuracy')
  weight_B = batch['weights'].astype(jnp.float32).sum(1)
  logits_B2 = output.extra['nsp_logits']
  targets_B1 = batch['nsp_targets'][:, None]
  nsp_B = -jnp.take_along_axis(
      jax.nn.log_softmax(logits_B2, -1), targets_B1, 1)[:, 0]
  right_B = jnp.argmax(logits_B2, -1) == batch['nsp_targets']
  nsp_sum = (weight_B * nsp_B).sum()
  more = dict(mlm_loss=loss_sum, mlm_accuracy=mlm_accuracy,
              nsp_loss=nsp_sum, nsp_accuracy=(weight_B * right_B).sum())
  return loss_sum + nsp_sum, figures | jax.lax.stop_gradient(more)


ENCODER_DECODER = Objective(
    ('tokens', 'decoder_tokens'),
    {'segment_ids': 'segment_ids_BM',
     'decoder_segment_ids': 'decoder_segment_ids_BL'},
    given_token, generates=True)

OBJECTIVES = {
    # Every token of a window but its padding is one to predict from.
    'causal': Objective(
        ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL',
         'weights': 'valid_BL'}, given_token, generates=True),
    'prefix': Objective(
        ('tokens',), {'prefix': 'prefix_B', 'valid': 'valid_BL'}, given_token,
        generates=True),
    'chat': Objective(('tokens',), {'valid': 'valid_BL'}, given_token,
                      generates=True),
    'span': ENCODER_DECODER,
    'seq2seq': ENCODER_DECODER,
    'mlm': Objective(
        ('tokens',),
        {'positions': 'positions_BL', 'segment_ids': 'segment_ids_BL'},
        given_token, generates=False),
    'mlm_nsp': Objective(
        ('tokens',),
        {'types': 'type_ids_BL', 'segment_ids': 'segment_ids_BL'}, mlm_nsp,
        generates=False),
}
