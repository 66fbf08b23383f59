"""Mutants of studies: from the runs that a phase asks for to the verdict."""

MUTANTS = {
    'tools/compare/decide.py': [
        ("'fdr_bh')", "'holm')",
         'decide: screening'),
        ('plan.sizes[0], measure.workload)\n    values',
         'plan.sizes[-1], measure.workload)\n    values', 'decide: screening'),
        ('q <= plan.q and not unstable', 'q <= plan.q',
         'decide: diverges_too_often'),
        ('mean * measure.sign > 0', 'mean > 0', 'decide: lower'),
        ('  elif not one_way:', '  elif not sizes:', 'decide: point_apart'),
        ('unstable = unstable or p_diverged', 'unstable = p_diverged',
         'decide: too_often'),
        ('unstable or p_diverged <= plan.alpha', 'unstable',
         'decide: more_than_the_base'),
        ('          if not any(x.diverged for x in pair)]', '          ]',
         'decide: in_no_mean'),
        ("alternative='greater'", "alternative='two-sided'",
         'decide: more_than_the_base'),
        ('share / _tests(plan, measure, phase)', 'share / len(plan.variants)',
         'power: noise_rows')],
    'tools/compare/speed.py': [
        ('math.log10(next', 'math.log(next', 'decide: trend'),
        ('if None in ratios', 'if None is ratios', 'decide: speed_up')],
    'tools/compare/tuning.py': [
        ("-measure.sign * row['value']", "row['value']",
         'phases: own_best'),
        ('math.ceil(tuning.keep * candidates)',
         'math.floor(tuning.keep * candidates)', 'phases: better_half'),
        ('edge * edge / inner', '2 * edge', 'phases: edge_moves'),
        ('moved == tuning.extend', 'moved > tuning.extend',
         'phases: edge_moves'),
        ("return row['diverged'], ", 'return ', 'phases: worst')],
    'tools/compare/phases.py': [
        ("'first' if phase == 'tune'", "'second' if phase == 'tune'",
         'phases: asks'),
        ('else (plan.primary.workload,)', 'else plan.workloads',
         'phases: asks'),
        ('(value * short / steps)', '(value)', 'phases: short_rung'),
        ('not found.announced.enough and not anyway',
         'not found.announced.enough and anyway', 'phases: too_weak')],
    'tools/compare/plan.py': [
        ('.index(phase) * self.APART', '.index(phase)', 'plan: no_seed'),
        ('1 if self.better == HIGHER', '1 if self.better == LOWER',
         'plan: improvement')],
    'tools/compare/power.py': [
        ('need = np.maximum(need, means.max(1))', 'pass', 'power: agree'),
        ('/ _spread(round(df, 1), sizes + 1, dims)', '', 'power: estimated')],
    'tools/compare/trainer.py': [
        ('loss > GUESSING * self', 'loss > self',
         'study_run: learnt_nothing'),
        ('        if (row.point, row.seed) not in wanted:',
         '        if not wanted:', 'study_run: leaves_out')],
    'tools/compare/study_run.py': [
        ("note['time'] >= since", 'True', 'study_run: weak')]}
