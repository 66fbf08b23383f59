"""GShard: an encoder-decoder whose every other layer has experts, two a token
(Lepikhin et al. 2020), for translation.

  p = softmax(Wr x),  g1, g2 = the two highest of p, made to sum to 1
  y = g1 FFN_e1(x) + g2 FFN_e2(x)                          (algorithm 1)

Tokens are routed in groups; an expert takes capacity_factor * 2 S / E tokens
of each, first choices first, and the residual stream carries the rest. In
training the second expert is used with probability 2 g2. Added to the loss is
E sum_i f_i P_i, f_i the share of first choices.

Where transformers' NLLB-MoE deviates from the paper, and what is done here:
- pre-norm; the paper's figure 3 draws a norm after each sum. As the
  reference; `model.block=post_norm` is the figure's.
- sinusoids in halves from position 2 on, as in fairseq (the paper gives none).
- each expert's number is lost: of transformers 5's NllbMoeExperts only experts
  0 and 1 are ever run, for first and second choices. A fault, for its version
  4 runs each token's own; here as the paper says, and tests/parity mends it.
- gates may be made to sum to 1 after the capacity has dropped some
  (normalize_router_prob_before_dropping=False). Here before, as in the
  paper; the same where nothing is dropped, and refused where something is.
- the second expert may be always used (second_expert_policy all): that is
  router=topk here. random is the paper's, router=gshard, but draws in
  evaluation too. Here in training alone: an export says all, which is what it
  computes in evaluation, and random in a field of our own.
- its balance loss counts second choices too, and means over all layers of a
  stack before it multiplies. Here first choices, and layer by layer.
- moe_token_dropout scales expert outputs down in evaluation. Refused.
"""

from architectures import transformer
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import EncoderDecoder
from common import kinds
from common.errors import check_choice, require


class GShard(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = transformer.Transformer.PARTS | dict(
      sinusoidal=dict(layout='fairseq'), block='pre_norm', ffn='moe',
      pattern='dense,moe', kinds=dict(dense=dict(ffn='dense'), moe={}),
      moe=dict(router='gshard', top_k=2, ffn='relu'))


FFN_OF_ACTIVATION = {'relu': 'relu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}
ROUTER_OF_SECOND_EXPERT_POLICY = {'random': 'gshard', 'all': 'topk'}
# A field of our own, which transformers ignores.
POLICY_IN_TRAINING = 'second_expert_policy_in_training'


LAYER_ROWS = (*transformer.attention_rows('attention', 'self_attn'),
              *hf.norm_rows('attention_norm', 'self_attn_layer_norm'),
              *hf.norm_rows('ffn_norm', 'ff_layer_norm'),
              *hf.dense_rows('ffn/up', 'DF', 'ffn.fc1', 'F D'),
              *hf.dense_rows('ffn/down', 'FD', 'ffn.fc2', 'D F'),
              ('ffn/router', 'DE', 'ffn.router.classifier.weight', 'E D'),
              *hf.dense_rows('ffn/up', 'EDF', 'ffn.experts.expert_{e}.fc1',
                             'F D'),
              *hf.dense_rows('ffn/down', 'EFD', 'ffn.experts.expert_{e}.fc2',
                             'D F'))


class HF(hf.HuggingFace):
  model_type = 'nllb-moe'
  architecture = 'NllbMoeForConditionalGeneration'
  names = (
      ('embed/tokens', 'VD', 'model.shared.weight', 'V D'),
      *transformer.layer_rows('encoder', *LAYER_ROWS),
      *hf.norm_rows('encoder/final_norm', 'model.encoder.layer_norm'),
      *transformer.layer_rows(
          'decoder', *LAYER_ROWS,
          *transformer.attention_rows('cross_attention', 'cross_attention'),
          *hf.norm_rows('cross_norm', 'cross_attention_layer_norm')),
      *hf.norm_rows('decoder/final_norm', 'model.decoder.layer_norm'))
  fields = transformer.FIELDS | hf.fields_with_defaults(
      vocab_size=128112, num_experts=128, router_aux_loss_coef=0.001) | {
          'moe.ffn': ('activation_function', 'relu', FFN_OF_ACTIVATION)}
  only = dict(is_encoder_decoder=True, tie_word_embeddings=True,
              router_bias=False, router_dtype='float32',
              router_ignore_padding_tokens=False, pad_token_id=1,
              batch_prioritized_routing=False)
  fields_without_effect = (*transformer.LAYERDROP_FIELDS, 'expert_capacity',
                           'router_z_loss_coef')
  tied = transformer.HF.tied
  spellings = transformer.HF.spellings
  ignored = transformer.HF.ignored
  fixed_token_ids = ('pad_token_id',)  # Positions there count from it.

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
    interval = reader('encoder_sparse_step', 4)
    interval_of_decoder = reader('decoder_sparse_step', 4)
    require(interval_of_decoder == interval, 'config.json has '
            f'decoder_sparse_step {interval_of_decoder}: only {interval}, that '
            'of the encoder, is known here')
    dropout = reader('moe_token_dropout', 0.2)
    require(dropout == 0, f'config.json has moe_token_dropout {dropout}, '
            'which scales the experts in evaluation too: only 0 is known here')

    # How many tokens an expert takes in evaluation; 0.0: all.
    fraction = reader('moe_eval_capacity_token_fraction', 1.0)
    require(0 < fraction <= 1, 'config.json has '
            f'moe_eval_capacity_token_fraction {fraction}: choose it in (0, 1]')
    normalizes_first = reader('normalize_router_prob_before_dropping', False)
    require(normalizes_first or fraction == 1,
            'config.json has normalize_router_prob_before_dropping False and '
            f'drops tokens, moe_eval_capacity_token_fraction {fraction}: gates '
            'are normalised before that here')
    eval_capacity_factor = 0.0
    if fraction < 1:
      eval_capacity_factor = fraction * fields['moe.num_experts'] / 2

    # The second expert of a token.
    policy = reader('second_expert_policy', 'all')
    check_choice('second_expert_policy of config.json', value=policy,
                 choices=ROUTER_OF_SECOND_EXPERT_POLICY)
    if policy == 'random':
      reader.notes.append(
          "config.json has second_expert_policy 'random': transformers leaves "
          'the second expert of a token out by chance, in evaluation too, and '
          'this import in training alone')
    router = reader.read_choice(POLICY_IN_TRAINING, policy,
                                ROUTER_OF_SECOND_EXPERT_POLICY)
    moe = dict(router=router, capacity_factor=1.0,
               eval_capacity_factor=eval_capacity_factor)
    model_fields = transformer.read_stacks(reader, fields=fields, scaled=True)
    return model_fields | kinds.place_experts({}, interval) | dict(moe=moe)

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
    policy = hf.find_hf_word(ROUTER_OF_SECOND_EXPERT_POLICY, value=moe.router,
                             field='moe.router')
    interval = layer_types.interval_of_expert_layers(config)
    # There a capacity is a share of a row's tokens. Ours is a multiple of an
    # even load, which is a share of 2 / num_experts, since each token has two
    # experts. Our factor of 0, without a limit, is a share of 1.
    fraction = min(1.0, 2 * moe.eval_capacity_factor / moe.num_experts)
    if not fraction:
      fraction = 1.0
    config_json = transformer.write_stacks(config) | dict(
        encoder_sparse_step=interval, decoder_sparse_step=interval,
        second_expert_policy='all', normalize_router_prob_before_dropping=True,
        moe_eval_capacity_token_fraction=fraction,
        moe_token_dropout=0.0, pad_token_id=1)
    if moe.router != 'topk':
      config_json[POLICY_IN_TRAINING] = policy
    return config_json
