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


FFNS = {'relu': 'relu', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}
ANY_CAPACITY = 2 ** 20  # an expert_capacity that no sequence fills


def _every(reader: hf.Reader, stack: str, layers: int) -> int:
  """Returns n where the last of every n layers of a stack has experts."""
  sparse = reader(f'num_sparse_{stack}_layers', 3)
  reader.passes(f'{stack}_sparse_step')  # derived
  every = layers // sparse if sparse else 0
  require(every in (1, 2), f'config.json has num_sparse_{stack}_layers '
          f'{sparse} of {layers}: all or every other are known here')
  return every


class HF(hf.HuggingFace):
  model_type = 'switch_transformers'
  architecture = 'SwitchTransformersForConditionalGeneration'
  names = t5.names(*hf.under(
      'ffn', 'mlp', ('up', 'DF', 'wi.weight', 'F D'),
      ('down', 'FD', 'wo.weight', 'D F'),
      ('router', 'DE', 'router.classifier.weight', 'E D'),
      ('up', 'EDF', 'experts.expert_{e}.wi.weight', 'F D'),
      ('down', 'EFD', 'experts.expert_{e}.wo.weight', 'D F')))
  fields = t5.FIELDS | hf.fields(
      d_model=768, num_layers=12, num_decoder_layers=12, num_heads=12,
      num_experts=8, router_jitter_noise=0.01, router_aux_loss_coef=0.001) | {
          'moe.ffn': ('dense_act_fn', 'relu', FFNS),
          'moe.z_loss_weight': ('router_z_loss_coef', 0.001)}
  # Published files have the last three; the reference does not read them.
  only = dict(is_encoder_decoder=True, router_bias=False,
              router_dtype='float32', is_gated_act=False,
              router_type='tokens_masked', batch_prioritized_routing=False)
  # The reference does not read the last two.
  unread = ('is_decoder', 'add_cross_attention',
            'router_ignore_padding_tokens', 'add_router_probs')
  tied = t5.HF.tied
  ignored = t5.HF.ignored

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    # How many layers have experts.
    layers, decoder_layers = fields['num_layers'], fields['num_decoder_layers']
    if reader.is_null('num_decoder_layers'):
      decoder_layers = layers
    every = _every(reader, 'encoder', layers)
    require(every == _every(reader, 'decoder', decoder_layers),
            "config.json has experts in another share of the decoder's layers "
            "than of the encoder's: only equal shares are known here")
    reader.must(feed_forward_proj=reader('dense_act_fn', 'relu'))

    # The room of an expert.
    slots, group = reader('expert_capacity', 64), reader('moe_group_size', 0)
    factor = slots * fields['moe.num_experts'] / (group or fields['max_len'])
    if not group and slots < ANY_CAPACITY:
      reader.notes.append(
          f'config.json has expert_capacity {slots}: transformers drops what '
          f'more than {slots} tokens of a sequence send to one expert, in '
          'evaluation too, and this import drops nothing. The two compute the '
          f'same for sequences of up to {slots} tokens, and may differ for '
          'longer ones')
    moe = dict(group_size=group, capacity_factor=factor,
               eval_capacity_factor=factor if group else 0.0)
    ours = t5.head(fields, fields['tie_embeddings'])
    ours |= kinds.place_experts({}, every)
    return ours | dict(num_decoder_layers=decoder_layers, moe=moe)

  def write(self, c: ModelConfig) -> dict:
    moe, every = c.part(MoEConfig), layer_types.experts_every(c)
    tree = t5.write(c) | dict(
        num_sparse_encoder_layers=c.num_layers // every,
        num_sparse_decoder_layers=c.num_decoder_layers // every,
        expert_capacity=ANY_CAPACITY)
    room = moe.eval_capacity_factor * moe.group_size
    slots = -int(-room // moe.num_experts)  # rounded up
    if slots:
      tree |= dict(expert_capacity=slots, moe_group_size=moe.group_size)
    return tree
