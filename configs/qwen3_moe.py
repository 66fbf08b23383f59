"""Qwen3-MoE: `--config configs/qwen3_moe.py:SIZE`.

Lab note. Qwen3 Technical Report (Qwen Team 2025, arXiv 2505.09388), table 2:
layers, heads, 128 experts of which 8 work for a token, 128K of context (by YaRN
after training: the released config.json has 40,960, which is taken); widths,
vocabulary and theta are those of the released config.json. 36T tokens, most of
them 4,096 at a time; batch and learning rate follow scaling laws that are not
published, so those here are LLaMA 3's. Counts are those of the published
checkpoints. The weight of the balancing loss is that of config.json.

`tiny` has 16 experts of 44 hidden units, of which 8 work for a token. It trains
on the default text to a held-out loss of 1.535 nats a byte (2.21 bits).
"""

from configs import recipes

SIZES = {
    'tiny': dict(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2,
                 head_dim=48, d_ff=344, max_len=256),
    '30b-a3b': dict(d_model=2048, num_layers=48, num_heads=32, num_kv_heads=4,
                    head_dim=128, d_ff=6144, max_len=40960, vocab_size=151936),
    '235b-a22b': dict(d_model=4096, num_layers=94, num_heads=64,
                      num_kv_heads=4, head_dim=128, d_ff=12288, max_len=40960,
                      vocab_size=151936),
}
D_FF = {'tiny': 44, '30b-a3b': 768, '235b-a22b': 1536}  # of an expert

# Published parameter counts, for tools.count.
PUBLISHED = {'30b-a3b': 30_532_122_624, '235b-a22b': 235_093_634_560}


def get_config(size: str = 'tiny'):
  c = recipes.begin(
      size, SIZES, arch='qwen3_moe', position='rope', norm='rmsnorm',
      norm_eps=1e-6, ffn='moe', block='pre_norm', qk_norm=True,
      attention_bias=False, ffn_bias=False, tie_embeddings=False)
  c.model.moe.update(num_experts=128, top_k=8, router='topk', ffn='swiglu',
                     d_ff=D_FF[size], normalize_gates=True,
                     balance_weight=0.001)
  if size == 'tiny':
    c.model.moe.num_experts = 16
    return recipes.tiny(c)
  c.model.rope.theta = 1e6
  return recipes.pretraining(
      c, length=4096, batch_size=1024, steps=int(36e12 / 2**22), lr=3e-4)
