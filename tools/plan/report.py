"""Renders a plan as text. A figure of an estimate has a ~ before it."""

from tools.plan.chips import GIB

_BOUNDS = {'compute': 'compute', 'hbm': 'HBM', 'network': 'network',
           'network_outside': 'network between slices or hosts'}


def text(plan: dict) -> str:
  """Returns the whole report of a plan."""
  lines = [
      _devices(plan),
      f'{plan["parameters"]:,} parameters, {plan["active_parameters"]:,} at '
      'work for a token',
      _batch(plan),
      _compiler(plan)]
  whole = []
  for row in plan['whole_along_fsdp']:
    whole.append(f'{row["name"]} {row["bytes_per_device"] / GIB:.3f} GiB')
  if whole:
    lines.append('whole on each device along fsdp, which does not cut them: '
                 + ', '.join(whole))
  for program in plan['programs']:
    lines += ['', *_program(program)]
  return '\n'.join(lines)


def _devices(plan: dict) -> str:
  """Returns the line of the model, its devices and their mesh."""
  place = plan['topology']
  if plan['slices'] > 1:
    place += f' x {plan["slices"]} slices'
  devices = f'{plan["chips"]:,} chips'
  if plan['devices'] != plan['chips']:
    devices += f', {plan["devices"]:,} devices'
  mesh = ' '.join(f'{axis}={n}' for axis, n in plan['mesh'].items())
  return f'{plan["model"]} on {place}: {devices}; mesh {mesh}'


def _batch(plan: dict) -> str:
  """Returns the line of the batch and of what is kept and updated."""
  gathered = ''
  if plan['keep_gathered'] != 'none':
    gathered = f'gathered once: {plan["keep_gathered"]}; '
  return (f'batch {plan["batch_size"]:,} x {plan["length"]:,} tokens, '
          f'{plan["sequences_per_device"]:g} sequences a device at once; remat '
          f'{plan["remat"]}; {gathered}{plan["optimizer"]}')


def _compiler(plan: dict) -> str:
  """Returns the line of the compiler."""
  if plan['compiler']:
    return f'by {plan["compiler"]}, jax {plan["jax"]}'
  return ('An estimate: no compiler for these devices is installed (pip '
          "install -e '.[plan,plan-gpu]', for GPUs with Python 3.12 or later), "
          'so memory and collectives are by formula. Every figure has a ~.')


def _program(program: dict) -> list[str]:
  """Returns the lines of one program."""
  mark = ''
  if program['estimate']:
    mark = '~'
  lines = [f'{program["program"]}: fits (compiled in '
           f'{program["compile_seconds"]} s)']
  sizes = dict(program['memory'])
  hbm = sizes.pop('hbm')
  for name, nbytes in sizes.items():
    label, share = name.replace('_', ' '), ''
    if name == 'peak':
      share = f'{nbytes / hbm:>8.1%} of {hbm / GIB:.2f}'
    lines.append(f'  {label:<28}{mark}{nbytes / GIB:>12.3f} GiB {share}')
  return [
      *lines,
      '  collectives of a step, by device',
      *collectives(program['collectives'], mark),
      *_performance(program, mark)]


def collectives(rows: list[dict], mark: str) -> list[str]:
  """Returns the lines of a table of collectives.

  Args:
    rows: the rows of collectives.table.
    mark: what stands before each figure.
  """
  if not rows:
    return ['    none']
  lines = [f'    {"kind":<20}{"mesh axes":<22}{"dtype":<7}{"runs":>8}'
           f'{"GiB sent":>12}{"of it outside":>15}']
  small = 0  # how often those run that send next to nothing
  for row in rows:
    if row['bytes_sent_per_device'] < 2 ** 20:
      small += row['runs_per_step']
    else:
      lines.append(_collective(row, mark))
  if small:
    lines.append(f'    and {mark}{small:,} of less than a MiB a step, by kind')
  return lines


def _collective(row: dict, mark: str) -> str:
  """Returns the line of one kind of collective."""
  axes = f'{",".join(row["axes"])} ({row["devices"]})'
  at_least = '' if row['exact'] else '>='
  runs = f'{mark}{at_least}{row["runs_per_step"]:,}'
  sent = f'{mark}{row["bytes_sent_per_device"] / GIB:.3f}'
  outside = ''
  if row['bytes_sent_outside_per_device']:
    outside = f'{mark}{row["bytes_sent_outside_per_device"] / GIB:.3f}'
  return (f'    {row["kind"]:<20}{axes:<22}{row["dtype"]:<7}{runs:>8}'
          f'{sent:>12}{outside:>15}')


def _performance(program: dict, mark: str) -> list[str]:
  """Returns the lines of the FLOPs and of the least time of a step."""
  flops, roofline = program['flops'], program['roofline']

  def tera(n: float) -> str:
    return f'{mark}{n / 1e12:,.4g} TFLOP'

  # The FLOPs.
  lines = [
      f'  a device computes {tera(flops["per_device"])} a step, '
      f'{mark}{flops["ratio"]:.2f} times the '
      f'{tera(flops["model_per_device"])} that the model needs '
      f'({tera(flops["weights_per_device"])} with weights, '
      f'{tera(flops["attention_per_device"])} in attention)']
  if flops['loops_counted_once']:
    lines.append(f'  {flops["loops_counted_once"]} loops whose passes depend '
                 'on data are counted as one pass')
  if flops['all_groups_per_device']:
    lines.append(f'  {tera(flops["all_groups_per_device"])} of it are products '
                 'of every row that buffers have room for with every expert '
                 'here, which this compiler masks instead of skipping')

  # The time.
  seconds = []
  for name, least in roofline['seconds'].items():
    seconds.append(f'{_BOUNDS[name]} {mark}{least:.3g}')
  lines.append(f'  seconds a step, at the least: {", ".join(seconds)}')
  if not all(row['exact'] for row in program['collectives']):
    lines.append('  the network takes longer than that: loops whose trip count '
                 'the program does not tell (>=) are counted as one pass, so '
                 'the bound and the MFU below may be too good')
  if roofline['unknown']:
    lines.append('  the network between slices has no published figure: it '
                 'is left out')
  lines.append(f'  bound by {_BOUNDS[roofline["bound"]]}; highest MFU {mark}'
               f'{roofline["highest_mfu"]:.1%}')
  return lines
