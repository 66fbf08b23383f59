"""The shapes that a plan takes for a batch are the loader's, and the tokens
that a sweep counts are those of its batches."""

import json

import pytest

from configs import base
from tools.compare import cost
from training import objectives
from training.data import tokenizers
from training.objectives import pipeline


@pytest.mark.parametrize('objective, fields', [
    ('causal', {}), ('causal', dict(document_mask=True)), ('prefix', {}),
    ('mlm', {}), ('mlm', dict(document_mask=True)), ('mlm_nsp', {}),
    ('span', {}), ('seq2seq', dict(target_length=24)),
    ('chat', dict(length=256))])
def test_shapes_are_the_loaders(objective, fields, tmp_path):
  text = ' '.join('abcdefg'[i % 7] * (1 + i % 5) for i in range(900))
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text(text)
  (tmp_path / 'b.jsonl').write_text(json.dumps({'messages': [
      {'role': 'user', 'content': text[:40]},
      {'role': 'assistant', 'content': text[:60]}]}) + '\n')
  config = base.base()
  config.objective = objective
  config.data.update(dict(
      source=(f'jsonl:{tmp_path}/b.jsonl:messages' if objective == 'chat'
              else f'text:{tmp_path}/*.txt'),
      cache_dir=str(tmp_path / 'cache'), length=64, batch_size=4,
      holdout_every=0) | fields)
  batch = pipeline.training_loader(config, tokenizers.load('bytes')).batch(0)
  got = {key: (x.shape, x.dtype) for key, x in batch.items()}
  assert got == objectives.shapes(config)
  if objective in ('span', 'seq2seq'):
    config.model.update(arch='t5', d_model=32)
  seen = sum(batch[key].size for key in ('tokens', 'decoder_tokens')
             if key in batch)
  assert cost.of(config).tokens == seen * config.train.steps
