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

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff max_len '
    'moe.num_experts kinds.local.window', {
        'tiny': (128, 4, 4, 2, 32, 88, 256, 8, 32),
        '20b': (2880, 24, 64, 8, 64, 2880, 131072, 32, 128),
        '120b': (2880, 36, 64, 8, 64, 2880, 131072, 128, 128)})
for _size, _parameters in (('20b', 20_914_757_184), ('120b', 116_829_156_672)):
  SIZES[_size] |= dict(
      vocab_size=201088, parameters=_parameters, rope=dict(
          theta=150_000.0, scaling='yarn', factor=32.0, original_len=4096,
          truncate=False))

get_config = base.make_get_config(
    'gpt_oss', SIZES, dict(moe=dict(balance_weight=0.001)), length=4096,
    tokens=15e12)
