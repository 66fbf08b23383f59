"""Requests a second of lm_eval: a run, and lm_eval's own Hugging Face backend
on the same weights, in turns on the same machine.

  python -m benchmarks.lm_eval
  python -m benchmarks.lm_eval --model=llama --requests=2000 --rounds=3

The weights are random. Each request asks for the log-probability of a sentence
or of the end of one; the sentences are those of BLiMP where ARCHETYPE_DATA
names a data folder, else made up. The backend gets the batch size that is the
best for it of those that are tried. Ours compiles in its first round, which is
told apart. Needs the extras verify and lm_eval.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from training import cli

BATCHES = (8, 32, 128)
VOCAB = 8192


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.lm_eval', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--model', default='gpt', choices=('gpt', 'llama'),
                      help='whose architecture')
  parser.add_argument('--requests', type=int, default=800,
                      help='in a round')
  parser.add_argument('--rounds', type=int, default=3, help='in turns')
  parser.add_argument('--json', default='', help='a file to write figures to')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    figures = compare(args, pathlib.Path(root))
  print(f'{args.model}: {figures["ours"]:.1f} requests/s by a run, '
        f'{figures["theirs"]:.1f} by lm_eval\'s Hugging Face backend with '
        f'batches of {figures["batch_size"]}: {figures["ratio"]:.2f} times as '
        f'many. Apart by at most {figures["apart"]:.1e} nats; compiling '
        f'took {figures["compile_seconds"]:.1f} s')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + '\n')


def compare(args: argparse.Namespace, root: pathlib.Path) -> dict:
  """Returns the figures of both."""
  import transformers
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  from lm_eval.api.instance import Instance
  ours, theirs = _models(args.model, root)
  asked = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(
      _pairs(args.requests))]

  def timed(model) -> float:
    start = time.perf_counter()
    model.answers = model.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - start

  first = timed(ours)
  best = {}
  for size in BATCHES:
    theirs.batch_size_per_gpu = size
    best[size] = timed(theirs)
  theirs.batch_size_per_gpu = size = min(best, key=best.get)
  # What its cache of logits answers is not always the answer: see
  # tools/verify/harness.py. It is timed with it, as users have it.
  theirs.logits_cache = False
  timed(theirs)
  apart = max(abs(a - b) for (a, _), (b, _) in zip(
      ours.answers, theirs.answers))
  theirs.logits_cache = True
  seconds: dict[str, list[float]] = {'ours': [], 'theirs': []}
  for _ in range(args.rounds):
    seconds['ours'].append(timed(ours))
    seconds['theirs'].append(timed(theirs))
  rates = {name: args.requests / float(np.median(x))
           for name, x in seconds.items()}
  return rates | dict(
      model=args.model, requests=args.requests, batch_size=size,
      ratio=rates['ours'] / rates['theirs'], apart=apart, seconds=seconds,
      compile_seconds=first - min(seconds['ours']))


def _pairs(count: int) -> list[tuple[str, str]]:
  """Returns (context, continuation): of three requests one asks for a whole
  sentence, and two for two endings of another."""
  folder = pathlib.Path(os.environ.get('ARCHETYPE_DATA', '')) / 'blimp'
  found = []
  for file in sorted(folder.glob('*.jsonl')):
    for line in file.read_text().splitlines():
      row = json.loads(line)
      found.append((row['sentence_good'], row['sentence_bad']))
  if not found:
    rng = np.random.default_rng(0)
    words = ['sown', 'reaped', 'harvest', 'law', 'nature', 'what', 'is', 'of']
    found = [tuple(' '.join(rng.choice(words, int(size)))
                   for size in rng.integers(5, 14, 2)) for _ in range(count)]
  rng = np.random.default_rng(1)
  pairs: list[tuple[str, str]] = []
  for i in rng.permutation(len(found)):
    good, bad = found[i]
    stem, _, end = good.rpartition(' ')
    pairs += [('', bad), (stem, ' ' + end), (stem, ' ' + bad.split()[-1])]
  while len(pairs) < count:
    pairs += pairs
  return pairs[:count]


def _models(name: str, root: pathlib.Path):
  """Returns the run, and lm_eval's backend, of one set of weights."""
  import tokenizers
  import torch
  import transformers
  from lm_eval.models import huggingface

  from training.evals import harness
  folder, workdir = root / 'hf', root / 'run'
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator((' '.join(pair) for pair in _pairs(30_000)),
                          vocab_size=VOCAB, special_tokens=['<|endoftext|>'])
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe._tokenizer, bos_token='<|endoftext|>',
      eos_token='<|endoftext|>').save_pretrained(folder)
  torch.manual_seed(0)
  ids = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
  config = (transformers.GPT2Config(
      n_embd=256, n_head=4, n_layer=6, n_positions=256, **ids)
            if name == 'gpt' else transformers.LlamaConfig(
                hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                num_attention_heads=4, max_position_embeddings=256, **ids))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  subprocess.run([sys.executable, '-m', 'tools.convert', 'import', str(folder),
                  str(workdir)], check=True, stdout=subprocess.DEVNULL)
  theirs = huggingface.HFLM(str(folder), device='cpu', dtype='float32',
                            batch_size=BATCHES[0])
  return harness.Model.create_from_arg_obj({'workdir': str(workdir)}), theirs


if __name__ == '__main__':
  cli.run(main)
