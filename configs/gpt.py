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
held-out loss of 1.356 nats a byte (1.96 bits), and with data.tokenizer=sotu, as
`make train` does, to 1.66 bits a byte. The other sizes are for a
GPU, at best several: a batch of 512 x 1,024 tokens at once does not fit the
memory of one, train.grad_accumulation=8 or more makes it smaller parts. Their
vocabulary is GPT-2's: data.tokenizer=FOLDER names its Hugging Face
folder, model.vocab_size=0 takes that of another tokenizer.
"""

from configs import base

GPT2 = base.table_of_sizes(
    'num_layers d_model num_heads parameters', rows={
        'gpt2': (12, 768, 12, 124_439_808),
        'gpt2-medium': (24, 1024, 16, 354_823_168),
        'gpt2-large': (36, 1280, 20, 774_030_080),
        'gpt2-xl': (48, 1600, 25, 1_557_611_200),
    }, max_len=1024, vocab_size=50257, batch_size=512, steps=300_000, lr=6e-4)
# `batch` in tokens, to the next 16 rows below.
GPT3 = base.table_of_sizes(
    'num_layers d_model num_heads batch lr parameters', rows={
        'gpt3-125m': (12, 768, 12, 0.5e6, 6.0e-4, 125e6),
        'gpt3-350m': (24, 1024, 16, 0.5e6, 3.0e-4, 350e6),
        'gpt3-760m': (24, 1536, 16, 0.5e6, 2.5e-4, 760e6),
        'gpt3-1.3b': (24, 2048, 16, 1e6, 2.0e-4, 1.3e9),
        'gpt3-2.7b': (32, 2560, 32, 1e6, 1.6e-4, 2.7e9),
        'gpt3-6.7b': (32, 4096, 32, 2e6, 1.2e-4, 6.7e9),
        'gpt3-13b': (40, 5120, 40, 2e6, 1.0e-4, 13e9),
        'gpt3-175b': (96, 12288, 96, 3.2e6, 0.6e-4, 175e9),
    }, max_len=2048, vocab_size=50257, warmup=375e6, decay=260e9,
    pattern='global,banded',
    kinds={'global': dict(window=0), 'banded': dict(window=256)})
for _size in GPT3.values():
  _size['batch_size'] = int(_size['batch'] / 2048 / 16) * 16
TINY = dict(num_layers=4, d_model=128, num_heads=4, max_len=128, batch_size=8,
            steps=2500, warmup_steps=100)
SIZES = {'tiny': TINY} | GPT2 | GPT3

get_config = base.make_get_config('gpt', sizes=SIZES, remat='dots',
                                     tokens=300e9)
