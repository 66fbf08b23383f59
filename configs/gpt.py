"""GPT-2 and GPT-3: `--config configs/gpt.py:SIZE`.

Lab note. GPT-2 (Radford et al. 2019): sizes of table 2, 1,024 tokens, batch
512, WebText; learning rate untold. The published checkpoints are called 124M,
355M, 774M and 1.5B. GPT-3 (Brown et al. 2020): sizes, batch and learning rate
of table 2.1, 2,048 tokens, Adam b2 0.95, clipping 1.0, decay 0.1, cosine to
10 % at 260B tokens after a warm-up of 375M; 300B tokens in all. GPT-3's dense
and locally banded layers alternate; the width of the band is not given, 256 is
taken here (the paper's reference, Child et al. 2019, uses 128 to 256).
Two rows of the table contradict themselves and are read as their neighbours:
1.3B has 24 heads of 128 at d_model 2,048 (16 are taken), and 13B has d_model
5,140, which 40 heads of 128 do not fill (5,120 is taken).

`tiny` trains on the default text in about three minutes of 2 CPU cores, to a
held-out loss of 1.356 nats a byte (1.96 bits). The other sizes are for a
GPU, at best several: a batch of 512 x 1,024 tokens at once does not fit the
memory of one, train.grad_accumulation=8 or more makes it smaller parts. Their
vocabulary is GPT-2's: data.tokenizer=FOLDER names its encoder.json and
vocab.bpe, model.vocab_size=0 takes that of another tokenizer.
"""

from configs import recipes

SIZES = {
    'tiny': dict(num_layers=4, d_model=128, num_heads=4, max_len=128),
    'gpt2': dict(num_layers=12, d_model=768, num_heads=12, max_len=1024),
    'gpt2-medium': dict(num_layers=24, d_model=1024, num_heads=16,
                        max_len=1024),
    'gpt2-large': dict(num_layers=36, d_model=1280, num_heads=20,
                       max_len=1024),
    'gpt2-xl': dict(num_layers=48, d_model=1600, num_heads=25, max_len=1024),
    'gpt3-125m': dict(num_layers=12, d_model=768, num_heads=12, max_len=2048),
    'gpt3-350m': dict(num_layers=24, d_model=1024, num_heads=16,
                      max_len=2048),
    'gpt3-760m': dict(num_layers=24, d_model=1536, num_heads=16,
                      max_len=2048),
    'gpt3-1.3b': dict(num_layers=24, d_model=2048, num_heads=16,
                      max_len=2048),
    'gpt3-2.7b': dict(num_layers=32, d_model=2560, num_heads=32,
                      max_len=2048),
    'gpt3-6.7b': dict(num_layers=32, d_model=4096, num_heads=32,
                      max_len=2048),
    'gpt3-13b': dict(num_layers=40, d_model=5120, num_heads=40, max_len=2048),
    'gpt3-175b': dict(num_layers=96, d_model=12288, num_heads=96,
                      max_len=2048),
}

# GPT-3, table 2.1: tokens a batch, learning rate.
GPT3 = {
    'gpt3-125m': (0.5e6, 6.0e-4), 'gpt3-350m': (0.5e6, 3.0e-4),
    'gpt3-760m': (0.5e6, 2.5e-4), 'gpt3-1.3b': (1e6, 2.0e-4),
    'gpt3-2.7b': (1e6, 1.6e-4), 'gpt3-6.7b': (2e6, 1.2e-4),
    'gpt3-13b': (2e6, 1.0e-4), 'gpt3-175b': (3.2e6, 0.6e-4),
}

# Published parameter counts, for tools.count.
PUBLISHED = {
    'gpt2': 124_439_808, 'gpt2-medium': 354_823_168,
    'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200,
    'gpt3-125m': 125e6, 'gpt3-350m': 350e6, 'gpt3-760m': 760e6,
    'gpt3-1.3b': 1.3e9, 'gpt3-2.7b': 2.7e9, 'gpt3-6.7b': 6.7e9,
    'gpt3-13b': 13e9, 'gpt3-175b': 175e9,
}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='gpt', position='learned', norm='layernorm',
      ffn='gelu_tanh', block='pre_norm', tie_embeddings=True)
  if size == 'tiny':
    return recipes.tiny(c, batch_size=8, steps=2500, warmup_steps=100)
  c.model.vocab_size = 50257
  if not size.startswith('gpt3-'):
    return recipes.pretraining(c, batch_size=512, steps=300_000, lr=6e-4,
                               remat='dots')
  tokens, lr = GPT3[size]
  c.model.pattern = 'global,banded'
  c.model.kinds = {'global': dict(window=0), 'banded': dict(window=256)}
  rows = max(int(tokens / 2048 / 16) * 16, 16)
  return recipes.pretraining(
      c, batch_size=rows, steps=int(300e9 / (rows * 2048)), lr=lr,
      warmup_steps=int(375e6 / (rows * 2048)),
      decay_steps=int(260e9 / (rows * 2048)), remat='dots')
