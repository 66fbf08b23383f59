"""Batches: from data.source to dicts of arrays, in an order fixed by the seed.

Which tokens are in global batch n is a pure function of (seed, n). Row r of
batch n is example g = n B + r of one endless sequence: a permutation of all
windows, then another one, and so on, or for a mixture such sequences
interleaved by weight. Process p of P takes rows p B/P to (p+1) B/P and loads
only those. So a run may stop at any n and go on with any number of processes or
threads, and the state of the data is n.

Batches may grow: data.batch_ramp is a text such as '100:8,300:16', batches of 8
rows until step 100, of 16 until step 300, and of data.batch_size from there on.
n B is then the number of all rows before batch n, so that row g is in one batch
alone, whatever the sizes are. Each size is a compiled program, so that there
are few.
"""

import bisect
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import sys

import numpy as np

from common.errors import RequestError
from training import objectives, plugins
from training.data import conversations, labelled, sources, tokens
from training.data.tokenizers import Tokenizer
from training.objectives import Config

EVAL_SEED = 0  # One order of evaluation for all runs, whatever their seed.
# So many batches are prepared ahead, or as many as there are threads.
NUM_PREPARED_BATCHES = 4
MOST_BATCH_SIZES = 15  # of batches that grow, beside data.batch_size


class Loader:
  """The batches of one split for one process.

  Attributes:
    name: the source or sources, as written in the config.
    share: what it counts in the mean over the sources that are held out.
    text: whose tokens these are, in words.
    views: what the objective makes rows of, for each source.
    num_windows: examples in one pass over the split, which `cut` may lessen.
    num_batches: batches in one pass. An 'eval' loader ends there, its last
      batch filled up with rows of weight zero, so that each token counts
      exactly once; a 'train' loader never ends.
    num_tokens: tokens of the text that one pass reads.
    num_bytes: UTF-8 bytes of that text.
    bytes_per_token: bits per byte = nats per token / (ln 2 x this).
    ramp: the rows of each batch.
    tokenizer: the tokenizer of the run.
    objective: the objective of the run.
    beside: the loaders whose batches have the shape of this one's: those of
      runs that train as one program, each with its own seed.
  """

  def __init__(self, name: str, share: float, text: str, dataset: Sequence,
               views: Sequence, config: Config, tokenizer: Tokenizer,
               split: str, process_index: int, process_count: int):
    """Counts the batches of this process."""
    self.name = name
    self.share = share
    self.text = text
    self.views = views
    self._dataset = dataset
    self._config = config
    self.tokenizer = tokenizer
    self._split = split
    self.objective = objectives.find_objective(config)
    self.beside: Sequence[Loader] = [self]
    self._place = process_index, process_count

    # The sizes of batches, and the lengths of their rows.
    if split == 'train':
      self.ramp = read_ramp(config)
    else:
      self.ramp = parse_ramp('', config.data.batch_size)
    self._config_of = {}
    for length in padded_lengths(config):
      self._config_of[length] = config.copy_and_resolve_references()
      self._config_of[length].data.length = length

    # How much there is.
    self.num_windows = sum(len(view) for view in views)
    self.cut(0)
    self.num_tokens = sum(view.num_tokens for view in views)
    self.num_bytes = sum(view.num_bytes for view in views)
    self.bytes_per_token = self.num_bytes / self.num_tokens

  def cut(self, rows: int) -> 'Loader':
    """Returns this 'eval' loader, whose pass ends after so many rows from here
    on, however many are in a batch; 0: after all."""
    self.num_windows = min(rows or self.num_windows, self.num_windows)
    self.num_batches = -(-self.num_windows // self._config.data.batch_size)
    return self

  def place(self, n: int) -> int:
    """Returns which item of its view row n of what is held out is."""
    return int(self._dataset.places[n])

  def first(self, batches: int) -> int:
    """Returns how many batches of a pass `batches` are; 0: all."""
    return min(batches or self.num_batches, self.num_batches)

  def batch(self, n: int) -> dict[str, np.ndarray]:
    """Returns this process's rows of global batch n, each array [rows, ...].
    """
    n = int(n)
    if not 0 <= n < self._stop:
      raise IndexError(f'batch {n} of {self._stop}')

    # The rows of this process, at the length of the longest row anywhere.
    index, count = self._place
    size = self.ramp.rows(n) // count
    first = int(self.ramp.before(n)) + index * size
    places = range(first, first + size)
    length = max(loader.length(n) for loader in self.beside)
    rows = [(self._item(g), self._rng(g)) for g in places]
    batch = self.objective.batch(rows, self._config_of[length], self.tokenizer)

    # Padding counts nothing and takes no expert's room.
    padding = [self._is_padding(g) for g in places]
    if any(padding):
      for key, values in batch.items():
        if key.endswith(('weights', 'segment_ids', 'valid')):
          values[padding] = 0
    return batch

  def length(self, n: int) -> int:
    """Returns the data.length of global batch n: the least of `lengths` that
    its longest row fits into, whichever process has that row."""
    if not self.objective.has_lengths or len(self._config_of) == 1:
      return self._config.data.length
    first, end = map(int, self.ramp.before([n, n + 1]))
    sizes = [self.objective.length(self._item(g)) for g in range(first, end)]
    longest = max(sizes)
    return min(length for length in self._config_of if length >= longest)

  def iterate(self, start: int = 0, stop: int | None = None
              ) -> Iterator[dict[str, np.ndarray]]:
    """Yields batch(start), ..., batch(stop - 1), prepared ahead.

    Give `stop` where it is known: batches that no one takes are work for
    nothing.
    """
    import grain
    stop = self._stop if stop is None else min(stop, self._stop)
    if start >= stop:
      return
    # Some batches are prepared while the devices compute.
    threads = self._config.data.threads
    options = grain.ReadOptions(num_threads=threads,
                                prefetch_buffer_size=max(threads,
                                                         NUM_PREPARED_BATCHES))
    batches = grain.MapDataset.range(start, stop).map(self.batch)
    iterator = iter(batches.to_iter_dataset(options))
    try:
      yield from iterator
    finally:
      iterator.close()

  @property
  def _stop(self) -> int:
    """The number of batches; in training, more than any run has."""
    if self._split == 'eval':
      return self.num_batches
    return sys.maxsize // self.ramp.last

  def _is_padding(self, g: int) -> bool:
    """Returns whether row g fills up the last batch."""
    return self._split == 'eval' and g >= self.num_windows

  def _item(self, g: int):
    """Returns the item of row g; of padding, any."""
    return self._dataset[0 if self._is_padding(g) else g]

  def _rng(self, g: int) -> np.random.Generator:
    """Returns the generator of row g's draws."""
    seed = EVAL_SEED if self._split == 'eval' else self._config.seed
    return np.random.default_rng([seed, g])


class _OrderedItems:
  """The items of views, one view after another, in the order of `places`.

  Grain puts the places in order, not the items: for each item that goes through
  one of its sources it records size and time, which takes longer than to read a
  window of tokens.
  """

  def __init__(self, places: Sequence[int], views: Sequence):
    self.places = places
    self._views = views
    self._starts = np.cumsum([0, *map(len, views)]).tolist()

  def __getitem__(self, n: int):
    place = self.places[n]
    view = bisect.bisect_right(self._starts, place) - 1
    return self._views[view][place - self._starts[view]]


def padded_lengths(config: Config) -> tuple[int, ...]:
  """Returns the lengths that the rows of a batch may be padded to: data.length
  and, for labelled data, up to data.length_buckets - 1 shorter ones, as far
  from each other as eight tokens or more that mesh.context divides."""
  length = config.data.length
  if not objectives.find_objective(config).has_lengths:
    return (length,)
  most = config.data.length_buckets
  step = math.lcm(8, max(config.mesh.context, 1))
  step *= -(-length // (step * most))
  return (*range(step, length, step), length)


def make_training_loader(config: Config, tokenizer: Tokenizer,
                    process_index: int = 0, process_count: int = 1) -> Loader:
  """Returns the endless loader of training, tokenising its sources if need be.

  Args:
    config: a run's config; read are seed, objective and data.
    tokenizer: see tokenizers.load.
    process_index: the number of this process.
    process_count: how many there are; it must divide data.batch_size.

  Raises:
    ValueError: for a source that is missing, empty or unreadable.
  """
  import grain
  weights, corpora, views = _open_views(config, tokenizer, 'train')

  # Grain permutes epoch e by seed + e. Hashed seeds keep the second epoch
  # of seed 0 from being the first of seed 1.
  seeds = np.random.SeedSequence(config.seed).generate_state(len(views))
  parts = []
  start = 0
  for view, seed in zip(views, seeds):
    stop = start + len(view)
    places = grain.MapDataset.range(start, stop)
    shuffled = places.shuffle(seed=int(seed))
    parts.append(shuffled.repeat())
    start = stop
  if len(parts) == 1:
    places = parts[0]
  else:
    places = grain.MapDataset.mix(parts, weights)
  text = ' and '.join(corpus.text for corpus in corpora)
  return Loader(
      name=config.data.source, share=1.0, text=text,
      dataset=_OrderedItems(places, views), views=views, config=config,
      tokenizer=tokenizer, split='train', process_index=process_index,
      process_count=process_count)


def make_evaluation_loaders(config: Config, tokenizer: Tokenizer,
                            process_index: int = 0, process_count: int = 1,
                            in_order: bool = False,
                            bare: bool = False) -> list[Loader]:
  """Returns a loader of each source that is held out, of one pass each.

  A figure of the whole is the mean of the sources' own by their `share`, the
  weights of data.eval_source or data.source: that of text drawn as training
  draws it, however much of each is held out. A source's order is its own, the
  same for all runs, so that its first batches are a fair sample of all; or with
  `in_order` that of its view. With `bare`, records may be without what is to be
  predicted of them.

  Args and raises: those of `training_loader`.
  """
  import grain
  weights, corpora, views = _open_views(config, tokenizer=tokenizer,
                                        split='eval', bare=bare)
  loaders = []
  for weight, corpus, view in zip(weights, corpora, views):
    # Shuffled, the first batches are a fair sample of the source.
    dataset = view
    if not in_order:
      places = grain.MapDataset.range(len(view)).shuffle(seed=EVAL_SEED)
      dataset = _OrderedItems(places, [view])
    loaders.append(Loader(
        name=corpus.name, share=weight / sum(weights), text=corpus.text,
        dataset=dataset, views=[view], config=config, tokenizer=tokenizer,
        split='eval', process_index=process_index,
        process_count=process_count))
  return loaders


def _open_views(config: Config, tokenizer: Tokenizer, split: str,
           bare: bool = False) -> tuple[Sequence, Sequence, list]:
  """Returns the weights, corpora and views of a split's sources."""
  view = objectives.find_objective(config).view
  weights, corpora = zip(*_open_corpora(config, tokenizer=tokenizer,
                                        split=split, bare=bare))
  return weights, corpora, [view(corpus) for corpus in corpora]


def check_sources(config: Config) -> None:
  """Raises RequestError for a source that is unknown or not there, or a cache
  that cannot be written; reads no text."""
  sources.check_cache_dir(config.data.cache_dir)
  for spec in filter(None, (config.data.source, config.data.eval_source)):
    for _, source in sources.parse_sources(spec):
      objectives.check_fits(config, source)


def digest_contents(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns a hash of all that a run is made of, by its name: of what turns
  text into numbers, of what the sources hold, and of files from outside the
  tree. Where a run is labelled or chats, its labels and its template are in its
  config."""
  digest_of_tokenizer = digest_tokenizer(config, tokenizer)
  digest_of_source = digest_sources(config, tokenizer)
  return digest_of_tokenizer | digest_of_source | plugins.hash_loaded_files()


def digest_tokenizer(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns a hash of the tokenizer of a run, by its name; {}: the objective
  does not read it."""
  if 'data.tokenizer' in objectives.find_objective(config).ignores:
    return {}
  return {f'tokenizer {config.data.tokenizer}': tokenizer.fingerprint}


def digest_sources(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns a hash of what each source of a run holds, by its name; where it is
  drawn, of its first rows."""
  data = config.data
  hashes = {}
  for spec in filter(None, (data.source, data.eval_source)):
    for _, source in _parse_sources(spec, config, tokenizer):
      # A source may be cut into what is trained on and what is held out.
      source = sources.hold_out_end_of_text(source, _holdout_every(data))
      if source.tokens or source.drawn:
        hashes[source.name] = source.digest()
      else:
        hashes[source.name] = sources.content_digest(source, tokenizer,
                                                     data.cache_dir)
  return hashes


def _holdout_every(data: Config) -> int | None:
  """Returns data.holdout_every; None where nothing of data.source is held out,
  since data.eval_source is evaluated on."""
  return None if data.eval_source else data.holdout_every


def _parse_sources(spec: str, config: Config, tokenizer: Tokenizer
            ) -> list[tuple[float, sources.Source]]:
  """Returns the (weight, source) pairs of a spec, with conversations laid out
  by the template of the run."""
  def layout() -> conversations.Layout:
    """Returns the layout, which only sources of conversations ask for."""
    return conversations.choose_layout(config.data.chat_template, tokenizer)

  return sources.parse_sources(spec, layout)


def _open_corpora(config: Config, tokenizer: Tokenizer, split: str,
             bare: bool = False) -> Iterator[tuple[float, sources.Corpus]]:
  """Yields (weight, sources.Corpus) of each source of the split.

  Args:
    config: the config of the run.
    tokenizer: see tokenizers.load.
    split: 'train' or 'eval'.
    bare: whether records may be without labels or answers.

  Raises:
    RequestError: for records without these, unless they may be.
  """
  data = config.data
  # The source of the split, which for evaluation may be another one.
  spec = data.source
  part = ''
  if split == 'eval':
    spec = data.eval_source or data.source
    part = config.eval.part

  # Each source's documents, by the kind of what it holds.
  for weight, source in _parse_sources(spec, config, tokenizer):
    objectives.check_fits(config, source)
    if source.drawn:
      corpus = sources.Corpus(name=source.name, text=source.name, split=split,
                              tokenizer=tokenizer, config=config)
    elif objectives.find_objective(config).record_kind:
      corpus = _open_records(source, config=config, tokenizer=tokenizer,
                           split=split, part=part, bare=bare)
    else:
      corpus = _open_text(source, config=config, tokenizer=tokenizer,
                          split=split, part=part)
    yield weight, corpus


def _open_records(source: sources.Source, config: Config, tokenizer: Tokenizer,
                split: str, part: str, bare: bool) -> sources.Corpus:
  """Returns the records of a source that belong to a split.

  Args:
    source: a source of labelled data.
    config: the config of the run.
    tokenizer: see tokenizers.load.
    split: 'train' or 'eval'.
    part: eval.part.
    bare: whether records may be without what is to be predicted of them.
  """
  every = _holdout_every(config.data)
  records = list(source.records())
  if not bare:
    labelled.check_all_labelled(source.name, records)
  # Records are held out by their number, as documents are.
  chosen = tokens.select_documents(np.arange(len(records)), every=every,
                                   split=split, part=part)
  text = _describe_part(source, every=every, split=split, part=part,
                        taken=chosen.sum(), of=len(records))
  return sources.Corpus(
      name=source.name, text=text, split=split, tokenizer=tokenizer,
      config=config, records=list(itertools.compress(records, chosen)))


def _open_text(source: sources.Source, config: Config, tokenizer: Tokenizer,
             split: str, part: str) -> sources.Corpus:
  """Returns the tokens of a source that belong to a split.

  Args:
    source: a source of text, or of tokens.
    config: the config of the run.
    tokenizer: see tokenizers.load.
    split: 'train' or 'eval'.
    part: eval.part.
  """
  # The tokens of all documents.
  every = _holdout_every(config.data)
  source = sources.hold_out_end_of_text(source, every, part)
  if source.tokens:
    whole = tokens.load_tokens(source.tokens, source.name)
    tokens.check_tokenizer(whole, tokenizer, source.name)
  else:
    whole = sources.load_or_tokenize(source, tokenizer, config.data.cache_dir)

  # Those of the split. Where a source is cut, document 0 is the part already.
  chosen = tokens.Split(whole, every=every, split=split,
                        part='' if source.is_cut else part,
                        separator=tokenizer.separator_id)
  text = _describe_part(source, every=every, split=split, part=part,
                taken=chosen.documents, of=chosen.of)
  return sources.Corpus(
      name=source.name, text=text, split=split, tokenizer=tokenizer,
      config=config, tokens=chosen)


def _describe_part(source: sources.Source, every: int | None, split: str,
                   part: str, taken: int, of: int) -> str:
  """Returns in words which part of a source is in a split.

  Args:
    source: the source, which may be cut.
    every: data.holdout_every; None: nothing of the source is held out.
    split: 'train' or 'eval'.
    part: eval.part.
    taken: how many of its documents are in the split.
    of: how many it has.

  Raises:
    RequestError: for a split without a document.
  """
  # A small source may leave a split without a document.
  if not taken:
    where = f'{split} with eval.part={part}' if part else split
    raise RequestError(
        f'data source {source.name!r} has {of} document(s), of which '
        f'data.holdout_every={every} leaves none for {where}: set '
        'data.eval_source or another data.holdout_every')
  # A single text is cut in two by its length.
  if source.is_cut:
    words = f'the last 1/{every} of {source.name}'
    if part:
      words = f'the {part} half of {words}'
    if split != 'eval':
      words = f'all but {words}'
    return words
  if taken == of:
    return source.name
  return f'{taken:,} of {of:,} documents of {source.name}'


# Batches that grow.


@dataclasses.dataclass(frozen=True)
class Ramp:
  """The sizes of a run's batches.

  Attributes:
    until: the steps at which the sizes change, ascending.
    sizes: the rows of a batch before each of these, ascending.
    last: data.batch_size, from the last of them on.
  """
  until: tuple[int, ...]
  sizes: tuple[int, ...]
  last: int

  def rows(self, n: int) -> int:
    """Returns the rows of batch n."""
    stage = int(np.searchsorted(self.until, n, side='right'))
    return int((*self.sizes, self.last)[stage])

  def before(self, n):
    """Returns the rows of all batches before batch n, which may be an array."""
    n = np.asarray(n)
    start = 0
    total = 0
    for until, size in zip(self.until, self.sizes):
      total = total + size * np.clip(n - start, 0, until - start)
      start = until
    return total + self.last * np.clip(n - start, 0, None)


def read_ramp(config: Config) -> Ramp:
  """Returns the ramp of a run.

  Raises:
    RequestError: a sentence, for a data.batch_ramp that is none.
  """
  return parse_ramp(config.data.batch_ramp, config.data.batch_size)


@functools.lru_cache(maxsize=64)
def parse_ramp(text: str, batch_size: int) -> Ramp:
  """Returns the ramp of a text; '': none."""
  if not text:
    return Ramp(until=(), sizes=(), last=batch_size)
  until = []
  sizes = []
  # Steps and sizes rise, up to the size of the rest of the run.
  try:
    for stage in text.split(','):
      step, size = map(int, stage.split(':'))
      until.append(step)
      sizes.append(size)
    is_ramp = _is_rising([0, *until]) and _is_rising([0, *sizes, batch_size])
  except ValueError:
    is_ramp = False
  if not is_ramp or len(until) > MOST_BATCH_SIZES:
    raise RequestError(
        f'data.batch_ramp is {text!r}: write STEP:ROWS with commas between, '
        f"such as '100:8,300:16', at most {MOST_BATCH_SIZES}; the steps must "
        'rise from 1 on, and the rows too, to less than data.batch_size '
        f'{batch_size}')
  return Ramp(until=tuple(until), sizes=tuple(sizes), last=batch_size)


def _is_rising(values: Sequence[int]) -> bool:
  """Returns whether each number is larger than the one before."""
  return all(a < b for a, b in itertools.pairwise(values))


def scale_ramp(text: str, steps: int, short: int) -> str:
  """Returns the ramp of a run of `steps` steps for one of `short`; a size that
  no batch would have is left out."""
  stages: dict[int, str] = {}
  for stage in text.split(','):
    step, size = stage.split(':')
    stages[int(step) * short // steps] = size
  return ','.join(f'{step}:{size}' for step, size in stages.items() if step)


def check_ramp(config: Config) -> None:
  """Raises RequestError for a ramp that the run could not honour."""
  ramp = read_ramp(config)
  steps = config.train.steps
  if ramp.until and ramp.until[-1] >= steps:
    raise RequestError(
        f'data.batch_ramp is {config.data.batch_ramp!r}, and train.steps is '
        f'{steps}: it must end before, or data.batch_size would not be read')
