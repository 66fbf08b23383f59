"""Layers that are run several times: what each pass over them reads.

With model.loop, the layers between the prefix and the suffix are run
loops.passes times with the same weights (recurrent depth: Dehghani et al. 2019,
arXiv 1807.03819). Below, e is what the prefix returns, and s_t what pass t
returns; the suffix reads the last one. An entry of LOOPS says what pass t
reads.

With loops.boundary 'norm', s_(t-1) goes through the stack's final norm before a
pass reads it (Ouro: Zhu et al. 2025, arXiv 2510.25741). With
loops.gradient_passes k, neither the passes before the last k nor what they read
have a gradient (Huginn, section 3.3).

One plain pass, or one of add or gate, is the stack without a loop. Each pass
has keys, values and states of its own: a cache has loops.passes times the rows
of the stack, those of a pass side by side.
"""

from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts.blocks import pin_residual
from architectures.parts.config import ModelConfig
from architectures.parts.loops import LoopsConfig
from architectures.parts.streams import LayerInput


LOW_NORM = 'low_norm'  # the name of the norm of the lower of two stacks


class Plain:
  """Pass t reads s_(t-1), with s_0 = e (ALBERT, Ouro).

  It is the base of the other forms too, which override `input_of_pass`.

  Attributes:
    fields: the fields of config.model that this form reads and others may not.
    settings: the group of fields that all forms read.
  """
  fields: tuple[str, ...] = ()
  settings: type = LoopsConfig

  def input_of_pass(self, module: nn.Module, state: LayerInput,
                    inputs: LayerInput, n: int | jax.Array) -> LayerInput:
    """Makes the input of pass n in a model that runs its layers several times.
    Here, it is the result of the pass before. Subclasses mix the input of the
    first pass into it.

    Args:
      module: the module in which a subclass may declare parameters.
      state: the result of the pass before, [batch, length, d_model], or
        Streams; for the first pass, its input.
      inputs: the input of the first pass, of the same shape.
      n: the number of the pass, from 0 on: an int, or a traced scalar.

    Returns:
      The input of pass n, of the same shape.
    """
    del module, inputs, n
    return state


class Add(Plain):
  """Pass t reads s_(t-1) + e, with s_0 = 0 (Yang et al. 2024, arXiv
  2311.12424)."""

  def input_of_pass(self, module: nn.Module, state: LayerInput,
                    inputs: LayerInput, n: int | jax.Array) -> LayerInput:
    """Returns s_(t-1) + e for pass n = t - 1; e for the first one. `state` is
    s_(t-1), and `inputs` is e."""
    is_first_pass = n == 0
    return pin_residual(
        jnp.where(is_first_pass, inputs, state + inputs))


class Concat(Plain):
  """Pass t reads [s_(t-1); e] W, with s_0 = 0 (Huginn: Geiping et al. 2025,
  arXiv 2502.05171, section 3.2). Huginn draws s_0; here it is 0, so that a
  model is a function of its tokens."""

  def input_of_pass(self, module: nn.Module, state: LayerInput,
                    inputs: LayerInput, n: int | jax.Array) -> LayerInput:
    """Returns [s_(t-1); e] W for pass n = t - 1, with 0 in the place of s_0.
    `state` is s_(t-1), and `inputs` is e; W is declared in `module`."""
    is_first_pass = n == 0
    state = jnp.where(is_first_pass, 0, state)
    joined_BLD = project_concatenation(module, 'join', first_BLD=state,
                                       second_BLD=inputs)
    return pin_residual(joined_BLD)


class Gate(Plain):
  """Pass 1 reads e, and pass t after it

    (1 - f) * e + g * s_(t-1),   f = tanh(r W_f),   g = tanh(r W_g)
    r = [rms(e); rms(s_(t-1))] W_r

  the message gate of Inkling 2 (transformers: inkling2_loop), of rank
  loops.gate_rank. Inkling has one for each query, key, value and network of
  each layer, and attends to the blocks of the pass before; here one gate reads
  the end of that pass.
  """
  fields = ('loops.gate_rank', 'norm_eps')

  def input_of_pass(self, module: nn.Module, state: LayerInput,
                    inputs: LayerInput, n: int | jax.Array) -> LayerInput:
    """Returns the mixture of s_(t-1) and e through gates for pass n = t - 1; e
    for the first one. `state` is s_(t-1), and `inputs` is e; the gates declare
    their parameters in `module`."""
    is_first_pass = n == 0
    gated_BLD = self._mix_through_gates(module, state, inputs)
    return pin_residual(jnp.where(is_first_pass, inputs, gated_BLD))

  def _mix_through_gates(self, module: nn.Module, state_BLD: jax.Array,
                         inputs_BLD: jax.Array) -> jax.Array:
    """Mixes the input e of the first pass and the result s of the pass before
    by gates, in a model that runs its layers several times:

      (1 - f) * e + g * s,   f = tanh(r W_f),   g = tanh(r W_g)
      r = [rms(e); rms(s)] W_r

    The suffixes name axes: B batch, L length, D d_model, U = 2 D, R features
    of r.

    Args:
      module: the module that declares W_r, W_f and W_g.
      state_BLD: s.
      inputs_BLD: e.

    Returns:
      The mixture, [B, L, D], in the dtype of e.
    """
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    D, R = config.d_model, config.part(LoopsConfig).gate_rank
    # Make r of e and s, joined after their norms. The norms have no scale of
    # their own, since W_r can hold it.
    both_BLU = jnp.concatenate([
        layers.rmsnorm(inputs_BLD, None, config.norm_eps),
        layers.rmsnorm(state_BLD, None, config.norm_eps)], -1)
    down_UR = layers.weight(module, 'down', shape=(2 * D, R),
                            axes=('mlp', None))
    rank_BLR = layers.einsum('BLU,UR->BLR', both_BLU, down_UR,
                             dtype=config.compute_dtype)

    # The gates and the sum, in float32.
    forget_BLD = _gate_of_rank(module, 'forget', rank_BLR)
    message_BLD = _gate_of_rank(module, 'message', rank_BLR)
    gated_BLD = (1 - forget_BLD) * inputs_BLD + message_BLD * state_BLD
    return gated_BLD.astype(inputs_BLD.dtype)


def _gate_of_rank(module: nn.Module, name: str, rank_BLR: jax.Array
                  ) -> jax.Array:
  """Returns a gate for each feature of each token, tanh(r W), in float32.

  The suffixes name axes: B batch, L length, D d_model, R features of r.

  Args:
    module: the module that declares W.
    name: the name of W, which is [R, D].
    rank_BLR: r.

  Returns:
    The gates, [B, L, D], from -1 to 1.
  """
  config: ModelConfig = module.config  # type: ignore[attr-defined]
  w_RD = layers.weight(module, name, shape=(rank_BLR.shape[-1], config.d_model),
                       axes=(None, 'embed'))
  logits_BLD = layers.einsum('BLR,RD->BLD', rank_BLR, w_RD,
                             dtype=config.compute_dtype, out_dtype=jnp.float32)
  return jnp.tanh(logits_BLD)


class Turns(Plain):
  """Two stacks that take turns (HRM: Wang et al. 2025, arXiv 2506.21734; as in
  transformers' hrm_text). Of the layers that loop, the lower half is one stack
  and the upper half the other, with states z_L = 0 and z_H = e at first. Each
  of loops.passes passes is

    z_L = lower(z_L + z_H)      loops.low_cycles times
    z_H = upper(z_H + z_L)

  With loops.boundary 'norm' each stack ends in a norm: the final norm is the
  upper one's. With loops.gradient_passes k, a pass has the gradient of its last
  run of the lower stack alone, and the last pass that of its last k. Each run
  of a stack has keys and values of its own.
  """
  fields = ('loops.low_cycles',)

  def input_of_pass(self, module: nn.Module, state: LayerInput,
                    inputs: LayerInput, n: int | jax.Array) -> LayerInput:
    """Returns the input of a stack, z_L + z_H, and declares the norm with which
    the lower stack ends.

    Args:
      module: the module in which the norm of z_L is declared.
      state: z_L.
      inputs: z_H.
      n: the number of runs of both stacks before this one.
    """
    del n
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    # The norm is applied elsewhere (`normalise_between_passes`), by its
    # parameters. To call it once here declares these.
    if module.is_initializing() and config.part(LoopsConfig).boundary == 'norm':
      layers.norm(config, LOW_NORM)(inputs)
    return pin_residual(state + inputs)


LOOPS: dict[str, Optional[Plain]] = {
    'none': None,
    'plain': Plain(),
    'add': Add(),
    'concat': Concat(),
    'gate': Gate(),
    'turns': Turns(),
}


def project_concatenation(module: nn.Module, name: str, first_BLD: jax.Array,
                          second_BLD: jax.Array) -> jax.Array:
  """Joins two vectors of each token and projects them to the width of one:
  [first; second] W.

  The suffixes name axes: B batch, L length, D d_model, U = 2 D.

  Args:
    module: the module that declares W.
    name: the name of W, which is [U, D].
    first_BLD: the first vectors.
    second_BLD: the second vectors.

  Returns:
    The product, [B, L, D].
  """
  config: ModelConfig = module.config  # type: ignore[attr-defined]
  # The names of W's axes, by which it is divided over the devices.
  axes = ('mlp', 'embed')
  w_UD = layers.weight(module, name, shape=(2 * config.d_model, config.d_model),
                       axes=axes)
  both_BLU = jnp.concatenate([first_BLD, second_BLD], -1)
  return layers.einsum('BLU,UD->BLD', both_BLU, w_UD,
                       dtype=config.compute_dtype, axes=axes, keep=False)


class Enter(nn.Module):
  """The module that holds the parameters with which the input of a pass is
  made: see Plain.input_of_pass."""
  config: ModelConfig

  @nn.compact
  def __call__(self, state: LayerInput, inputs: LayerInput,
               n: int | jax.Array) -> LayerInput:
    loop = LOOPS[self.config.loop]
    assert loop is not None
    return loop.input_of_pass(self, state, inputs, n)


def input_of_pass(config: ModelConfig, params: Any, state: LayerInput,
                  inputs: LayerInput, n: int | jax.Array) -> LayerInput:
  """Makes the input of pass n in a model that runs its layers several times
  with the same weights. It is a mixture of the result of the pass before and
  the input of the first pass.

  The modules are applied with given parameters and do not declare any, so that
  this can run inside a scan over the passes.

  Args:
    config: the model.
    params: the parameters of the stack of layers, of which 'final_norm' and
      'loop' are read.
    state: the result of the pass before, [batch, length, d_model], or Streams;
      for the first pass, its input.
    inputs: the input of the first pass, of the same shape.
    n: the number of the pass, from 0 on: an int, or a traced scalar.

  Returns:
    The input, of the same shape.
  """
  # Between two passes, the state may go through the final norm.
  has_norm = config.part(LoopsConfig).boundary == 'norm'
  if has_norm and config.loop != 'turns':
    is_first_pass = n == 0
    normed_state = normalise_between_passes(config, params, state)
    state = jnp.where(is_first_pass, state, normed_state)
  module = Enter(config, parent=None)
  return module.apply({'params': params.get('loop', {})}, state, inputs, n)


def normalise_between_passes(config: ModelConfig, params: Any,
                             state: LayerInput, is_low: bool = False
                             ) -> LayerInput:
  """Returns the result of a pass after the stack's final norm, with
  loops.boundary 'norm', or as it is.

  Args:
    config: the model.
    params: the parameters of the stack, of which that of the norm is read.
    state: the result of a pass, [batch, length, d_model], or Streams.
    is_low: whether it is the result of the lower of two stacks, which has a
      norm of its own.
  """
  if config.part(LoopsConfig).boundary != 'norm':
    return state
  params_of_norm = params.get('final_norm', {})
  if is_low:
    params_of_norm = params.get('loop', {}).get(LOW_NORM, {})
  norm = layers.NORMS[config.norm](config, parent=None)
  return norm.apply({'params': params_of_norm}, state)


class Turn(NamedTuple):
  """One run of one of two stacks that take turns.

  Attributes:
    is_high: whether it is a run of the upper stack.
    has_gradient: whether there is a gradient of it.
  """
  is_high: bool
  has_gradient: bool


def list_turns(loops: LoopsConfig) -> list[Turn]:
  """Returns the runs of two stacks that take turns (see `Turns`), in order.

  In each of loops.passes passes, the lower stack runs loops.low_cycles times,
  and then the upper one once. The upper stack always has a gradient. In a pass,
  the first runs of the lower stack may have none, so that the backward pass
  needs nothing of them: see `_lower_runs_with_gradient`.

  Args:
    loops: the settings of the layers that loop.
  """
  turns = []
  for n in range(loops.passes):
    is_last_pass = n == loops.passes - 1
    num_with_gradient = _lower_runs_with_gradient(loops, is_last_pass)
    first_with_gradient = loops.low_cycles - num_with_gradient
    for i in range(loops.low_cycles):
      turns.append(Turn(is_high=False, has_gradient=i >= first_with_gradient))
    turns.append(Turn(is_high=True, has_gradient=True))
  return turns


def _lower_runs_with_gradient(loops: LoopsConfig, is_last_pass: bool) -> int:
  """Returns how many of the lower stack's runs in one pass have a gradient. It
  is the last ones that do.

  With loops.gradient_passes 0 all have one. With k, the last k runs of the last
  pass do, and in each other pass the last run alone (HRM).

  Args:
    loops: the settings of the layers that loop.
    is_last_pass: whether it is the last of the passes.
  """
  if not loops.gradient_passes:
    return loops.low_cycles
  if is_last_pass:
    return loops.gradient_passes
  return 1


class ExitGate(nn.Module):
  """The gate by which a token leaves after a pass (Ouro: Zhu et al. 2025, arXiv
  2510.25741, section 3)."""
  config: ModelConfig

  @nn.compact
  def __call__(self, states_TBLD: jax.Array) -> jax.Array:
    """Returns the logarithms of the probabilities p_t with which a token leaves
    after pass t of T, [T, B, L] in float32:

      p_t = g_t (1 - g_1) ... (1 - g_(t-1)),   g_t = sigmoid(w s_t + b)

    but that the last pass has all that is left, so that they sum to 1.

    The suffixes name axes: T passes, B batch, L length, D d_model.

    Args:
      states_TBLD: s_t, the result of each pass after the final norm.
    """
    # The logits z_t = w s_t + b of leaving, in float32. In muP w s_t is divided
    # by how many times as wide as its base the model is; elsewhere that is 1.
    D = states_TBLD.shape[-1]
    w_D1 = layers.weight(self, 'gate', shape=(D, 1), axes=('embed', None),
                         output=True)
    b_1 = layers.bias(self, 'gate_bias', shape=(1,), axes=(None,), output=True)
    z_TBL1 = layers.einsum('TBLD,DU->TBLU', states_TBLD, w_D1,
                           dtype=states_TBLD.dtype, out_dtype=jnp.float32)
    z_TBL = (z_TBL1 / self.config.widening)[..., 0] + b_1[0]

    # A token reaches pass t if it has stayed in all passes before, each with
    # probability 1 - g = sigmoid(-z). It reaches the first pass for certain.
    # The products are sums of logarithms, which do not underflow.
    log_stays_TBL = jnp.cumsum(jax.nn.log_sigmoid(-z_TBL[:-1]), axis=0)
    log_reaches_TBL = jnp.concatenate(
        [jnp.zeros_like(z_TBL[:1]), log_stays_TBL])
    # There it leaves with probability g_t, and after the last pass for certain.
    log_leaves_TBL = jax.nn.log_sigmoid(z_TBL).at[-1].set(0)
    return log_reaches_TBL + log_leaves_TBL


def take_exits(config: ModelConfig, states_TBLD: jax.Array, log_p_TBL: jax.Array
               ) -> jax.Array:
  """Chooses for each token the pass after which it leaves: the first one by
  which it has left with probability loops.exit_threshold, or the last.

    pass = min {t: p_1 + ... + p_t >= exit_threshold}

  The suffixes name axes: T passes, B batch, L length, D d_model.

  Args:
    config: the model.
    states_TBLD: the result of each of T passes.
    log_p_TBL: log p_t, the logarithms of the probabilities of leaving after
      each.

  Returns:
    The result of each token's pass, [B, L, D].
  """
  # A threshold of 1 means the last pass. The sum of the probabilities may be a
  # little less or more than 1 by rounding, so it is not asked for.
  threshold = config.part(LoopsConfig).exit_threshold
  if threshold == 1:
    return states_TBLD[-1]
  has_left_TBL = jnp.cumsum(jnp.exp(log_p_TBL), axis=0) >= threshold
  # argmax finds the first pass that is True. The last one is made to be.
  pass_BL = jnp.argmax(has_left_TBL.at[-1].set(True), axis=0)
  pass_1BL1 = pass_BL[None, ..., None]
  return jnp.take_along_axis(states_TBLD, pass_1BL1, axis=0)[0]
