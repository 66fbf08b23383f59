"""certificate: what both sides of a comparison were given, and in what they
differ beyond the question.

Whoever gives a verdict (the judge, the reports of sweeps and studies) makes a
Certificate of the base and one of the variant, from the traced step, the
configs and the folders of their runs, and prints what `name_differences` says.

A field of a config belongs to one quantity of the certificate, which follows
from how the field is declared (quantity_of_field). A field that is new belongs
to one, too: it is named where it differs unless its declaration says that it
changes nothing that is computed.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import math
import pathlib
from typing import Any, NamedTuple

from architectures.parts.config import DTYPES
from common.errors import RequestError, shorten
from common.fields import AT_START, SAFE, Effect
from configs import base as fields_lib
from tools.compare import cost, curves, layout, spec
from tools.compare import plan as plans
from training import objectives, runs
from training.workdir import provenance, run_config

# Both sides share a clock with other programs, so times differ by chance.
LARGEST_SHARE_OFF_IN_TIME = 0.5
# The names of hashes begin with it. A hash that one side lacks is not known.
HASH_PREFIX = 'content of '
SAME = 'same'  # in a CSV: as the base has it
Value = float | str | Mapping[str, Any]


class Quantity(NamedTuple):
  """A quantity that two sides of a comparison have alike or not.

  Attributes:
    title: what a reader calls it.
    tolerance: the share by which two numbers may differ without being named;
      None: it is no number.
  """
  title: str
  tolerance: float | None = None


_COST = cost.LARGEST_SHARE_OFF
# The one table of quantities, by their names in a Certificate, which are the
# columns of a CSV, too.
QUANTITIES = {
    # Fields of config.model, but for those of precision and of the start.
    'model': Quantity('model'),
    # All parameters, and those in products and in tables that are looked up.
    'params': Quantity('parameters', _COST),
    'multiplied_params': Quantity('parameters that are multiplied', _COST),
    'looked_up_params': Quantity('parameters that are looked up', _COST),
    # The FLOPs of training, for a token and for the run.
    'flops_per_token': Quantity('FLOPs of a token', _COST),
    'flops': Quantity('FLOPs of the run', _COST),
    'tokens': Quantity('tokens', _COST),
    # Fields that make the batches of training, and hashes of data.
    'batches': Quantity('order of data'),
    # Fields that decide what the held-out loss is of, and hashes of data.
    'held_out_text': Quantity('text held out'),
    # Its name and its hash.
    'tokenizer': Quantity('tokenizer'),
    # Fields of the optimiser, the schedule and the training loss.
    'recipe': Quantity('optimiser and schedule'),
    # The number of recipes that were tried, and of seeds of each.
    'tuning': Quantity('tuning'),
    # Those whose runs are compared.
    'seeds': Quantity('seeds'),
    # Fields that choose types of numbers.
    'precision': Quantity('precision'),
    # Fields of config.model that say how its parameters are drawn.
    'initialisation': Quantity('initialisation'),
    # Fields that take parameters from elsewhere, or draw others.
    'first_weights': Quantity('first weights'),
    'code': Quantity('code'),
    'devices': Quantity('devices'),
    # The mean time of a run's training steps.
    'seconds': Quantity('hardware time', LARGEST_SHARE_OFF_IN_TIME)}
# The quantities of QUANTITIES that the runs of one side of a comparison were
# given: a number, or a mapping of what it consists of, such as fields of the
# config, or the words of a CSV. One that is not known is not there.
Certificate = Mapping[str, Value]
# The numbers of a certificate that a cost.Cost has.
_COSTS = ('params', 'multiplied_params', 'looked_up_params', 'flops_per_token',
          'tokens')
# Both parts of the parameters say more than the number of all.
_PARTS_OF_PARAMS = ('multiplied_params', 'looked_up_params')
# The quantities that a question is taken to be about where nobody says so; all
# others follow from what is asked, or are to be alike whatever it is.
_QUANTITIES_OF_QUESTIONS = (
    'model', 'initialisation', 'batches', 'recipe', 'precision')


class Differences(NamedTuple):
  """The differences between two sides of a comparison.

  Attributes:
    asked: the fields or quantities that the question is taken to be about.
    named: what differs beyond these, in words, by quantity.
    unknown: the quantities that are known of one side alone.
  """
  asked: tuple[str, ...]
  named: dict[str, str]
  unknown: tuple[str, ...]

  @property
  def unlike(self) -> dict[str, str]:
    """The quantities that are not known to be alike beyond the question."""
    return self.named | dict.fromkeys(self.unknown, 'known of one side alone')

  @property
  def titles(self) -> str:
    """The quantities that differ beyond the question, for a table."""
    titles = [QUANTITIES[name].title for name in self.named]
    if self.unknown:
      titles.append('not all known')
    return ', '.join(titles)


# Fields of configs.


def is_of_held_out_text(name: str, config: Mapping[str, Any]) -> bool:
  """Returns whether a config field decides which held-out text the loss is
  measured on, or what is predicted in it. If such a field differs between two
  runs, their held-out losses cannot be compared.

  Args:
    name: the dotted name of the field.
    config: the config of one of the runs, by dotted name.
  """
  objective = objectives.OBJECTIVES[config['objective']]
  effect = _effect_of_field(name)
  if effect is fields_lib.HELD_OUT:
    return True
  if name in objective.ignores:
    return False
  # If the evaluation reads a number of batches, the size of a batch decides how
  # much text that is. With 0 it reads all of the text.
  if name == 'data.batch_size':
    return bool(config['eval.batches'])
  # If there is separate text to evaluate on, nothing is held out of the source.
  has_own_text = (bool(config['data.eval_source'])
                  and 'data.eval_source' not in objective.ignores)
  if name in ('data.source', 'data.holdout_every') and has_own_text:
    return False
  if effect is fields_lib.TRAINING_BATCHES:
    return False
  # Besides fields of batches, an objective may read others, such as the weight
  # of a loss.
  if not name.startswith(spec.FIELDS_OF_BATCHES):
    return name in objective.reads
  return effect is None or effect.kind != SAFE


def _effect_of_field(name: str) -> Effect | None:
  """Returns the declared effect of a change of a field; None where that depends
  on its values, or where this version has no such field."""
  field = fields_lib.find_field(name)
  if field is None or not isinstance(field.rule.resume, Effect):
    return None
  return field.rule.resume


def quantity_of_field(name: str, config: Mapping[str, Any]) -> str:
  """Returns which quantity of a certificate a config field belongs to, such as
  'model' or 'batches'. A certificate lists by quantity what a run was given.

  Args:
    name: the dotted name of the field.
    config: the config, by dotted name.

  Returns:
    A name of QUANTITIES; '' for the seed, and for fields whose change computes
    the same.
  """
  if name == 'seed':
    return ''
  if name == 'data.tokenizer':
    return 'tokenizer'
  if is_of_held_out_text(name, config):
    return 'held_out_text'

  # Fields declare what their change does. One that is safe to change in the
  # middle of a run, such as how often it is saved, changes no result.
  field = fields_lib.find_field(name)
  effect = _effect_of_field(name)
  is_of_model = name.startswith('model.')
  if effect is not None and effect.kind == SAFE:
    return ''
  if field is not None and field.rule.choices == DTYPES:
    return 'precision'
  if effect is AT_START and is_of_model:
    return 'initialisation'
  if effect is AT_START:
    return 'first_weights'

  # All others, by the beginning of their names.
  if name.startswith(spec.FIELDS_OF_BATCHES):
    return 'batches'
  if is_of_model:
    return 'model'
  return 'recipe'


def group_fields_by_quantity(config: Mapping[str, Any]
                             ) -> dict[str, dict[str, Any]]:
  """Returns the fields of a config and their values by the quantity that they
  belong to, for all quantities that have fields."""
  values_by_quantity: dict[str, dict[str, Any]] = {}
  for name, value in config.items():
    quantity = quantity_of_field(name, config)
    if quantity:
      values = values_by_quantity.setdefault(quantity, {})
      values[name] = run_config.lists_to_tuples(value)
  return values_by_quantity


def count_recipes(configs: Mapping[str, Mapping[str, Any]],
                  num_seeds: Mapping[str, int]) -> dict[str, dict[str, int]]:
  """Returns how much each of some variants was tuned: how many recipes (values
  of the optimizer and schedule) were tried for the same model on the same data.

  Args:
    configs: the config of each variant, by dotted name.
    num_seeds: the number of seeds of each variant.

  Returns:
    For each variant, by name: 'recipes tried', and if there are several, 'seeds
    of each', the smallest number of seeds of any of them.
  """
  # Group the variants that are equal in all but their recipe.
  recipes_of_group: dict[str, set[str]] = {}
  group_of_variant: dict[str, str] = {}
  for variant, config in configs.items():
    values = group_fields_by_quantity(config)
    recipe = repr(sorted(values.pop('recipe').items()))
    group = group_of_variant[variant] = repr(sorted(values.items()))
    recipes_of_group.setdefault(group, set()).add(recipe)

  tuning = {}
  for variant, group in group_of_variant.items():
    num_recipes = len(recipes_of_group[group])
    tuning[variant] = {'recipes tried': num_recipes}
    if num_recipes > 1:
      seeds_of_members = [
          num_seeds[member] for member, group_of_member
          in group_of_variant.items() if group_of_member == group]
      tuning[variant]['seeds of each'] = min(seeds_of_members)
  return tuning


# Certificates.


def certify_runs(config: Mapping[str, Any], costs: Mapping[str, Any],
                 folders: Iterable[pathlib.Path], seeds: Iterable[int],
                 tuning: Mapping[str, Any] | None, seconds: Sequence[float]
                 ) -> Certificate:
  """Returns the certificate of the runs of one side of a comparison: what they
  were given, by the names of QUANTITIES, such as tokens, tuning and devices.

  Args:
    config: the config that the runs share, by dotted name.
    costs: the numbers of a cost.Cost, by name. A missing one is not known.
    folders: the folders of the runs, as far as they are there.
    seeds: the seeds of the runs.
    tuning: how much this side was tuned; None: it is not known.
    seconds: the training time of each run; NaN: it is not known.
  """
  # First come the quantities that the config and its costs tell.
  values: dict[str, Any] = group_fields_by_quantity(config)
  for name in _COSTS:
    if costs.get(name) is not None:
      values[name] = costs[name]
  values['flops'] = costs['flops_per_token'] * costs['tokens']
  values['seeds'] = _describe_seeds(seeds)
  if tuning:
    values['tuning'] = tuning
  if seconds and not any(map(math.isnan, seconds)):
    values['seconds'] = sum(seconds) / len(seconds)

  # Then come those in the folders of the runs: code, devices, and hashes of
  # the data.
  codes, devices, hashes = _provenance_of_runs(folders)
  if codes:
    values['code'] = {'code': '; '.join(codes)}
  if devices:
    values['devices'] = {'devices': '; '.join(devices)}
  held_out_sources = config['data.eval_source'] or config['data.source']
  for name, digest in hashes.items():
    quantity = 'batches'
    if name.startswith('tokenizer '):
      quantity = 'tokenizer'
    elif name in held_out_sources:
      quantity = 'held_out_text'
    values.setdefault(quantity, {})[HASH_PREFIX + name] = digest
  return values


def _describe_seeds(seeds: Iterable[int]) -> dict[str, str]:
  """Returns the `seeds` of a certificate."""
  return {'seeds': ', '.join(map(str, sorted(seeds)))}


def _provenance_of_runs(folders: Iterable[pathlib.Path]
                        ) -> tuple[list[str], list[str], dict[str, str]]:
  """Reads from their folders which code and devices trained some runs, and the
  hashes of their data.

  Args:
    folders: the folders of the runs.

  Returns:
    The versions of the code, the kinds of devices, and the hashes by the name
    of the data; each as far as it is known.
  """
  starts: list[dict[str, Any]] = []
  devices: list[str] = []
  hashes: dict[str, str] = {}
  for folder in folders:
    starts_of_run = layout.starts_of_runs([folder])
    starts += starts_of_run
    hashes |= provenance.last_known_data(starts_of_run)
    devices += layout.devices_of_run(folder)
  codes = sorted(provenance.list_codes(starts))
  return codes, sorted(set(devices)), hashes


def certify_folders(config: Mapping[str, Any],
                    runs_by_seed: Mapping[int, curves.Run],
                    folders: Sequence[pathlib.Path],
                    tuning: Mapping[str, Any] | None) -> Certificate:
  """Returns the certificate (the list of what was given) of runs that belong to
  no sweep or study. Their costs are counted here.

  Args:
    config: the config that the runs share, by dotted name.
    runs_by_seed: the runs by seed.
    folders: the folders of the runs, one or more. The first gives the model.
    tuning: how much they were tuned; None: it is not known.
  """
  # A run by itself has no record of its costs, as those of a sweep have. The
  # program that counts them is traced on CPU, so that judging takes no
  # accelerator from runs that train meanwhile.
  cost.keep_off_accelerators()
  costs = _count_costs_of_run(folders[0])
  seconds = [curves.training_seconds(run.rows) for run in runs_by_seed.values()]
  return certify_runs(config=config, costs=costs._asdict(), folders=folders,
                      seeds=runs_by_seed, tuning=tuning, seconds=seconds)


def _count_costs_of_run(folder: pathlib.Path) -> cost.Cost:
  """Counts the parameters, FLOPs and tokens of a run that belongs to no sweep,
  from its folder.

  Some fields of its config were left to be derived, such as the size of the
  vocabulary, which the tokenizer gives. The run recorded their values when it
  began, so neither the tokenizer nor the data is needed here.

  Args:
    folder: the folder of the run, with the config and the derived values that
      training saved there.
  """
  # The config that was saved is locked against new fields, and what was derived
  # may be one.
  saved_config = run_config.load_config(folder)
  complete_config = saved_config.copy_and_resolve_references().unlock()
  complete_config.update_from_flattened_dict(
      run_config.load_derived_fields(folder))
  model = runs.resolve_model_without_tokenizer(complete_config)
  return cost.cost_of_run(complete_config, model)


def certify_sweep(sweep: curves.Sweep, workdir) -> dict[str, Certificate]:
  """Returns the certificate (the list of what was given) of each point of a
  sweep, by name. A point is a variant of the config.

  Args:
    sweep: the sweep.
    workdir: the folder of the sweep.
  """
  # Make the config of each point. Fields that were set to match a cost do not
  # count as a difference.
  configs, num_seeds = {}, {}
  for point in sweep.points:
    changes = {name: value for name, value in point.changes.items()
               if name not in point.matched}
    configs[point.name] = dict(sweep.base_config) | changes
    num_seeds[point.name] = len(point.runs)
  trained_here = [point for point in sweep.points if point.csv_cells is None]
  tuning = count_recipes({point.name: configs[point.name]
                          for point in trained_here}, num_seeds)

  # Certify the points that were trained here, and then those of a CSV, which
  # may refer to the base.
  certificates = {}
  for point in trained_here:
    certificates[point.name] = _certify_point(
        point, workdir, config=configs[point.name], tuning=tuning[point.name])
  for point in sweep.points:
    if point.csv_cells is not None:
      certificates[point.name] = certify_cells(
          point.name, point.csv_cells, base=certificates[sweep.base.name],
          seeds=point.runs)
  return certificates


def _certify_point(point: curves.Point, workdir, config: Mapping[str, Any],
                   tuning: Mapping[str, int]) -> Certificate:
  """Returns the certificate (the list of what was given) of a point of a sweep
  that was trained here.

  Args:
    point: the point, a variant of the config.
    workdir: the folder of the sweep.
    config: the fields of its config, by dotted name.
    tuning: the entry of `count_recipes` for it.
  """
  # The folders of all runs are read, and the seeds and times of those that have
  # ended, by diverging or otherwise.
  folders = []
  ended = []
  seconds = []
  for seed, run in point.runs.items():
    folders.append(layout.run_folder(workdir, point.name, seed))
    if seed in point.final_losses or run.diverged:
      ended.append(seed)
      seconds.append(curves.training_seconds(run.rows))
  costs = {name: getattr(point, name) for name in _COSTS}
  return certify_runs(config=config, costs=costs, folders=folders, seeds=ended,
                      tuning=tuning, seconds=seconds)


def certify_study(frozen: plans.FrozenPlan, outcomes: Sequence[plans.Outcome],
                  tuned: Sequence[Mapping[str, Any]], phases: Sequence[str],
                  sweeps: Sequence[pathlib.Path]
                  ) -> dict[str, dict[str, Certificate]]:
  """Returns the certificates (the lists of what was given) of the base and of
  each variant that some phases of a study compared, at each size.

  Args:
    frozen: the plan of the study.
    outcomes: the outcomes of its runs.
    tuned: how variants were tuned, as rows of plans.Tuned.
    phases: the names of the phases, such as 'confirm'. No two of them train the
      same size.
    sweeps: the folders of the phases, as far as they are there.

  Returns:
    The certificates by the name of the variant and that of the size, as far as
    there are runs; {} where the base has none.
  """
  runs_of_point: dict[tuple[str, str], list[plans.Outcome]] = {}
  for run in outcomes:
    if run.phase in phases and run.workload == plans.TEXT:
      runs_of_point.setdefault((run.variant, run.size), []).append(run)

  plan = frozen.plan
  certificates: dict[str, dict[str, Certificate]] = {}
  for variant in (plan.base, *plan.variants):
    for size in plan.all_sizes:
      runs_of_size = runs_of_point.get((variant, size))
      if runs_of_size:
        at_sizes = certificates.setdefault(variant, {})
        at_sizes[size] = _certify_size(frozen, runs_of_size, tuned=tuned,
                                       sweeps=sweeps)
  if plan.base not in certificates:
    return {}
  return certificates


def _certify_size(frozen: plans.FrozenPlan,
                  runs_of_size: Sequence[plans.Outcome],
                  tuned: Sequence[Mapping[str, Any]],
                  sweeps: Sequence[pathlib.Path]) -> Certificate:
  """Returns the certificate of a variant of a study at one size: what its runs
  were given, such as their config, costs, seeds and code.

  Args:
    frozen: the plan of the study, whose variants and sizes make up points.
    runs_of_size: the outcomes of the runs, at least one. All are of one
      variant, of one size and on text.
    tuned: how variants were tuned, as rows of plans.Tuned.
    sweeps: the folders in which the phase of these runs was trained.
  """
  plan = frozen.plan
  run = runs_of_size[0]
  variant, size = run.variant, run.size
  point = frozen.point(variant, size, plans.TEXT)

  # The config is that of the base with the changes of the variant, by the
  # fields' names. A field that was solved for, to match a cost of the base,
  # keeps the base's value, and so it will count as no difference.
  config = dict(run_config.flatten(frozen.base_config))
  for field, value in point['changes'].items():
    if field not in point['matched']:
      config[field] = value
  # A tuned field, such as the learning rate, has the value that tuning chose
  # for this size. All runs have the same.
  for field in plan.tuning.fields:
    if field in run.changes:
      config[field] = run.changes[field]

  return certify_runs(
      config=config,
      costs=point,
      folders=_folders_of_point(sweeps, variant, size),
      seeds=[run.seed for run in runs_of_size],
      tuning=_tuning_of_point(plan, tuned, variant, size),
      seconds=[run.seconds for run in runs_of_size])


def _folders_of_point(sweeps: Sequence[pathlib.Path], variant: str, size: str
                      ) -> list[pathlib.Path]:
  """Returns the folders of the runs of a variant at one size on text.

  Args:
    sweeps: the folders of a phase of a study.
    variant: the name of the variant.
    size: the name of the size.
  """
  folders = []
  for sweep in sweeps:
    for row in layout.load_sweep_description(sweep)['points']:
      point = (row['variant'], row['size'], row['workload'])
      if point == (variant, size, plans.TEXT):
        folders += [layout.run_folder(sweep, row['name'], seed)
                    for seed in row['seeds']]
  return folders


def _tuning_of_point(plan: plans.Plan, tuned: Sequence[Mapping[str, Any]],
                     variant: str, size: str) -> dict[str, int] | None:
  """Returns how much a variant of a study was tuned on text for its runs at one
  size: the number of values that were tried, and the number of seeds of each.
  None if it was not tuned.

  Args:
    plan: the plan of the study.
    tuned: what tuning found, as rows of plans.Tuned.
    variant: the name of the variant.
    size: the name of the size.
  """
  row = plans.find_tuned_row(plan, tuned, variant=variant, size=size,
                             workload=plans.TEXT)
  if row is None:
    return None
  tried = {repr(trial['changes']) for trial in row['tried']}
  return {'recipes tried': len(tried), 'seeds of each': plan.seeds['tune']}


def certify_cells(name: str, cells: Mapping[str, str], base: Certificate,
                  seeds: Iterable[int]) -> Certificate:
  """Makes the certificate of runs that were trained by other code. A
  certificate lists what runs were given, such as tokens and parameters, so that
  a comparison can say in what two sides differ. Here the list comes from the
  cells of a CSV or a log.

  Args:
    name: the name of the variant or entry, for messages.
    cells: the cells by column. Those of the columns in QUANTITIES are read: a
      cell has a number, words, or SAME, which stands for the value of the base.
      An empty cell says nothing.
    base: the certificate of the base.
    seeds: the seeds of its runs, as far as they are known.

  Returns:
    The certificate: values by the names of QUANTITIES.

  Raises:
    RequestError: if the cell of a number has none.
  """
  certificate: dict[str, Any] = {}
  for column, quantity in QUANTITIES.items():
    # Which seeds there are is told by the runs themselves.
    if column == 'seeds':
      continue
    text = (cells.get(column) or '').strip()
    if not text:
      continue
    is_number = quantity.tolerance is not None
    if text == SAME:
      # A value that the base does not know either stays unknown.
      if column in base:
        certificate[column] = base[column]
    elif is_number:
      certificate[column] = _parse_number(f'{column} of {name}', text)
    else:
      certificate[column] = text
  if seeds:
    certificate['seeds'] = _describe_seeds(seeds)

  # The FLOPs of a run follow from those of a token.
  has_flops = 'flops' in certificate
  knows_factors = {'tokens', 'flops_per_token'} <= certificate.keys()
  if knows_factors and not has_flops:
    certificate['flops'] = (
        certificate['tokens'] * certificate['flops_per_token'])
  return certificate


def _parse_number(subject: str, text: str) -> float:
  """Returns the finite number that a cell of a CSV holds.

  Args:
    subject: the words that the message begins with, such as 'tokens of small'.
    text: the cell.

  Raises:
    RequestError: for a cell that is no number, is infinite or is NaN.
  """
  with contextlib.suppress(ValueError):
    number = float(text)
    if math.isfinite(number):
      return number
  raise RequestError(f'{subject} is {shorten(text)}: write a number, or '
                     f'{SAME!r} for that of the base')


# Comparing.


def compare_certificates(base: Certificate, variant: Certificate,
                         asked: Sequence[str] = ()) -> Differences:
  """Returns in what the two sides of a comparison differ besides what the
  question is about. A certificate lists what a side was given.

  Args:
    base: the certificate of the base.
    variant: the certificate of the variant.
    asked: the fields and quantities that the question is about. With (), it is
      guessed: the fields of the model that differ, or else those that differ,
      if all belong to one quantity. Code and initial weights are never guessed.

  Returns:
    The differences. A cost is named even if it follows from what is asked.
  """
  # The quantities that can be compared. The number of all parameters is left
  # out where the numbers of its parts are known of both.
  known_of_both = base.keys() & variant.keys()
  known_of_one = base.keys() ^ variant.keys()
  quantities = dict(QUANTITIES)
  if known_of_both.issuperset(_PARTS_OF_PARAMS):
    quantities.pop('params')

  # Compare each quantity that both certificates have.
  unlike: dict[str, str] = {}
  for name, quantity in quantities.items():
    if name in known_of_both and name not in asked:
      words = _describe_difference(base=base[name], variant=variant[name],
                                   tolerance=quantity.tolerance, asked=asked)
      if words:
        unlike[name] = words

  # Without a question, guess it, and leave out what it is about.
  if not asked:
    quantity_of_question = _guess_quantity_of_question(unlike, variant)
    if quantity_of_question:
      unlike.pop(quantity_of_question)
      asked = differing_names(base[quantity_of_question],
                              variant[quantity_of_question])
  unknown = tuple(name for name in quantities if name in known_of_one)
  return Differences(tuple(asked), unlike, unknown)


def compare_sizes(base: Mapping[str, Certificate],
                  variant: Mapping[str, Certificate]) -> Differences:
  """Compares a variant of a study with the base at each size of the model, and
  returns all that differs besides what the study asks about.

  Args:
    base: the certificate of the base at each size, by the name of the size.
    variant: that of the variant.

  Returns:
    The differences at any size. Each is described once, with the sizes at which
    it is found; without sizes where it is found at all of several.
  """
  differences_at_size = {}
  for size, certificate in variant.items():
    if size in base:
      differences_at_size[size] = compare_certificates(base[size], certificate)

  named = {}
  for quantity in QUANTITIES:
    description = _describe_over_sizes(quantity, differences_at_size)
    if description:
      named[quantity] = description

  # Sizes often share a name, which is to be listed once. A dict keeps the order
  # in which names were added, which a set does not.
  asked: dict[str, None] = {}
  unknown: dict[str, None] = {}
  for differences in differences_at_size.values():
    asked |= dict.fromkeys(differences.asked)
    unknown |= dict.fromkeys(differences.unknown)
  return Differences(asked=tuple(asked), named=named, unknown=tuple(unknown))


def _describe_over_sizes(quantity: str,
                         differences_at_size: Mapping[str, Differences]) -> str:
  """Describes in words how base and variant differ in one quantity at the sizes
  of a study, such as '512 and not 256 at small; 640 and not 320 at large'.

  Args:
    quantity: a name of QUANTITIES.
    differences_at_size: the differences by the name of the size.

  Returns:
    The description; '' where they differ at no size.
  """
  # A field often differs alike at all sizes, and a cost seldom does.
  sizes_of_description: dict[str, list[str]] = {}
  for size, differences in differences_at_size.items():
    if quantity in differences.named:
      description = differences.named[quantity]
      sizes_of_description.setdefault(description, []).append(size)

  parts = []
  for description, sizes in sizes_of_description.items():
    is_alike_at_all = len(sizes) == len(differences_at_size)
    if is_alike_at_all and len(sizes) > 1:
      parts.append(description)
    else:
      parts.append(f'{description} at {", ".join(sizes)}')
  return '; '.join(parts)


def _guess_quantity_of_question(unlike: Mapping[str, str], variant: Certificate
                                ) -> str:
  """Returns the quantity that a comparison is likely to be about: the model, if
  it differs, or else the only one with fields that differs. It is '' if there
  is none, or if several differ.

  Args:
    unlike: the quantities that differ, with the difference in words.
    variant: the certificate of the variant.
  """
  candidates = [
      name for name in _QUANTITIES_OF_QUESTIONS
      if name in unlike and isinstance(variant[name], Mapping)]
  if 'model' in candidates:
    return 'model'
  if len(candidates) == 1:
    return candidates[0]
  return ''


def _describe_difference(base: Any, variant: Any, tolerance: float | None,
                         asked: Sequence[str]) -> str:
  """Returns the difference of a quantity between base and variant in words, or
  '' if there is none.

  Args:
    base: the value of the base, which is known.
    variant: the value of the variant, which is known.
    tolerance: the share by which two numbers may differ and still count as
      equal; None: the values are no numbers.
    asked: the fields that the question is about, which are left out.
  """
  # A number, a text, or a dict of fields.
  if tolerance is not None:
    if abs(variant - base) <= tolerance * min(abs(base), abs(variant)):
      return ''
    share = ''
    if base:
      share = f', {variant / base - 1:+.1%}'
    return f'{base:.4g} -> {variant:.4g}{share}'
  if variant == base:
    return ''
  if isinstance(variant, str):
    return f'{base} -> {variant}' if isinstance(base, str) else variant
  words = []
  for name in differing_names(base, variant):
    if name not in asked:
      before = shorten(base.get(name, run_config.MISSING_VALUE))
      after = shorten(variant.get(name, run_config.MISSING_VALUE))
      words.append(f'{name} {before} -> {after}')
  return ', '.join(words)


def format_value(value: Value) -> str:
  """Returns a quantity that is no number as a text."""
  if isinstance(value, Mapping):
    return ', '.join(f'{name}: {part}' for name, part in value.items())
  return str(value)


def differing_names(base: Any, variant: Any) -> list[str]:
  """Returns the names of the fields that differ between two dicts; [] if one of
  the values is no dict, because it is not known or told in words.

  Args:
    base: the value of the base.
    variant: the value of the variant.
  """
  if not isinstance(base, Mapping) or not isinstance(variant, Mapping):
    return []
  names = []
  for name in {**base, **variant}:
    is_in_both = name in base and name in variant
    if name.startswith(HASH_PREFIX) and not is_in_both:
      continue
    if not is_in_both or base[name] != variant[name]:
      names.append(name)
  return names


def name_differences(differences_by_variant: Mapping[str, Differences]
                     ) -> list[str]:
  """Returns the sentences that warn beside a verdict that a comparison was not
  fair: what variants were given differently, and what is not known. [] if there
  is nothing to name.

  Args:
    differences_by_variant: for each variant, by name, in what it differs from
      the base.
  """
  # A sentence for each quantity that differs, with all variants concerned.
  sentences = []
  for name, quantity in QUANTITIES.items():
    parts = [f'{variant} ({differences.named[name]})'
             for variant, differences in differences_by_variant.items()
             if name in differences.named]
    if parts:
      sentences.append(f'Beyond the question, not alike in {quantity.title}: '
                       f'{"; ".join(parts)}.')

  # A sentence for all variants of which the same quantities are not known.
  variants_by_unknown: dict[tuple[str, ...], list[str]] = {}
  for variant, differences in differences_by_variant.items():
    if differences.unknown:
      variants_by_unknown.setdefault(differences.unknown, []).append(variant)
  for names, variants in variants_by_unknown.items():
    sentences.append(f'Unknown of {", ".join(variants)} or of the base, and so '
                     f'not compared: {list_with_columns(names)}. Columns of a '
                     'CSV can tell it.')
  return sentences


def list_with_columns(names: Iterable[str]) -> str:
  """Returns the titles of some of QUANTITIES, each with the column of a CSV
  that tells it in brackets where it is called otherwise."""
  titles = []
  for name in names:
    title = QUANTITIES[name].title
    titles.append(title if title == name else f'{title} ({name})')
  return ', '.join(titles)
