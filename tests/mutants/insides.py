"""Mutants of what looks inside a model."""

MUTANTS = {
    'training/insides/measures.py': [
        ('[weights_NBHLM, sink(weights_NBHLM)[..., None]]',
         '[weights_NBHLM, 0 * sink(weights_NBHLM)[..., None]]',
         'record: learned_sink'),
        ('offset=-1', 'offset=0', 'record: built'),
        ('follows_BLM[..., 1:] = same_BLM[..., :-1]', 'follows_BLM = same_BLM',
         'record: induction'),
        ('np.tri(L, k=-1, dtype=bool) & real_BL[:, :, None]',
         'np.tri(L, k=-1, dtype=bool)', 'record: induction'),
        ('.mean(0) >= LAYERS', '.mean(0) > LAYERS', 'record: dettmers'),
        ('large_NLD.mean((0, 1)) >= TOKENS', 'large_NLD.mean((0, 1)) >= 0',
         'record: dettmers'),
    ],
    'training/insides/record.py': [
        ("output.aux['readouts']", "output.aux['layers']", 'record: lens'),
        ('x_NLD.max(1)', 'x_NLD.mean(1)', 'record: peaks'),
        ('states_NBLD[:, b, real_L]', 'states_NBLD[:, b]', 'record: peaks'),
        ("kept['lens'][::-1]", "kept['lens']", 'record: own_prediction'),
    ],
    'training/evals/tasks/inspect.py': [
        ('later_BL[:, 0] = False', 'later_BL[:, 0] = True',
         'inspect: after_the_separator'),
        ('[first, drawn, drawn]', '[first, drawn, drawn[:, ::-1]]',
         'inspect: random_tokens'),
    ],
}
