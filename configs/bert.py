"""BERT: `--config configs/bert.py:SIZE`.

Lab note. Devlin et al. 2019, section 3.1 and appendix A.2: base 12 layers of
768, large 24 of 1,024, WordPiece of 30,522; batch 256, 1M steps (90 % of them
with 128 tokens, the rest with 512), Adam b2 0.999, decay 0.01, learning rate
1e-4, 10,000 steps of warm-up, linear decay, dropout 0.1; 16 TPU chips, 4 days
for base. Books and English Wikipedia.

The paper's 110M and 340M count the encoder with the pooler: 109,482,240 and
335,141,888 (1.4 % below what it rounds to), the figures of the published
checkpoints. The model here has what pre-training needs on top of that:
UNCOUNTED of its parameters, which `parameters` leaves out.

`minilm` is a BERT that fits a laptop: all-MiniLM-L6-v2, which
sentence-transformers made of every second layer of MiniLM (Wang et al. 2020:
12 layers of 384). Its sizes are those of its config.json, its count is that of
its checkpoint. What is set of its training is for fine-tuning it, as in
docs/howto/words_and_questions.md.

RoBERTa (Liu et al. 2019; configs/roberta.py) leaves the second task out and
fills its rows with text: `--config.objective=mlm`. The pooler and the NSP head
then learn nothing; `--config.model.next_sentence=False` leaves them out.

`tiny` learns masked bytes in rows of 32, two passages a row: 1,500 steps of 64
rows, 3M in all, under four minutes of two CPU cores. For 600 steps it knows
little more than how frequent bytes are (2.7 nats, 26 % right, of which some
stayed as they were), then it finds the neighbours: 1.76 nats and 49 %. Passages
of 15 bytes do not tell which follows which: the second task stays at 50 %. How
long the plateau is, is a matter of learned positions: in rows of 64 it was not
left in 3.3M bytes, in blocks of `pre_norm` neither, while with
`--config.model.position=rope` 200 steps of 32 such rows reach 46 %, 800 62 %
(`--config.objective=mlm`, the rate constant).
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers d_model num_heads max_len vocab_size parameters', {
        'minilm': (6, 384, 12, 512, 30522, 22_713_216),
        'base': (12, 768, 12, 512, 30522, 109_482_240),
        'large': (24, 1024, 16, 512, 30522, 335_141_888)})
SIZES['minilm'] |= base.TINY_TRAINING | dict(
    dtype='float32', remat='none', length=128, steps=200, lr=2e-4,
    warmup_steps=20)
for _size in ('base', 'large'):
  SIZES[_size] |= dict(dropout=0.1, attention_dropout=0.1, weight_decay=0.01,
                       b2=0.999, eps=1e-6)
SIZES['tiny'] = dict(num_layers=4, d_model=128, num_heads=4, max_len=32,
                     batch_size=64, steps=1500, lr=2e-3, warmup_steps=100)
# Pre-training needs these beside `parameters`: transform, its norm, nsp, head.
UNCOUNTED = {'minilm': 179_900, 'base': 624_188, 'large': 1_084_220}

get_config = base.make_get_config(
    'bert', SIZES, dict(type_vocab_size=2, norm_eps=1e-12, init='normal'),
    dict(objective='mlm_nsp'), remat='dots', batch_size=256, steps=1_000_000,
    lr=1e-4, warmup_steps=10_000, schedule='linear', final_fraction=0.0)
