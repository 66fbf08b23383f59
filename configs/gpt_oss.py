"""gpt-oss: `--config configs/gpt_oss.py:SIZE`.

Lab note. gpt-oss model card (OpenAI 2025, arXiv 2508.10925), section 2 and
table 1: 36 layers of 128 experts (116.83B parameters, of which 5.13B work for a
token) and 24 layers of 32 experts (20.91B and 3.61B), 4 experts a token, 64
query and 8 key heads of 64, windows of 128 in every other layer, 131,072
tokens by YaRN; norms, theta and sizes of the released config.json. Counts are
those of the published checkpoints, unpacked. Of the training nothing but its
GPU hours is published: batch, learning rate and steps here are LLaMA 3's. The
weight of the balancing loss is transformers' default (the released config.json
has 0.9, which nothing says was trained with).

`tiny` has 8 experts, windows of 32 and no scaling of positions. It trains on
the default text to a held-out loss of 1.462 nats a byte (2.11 bits).
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                 head_dim=32, d_ff=88, max_len=256),
    '20b': dict(d_model=2880, num_layers=24, num_heads=64, num_kv_heads=8,
                head_dim=64, d_ff=2880, max_len=131072, vocab_size=201088),
    '120b': dict(d_model=2880, num_layers=36, num_heads=64, num_kv_heads=8,
                 head_dim=64, d_ff=2880, max_len=131072, vocab_size=201088),
}
EXPERTS = {'tiny': 8, '20b': 32, '120b': 128}

# Published parameter counts, for tools.count.
PUBLISHED = {'20b': 20_914_757_184, '120b': 116_829_156_672}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='gpt_oss', position='rope', norm='rmsnorm', ffn='moe',
      block='pre_norm', pattern='local,global', attention_sinks=True,
      attention_bias=True, ffn_bias=True, tie_embeddings=False)
  window = 32 if size == 'tiny' else 128
  c.model.kinds = {'local': dict(window=window), 'global': dict(window=0)}
  c.model.moe.update(num_experts=EXPERTS[size], top_k=4, router='topk',
                     ffn='swiglu_clamped', logit_bias=True,
                     balance_weight=0.001)
  if size == 'tiny':
    return recipes.tiny(c)
  c.model.rope.update(theta=150_000.0, scaling='yarn', factor=32.0,
                      original_len=4096, truncate=False)
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=int(15e12 / 2**22), lr=3e-4)
