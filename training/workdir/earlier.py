"""What the configs of earlier versions' runs say otherwise than this one's."""

from typing import Any

from configs import kinds

# What optim.decay_mask was by default, before parameters declared their roles.
_MASK = (('.*(norm|bias|embed|sink).*', 0), ('.*', 1))
# Objectives that have pairs of texts.
_OF_PAIRS = ('classification', 'regression', 'question_answering')


def as_of_now(tree: dict[str, Any]) -> dict[str, Any]:
  """Returns a config's tree, in which what an earlier version wrote is said as
  this one says it.

  A run that lacks data.chat_template or data.pair_separators has the layout
  that there was then; one that lacks model.next_sentence has the pooler that
  every BERT had."""
  task, model = tree.get('objective'), tree.get('model')
  if 'data' in tree:
    of_roberta = isinstance(model, dict) and model.get('arch') == 'roberta'
    tree['data'] = {
        'chat_template': 'earlier' if task == 'chat' else 'published',
        'pair_separators': int(of_roberta and task in _OF_PAIRS),
        **tree['data']}
  if isinstance(model, dict):
    tree['model'] = {'next_sentence': model.get('arch') == 'bert',
                     **kinds.modern(model)}
  if 'optim' in tree and tree['optim'].get('decay_mask') == _MASK:
    tree['optim']['decay_mask'] = ()
  return tree
