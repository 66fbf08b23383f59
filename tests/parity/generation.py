"""Whether transformers reads from an export what it wrote of generation, lays
out a chat as a run of ours was taught, and draws as our sampler does."""

import pathlib
import tempfile

import numpy as np

from tests.parity import recording, reference
from training import generate
from training.data import conversations
from training.data import tokenizers
from training.hf import generation as hf_generation, tokenizer as hf_tokenizer
from training.hf import weights
from training.objectives import causal

CHAT = [dict(role='user', content='Hello!'),
        dict(role='assistant', content='Hi!'),
        dict(role='user', content='How are you?')]
IDS = dict(bos_token_id=3, eos_token_id=[4, 5])


def lost(system: str) -> float:
  """Returns how many fields differ after an import and an export."""
  import transformers
  given = recording.load_recording(recording.files(system)[0])
  model = reference.draw(given.config, system)
  ids = IDS | (dict(decoder_start_token_id=7)
               if model.config.is_encoder_decoder else {})
  for name, value in ids.items():
    setattr(model.config, name, value)
  model.generation_config = transformers.GenerationConfig(
      **ids, do_sample=True, temperature=0.6, pad_token_id=6)
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, 'in'), pathlib.Path(folder, 'out')
    model.save_pretrained(given)
    weights.to_hf(*weights.from_hf(given), out,
                  generation=hf_generation.read_generation(given))
    again = reference.model_class(system).from_pretrained(out)
  wrong = sum(getattr(again.config, name) != getattr(model.config, name)
              for name in (*ids, 'pad_token_id'))
  if model.can_generate():
    wrong += again.generation_config != model.generation_config
  return float(wrong)


def template_differs(source: str) -> float:
  """Returns how many ids of a chat transformers and data of ours lay out
  otherwise.

  Args:
    source: data.source: whose template it is.
  """
  import tokenizers as library
  import transformers
  from configs import base
  letters = {chr(i): i for i in range(128)}
  tokenizer = library.Tokenizer(library.models.WordLevel(letters, '?'))
  tokenizer.pre_tokenizer = library.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(['</s>'])
  config = base.base()
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, 'in'), pathlib.Path(folder, 'out')
    out.mkdir()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='</s>').save_pretrained(given)
    config.objective, config.data.source = 'chat', source
    config.data.tokenizer = str(given)
    hf_tokenizer.export_tokenizer(pathlib.Path(folder), config, out, step=1)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = tokenizers.load(str(given))
  wrong = 0
  for messages in (CHAT[:1], CHAT if 'alpaca:' not in source else CHAT[:1]):
    got = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    wrong += got != _laid_out(messages, config, ours)
  return float(wrong)


def _laid_out(messages, config, tokenizer) -> list[int]:
  """Returns the ids before the answer to the last message."""
  if len(messages) == 1:
    return causal.encode_question(
        messages[0]['content'], config, tokenizer).tolist()
  parts = conversations.PUBLISHED_LAYOUT.of([
      *conversations.parse_turns(messages, 'the chat'), ('assistant', 'x')])
  ids, _ = causal.lay_out_conversation(
      [(kind, tokenizer.encode(text)) for kind, text in parts], tokenizer)
  return ids.tolist()[:-3]  # a space, x, the separator


SETTINGS: dict[str, dict] = {
    'temperature': dict(temperature=0.7), 'top-k': dict(top_k=5),
    'top-p': dict(top_p=0.8), 'min-p': dict(min_p=0.2),
    'a penalty': dict(repetition_penalty=1.3),
    'a reward': dict(repetition_penalty=0.7),
    'all of them': dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05,
                        repetition_penalty=1.1)}


def sampler_differs(name: str) -> float:
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
  ours_BV = sampling.mask_unlikely(sampling.penalize(logits_BV, seen_BV))
  return float(np.abs(
      torch.softmax(torch.tensor(np.asarray(ours_BV)), -1).numpy()
      - torch.softmax(scores_BV, -1).numpy()).max())
