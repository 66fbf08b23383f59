"""GPT-NeoX-20B and the Pythia ladder: `--config configs/gpt_neox.py:SIZE`.

Lab note. 20B (Black et al. 2022): table 1 and section 3: 1,538 sequences of
2,048 tokens a batch, 150,000 steps, learning rate 0.97e-4, Adam b2 0.95, decay
0.01, cosine to 10 %, 1 % warm-up; 96 A100. Pythia (Biderman et al. 2023):
tables 1 and 6: 1,024 sequences, 143,000 steps (300B tokens of the Pile), decay
0.01, flash attention; the vocabulary is padded differently with the degree of
tensor parallelism, hence three sizes of it. Counts are exact. Pythia's gelu is
the exact one, 20B's the tanh approximation.

`tiny` trains on the default text in 3 minutes of one CPU core, to a held-out
loss of 1.772 nats a byte (2.56 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads vocab_size lr parameters', {
        '20b': (6144, 44, 64, 50432, 0.97e-4, 20_554_567_680),
        'pythia-70m': (512, 6, 8, 50304, 10.0e-4, 70_426_624),
        'pythia-160m': (768, 12, 12, 50304, 6.0e-4, 162_322_944),
        'pythia-410m': (1024, 24, 16, 50304, 3.0e-4, 405_334_016),
        'pythia-1b': (2048, 16, 8, 50304, 3.0e-4, 1_011_781_632),
        'pythia-1.4b': (2048, 24, 16, 50304, 2.0e-4, 1_414_647_808),
        'pythia-2.8b': (2560, 32, 32, 50304, 1.6e-4, 2_775_208_960),
        'pythia-6.9b': (4096, 32, 32, 50432, 1.2e-4, 6_857_302_016),
        'pythia-12b': (5120, 36, 40, 50688, 1.2e-4, 11_846_072_320),
    }, max_len=2048)
SIZES['20b'] |= dict(ffn='gelu_tanh', batch_size=1536,  # 1,538, made divisible
                     steps=150_000, warmup_steps=1500)
SIZES['tiny'] = dict(d_model=128, num_layers=4, num_heads=4, max_len=256)

get_config = base.make_get_config(
    'gpt_neox', sizes=SIZES, batch_size=1024, steps=143_000, warmup_steps=1430,
    weight_decay=0.01)
