"""The table of wirings in docs/architectures.md is what BLOCKS and the configs
say.

`python -m tests.docs.wirings_test` prints it as it should be."""

import inspect

import architectures
from architectures.parts.blocks import BLOCKS
from tests.docs import architectures_doc_test as doc

TITLES = ['`model.block`', 'x becomes', 'known from', 'systems here',
          'cross-attention', 'without a network', 'streams']


def wirings(system) -> set[str]:
  """Returns those of a system's layers."""
  c = doc.model(f'{system}:tiny')
  return {c.of_kind(name).block if name else c.block for name in c.kinds_used}


def table() -> list[str]:
  """Returns the table, with a row for each entry."""
  of = {system: wirings(system) for system in architectures.files()}
  lines = [doc.line(TITLES), '|' + '---|' * len(TITLES)]
  for name, block in BLOCKS.items():
    text = ' '.join((inspect.getdoc(block) or '').partition('\n\n')[0].split())
    equation, _, known = text.removesuffix('.').removesuffix(')').rpartition(
        ' (')
    assert equation, (f'the docstring of {block.__name__} has to begin with '
                      'its equation and, in brackets, those who have it')
    lines.append(doc.line([
        f'`{name}`', equation, known,
        ', '.join(sorted(s for s in of if name in of[s])) or '—',
        *('yes' if able else 'no' for able in (
            block.CROSS, block.WITHOUT_FFN, block.STREAMS))]))
  return lines


def test_the_table_is_what_the_entries_say():
  wanted = '\n'.join(table())
  assert f'\n\n{wanted}\n\n' in doc.DOC.read_text(), (
      f'the table of wirings should be\n{wanted}')


if __name__ == '__main__':
  print('\n'.join(table()))
