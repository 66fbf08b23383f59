"""T5: text to text (Raffel et al. 2020), and v1.1 (Shazeer 2020).

  x_0 = E[tokens]                           no absolute positions
  a   = x + Attention(RMSNorm(x))           scores q k + b[h, bucket(i - j)]
  b   = a + CrossAttention(RMSNorm(a), memory)          in the decoder
  x'  = b + W2 relu(W1 RMSNorm(b))          v1.1: W2 (gelu(Wg x) * W1 x)
  logits = RMSNorm(x_N) E^T / sqrt(d_model)            v1.1: a matrix of its own

There is no bias anywhere; scores are not scaled; one table of relative biases
serves all layers of a stack, and cross-attention has none. Weights are born
with variance 1 / fan_in (truncated; the paper's code draws normally), those of
the query by 1 / sqrt(head_dim) smaller, embeddings with variance 1.

The paper's code drops the outputs of both stacks too; here dropout acts on the
embedding, on what each part adds to the residual stream, and with
attention_dropout and ffn_dropout on attention weights and hidden units.
"""

from architectures.parts.encoder_decoder import EncoderDecoder
from configs.errors import require


class T5(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""


def attention_names(stack: str, layer: int, part: str, ours: str):
  """Rows of one attention and of the norm before it."""
  theirs = f'{stack}.block.{{n}}.layer.{layer}'
  norm = ours.replace('attention', 'norm') if 'cross' in ours else (
      f'{ours}_norm')
  return (
      *((f'{stack}/layers/{ours}/{name}', 'DHK',
         f'{theirs}.{part}.{letter}.weight', 'HK D')
        for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v'))),
      (f'{stack}/layers/{ours}/out', 'HKD', f'{theirs}.{part}.o.weight',
       'D HK'),
      (f'{stack}/layers/{norm}/scale', 'D', f'{theirs}.layer_norm.weight',
       'D'))


def shared_names():
  """Rows of all but the feed-forward networks, as Switch has them too."""
  rows = [('embed/tokens', 'VD', 'shared.weight', 'V D'),
          ('head/kernel', 'DV', 'lm_head.weight', 'V D')]
  for stack, last in (('encoder', 1), ('decoder', 2)):
    rows += [
        (f'{stack}/relative_bias/table', 'UH', f'{stack}.block.0.layer.0.'
         'SelfAttention.relative_attention_bias.weight', 'U H'),
        *attention_names(stack, 0, 'SelfAttention', 'attention'),
        (f'{stack}/layers/ffn_norm/scale', 'D',
         f'{stack}.block.{{n}}.layer.{last}.layer_norm.weight', 'D'),
        (f'{stack}/final_norm/scale', 'D', f'{stack}.final_layer_norm.weight',
         'D')]
  rows += attention_names('decoder', 1, 'EncDecAttention', 'cross_attention')
  return tuple(rows)


HF_MODEL = 't5', 'T5ForConditionalGeneration'
HF_SPELLINGS = ()
HF_TIED = {'encoder.embed_tokens.weight': 'shared.weight',
           'decoder.embed_tokens.weight': 'shared.weight',
           'lm_head.weight': 'shared.weight'}
# Old files hold a table that the reference does not use either.
HF_IGNORED = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.'
              r'relative_attention_bias\.weight',)
FFNS = {'relu': 'relu', 'gated-gelu': 'geglu_tanh', 'gated-silu': 'swiglu'}


def hf_names(c):
  """Returns the name table: a gated network's has other names."""
  up = 'wi_1' if c.ffn in ('geglu_tanh', 'swiglu') else 'wi'
  return shared_names() + tuple(
      (f'{stack}/layers/ffn/{ours}', axes,
       f'{stack}.block.{{n}}.layer.{last}.DenseReluDense.{theirs}.weight',
       their_axes)
      for stack, last in (('encoder', 1), ('decoder', 2))
      for ours, axes, theirs, their_axes in (
          ('gate', 'DF', 'wi_0', 'F D'), ('up', 'DF', up, 'F D'),
          ('down', 'FD', 'wo', 'D F')))


def shared_fields(hf) -> dict:
  """Returns the fields of config.model that T5 and Switch have alike."""
  hf.must(is_encoder_decoder=True)
  hf.passes('is_decoder', 'add_cross_attention')  # of the stacks
  layers = hf('num_layers', 6)
  return dict(
      vocab_size=hf('vocab_size', 32128), d_model=hf('d_model', 512),
      head_dim=hf('d_kv', 64), d_ff=hf('d_ff', 2048), num_layers=layers,
      num_decoder_layers=hf('num_decoder_layers', layers),
      num_heads=hf('num_heads', 8), max_len=hf('n_positions', 512),
      norm='rmsnorm', norm_eps=hf('layer_norm_epsilon', 1e-6),
      position='relative',
      relative=dict(buckets=hf('relative_attention_num_buckets', 32),
                    max_distance=hf('relative_attention_max_distance', 128)),
      attention_scale=1.0, attention_bias=False, ffn_bias=False)


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a t5 config.json gives."""
  ffn = hf.choose('feed_forward_proj', 'relu', FFNS)
  # Derived from it where a file has neither; where it has, they count.
  name = hf('feed_forward_proj', 'relu')
  hf.must(dense_act_fn='gelu_new' if ffn == 'geglu_tanh'
          else name.removeprefix('gated-'),
          is_gated_act=name.startswith('gated-'))
  # transformers ties v1.1 in name, and tells it by the missing scale.
  require(not hf.is_null('scale_decoder_outputs'),
          'config.json has scale_decoder_outputs null, which transformers '
          'takes for false: write true or false')
  scaled = hf('scale_decoder_outputs', hf('tie_word_embeddings', True))
  fields = shared_fields(hf)
  return fields | dict(
      ffn=ffn, tie_embeddings=scaled,
      logits_scale=fields['d_model'] ** -0.5 if scaled else 1.0)


def shared_hf_config(c) -> dict:
  """Returns what config.json says of T5 and Switch alike."""
  return dict(
      vocab_size=c.vocab_size, d_model=c.d_model, d_kv=c.head_dim, d_ff=c.d_ff,
      num_layers=c.num_layers, num_decoder_layers=c.num_decoder_layers,
      num_heads=c.num_heads, n_positions=c.max_len,
      relative_attention_num_buckets=c.relative.buckets,
      relative_attention_max_distance=c.relative.max_distance,
      layer_norm_epsilon=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
      is_encoder_decoder=True, decoder_start_token_id=0, pad_token_id=0)


def to_hf_config(c) -> dict:
  """Returns what a t5 config.json says of the config `c`."""
  names = {ours: theirs for theirs, ours in FFNS.items()}
  require(c.ffn in names, f'model.ffn is {c.ffn!r}: a t5 config.json knows '
          f'{", ".join(names)}')
  return shared_hf_config(c) | dict(feed_forward_proj=names[c.ffn])
