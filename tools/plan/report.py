"""A plan as text. A figure of an estimate has a ~ before it."""

from tools.plan.chips import GIB


def text(plan: dict) -> str:
  """Returns the whole report of a plan."""
  mesh = ' '.join(f'{axis}={n}' for axis, n in plan['mesh'].items())
  chips, count, slices = plan['chips'], plan['devices'], plan['slices']
  place = plan['topology'] + f' x {slices} slices' * (slices > 1)
  devices = f'{chips:,} chips' + f', {count:,} devices' * (count != chips)
  gathered = plan['keep_gathered']
  kept = f'gathered once: {gathered}; ' * (gathered != 'none')
  lines = [
      f'{plan["model"]} on {place}: {devices}; mesh {mesh}',
      f'{plan["parameters"]:,} parameters, {plan["active_parameters"]:,} at '
      'work for a token',
      f'batch {plan["batch_size"]:,} x {plan["length"]:,} tokens, '
      f'{plan["sequences_per_device"]:g} sequences a device at once; remat '
      f'{plan["remat"]}; {kept}{plan["optimizer"]}',
      f'by {plan["compiler"]}, jax {plan["jax"]}' if plan['compiler'] else
      'An estimate: no compiler for these devices is installed (pip install -e '
      "'.[plan,plan-gpu]', for GPUs with Python 3.12 or later), so memory and "
      'collectives are by formula. Every figure has a ~.']
  whole = [f'{row["name"]} {row["bytes_per_device"] / GIB:.3f} GiB'
           for row in plan['whole_along_fsdp']]
  if whole:
    lines.append('whole on each device along fsdp, which does not cut them: '
                 + ', '.join(whole))
  for program in plan['programs']:
    lines += ['', *_program(program)]
  return '\n'.join(lines)


def _program(p: dict) -> list[str]:
  m = '~' if p['estimate'] else ''
  lines = [f'{p["program"]}: fits (compiled in {p["compile_seconds"]} s)']
  hbm = p['memory']['hbm']
  lines += [f'  {name.replace("_", " "):<28}{m}{n / GIB:>12.3f} GiB '
            + f'{n / hbm:>8.1%} of {hbm / GIB:.2f}' * (name == 'peak')
            for name, n in p['memory'].items() if name != 'hbm']
  return [*lines, '  collectives of a step, by device',
          *collectives(p['collectives'], m), *_performance(p, m)]


def collectives(rows: list[dict], m: str) -> list[str]:
  """Returns the lines of a table of collectives, `m` before each figure."""
  lines = [f'    {"kind":<20}{"mesh axes":<22}{"dtype":<7}{"runs":>8}'
           f'{"GiB sent":>12}{"of it outside":>15}']
  small = [r for r in rows if r['bytes_sent_per_device'] < 2 ** 20]
  for r in rows:
    if r not in small:
      axes = f'{",".join(r["axes"])} ({r["devices"]})'
      runs = f'{m}{"" if r["exact"] else ">="}{r["runs_per_step"]:,}'
      outside = r['bytes_sent_outside_per_device'] / GIB
      lines.append(
          f'    {r["kind"]:<20}{axes:<22}{r["dtype"]:<7}{runs:>8}'
          f'{m + format(r["bytes_sent_per_device"] / GIB, ".3f"):>12}'
          f'{m + format(outside, ".3f") if outside else "":>15}')
  if small:
    runs = sum(r['runs_per_step'] for r in small)
    lines.append(f'    and {m}{runs:,} of less than a MiB a step, by kind')
  return lines if rows else ['    none']


def _performance(p: dict, m: str) -> list[str]:
  f, r = p['flops'], p['roofline']
  tera = lambda n: f'{m}{n / 1e12:,.4g} TFLOP'
  names = {'compute': 'compute', 'hbm': 'HBM', 'network': 'network',
           'network_outside': 'network between slices or hosts'}
  lines = [
      f'  a device computes {tera(f["per_device"])} a step, '
      f'{m}{f["ratio"]:.2f} times the {tera(f["model_per_device"])} that the '
      f'model needs ({tera(f["weights_per_device"])} with weights, '
      f'{tera(f["attention_per_device"])} in attention)']
  if f['loops_counted_once']:
    lines.append(f'  {f["loops_counted_once"]} loops whose passes depend on '
                 'data are counted as one pass')
  if f['all_groups_per_device']:
    lines.append(f'  {tera(f["all_groups_per_device"])} of it are products of '
                 'every row that buffers have room for with every expert here, '
                 'which this compiler masks instead of skipping')
  lines.append('  seconds a step, at the least: ' + ', '.join(
      f'{names[k]} {m}{s:.3g}' for k, s in r['seconds'].items()))
  if not all(row['exact'] for row in p['collectives']):
    lines.append('  the network takes longer than that: loops whose trip count '
                 'the program does not tell (>=) are counted as one pass, so '
                 'the bound and the MFU below may be too good')
  if r['unknown']:
    lines.append('  the network between slices has no published figure: it '
                 'is left out')
  lines.append(f'  bound by {names[r["bound"]]}; highest MFU {m}'
               f'{r["highest_mfu"]:.1%}')
  return lines
