"""The heads of tasks against transformers' classes for them.

Of each system that has them, and each head: scores, gradients of all
parameters, and an export that transformers loads without a missing or
unexpected key and whose scores are the same. Rows are padded on the right, and
of decoders on the left as well: a row is scored off its last token.
"""

from collections.abc import Iterator
import pathlib
import tempfile

import architectures
from tools.verify import cases, compare, recording, reference
from training import weights

FOLDER = pathlib.Path(__file__).parents[2] / 'tests' / 'data' / 'heads'
# Of these the tests have a recording, and of decoders with padding on the left.
RECORDED = (('bert', 'sequence', False), ('gpt', 'sequence', True),
            ('llama', 'span', False))


def all_cases() -> Iterator[tuple[str, str, bool]]:
  """Yields every (system, head, whether the padding is on the left)."""
  for system in cases.SYSTEMS:
    for head in architectures.hugging_face(system).heads:
      yield system, head, False
      if architectures.systems()[system].STACK == 'decoder':
        yield system, head, True


def name(system: str, head: str, left: bool) -> str:
  """Returns what a recording is called."""
  return f'{system}-{head}{"-left" if left else ""}'


def findings(system: str, record: bool) -> Iterator[
    tuple[str, compare.Finding]]:
  """Yields (case, finding) of one system; records some where asked."""
  for case in all_cases():
    if case[0] != system:
      continue
    _, head, left = case
    found = reference.run_head(system, head, left)
    if record and case in RECORDED:
      FOLDER.mkdir(parents=True, exist_ok=True)
      recording.save_recording(found, FOLDER / f'{name(*case)}.safetensors')
    label = f'{head}, left' if left else head
    for finding in compare.findings_of(found):
      yield label, finding
    if left:
      continue
    module, params = compare.model_of(found)
    with tempfile.TemporaryDirectory() as folder:
      weights.to_hf(module, params, folder, labels=('no', 'yes', 'perhaps')[
          :module.config.num_labels])
      theirs = reference.logits(system, folder, found.inputs, head)
    yield label, compare.Finding(
        'export', compare.worst(theirs, found.outputs, found.inputs),
        compare.LIMITS['export'])
