"""GPT-4 as rumoured: `--config configs/gpt4.py:rumoured`, or
`:rumoured-8x220b`.

Lab note. OpenAI (2023) gives no figure at all. The rumour (SemiAnalysis, July
2023): about 1.8T parameters over 120 layers, 16 experts of about 111B each in
their feed-forward networks, two chosen for a token, about 55B shared for
attention, 280B at work for a token, 13T tokens, 8,192 of them in a sequence,
batch of 60M tokens. Worked back from it: 111B / 120 layers = 8 d_model^2
gives d_model 10,752 (84 heads of 128, d_ff 4 d_model); attention of
4 d_model^2 is then 55.5B, as told. The rumour also says multi-query
attention, which would need only 28B: the two contradict each other, and full
heads are taken. The vocabulary is that of the published tokenizer, 100,277.
Counts agree with the rumour to 2 % because they were fitted to it; they are
no evidence.

`rumoured-8x220b`, the other rumour (George Hotz, Latent Space podcast, June
2023): a mixture of eight, 220B each, so 1.76T parameters. It gives neither
depth nor width, nor how many experts see a token: the depth, the context and
the two experts of the first rumour are taken. 68 d_model^2 in each of 120
layers, eight networks of 8 d_model^2 and attention of 4, is then 1.76T at
d_model 14,720 (115 heads of 128). The two rumours contradict each other.

`tiny` reads 1.2M bytes of the default text in 5 minutes of one CPU core, to a
loss of 2.324 nats a byte (3.35 bits) on 16 held-out batches.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads moe.num_experts parameters', rows={
        'rumoured': (10752, 120, 84, 16, 1.8e12),
        'rumoured-8x220b': (14720, 120, 115, 8, 1.76e12),
    }, max_len=8192, vocab_size=100277)
SIZES['tiny'] = dict(
    d_model=128, num_layers=4, num_heads=4, d_ff=256, max_len=256,
    moe=dict(num_experts=4), batch_size=8, steps=600, lr=2e-3, warmup_steps=100)

# About 60M tokens a batch.
get_config = base.make_get_config(
    'gpt4-rumoured', SIZES, dict(moe=dict(dispatch='auto')), batch_size=7168,
    tokens=13e12, lr=1e-4)
