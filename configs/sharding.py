"""Where each logical axis goes: the one table from model axes to mesh axes.

A rule is (logical axis, mesh axes). Rules are tried from the top; a mesh axis
serves one dimension of an array at most, so `embed` is sharded over `fsdp` in
a weight and not in an activation, whose batch took `fsdp` first. If a logical
axis has two rules, the second one is for arrays in which another dimension has
taken a mesh axis of the first.
"""

MESH_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

# architectures/parts/sharding.py says what each logical axis is.
RULES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    # Weights are sharded over fsdp (ZeRO-3), and those other than the experts'
    # over expert too; heads and mlp over tensor (Megatron), experts over
    # expert, a sequence over context, and the batch over all that is left. What
    # goes from layer to layer, and its norms, lie over tensor too (sequence
    # parallelism: Korthikanti et al. 2022, arXiv 2205.05198).
    'default': (
        ('batch', ('data', 'fsdp', 'expert')),
        ('experts', ('expert',)),
        ('vocab', ('tensor',)),
        ('mlp', ('tensor',)),
        ('heads', ('tensor',)),
        ('kv_heads', ('tensor',)),
        ('groups', ('tensor',)),
        ('joined', ('tensor',)),
        ('embed', ('fsdp', 'expert')),
        ('embed', ('fsdp',)),
        ('latent', ('fsdp', 'expert')),
        ('rows', ('fsdp',)),
        ('table', ('fsdp', 'expert')),
        ('length', ('context',)),
        ('stream', ('context', 'tensor')),
        ('tokens', ('data', 'fsdp', 'expert', 'context')),
        ('head', ()),
        ('features', ()),
        ('capacity', ()),
        ('layers', ()),
    ),
}
# Weights whole on every device of (data, fsdp): for small models.
RULES['replicated'] = tuple(
    (axis, () if axis in ('embed', 'latent', 'rows', 'table') else mesh)
    for axis, mesh in RULES['default'])

# Mesh shapes by name, for tests, docs and `--mesh` of the tools: 8 devices.
PRESETS = {
    'dp': dict(data=8, fsdp=1, expert=1, context=1, tensor=1),
    'fsdp': dict(data=1, fsdp=8, expert=1, context=1, tensor=1),
    'tp': dict(data=2, fsdp=1, expert=1, context=1, tensor=4),
    'fsdp_tp': dict(data=1, fsdp=4, expert=1, context=1, tensor=2),
    'ep': dict(data=2, fsdp=1, expert=4, context=1, tensor=1),
    'cp': dict(data=2, fsdp=1, expert=1, context=4, tensor=1),
    'cp_fsdp_tp': dict(data=1, fsdp=2, expert=1, context=2, tensor=2),
    'ep_cp': dict(data=1, fsdp=1, expert=4, context=2, tensor=1),
    'ep_fsdp_tp': dict(data=1, fsdp=2, expert=2, context=1, tensor=2),
}
