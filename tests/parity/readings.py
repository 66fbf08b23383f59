"""Every field of a config.json as transformers reads it and as we do.

A config.json may say what a system of ours does not do, what transformers
itself does not read, or nothing where the two have defaults. So each field of
a system's config.json is changed, set to null and left out in turn, also those
that our page asks for and transformers did not write. What we do not refuse,
and transformers computes, must be one function.
"""

from collections.abc import Iterator
import copy
import json
import pathlib
import tempfile
from typing import Any

import architectures
from common.errors import RequestError
from tests.parity import compare, exports, recording, reference
from training.hf import config as hf_config, files as hf_files, weights

# Other values of a field that holds a name.
NAMES = {
    'act': ('relu', 'gelu', 'gelu_new', 'gelu_fast', 'gelu_pytorch_tanh',
            'quick_gelu', 'silu', 'swish', 'mish', 'tanh'),
    'feed_forward_proj': ('relu', 'gated-gelu', 'gated-silu', 'gelu'),
    'second_expert_policy': ('all', 'random', 'sampling'),
    'position_embedding_type': ('relative_key',),
    'rope_type': ('linear', 'llama3', 'yarn', 'dynamic', 'longrope'),
}
ROPES = tuple(dict(rope_theta=1e3, rope_type=kind, factor=4.0, **more)
              for kind, more in (
                  ('linear', {}), ('yarn', {}), ('dynamic', {}),
                  ('yarn', dict(original_max_position_embeddings=20)),
                  ('yarn', dict(mscale=1.0, mscale_all_dim=0.5)),
                  ('yarn', dict(truncate=False)),
                  ('yarn', dict(attention_factor=0.5)),
                  ('yarn', dict(beta_fast=8, beta_slow=2)),
                  ('llama3', dict(low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=20))))
PARTS = (dict(rope_theta=1e3), dict(rope_theta=1e3, partial_rotary_factor=0.5),
         dict(type='linear', factor=2.0), {})
OBJECTS = dict(rope_parameters=ROPES + PARTS, rope_scaling=ROPES + PARTS)
ANY = [True, False, 2, 0.5, 'relu']  # of a field that transformers has not
# Fields that older versions or other systems have, with values that matter.
FOREIGN = dict(
    partial_rotary_factor=0.5, rope_theta=1e3, rotary_pct=0.5,
    rotary_emb_base=1e3, rope_interleaved=True, sliding_window=5,
    original_max_position_embeddings=20, attention_bias=True, mlp_bias=True,
    head_dim=8, tie_word_embeddings=True, layer_norm_epsilon=1e-2,
    layer_norm_eps=1e-2, rms_norm_eps=1e-2, attn_logit_softcapping=2.0,
    scale_attn_weights=False, logit_scale=0.5, num_key_value_heads=1)


def reading_findings(system: str) -> Iterator[compare.Finding]:
  """Yields a finding for each reading of a changed config.json that neither
  we nor transformers refuse."""
  given = recording.load_recording(recording.files(system)[0])
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    reference.write(folder, given.config, given.weights)
    tree = hf_config.load_config_json(folder)
    inputs = compare.inputs(architectures.systems()[system].STACK, tree)
    first = _ours(folder, tree, inputs)
    known = set(hf_config.read_config_json(tree).notes)
    for words, changed in changes(tree, asked(tree)):
      (folder / 'config.json').write_text(json.dumps(changed))
      try:
        _, config, notes = hf_config.read_config_json(changed)
        theirs = _theirs(system, folder, inputs)
        told = {note for note in notes
                if hf_config.NOTE_OF_UNREAD_FIELDS not in note}
        if theirs is None or not told <= known:
          continue
        ours = first if exports.same(config, first[0]) else _ours(
            folder, changed, inputs)
      except RequestError:
        continue
      error = compare.worst(ours[1], theirs, inputs)
      limit = compare.LIMITS['output']
      if error > limit:
        limit = max(limit, _effect_of_rounding(system, folder, inputs, theirs))
      yield compare.Finding(words, error, limit)


def _effect_of_rounding(system: str, folder, inputs, theirs) -> float:
  """Returns how far transformers' logits move where all weights are off by a
  rounding, the worst of three draws: a model may amplify it."""
  errors = []
  for seed in range(3):
    off = reference.logits(system, folder, inputs, off_by_rounding=seed)
    errors.append(compare.worst(off, theirs, inputs))
  return max(errors)


def _ours(folder, tree, inputs):
  """Returns (config, logits) of a folder as we read it."""
  module = architectures.build(hf_config.model_of_config_json(tree))
  params = weights.read_params(module, hf_files.Files(folder)).params
  return module.config, exports.logits(module, params, inputs)


def _theirs(system: str, folder, inputs):
  """Returns transformers' logits; None where it does not take the folder."""
  try:
    return reference.logits(system, folder, inputs)
  except Exception:  # of any kind: what it cannot read is not compared
    return None


def asked(tree: dict[str, Any]) -> set[str]:
  """Returns the names of all fields that our page asks for."""
  hf = hf_config.Reader(tree)
  hf_config.read_model_fields(hf)
  return hf.names_read


def changes(tree: dict[str, Any], more: set[str]
            ) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (in a word, a changed config.json)."""
  for name in sorted((tree.keys() | more | FOREIGN.keys() | OBJECTS.keys())
                     - {'model_type'}):
    value = tree.get(name)
    others = [None, *OBJECTS.get(name, ())]
    if name in FOREIGN:
      others.append(FOREIGN[name])
    others += other_values(name, value) if name in tree else ANY
    for other in others:
      changed = copy.deepcopy(tree)
      changed[name] = other
      yield f'{name}={json.dumps(other)}', changed
    if name in tree:
      yield f'no {name}', {k: v for k, v in tree.items() if k != name}


def other_values(name: str, value) -> list:
  """Returns other values of the type of `value`."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int):
    return [0, value + 1, 2 * value]
  if isinstance(value, float):
    return [0.5 * value, value + 0.5]
  if isinstance(value, dict):
    return [value | {key: other} for key in value
            for other in other_values(key, value[key])]
  if isinstance(value, list):
    return [[x] * len(value) for x in value if value.count(x) < len(value)]
  if isinstance(value, str):
    return [other for part, names in NAMES.items() if part in name
            for other in names if other != value]
  return []
