"""The other side of a comparison: Hugging Face transformers on PyTorch.

It runs on a GPU where PyTorch sees one, and trains by AdamW with clipping, as
ours, without dropout. There are two ways to train in bfloat16: `autocast`,
whose parameters stay float32 as ours do; and `bfloat16`, whose parameters and
moments are bfloat16 too, which is faster and learns worse.
"""

import torch
import transformers

from common.errors import require

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def build_model(request: dict) -> torch.nn.Module:
  """Returns the model of transformers that a request describes, with random
  weights and without dropout.

  Args:
    request: `config_json`, the config.json of the model; and `parameters`, the
      number of parameters that our model has.

  Raises:
    RequestError: if transformers has no such class, or if the model has another
      number of parameters than ours.
  """
  # Find the class of the model.
  config_json = request['config_json']
  class_name, = config_json['architectures']
  model_class = getattr(transformers, class_name, None)
  require(model_class is not None, f'transformers {transformers.__version__} '
          f'has no {class_name}: the extra `verify` brings a later one')

  # Set all probabilities of dropout in its config to 0.
  config = model_class.config_class.from_dict(config_json)
  for name, value in config.to_dict().items():
    if 'drop' in name and isinstance(value, float):
      setattr(config, name, 0.0)

  # Make the model. Its weights are drawn on the device itself.
  options = {}
  if DEVICE == 'cuda':
    options['attn_implementation'] = 'sdpa'
  with torch.device(DEVICE):
    model = model_class._from_config(config, **options)

  # A model with another number of parameters is another model.
  num_parameters = count_parameters(model)
  require(num_parameters == request['parameters'],
          f'{class_name} of transformers has {num_parameters:,} parameters, '
          f'and ours {request["parameters"]:,}: these are two models, which '
          'are not compared')
  return model


def count_parameters(model: torch.nn.Module) -> int:
  """Returns the number of values of a model that training changes.

  Besides the parameters with a gradient, these are the biases that balance a
  router's load (DeepSeek-V3). They are changed without a gradient, so PyTorch
  has them as buffers and not as parameters.

  Args:
    model: the model.
  """
  biases = [buffer for name, buffer in model.named_buffers()
            if name.endswith('e_score_correction_bias')]
  trained = [p for p in model.parameters() if p.requires_grad]
  return sum(x.numel() for x in trained + biases)


class Trainer:
  """A model, its optimiser and one batch."""

  def __init__(self, request: dict):
    """Builds the model of a request and its optimiser.

    Args:
      request: a dict with
        `config_json`, `parameters`: the model, as `build_model` reads it;
        `inputs`: the arguments of a training step, as lists by name;
        `dtype`: 'float32', 'autocast' or 'bfloat16';
        `decoder`: whether the model is a decoder alone;
        `compiled`: whether torch.compile is used.
    """
    # Make the model and its optimiser.
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')  # TF32, as JAX multiplies
    self.model = build_model(request).train()
    if request['dtype'] == 'bfloat16':
      self.model = self.model.bfloat16()
    self.autocast = request['dtype'] == 'autocast'
    self.optimizer = torch.optim.AdamW(
        self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
        fused=DEVICE == 'cuda')

    # Put the batch on the device, and collect the options of a forward pass.
    self.inputs = {name: torch.tensor(rows, device=DEVICE)
                   for name, rows in request['inputs'].items()}
    self.options = {}
    if 'decoder_input_ids' in self.inputs or request['decoder']:
      self.options['use_cache'] = False
    if hasattr(self.model.config, 'router_aux_loss_coef'):
      self.options['output_router_logits'] = True  # and so their losses
    self.forward = self.model
    if request['compiled']:
      self.forward = torch.compile(self.model)

  def step(self) -> float:
    """Takes a training step, and returns its loss."""
    self.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
      loss = self.forward(**self.inputs, **self.options).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    return loss.item()

  def generate(self, prompt: int, new: int) -> None:
    """Continues the batch's first `prompt` tokens greedily by `new`."""
    tokens = self.inputs['input_ids'][:, :prompt]
    self.model.eval()
    with torch.no_grad():
      self.model.generate(
          tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
          min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
