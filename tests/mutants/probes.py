"""Mutants of probes: from the rows of a task to the score card."""

MUTANTS = {
    'training/data/probes/__init__.py': [
        ("'eval': 1}", "'eval': 0}", 'probes: rows_differ'),
        ('levels[rng.integers(len(self._levels))]', 'levels[0]',
         'probes: every_level'),
        ('size <= chosen.length', 'size <= chosen.length + 64',
         'probes: cannot_be_drawn')],
    'training/data/probes/depo.py': [
        ('most if settings.test', 'most if not settings.test', 'probes: depo'),
        ('np.arange(3, most + 1) + most ** 0.5', 'np.arange(3, most + 1)',
         'probes: depo'),
        ('circle[(i + step) % count]', 'circle[(i - step) % count]',
         'probes: published')],
    'training/data/probes/mano.py': [
        ('[sign, *a, *b]', '[sign, *b, *a]', 'probes: published')],
    'training/data/probes/mqar.py': [
        ('slots ** (POWER - 1)', 'slots ** POWER', 'probes: law')],
    'training/data/probes/induction.py': [
        ('after[letter] = t + 1', 'after.setdefault(letter, t + 1)',
         'probes: published'),
        ('rng.integers(1, vocab, settings.length - 1)',
         'rng.integers(0, vocab, settings.length - 1)', 'probes: published')],
    'training/data/probes/recall.py': [
        ('again[first] = False', 'again[first] = True', 'probes: published')],
    'training/data/probes/states.py': [
        ('table[state, one]', 'table[one, state]', 'probes: published'),
        ('swaps % 2 == 0', 'swaps % 2 == 1', 'probes: published')],
    'training/objectives/probe.py': [
        ('config.objective == objective', 'True', 'probe: refused'),
        ("config.seed if corpus.split == 'train' else\n"
         '                     probes.held_out_seed(config)', 'config.seed',
         'probe: held_out'),
        ('or probes.of(config).hides', 'or True', 'probe: encoder'),
        ('weights=item.asked', 'weights=np.ones(len(item.tokens))',
         'probe: no_weight')],
    'training/evals/tasks/probe.py': [
        ('(right_BL | ~asked_BL)', 'right_BL', 'probe_accuracy: counts'),
        ('count + z2 / (4 * count ** 2)', 'count', 'probe_accuracy: wilson')],
    'tools/probes/card.py': [
        ('ddof=1', 'ddof=0', 'score_card: best_rate'),
        ('found = row', 'found = found or row', 'score_card: best_rate')]}
