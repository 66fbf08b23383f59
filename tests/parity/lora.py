"""Low-rank adapters beside PEFT's: the outputs, the gradients of A and B, and
the folders of each that the other reads."""

import importlib.util
import json
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np

import architectures
from tests.parity import compare, recording, reference
from architectures.parts import paths
from training.hf import config as hf_config, files, peft, weights

# The modules that get an adapter, as PEFT names them. BERT's pooler and head
# are dense modules too, which get none here; transformers has experts in one
# array. Of hybrids some layers alone have one.
MODULES = {
    'gpt': ['c_proj', 'c_fc'],
    'llama': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
              'down_proj'],
    'bert': r'.*encoder.*\.(query|key|value|dense)',
    't5': ['q', 'k', 'v', 'o', 'wi', 'wo'],
    'mixtral': ['q_proj', 'v_proj'],
    'llama4': ['q_proj', 'k_proj', 'v_proj', 'o_proj'],
    'granitemoehybrid': r'.*shared_mlp\.output_linear',
    'nemotron_h': ['up_proj', 'down_proj'],
    'zaya': ['k_proj', 'v_proj_current', 'v_proj_delayed', 'o_proj'],
}
LORA = dict(r=3, lora_alpha=7, lora_dropout=0.0)


class Adapted(NamedTuple):
  """What PEFT computes."""
  config: dict  # of the model that is adapted
  weights: dict[str, np.ndarray]
  inputs: dict[str, np.ndarray]
  outputs: dict[str, np.ndarray]


def findings(system: str) -> list[compare.Finding]:
  """Returns every comparison of a system's adapters."""
  import jax
  import jax.numpy as jnp
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    theirs = _run(system, folder)
    plain = hf_config.model_of_config_json(theirs.config)
    base, _ = weights.read_params(architectures.build(plain),
                                  files.Files(theirs.weights))
    model, adapters = peft.read_adapters(plain, folder / 'adapters')
    module = architectures.build(model)
    params = weights.add_adapters(base, adapters)
    inputs = {k: jnp.asarray(v) for k, v in theirs.inputs.items()}
    call = compare.CALLS[architectures.stack(model)]

    def loss(params):
      outputs, *_ = call(module, params, inputs)
      outputs = {name: outputs[name] for name in theirs.outputs}
      return compare.objective(outputs, inputs, jnp.asarray), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    grads = {path: x for path, x in paths.flatten_by_path(grads).items()
             if weights.is_adapter(path)}
    _, wanted = peft.read_adapters(plain, folder / 'grads')
    peft.write_adapters(model, params, folder / 'ours', '')
    return [
        compare.Finding('output', compare.worst(
            {k: np.asarray(v) for k, v in outputs.items()}, theirs.outputs,
            theirs.inputs), compare.LIMITS['output']),
        compare.Finding('grads', compare.grad_error(
            grads, paths.flatten_by_path(wanted)), compare.LIMITS['grads']),
        compare.Finding('export', compare.error(
            _loaded(system, folder / 'ours', theirs.inputs),
            theirs.outputs['logits']), compare.LIMITS['output'])]


def _run(system: str, folder: pathlib.Path) -> Adapted:
  """Returns what PEFT computes; writes its adapters and their gradients."""
  theirs = importlib.import_module('peft')
  import torch
  stack = architectures.systems()[system].STACK
  base = _base(system)
  config, base_weights = reference.saved(base)
  adapted = theirs.get_peft_model(base, theirs.LoraConfig(
      **LORA, target_modules=MODULES[system]))
  adapted.eval()
  trained = {name: p for name, p in adapted.named_parameters()
             if p.requires_grad}
  with torch.no_grad():
    for parameter in trained.values():
      parameter.copy_(0.3 * torch.randn_like(parameter))
  adapted.save_pretrained(folder / 'adapters')
  inputs = compare.inputs(stack, config)
  outputs = reference.forward(base, stack, inputs)
  compare.objective(outputs, inputs, torch.as_tensor).backward()
  with torch.no_grad():
    for parameter in trained.values():
      parameter.copy_(parameter.grad)
  adapted.save_pretrained(folder / 'grads')
  return Adapted(config, base_weights, inputs, {
      name: value.detach().numpy() for name, value in outputs.items()})


def _loaded(system: str, folder: pathlib.Path, inputs) -> np.ndarray:
  """Returns the logits of our adapters, as PEFT reads them."""
  theirs = importlib.import_module('peft')
  import torch
  base = _base(system)
  adapted = theirs.PeftModel.from_pretrained(base, folder).eval()
  names = {name for name, _ in adapted.named_parameters() if 'lora_' in name}
  tree = json.loads((folder / peft.CONFIG).read_text())
  assert len(names) == 2 * len(tree['target_modules'])
  with torch.no_grad():
    return reference.forward(base, architectures.systems()[system].STACK,
                             inputs)['logits'].numpy()


def _base(system: str):
  """Returns transformers' model of a system, with recorded weights."""
  given = recording.load_recording(recording.files(system)[0])
  with tempfile.TemporaryDirectory() as folder:
    return reference.load(
        reference.write(folder, given.config, given.weights), system)
