"""How a run ends before its last step, or badly: exit codes and sentences."""

import ml_collections

from training.step import TrainState

STOPPED = 75  # how a run ends after a signal, before its last step
# And after too many bad steps: as for a wrong request, since the same command
# would end in the same way, and no launcher is to start it again.
DIVERGED = 2
EARLY = -1  # and after eval.patience evaluations: it is done, exit code 0
BAD = ('the loss or a gradient was not finite, or there was nothing to '
       'predict')


def saved_as(n: int, newest: int | None) -> str:
  """Says what a run that was stopped after step `n` goes on from."""
  if newest == n:
    return 'saved: the same command goes on from it.'
  return ('not saved: the same command goes on from '
          + ('the beginning.' if newest is None else f'step {newest}.'))


def ended_badly(state: TrainState,
                config: ml_collections.ConfigDict) -> str:
  """Returns why a run is not gone on with from `state` unless its config is
  another: it ended there after too many bad steps. '': it did not."""
  bad, step = int(state.bad_in_row), int(state.step)
  if bad < config.train.max_bad_steps:
    return ''
  return (f'the run in this workdir ended at step {step}: {BAD}, in {bad} '
          'steps in a row (train.max_bad_steps), and the same config would end '
          'in the same way. Change what made it so, such as a smaller '
          'optim.lr, with --allow_config_change; raise train.max_bad_steps to '
          'go on '
          'unchanged; or move the latest folders out of checkpoints to go on '
          'from an earlier step.')


def diverged(n: int, bad: int, newest: int | None) -> str:
  """Why a run ends after step `n`, the last `bad` of them not finite; `newest`
  is the checkpoint that it has."""
  what = (f'{BAD}, in {bad} steps in a row (train.max_bad_steps); no update '
          'was made in them' if bad else
          f'the parameters are not finite after the last step, {n}')
  if newest == n:
    kept = (f'The parameters before them are saved as step {n}, beside the '
            'last good checkpoints')
  else:
    kept = ('Parameters that are not finite are not saved: '
            + ('there is no checkpoint' if newest is None else
               f'the newest checkpoint is of step {newest}'))
  return (f'{what}. {kept}. Try a smaller optim.lr, a longer '
          'optim.warmup_steps, optim.clip_norm=1, or model.dtype=float32, with '
          '--allow_config_change.')
