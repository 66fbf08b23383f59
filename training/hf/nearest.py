"""The family here that is nearest to one that no page reads.

Two families are near each other where they share parts, whatever they are
called, and a config.json has fields for its parts: rms_norm_eps, rope_theta,
num_key_value_heads, num_experts_per_tok, type_vocab_size, ... So the fields of
the config.json are compared with those that each page's record reads. A field
that few pages read tells more than one that nearly all have.
"""

from collections.abc import Collection, Mapping
import re
from typing import Any, NamedTuple

from architectures.parts import hf


class Nearest(NamedTuple):
  """Attributes:
    model_type: of the family.
    share: of what either of the two has, how much both have: from 0 to 1.
    unknown: fields of the config.json that its page does not read, or of
      another value than it knows.
    fields: how many fields were compared.
  """
  model_type: str
  share: float
  unknown: tuple[str, ...]
  fields: int


def nearest(tree: Mapping[str, Any], asked: Mapping[str, Collection[str]],
            pages: Mapping[str, hf.HuggingFace], neutral: re.Pattern[str]
            ) -> Nearest | None:
  """Returns the nearest family; None where the config.json tells nothing.

  Args:
    tree: the config.json.
    asked: the fields that the page of each model_type reads.
    pages: their records.
    neutral: fields that do not change what is computed.
  """
  held = {name for name, value in tree.items()
          if value is not None and not neutral.fullmatch(name)}
  readers = {name: sum(name in names for names in asked.values())
             for names in asked.values() for name in names}
  purposes = [_purpose([page.architecture]) for page in pages.values()]
  purpose = _purpose(tree.get('architectures'))

  def weight(names: Collection[str]) -> float:
    return sum(1 / readers[name] for name in names if name in readers)

  found = []
  for model_type, page in pages.items():
    shared = {name for name in held & set(asked[model_type])
              if _is_known(page, name, tree[name])}
    wanted = {names.split('|')[-1] for names, *_ in page.fields.values()}
    both, either = weight(shared), weight(held | wanted)
    if purpose:  # what its class is for counts as a field does
      either += 1 / max(1, purposes.count(purpose))
      if purpose == _purpose([page.architecture]):
        both += 1 / purposes.count(purpose)
    found.append(Nearest(model_type, both / either if either else 0.0,
                         tuple(sorted(held - shared)), len(held)))
  best = max(found, key=lambda row: row.share, default=None)
  return best if best and len(best.unknown) < best.fields else None


def words(near: Nearest | None) -> str:
  """Returns the sentence's end on the nearest family; '' for none."""
  if near is None:
    return ''
  unknown = ', '.join(near.unknown[:9]) + (
      f' and {len(near.unknown) - 9} more' if len(near.unknown) > 9 else '')
  return (f'. By its parts it is nearest to {near.model_type!r}, which knows '
          f'{near.fields - len(near.unknown)} of its {near.fields} fields'
          + (f', but not {unknown}' if unknown else ''))


def _is_known(page: hf.HuggingFace, name: str, value: Any) -> bool:
  """Whether a page that reads a field takes this value of it."""
  if name in page.only:
    return value == page.only[name]
  for names, _, *choices in page.fields.values():
    if name in names.split('|') and choices:
      return isinstance(value, str) and value in choices[0]
  return True


def _purpose(architectures: Any) -> str:
  """Returns what a class of transformers is for: ForCausalLM, ..."""
  named = architectures if isinstance(architectures, list) else []
  found = re.search(r'(For[A-Z]\w*|LMHeadModel)$', ''.join(map(str, named[:1])))
  return found[0].replace('LMHeadModel', 'ForCausalLM') if found else ''
