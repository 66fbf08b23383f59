"""Switch Transformer: T5 whose every other layer has experts, one a token
(Fedus et al. 2021).

  p = softmax(Wr x),  e = argmax p,  y = p_e FFN_e(x)              (equation 2)

In training an expert takes at most capacity_factor * S / E tokens of a group;
the residual stream carries the rest past the layer. Added to the loss are
0.01 * E sum_i f_i P_i for balance (equation 4) and, as ST-MoE has it (Zoph et
al. 2022), a z-loss on the router's logits. The router runs in float32 on input
jittered by 1 % (section 2.4); weights start at a tenth of T5's variance.

Where transformers deviates from the paper, and what is done here:
- its capacity is `expert_capacity` tokens of one sequence, however long, in
  evaluation too. The paper's grows with the group. An import drops nothing in
  evaluation, unless config.json has `moe_group_size` as our exports do: the
  length of the sequences, for which both are then the same. tools.convert says
  so when it imports a file without that field.
- its balance loss means f and P over all layers of a stack before it
  multiplies them. Here each layer has its own, as in the paper; they add up.
- it weighs that loss by 0.001. The paper by 0.01, the default here.
- padding takes room of the experts. Here it takes none.
"""

from architectures import t5
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import EncoderDecoder
from common import kinds
from common.errors import require


class Switch(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = t5.T5.PARTS | dict(
      ffn='moe', moe=dict(router='switch', top_k=1, ffn='relu'),
      pattern='dense,moe', kinds=dict(dense=dict(ffn='dense'), moe={}))


FFN_OF_ACTIVATION = {'relu': 'relu', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}
ANY_CAPACITY = 2 ** 20  # an expert_capacity that no sequence fills


def _read_interval_of_expert_layers(reader: hf.Reader, stack: str,
                                    layers: int) -> int:
  """Returns the distance n between the layers with experts of an encoder or a
  decoder: the last of every n layers has some.

  Args:
    reader: the reader of the config.json.
    stack: 'encoder' or 'decoder', as the field's name has it.
    layers: the number of layers in the stack.

  Raises:
    RequestError: unless n is 1 or 2.
  """
  # The default is that of transformers' config. The field `sparse_step` follows
  # from this one.
  num_with_experts = reader(f'num_sparse_{stack}_layers', 3)
  reader.ignore_fields(f'{stack}_sparse_step')

  # transformers divides and rounds down as well.
  interval = 0
  if num_with_experts:
    interval = layers // num_with_experts
  require(interval in (1, 2), f'config.json has num_sparse_{stack}_layers '
          f'{num_with_experts} of {layers}: all or every other are known here')
  return interval


class HF(hf.HuggingFace):
  model_type = 'switch_transformers'
  architecture = 'SwitchTransformersForConditionalGeneration'
  names = t5.model_rows(*hf.prefix_rows(
      'ffn', 'mlp', ('up', 'DF', 'wi.weight', 'F D'),
      ('down', 'FD', 'wo.weight', 'D F'),
      ('router', 'DE', 'router.classifier.weight', 'E D'),
      ('up', 'EDF', 'experts.expert_{e}.wi.weight', 'F D'),
      ('down', 'EFD', 'experts.expert_{e}.wo.weight', 'D F')))
  fields = t5.FIELDS | hf.fields_with_defaults(
      d_model=768, num_layers=12, num_decoder_layers=12, num_heads=12,
      num_experts=8, router_jitter_noise=0.01, router_aux_loss_coef=0.001) | {
          'moe.ffn': ('dense_act_fn', 'relu', FFN_OF_ACTIVATION),
          'moe.z_loss_weight': ('router_z_loss_coef', 0.001)}
  # Published files have the last three; the reference does not read them.
  only = dict(is_encoder_decoder=True, router_bias=False,
              router_dtype='float32', is_gated_act=False,
              router_type='tokens_masked', batch_prioritized_routing=False)
  # The reference does not read the last two.
  fields_without_effect = ('is_decoder', 'add_cross_attention',
                           'router_ignore_padding_tokens', 'add_router_probs')
  tied = t5.HF.tied
  ignored = t5.HF.ignored

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    # The last of every few layers has experts, alike in both stacks.
    num_layers = fields['num_layers']
    decoder_layers = fields['num_decoder_layers']
    if reader.is_null('num_decoder_layers'):
      decoder_layers = num_layers
    interval = _read_interval_of_expert_layers(reader, stack='encoder',
                                               layers=num_layers)
    interval_in_decoder = _read_interval_of_expert_layers(
        reader, stack='decoder', layers=decoder_layers)
    require(interval == interval_in_decoder,
            "config.json has experts in another share of the decoder's layers "
            "than of the encoder's: only equal shares are known here")
    reader.require_values(feed_forward_proj=reader('dense_act_fn', 'relu'))

    # The number of tokens that an expert takes, of a group or of a sequence.
    capacity = reader('expert_capacity', 64)
    group_size = reader('moe_group_size', 0)
    num_tokens = group_size or fields['max_len']
    factor = capacity * fields['moe.num_experts'] / num_tokens
    if not group_size and capacity < ANY_CAPACITY:
      reader.notes.append(
          f'config.json has expert_capacity {capacity}: transformers drops '
          f'what more than {capacity} tokens of a sequence send to one expert, '
          'in evaluation too, and this import drops nothing. The two compute '
          f'the same for sequences of up to {capacity} tokens, and may differ '
          'for longer ones')
    moe = dict(group_size=group_size, capacity_factor=factor,
               eval_capacity_factor=factor if group_size else 0.0)
    model_fields = t5.head_fields(fields, fields['tie_embeddings'])
    model_fields |= kinds.place_experts({}, interval)
    return model_fields | dict(num_decoder_layers=decoder_layers, moe=moe)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    moe = config.part(MoEConfig)
    interval = layer_types.interval_of_expert_layers(config)
    config_json = t5.write_usual_fields(config) | dict(
        num_sparse_encoder_layers=config.num_layers // interval,
        num_sparse_decoder_layers=config.num_decoder_layers // interval,
        expert_capacity=ANY_CAPACITY)
    # The tokens of a group that an expert takes in evaluation, rounded up.
    num_choices = moe.eval_capacity_factor * moe.group_size
    capacity = -int(-num_choices // moe.num_experts)
    if capacity:
      config_json |= dict(expert_capacity=capacity,
                          moe_group_size=moe.group_size)
    return config_json
