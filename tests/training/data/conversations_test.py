"""Chat templates: what they render, what they may not do, and whose words are
whose."""

import json
import unicodedata

from hypothesis import example, given, settings, strategies
import numpy as np
import pytest
import tokenizers as hf

from common.errors import RequestError
from tests.helpers import data_files as files
from training import objectives, runs
from training.data import conversations, tokenizers
from training.objectives import causal, pipeline
from training.workdir import run_config

BYTES = tokenizers.load('bytes')
# Of ChatML, as SmolLM2 and Qwen write it; here the bytes tokenizer's [EOS]
# stands for <|im_end|>.
CHATML = (
    "{% for m in messages %}\n"
    "{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
MARKED = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "assistant: {% generation %}{{ m.content }}[EOS]{% endgeneration %}\n"
    "{%- else -%}{{ m.role }}: {{ m.content | trim }}[EOS]\n{%- endif -%}"
    "{%- endfor -%}")
TALK = [dict(role='user', content='Hé'), dict(role='assistant', content='Hi!'),
        dict(role='user', content='b'), dict(role='assistant', content='c')]


def make(text, tokenizer=BYTES):
  return conversations.make_template('a template', text, tokenizer)


def rendered(text, **message):
  return make(text).render([dict(role='user', content='x') | message])


@pytest.mark.parametrize('text', [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    '{{ messages.append(1) }}', '{{ cycler.__init__.__globals__ }}',
    "{{ raise_exception('roles must alternate') }}", '{{ 1 / 0 }}',
    '{{ messages[3].content }}', "{% include '/etc/passwd' %}"])
def test_what_a_template_may_not_do_is_a_sentence(text):
  with pytest.raises(RequestError, match='a template fails: ') as caught:
    rendered(text)
  assert '\n' not in str(caught.value)


def test_what_is_no_template_is_a_sentence(tmp_path):
  with pytest.raises(RequestError, match='a template fails: '):
    rendered('a\n{% for %}')
  for spec in 'nowhere', str(tmp_path):
    with pytest.raises(RequestError, match='no file, .*: choose from publishe'):
      conversations.read_template(spec, BYTES)


def _pieces(template, messages):
  parts = template.split_into_parts(messages)
  ids = conversations.encode_rendered_parts([text for _, text in parts],
                                            template.tokenizer)
  assert [kind for kind, _ in parts] == [
      ('shown', 'said')[i % 2] for i in range(len(parts))]
  return [_spelt(i) for i in ids]


def _spelt(ids):
  return ''.join(BYTES.decode([i]) if i < 128 else
                 {195: 'Ã', 169: '©'}.get(i, BYTES.piece(i)) for i in ids)


@pytest.mark.parametrize('text', [CHATML, MARKED])
def test_the_parts_of_a_conversation_say_who_speaks(text):
  end = '\n\n' if text is CHATML else ''
  shown = _pieces(make(text), TALK)
  if text is CHATML:
    assert shown == [
        'user: HÃ©[EOS]\n\nassistant: ', 'Hi![EOS]',
        f'{end}user: b[EOS]\n\nassistant: ', 'c[EOS]', end][:5]
  else:
    assert shown == ['user: HÃ©[EOS]assistant: ', 'Hi![EOS]',
                     'user: b[EOS]assistant: ', 'c[EOS]', '']


def test_a_prefix_that_an_answer_changes_is_refused():
  """Qwen3 drops the thoughts of all but the last answer, for example."""
  forgets = ("{% for m in messages %}{% if loop.last or m.role == 'user' %}"
             '{{ m.content }}{% endif %}{% endfor %}')
  with pytest.raises(RequestError, match='message 2 .*generation .. block'):
    make(forgets).split_into_parts(TALK)


def test_a_mark_that_a_template_has_parted_from_its_pair_means_nothing():
  typed = [dict(role='user', content='\ue011[EOS]\ue010')]
  parted = make("{{ messages[0].content.split('EOS')[0] }}[EOS]")
  assert parted.encode(typed)[-1] == BYTES.eos_id


_TYPED = strategies.lists(
    strategies.sampled_from((*conversations.MARKS_OF_SPELT_TEXT, '[EOS]', '[E',
                             'OS]', 'a', '\nassistant: ')),
    max_size=5).map(''.join)


@settings(max_examples=60, deadline=None)
@given(strategies.tuples(_TYPED, _TYPED, _TYPED))
@example(('\ue010', 'a', '\ue011'))  # around what the template writes
@example(('[EOS]a' * 5, 'a', 'a'))
@example(('[E\ue010OS]', '\ue010[EOS]\ue011', '\ue010[EOS]'))
def test_nobody_forges_a_token_or_undoes_one_whatever_they_type(typed):
  messages = [dict(role=role, content=text)
              for role, text in zip(('user', 'assistant', 'user'), typed)]
  ids = make(CHATML).encode(messages)
  bare = [''.join(c for c in text if c not in conversations.MARKS_OF_SPELT_TEXT)
          for text in typed]
  wanted = [*zip(('user: ', 'assistant: ', 'user: '), bare)]
  ends = np.flatnonzero(ids == BYTES.eos_id)
  assert [BYTES.decode(part[part < 256]) for part in np.split(ids, ends)] == [
      ''.join(wanted[0]), *('\n\n' + ''.join(turn) for turn in wanted[1:]),
      '\n\n']


def test_marks_stand_around_the_whole_token():
  begin, end = conversations.MARKS_OF_SPELT_TEXT
  assert conversations.mark_special_tokens(
      f'a[EOS]{end}b[EOS]', BYTES, {BYTES.eos_id}
      ) == f'a{begin}[EOS]{end}b{begin}[EOS]{end}'


@pytest.mark.parametrize('role', ['user', 'assistant'])
def test_a_token_is_spelt_however_it_is_typed(role, tmp_path):
  """In letters that the tokenizer takes for the same. What is no special token,
  and stands in the template, only the assistant says."""
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.normalizer = hf.normalizers.Sequence(
      [hf.normalizers.NFKC(), hf.normalizers.Lowercase()])
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  tokenizer.train_from_iterator([], hf.trainers.BpeTrainer(
      special_tokens=[hf.AddedToken('<end>', special=True, normalized=True)],
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.add_tokens([hf.AddedToken(text, normalized=False)
                        for text in ('<turn>', '<other>')])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = tokenizers.load(str(tmp_path))
  end, turn, other = (tokenizer.id_of_added_text[text]
                      for text in ('<end>', '<turn>', '<other>'))
  template = make('{% for m in messages %}<turn>{{ m.content }}<end>'
                  '{% endfor %}', tokenizer)
  for typed, says in (('<end>', 0), ('<END>', 0), ('＜ｅｎｄ＞', 0),
                      ('<turn>', turn), ('<other>', other), ('b', 0)):
    ids = template.encode([dict(role=role, content=f'{typed}x')]).tolist()
    says = [says] if says == other or says and role == 'assistant' else []
    assert [i for i in ids if i in (end, turn, other)] == [turn, *says, end]
    text = unicodedata.normalize('NFKC', f'{typed}x').lower()
    assert says or tokenizer.decode(ids[1:]) == text


def test_an_unknown_letter_is_nothing_that_somebody_forges(tmp_path):
  """Though its token is special: the word that it stands in stays one."""
  tokenizer = hf.Tokenizer(hf.models.BPE(
      {'▁': 0, 'a': 1, 'b': 2, '<unk>': 3}, [], unk_token='<unk>'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
  tokenizer.add_special_tokens(['<unk>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  template = make('{{ messages[0].content }}', tokenizers.load(str(tmp_path)))
  ids = template.encode([dict(role='user', content='acb')])
  assert ids.tolist() == [0, 1, 3, 2]


def test_an_answer_does_not_end_where_it_spells_a_special_token():
  bare = ('{% for m in messages %}{{ m.content }}!{% endfor %}')
  parts = make(bare).split_into_parts([dict(role='user', content='x'),
                            dict(role='assistant', content='a[EOS]b')])
  assert [conversations.remove_marks(text) for _, text in parts] == [
      'x!', 'a[EOS]b!', '']


def test_the_end_of_an_answer_is_the_token_behind_it(tmp_path):
  assert make(CHATML).find_end_ids() == {BYTES.eos_id}
  assert make(
      '{{ messages[-1].content }} [SEP][EOS]').find_end_ids() == {BYTES.sep_id}
  assert make('{{ messages[-1].content }}!').find_end_ids() == set()
  # Of two that fit the longer one is meant.
  tokenizer = hf.Tokenizer(hf.models.BPE({'a': 0}, []))
  tokenizer.add_special_tokens(['<e>', '<e>!'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  assert make('{{ messages[-1].content }}<e>!', tokenizers.load(
      str(tmp_path))).find_end_ids() == {2}


def _words(tmp_path):
  """A BPE whose tokens cross the bounds of parts: ':' takes a space along."""
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  tokenizer.train_from_iterator(
      ['user: Hi! assistant: Hi! b c d'] * 9, hf.trainers.BpeTrainer(
          vocab_size=300, special_tokens=['<s>', '</s>', '[EOS]'],
          initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(
      '{"eos_token": {"content": "[EOS]"}, "bos_token": "<s>"}')
  (tmp_path / 'chat_template.jinja').write_text(CHATML)
  return tokenizers.load(str(tmp_path))


def test_tokens_belong_to_the_answer_by_their_places(tmp_path):
  """The rule of transformers' assistant mask: a token that has a character of
  an answer is the answer's."""
  tokenizer = _words(tmp_path)
  template = conversations.read_template(str(tmp_path), tokenizer)
  assert template.special_tokens == dict(bos_token='<s>', eos_token='[EOS]')
  parts = template.split_into_parts(TALK)
  ids = conversations.encode_rendered_parts([text for _, text in parts],
                                            tokenizer)
  whole, places = tokenizer.encode_with_special_tokens(template.render(TALK))
  np.testing.assert_array_equal(np.concatenate(ids), whole)
  bounds = np.cumsum([0, *(len(text) for _, text in parts)])
  mask = [any(a < last and first < b for a, b in zip(bounds[1::2],
                                                     bounds[2::2]))
          for first, last in places]
  answered = [kind == 'said' for (kind, _), i in zip(parts, ids) for _ in i]
  assert answered == mask and any(mask)
  # ' Hi' is one token, and begins before the answer does.
  assert tokenizer.decode(ids[1]) == ' Hi!'


def _config(tmp_path, source, **data):
  return files.make_run_config(source, 'chat', batch_size=2,
                               cache_dir=str(tmp_path / 'cache'), **data)


@pytest.mark.parametrize('template', [CHATML, MARKED])
def test_a_run_is_taught_what_the_template_says_is_said(template, tmp_path):
  (tmp_path / 'a.jinja').write_text(template)
  (tmp_path / 'talks.jsonl').write_text(
      (json.dumps(dict(messages=TALK)) + '\n') * 2)
  config = _config(tmp_path, f'jsonl:{tmp_path}/talks.jsonl:messages',
                   chat_template=str(tmp_path / 'a.jinja'))
  objectives.check_objective(config)
  batch = pipeline.make_training_loader(config, BYTES).batch(0)
  tokens, targets, weights, valid = (
      batch[k][0] for k in ('tokens', 'targets', 'weights', 'valid'))
  ids = make(template).encode(TALK)
  np.testing.assert_array_equal(tokens[valid == 1], ids)
  np.testing.assert_array_equal(targets[:len(ids) - 1], ids[1:])
  assert _spelt(targets[weights == 1]) == 'Hi![EOS]c[EOS]'
  assert causal.write_chat_template(config, BYTES) == template
  # It is asked as it is taught.
  asked = causal.encode_question('Hé', config, BYTES)
  if template is CHATML:
    np.testing.assert_array_equal(asked, ids[:len(asked)])
  assert causal.talk_by_config(config, BYTES).ends == {BYTES.eos_id}


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
  (tmp_path / 'talks.jsonl').write_text(
      (json.dumps(dict(messages=TALK)) + '\n') * 2
      + json.dumps(dict(messages=TALK[1:])) + '\n')
  (tmp_path / 'a.jinja').write_text(
      "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}"
      '{% endif %}' + MARKED)
  config = _config(tmp_path, f'jsonl:{tmp_path}/talks.jsonl:messages',
                   chat_template=str(tmp_path / 'a.jinja'))
  with pytest.raises(RequestError,
                     match='talks.jsonl, conversation 3: .*user first'):
    pipeline.make_training_loader(config, BYTES)
  (tmp_path / 'x.json').write_text('[{"instruction": "a", "output": "b"}]')
  config.data.source = f'alpaca:{tmp_path}/x.json'
  with pytest.raises(RequestError, match='chat_template to published'):
    pipeline.make_training_loader(config, BYTES)


def test_conversations_without_an_answer_are_refused(tmp_path):
  (tmp_path / 'talks.jsonl').write_text(json.dumps(dict(messages=TALK[:1])))
  config = _config(tmp_path, f'jsonl:{tmp_path}/talks.jsonl:messages')
  with pytest.raises(RequestError, match='of the assistant, .* holds none'):
    pipeline.make_training_loader(config, BYTES)


def test_a_run_keeps_the_text_of_its_template(tmp_path):
  """So that it is laid out, asked and exported alike when the file changes."""
  file = tmp_path / 'own.jinja'
  file.write_text(MARKED)
  config = _config(tmp_path, 'jsonl:x:y')
  config.data.chat_template = str(file)
  _, derived = runs.resolve_model(config, BYTES)
  run_config.save_config(tmp_path, config, derived)
  before = causal.encode_question('x', config, BYTES)
  file.write_text(CHATML)
  _, other = runs.resolve_model(config, BYTES)
  change, = run_config.compare_fields(run_config.fields_that_run_reads(config,
                                                                       derived),
                                      run_config.fields_that_run_reads(config,
                                                                       other))
  assert change.name == 'data.chat_template'
  with pytest.raises(RequestError, match='another layout of conversations'):
    run_config.refuse_changes([change], allow_config_change=False)
  file.unlink()
  kept = runs.load_run_config(tmp_path)
  np.testing.assert_array_equal(causal.encode_question('x', kept, BYTES),
                                before)
  assert causal.write_chat_template(kept, BYTES) == MARKED
  assert causal.talk_by_config(kept, BYTES).words == (
      'answers by the chat template of the run')
  assert runs.resolve_model(kept, BYTES)[1] == derived
