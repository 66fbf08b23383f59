"""Switch Transformer: `--config configs/switch.py:SIZE`.

Lab note. Fedus et al. 2021, table 9, on C4 with the objective of T5: 2^20
tokens a batch, Adafactor, capacity factor 1.25 in training and 2 in
evaluation, balance loss 0.01, jitter 0.01, dropout 0.1 with 0.4 in experts
when fine-tuning only. base-N are the published checkpoints (d_ff 3,072 and
ReLU, where the table has 2,048 and GEGLU: as many parameters); the paper's
Switch-Base (7B), -Large (26B), -XXL (395B) and -C (1,571B) are base-128,
large-128, xxl and c-2048.

Two rows of the table are read by its counts: XXL's 395B take 128 experts, as
the published checkpoint has, where the table says 64 (201B); and C has
experts in every layer, in 15 of either stack.

A group of capacity is one sequence of 512 tokens in the paper's code, whose
target is shorter; here `moe.group_size=0`, all of a batch, which needs no
divisor. z-loss 0.001 is ST-MoE's (Zoph et al. 2022), and that of the
published checkpoints' config.

Counts: base-16 is 1.07B, 2.5 % under its published 1.1B, which is rounded.

`tiny` trains in 3 minutes of one CPU core on rows of 64 bytes, to a held-out
loss of 2.396 nats a byte of the spans; the busiest expert has 1.04 times the
mean load in the encoder, 1.18 in the decoder. The loss is still falling there.
"""

from configs import base, t5

# The sizes of base are those of the paper's table of distilled models, where
# 1.1B of base-16 is 1.07B rounded up. It has no base-8, whose count is that of
# transformers' model of google/switch-base-8.
SIZES = base.table_of_sizes(
    'num_layers d_model num_heads d_ff moe.num_experts moe.ffn parameters', {
        **{f'base-{n}': (12, 768, 12, 3072, n, 'relu', parameters)
           for n, parameters in (
               (8, 619_339_008), (16, 1.1e9), (32, 2.0e9), (64, 3.8e9),
               (128, 7.4e9), (256, 14.7e9))},
        'large-128': (24, 1024, 16, 4096, 128, 'relu', 26e9),
        'xxl': (24, 4096, 64, 10240, 128, 'geglu_tanh', 395e9),
        'c-2048': (15, 2080, 32, 6144, 2048, 'relu', 1571e9)}, **t5.SAME)
SIZES['tiny'] = dict(num_layers=2, d_model=128, num_heads=4, head_dim=32,
                     d_ff=512, moe=dict(num_experts=4), length=64,
                     batch_size=32, steps=600)


def get_config(size: str = 'tiny'):
  """Returns the config of a run of Switch Transformers at one size of SIZES, as
  the paper trains it: half of the layers have experts."""
  config = t5.of('switch', sizes=SIZES, model=dict(init_scale=0.1, moe=dict(
      capacity_factor=1.25, eval_capacity_factor=2.0, jitter=0.01,
      balance_loss='switch', balance_weight=0.01, z_loss_weight=0.001)),
            batch_size=2048, steps=550_000)(size)
  # In this one, every layer has experts.
  if size == 'c-2048':
    config.model.pattern = ''
    config.model.kinds = {}
  return config
