"""transformers' side of the comparison; PyTorch is imported here alone."""

from collections.abc import Callable
import functools
import inspect
import json
import pathlib
import re
import sys
import tempfile
import types

import numpy as np

import architectures
from architectures import mamba2
from common.errors import RequestError
from tests.parity import compare
from tests.parity.recording import HALF, Recording
from training.hf import files as hf_files


def run(config: dict, system: str, given: dict[str, np.ndarray] | None = None,
        head: str = 'lm', left: bool | None = None, greedy: bool = True
        ) -> Recording:
  """Returns what transformers computes for a model, on the CPU.

  Args:
    config: its config.json.
    system: of ours.
    given: its weights by name; None: random ones, which all matter.
    head: of the model.
    left: of a head: whether rows are padded on the left.
    greedy: whether prompts are continued.
  """
  stack = architectures.systems()[system].STACK
  with tempfile.TemporaryDirectory() as folder:
    model = (draw(config, system, head) if given is None else
             load(write(folder, config, given), system))
  config, weights = saved(model)
  inputs = compare.inputs(stack, config)
  if left is not None:
    inputs = compare.padded(inputs, left)
  layers, attention = _insides(model, stack, inputs) if head == 'lm' else (
      [], {})
  continued = (_greedy(model, stack, inputs)
               if greedy and stack != 'encoder' and head == 'lm' else {})
  outputs = {name: value.detach().numpy()
             for name, value in forward(model, stack, inputs).items()}
  compare.objective(
      forward(model, stack, inputs), inputs, _torch().as_tensor).backward()
  with _torch().no_grad():
    for parameter in model.parameters():
      grad = parameter.grad
      parameter.copy_(_torch().zeros_like(parameter) if grad is None else grad)
    for buffer in _biases(model) + _tables(model):
      buffer.zero_()
  _, grads = saved(model)
  return Recording(config, weights, inputs, outputs, grads, continued, layers,
                   attention)


def _torch():
  import torch
  import transformers
  torch.set_num_threads(1)
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  return torch


def write(folder, config: dict, weights: dict[str, np.ndarray]):
  """Writes a folder as transformers does; returns it."""
  from safetensors.numpy import save_file
  (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config))
  save_file({name: np.ascontiguousarray(x) for name, x in weights.items()},
            pathlib.Path(folder) / 'model.safetensors',
            metadata=dict(format='pt'))
  return folder


def load(folder, system: str, head: str = 'lm'):
  """Returns the model of a folder, as transformers reads it.

  Raises:
    RequestError: naming keys that are missing or unexpected.
    Exception: whatever else transformers has against the folder.
  """
  torch = _torch()
  import transformers
  tree = json.loads((pathlib.Path(folder) / 'config.json').read_text())
  named = (tree.get('architectures') or [''])[0]  # of BERT, one of several
  kind = getattr(transformers, named, None) or model_class(system, head)
  model, info = kind.from_pretrained(
      folder, output_loading_info=True, attn_implementation='eager',
      dtype=torch.float32)
  wrong = {key: value for key, value in info.items() if value}
  if wrong:
    raise RequestError(f'{system}: transformers says {wrong}')
  mend(model)
  if tree['model_type'] == 'zaya':
    _reread_biases(model, folder)
  if head != 'lm':  # transformers looks for the last token that is not it
    model.config.pad_token_id = 0
  return model.eval()


def draw(config: dict, system: str, head: str = 'lm'):
  """Returns a random model of a config.json whose every parameter matters."""
  torch = _torch()
  kind = model_class(system, head)
  of_head = {} if head == 'lm' else dict(
      num_labels=2 if head == 'span' else 3, pad_token_id=0)
  # Some classes take none of what transformers writes for infinity.
  config = kind.config_class.from_dict({
      name: [float('inf') if x == mamba2.INFINITY_IN_JSON else x for x in value]
      if isinstance(value, list) else value
      for name, value in (config | of_head).items()})
  if of_head and not getattr(config, 'layer_types', None):
    config.num_hidden_layers = 1  # so that a recording is small
    if hasattr(config, 'first_k_dense_replace'):
      config.first_k_dense_replace = 0
  config._attn_implementation = 'eager'  # the plain formula
  torch.manual_seed(0)
  model = kind(config).eval()
  mend(model)
  half = getattr(torch, np.dtype(HALF).name)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:  # Marian's sinusoids need none
        noise = 0.15 * torch.randn_like(parameter)
        parameter.copy_((parameter + noise).to(half).float())
    for buffer in _biases(model):
      buffer.copy_((0.15 * torch.randn_like(buffer)).to(half).float())
    for buffer in _tables(model):
      rows, columns = map(torch.arange, buffer.shape)
      buffer.copy_((3 * rows[:, None] + columns) % config.n_routed_experts)
  return model


def _biases(model) -> list:
  """Returns the biases of routers that no gradient reaches (DeepSeek-V3,
  Zaya)."""
  return [buffer for name, buffer in model.named_buffers()
          if name.endswith(('e_score_correction_bias', 'balancing_biases'))]


def _reread_biases(model, folder) -> None:
  """Reads the biases of routers again: transformers sets the last one of each,
  that of the skip, to -1 after it has read them."""
  torch, files = _torch(), hf_files.Files(pathlib.Path(folder))
  for name, buffer in model.named_buffers():
    if name.endswith('balancing_biases'):
      buffer.copy_(torch.tensor(np.array(files[name])))


def _tables(model) -> list:
  """Returns which experts each token has, where these are fixed
  (DeepSeek-V4)."""
  return [buffer for name, buffer in model.named_buffers()
          if name.endswith('tid2eid')]


def model_class(system: str, head: str = 'lm') -> type:
  """Returns transformers' class for a system with a head."""
  import transformers
  page = architectures.hugging_face(system)
  return getattr(transformers, page.heads.get(head, page).architecture)


def saved(model) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns config.json and the tensors as transformers writes them."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config = json.loads((pathlib.Path(folder) / 'config.json').read_text())
    files = hf_files.Files(pathlib.Path(folder))
    return config, {name: np.array(files[name]) for name in files}


def _call(model, stack: str, inputs, **kwargs):
  import torch
  t = {name: torch.as_tensor(value) for name, value in inputs.items()}
  names = dict(tokens='input_ids', mask='attention_mask',
               types='token_type_ids', decoder_tokens='decoder_input_ids',
               decoder_mask='decoder_attention_mask',
               positions='position_ids')
  takes = inspect.signature(model.forward).parameters
  for ours in ('positions', 'types'):  # BLOOM tells distances by the mask
    if names[ours] not in takes:
      t.pop(ours, None)
  return model(**{names[name]: value.long() for name, value in t.items()},
               **kwargs)


def forward(model, stack: str, inputs):
  """Returns the outputs of compare.CALLS[stack], by name."""
  import torch
  experts = getattr(model.config, 'num_experts', 0)
  out = _call(model, stack, inputs,
              **dict(output_router_logits=True) if experts else {})
  if stack == 'encoder-decoder' and experts:
    return dict(logits=out.logits) | _losses(model, out, inputs)
  if type(model).__name__ == 'ElectraForPreTraining':
    return dict(logits=out.logits[..., None])
  if 'start_logits' in out:
    return dict(logits=torch.stack([out.start_logits, out.end_logits], -1))
  if stack == 'encoder' and 'prediction_logits' in out:
    return dict(logits=out.prediction_logits,
                nsp_logits=out.get('seq_relationship_logits',
                                   out.get('sop_logits')))
  if getattr(out, 'router_logits', None) is None or not hasattr(
      _module(model), 'load_balancing_loss_func') or _biases(model):
    # DeepSeek's has none, and MiniMax's is not of its router's sigmoids.
    return dict(logits=out.logits)
  return dict(logits=out.logits, balance=_balance(model, out, inputs))


def _module(model):
  """Returns transformers' file of a model."""
  return sys.modules[type(model).__module__]


def _losses(model, out, inputs):
  """Returns the routers' losses of an encoder-decoder: theirs of each layer
  by itself, over all tokens but padding as one group, summed."""
  import torch
  theirs = _module(model)
  losses = dict(balance=0.0)
  for stack, mask in (('encoder', 'mask'), ('decoder', 'decoder_mask')):
    seen = torch.as_tensor(inputs[mask]).bool().reshape(-1)
    for logits in getattr(out, f'{stack}_router_logits'):
      logits = logits.reshape(len(seen), -1)[seen]
      if hasattr(theirs, 'router_z_loss_func'):  # Switch
        losses['balance'] += theirs.load_balancing_loss_func(
            logits.softmax(-1)[None], logits.argmax(-1)[None])
        losses['router_z'] = losses.get(
            'router_z', 0.0) + theirs.router_z_loss_func(logits[None])
      else:
        losses['balance'] += theirs.load_balancing_loss_func(
            (logits,), model.config.num_experts, 2)
  return losses


def _balance(model, out, inputs):
  """Returns their balancing loss, of each layer by itself, summed."""
  import torch
  loss = _module(model).load_balancing_loss_func
  mask = torch.as_tensor(inputs['mask'])
  return sum(loss((logits,), model.num_experts,
                  model.config.num_experts_per_tok, mask)
             for logits in out.router_logits)


def _insides(model, stack: str, inputs: dict[str, np.ndarray]
             ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
  """Returns what each layer returns, and its attention weights by name."""
  import torch
  with torch.no_grad():
    out = _call(model, stack, inputs, output_hidden_states=True,
                output_attentions=True)
  if stack == 'encoder-decoder':
    mask = torch.as_tensor(inputs['mask'])[..., None]
    states = [state * mask for state in out.encoder_hidden_states]
    states += out.decoder_hidden_states
    attention = dict(encoder=out.encoder_attentions,
                     decoder=out.decoder_attentions, cross=out.cross_attentions)
  else:
    states, attention = out.hidden_states, dict(self=out.attentions)
    mixer = getattr(getattr(model, 'model', 0), 'hyper_connection_mixer', None)
    if mixer:  # its streams, as the head would read them
      first, *states, last = states
      with torch.no_grad():
        states = [first[..., :last.shape[-1]], *map(mixer, states), last]
    if out.attentions is None or len(out.attentions) < len(states) - 1:
      attention = {}  # where a layer is a recurrence, none are compared
  return ([state.numpy() for state in states],
          {name: torch.stack(layers).numpy()
           for name, layers in attention.items()})


def _greedy(model, stack: str, inputs) -> dict[str, np.ndarray]:
  """Returns the likeliest continuation of each prompt, one by one."""
  import torch
  continued = {}
  for row, prompt in compare.prompts(inputs).items():
    ids = torch.as_tensor(prompt)[None].long()
    with torch.no_grad():
      new = model.generate(
          ids, attention_mask=torch.ones_like(ids), do_sample=False,
          max_new_tokens=compare.NEW_TOKENS, use_cache=True)
    continued[row] = new[0, -compare.NEW_TOKENS:].numpy().astype(np.int32)
  return continued


def logits(system: str, folder, inputs, head: str = 'lm',
           off_by_rounding: int | None = None) -> dict[str, np.ndarray]:
  """Returns the logits of a folder as transformers reads it, by name. With a
  seed in `off_by_rounding` all weights are off by about half of a last digit.
  """
  model = load(folder, system, head)
  if off_by_rounding is not None:
    torch = _torch()
    torch.manual_seed(off_by_rounding)
    half_a_digit = torch.finfo(torch.float32).eps / 2
    with torch.no_grad():
      for weight in model.parameters():
        weight.mul_(1 + half_a_digit * torch.randn_like(weight))
  with _torch().no_grad():
    return {name: value.numpy() for name, value in forward(
        model, architectures.systems()[system].STACK, inputs).items()
            if 'logits' in name}


# What is changed in a reference before it is compared, and why.


def mend(model) -> None:
  """Changes a model of transformers in place, where it needs it."""
  change = MENDS.get(type(model).__name__)
  if change:
    change(model)


def _t5(model) -> None:
  """v1.1's head is a matrix of its own; transformers 5 ties it when it builds
  a model, and only tells it apart when it reads a file."""
  if not model.config.scale_decoder_outputs:
    _untie(model)


def _untie(model) -> None:
  """So is that of every published mT5."""
  import torch
  model.lm_head.weight = torch.nn.Parameter(
      model.lm_head.weight.detach().clone())


def _marian(model) -> None:
  """The bias on the logits is a buffer there: as a parameter, its gradient
  can be compared too."""
  import torch
  bias = model.final_logits_bias.detach().clone()
  del model.final_logits_bias
  model.final_logits_bias = torch.nn.Parameter(bias)


def _nllb(model) -> None:
  """transformers 5 takes a one-hot mask for an expert's number, and so runs
  experts 0 and 1 alone. Here each token's own, as in version 4."""
  for module in model.modules():
    if type(module).__name__ == 'NllbMoeExperts':
      module.forward = types.MethodType(_experts, module)


def _experts(self, hidden_states, router_mask, router_probs):
  del router_mask
  return sum(router_probs[:, e:e + 1] * self[f'expert_{e}'](hidden_states)
             for e in range(self.num_experts))


def _mend_states(model, mended: Callable, attentions: bool = False) -> None:
  """Lets `mended` make the hidden states that a model returns of its own, and
  of its input; `attentions`: whether its attention is kept."""
  forward = model.forward

  @functools.wraps(forward)
  def call(*args, **kwargs):
    out = forward(*args, **kwargs)
    if out.hidden_states is not None:
      out.hidden_states = mended(out.hidden_states, kwargs.get('input_ids'))
    if not attentions:
      out.attentions = None
    return out
  model.forward = call


def _mamba2(model) -> None:
  """Its hidden states leave out what the embedding gives, and have what the
  last layer returns twice, before the norm and after it."""
  _mend_states(model, lambda states, ids: (
      model.get_input_embeddings()(ids), *states[:-2], states[-1]))


def _deepseek_v4(model) -> None:
  """Its hidden states are several streams, of which the end of the stack makes
  one, and its attention weighs entries."""
  _mend_states(model, lambda states, ids: (states[0][:, :, 0], *(
      x if x.ndim == 3 else model.model.hc_head(x) for x in states[1:])))


def _zaya(model) -> None:
  """Its keys are convolved, and our weights of such a layer are not kept."""
  _mend_states(model, lambda states, ids: states)


def _nemotron_h(model) -> None:
  """A network is a layer of its own there, and here a part of the layer before
  it: what such a layer returns is what the next one without a network reads.
  """
  types = model.config.layers_block_type
  _mend_states(model, lambda states, ids: (*(
      state for state, kind in zip(states, types)
      if kind.endswith('attention')), states[-1]), attentions=True)


def _gemma4(model) -> None:
  """The number of each layer is no parameter there, so it has no gradient."""
  for layer in model.model.layers:
    layer.layer_scalar = _torch().nn.Parameter(
        layer._buffers.pop('layer_scalar'))


def _kimi_linear(model) -> None:
  """It writes the network of a dense layer under the name of the experts.
  Published files have it under its own name, and both are read."""
  _write_as(model, lambda tensors: {
      re.sub(r'\.block_sparse_moe\.(gate|up|down)_proj\.', r'.mlp.\1_proj.',
             name): x for name, x in tensors.items()})


def _olmo_hybrid(model) -> None:
  """It writes a norm of the layers that attend under the name that those of a
  recurrence have, and cuts the filters of queries, keys and values into equal
  parts. In published files each part is its own."""
  c = model.config
  attend = '|'.join(str(n) for n, word in enumerate(c.layer_types)
                    if word == 'full_attention')
  keys = c.linear_num_key_heads * c.linear_key_head_dim
  sizes = keys, keys, c.linear_num_value_heads * c.linear_value_head_dim

  def published(tensors):
    tensors = {re.sub(rf'\.({attend})\.feedforward_layer_norm',
                      r'.\1.post_attention_layernorm', name): x
               for name, x in tensors.items()}
    for name in [name for name in tensors if 'q_conv1d' in name]:
      names = [name.replace('q_conv1d', f'{x}_conv1d') for x in 'qkv']
      parts = _torch().cat([tensors[name] for name in names]).split(sizes)
      tensors |= {name: part.clone() for name, part in zip(names, parts)}
    return tensors

  _write_as(model, published)


def _write_as(model, change) -> None:
  """Makes a model write its tensors, by name, as `change` returns them."""
  from safetensors.torch import load_file, save_file
  save = model.save_pretrained

  @functools.wraps(save)
  def mended(folder, **kwargs):
    save(folder, **kwargs)
    file = pathlib.Path(folder) / 'model.safetensors'
    save_file(change(load_file(file)), file)
  model.save_pretrained = mended


MENDS = {
    'BartForConditionalGeneration': _marian,
    'DeepseekV4ForCausalLM': _deepseek_v4,
    'Gemma4ForCausalLM': _gemma4,
    'KimiLinearForCausalLM': _kimi_linear,
    'MambaForCausalLM': _mamba2,
    'Mamba2ForCausalLM': _mamba2,
    'T5ForConditionalGeneration': _t5,
    'UMT5ForConditionalGeneration': _t5,
    'MarianMTModel': _marian,
    'MT5ForConditionalGeneration': _untie,
    'NemotronHForCausalLM': _nemotron_h,
    'NllbMoeForConditionalGeneration': _nllb,
    'OlmoHybridForCausalLM': _olmo_hybrid,
    'ZayaForCausalLM': _zaya,
}


def main(name: str, config: str) -> None:
  """Records a case: python -m tests.parity.reference SYSTEM-CASE CONFIG.json"""
  from tests.parity import recording
  system = name.partition('-')[0]
  recording.save_recording(
      run(json.loads(pathlib.Path(config).read_text()), system),
      recording.FOLDER / 'parity' / f'{name}.safetensors')


if __name__ == '__main__':
  main(*sys.argv[1:])
