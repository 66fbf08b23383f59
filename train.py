r"""Trains the model that a config file describes, or resumes the run.

  python train.py --config configs/gpt.py --workdir runs/tiny
  python train.py --config configs/gpt.py:gpt2 --workdir runs/a \
      --config.optim.lr=3e-4 --config.data.source=text:my/*.txt

After Ctrl-C, SIGTERM, SIGQUIT or the end of its terminal the program finishes
the step, saves, and ends with exit code 0, or with the one that
--stopped_exit_code sets; so it does where nobody reads what it prints any more,
as after `| head`. Before the step is compiled a signal ends it at once, as it
ends any program; a second signal ends it at once with 128 + its number. Exit
code 2 means a wrong request, or a loss that is not finite, because the same
command would end in the same way; exit code 1 means a failure.
"""

import json
import signal

from common.errors import RequestError, STOPPED  # first, for its sentence

from absl import flags

from training import cli

cli.define_config()
cli.define_workdir()
flags.DEFINE_bool('print_config', False, 'Print the config as JSON, with '
                  'derived fields filled in, and end; needs no --workdir.')
flags.DEFINE_bool('dry_run', False, 'Time a few steps, print the hours and the '
                  'memory that the run takes, and end; writes nothing.')
flags.DEFINE_bool('milestones', False, 'Print no more than that the run began, '
                  'the time that is left when a tenth is done, and how it '
                  'ended.')
flags.DEFINE_bool('allow_config_change', False,
                  'Resume the run although its config differs from this one.')
flags.DEFINE_string('profile_steps', '',
                    'Trace steps START:STOP, as 10:13 for 10, 11 and 12, into '
                    'WORKDIR/profile.')
flags.DEFINE_string('coordinator', '', 'In a run of several processes, the '
                    'host:port of process 0.')
flags.DEFINE_integer('num_processes', 0, 'How many processes the run has on '
                     'all hosts.', lower_bound=0, upper_bound=2**16)
flags.DEFINE_integer('process_id', -1, 'Which of these processes this one is, '
                     'from 0.', lower_bound=-1, upper_bound=2**16)
flags.DEFINE_bool('cluster', False, 'Take --coordinator, --num_processes and '
                  '--process_id from the cluster (SLURM, TPU, GKE).')
flags.DEFINE_integer('stopped_exit_code', 0, 'The exit code after a signal '
                     'that came before the last step: it tells a launcher '
                     'that there is more to do.',
                     lower_bound=0, upper_bound=255)


def main():
  cli.parse(__doc__)
  # Imported late: `--help` and a wrong flag answer at once.
  from training import progress
  with progress.print_milestones_only(flags.FLAGS.milestones):
    return train(flags.FLAGS)


def train(args: flags.FlagValues) -> int:
  """Trains or resumes the run that the flags ask for, or does what else they
  ask for; returns the exit code."""
  if args.config is None or not (args.workdir or args.print_config):
    raise RequestError('pass both --config FILE.py:SIZE and --workdir DIR')

  from training import begin, loop, preflight, progress, writer
  from training.distributed import cpu, devices, processes
  from training.objectives import pipeline
  from training.workdir import checkpoints, run_config, storage
  config = args.config
  if args.print_config:
    tree = preflight.config_to_print(config, cli.overridden_fields())
    progress.print_result(json.dumps(tree, indent=2))
    return 0
  workdir = storage.checked_path(args.workdir)

  # 1. The request: everything wrong in it is said before any device work.
  join_arguments = processes.arguments_to_join(
      args.coordinator, num_processes=args.num_processes,
      process_id=args.process_id, cluster=args.cluster)
  progress.parse_profiled_steps(args.profile_steps, config.train.steps)
  request = begin.check_request(config, workdir=workdir,
                                by_hand=cli.overridden_fields(),
                                allow_config_change=args.allow_config_change)
  for line in request.describe_changes():
    print(line)
  config, tokenizer = request.config, request.tokenizer

  # 2. The devices and their mesh.
  processes.join_processes(join_arguments)
  cpu.configure_cpu()
  processes.meet_and_print_processes()
  run = begin.build_on_devices(request)

  # 3. The data.
  slice_index, num_slices = devices.batch_slice_of_process(
      run.batch_sharding, config.data.batch_size)
  train_data = pipeline.make_training_loader(config, tokenizer=tokenizer,
                                             process_index=slice_index,
                                             process_count=num_slices)
  eval_data = pipeline.make_evaluation_loaders(config, tokenizer=tokenizer,
                                               process_index=slice_index,
                                               process_count=num_slices)
  hash_of_source = pipeline.digest_contents(config, tokenizer)
  for line in begin.check_data(request, hash_of_source):
    print(line)

  if args.dry_run:
    lines = loop.rehearse_run(run, train_data, eval_data)
    if devices.is_primary_process():
      progress.print_result('\n'.join(lines))
    return 0

  # 4. The state: restored from the newest good checkpoint, or new.
  is_primary = devices.is_primary_process()
  with storage.lock_workdir(workdir, is_primary), checkpoints.Checkpoints(
      workdir, **config.checkpoint, agree_every=config.log.every_steps
  ) as saved:
    start = begin.find_starting_point(request, run, saved)
    if start.code == writer.DIVERGED:
      raise RequestError(f'{workdir}: {start.sentence}')
    if start.sentence or start.step == config.train.steps:
      if is_primary:
        progress.print_result(_describe_complete_run(request, start))
      return 0
    state = start.state
    if state is None:
      state = begin.create_first_state(run)

    # 5. The loop. The config is recorded only of a run that is trained.
    run_config.save_config(
        workdir, config=request.given_config, derived=request.derived,
        data=hash_of_source, model=run.model)
    code = loop.train_run(
        run, state=state, start=start.step, train_data=train_data,
        eval_data=eval_data, saved=saved, workdir=workdir,
        profile_steps=args.profile_steps)
  if code == STOPPED:
    return args.stopped_exit_code
  return code


def _describe_complete_run(request, start) -> str:
  """Returns the sentences which tell the user that a run has nothing left to
  do, and how to evaluate or continue it.

  Args:
    request: the checked request for the run (begin.RunRequest).
    start: the step at which the run has ended, and the reason if evaluations
      that no longer improved ended it early (begin.StartingPoint).
  """
  workdir = request.workdir
  last_step = request.config.train.steps
  reason = f'{start.step} steps of {last_step}'
  field = 'train.steps'
  if start.sentence:
    reason = start.sentence
    field = 'eval.patience'
  unchanged = ''
  if request.changes:
    unchanged = 'Its config is left as it was. '
  return (f'{workdir} is complete: {reason}. {unchanged}'
          f'To look at it: python eval.py --workdir {workdir}. To go on: '
          f'a larger --config.{field} with --allow_config_change. To start '
          'anew: another --workdir.')


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: in a compiler, too
  cli.run(main)
