"""Where everything is, on one mesh or on two, as JSON holds it and as text."""

import math

import jax

from tools.explain_sharding import arrays, predict
from training import runs
from training.data import tokenizers
from training.distributed import devices

MIB = 2 ** 20


def explain(config, mesh: dict[str, int]) -> dict:
  """Returns the report of one config on one mesh."""
  runs.check_config(config)
  model, _ = runs.resolve(config, tokenizers.load(config.data.tokenizer))
  count = math.prod(mesh.values())
  run = runs.build(config, model,
                   devices.make_mesh(mesh, jax.devices()[:count]))
  params = arrays.parameters(run)
  return dict(
      model=model.arch, mesh=dict(mesh), rules=config.mesh.rules,
      parameters=params, activations=arrays.activations(run),
      collectives=predict.collectives(run, params),
      parameter_bytes=sum(r['bytes'] for r in params),
      parameter_bytes_per_device=sum(r['bytes_per_device'] for r in params))


def diff(one: dict, two: dict) -> dict:
  """Returns the rows that differ, of both reports."""
  report = {side: {k: v for k, v in r.items() if not isinstance(v, list)}
            for side, r in (('one', one), ('two', two))}
  for kind in ('parameters', 'activations'):
    others = {(r['name'], tuple(r['axes'])): r for r in two[kind]}
    report[kind] = [
        dict(name=r['name'], shape=r['shape'], axes=r['axes'],
             one=_side(r), two=_side(other))
        for r in one[kind]
        if (other := others.get((r['name'], tuple(r['axes']))))
        and _side(r) != _side(other)]
  report['collectives'] = dict(one=one['collectives'], two=two['collectives'])
  return report


def _side(row) -> dict:
  return {name: row[name] for name in ('spec', 'bytes_per_device')}


def text(r: dict) -> str:
  lines = [f'{r["model"]}, mesh {_mesh(r)}, rules {r["rules"]!r}: parameters '
           f'{r["parameter_bytes"] / MIB:,.1f} MiB in all, '
           f'{r["parameter_bytes_per_device"] / MIB:,.1f} MiB a device']
  for kind in ('parameters', 'activations'):
    lines += ['', kind]
    for row in r[kind]:
      times = f'  x {row["times"]}' if row.get('times', 1) > 1 else ''
      lines.append(f'  {row["name"]}  {_shape(row)}  {row["spec"]}  '
                   f'{row["bytes_per_device"] / MIB:,.3f} MiB a device{times}')
      lines += [f'      {i}: {line}' for i, line in enumerate(map(
          _dimension, row['dimensions']))]
  return '\n'.join(lines + ['', *_collectives(r['collectives'])])


def _dimension(d: dict) -> str:
  rule = f'{d["axis"]} -> {" x ".join(d["rule"]) or "nothing"}'
  if d['axis'] is None:
    return f'whole: {d["why"]}'
  if d['mesh']:
    more = f' ({d["why"]})' if d['why'] else ''
    return f'{rule}: over {" x ".join(d["mesh"])}{more}'
  return f'{rule}: whole, {d["why"]}'


def _shape(row) -> str:
  return '[' + ', '.join(f'{axis or "-"} {size:,}' for axis, size in zip(
      row['axes'], row['shape'])) + ']'


def _mesh(r) -> str:
  return ' '.join(f'{axis}={n}' for axis, n in r['mesh'].items())


def _collectives(rows) -> list[str]:
  if not rows:
    return ['collectives of a training step: none']
  lines = ['collectives of a training step, as the rules predict '
           '(python -m tools.plan compiles it)']
  for row in rows:
    lines.append(f'  {row["kind"]:<16}{",".join(row["axes"]):<22}'
                 f'{row["runs_per_step"]:>7,} x  '
                 f'{row["bytes_sent_per_device"] / MIB:>14,.3f} MiB sent  '
                 f'{row["why"]}')
  return lines


def diff_text(r: dict) -> str:
  lines = []
  for side in ('one', 'two'):
    s = r[side]
    lines.append(f'{side}: {s["model"]}, mesh {_mesh(s)}, rules '
                 f'{s["rules"]!r}: {s["parameter_bytes_per_device"] / MIB:,.1f}'
                 ' MiB of parameters a device')
  for kind in ('parameters', 'activations'):
    lines += ['', f'{kind} that differ: {len(r[kind])}']
    for row in r[kind]:
      lines.append(f'  {row["name"]}  {_shape(row)}')
      lines += [f'      {side}: {row[side]["spec"]}  '
                f'{row[side]["bytes_per_device"] / MIB:,.3f} MiB'
                for side in ('one', 'two')]
  for side in ('one', 'two'):
    lines += ['', f'{side}: ' + _collectives(r['collectives'][side])[0],
              *_collectives(r['collectives'][side])[1:]]
  return '\n'.join(lines)
