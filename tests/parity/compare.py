"""Our side of the comparison: outputs, gradients, greedy tokens, layers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import blocks
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.positions import RopeConfig
from tests.parity.recording import Recording
from training import generate
from architectures.parts import paths
from training.hf import config as hf_config, files, weights

NEW_TOKENS = 64
# What model.rope says in its own words, where a config.json has none for it.
OUR_ROPE = {'llama-ntk': dict(scaling='ntk', theta=1e4, factor=4.0)}
LIMITS = dict(output=1e-5, grads=1e-4, layer=1e-5, attention=1e-5, greedy=0.0,
              export=1e-6)


class Finding(NamedTuple):
  """One comparison: what, how far off, and how far it may be."""
  what: str
  error: float
  limit: float

  @property
  def ok(self) -> bool:
    return self.error <= self.limit


def error(ours, theirs) -> float:
  """The largest difference over the largest value; NaN where one is."""
  # A file has a scalar as [1].
  ours, theirs = np.squeeze(ours), np.squeeze(theirs)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def worst(ours, theirs, inputs) -> float:
  """The largest error of any output, padding apart; infinite where one is
  not there."""
  if ours.keys() != theirs.keys():
    return float('inf')
  return max(error(_seen(ours[name], inputs, name),
                   _seen(theirs[name], inputs, name)) for name in theirs)


def model_of(recording: Recording, rope: dict | None = None):
  """Returns (module, params) of a recording; `rope` changes model.rope."""
  config = hf_config.model_of_config_json(recording.config)
  if rope:
    config = config.with_part(RopeConfig, **rope)
  module = architectures.build(config)
  return module, weights.read_params(
      module, files.Files(recording.weights)).params


def findings_of(recording: Recording, rope: dict | None = None,
                whole: bool = True) -> list[Finding]:
  """Returns every comparison of our model with a recording; not `whole`: those
  of its outputs, which compile in a third of the time."""
  module, params = model_of(recording, rope)
  stack = architectures.stack(module.config)
  call = CALLS[stack]
  inputs = {k: jnp.asarray(v) for k, v in recording.inputs.items()}

  def loss(params):
    outputs, layers, attention = call(module, params, inputs)
    outputs = {name: outputs[name] for name in recording.outputs}
    return (objective(outputs, inputs, jnp.asarray),
            (outputs, (layers, attention) if recording.layers else ((), ())))

  of_loss = jax.grad(loss, has_aux=True) if whole else loss
  grads, (outputs, (layers, attention)) = jax.jit(of_loss)(params)
  findings = [Finding(name, error(_seen(outputs[name], inputs, name),
                                  _seen(value, recording.inputs, name)),
                      LIMITS['output'])
              for name, value in recording.outputs.items()]
  if not whole:
    return findings
  theirs = weights.read_params(module, files.Files(recording.grads)).params
  findings.append(Finding('grads', grad_error(
      paths.flatten_by_path(grads), paths.flatten_by_path(theirs)),
                          LIMITS['grads']))
  if recording.greedy:
    findings.append(Finding('greedy', _greedy(module, params, recording),
                            LIMITS['greedy']))
  if not recording.layers:
    return findings
  names = layer_names(module.config)
  for name, mine, value in zip(names, layers, recording.layers, strict=True):
    findings.append(Finding(name, error(
        _seen(mine, inputs, 'logits'),
        _seen(value, recording.inputs, 'logits')), LIMITS['layer']))
  for name, value in recording.attention.items():
    queries = inputs['decoder_mask' if name in ('decoder', 'cross') else 'mask']
    real_1B1L1 = np.asarray(queries)[None, :, None, :, None]
    findings.append(Finding(f'{name} attention', error(
        np.asarray(attention[name]) * real_1B1L1, value * real_1B1L1),
                            LIMITS['attention']))
  return findings


def layer_names(c) -> list[str]:
  """Returns what _decoder, ... give for each layer: of each stack, what comes
  out of the embedding and what each layer returns."""
  stacks = [('', len(c.layer_kinds(c.num_layers)))]  # of all passes
  if architectures.stack(c) == 'encoder-decoder':
    stacks = [('encoder ', c.num_layers), ('decoder ', c.num_decoder_layers)]
  return [f'{stack}{name}' for stack, layers in stacks
          for name in ('embedding', *(f'layer {n}' for n in range(layers)))]


def inputs(stack: str, tree: dict) -> dict[str, np.ndarray]:
  """Returns what goes into a model: tokens, and which of them are padding."""
  random = np.random.RandomState(0)
  # What is padding there. RoBERTa's, and what readings.py makes of it, is none
  # of a text.
  first = 2 if stack == 'encoder-decoder' else 1 + (
      2 * (tree.get('pad_token_id') or 0) if stack == 'encoder' else 0)
  tokens = random.randint(first, tree['vocab_size'], (3, 12)).astype(
      np.int32)
  mask = (np.arange(12) < np.array([[12], [7], [12]])).astype(np.int32)
  made = dict(tokens=tokens, mask=mask)
  if stack == 'encoder-decoder':
    made['decoder_tokens'] = tokens[::-1, ::-1].copy()
    made['decoder_mask'] = mask[::-1].copy()
    made['decoder_mask'][:, 11] = 0
  if stack == 'encoder':
    made['types'] = (np.arange(12) >= np.array([[5], [3], [9]])).astype(
        np.int32) % max(1, tree.get('type_vocab_size', 1))
  return made


def padded(inputs: dict[str, np.ndarray], left: bool) -> dict[str, np.ndarray]:
  """Returns inputs whose padding is the token 0, on one side of each row."""
  arrays = {name: x * inputs['mask'] for name, x in inputs.items()}
  if not left:
    return arrays
  count = 12 - inputs['mask'].sum(1)
  arrays = {name: np.stack([np.roll(row, n) for row, n in zip(x, count)])
            for name, x in arrays.items()}
  return arrays | dict(positions=np.maximum(
      arrays['mask'].cumsum(1) - 1, 0).astype(np.int32))


def prompts(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the prompts that are continued: unpadded, of two lengths."""
  return {'0': inputs['tokens'][0, :5], '1': inputs['tokens'][1, :7]}


def objective(outputs, inputs, asarray: Callable):
  """A scalar in which every output counts differently, padding not at all.

  The same code runs on PyTorch's and on JAX's arrays.
  """
  total = 0.0
  for name, value in sorted(outputs.items()):
    weight = np.cos(0.7 * np.arange(np.prod(value.shape))).reshape(
        tuple(value.shape)).astype(np.float32)
    total = total + (_seen(value, inputs, name, asarray)
                     * asarray(weight)).sum()
  return total / 10


def _seen(value, inputs, name: str, asarray=np.asarray):
  """Sets to zero what stands on padding."""
  if name not in ('logits',) or value.ndim != 3:
    return value
  mask = inputs['decoder_mask' if 'decoder_mask' in inputs else 'mask']
  return value * asarray(np.asarray(mask, np.float32)[..., None])


def grad_error(ours, theirs) -> float:
  """The worst parameter, of gradients by path: |difference| / |gradient|, or
  over 1e-3 of the largest |gradient| where the parameter's own is zero but for
  rounding."""
  mine = {k: np.asarray(v) for k, v in ours.items()}
  other = {k: np.asarray(v) for k, v in theirs.items()}
  largest = np.max([np.linalg.norm(v) for v in other.values()])
  assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
  # Not max(), which passes over a NaN that is not the first.
  return float(np.max([
      np.linalg.norm(mine[k] - v) / max(np.linalg.norm(v), 1e-3 * largest)
      for k, v in other.items()]))


def _greedy(module, params, recording: Recording) -> float:
  """The share of tokens that differ."""
  texts = prompts(recording.inputs)
  longest = max(len(p) for p in texts.values())
  padded = np.stack([np.pad(p, (0, longest - len(p))) for p in texts.values()])
  lengths = np.array([len(p) for p in texts.values()])
  padded, lengths, sources = jnp.asarray(padded), jnp.asarray(lengths), {}
  if architectures.stack(module.config) == 'encoder-decoder':
    sources = dict(source_BM=padded, source_lengths_B=lengths)
    padded = jnp.full((len(texts), 1),
                      recording.config['decoder_start_token_id'])
    lengths = jnp.ones_like(lengths)
  new = generate.generate(
      module, params, padded, lengths, jax.random.key(0),
      max_new_tokens=NEW_TOKENS, sampling=generate.Sampling(temperature=0),
      **sources)
  wrong = [np.asarray(new[i]) != recording.greedy[row]
           for i, row in enumerate(texts)]
  return float(np.mean(wrong))


def _scores(out):
  return out.logits if out.head else out.extra['scores']


def _decoder(module, params, inputs):
  weighs = not blocks.has_layers_with_state(module.config)
  out = module.apply({'params': params}, inputs['tokens'],
                     positions_BL=inputs.get('positions'),
                     segment_ids_BL=inputs['mask'], keep_layers=True,
                     keep_attention=weighs)
  layers = [*out.aux['layers'][:-1], out.hidden]  # theirs ends normalised
  outputs = dict(logits=_scores(out))
  if out.aux.get('losses') and out.head:  # theirs is top_k times ours
    moe = module.config.part(MoEConfig)
    outputs['balance'] = (out.aux['losses']['balance']
                          / moe.balance_weight * moe.top_k)
  return outputs, layers, dict(self=out.aux['attention']) if weighs else {}


def _encoder(module, params, inputs):
  out = module.apply({'params': params}, inputs['tokens'],
                     type_ids_BL=inputs['types'],
                     segment_ids_BL=inputs['mask'], keep_layers=True,
                     keep_attention=True)
  nsp = {name: x for name, x in out.extra.items() if name == 'nsp_logits'}
  layers = [*out.aux['layers'][:-1], out.extra['hidden']]  # normalised at last
  return (dict(logits=_scores(out)) | nsp, layers,
          dict(self=out.aux['attention']))


def _encoder_decoder(module, params, inputs):
  out = module.apply(
      {'params': params}, inputs['tokens'], inputs['decoder_tokens'],
      segment_ids_BM=inputs['mask'],
      decoder_segment_ids_BL=inputs['decoder_mask'], keep_layers=True,
      keep_attention=True)
  split = module.config.num_layers + 1
  encoder, decoder = out.aux['layers'][:split], out.aux['layers'][split:]
  layers = [x * inputs['mask'][..., None] for x in (*encoder[:-1], out.memory)]
  layers += [*decoder[:-1], out.hidden]  # theirs end normalised
  outputs = dict(logits=out.logits)
  if 'losses' in out.aux:
    moe, losses = module.config.part(MoEConfig), out.aux['losses']
    # GShard's counts as many choices as it makes.
    outputs['balance'] = losses['balance'] / moe.balance_weight * moe.top_k
    if 'router_z' in losses:
      outputs['router_z'] = losses['router_z'] / moe.z_loss_weight
  count = module.config.num_layers
  attention = dict(encoder=jnp.stack(out.aux['attention'][:count]),
                   decoder=jnp.stack(out.aux['attention'][count:]),
                   cross=out.aux['cross_attention'])
  return outputs, layers, attention


# stack: (module, params, inputs) -> (outputs by name, the layers' results,
# attention weights by name)
CALLS = {
    'decoder': _decoder,
    'encoder': _encoder,
    'encoder-decoder': _encoder_decoder,
}
