"""ModernBERT: `--config configs/modernbert.py:SIZE`.

Lab note. Warner et al. 2024, section 2 and appendix A: 22 layers of 768 and 28
of 1,024, windows of 128 tokens (64 on either side) in two layers of three, a
vocabulary of 50,368; masks of 30 %, AdamW (with the clipping of StableAdamW)
b2 0.98, eps 1e-6, decay 1e-5; 1.7T tokens in rows of 1,024, then 300B in rows
of 8,192, of which the first part is set here: batches of 4,608 rows and a
learning rate of 8e-4 for base, 4,928 and 5e-4 for large, constant after a
warm-up (wsd). 8 H100.

Counts are those of transformers' ModernBertForMaskedLM, with its head.

`tiny` learns masked bytes in rows of 64, 15 % of them masked: 600 steps of 32
rows, 1.2M bytes in all, to 1.47 nats and 56 % right of those held out. Rotary
positions spare it the plateau of BERT's `tiny` (configs/bert.py).
"""

from configs import recipes

SIZES = {
    'tiny': dict(num_layers=4, d_model=128, num_heads=4, d_ff=192, max_len=64),
    'base': dict(num_layers=22, d_model=768, num_heads=12, d_ff=1152,
                 max_len=8192, vocab_size=50368),
    'large': dict(num_layers=28, d_model=1024, num_heads=16, d_ff=2624,
                  max_len=8192, vocab_size=50368),
}

# Published parameter counts, for tools.count.
PUBLISHED = {'base': 149_655_232, 'large': 395_881_664}


def get_config(size: str = 'tiny'):
  window = 9 if size == 'tiny' else 65
  c = recipes.begin(
      size, SIZES, arch='modernbert', position='rope',
      norm='layernorm_no_bias', embed_norm=True, ffn='geglu', block='pre_norm',
      attention_bias=False, ffn_bias=False, tie_embeddings=True,
      logits_bias=True, prefix='first', pattern='local,local,global', kinds={
          'first': dict(block='ffn_norm'),
          'local': dict(window=window, rope=dict(theta=10_000.0)),
          'global': {}})
  c.objective = 'mlm'
  c.model.rope.theta = 160_000.0
  c.data.mask_rate = 0.3
  if size == 'tiny':
    c.data.mask_rate = 0.15
    return recipes.tiny(c, batch_size=32, steps=600, lr=2e-3, warmup_steps=100)
  lr, rows = {'base': (8e-4, 4608), 'large': (5e-4, 4928)}[size]
  return recipes.pretraining(
      c, length=1024, batch_size=rows, steps=int(1.719e12 / (rows * 1024)),
      lr=lr, warmup_steps=int(3e9 / (rows * 1024)), remat='dots',
      schedule='wsd', weight_decay=1e-5, b2=0.98, eps=1e-6)
