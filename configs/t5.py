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

from configs import base

# All sizes have these, and those of Switch too.
SAME = {'head_dim': 64, 'vocab_size': 32128, 'dropout': 0.1,
        'attention_dropout': 0.1, 'ffn_dropout': 0.1, 'train.z_loss': 1e-4}
SIZES = base.table_of_sizes(
    'num_layers d_model num_heads head_dim d_ff parameters', {
        'small': (6, 512, 8, 64, 2048, 60_506_624),
        'base': (12, 768, 12, 64, 3072, 222_903_552),
        'large': (24, 1024, 16, 64, 4096, 737_668_096),
        '3b': (24, 1024, 32, 128, 16384, 2_851_598_336),
        '11b': (24, 1024, 128, 128, 65536, 11_307_321_344),
        'v1.1-small': (8, 512, 6, 64, 1024, 76_961_152),
        'v1.1-base': (12, 768, 12, 64, 2048, 247_577_856),
        'v1.1-large': (24, 1024, 16, 64, 2816, 783_150_080),
        'v1.1-xl': (24, 2048, 32, 64, 5120, 2_849_757_184),
        'v1.1-xxl': (24, 4096, 64, 64, 10240, 11_135_332_352)}, **SAME)
for _name, _size in SIZES.items():
  if _name.startswith('v1.1-'):
    _size |= dict(
        ffn='geglu_tanh', tie_embeddings=False, logits_scale=1.0, dropout=0.0,
        attention_dropout=0.0, ffn_dropout=0.0, batch_size=2048,
        steps=1_000_000)
SIZES['tiny'] = dict(num_layers=2, d_model=128, num_heads=4, head_dim=32,
                     d_ff=512, length=64, batch_size=8, steps=1800, lr=2e-3,
                     warmup_steps=100)


def of(arch: str, sizes, model, **training):
  """Returns the get_config of a system that learns as T5 does."""
  return base.make_get_config(
      arch, sizes, dict(
          norm_eps=1e-6, init='fan_in', init_stddev=1.0, **model),
      dict(objective='span'), remat='dots', length=512, lr=0.01,
      warmup_steps=10_000, name='adafactor', schedule='rsqrt',
      weight_decay=0.0, clip_norm=0.0, **training)


get_config = of('t5', sizes=SIZES, model={}, batch_size=128, steps=2 ** 19)
