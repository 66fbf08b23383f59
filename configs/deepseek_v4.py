"""DeepSeek-V4: `--config configs/deepseek_v4.py:SIZE`.

Lab note. DeepSeek-AI 2026 (arXiv 2606.19348): `flash`, 284B parameters of which
13B work for a token, trained on 32T tokens, and `pro`, 1.6T and 49B, on 33T; a
context of 1,048,576 tokens by yarn from 65,536. Sizes and the order of layers
are those of transformers' class and of public descriptions: neither config.json
was read itself. Counts are of transformers' classes, without the
module that predicts a second token and without buffers: the biases of routers,
and the tables of hashed experts, which a hash fills here. The optimiser was
Muon (`--config.optim.name=muon`); here it is AdamW. Batch and rates were not
looked up: they are those of DeepSeek-V3.

`tiny` has a layer of SWA, two of CSA and one of HCA. After 40 steps on the
default text its held-out loss is 2.449 nats a byte (3.53 bits).
"""

from architectures import deepseek_v4
from configs import base, deepseek_v2


def _layers(first: str, n: int) -> dict:
  return deepseek_v4.pattern_of_layers(
      [first] * 2 + ['hca' if i % 2 else 'csa' for i in range(n - 2)],
      [i < 3 for i in range(n)])


SIZES = base.table_of_sizes(
    'd_model num_layers num_heads compressed.q_rank compressed.out_groups '
    'indexer.top_k moe.num_experts moe.d_ff moe.gate_scale parameters', rows={
        'flash': (4096, 43, 64, 1024, 8, 512, 256, 2048, 1.5, 284_332_230_231),
        'pro': (7168, 61, 128, 1536, 16, 1024, 384, 3072, 2.5,
                1_572_997_179_491)},
    **{'rope.scaling': 'yarn', 'rope.factor': 16.0, 'rope.original_len': 65536,
       'compressed.out_rank': 1024, 'indexer.heads': 64,
       'indexer.head_dim': 128}, head_dim=512, max_len=1048576,
    vocab_size=129280, init='normal', init_stddev=0.006)
SIZES['flash'] |= _layers('swa', 43)
SIZES['pro'] |= _layers('hca', 61)
SIZES['tiny'] = deepseek_v4.pattern_of_layers(
    ['swa', 'csa', 'hca', 'csa'], [True, True, False, False]) | dict(
        d_model=128, num_layers=4, num_heads=4, head_dim=64, max_len=256,
        compressed=dict(window=32, hca_rate=16, out_groups=2, out_rank=32,
                        q_rank=64), indexer=dict(top_k=16, head_dim=32),
        moe=dict(num_experts=16, d_ff=48, gate_scale=1.5),
        rope=dict(fraction=0.25))

# The biases of routers, and the tables of hashed experts.
UNCOUNTED = {'flash': 40 * 256 + 3 * 129280 * 6,
             'pro': 58 * 384 + 3 * 129280 * 6}

get_config = base.make_get_config(
    'deepseek_v4', SIZES, dict(
        norm_eps=1e-6, moe=deepseek_v2.MOE | dict(balance_weight=0.0001)),
    length=4096, tokens=32e12, batch_size=15360, lr=2.2e-4)
