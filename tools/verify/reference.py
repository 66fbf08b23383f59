"""transformers' side of the comparison; PyTorch is imported here alone."""

import json
import pathlib
import tempfile

import numpy as np

from tools.verify import compare
from tools.verify.cases import SYSTEMS
from tools.verify.recording import HALF, Recording
from training import hf_files


def run(system: str, case: str, *, greedy: bool = True) -> Recording:
  """Returns what transformers computes for one case, on the CPU."""
  import torch
  row = SYSTEMS[system]
  model = build(system, case)
  config, weights = _saved(model)
  inputs = compare.inputs(row.kind, config)
  outputs = {name: value.detach().numpy()
             for name, value in _forward(model, row.kind, inputs).items()}
  layers = _layers(model, row.kind, inputs)
  continued = ({} if not greedy or row.kind == 'bert'
               else _greedy(model, row.kind, inputs))
  loss = compare.objective(
      _forward(model, row.kind, inputs), inputs, torch.as_tensor)
  loss.backward()
  with torch.no_grad():
    for parameter in model.parameters():
      grad = parameter.grad
      parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
  _, grads = _saved(model)
  return Recording(row.kind, config, weights, inputs, outputs, grads,
                   continued, layers)


def build(system: str, case: str):
  """Returns a random model whose every parameter matters."""
  import torch
  import transformers
  torch.set_num_threads(1)
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  row = SYSTEMS[system]
  config = getattr(transformers, row.config)(**row.common | row.cases[case])
  config._attn_implementation = 'eager'  # the plain formula
  torch.manual_seed(0)
  model = getattr(transformers, row.model)(config).eval()
  half = getattr(torch, np.dtype(HALF).name)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = 0.15 * torch.randn_like(parameter)
      parameter.copy_((parameter + noise).to(half).float())
  return model


def _saved(model) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns config.json and the tensors as transformers writes them."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config = json.loads((pathlib.Path(folder) / 'config.json').read_text())
    files = hf_files.Files(pathlib.Path(folder))
    return config, {name: np.array(files[name]) for name in files}


def _call(model, kind: str, inputs, **kwargs):
  import torch
  t = {name: torch.as_tensor(value) for name, value in inputs.items()}
  names = dict(tokens='input_ids', mask='attention_mask',
               types='token_type_ids', decoder_tokens='decoder_input_ids',
               decoder_mask='decoder_attention_mask')
  return model(**{names[name]: value.long() for name, value in t.items()},
               **kwargs)


def _forward(model, kind: str, inputs):
  """Returns the outputs of compare.KINDS[kind], by name."""
  out = _call(model, kind, inputs)
  if kind == 'bert':
    return dict(logits=out.prediction_logits,
                nsp_logits=out.seq_relationship_logits)
  return dict(logits=out.logits)


def _layers(model, kind: str, inputs) -> list[np.ndarray]:
  import torch
  with torch.no_grad():
    out = _call(model, kind, inputs, output_hidden_states=True)
  if kind == 'encoder_decoder':
    states = out.encoder_hidden_states[1:] + out.decoder_hidden_states[1:]
  else:
    states = out.hidden_states[1:]
  return [state.numpy() for state in states]


def _greedy(model, kind: str, inputs) -> dict[str, np.ndarray]:
  """Returns the likeliest continuation of each prompt, one by one."""
  import torch
  found = {}
  for row, prompt in compare.prompts(kind, inputs).items():
    ids = torch.as_tensor(prompt)[None].long()
    with torch.no_grad():
      new = model.generate(
          ids, attention_mask=torch.ones_like(ids), do_sample=False,
          max_new_tokens=compare.NEW_TOKENS, use_cache=True)
    found[row] = new[0, -compare.NEW_TOKENS:].numpy().astype(np.int32)
  return found


def loads_our_export(system: str, case: str, folder) -> float:
  """Returns how far the logits of an export are from the model's own.

  Raises:
    ValueError: naming keys that are missing or unexpected.
  """
  import torch
  import transformers
  model = build(system, case)
  again, info = getattr(transformers, SYSTEMS[system].model).from_pretrained(
      folder, output_loading_info=True, attn_implementation='eager',
      dtype=torch.float32)
  wrong = {key: value for key, value in info.items() if value}
  if wrong:
    raise ValueError(f'{system} {case}: transformers says {wrong}')
  kind = SYSTEMS[system].kind
  inputs = compare.inputs(kind, model.config.to_dict())
  with torch.no_grad():
    mine = _forward(again.eval(), kind, inputs)['logits'].numpy()
    theirs = _forward(model, kind, inputs)['logits'].numpy()
  return compare.error(mine, theirs)
