"""A command of tools.tokenize that is given again: it goes on with the same
shards, or mends what is wrong with them."""

import hashlib
import json
import os
import shlex
import shutil
import time

from etils import epath
import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers.shards import BYTES, config_of, contents, tokenize
from tools.tokenize import __main__ as command
from training.data import pipeline, sources
from training.data.shards import folder as folders
from training.data.shards import plan, write

pytest.importorskip('array_record.python.array_record_module')


def test_shards_are_cut_alike_when_a_command_goes_on(tmp_path, monkeypatch):
  """And what a message says to do does it. Here --shard_mib is of KiB."""
  real = plan.of
  monkeypatch.setattr(plan, 'of', lambda spec, every, size: real(
      spec, every, size >> 10)._replace(shard_bytes=size))
  for i in range(4):
    (tmp_path / f'a {i}.txt').write_text(f'{i} and' * 204)
  words = [f'text:{tmp_path}/*.txt', '--holdout_every=3', '--out']
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  assert command.main([*words, str(whole), '--shard_mib=3']) == 0
  words += [str(out), '--jobs=2']
  assert command.main([*words, '--shard_mib=3', '--job=0']) == 0
  for size in (2, 4):  # of as many shards, and of fewer
    with pytest.raises(RequestError, match='the same and --shard_mib 3, or'):
      command.main([*words, f'--shard_mib={size}', '--job=1'])

  def do_as_told(match, call):
    with pytest.raises(RequestError, match=match) as refused:
      call()
    told = shlex.split(str(refused.value).partition(' python -m ')[2])
    assert told[0] == 'tools.tokenize' and command.main(told[1:]) == 0

  do_as_told('half finished, 1 of 2', lambda: sources.parse(f'tokens:{out}'))
  assert contents(out) == contents(whole)
  config = config_of(tmp_path, tmp_path, f'tokens:{out}', holdout_every=2)
  do_as_told('is 2, and what it holds',
             lambda: pipeline.training_loader(config, BYTES))
  assert pipeline.training_loader(config, BYTES).num_bytes == 2 * 5 * 204


def test_a_folder_of_an_earlier_version(corpus, shards, monkeypatch):
  """Its digest did not say where the files are cut: what is finished is read,
  and gone on with where there is one way to cut them."""
  def age(folder, count):
    begun = json.loads((folder / 'begun.json').read_text())
    names = [[path.name, path.stat().st_size]
             for path in sorted(corpus.iterdir())]
    old = begun | {'digest': hashlib.blake2b(
        json.dumps([begun['reader'], names, count]).encode(),
        digest_size=16).hexdigest()}
    assert begun['shards'] == count and old != begun
    del old['shard_bytes'], old['holdout_every']
    (folder / 'begun.json').write_text(json.dumps(old))

  count = len(list(shards.glob('*.arrayrecord')))
  assert 1 < count < 7
  age(shards, count)
  assert tokenize(corpus, shards, '--holdout_every=5') == 0
  assert (shards / 'split-5.json').exists()
  (shards / '00001.json').unlink()
  with pytest.raises(RequestError, match='begun by an earlier version'):
    tokenize(corpus, shards)
  monkeypatch.undo()
  real = plan.of
  monkeypatch.setattr(plan, 'of', lambda spec, every, _: real(spec, every, 1))
  other = shards.parent / 'other'
  assert tokenize(corpus, other, '--jobs=2', '--job=1') == 0
  age(other, 7)
  with pytest.raises(RequestError, match='and the --shard_mib that it was beg'):
    sources.parse(f'tokens:{other}')
  assert tokenize(corpus, other) == 0
  assert len(folders.load(str(other), 'it').shards) == 7


def test_a_shard_that_takes_days_is_left_alone(tmp_path):
  """Another worker sweeps what was left by killed ones."""
  folder = epath.Path(tmp_path)
  then = (time.time() - 2 * write.STALE_SECONDS,) * 2
  for name in ('a', 'b'):
    (tmp_path / f'{write.TEMPORARY}{name}').write_text('a figure')
  os.utime(tmp_path / f'{write.TEMPORARY}a', then)

  def documents():
    yield 'x' * write.CHUNK_CHARS
    [room] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert list(room.iterdir())
    os.utime(room, then)
    write.shard(folder, 1, ['another'], BYTES, 'its')
    yield 'the end'

  made = write.shard(folder, 0, documents(), BYTES, 'its')
  assert made['bytes'] == write.CHUNK_CHARS + len('the end')
  assert [path.name for path in tmp_path.glob('.*')] == [f'{write.TEMPORARY}b']


@pytest.mark.parametrize('spoil', [
    os.unlink, lambda path: os.truncate(path, 100),
    lambda path: shutil.rmtree(path.parent)], ids=['gone', 'cut', 'all_gone'])
def test_marks_are_made_again(spoil, corpus, shards, capsys):
  """Of every split, by the command that made the folder."""
  assert tokenize(corpus, shards, '--holdout_every=5') == 0
  before = contents(shards)
  config = config_of(corpus, shards.parent, f'tokens:{shards}')
  for every in (4, 5):
    spoil(shards / f'split-{every}' / '00000.marks')
  with pytest.raises(EnvironmentFailure,
                     match=r'\d.marks is (missing|damaged).*tools.tokenize'):
    loader = pipeline.training_loader(config, BYTES)
    for n in range(loader.num_batches):
      loader.batch(n)
  capsys.readouterr()
  assert tokenize(corpus, shards, '--json') == 0
  assert json.loads(capsys.readouterr().out)['megabytes_made'] == 0
  assert contents(shards) == before


def test_splits_are_of_the_shards_that_were_made_again(corpus, shards):
  """Another version of a package may place records elsewhere, so that marks of
  the right size prove nothing."""
  before = contents(shards)
  for folder, name in (('split-4', '00000'), ('.', '00001')):
    for path in (shards / folder).glob(f'{name}.*'):
      path.write_bytes(bytes(path.stat().st_size))
  (shards / '00001.json').unlink()
  assert tokenize(corpus, shards) == 0
  assert contents(shards) == before
