"""GPT-2 as Hugging Face transformers runs it on PyTorch: the other side.

AdamW with clipping, as ours; no dropout. In bfloat16 two ways: `autocast`,
whose parameters stay float32 as ours do, and `bfloat16`, parameters and
moments too, which is faster and learns worse.
"""

import numpy as np
import torch
import transformers


class Trainer:
  """A model, its optimiser and one batch."""

  def __init__(self, request):
    model, data = request['config']['model'], request['config']['data']
    dtype = request['dtype']
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=model['vocab_size'], n_positions=data['length'],
        n_embd=model['d_model'], n_layer=model['num_layers'],
        n_head=model['num_heads'],
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
        eos_token_id=0)
    self.model = transformers.GPT2LMHeadModel(config).train()
    if dtype == 'bfloat16':
      self.model = self.model.bfloat16()
    self.autocast = dtype == 'autocast'
    self.optimizer = torch.optim.AdamW(
        self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    self.tokens = torch.from_numpy(np.random.default_rng(0).integers(
        0, model['vocab_size'], (data['batch_size'], data['length'])))
    self.forward = (torch.compile(self.model) if request['compiled']
                    else self.model)

  def step(self) -> float:
    """Takes a step; returns its loss."""
    self.optimizer.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
      loss = self.forward(self.tokens, labels=self.tokens,
                          use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    return loss.item()

  def generate(self, prompt: int, new: int) -> None:
    """Continues the batch's first `prompt` tokens greedily by `new`."""
    self.model.eval()
    with torch.no_grad():
      self.model.generate(
          self.tokens[:, :prompt], attention_mask=torch.ones_like(
              self.tokens[:, :prompt]), do_sample=False, min_new_tokens=new,
          max_new_tokens=new, pad_token_id=0)


def jobs(request):
  """Returns what a worker can be asked to do, by name."""
  trainer = Trainer(request)
  trainer.step()
  prompt, new = request['prompt'], request['new']
  return {'step': trainer.step,
          'generate': lambda: trainer.generate(prompt, new)}
