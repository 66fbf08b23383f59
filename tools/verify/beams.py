"""Whether beam search finds the texts that transformers' finds."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tools.verify import compare, reference
from tools.verify.recording import Recording
from training import beam
from training.objectives import record

# Fields of a Beams, which transformers has by the names of OPTIONS.
CASES = (dict(count=4, length_penalty=1.0),
         dict(count=4, length_penalty=1.0, early_stopping=True),
         dict(count=3, length_penalty=0.0),
         dict(count=5, length_penalty=2.0),
         dict(count=2, length_penalty=-1.0, early_stopping=True))
OPTIONS = dict(count='num_beams', length_penalty='length_penalty',
               early_stopping='early_stopping')
SYSTEMS = ('gpt', 't5')
NEW_TOKENS = 24
PLACE = 3  # of a greedy text: its token there is what ends texts


def findings(system: str, case: str, recording: Recording
             ) -> Iterator[compare.Finding]:
  """Yields a finding for each of CASES, and for the first also without a token
  that ends texts: the share of the tokens of all K texts of all prompts that
  differ."""
  model = reference.build(system, case)
  ours = compare.model_of(recording)
  prompts = list(compare.prompts(recording.inputs).values())
  stop = int(_theirs(model, prompts[0], None, dict(count=1))[0, PLACE])
  for options, end in [(CASES[0], None), *((row, stop) for row in CASES)]:
    found = _ours(model, ours, prompts, end, options)
    wrong = [texts != _theirs(model, prompt, end, options)
             for texts, prompt in zip(found, prompts)]
    said = ', '.join(f'{name} {value}' for name, value in options.items())
    yield compare.Finding(
        f'beams: {said}{"" if end is not None else ", no end"}',
        float(np.mean(wrong)), compare.LIMITS['greedy'])


def _theirs(model, prompt: np.ndarray, stop: int | None, options: dict
            ) -> np.ndarray:
  """Returns the K texts of one prompt, [K, T], filled up with the stop."""
  import torch
  ids = torch.as_tensor(prompt)[None].long()
  fill = 0 if stop is None else stop
  with torch.no_grad():
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=NEW_TOKENS, num_return_sequences=options['count'],
        eos_token_id=stop, pad_token_id=fill,
        **{OPTIONS[name]: value for name, value in options.items()}).numpy()
  start = 1 if model.config.is_encoder_decoder else len(prompt)
  texts = np.full((len(found), NEW_TOKENS), fill)
  texts[:, :found.shape[1] - start] = found[:, start:]
  return texts


def _ours(model, ours, prompts: list[np.ndarray], stop: int | None,
          options: dict) -> np.ndarray:
  """Returns the K texts of every prompt, [B, K, T]; those of several lengths
  go together."""
  module, params = ours
  tokens, lengths = map(jnp.asarray, record.padded(prompts))
  sources = {}
  if model.config.is_encoder_decoder:
    sources = dict(source_BM=tokens, source_lengths_B=lengths)
    tokens = jnp.full((len(prompts), 1), model.config.decoder_start_token_id)
    lengths = jnp.ones_like(lengths)
  return jax.device_get(beam.search(
      module, params, tokens, lengths, max_new_tokens=NEW_TOKENS,
      beams=beam.Beams(penalty='power', **options), stop_token=stop,
      **sources)[0])
