"""Mutants of what is asked of texts: log-probabilities, strides, tasks while
training."""

MUTANTS = {
    'training/evals/scoring.py': [
        ('config=without_capacity(evaluation.run.model))',
         'config=evaluation.run.model)', 'scoring: text_alone'),
        ('-(-len(groups[0]) // shards) * shards', 'len(groups[0])',
         'scoring: shapes'),
        ('i * shape.length + row.places', 'row.places', 'scoring: text_alone'),
        ('if len(others) * _work(room, width) < work:', 'if False:',
         'scoring: less_work'),
        ("objective.stacks == ('decoder',) and objective.prompt",
         'objective.prompt', 'lm_eval: probability'),
    ],
    'training/evals/trees.py': [
        ('reach[places] = end', 'reach[places] = self.length',
         'scoring: by_hand'),
        ('question.tokens[-question.scored:]))', 'question.tokens['
         '-question.scored - 1:-1]))', 'scoring: by_hand'),
        ('shared < order.lengths[n - 1]', 'shared', 'scoring: by_hand'),
        ('used = length\n', 'pass\n', 'scoring: by_hand'),
    ],
    'training/evals/strided.py': [
        ('yield Question(ids[start:stop], stop - done)',
         'yield Question(ids[start:stop], stop - start - 1)',
         'strided: windows_end'),
        ("len(text.split()) + text.count('\\n')", 'len(text.split())',
         'strided: predicted_once'),
        ('np.concatenate([[first], ids])', 'ids', 'strided: predicted_once'),
    ],
    'training/evals/in_training.py': [
        ('n == self._last or', '', 'in_training: group'),
        ('n % self._every == 0)', 'n % self._every == 1)',
         'in_training: goes_on'),
    ],
}
