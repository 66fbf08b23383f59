"""T5 and T5 v1.1: `--config configs/t5.py:SIZE`.

Lab note. Raffel et al. 2020: 2^19 steps of 128 sequences of 512 tokens of C4
(34B tokens), span corruption (15 %, mean 3), Adafactor, a rate of
1/sqrt(max(step, 10,000)), dropout 0.1. Sizes of section 3.7.1; the published
checkpoints are called small (60M), base (220M), large (770M), 3b and 11b. v1.1
(Shazeer 2020): gated GELU, an untied head, no dropout in pre-training; xl and
xxl are its 3b and 11b. The rate here rises to 0.01 over the first 10,000
steps, which the paper's holds at 0.01.

`data.length` counts the tokens before corruption. Of 512, a source of 462 and a
target of 104 are made; the paper's code takes 568, of which 512 and 114 are
made: `--config.data.length=568`.

`tiny` trains in 1 to 2 minutes of one CPU core on rows of 64 bytes, to a
held-out loss of 2.272 nats a byte of the spans.
"""

from configs import recipes

SIZES = {
    'tiny': dict(num_layers=2, d_model=128, num_heads=4, head_dim=32,
                 d_ff=512),
    'small': dict(num_layers=6, d_model=512, num_heads=8, d_ff=2048),
    'base': dict(num_layers=12, d_model=768, num_heads=12, d_ff=3072),
    'large': dict(num_layers=24, d_model=1024, num_heads=16, d_ff=4096),
    '3b': dict(num_layers=24, d_model=1024, num_heads=32, head_dim=128,
               d_ff=16384),
    '11b': dict(num_layers=24, d_model=1024, num_heads=128, head_dim=128,
                d_ff=65536),
    'v1.1-small': dict(num_layers=8, d_model=512, num_heads=6, d_ff=1024),
    'v1.1-base': dict(num_layers=12, d_model=768, num_heads=12, d_ff=2048),
    'v1.1-large': dict(num_layers=24, d_model=1024, num_heads=16, d_ff=2816),
    'v1.1-xl': dict(num_layers=24, d_model=2048, num_heads=32, d_ff=5120),
    'v1.1-xxl': dict(num_layers=24, d_model=4096, num_heads=64, d_ff=10240),
}

# Parameters of the published checkpoints, for tools.count.
PUBLISHED = {
    'small': 60_506_624, 'base': 222_903_552, 'large': 737_668_096,
    '3b': 2_851_598_336, '11b': 11_307_321_344,
    'v1.1-small': 76_961_152, 'v1.1-base': 247_577_856,
    'v1.1-large': 783_150_080, 'v1.1-xl': 2_849_757_184,
    'v1.1-xxl': 11_135_332_352,
}


def get_config(size: str = 'tiny'):
  gated = size.startswith('v1.1-')
  c = recipes.begin(
      size, SIZES, head_dim=64, arch='t5', position='relative', norm='rmsnorm',
      norm_eps=1e-6, block='pre_norm', ffn='geglu_tanh' if gated else 'relu',
      attention_scale=1.0, attention_bias=False, ffn_bias=False,
      tie_embeddings=not gated, logits_scale=1.0 if gated else 0.0,
      init='fan_in', init_stddev=1.0)
  c.objective = 'span'
  c.model.num_decoder_layers = c.model.num_layers
  c.data.length = 64
  if size == 'tiny':
    return recipes.tiny(c, batch_size=8, steps=1800, lr=2e-3, warmup_steps=100)
  c.model.vocab_size = 32128
  for field in ('dropout', 'attention_dropout', 'ffn_dropout'):
    c.model[field] = 0.0 if gated else 0.1
  c.train.z_loss = 1e-4
  return recipes.pretraining(
      c, length=512, batch_size=2048 if gated else 128,
      steps=1_000_000 if gated else 2 ** 19, lr=0.01, warmup_steps=10_000,
      remat='dots', name='adafactor', schedule='rsqrt', weight_decay=0.0,
      clip_norm=0.0)
