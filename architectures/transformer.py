"""The Transformer: attention is all you need (Vaswani et al. 2017).

  x_0 = sqrt(d_model) E[tokens] + PE        sinusoids (section 3.5)
  a   = LayerNorm(x + Attention(x))         norm after the sum
  b   = LayerNorm(a + CrossAttention(a, memory))        in the decoder
  x'  = LayerNorm(b + W2 relu(W1 b))
  logits = x_N E^T                          one table: source, target, head

Trained with label smoothing 0.1 and a rate that rises for 4,000 steps and then
falls as 1 / sqrt(step). Sines and cosines alternate in the paper, and stand in
two halves in Marian (and in the paper's own code): the same up to a
permutation of the features, which training cannot tell apart. configs/
transformer.py takes `halves`, so that a run can be exported;
`model.sinusoid=interleaved` is the paper's formula to the letter.

Where transformers' Marian deviates from the paper, and what is done here:
- GELU or SiLU where its files say so. Here as well; by default ReLU.
- a bias on the logits, which it never trains: model.logits_bias, off by
  default. (Here it is a parameter like others.)
- it may leave the embedding unscaled (scale_embedding). Honoured.
- the embedding of padding gets no gradient from the input. Here it does,
  where a target starts with the padding token.
- tables of its own for source and target are not known here.
"""

from architectures.parts import hf as common
from architectures.parts.encoder_decoder import EncoderDecoder


class Transformer(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""


def attention_names(stack: str, ours: str, theirs: str):
  """Rows of one attention, with its biases."""
  letters = dict(query='q_proj', key='k_proj', value='v_proj')
  theirs = f'model.{stack}.layers.{{n}}.{theirs}'
  ours = f'{stack}/layers/{ours}'
  return (
      *((f'{ours}/{name}', 'DHK', f'{theirs}.{their}.weight', 'HK D')
        for name, their in letters.items()),
      *((f'{ours}/{name}_bias', 'HK', f'{theirs}.{their}.bias', 'HK')
        for name, their in letters.items()),
      (f'{ours}/out', 'HKD', f'{theirs}.out_proj.weight', 'D HK'),
      (f'{ours}/out_bias', 'D', f'{theirs}.out_proj.bias', 'D'))


def norm_names(ours: str, theirs: str):
  """Rows of one norm."""
  return ((f'{ours}/scale', 'D', f'{theirs}.weight', 'D'),
          (f'{ours}/bias', 'D', f'{theirs}.bias', 'D'))


def _names():
  rows = [('embed/tokens', 'VD', 'model.shared.weight', 'V D'),
          ('head/bias', 'V', 'final_logits_bias', '1 V')]
  for stack in ('encoder', 'decoder'):
    theirs = f'model.{stack}.layers.{{n}}'
    rows += attention_names(stack, 'attention', 'self_attn')
    rows += norm_names(f'{stack}/layers/attention_norm',
                       f'{theirs}.self_attn_layer_norm')
    rows += norm_names(f'{stack}/layers/ffn_norm',
                       f'{theirs}.final_layer_norm')
    rows += [
        (f'{stack}/layers/ffn/up', 'DF', f'{theirs}.fc1.weight', 'F D'),
        (f'{stack}/layers/ffn/up_bias', 'F', f'{theirs}.fc1.bias', 'F'),
        (f'{stack}/layers/ffn/down', 'FD', f'{theirs}.fc2.weight', 'D F'),
        (f'{stack}/layers/ffn/down_bias', 'D', f'{theirs}.fc2.bias', 'D')]
  rows += attention_names('decoder', 'cross_attention', 'encoder_attn')
  rows += norm_names('decoder/layers/cross_norm',
                     'model.decoder.layers.{n}.encoder_attn_layer_norm')
  return tuple(rows)


HF_MODEL = 'marian', 'MarianMTModel'
HF_SPELLINGS = (('model.', ''),)
HF_TIED = {'model.encoder.embed_tokens.weight': 'model.shared.weight',
           'model.decoder.embed_tokens.weight': 'model.shared.weight',
           'lm_head.weight': 'model.shared.weight'}
HF_IGNORED = (r'model\.(en|de)coder\.embed_positions\.weight',)  # sinusoids
HF_NAMES = _names()


def from_hf_config(hf) -> dict:
  """Returns the fields of config.model that a marian config.json gives."""
  vocab_size = hf('vocab_size', 58101)
  hf.must(is_encoder_decoder=True, share_encoder_decoder_embeddings=True,
          tie_word_embeddings=True, decoder_vocab_size=vocab_size)
  heads = hf('encoder_attention_heads', 16)
  d_ff = hf('encoder_ffn_dim', 4096)
  hf.must(decoder_attention_heads=heads, decoder_ffn_dim=d_ff)
  hf.passes('encoder_layerdrop', 'decoder_layerdrop')  # in training
  hf.must(normalize_before=False, normalize_embedding=False,
          add_final_layer_norm=False, add_bias_logits=False,
          static_position_embeddings=True)
  hf.passes('is_decoder')  # of the stacks
  hf.passes('extra_pos_embeddings')
  layers = hf('encoder_layers', 12)
  hf.must(num_hidden_layers=layers)
  d_model = hf('d_model', 1024)
  return dict(
      vocab_size=vocab_size, d_model=d_model, num_heads=heads, d_ff=d_ff,
      num_layers=layers, num_decoder_layers=hf('decoder_layers', layers),
      max_len=hf('max_position_embeddings', 1024), norm_eps=1e-5,
      position='sinusoidal', sinusoid='halves', block='post_norm',
      ffn=hf.choose('activation_function', 'gelu', common.FFNS),
      embed_scale=d_model ** 0.5 if hf('scale_embedding', False) else 1.0,
      logits_bias=hf('final_logits_bias', True))


def to_hf_config(c) -> dict:
  """Returns what a marian config.json says of the config `c`."""
  return dict(
      vocab_size=c.vocab_size, decoder_vocab_size=c.vocab_size,
      d_model=c.d_model, encoder_layers=c.num_layers,
      decoder_layers=c.num_decoder_layers,
      encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads,
      encoder_ffn_dim=c.d_ff, decoder_ffn_dim=c.d_ff,
      max_position_embeddings=c.max_len, activation_function=common.theirs(
          common.FFNS, c.ffn),
      scale_embedding=c.embed_scale != 1, tie_word_embeddings=c.tie_embeddings,
      # Ours: whether the bias is there; transformers takes zeros where not.
      final_logits_bias=c.logits_bias, is_encoder_decoder=True,
      # Any token in the vocabulary serves: theirs must name one.
      pad_token_id=c.vocab_size - 1, decoder_start_token_id=c.vocab_size - 1,
      eos_token_id=0, forced_eos_token_id=None)
