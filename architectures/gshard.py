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
  4 runs each token's own; here as the paper says, and tools.verify mends it.
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

from architectures.parts.encoder_decoder import EncoderDecoder
from architectures.transformer import attention_names, norm_names
from configs.errors import one_of, require


class GShard(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""


def _names():
  rows = [('embed/tokens', 'VD', 'model.shared.weight', 'V D')]
  for stack in ('encoder', 'decoder'):
    theirs = f'model.{stack}.layers.{{n}}'
    ours = f'{stack}/layers'
    rows += attention_names(stack, 'attention', 'self_attn')
    rows += norm_names(f'{ours}/attention_norm',
                       f'{theirs}.self_attn_layer_norm')
    rows += norm_names(f'{ours}/ffn_norm', f'{theirs}.ff_layer_norm')
    rows += norm_names(f'{stack}/final_norm', f'model.{stack}.layer_norm')
    rows.append((f'{ours}/ffn/router', 'DE',
                 f'{theirs}.ffn.router.classifier.weight', 'E D'))
    for expert, where in (('', 'ffn'), ('E', 'ffn.experts.expert_{e}')):
      rows += [
          (f'{ours}/ffn/up', f'{expert}DF', f'{theirs}.{where}.fc1.weight',
           'F D'),
          (f'{ours}/ffn/up_bias', f'{expert}F', f'{theirs}.{where}.fc1.bias',
           'F'),
          (f'{ours}/ffn/down', f'{expert}FD', f'{theirs}.{where}.fc2.weight',
           'D F'),
          (f'{ours}/ffn/down_bias', f'{expert}D',
           f'{theirs}.{where}.fc2.bias', 'D')]
  rows += attention_names('decoder', 'cross_attention', 'cross_attention')
  rows += norm_names('decoder/layers/cross_norm',
                     'model.decoder.layers.{n}.cross_attention_layer_norm')
  return tuple(rows)


HF_MODEL = 'nllb-moe', 'NllbMoeForConditionalGeneration'
HF_SPELLINGS = (('model.', ''),)
HF_TIED = {'model.encoder.embed_tokens.weight': 'model.shared.weight',
           'model.decoder.embed_tokens.weight': 'model.shared.weight',
           'lm_head.weight': 'model.shared.weight'}
HF_IGNORED = (r'model\.(en|de)coder\.embed_positions\.weights?',)  # sinusoids
HF_NAMES = _names()
HF_FIXED = ('pad_token_id',)  # positions there count from it
FFNS = {'relu': 'relu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}
ROUTERS = {'random': 'gshard', 'all': 'topk'}
IN_TRAINING = 'second_expert_policy_in_training'  # a field of our own


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that an nllb-moe config.json gives."""
  heads, d_ff = hf('encoder_attention_heads', 16), hf('encoder_ffn_dim', 4096)
  every = hf('encoder_sparse_step', 4)
  hf.must(is_encoder_decoder=True, tie_word_embeddings=True,
          decoder_attention_heads=heads, decoder_ffn_dim=d_ff,
          decoder_sparse_step=every, router_bias=False, router_dtype='float32',
          router_ignore_padding_tokens=False, pad_token_id=1,
          batch_prioritized_routing=False)
  require(hf('moe_token_dropout', 0.2) == 0,
          f'config.json has moe_token_dropout {hf("moe_token_dropout", 0.2)}, '
          'which scales the experts in evaluation too: only 0 is known here')
  hf.passes('encoder_layerdrop', 'decoder_layerdrop')  # in training
  hf.passes('expert_capacity', 'router_z_loss_coef', 'router_type')  # unread
  fraction = hf('moe_eval_capacity_token_fraction', 1.0)
  require(0 < fraction <= 1, 'config.json has moe_eval_capacity_token_fraction '
          f'{fraction}: choose it in (0, 1]')
  require(hf('normalize_router_prob_before_dropping', False) or fraction == 1,
          'config.json has normalize_router_prob_before_dropping False and '
          f'drops tokens, moe_eval_capacity_token_fraction {fraction}: gates '
          'are normalised before that here')
  layers, d_model = hf('encoder_layers', 12), hf('d_model', 1024)
  hf.must(num_hidden_layers=layers)
  experts = hf('num_experts', 128)
  policy = hf('second_expert_policy', 'all')
  one_of('second_expert_policy of config.json', policy, ROUTERS)
  if policy == 'random':
    hf.notes.append(
        "config.json has second_expert_policy 'random': transformers leaves "
        'the second expert of a token out by chance, in evaluation too, and '
        'this import in training alone')
  return dict(
      vocab_size=hf('vocab_size', 128112), d_model=d_model, num_heads=heads,
      d_ff=d_ff, num_layers=layers,
      num_decoder_layers=hf('decoder_layers', layers),
      max_len=hf('max_position_embeddings', 1024), norm_eps=1e-5,
      position='sinusoidal', sinusoid='fairseq', block='pre_norm', ffn='moe',
      embed_scale=d_model ** 0.5 if hf('scale_embedding', True) else 1.0,
      moe=dict(
          router=hf.choose(IN_TRAINING, policy, ROUTERS), top_k=2,
          num_experts=experts, every=every,
          ffn=hf.choose('activation_function', 'relu', FFNS),
          capacity_factor=1.0,
          eval_capacity_factor=0.0 if fraction == 1 else fraction * experts / 2,
          balance_weight=hf('router_aux_loss_coef', 0.001)))


def to_hf_config(c) -> dict:
  """Returns what an nllb-moe config.json says of the config `c`."""
  m = c.moe
  ffns = {ours: theirs for theirs, ours in FFNS.items()}
  policies = {ours: theirs for theirs, ours in ROUTERS.items()}
  require(c.ffn == 'moe' and m.ffn in ffns and m.router in policies,
          f'model.ffn is {c.ffn!r} with model.moe.ffn {m.ffn!r} and '
          f'model.moe.router {m.router!r}: an nllb-moe config.json knows moe '
          f'with {", ".join(ffns)} and {", ".join(policies)}')
  factor = m.eval_capacity_factor
  in_training = {} if m.router == 'topk' else {
      IN_TRAINING: policies[m.router]}
  return in_training | dict(
      vocab_size=c.vocab_size, d_model=c.d_model, encoder_layers=c.num_layers,
      decoder_layers=c.num_decoder_layers,
      encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads,
      encoder_ffn_dim=c.d_ff, decoder_ffn_dim=c.d_ff,
      max_position_embeddings=c.max_len, activation_function=ffns[m.ffn],
      scale_embedding=c.embed_scale != 1, tie_word_embeddings=c.tie_embeddings,
      num_experts=m.num_experts, encoder_sparse_step=m.every,
      decoder_sparse_step=m.every, second_expert_policy='all',
      normalize_router_prob_before_dropping=True,
      moe_eval_capacity_token_fraction=min(
          1.0, 2 * factor / m.num_experts) if factor else 1.0,
      moe_token_dropout=0.0, router_aux_loss_coef=m.balance_weight,
      is_encoder_decoder=True, pad_token_id=1)
