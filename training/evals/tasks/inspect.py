"""What happens inside a model as it reads --prompt, as one HTML page.

The text is shown to the model as in training, as far as the objective has a
way to show one. The decoder of an encoder-decoder is shown --target, or else
what the model itself writes. training/inspect says what is looked at.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.errors import require, short
from training.evals.task import Evaluation, Flag, Task, without
from training.evals.tasks import embed, fill_mask

FILE = 'inspect.html'
MOST = 512  # tokens, whose attention maps a browser can show
WRITTEN = 32  # tokens that an encoder-decoder writes, where none are given
REPEATED, ROWS = 25, 4  # random tokens that come twice, in some rows
NAMED = 16  # outliers, in the terminal
SPACES = str.maketrans({' ': '␣', '\n': '↵', '\t': '⇥', '\r': '␍'})


class Read(NamedTuple):
  """What the model reads.

  Attributes:
    arrays: the module's arguments by name, of one row.
    tokens: int [L], by stack.
    notes: sentences on how it came to be.
  """
  arrays: dict[str, np.ndarray]
  tokens: dict[str, np.ndarray]
  notes: list[str]


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Writes inspect.html into the workdir and prints a table of each stack."""
  from training.costs import totals
  from training.inspect import page
  from training.workdir import storage
  model, prompt = evaluation.run.model, evaluation.options.prompt
  read = _read(evaluation)
  top = min(evaluation.options.top_tokens, model.vocab_size)
  found = _record(evaluation, read.arrays, top)
  texts = {name: [readable(i, evaluation.tokenizer) for i in ids]
           for name, ids in read.tokens.items()}
  measures = by_head(found, _repeated(evaluation))
  about = [f'{model.arch} of {evaluation.workdir}, step {evaluation.step}, '
           f'reading {prompt!r}.', *read.notes,
           *totals.layers(model)]
  if found.lens is None:
    about.append("There is no logit lens: the model's head scores no tokens of "
                 'the vocabulary.')
  shown = page.Shown(f'Inside {model.arch}', about, texts,
                     lambda i: readable(i, evaluation.tokenizer), measures)
  path = evaluation.workdir / FILE
  storage.write(path, page.page(found, shown))
  for line in about[1:]:
    print(line)
  for name in found.stream:
    print(table(name, found, measures[name]))
  print(f'attention maps and all else: {path}')
  return _figures(found, texts, measures, shown.spell) | {'page': str(path)}


def _record(evaluation: Evaluation, arrays: Mapping[str, np.ndarray], top: int):
  """Returns the Inspection of the module's arguments."""
  from training.inspect import record
  look = evaluation.program(
      lambda: record.program(evaluation.run.module, top), 'inspect', top)
  return record.record(evaluation.run.model, arrays,
                       look(evaluation.params, dict(arrays)))


def _read(evaluation: Evaluation) -> Read:
  """Lays out --prompt, and --target of an encoder-decoder."""
  import architectures
  from training import chat, objectives
  from training.hf import generation as hf_generation
  run_, tokenizer = evaluation.run, evaluation.tokenizer
  prompt, target = evaluation.options.prompt, evaluation.options.target
  objective, stack = objectives.of(run_.config), architectures.stack(run_.model)
  require(not target or stack == 'encoder-decoder', f'--target is '
          f'{short(target)}, but a {stack} has no other text to be shown than '
          'its prompt')
  require(len(tokenizer.encode(prompt)) > 0, f'the prompt {short(prompt)} has '
          f'no token that the tokenizer {tokenizer.name!r} knows')
  if stack == 'encoder-decoder':
    prompts = objective.prompt([prompt], run_.config, tokenizer)
    source_1M = prompts.arguments['source_BM']
    shown_1L, notes = _target(evaluation, prompts)
    read = Read(dict(tokens_BM=source_1M, decoder_tokens_BL=shown_1L),
                dict(encoder=source_1M[0], decoder=shown_1L[0]), notes)
  elif objective.prompt is not None:
    prompts, _ = chat.shown([prompt], run_.config, tokenizer,
                            hf_generation.published(evaluation.workdir,
                                                    evaluation.step))
    read = Read(dict(tokens_BL=prompts.tokens, **prompts.arguments),
                {stack: prompts.tokens[0]}, [])
  else:
    before, after = embed.around(evaluation)
    ids_L = np.concatenate(
        [before, fill_mask.with_masks(prompt, tokenizer), after]
    ).astype(np.int32)
    read = Read(dict(tokens_BL=ids_L[None]), {stack: ids_L}, [])
  for name, ids_L in read.tokens.items():
    most = min(run_.model.max_len, MOST)
    require(len(ids_L) <= most, f'the {name} is shown {len(ids_L)} tokens, and '
            f'{most} can be shown: shorten the '
            f'{"--target" if name == "decoder" and target else "prompt"}')
  return read


def _target(evaluation: Evaluation, prompts: Any
            ) -> tuple[np.ndarray, list[str]]:
  """Returns what the decoder of an encoder-decoder is shown, [1, L]."""
  import jax

  from training import generate
  tokenizer, target = evaluation.tokenizer, evaluation.options.target
  start_1L, end = prompts.tokens, tokenizer.separator_id
  if target:
    ids = tokenizer.encode(target)
    note = f'The decoder is shown {target!r}.'
  else:
    # A longer source is refused afterwards.
    room = min(WRITTEN, evaluation.run.model.max_len - start_1L.shape[1])
    ids = generate.until(np.asarray(generate.generate(
        evaluation.run.module, evaluation.params, start_1L, prompts.lengths,
        jax.random.key(0), max_new_tokens=room, stop_token=end,
        sampling=generate.Sampling(temperature=0), **prompts.arguments))[0],
                         end)
    note = (f'The decoder is shown the {len(ids)} tokens that the model itself '
            f'writes: {tokenizer.decode(ids)!r}.')
  return np.concatenate([start_1L[0], ids]).astype(np.int32)[None], [note]


def _repeated(evaluation: Evaluation) -> np.ndarray | None:
  """Returns the induction score of each head of a decoder, [N, H], on random
  tokens that come twice; None of other models, and of very short ones."""
  import architectures
  model, tokenizer = evaluation.run.model, evaluation.tokenizer
  size = min(REPEATED, (model.max_len - 1) // 2)
  if architectures.stack(model) != 'decoder' or size < 4:
    return None
  usual = np.setdiff1d(np.arange(min(tokenizer.vocab_size, model.vocab_size)),
                       [*tokenizer.special_ids.values(),
                        *tokenizer.sentinel_ids])
  if len(usual) < size:  # tokens would come more than twice
    return None
  random = np.random.default_rng(0)
  drawn = np.stack([random.choice(usual, size, replace=False)
                    for _ in range(ROWS)])
  first = np.full((ROWS, 1), tokenizer.separator_id)
  arrays = dict(tokens_BL=np.concatenate([first, drawn, drawn], 1).astype(
      np.int32))
  found = _record(evaluation, arrays, 0)
  return found.attention['decoder'].induction.mean(1)


def by_head(found: Any, induction_NH: np.ndarray | None
            ) -> dict[str, dict[str, np.ndarray]]:
  """Returns one number a head of each figure, [N, H], by name of attention.

  Args:
    found: an Inspection, of whose rows the first counts.
    induction_NH: of a decoder, measured apart.
  """
  from training.inspect import page
  measures = {}
  for name, attention in found.attention.items():
    every_BL = found.real[page.QUERIES[name]]
    # A causal query sees nothing but the first token, where that is its own.
    later_BL = every_BL.copy()
    if name == 'decoder' and every_BL.shape[1] > 1:
      later_BL[:, 0] = False
    mean = lambda of, counted_BL, a=attention: a.by_head(of, counted_BL)[:, 0]
    measures[name] = {'entropy': mean('entropy', every_BL),
                      'first token': mean('first', later_BL)}
    if attention.sink.max() > 1e-3:
      measures[name]['learned sink'] = mean('sink', every_BL)
    if attention.previous is not None:
      measures[name]['previous token'] = attention.previous[:, 0]
    if name == 'decoder' and induction_NH is not None:
      measures[name]['induction'] = induction_NH
  return measures


def table(name: str, found: Any, measures: Mapping[str, np.ndarray]) -> str:
  """Returns a row for each layer of a stack: what a terminal has room for."""
  from training.inspect import page
  stream = found.stream[name]
  lines = [f'{name}, {found.tokens[name].shape[1]} tokens; of each figure of '
           'heads the mean, and the head with the most',
           f'{"layer":<10}{"norm":>9}  {"largest feature":<24}'
           + ''.join(f'{of:>20}' for of in measures)]
  for n, norms in enumerate(stream.norms[:, 0]):
    feature = page.largest(stream.peaks[n, 0])[0]
    size, rms = stream.peaks[n, 0, feature], stream.rms[n, 0]
    times = f'{size / rms:.1f} x rms' if rms else 'n/a'
    line = (f'{n - 1 if n else "embedding":<10}{norms.mean():>9.3g}  '
            f'{f"{feature}: {size:.3g} ({times})":<24}')
    for values in measures.values():
      line += f'{_told(values[n - 1]):>20}' if n else ''
    lines.append(line.rstrip())
  outliers = np.flatnonzero(stream.outliers[0]).tolist()
  named = ', '.join(map(str, outliers[:NAMED])) or 'none'
  lines.append('outlier features (Dettmers et al. 2022): ' + named + (
      f' and {len(outliers) - NAMED} more' if len(outliers) > NAMED else '')
               + '\n')
  return '\n'.join(lines)


def _told(values_H: np.ndarray) -> str:
  if np.isnan(values_H).all():
    return 'n/a'
  most = int(np.nanargmax(values_H))
  return f'{np.nanmean(values_H):.3f} ({most}: {values_H[most]:.3f})'


def readable(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader, its spaces and line breaks to be seen."""
  text = fill_mask.spelt(int(token), tokenizer)
  if token < tokenizer.vocab_size and not text.startswith(' ') and (
      tokenizer.piece(int(token)).startswith('▁')):
    text = ' ' + text  # sentencepiece takes it off
  text = text.translate(SPACES)
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _figures(found: Any, texts: Mapping[str, Sequence[str]],
             measures: Mapping[str, Mapping[str, np.ndarray]], spell: Any
             ) -> dict[str, Any]:
  """Returns what goes into --json; the maps themselves stand in the page."""
  figures = {
      'tokens': dict(texts),
      'attention': {name: {of: x.tolist() for of, x in row.items()}
                    for name, row in measures.items()},
      'stream': {name: {
          'norms': stream.norms[:, 0].tolist(),
          'median': stream.median[:, 0].tolist(),
          'rms': stream.rms[:, 0].tolist(),
          'outliers': np.flatnonzero(stream.outliers[0]).tolist()}
                 for name, stream in found.stream.items()},
      'experts': {name: {
          'layers': experts.layers.tolist(),
          'gates': experts.gates[:, 0].tolist(),
          'probabilities': experts.probabilities[:, 0].tolist()}
                  for name, experts in found.experts.items()}}
  if found.lens is not None:
    figures['lens'] = [
        [[dict(text=spell(i), id=i, probability=p) for i, p in zip(*cell)]
         for cell in zip(*layer)]
        for layer in zip(found.lens.ids[:, 0].tolist(),
                         found.lens.probabilities[:, 0].tolist())]
  return figures


def _check(options: Any) -> None:
  from training.data import texts
  require(bool(options.prompt.strip()), 'task inspect reads a text: pass '
          "--prompt='My fellow citizens'")
  require('|||' not in options.prompt, "task inspect shows one prompt: pass "
          "--prompt without '|||'")
  for name in ('prompt', 'target'):
    texts.checked(getattr(options, name), f'--{name}')


TASKS = {'inspect': Task(
    'attention maps, residual stream, logit lens and experts as the model '
    'reads --prompt, as an HTML page', run,
    without(embed.reads_text, embed.NO_TEXT), check=_check, file=FILE,
    held_out=False,
    flags=(
        Flag('prompt', '', 'The text to read.'),
        Flag('target', '', 'What the decoder of an encoder-decoder is shown; '
             'default: what the model writes.'),
        Flag('top_tokens', 5, 'So many tokens of each layer in the logit lens.',
             1, 1000)))}
