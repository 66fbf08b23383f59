"""Requests a second of lm_eval: a run, and lm_eval's own Hugging Face backend
on the same weights, in turns on the same machine.

  python -m benchmarks.lm_eval
  python -m benchmarks.lm_eval --model=llama --requests=2000 --rounds=5
  python -m benchmarks.lm_eval --folder=models/smollm2 --requests=120

Without --folder, a model that transformers can read, the weights are random:
6 layers, 384 wide, with a vocabulary of 32,000. Each request asks for the
log-probability of a sentence or of the end of one; the sentences are those of
BLiMP where ARCHETYPE_DATA names a data folder, else made up. The backend gets
the batch size that is the best for it of those that are tried. Ours compiles in
its first round, which is told apart. Each side is a process of its own. Needs
the extras verify and lm-eval.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.worker import Worker
from configs.errors import require
from training import cli

BATCHES = (8, 32, 128)
VOCAB = 32_000


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.lm_eval', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--model', default='gpt', choices=('gpt', 'llama'),
                      help='whose architecture')
  parser.add_argument('--folder', default='',
                      help='of Hugging Face, whose model it is instead')
  parser.add_argument('--requests', type=int, default=800,
                      help='in a round')
  parser.add_argument('--rounds', type=int, default=5, help='in turns')
  parser.add_argument('--json', default='', help='a file to write figures to')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    figures = compare(args, pathlib.Path(root))
  print(f'{figures["model"]}: {figures["ours"]:.1f} requests/s by a run, '
        f'{figures["theirs"]:.1f} by lm_eval\'s Hugging Face backend with '
        f'batches of {figures["batch_size"]}: {figures["ratio"]:.2f} times as '
        f'many. Apart by at most {figures["apart"]:.1e} nats; compiling '
        f'took {figures["compile_seconds"]:.1f} s')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + '\n')


def compare(args: argparse.Namespace, root: pathlib.Path) -> dict:
  """Returns the figures of both."""
  require(args.requests > 0 and args.rounds > 0, 'a round has one request or '
          f'more, and there is one: --requests is {args.requests}, --rounds '
          f'{args.rounds}')
  folder = pathlib.Path(args.folder) if args.folder else root / 'hf'
  if not args.folder:
    _write(args.model, folder)
  subprocess.run([sys.executable, '-m', 'tools.convert', 'import', str(folder),
                  str(root / 'run')], check=True, stdout=subprocess.DEVNULL)
  request = dict(workdir=str(root / 'run'), folder=str(folder),
                 pairs=pairs(args.requests))
  with (Worker('lm_eval_ours', request) as ours,
        Worker('lm_eval_hf', request) as theirs):
    first = ours.do('timed')['result']
    best = {size: theirs.do(f'batch {size}')['result'] for size in BATCHES}
    size = min(best, key=best.get)
    theirs.do(f'batch {size}')
    apart = float(np.abs(np.subtract(
        ours.do('answers')['result'], theirs.do('answers')['result'])).max())
    seconds: dict[str, list[float]] = {'ours': [], 'theirs': []}
    for _ in range(args.rounds):
      seconds['ours'].append(ours.do('timed')['result'])
      seconds['theirs'].append(theirs.do('timed')['result'])
  rates = {name: args.requests / float(np.median(x))
           for name, x in seconds.items()}
  ratio = float(np.median(np.divide(seconds['theirs'], seconds['ours'])))
  return rates | dict(
      model=args.folder or args.model, requests=args.requests, batch_size=size,
      ratio=ratio, apart=apart, seconds=seconds,
      compile_seconds=first - min(seconds['ours']))


def instances(pairs: list) -> list:
  """Returns lm_eval's requests for (context, continuation)."""
  from lm_eval.api.instance import Instance
  return [Instance('loglikelihood', {}, tuple(pair), i)
          for i, pair in enumerate(pairs)]


def pairs(count: int) -> list[tuple[str, str]]:
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
  asked: list[tuple[str, str]] = []
  for i in rng.permutation(len(found)):
    good, bad = found[i]
    stem, _, end = good.rpartition(' ')
    asked += [('', bad), (stem, ' ' + end), (stem, ' ' + bad.split()[-1])]
  while len(asked) < count:
    asked += asked
  return asked[:count]


def _write(name: str, folder: pathlib.Path) -> None:
  """Writes a model with random weights, and its tokenizer."""
  import tokenizers
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator((' '.join(pair) for pair in pairs(30_000)),
                          vocab_size=VOCAB, special_tokens=['<|endoftext|>'])
  transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe._tokenizer, bos_token='<|endoftext|>',
      eos_token='<|endoftext|>').save_pretrained(folder)
  torch.manual_seed(0)
  ids = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
  config = (transformers.GPT2Config(
      n_embd=384, n_head=12, n_layer=6, n_positions=512, **ids)
            if name == 'gpt' else transformers.LlamaConfig(
                hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                num_attention_heads=12, max_position_embeddings=512, **ids))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


if __name__ == '__main__':
  cli.run(main)
