"""lm_eval's questions, answered by a run and by its export.

The same requests go through training/evals/harness.py and through lm_eval's
own backend for Hugging Face models. The tokenizers are of subwords: GPT's puts
nothing before a text, LLaMA's a bos that is not its eos.
"""

from collections.abc import Iterator
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from tests.parity.compare import Finding

SYSTEMS = ('gpt', 'llama')
LIMIT = 1e-4  # of a log-probability in nats, of one request
LENGTH = 48
TEXT = ('It is a law of nature that what is sown is reaped, and that nobody '
        'reaps what was not sown.\n The harvest of 1863 was larger than any '
        "before it; wasn't it?\n\n") * 3
PAIRS = [
    ('', 'It is a law of nature'), ('', ' reaped'), ('It is a law', ' of'),
    ('It is a law', ' of nature'), ('It is a law', ' in'),
    ('It is a law of ', 'nature'), ('It is a law of  ', 'the harvest'),
    ('What is sown', ' is reaped, and what is not sown is not reaped'),
    (TEXT, ' is larger than before'), ('a', 'b'), ('1863', ' was larger'),
    ('The harvest\n', 'of 1863'), ('<|endoftext|>It is', ' a law'),
    ('It is</s>', ' a law'), ('', '<s>It is a law')]
CONTEXTS = ['It is a law', 'What', TEXT, 'The harvest of 1863 was larger']


def findings(system: str) -> Iterator[Finding]:
  """Yields how far the two are apart."""
  import lm_eval.models.huggingface as theirs_lib
  from training.evals import harness
  with tempfile.TemporaryDirectory() as root:
    folder, workdir, export = (
        pathlib.Path(root, name) for name in ('given', 'run', 'export'))
    _make(system, folder)
    _convert('import', folder, workdir)
    _convert('export', workdir, export)
    # With its cache, lm_eval 0.4.13 reads a continuation of one token at the
    # wrong place where a longer one has the same tokens before its last.
    theirs = theirs_lib.HFLM(str(export), device='cpu', batch_size=4,
                             dtype='float32', logits_cache=False)
    ours = harness.Model.create_from_arg_obj({'workdir': str(workdir)})
    yield Finding('prefix', float(ours.prefix_token_id
                                  != theirs.prefix_token_id), 0.0)
    asked = _requests('loglikelihood', PAIRS)
    (got, greedy), (want, likeliest) = (
        zip(*model.loglikelihood(asked)) for model in (ours, theirs))
    yield Finding('loglikelihood', _apart(got, want), LIMIT)
    yield Finding('greedy', float(greedy != likeliest), 0.0)
    asked = _requests('loglikelihood_rolling', [(TEXT,), ('a law',)])
    yield Finding('rolling', _apart(*(
        model.loglikelihood_rolling(asked) for model in (ours, theirs))), LIMIT)
    options = dict(until=['\n', 'law'], max_gen_toks=12, do_sample=False)
    asked = _requests('generate_until', [(text, options) for text in CONTEXTS])
    texts = [model.generate_until(asked) for model in (ours, theirs)]
    yield Finding('generate_until', float(texts[0] != texts[1]), 0.0)


def _apart(ours: Any, theirs: Any) -> float:
  return float(np.abs(np.subtract(ours, theirs)).max())


def _requests(kind: str, arguments: list[tuple]) -> list:
  from lm_eval.api.instance import Instance
  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def _make(system: str, folder: pathlib.Path) -> None:
  """Writes a model with large random weights, and its tokenizer."""
  import tokenizers
  import torch
  import transformers
  bpe = tokenizers.ByteLevelBPETokenizer()
  special = ['<|endoftext|>'] if system == 'gpt' else ['<s>', '</s>']
  bpe.train_from_iterator([TEXT], vocab_size=320, min_frequency=2,
                          special_tokens=special)
  pipeline = bpe._tokenizer
  if system == 'llama':
    pipeline.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 0)])
  names = (dict(bos_token='<s>', eos_token='</s>') if system == 'llama' else
           dict(bos_token='<|endoftext|>', eos_token='<|endoftext|>'))
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=pipeline, **names)
  tokenizer.save_pretrained(folder)
  ids = dict(bos_token_id=tokenizer.bos_token_id,
             eos_token_id=tokenizer.eos_token_id)
  torch.manual_seed(0)
  if system == 'gpt':
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_head=4, n_layer=2, n_positions=LENGTH,
        initializer_range=0.2, **ids)
  else:
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        max_position_embeddings=LENGTH, initializer_range=0.2, **ids)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _convert(way: str, source: pathlib.Path, target: pathlib.Path) -> None:
  """`tools.convert import` or `export`, as a user has it."""
  subprocess.run([sys.executable, '-m', 'tools.convert', way, str(source),
                  str(target)], check=True, stdout=subprocess.DEVNULL)
