"""Mutants of labelled data: from files to rows, losses and measures."""

MUTANTS = {
    'training/data/labelled.py': [
        ('yield begin, row', 'yield rows.line_num, row',
         'labelled_files: stand_where'),
        ('if not named:\n      yield', 'if named:\n      yield',
         'labelled_files: stand_where'),
    ],
    'training/data/records.py': [
        ('return len(found) / (len(labels) * counts)',
         'return len(found) / counts', 'labelled_files: balanced'),
        ("if corpus.split == 'train' else None)", 'if True else None)',
         'labelled_files: balanced'),
        ('tuple(sorted(labels, key=int))', 'tuple(sorted(labels))',
         'labelled_files: in_order'),
        ('if sizes[0] <= sizes[1] else', 'if sizes[0] < sizes[1] else',
         'labelled_files: cut_as'),
    ],
    'training/objectives/labelled.py': [
        ('types += [number] * (len(ids) + end)', 'types += [number] * len(ids)',
         'labelled_rows: pictured'),
        ('smooth * log_p_BU.mean(-1)', 'smooth * log_p_BU.sum(-1)',
         'labelled_rows: torchs'),
        ('counts_B = (weights_B > 0)', 'counts_B = (weights_B >= 0)',
         'labelled_rows: torchs'),
    ],
    'training/measures/classes.py': [
        ('float(f1[1]) if count == 2', 'float(f1[0]) if count == 2',
         'labels: formulas'),
        ('get(text, len(labels))', 'get(text, len(labels) - 1)',
         'labels: never_right'),
    ],
}
