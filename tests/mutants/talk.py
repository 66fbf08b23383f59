"""Mutants of conversations: templates, the engine, the stream, the sampler."""

MUTANTS = {
    'training/data/chat_templates.py': [
        ('(len(asked), self._up_to_special(answered, len(asked)))',
         '(len(asked), len(answered))',
         'chat_templates: who_speaks'),
        ('places_T2[:, 1] <= end if number % 2 == 0',
         'places_T2[:, 0] < end if number % 2 == 0',
         'chat_templates: by_their_places'),
        ('{key: marked(value, self.tokenizer)', '{key: value',
         'chat_templates: somebody_types'),
        ('and text.startswith(answered))', 'and text)',
         'chat_templates: changes_is_refused'),
        ('sort_keys=True)\n    return hashlib', 'sort_keys=True)[:9]\n'
         '    return hashlib', 'chat_templates: another_entry'),
    ],
    'training/data/jinja_sandbox.py': [
        ('trim_blocks=True, lstrip_blocks=True,', 'trim_blocks=True,',
         'chat_templates: blocks_are_trimmed'),
        ('jinja2.sandbox.ImmutableSandboxedEnvironment)',
         'jinja2.sandbox.SandboxedEnvironment)',
         'chat_templates: may_not_do'),
        ("    _refuse_hidden(name)\n    super()", '    super()',
         'chat_templates: may_not_do'),
    ],
    'training/chat/engine.py': [
        ('_shared(self._ids, ids[:-1])', '_shared(self._ids[:0], ids[:-1])',
         'engine: two_turns'),
        ('if left <= size <= room]', 'if left <= size]', 'engine: two_turns'),
        ('np.int32(len(piece) - 1)', 'np.int32(size - 1)',
         'engine: two_turns'),
        ('different[0]) if', 'different[-1]) if', 'engine: read_again'),
        ('self._key, key = jax.random.split(self._key)', 'key = self._key',
         'engine: follow_the_seed'),
        ('seen_1V[0, ids] = True', 'seen_1V[0, ids[-1:]] = True',
         'engine: penalty'),
    ],
    'training/chat/stream.py': [
        ("'replace').decode(data, whole)", "'replace').decode(data, True)",
         'stream: held_back', 'the characters that stand for cut ones are '
         'held back, too'),
        ('range(1, len(stop))', 'range(1, len(stop) - 1)',
         'stream: held_back'),
        ('return text.removeprefix(self._lead)', 'return text',
         'stream: lead'),
    ],
    'training/chat/session.py': [
        ('if len(ids) >= self._engine.context', 'if len(ids) > 999',
         'session: too_long'),
        ('if token in self._talk.ends', 'if token == 258',
         'session: folder_says'),
    ],
    'training/generate.py': [
        ('(logits_BV == top_B1) | jnp.isnan(logits_BV)', 'logits_BV == top_B1',
         'generate: likeliest'),
        ('jnp.where(best_BV, jnp.arange(V)[None], V).min(-1)',
         'jnp.where(best_BV, jnp.arange(V)[None], -1).max(-1)',
         'generate: likeliest'),
        ('logits_BV < 0, logits_BV * penalty', 'logits_BV < 0, logits_BV / '
         'penalty', 'generate: against_loops'),
        ('self.min_p * p_BV.max(', 'self.min_p + 0 * p_BV.max(',
         'generate: against_loops'),
        ('jnp.where(real_BL, prompts_BL, V)', 'prompts_BL',
         'generate: counts_the_prompt'),
    ],
}
