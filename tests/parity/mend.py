"""What is changed in a reference before it is compared, and why."""


def mend(model) -> None:
  """Changes a model of transformers in place, where it needs it."""
  change = MENDS.get(type(model).__name__)
  if change:
    change(model)


def _t5(model) -> None:
  """v1.1's head is a matrix of its own; transformers 5 ties it when it builds
  a model, and only tells it apart when it reads a file."""
  import torch
  if not model.config.scale_decoder_outputs:
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
  import types
  for module in model.modules():
    if type(module).__name__ == 'NllbMoeExperts':
      module.forward = types.MethodType(_experts, module)


def _experts(self, hidden_states, router_mask, router_probs):
  del router_mask
  return sum(router_probs[:, e:e + 1] * self[f'expert_{e}'](hidden_states)
             for e in range(self.num_experts))


def _mamba2(model) -> None:
  """Its hidden states leave out what the embedding gives, and have what the
  last layer returns twice, before the norm and after it."""
  import functools
  forward = model.forward

  @functools.wraps(forward)
  def mended(*args, **kwargs):
    out = forward(*args, **kwargs)
    if out.hidden_states is not None:
      *layers, _, last = out.hidden_states
      out.hidden_states = (model.get_input_embeddings()(kwargs['input_ids']),
                           *layers, last)
    out.attentions = None
    return out
  model.forward = mended


def _kimi_linear(model) -> None:
  """It writes the network of a dense layer under the name of the experts.
  Published files have it under its own name, and both are read."""
  import functools
  import pathlib
  import re
  from safetensors.torch import load_file, save_file
  save = model.save_pretrained

  @functools.wraps(save)
  def mended(folder, **kwargs):
    save(folder, **kwargs)
    file = pathlib.Path(folder) / 'model.safetensors'
    save_file({re.sub(r'\.block_sparse_moe\.(gate|up|down)_proj\.',
                      r'.mlp.\1_proj.', name): x
               for name, x in load_file(file).items()}, file)
  model.save_pretrained = mended


MENDS = {
    'KimiLinearForCausalLM': _kimi_linear,
    'Mamba2ForCausalLM': _mamba2,
    'T5ForConditionalGeneration': _t5,
    'MarianMTModel': _marian,
    'NllbMoeForConditionalGeneration': _nllb,
}
