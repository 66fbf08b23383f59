"""Mutants of what is asked of texts: log-probabilities, strides, tasks while
training."""

MUTANTS = {
    'training/timing.py': [
        ('if not self._pauses:', 'if True:', 'timing: within'),
        ('self._at_last and step == self._last', 'False', 'in_training: group'),
        ('step % self._every == 0)', 'step % self._every == 1)',
         'in_training: goes_on'),
        ('self._last % self._every > 0', 'True', 'timing: recurs'),
    ],
    'training/evals/scoring.py': [
        ('model = without_capacity(evaluation.run.model)',
         'model = evaluation.run.model', 'scoring: text_alone'),
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
}
