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
  """The batches of one split of the data, for one process.

  Attributes:
    name: the source or sources, as written in the config.
    share: the weight of this source in the mean over all held-out sources.
    text: the part of the data that is read, in words.
    views: for each source, the sequence of items that the objective makes rows
      of.
    num_windows: the examples in one pass over the split, which `limit_rows`
      may lessen.
    num_batches: the batches in one pass. An 'eval' loader ends there, its last
      batch filled up with rows of weight zero, so that each token counts
      exactly once; a 'train' loader never ends.
    num_tokens: the tokens of the text that one pass reads.
    num_bytes: the UTF-8 bytes of that text.
    bytes_per_token: bits per byte = nats per token / (ln 2 x this).
    ramp: the number of rows of each batch.
    tokenizer: the tokenizer of the run.
    objective: the objective of the run.
    loaders_of_program: the loaders of the runs that train as one program, each
      with its own seed. Their batches have one shape, and this loader is one
      of them.
  """

  def __init__(self, name: str, share: float, text: str, dataset: Sequence,
               views: Sequence, config: Config, tokenizer: Tokenizer,
               split: str, process_index: int, process_count: int):
    """Sets up the batches of this process, and counts them.

    Args:
      dataset: the items of all sources, in the order in which the run has them.
        An item, such as a window of text, becomes a row.
      config: the config of the run.
      split: 'train' for the data to train on, or 'eval' for the held-out data.
      process_index: the number of this process, which reads its own rows of
        each batch.
      process_count: the number of processes.
      The others are attributes of the class.
    """
    self.name = name
    self.share = share
    self.text = text
    self.views = views
    self._dataset = dataset
    self._config = config
    self.tokenizer = tokenizer
    self._split = split
    self.objective = objectives.find_objective(config)
    # All loaders whose batches must be padded to the same length. It is only
    # this one, unless several runs train as one program (training/vectorised.py
    # then sets it).
    self.loaders_of_program: Sequence[Loader] = [self]
    self._place = process_index, process_count

    # Training batches may grow with the steps (data.batch_ramp). Rows may be
    # padded to several lengths. As objectives read data.length from the config,
    # each length has a copy of the config.
    if split == 'train':
      self.ramp = read_ramp(config)
    else:
      self.ramp = parse_ramp('', config.data.batch_size)
    self._config_of = {}
    for length in padded_lengths(config):
      self._config_of[length] = config.copy_and_resolve_references()
      self._config_of[length].data.length = length

    # Count rows, tokens and bytes. limit_rows(0) sets the number of batches,
    # and must follow num_windows, which it reads.
    self.num_windows = sum(len(view) for view in views)
    self.limit_rows(0)
    self.num_tokens = sum(view.num_tokens for view in views)
    self.num_bytes = sum(view.num_bytes for view in views)
    self.bytes_per_token = self.num_bytes / self.num_tokens

  def limit_rows(self, rows: int) -> 'Loader':
    """Lets a loader of evaluation batches end after some rows.

    Args:
      rows: the number of rows, whatever the size of a batch; 0: all.

    Returns:
      This loader.
    """
    self.num_windows = min(rows or self.num_windows, self.num_windows)
    self.num_batches = -(-self.num_windows // self._config.data.batch_size)
    return self

  def place(self, n: int) -> int:
    """Returns the index in its view of held-out row n."""
    return int(self._dataset.places[n])

  def first(self, batches: int) -> int:
    """Returns how many batches are read where `batches` are asked for; 0: all.
    """
    return min(batches or self.num_batches, self.num_batches)

  def batch(self, n: int) -> dict[str, np.ndarray]:
    """Returns this process's rows of a batch.

    Args:
      n: the number of the batch, from 0 on; it is the step in training.

    Returns:
      {key: array [rows, ...]}.

    Raises:
      IndexError: where the split has no batch n.
    """
    n = int(n)
    if not 0 <= n < self._stop:
      raise IndexError(f'batch {n} of {self._stop}')

    # Read the rows of this process: of the rows of a batch, process i has the
    # i-th part. All processes, and all runs that train as one program, must pad
    # to the same length, that of the longest row of any of them. A row is
    # determined by its number g in the whole run, so that a run can be resumed
    # at any batch.
    process_index, process_count = self._place
    num_rows = self.ramp.rows(n) // process_count
    first_row = int(self.ramp.rows_before(n)) + process_index * num_rows
    row_numbers = range(first_row, first_row + num_rows)
    length = max(loader.length(n) for loader in self.loaders_of_program)
    examples = [(self._item(g), self._rng(g)) for g in row_numbers]
    batch = self.objective.batch(examples, self._config_of[length],
                                 self.tokenizer)

    # The last batch of an evaluation is filled up with copies of the first row.
    # They get the weight 0, so that they do not count, and are marked as
    # padding, so that they take no capacity of an expert.
    is_padding = [self._is_padding(g) for g in row_numbers]
    if any(is_padding):
      for key, values in batch.items():
        if key.endswith(('weights', 'segment_ids', 'valid')):
          values[is_padding] = 0
    return batch

  def length(self, n: int) -> int:
    """Returns the length that the rows of global batch n are padded to.

    This is the least of `padded_lengths` that fits the longest row of the
    batch, whichever process has that row."""
    if not self.objective.has_lengths or len(self._config_of) == 1:
      return self._config.data.length
    first, end = map(int, self.ramp.rows_before([n, n + 1]))
    sizes = [self.objective.length(self._item(g)) for g in range(first, end)]
    longest = max(sizes)
    return min(length for length in self._config_of if length >= longest)

  def iterate(self, start: int = 0, stop: int | None = None
              ) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches from `start` to `stop` - 1. Threads prepare some of
    them ahead.

    Args:
      start: the first batch.
      stop: the batch after the last one; None: the end of the data. Give it
        where it is known, or batches are prepared that nobody takes.
    """
    import grain
    stop = self._stop if stop is None else min(stop, self._stop)
    if start >= stop:
      return

    # The threads end when the iterator is closed, which must also happen where
    # the caller stops early.
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
    """The number of batches that there are; in training, more than any run has.
    """
    if self._split == 'eval':
      return self.num_batches
    return sys.maxsize // self.ramp.last

  def _is_padding(self, g: int) -> bool:
    """Returns whether row g only fills up the last batch of an evaluation."""
    return self._split == 'eval' and g >= self.num_windows

  def _item(self, g: int):
    """Returns the item that row g is made of; of padding, the first one."""
    return self._dataset[0 if self._is_padding(g) else g]

  def _rng(self, g: int) -> np.random.Generator:
    """Returns the random generator of row g, a function of the seed and g
    alone."""
    seed = EVAL_SEED if self._split == 'eval' else self._config.seed
    return np.random.default_rng([seed, g])


class _OrderedItems:
  """The items of several views, read in a given order.

  Grain puts the numbers of the items in order, not the items themselves: for
  each item that goes through one of its sources it records size and time, which
  takes longer than to read a window of tokens.

  Args:
    places: the order: place n is the number of the item, counted over all views
      one after another.
    views: the sequences of items.
  """

  def __init__(self, places: Sequence[int], views: Sequence):
    self.places = places
    self._views = views
    self._starts = np.cumsum([0, *map(len, views)]).tolist()

  def __getitem__(self, n: int):
    place = self.places[n]
    view_number = bisect.bisect_right(self._starts, place) - 1
    index_in_view = place - self._starts[view_number]
    return self._views[view_number][index_in_view]


def padded_lengths(config: Config) -> tuple[int, ...]:
  """Returns the lengths that the rows of a batch may be padded to, in ascending
  order.

  The last one is data.length. If rows differ much in length with the run's
  objective, there are up to data.length_buckets - 1 shorter ones, at even
  distances: a batch of short rows then computes less padding. The distance is a
  multiple of 8 tokens and of mesh.context, the number of devices that share the
  length of a row.

  Args:
    config: the config of the run.
  """
  # The training step is compiled for each length, so there is only one where
  # all rows are equally long.
  longest = config.data.length
  if not objectives.find_objective(config).has_lengths:
    return (longest,)
  most_lengths = config.data.length_buckets
  unit = math.lcm(8, max(config.mesh.context, 1))
  # Take the least multiple of the unit that makes no more lengths than allowed.
  # -(-a // b) rounds the quotient up.
  units_of_step = -(-longest // (unit * most_lengths))
  step = unit * units_of_step
  return (*range(step, longest, step), longest)


def make_training_loader(config: Config, tokenizer: Tokenizer,
                         process_index: int = 0, process_count: int = 1
                         ) -> Loader:
  """Makes the loader of training batches, which never ends. Text that has not
  been tokenised yet is tokenised first.

  Args:
    config: a run's config, of which seed, objective and data are read.
    tokenizer: the tokenizer of the run.
    process_index: the number of this process.
    process_count: how many processes there are; it must divide data.batch_size.

  Raises:
    RequestError: for a data source that is missing, empty or unreadable.
  """
  import grain
  weights, corpora, views = _open_views(config, tokenizer=tokenizer,
                                        split='train')

  # Shuffle each source anew in each pass. What is shuffled are the numbers of
  # its items, counted through all sources; an item is read only when a batch
  # needs it. Grain shuffles epoch e by seed + e. The seeds are hashed, or the
  # second epoch of seed 0 would be the first of seed 1.
  seeds = np.random.SeedSequence(config.seed).generate_state(len(views))
  orders = []
  start = 0
  for view, seed in zip(views, seeds):
    stop = start + len(view)
    places = grain.MapDataset.range(start, stop)
    shuffled = places.shuffle(seed=int(seed))
    orders.append(shuffled.repeat())
    start = stop

  # Mix several sources by their weights, so that any part of the training has
  # about the same mixture.
  if len(orders) == 1:
    places = orders[0]
  else:
    places = grain.MapDataset.mix(orders, weights)
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
  """Makes a loader of evaluation batches for each data source. It reads what
  the source holds out, once.

  The mean of a figure over all sources is to be weighted by the loaders'
  `share`, which comes from the weights of data.eval_source or data.source. So
  it is the figure of text that is mixed as in training, however much of each
  source is held out.

  Args:
    config: a run's config.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    process_index: the number of this process.
    process_count: the number of processes.
    in_order: whether rows come in the order of the source. By default they are
      shuffled, the same way in all runs.
    bare: whether labelled records may lack the label that is to be predicted,
      as when a model is to label them.

  Raises:
    RequestError: for a data source that is missing, empty or unreadable.
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
  """Opens the data sources of the training data or of the held-out data.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer of the run.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    bare: whether labelled records may lack their labels or answers.

  Returns:
    Three lists with an entry for each source: its weight in the mixture; its
    corpus (the tokens or records); and its view, the sequence of items, such as
    windows of text, of which the objective makes a row each.
  """
  view = objectives.find_objective(config).view
  weights, corpora = zip(*_open_corpora(config, tokenizer=tokenizer,
                                        split=split, bare=bare))
  return weights, corpora, [view(corpus) for corpus in corpora]


def check_sources(config: Config) -> None:
  """Raises RequestError for a source that is unknown or not there, or a cache
  of tokens that cannot be written. No text is read."""
  sources.check_cache_dir(config.data.cache_dir)
  for spec in filter(None, (config.data.source, config.data.eval_source)):
    for _, source in sources.parse_sources(spec):
      objectives.check_fits(config, source)


def digest_contents(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns a hash of each thing that the data of a run are made of, by its
  name.

  These are the tokenizer, the content of the sources, and the files from
  outside the tree. The labels and the chat template of a run are not among
  them, since its config holds them."""
  digest_of_tokenizer = digest_tokenizer(config, tokenizer)
  digest_of_source = digest_sources(config, tokenizer)
  return digest_of_tokenizer | digest_of_source | plugins.hash_loaded_files()


def digest_tokenizer(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Returns {name: hash} of the tokenizer of a run; {} where the objective does
  not read it."""
  if 'data.tokenizer' in objectives.find_objective(config).ignores:
    return {}
  return {f'tokenizer {config.data.tokenizer}': tokenizer.fingerprint}


def digest_sources(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
  """Computes a hash of the content of each data source of a run. Two runs whose
  hashes are equal had the same data.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer of the run.

  Returns:
    {name of the source: hash}. A source that draws its rows at random has no
    content, and its first rows are hashed.
  """
  data = config.data
  hashes = {}
  for spec in filter(None, (data.source, data.eval_source)):
    for _, source in _parse_sources(spec, config, tokenizer=tokenizer):
      # Take the source as the run reads it: the end of a single text may be
      # held out. The hash of a large text is kept in the cache. Folders of
      # tokens and sources of random rows compute theirs quickly.
      source = sources.hold_out_end_of_text(source, _holdout_every(data))
      if source.tokens or source.is_drawn:
        hashes[source.name] = source.digest()
      else:
        hashes[source.name] = sources.content_digest(
            source, tokenizer=tokenizer, cache_dir=data.cache_dir)
  return hashes


def _holdout_every(data: Config) -> int | None:
  """Returns data.holdout_every, or None where nothing of data.source is held
  out, because the run is evaluated on data.eval_source."""
  return None if data.eval_source else data.holdout_every


def _parse_sources(spec: str, config: Config, tokenizer: Tokenizer
                   ) -> list[tuple[float, sources.Source]]:
  """Returns the (weight, source) pairs that a text such as data.source names.
  Conversations are laid out by the chat template of the run."""
  def layout() -> conversations.Layout:
    """Returns the layout, which only sources of conversations ask for."""
    return conversations.choose_layout(config.data.chat_template, tokenizer)

  return sources.parse_sources(spec, layout)


def _open_corpora(config: Config, tokenizer: Tokenizer, split: str,
                  bare: bool = False) -> Iterator[tuple[float, sources.Corpus]]:
  """Opens each data source of a run, and yields its weight in the mixture and
  its corpus: the tokens or labelled records of the training data or of the
  held-out data.

  Args:
    config: the config of the run.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    bare: whether labelled records may lack their labels or answers.

  Raises:
    RequestError: for records that lack these where they may not.
  """
  data = config.data
  # Choose the source, which may be another one for evaluation. Only held-out
  # data can be read by halves (eval.part).
  spec = data.source
  part = ''
  if split == 'eval':
    spec = data.eval_source or data.source
    part = config.eval.part

  # A source either draws its rows at random, or holds labelled records or text.
  for weight, source in _parse_sources(spec, config, tokenizer=tokenizer):
    objectives.check_fits(config, source)
    if source.is_drawn:
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
  """Reads those labelled records of a data source that belong to the training
  data or to the held-out data.

  Args:
    source: a source of labelled records, such as a file of texts with classes.
    config: the config of the run.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    part: the half of the held-out data that is read (eval.part); '': all.
    bare: whether records may lack the label that is to be predicted.

  Raises:
    RequestError: for a record without a label where it needs one, and where no
      record is left.
  """
  holdout_every = _holdout_every(config.data)
  records = list(source.records())
  if not bare:
    labelled.check_all_labelled(source.name, records)
  is_selected = tokens.select_documents(
      np.arange(len(records)), holdout_every=holdout_every, split=split,
      part=part)
  text = _describe_part(
      source, holdout_every=holdout_every, split=split, part=part,
      num_selected=is_selected.sum(), num_documents=len(records))
  return sources.Corpus(
      name=source.name, text=text, split=split, tokenizer=tokenizer,
      config=config, records=list(itertools.compress(records, is_selected)))


def _open_text(source: sources.Source, config: Config, tokenizer: Tokenizer,
               split: str, part: str) -> sources.Corpus:
  """Opens those tokens of a data source that belong to the training data or to
  the held-out data. Text that has not been tokenised yet is tokenised first.

  Args:
    source: a source of text, or a folder of tokens.
    config: the config of the run.
    tokenizer: the tokenizer, as tokenizers.load returns it.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    part: the half of the held-out data that is read (eval.part); '': all.
  """
  # A single text, without documents, is cut in two, so that its end can be held
  # out. Then open the tokens of all documents, from a folder of tokens or from
  # the cache of tokenised text.
  holdout_every = _holdout_every(config.data)
  source = sources.hold_out_end_of_text(
      source, holdout_every=holdout_every, part=part)
  if source.tokens:
    all_tokens = tokens.load_tokens(source.tokens, source.name)
    tokens.check_tokenizer(all_tokens, tokenizer=tokenizer, name=source.name)
  else:
    all_tokens = sources.load_or_tokenize(
        source, tokenizer=tokenizer, cache_dir=config.data.cache_dir)

  # Choose the documents of the split. Where a text was cut in two, that has
  # already taken the half of eval.part, which must not be halved again.
  tokens_of_split = tokens.Split(
      all_tokens, holdout_every=holdout_every, split=split,
      part='' if source.is_cut else part, separator=tokenizer.separator_id)
  text = _describe_part(
      source, holdout_every=holdout_every, split=split, part=part,
      num_selected=tokens_of_split.documents,
      num_documents=tokens_of_split.num_documents_of_folder)
  return sources.Corpus(
      name=source.name, text=text, split=split, tokenizer=tokenizer,
      config=config, tokens=tokens_of_split)


def _describe_part(source: sources.Source, holdout_every: int | None,
                   split: str, part: str, num_selected: int, num_documents: int
                   ) -> str:
  """Describes in words which part of a data source belongs to a split.

  Args:
    source: the source, whose end may be held out as a document of its own.
    holdout_every: data.holdout_every; one document in so many is held out;
      None: none is.
    split: 'train' for the data to train on, or 'eval' for the held-out data.
    part: the half of the held-out data that is read (eval.part); '': all.
    num_selected: how many documents of the source belong to the split.
    num_documents: how many documents the source has.

  Raises:
    RequestError: for a split without a document.
  """
  # A small source may leave a split without a document.
  if not num_selected:
    location = f'{split} with eval.part={part}' if part else split
    raise RequestError(
        f'data source {source.name!r} has {num_documents} document(s), of '
        f'which data.holdout_every={holdout_every} leaves none for {location}: '
        'set data.eval_source or another data.holdout_every')
  # A single text was cut in two by its length.
  if source.is_cut:
    words = f'the last 1/{holdout_every} of {source.name}'
    if part:
      words = f'the {part} half of {words}'
    if split != 'eval':
      words = f'all but {words}'
    return words
  if num_selected == num_documents:
    return source.name
  return f'{num_selected:,} of {num_documents:,} documents of {source.name}'


# Batches that grow.


@dataclasses.dataclass(frozen=True)
class Ramp:
  """The number of rows of each batch of a run, which may grow
  (data.batch_ramp).

  Attributes:
    change_steps: the steps at which the number changes, ascending.
    sizes: the rows of a batch before each of these steps, ascending.
    last: data.batch_size, the rows of a batch from the last of these steps on.
  """
  change_steps: tuple[int, ...]
  sizes: tuple[int, ...]
  last: int

  def rows(self, n: int) -> int:
    """Returns the number of rows of batch n."""
    stage = int(np.searchsorted(self.change_steps, n, side='right'))
    return int((*self.sizes, self.last)[stage])

  def rows_before(self, n):
    """Returns the number of rows of all batches before batch n.

    Args:
      n: the number of a batch, or an array of numbers.
    """
    n = np.asarray(n)
    stage_start = 0
    total = 0
    # Add up the stages of the ramp, each with its own size. np.clip counts the
    # batches of a stage that are before n: from none to all of them.
    for stage_end, size in zip(self.change_steps, self.sizes):
      batches = np.clip(n - stage_start, 0, stage_end - stage_start)
      total = total + size * batches
      stage_start = stage_end
    return total + self.last * np.clip(n - stage_start, 0, None)


def read_ramp(config: Config) -> Ramp:
  """Returns the number of rows of each batch of a run.

  Raises:
    RequestError: for a data.batch_ramp that is not one.
  """
  return parse_ramp(config.data.batch_ramp, config.data.batch_size)


@functools.lru_cache(maxsize=64)
def parse_ramp(text: str, batch_size: int) -> Ramp:
  """Parses a text such as '100:8,300:16', by which the batch size of a run
  grows: 8 rows up to step 100, 16 up to step 300, and `batch_size` afterwards.

  Args:
    text: data.batch_ramp; '': all batches have `batch_size` rows.
    batch_size: the rows of a batch after the last of these steps.

  Raises:
    RequestError: unless both the steps and the rows rise.
  """
  if not text:
    return Ramp(change_steps=(), sizes=(), last=batch_size)
  change_steps = []
  sizes = []

  # Both the steps and the rows must rise, the rows to less than batch_size. A
  # text without numbers gets the same message as numbers that do not rise.
  try:
    for stage in text.split(','):
      step, size = map(int, stage.split(':'))
      change_steps.append(step)
      sizes.append(size)
    steps_rise = _is_rising([0, *change_steps])
    is_ramp = steps_rise and _is_rising([0, *sizes, batch_size])
  except ValueError:
    is_ramp = False
  if not is_ramp or len(change_steps) > MOST_BATCH_SIZES:
    raise RequestError(
        f'data.batch_ramp is {text!r}: write STEP:ROWS with commas between, '
        f"such as '100:8,300:16', at most {MOST_BATCH_SIZES}; the steps must "
        'rise from 1 on, and the rows too, to less than data.batch_size '
        f'{batch_size}')
  return Ramp(change_steps=tuple(change_steps), sizes=tuple(sizes),
              last=batch_size)


def _is_rising(values: Sequence[int]) -> bool:
  """Returns whether each number is larger than the one before."""
  return all(a < b for a, b in itertools.pairwise(values))


def scale_ramp(text: str, steps: int, short: int) -> str:
  """Scales the steps at which the batch size grows to a shorter run, so that it
  grows after the same shares of the run.

  Args:
    text: data.batch_ramp of the long run, such as '100:8,300:16': 8 rows up to
      step 100, 16 up to step 300.
    steps: the steps of the long run.
    short: the steps of the short run.

  Returns:
    data.batch_ramp of the short run. A size that no batch would have is left
    out.
  """
  # Two sizes may now end at the same step: the earlier one has no batch then,
  # and the later one overwrites it in the dict. Nor has a size that ends at
  # step 0.
  stages: dict[int, str] = {}
  for stage in text.split(','):
    step, size = stage.split(':')
    stages[int(step) * short // steps] = size
  return ','.join(f'{step}:{size}' for step, size in stages.items() if step)


def check_ramp(config: Config) -> None:
  """Raises RequestError for a ramp that does not end before the run does."""
  ramp = read_ramp(config)
  steps = config.train.steps
  if ramp.change_steps and ramp.change_steps[-1] >= steps:
    raise RequestError(
        f'data.batch_ramp is {config.data.batch_ramp!r}, and train.steps is '
        f'{steps}: it must end before, or data.batch_size would not be read')
