"""The sampler, against transformers' processors of logits."""

import numpy as np

from training import generate

SETTINGS: dict[str, dict] = {
    'temperature': dict(temperature=0.7), 'top-k': dict(top_k=5),
    'top-p': dict(top_p=0.8), 'min-p': dict(min_p=0.2),
    'a penalty': dict(repetition_penalty=1.3),
    'a reward': dict(repetition_penalty=0.7),
    'all of them': dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05,
                        repetition_penalty=1.1)}


def differs(name: str) -> float:
  """Returns the largest difference of a probability of the next token."""
  import torch
  from transformers.generation import logits_process as processors
  sampling = generate.Sampling(**SETTINGS[name])
  rng = np.random.default_rng(0)
  logits_BV = (3 * rng.normal(size=(4, 60))).astype(np.float32)
  ids_BL = rng.integers(0, 60, (4, 20))
  theirs = [
      processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
      processors.TemperatureLogitsWarper(sampling.temperature)]
  if sampling.top_k:
    theirs.append(processors.TopKLogitsWarper(sampling.top_k))
  if sampling.top_p < 1:
    theirs.append(processors.TopPLogitsWarper(sampling.top_p))
  if sampling.min_p:
    theirs.append(processors.MinPLogitsWarper(sampling.min_p))
  scores_BV = torch.tensor(logits_BV)
  for process in theirs:
    scores_BV = process(torch.tensor(ids_BL), scores_BV)
  seen_BV = np.zeros((4, 60), bool)
  np.put_along_axis(seen_BV, ids_BL, True, 1)
  ours_BV = sampling.filter(sampling.penalize(logits_BV, seen_BV))
  return float(np.abs(
      torch.softmax(torch.tensor(np.asarray(ours_BV)), -1).numpy()
      - torch.softmax(scores_BV, -1).numpy()).max())
