"""Mutants of what is asked of texts: log-probabilities, strides, tasks while
training."""

MUTANTS = {
    'training/evals/scoring.py': [
        ('question.tokens[end - question.scored + 1:])',
         'question.tokens[end - question.scored:end])', 'scoring: text_alone'),
        ('longest.startswith(keys[i])', 'True', 'scoring: beginnings'),
        ('config=without_capacity(evaluation.run.model))',
         'config=evaluation.run.model)', 'scoring: text_alone'),
        ('count = -(-count // shards) * shards', 'pass', 'scoring: shapes'),
        ("objective.stacks == ('decoder',) and objective.prompt",
         'objective.prompt', 'lm_eval: probability'),
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
