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

from absl import flags

from common.errors import RequestError, require
from training import cli

cli.define_config()
cli.define_workdir()
flags.DEFINE_bool('print_config', False, 'Print the config as JSON, with '
                  'derived fields filled in, and end; needs no --workdir.')
flags.DEFINE_bool('dry_run', False, 'Time a few steps, print the hours and the '
                  'memory that the run takes, and end; writes nothing.')
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
  args = flags.FLAGS
  if args.config is None or not (args.workdir or args.print_config):
    raise RequestError('pass both --config FILE.py:SIZE and --workdir DIR')

  # Imported late: `--help` and a wrong flag answer at once.
  from training import loop, objectives, parameters, preflight, progress, runs
  from training.data import tokenizers
  from training.objectives import pipeline
  from training.distributed import cpu, devices, processes
  from training.workdir import checkpoints, provenance, run_config, storage
  config = args.config
  if args.print_config:
    print(json.dumps(preflight.printable(config, cli.overrides()), indent=2))
    return 0
  workdir = storage.path(args.workdir)

  # 1. The config: everything wrong in it is said before any device work.
  preflight.try_workdir(workdir)
  preflight.check_config(config, cli.overrides())
  several = processes.how_to_join(args.coordinator, args.num_processes,
                                  args.process_id, args.cluster)
  progress.profiled_steps(args.profile_steps, config.train.steps)
  pipeline.check_sources(config)
  parameters.check_source(config.init_from)
  config = objectives.with_labels(config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  parameters.check_tokenizer(config, tokenizer)
  model, derived = runs.resolve(config, tokenizer)
  changes = run_config.changes(workdir, config, derived)
  run_config.refuse(changes, args.allow_config_change)
  if changes:
    print(run_config.table(changes))
  for line in provenance.changes(run_config.starts(workdir)):
    print(line)

  # 2. The devices and their mesh.
  processes.initialize(several)
  cpu.prepare()
  processes.meet()
  run = runs.build(config, model)
  devices.check_memory(run.abstract, run.mesh)

  # 3. The data.
  index, count = devices.batch_shard(run.place, config.data.batch_size)
  train_data = pipeline.training_loader(config, tokenizer, index, count)
  eval_data = pipeline.held_out(config, tokenizer, index, count)
  contents = pipeline.contents(config, tokenizer)
  for line in provenance.check_data(run_config.starts(workdir), contents,
                                    args.allow_config_change):
    print(line)

  if args.dry_run:
    lines = loop.rehearse(run, train_data, eval_data)
    if devices.primary():
      print(*lines, sep='\n')
    return 0

  # 4. The state: restored from the newest good checkpoint, or new.
  with storage.locked(workdir, devices.primary()), checkpoints.Checkpoints(
      workdir, **config.checkpoint, agree_every=config.log.every_steps
  ) as saved:
    try:
      state, start = parameters.restore_or_create(run, saved)
    except checkpoints.Mismatch as error:  # which lists the shapes
      raise RequestError(run_config.way_on(changes) or str(error)) from error
    ended = loop.ended_badly(state, config)
    require(changes or not ended, f'{workdir}: {ended}')
    require(start <= config.train.steps, f'train.steps is '
            f'{config.train.steps}, and the run in {workdir} has trained '
            f'{start} steps: ask for more, or take another --workdir')
    early = loop.ended_early(config, saved.best, start)
    if early or start >= config.train.steps:
      if devices.primary():
        done = early or f'{start} steps of {config.train.steps}'
        print(f'{workdir} is complete: {done}. '
              + 'Its config is left as it was. ' * bool(changes) +
              f'To look at it: python eval.py --workdir {workdir}. To go on: '
              f'a larger --config.{"eval.patience" if early else "train.steps"}'
              ' with --allow_config_change. To start anew: another --workdir.')
      return 0

    # 5. The loop. The record is of what is trained.
    run_config.save(workdir, args.config, derived, contents, run.model)
    code = loop.train(run, state, start, train_data, eval_data, saved, workdir,
                      args.profile_steps)
  return args.stopped_exit_code if code == loop.STOPPED else code


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: in a compiler, too
  cli.run(main)
