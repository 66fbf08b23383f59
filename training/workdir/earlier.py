"""What the configs of earlier versions' runs say otherwise than this one's."""

import re
from typing import Any

from configs import kinds

# What optim.decay_mask was by default, before parameters declared their roles.
_MASK = (('.*(norm|bias|embed|sink).*', 0), ('.*', 1))
# Objectives that have pairs of texts.
_OF_PAIRS = ('classification', 'regression', 'question_answering')
# Sources of labelled texts, and after how many colons they name columns.
_FIELDS = {'labelled': 1, 'hf': 3}


def as_of_now(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns a config's tree, in which what an earlier version wrote is said as
  this one says it.

  A run that lacks data.chat_template or data.pair_separators has the layout
  that there was then, which a run without pairs shares with those of now; one
  that lacks model.next_sentence has the pooler that every BERT had."""
  task, model = tree.get('objective'), tree.get('model')
  if 'data' in tree:
    of_roberta = isinstance(model, dict) and model.get('arch') == 'roberta'
    earlier = {'chat_template': 'earlier' if task == 'chat' else 'published'}
    if 'pair_separators' not in tree['data']:
      earlier['pair_separators'] = int(
          of_roberta and task in _OF_PAIRS and _may_have_pairs(tree['data']))
    tree['data'] = earlier | tree['data']
  if isinstance(model, dict):
    tree['model'] = {'next_sentence': model.get('arch') == 'bert',
                     **kinds.modern(model)}
  if 'optim' in tree and tree['optim'].get('decay_mask') == _MASK:
    tree['optim']['decay_mask'] = ()
  return tree


def _may_have_pairs(data: dict[str, Any]) -> bool:
  """Whether rows have two texts; where nothing tells, they may."""
  parts = [part for name in ('source', 'eval_source')
           for part in str(data.get(name, '')).split(',') if part]
  return not parts or not all(map(_has_single_texts, parts))


def _has_single_texts(part: str) -> bool:
  """Whether a part of a data source is labelled texts, and no pairs: by the
  columns that it names or, if it names none, by the first line of its files."""
  from training.data import sources
  kind, *rest = re.sub(r'^\s*[0-9.eE+-]+\*', '', part).strip().split(':')
  if kind not in _FIELDS:
    return False
  fields = ':'.join(rest[_FIELDS[kind]:])
  if fields or kind == 'hf':
    return fields.count('+') == 1
  try:
    (_, source), = sources.parse(part)
    return all(len(next(iter(source.read(path))).texts) == 1
               for path in source.files)
  except (OSError, ValueError, StopIteration):
    return False
