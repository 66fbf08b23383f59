"""Renders a plan as text. A figure of an estimate has a ~ before it."""

from tools.plan.chips import GIB

_NAME_OF_BOUND = {'compute': 'compute', 'hbm': 'HBM', 'network': 'network',
                  'network_outside': 'network between slices or hosts'}


def plan_as_text(plan: dict) -> str:
  """Returns a plan as text for a terminal: the devices, the model, the batch,
  and the memory, collectives and time of each program.

  Args:
    plan: a plan, as programs.make_plan returns it.
  """
  # The run as a whole.
  lines = [
      _line_of_devices(plan),
      f'{plan["parameters"]:,} parameters, {plan["active_parameters"]:,} at '
      'work for a token',
      _line_of_batch(plan),
      _line_of_compiler(plan)]

  # Large parameters that each device holds as a whole.
  unsharded = []
  for row in plan['whole_along_fsdp']:
    unsharded.append(f'{row["name"]} {row["bytes_per_device"] / GIB:.3f} GiB')
  if unsharded:
    lines.append('whole on each device along fsdp, which does not cut them: '
                 + ', '.join(unsharded))

  # Each program: the training step, and those of generation.
  for program in plan['programs']:
    lines += ['', *_lines_of_program(program)]
  return '\n'.join(lines)


def _line_of_devices(plan: dict) -> str:
  """Returns the line of a plan that names the model, its devices and their
  mesh.

  Args:
    plan: the plan, as programs.make_plan returns it.
  """
  topology = plan['topology']
  if plan['slices'] > 1:
    topology += f' x {plan["slices"]} slices'
  devices = f'{plan["chips"]:,} chips'
  if plan['devices'] != plan['chips']:
    devices += f', {plan["devices"]:,} devices'
  mesh = ' '.join(f'{axis}={n}' for axis, n in plan['mesh'].items())
  return f'{plan["model"]} on {topology}: {devices}; mesh {mesh}'


def _line_of_batch(plan: dict) -> str:
  """Returns the line of a plan that describes the batch, the remat policy, the
  weights that stay gathered and the optimiser."""
  gathered = ''
  if plan['keep_gathered'] != 'none':
    gathered = f'gathered once: {plan["keep_gathered"]}; '
  return (f'batch {plan["batch_size"]:,} x {plan["length"]:,} tokens, '
          f'{plan["sequences_per_device"]:g} sequences a device at once; remat '
          f'{plan["remat"]}; {gathered}{plan["optimizer"]}')


def _line_of_compiler(plan: dict) -> str:
  """Returns the line of a plan that names the compiler, or says that the
  figures are estimates."""
  if plan['compiler']:
    return f'by {plan["compiler"]}, jax {plan["jax"]}'
  return ('An estimate: no compiler for these devices is installed (pip '
          "install -e '.[plan,plan-gpu]', for GPUs with Python 3.12 or later), "
          'so memory and collectives are by formula. Every figure has a ~.')


def _lines_of_program(program: dict) -> list[str]:
  """Returns the lines of a report that are about one program: its memory in GiB
  (2**30 bytes), its collectives and its time.

  Args:
    program: the report of the program, as programs.analyse_program returns it.
  """
  # Figures that were not compiled, but estimated, are marked.
  mark = ''
  if program['estimate']:
    mark = '~'

  # The memory of a device, a line for each part. Beside the peak stands its
  # share of the device's whole memory (hbm).
  lines = [f'{program["program"]}: fits (compiled in '
           f'{program["compile_seconds"]} s)']
  sizes = dict(program['memory'])
  hbm = sizes.pop('hbm')
  for name, nbytes in sizes.items():
    label = name.replace('_', ' ')
    share = ''
    if name == 'peak':
      share = f'{nbytes / hbm:>8.1%} of {hbm / GIB:.2f}'
    lines.append(f'  {label:<28}{mark}{nbytes / GIB:>12.3f} GiB {share}')
  return [
      *lines,
      '  collectives of a step, by device',
      *table_of_collectives(program['collectives'], mark),
      *_lines_of_performance(program, mark)]


def table_of_collectives(rows: list[dict], mark: str) -> list[str]:
  """Returns the lines of a table of collectives, which are the communication
  between devices. Those that send less than a MiB in a step are only counted.

  Args:
    rows: the rows, as collectives.sum_by_kind returns them.
    mark: a sign that is put before each figure: ~ for estimates, or ''.
  """
  if not rows:
    return ['    none']
  lines = [f'    {"kind":<20}{"mesh axes":<22}{"dtype":<7}{"runs":>8}'
           f'{"GiB sent":>12}{"of it outside":>15}']
  small_runs = 0
  for row in rows:
    if row['bytes_sent_per_device'] < 2 ** 20:
      small_runs += row['runs_per_step']
    else:
      lines.append(_row_of_collective(row, mark))
  if small_runs:
    lines.append(
        f'    and {mark}{small_runs:,} of less than a MiB a step, by kind')
  return lines


def _row_of_collective(row: dict, mark: str) -> str:
  """Returns the line of a table of collectives for one kind of collective.

  Args:
    row: a row, as collectives.sum_by_kind returns it.
    mark: a sign that is put before each figure: ~ for estimates, or ''.
  """
  axes = f'{",".join(row["axes"])} ({row["devices"]})'
  # A loop whose passes are not known was counted as one pass.
  at_least = '' if row['exact'] else '>='
  runs = f'{mark}{at_least}{row["runs_per_step"]:,}'
  sent = f'{mark}{row["bytes_sent_per_device"] / GIB:.3f}'
  outside = ''
  if row['bytes_sent_outside_per_device']:
    outside = f'{mark}{row["bytes_sent_outside_per_device"] / GIB:.3f}'
  return (f'    {row["kind"]:<20}{axes:<22}{row["dtype"]:<7}{runs:>8}'
          f'{sent:>12}{outside:>15}')


def _lines_of_performance(program: dict, mark: str) -> list[str]:
  """Returns the lines of a report about the FLOPs and the least time of a step.

  Args:
    program: the report of the program, as programs.analyse_program returns it.
    mark: a sign that is put before each figure: ~ for estimates, or ''.
  """
  flops = program['flops']
  roofline = program['roofline']

  def format_flops(count: float) -> str:
    """Returns a number of FLOPs as text, in TFLOP (1e12)."""
    return f'{mark}{count / 1e12:,.4g} TFLOP'

  # The FLOPs that are computed, beside those that the model needs.
  computed = format_flops(flops['per_device'])
  needed = format_flops(flops['model_per_device'])
  with_weights = format_flops(flops['weights_per_device'])
  in_attention = format_flops(flops['attention_per_device'])
  lines = [
      f'  a device computes {computed} a step, '
      f'{mark}{flops["ratio"]:.2f} times the {needed} that the model needs '
      f'({with_weights} with weights, {in_attention} in attention)']
  if flops['loops_counted_once']:
    lines.append(f'  {flops["loops_counted_once"]} loops whose passes depend '
                 'on data are counted as one pass')
  if flops['all_groups_per_device']:
    masked = format_flops(flops['all_groups_per_device'])
    lines.append(f'  {masked} of it are products '
                 'of every row that buffers have room for with every expert '
                 'here, which this compiler masks instead of skipping')

  # The least time by each bound, and why it may be wrong.
  seconds = []
  for name, least in roofline['seconds'].items():
    seconds.append(f'{_NAME_OF_BOUND[name]} {mark}{least:.3g}')
  lines.append(f'  seconds a step, at the least: {", ".join(seconds)}')
  if not all(row['exact'] for row in program['collectives']):
    lines.append('  the network takes longer than that: loops whose trip count '
                 'the program does not tell (>=) are counted as one pass, so '
                 'the bound and the MFU below may be too good')
  if roofline['unknown']:
    lines.append('  the network between slices has no published figure: it '
                 'is left out')
  bound = _NAME_OF_BOUND[roofline['bound']]
  lines.append(f'  bound by {bound}; highest MFU {mark}'
               f'{roofline["highest_mfu"]:.1%}')
  return lines
