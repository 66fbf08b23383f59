"""PyTorch's side: transformers' models, torch.compile, FlashAttention.

workers.py runs it as a program, which reads a request from stdin and writes
rows to stdout.

It imports nothing of JAX, so that it may run under a Python of its own, whose
CUDA libraries are PyTorch's.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import gc
import json
import sys
import time
from typing import Any

from benchmarks.gpu import timing

Row = dict[str, Any]


def check(request: Mapping[str, Any]) -> Iterator[Row]:
  """Says what is here."""
  del request
  import torch
  import transformers
  here = torch.cuda.is_available()
  yield dict(
      torch=torch.__version__, transformers=transformers.__version__,
      cuda=torch.version.cuda or 'none',
      card=torch.cuda.get_device_name() if here else 'none',
      flash_attention=here and torch.backends.cuda.is_flash_attention_available(
          ), cudnn=torch.backends.cudnn.version())


def model_of(name: str, c: Mapping[str, Any], experts: str = ''):
  """Returns transformers' model of a config of ours: config.model, resolved."""
  import torch
  import transformers
  fields = dict(
      vocab_size=c['vocab_size'], hidden_size=c['d_model'],
      intermediate_size=c['d_ff'], num_hidden_layers=c['num_layers'],
      num_attention_heads=c['num_heads'],
      num_key_value_heads=c['num_kv_heads'], head_dim=c['head_dim'],
      max_position_embeddings=c['max_len'], rms_norm_eps=c['norm_eps'],
      tie_word_embeddings=False, attention_bias=False)
  options = dict(attn_implementation='sdpa')
  if name == 'gpt2':
    config = transformers.GPT2Config(
        vocab_size=c['vocab_size'], n_positions=c['max_len'],
        n_embd=c['d_model'], n_layer=c['num_layers'], n_head=c['num_heads'],
        n_inner=c['d_ff'],
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0,
        eos_token_id=0)
    of = transformers.GPT2LMHeadModel
  elif name == 'mixtral':
    del fields['attention_bias']
    config = transformers.MixtralConfig(
        **fields, num_local_experts=c['moe']['num_experts'],
        num_experts_per_tok=c['moe']['top_k'], output_router_logits=True,
        router_aux_loss_coef=c['moe']['balance_weight'], sliding_window=None)
    of = transformers.MixtralForCausalLM
    options |= dict(experts_implementation=experts)
  else:
    config, of = transformers.LlamaConfig(**fields), (
        transformers.LlamaForCausalLM)
  with torch.device(_device()):  # drawn where it lies
    return of._from_config(config, **options)


def _device() -> str:
  import torch
  return 'cuda' if torch.cuda.is_available() else 'cpu'


class Trainer:
  """A model, its optimiser and one batch; AdamW with clipping, as ours."""

  def __init__(self, request: Mapping[str, Any], batch: int, experts: str):
    import torch
    c, self.device = request['model'], _device()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')  # TF32, as JAX multiplies
    model = model_of(request['case'], c, experts).train()
    if request['precision'] == 'bfloat16':
      model = model.bfloat16()
    self.model = model
    self.autocast = request['precision'] == 'autocast'
    self.optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
        fused=self.device == 'cuda')
    self.tokens = torch.randint(0, c['vocab_size'], (batch, request['length']),
                                device=self.device)
    self.forward = torch.compile(model) if request['compiled'] else model

  def step(self):
    """Starts a step; returns its loss, which need not be there yet."""
    import torch
    self.optimizer.zero_grad(set_to_none=True)
    with attention(), torch.autocast(self.device, torch.bfloat16,
                                     enabled=self.autocast):
      loss = self.forward(self.tokens, labels=self.tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    return loss.detach()


def attention():
  """FlashAttention first, of what scaled_dot_product_attention may choose."""
  import torch
  if not torch.cuda.is_available():
    return contextlib.nullcontext()
  from torch.nn.attention import SDPBackend, sdpa_kernel
  return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                      SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
                     set_priority=True)


def step(request: Mapping[str, Any]) -> Iterator[Row]:
  """Times training steps at the first size that the memory has room for; what
  torch.compile or a way of computing experts fails at is tried without."""
  import torch
  ways = ('grouped_mm', 'eager') if request['case'] == 'mixtral' else ('',)
  tries = [(compiled, experts) for compiled in
           ((True, False) if request['compiled'] else (False,))
           for experts in ways]
  notes: list[str] = []
  batch = request['batch']
  while batch and tries:
    torch.compiler.reset()
    gc.collect()  # what the try before left
    if torch.cuda.is_available():
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    compiled, experts = tries[0]
    said = f'batch {batch}{", " * bool(experts)}{experts}' + (
        '' if compiled else ', not compiled')
    try:
      row = _timed(dict(request, compiled=compiled), batch, experts)
    except Exception as error:
      if isinstance(error, torch.OutOfMemoryError):
        notes.append(f'{said}: out of memory')
        batch //= 2
      else:
        notes.append(f'{said}: {timing.sentence(error)}')
        tries.pop(0)
    else:
      yield row | dict(
          batch=batch, length=request['length'], compiled=compiled,
          experts=experts, precision=request['precision'], notes=notes,
          layers=request['model']['num_layers'])
      return
  yield dict(error=notes[-1], notes=notes)


def _timed(request: Mapping[str, Any], batch: int, experts: str) -> Row:
  import torch
  start = time.perf_counter()
  trainer = Trainer(request, batch, experts)
  trainer.step().item()
  compiling = time.perf_counter() - start
  found = timing.windows(trainer.step, lambda loss: loss.item(),
                         request['seconds'])
  return found | dict(
      tokens_per_s=batch * request['length'] / found['step_s'],
      compile_s=compiling, loss=trainer.step().item(),
      parameters=sum(p.numel() for p in trainer.model.parameters()),
      peak_bytes=(torch.cuda.max_memory_allocated()
                  if torch.cuda.is_available() else None))


def write(request: Mapping[str, Any]) -> Iterator[Row]:
  """Times transformers' own loop: as it is, and with a cache of fixed length,
  for which it compiles the step of a token."""
  import torch
  torch.manual_seed(0)
  model = model_of('llama', request['model']).bfloat16().eval()
  new = request['new']
  for batch in request['batches']:
    tokens = torch.randint(0, request['model']['vocab_size'],
                           (batch, request['prompt']), device=_device())
    for cache in ('dynamic', 'static'):
      def run(cache: str = cache, tokens: Any = tokens):
        with torch.no_grad():
          out = model.generate(
              tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
              min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
              cache_implementation=cache)
        if torch.cuda.is_available():
          torch.cuda.synchronize()
        return out
      row = dict(batch=batch, cache=cache, prompt=request['prompt'], new=new)
      try:
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        found = timing.windows(run, lambda x: x, request['seconds'])
      except Exception as error:
        yield row | dict(error=timing.sentence(error))
        continue
      yield row | dict(compile_s=first, call_s=found['step_s'],
                       tokens_per_s=batch * new / found['step_s'])


JOBS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    'check': check, 'step': step, 'write': write}


def main() -> None:
  request = json.loads(sys.stdin.readline())
  for row in JOBS[request['job']](request):
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()
