"""Mutants of words with labels and of questions: from files to measures."""

MUTANTS = {
    'training/data/conll.py': [
        ("label.startswith('I') and before[2:]",
         "label.startswith('I') and label[2:]", 'conll: no_entities'),
        ('own != shape if shape else', 'own == shape if shape else',
         'conll: sentences')],
    'training/data/offsets.py': [
        ('begin_T < spans_T2[:, 1]', 'begin_T <= spans_T2[:, 1]',
         'offsets: words or bytes'),
        ('np.minimum(before_WT, after_WT)', 'np.maximum(before_WT, after_WT)',
         'offsets: strides'),
        ('spans_T2[:, 1] > start', 'spans_T2[:, 1] >= start',
         'offsets: part')],
    'training/data/words.py': [
        ('& (owner_T[first:end] == i)', '', 'words: once'),
        ('words.first_T[first:end] &', '(words.words_T[first:end] >= 0) &',
         'words: first_tokens')],
    'training/data/questions.py': [
        ('first <= answer[0] and answer[1] < end', 'first <= answer[0] < end',
         'questions: rows_equal'),
        ('between) - len(asked)', 'between) - len(asked) - 1',
         'questions: rows_equal')],
    'training/objectives/question_answering.py': [
        ("batch['segment_ids'][..., None] != 0",
         "batch['segment_ids'][..., None] >= 0",
         'words_and_questions: padding'),
        ('length(item) - 1', 'length(item) - 2', 'questions: last_token'),
        ('places_BU).all(1)', 'places_BU).any(1)',
         'words_and_questions: padding')],
    'training/measures/squad_rules.py': [
        ('2 * same / (len(gold) + len(found))', 'same / len(gold)',
         'answers: official_rules'),
        ("_ARTICLES.sub(' ', text)", 'text', 'answers: official_rules')],
    'training/measures/spans.py': [
        ('null = min(', 'null = max(', 'answers: best_of_all'),
        ('np.arange(min(most, T))', 'np.arange(min(most + 1, T))',
         'answers: best_of_all'),
        ('may_be_null and gap > threshold', 'gap > threshold',
         'answers: best_of_all')]}
