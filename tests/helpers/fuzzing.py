"""What tests/fuzz_test.py draws: wrong values, mutated trees, damaged files."""

import copy
import json
import os
import shutil

from hypothesis import event, settings
from hypothesis import strategies as st

from architectures.parts import tables
from configs.errors import EnvironmentFailure, RequestError

# Of all tests together: FUZZ_CASES asks for more.
CASES = int(os.environ.get('FUZZ_CASES', '60'))

# What stands where something else should.
JUNK = st.sampled_from([
    None, True, False, 0, 1, -1, 2.5, 10**4, 1e300,
    float('nan'), float('inf'), '', 'x', '2', 'gelu', '\ud800', '\0', 'a' * 300,
    [], {}, [1], ['a'], [[1]], {'a': 1}, {'': None}])
WORDS = st.sampled_from([
    '', '0', '1', '-1', '2', '3', '7', '64', '1e9', '1e400', '-1e-400', 'nan',
    'inf', '-inf', '0.5', 'True', 'None',
    '()', '((', "(('.*', 2),)", '(1, 2)', '[]', '{}', 'x', 'é', '\udcff',
    '../..', '/dev/null', '/proc/x', '/' + 'a' * 300, '~nobody/x', 'a=b',
    'bytes', 'bytes:7', 'sotu', 'text:', 'text:/none/*',
    'jsonl:x', '0.5*sotu,0.5*sotu', 'x*sotu', 'cosine', 'muon', 'rope', 'moe',
    'gs://', 'gs://a', 's3://a/b', 'float16', 'bfloat16', 'mlm', 'span',
    'seq2seq', 'bert', 't5', 'mixtral', 'mup', '10:13', '3:1', 'host:80'])


# What a field of a type may well hold; some of it does not go together.
NAMES = sorted({name for names in tables.CHOICES.values() for name in names}
               | {'adafactor', 'lion', 'sgd', 'linear', 'wsd', 'rsqrt', 'chat',
                  'prefix', 'mlm_nsp', 'replicated'})
LIKELY = {
    bool: st.sampled_from(['True', 'False']),
    int: st.sampled_from(['0', '1', '2', '3', '4', '8', '16', '32', '-1']),
    float: st.sampled_from(['0', '0.1', '0.5', '1', '2', '1e-4', '1e4', '-1']),
    str: st.sampled_from(NAMES),
    tuple: st.sampled_from(["(('.*', 1),)", '()', "(('bias', 0),)"]),
}


def each(share: float):
  """The settings of a test that draws a share of all cases. Without
  FUZZ_CASES the cases are the same each time."""
  return settings(max_examples=max(1, round(CASES * share)), deadline=None,
                  derandomize='FUZZ_CASES' not in os.environ, database=None,
                  print_blob=True)


def runs_or_refuses(call) -> bool:
  """Whether `call` runs to its end; else it has to end with a sentence."""
  try:
    call()
    event('ran')
    return True
  except (RequestError, EnvironmentFailure, OSError) as error:
    event(type(error).__name__)
    assert str(error).strip() and 'Traceback' not in str(error)
    return False


def mutated(draw, tree):
  """Returns a JSON tree with one to three places changed."""
  tree = json.loads(json.dumps(tree))
  for _ in range(draw(st.integers(1, 3))):
    places = list(_places(tree))
    if not places:
      return draw(JUNK)
    group, key = draw(st.sampled_from(places))
    what = draw(st.sampled_from(['replace', 'replace', 'drop', 'rename']))
    if what == 'replace' or isinstance(group, list):
      group[key] = copy.deepcopy(draw(JUNK))
    elif what == 'drop':
      del group[key]
    else:
      group[draw(st.sampled_from(['a', 'a.b', key + 'x', '']))] = group.pop(key)
  return tree


def _places(tree):
  """Yields each (object or list, key) below a tree; long lists in part."""
  items = (list(tree.items()) if isinstance(tree, dict) else
           list(enumerate(tree[:4])))
  for key, value in items:
    yield tree, key
    if isinstance(value, dict | list):
      yield from _places(value)


def damage(draw, file) -> None:
  """Damages a file, or its name."""
  what = draw(st.sampled_from(
      ['flip', 'flip', 'cut', 'empty', 'delete', 'junk', 'folder', 'rename']))
  data = file.read_bytes()
  place = draw(st.integers(0, max(len(data) - 1, 0)))
  if what == 'flip' and data:
    changed = bytearray(data)
    changed[place] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(changed)
  elif what == 'cut':
    file.write_bytes(data[:place])
  elif what == 'delete':
    file.unlink()
  elif what == 'folder':
    file.unlink()
    file.mkdir()
  elif what == 'rename':
    file.rename(file.with_name(file.name + 'x'))
  else:
    file.write_bytes(b'' if what == 'empty' else draw(st.binary(max_size=64)))


def fresh(source, target) -> None:
  """Makes `target` a copy of the folder `source`."""
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(source, target)
