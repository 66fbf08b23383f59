"""HRM-Text: two stacks of layers that take turns, a low-level and a high-level
one (Wang et al. 2025, arXiv 2506.21734, "Hierarchical Reasoning Model"; as
transformers' hrm_text, Sapient 2026).

  z_H = s E[tokens],   z_L = 0,   s = embed_scale
  z_L = RMSNorm(lower(z_L + z_H))         loops.low_cycles times, then
  z_H = RMSNorm(upper(z_H + z_L))         and all of it loops.passes times
  a   = x + W_o (sigmoid(W_g n) * Attention(n)),      n = RMSNorm(x)
  x'  = a + W_down (silu(W_gate m) * W_up m),         m = RMSNorm(a)
  logits = z_H W                          a matrix of its own; no bias anywhere

No norm has a scale. The first half of num_layers is the lower stack. In each
pass only the last run of the lower stack has a gradient, in the last pass the
last two. Published models are prefix LMs: objective=prefix.
"""

import numpy as np

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.loops import LoopsConfig
from architectures.parts.skeletons import Decoder
from common.errors import RequestError, require


class HRMText(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      norm='rmsnorm_plain', attention_gate='elementwise', embed_scale=50.0,
      loop='turns', loops=dict(passes=2, low_cycles=3, gradient_passes=2,
                               boundary='norm'))


def _read_gradient_passes(cycles: list[int], passes: int, low_cycles: int
                          ) -> int:
  """Translates L_bp_cycles of a config.json to our loops.gradient_passes.

  Each pass runs the lower stack of layers `low_cycles` times, and of these runs
  only the last few have a gradient. Both fields say how many:

    L_bp_cycles is a list with this number for each of the last passes. In a
      pass before these it is 1.
    loops.gradient_passes is this number in the last pass alone. In every other
      pass it is 1. The value 0 says that all runs of all passes have a
      gradient.

  Args:
    cycles: L_bp_cycles, which has one number or more.
    passes: the number of passes.
    low_cycles: how many times the lower stack runs in each pass.

  Returns:
    loops.gradient_passes.

  Raises:
    RequestError: for a list that our single number cannot say.
  """
  # The number of runs with a gradient in each pass, in order. It cannot be more
  # than there are runs.
  num_missing = passes - len(cycles)
  numbers = [1] * num_missing + list(cycles)
  numbers = [min(number, low_cycles) for number in numbers[:passes]]

  # All runs have a gradient.
  if numbers == [low_cycles] * passes:
    return 0

  # One run has a gradient in each pass before the last.
  *earlier, last = numbers
  if earlier != [1] * (passes - 1) or last < 1:
    raise RequestError(
        f'L_bp_cycles is {cycles}, with {passes} H_cycles: only the last pass '
        'may have a gradient of more than one run of the lower stack')
  return last


def _read_loops(reader: hf.Reader, fields: dict) -> dict:
  """Returns the group `loops` of config.model: how the two stacks of layers
  take turns, and which of their runs have a gradient.

  Args:
    reader: the fields of the config.json.
    fields: the fields of config.model that have been looked up, by dotted name.

  Raises:
    RequestError: for an L_bp_cycles that is no list of numbers, or that our
      field cannot say.
  """
  cycles = [2]  # the default of transformers: two runs in the last pass
  if reader.has('L_bp_cycles'):
    cycles = reader.read_list('L_bp_cycles')
    require(cycles, 'config.json has an L_bp_cycles that is no list, or an '
            'empty one: it must have a number for the last pass or more')
  passes = fields['loops.passes']
  low_cycles = fields['loops.low_cycles']
  gradient_passes = _read_gradient_passes(
      cycles, passes=passes, low_cycles=low_cycles)
  return dict(passes=passes, low_cycles=low_cycles,
              gradient_passes=gradient_passes, boundary='norm')


def _read_layers_of_stack(reader: hf.Reader, num_runs: int) -> int:
  """Returns the number of layers that each of the two stacks has.

  num_hidden_layers is this number. A file that transformers has written has it
  as num_layers_per_stack, and num_hidden_layers is then multiplied by the
  number of runs of a stack.

  Args:
    reader: the fields of the config.json.
    num_runs: how many times a stack runs, of both stacks and all passes.

  Raises:
    RequestError: for two numbers of which neither holds.
  """
  num_layers = reader('num_hidden_layers', 16)
  layers_of_stack = reader('num_layers_per_stack', num_layers)
  is_of_all_runs = num_layers == layers_of_stack * num_runs
  require(is_of_all_runs or num_layers == layers_of_stack,
          f'num_hidden_layers is {num_layers}, and num_layers_per_stack '
          f'{layers_of_stack} in {num_runs} runs: they contradict each other')
  return layers_of_stack


class HF(llama.Family):
  model_type = 'hrm_text'
  architecture = 'HrmTextForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
      *hf.prefix_rows(
          'decoder/layers', 'model.{h}_module.layers.{n}',
          ('attention/output_gate|query|key|value', 'DHK',
           'attn.gqkv_proj.weight', '4HK D'),
          ('attention/out', 'HKD', 'attn.o_proj.weight', 'D HK'),
          ('ffn/gate|up', 'DF', 'mlp.gate_up_proj.weight', '2F D'),
          ('ffn/down', 'FD', 'mlp.down_proj.weight', 'D F')))
  layer_prefix = 'model.{h}_module.layers.{n}'
  fields = hf.fields_with_defaults(
      hidden_size=1536, num_attention_heads=12, intermediate_size=4096,
      vocab_size=151808, max_position_embeddings=2048, rms_norm_eps=1e-6,
      head_dim=128, tie_word_embeddings=False) | {
          'loops.passes': ('H_cycles', 2),
          'loops.low_cycles': ('L_cycles', 3), 'ffn': hf.GATED_FFN_FIELD}
  only = dict(attention_bias=False, mlp_bias=False)
  fields_without_effect = ('prefix_lm',)  # the objective, which masks prompts

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.

    Raises:
      RequestError: for numbers of layers that contradict each other, and for
        runs with a gradient that our field cannot say.
    """
    translated = super().read(reader, fields)
    translated['loops'] = _read_loops(reader, fields)

    # Our layers are those of both stacks. A pass runs the lower stack
    # low_cycles times and then the upper one once.
    runs_of_pass = fields['loops.low_cycles'] + 1
    num_runs = fields['loops.passes'] * runs_of_pass
    layers_of_stack = _read_layers_of_stack(reader, num_runs)
    translated['num_layers'] = 2 * layers_of_stack

    # Each query head has keys and values of its own.
    translated['num_kv_heads'] = fields['num_heads']

    # Embeddings are drawn with the deviation initializer_range. They are scaled
    # to the deviation 1, unless the file gives another scale.
    stddev = reader('initializer_range', 0.02)
    translated['embed_scale'] = reader('embedding_scale', 1 / stddev)
    return translated

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    loops = config.part(LoopsConfig)
    # How many of the lower stack's runs have a gradient, in each of the last
    # passes (see `_read_gradient_passes`).
    cycles = [loops.gradient_passes]
    if not loops.gradient_passes:
      cycles = [loops.low_cycles] * loops.passes
    # transformers counts a layer once for each time that it runs.
    layers_of_pass = loops.count_rows_of_pass(config.num_layers)
    return dict(
        rope_parameters=rope_fields.write_rope(config),
        num_layers_per_stack=config.num_layers // 2,
        num_hidden_layers=layers_of_pass * loops.passes,
        L_bp_cycles=cycles, embedding_scale=config.embed_scale)

  def constants(self, config: ModelConfig) -> dict:
    """Returns the first z_L, which is never trained."""
    return {'model.z_L_init': np.zeros(config.d_model, np.float32)}

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    require(config.num_kv_heads == config.num_heads,
            f'model.num_kv_heads is {config.num_kv_heads}: transformers has as '
            f'many heads of keys as model.num_heads {config.num_heads} here')
    require(config.d_model % config.num_heads == 0,
            f'model.d_model is {config.d_model}, which transformers wants to '
            f'be a multiple of model.num_heads {config.num_heads} here')
