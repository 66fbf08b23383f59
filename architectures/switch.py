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
from architectures.parts.encoder_decoder import EncoderDecoder
from configs.errors import require


class Switch(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""


HF_MODEL = 'switch_transformers', 'SwitchTransformersForConditionalGeneration'
HF_SPELLINGS = ()
HF_TIED = t5.HF_TIED
HF_IGNORED = t5.HF_IGNORED
HF_NAMES = t5.shared_names() + tuple(
    (f'{stack}/layers/ffn/{ours}', axes,
     f'{stack}.block.{{n}}.layer.{last}.mlp.{theirs}.weight', their_axes)
    for stack, last in (('encoder', 1), ('decoder', 2))
    for ours, axes, theirs, their_axes in (
        ('up', 'DF', 'wi', 'F D'), ('down', 'FD', 'wo', 'D F'),
        ('router', 'DE', 'router.classifier', 'E D'),
        ('up', 'EDF', 'experts.expert_{e}.wi', 'F D'),
        ('down', 'EFD', 'experts.expert_{e}.wo', 'D F')))
FFNS = {'relu': 'relu', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}
ANY_CAPACITY = 2 ** 20  # an expert_capacity that no sequence fills


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a switch config.json gives."""
  fields = t5.shared_fields(hf)
  every = _every(hf, 'encoder', fields['num_layers'])
  require(every == _every(hf, 'decoder', fields['num_decoder_layers']),
          'config.json has experts in another share of the decoder\'s layers '
          'than of the encoder\'s: only equal shares are known here')
  hf.must(router_bias=False, router_dtype='float32')
  # The reference does not read these.
  hf.passes('router_ignore_padding_tokens', 'add_router_probs')
  # Published files have these; the reference reads none of them any more.
  hf.must(feed_forward_proj=hf('dense_act_fn', 'relu'), is_gated_act=False,
          router_type='tokens_masked', batch_prioritized_routing=False)
  experts, ffn = hf('num_experts', 8), hf.choose('dense_act_fn', 'relu', FFNS)
  slots, group = hf('expert_capacity', 64), hf('moe_group_size', 0)
  factor = slots * experts / (group or fields['max_len'])
  if not group and slots < ANY_CAPACITY:
    hf.notes.append(
        f'config.json has expert_capacity {slots}: transformers drops what more'
        f' than {slots} tokens of a sequence send to one expert, in evaluation '
        'too, and this import drops nothing. The two compute the same for '
        f'sequences of up to {slots} tokens, and may differ for longer ones')
  tied = hf('tie_word_embeddings', True)
  return fields | dict(
      ffn='moe', tie_embeddings=tied,
      logits_scale=fields['d_model'] ** -0.5 if tied else 1.0,
      moe=dict(router='switch', top_k=1, num_experts=experts, every=every,
               ffn=ffn, jitter=hf('router_jitter_noise', 0.01),
               group_size=group, capacity_factor=factor,
               eval_capacity_factor=factor if group else 0.0,
               balance_weight=hf('router_aux_loss_coef', 0.001),
               z_loss_weight=hf('router_z_loss_coef', 0.001)))


def _every(hf, stack: str, layers: int) -> int:
  sparse = hf(f'num_sparse_{stack}_layers', 3)
  hf.passes(f'{stack}_sparse_step')  # derived
  every = layers // sparse if sparse else 0
  require(every in (1, 2), f'config.json has num_sparse_{stack}_layers '
          f'{sparse} of {layers}: all or every other are known here')
  return every


def to_hf_config(c) -> dict:
  """Returns what a switch config.json says of the config `c`."""
  m = c.moe
  names = {ours: theirs for theirs, ours in FFNS.items()}
  require(c.ffn == 'moe' and m.ffn in names,
          f'model.ffn is {c.ffn!r} with model.moe.ffn {m.ffn!r}: a switch '
          f'config.json knows moe with {", ".join(names)}')
  factor = m.eval_capacity_factor
  slots = -int(-factor * m.group_size // m.num_experts) if factor else 0
  tree = t5.shared_hf_config(c) | dict(
      num_experts=m.num_experts, dense_act_fn=names[m.ffn],
      num_sparse_encoder_layers=c.num_layers // m.every,
      num_sparse_decoder_layers=c.num_decoder_layers // m.every,
      expert_capacity=slots or ANY_CAPACITY, router_jitter_noise=m.jitter,
      router_aux_loss_coef=m.balance_weight,
      router_z_loss_coef=m.z_loss_weight)
  return tree | (dict(moe_group_size=m.group_size) if slots else {})
