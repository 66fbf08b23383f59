"""Whether transformers reads from an export what it wrote of generation."""

import pathlib
import tempfile

from tools.verify import reference
from tools.verify.cases import SYSTEMS
from training import hf_generation, weights

IDS = dict(bos_token_id=3, eos_token_id=[4, 5])


def lost(system: str, case: str) -> float:
  """Returns how many fields differ after an import and an export."""
  import transformers
  model = reference.build(system, case)
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
                  generation=hf_generation.of_folder(given))
    again = getattr(transformers, SYSTEMS[system].model).from_pretrained(out)
  wrong = sum(getattr(again.config, name) != getattr(model.config, name)
              for name in (*ids, 'pad_token_id'))
  if model.can_generate():
    wrong += again.generation_config != model.generation_config
  return float(wrong)
