"""Which files a pattern with * and ** names: each file once, whatever links
lead to it."""

from collections.abc import Iterator
import contextlib
import glob
import os

_ANY_DEPTH = '**'


def find_files(pattern: str) -> tuple[str, ...]:
  """Finds the files that a glob pattern matches, sorted by their paths.

  In the pattern, ** stands for any number of nested folders, also for none.
  Folders whose names begin with a dot are left out. Links are followed. A file
  to which several paths lead is returned once, if possible by a path that does
  not end in a link.

  Args:
    pattern: an absolute path with * and **.
  """
  # Sort paths that end in a link behind all others. Of several paths to the
  # same file, which has one inode, setdefault keeps the first.
  paths = sorted({*filter(os.path.isfile, _find_paths(pattern))})
  paths.sort(key=os.path.islink)
  path_of_inode: dict[tuple[int, int], str] = {}
  for path in paths:
    path_of_inode.setdefault(_inode_of_path(path), path)
  return tuple(sorted(path_of_inode.values()))


def _find_paths(pattern: str) -> Iterator[str]:
  """Yields the paths that a glob pattern matches. Some may come twice.

  Args:
    pattern: an absolute path with * and **.
  """
  parts = pattern.split(os.sep)
  if _ANY_DEPTH not in parts:
    yield from glob.iglob(pattern)
    return
  # Find the folders that match the part before the first **, and match the part
  # after it in each folder below these. It may contain another **, hence the
  # recursion.
  place = parts.index(_ANY_DEPTH)
  pattern_above = os.sep.join(parts[:place]) or os.sep
  pattern_below = os.sep.join(parts[place + 1:]) or '*'
  for folder in _walk_folders(sorted(glob.glob(pattern_above))):
    yield from _find_paths(os.path.join(glob.escape(folder), pattern_below))


def _walk_folders(tops: list[str]) -> Iterator[str]:
  """Yields some folders and all folders below them, each one once. Links to
  folders are followed last, so that a folder is reached by a link only if no
  other path leads to it.

  Args:
    tops: the folders to begin with.
  """
  seen = set()
  # `folders` is a stack, whose last entry is visited next. Links wait until it
  # is empty. Folders are recognised by their inodes, so that links which lead
  # round in a circle come to an end.
  folders = [*reversed(tops)]
  links = []
  while folders or links:
    if folders:
      folder = folders.pop()
    else:
      folder = links.pop(0)
    if not os.path.isdir(folder) or _inode_of_path(folder) in seen:
      continue
    seen.add(_inode_of_path(folder))
    yield folder

    # Visit the folders in it next, in the order of their names: the stack needs
    # them in reverse.
    inner = _list_folders(folder)
    for path in inner:
      if os.path.islink(path):
        links.append(path)
    for path in reversed(inner):
      if not os.path.islink(path):
        folders.append(path)


def _list_folders(folder: str) -> list[str]:
  """Lists the folders in a folder, and the links to folders, sorted. Those
  whose names begin with a dot are left out. A folder that may not be read has
  none, as in the shell.

  Args:
    folder: the path of the folder.
  """
  inner = []
  with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
    for entry in entries:
      # For a link that leads round in a circle, entry.is_dir would raise.
      if entry.is_symlink():
        is_folder = os.path.isdir(entry.path)
      else:
        is_folder = entry.is_dir()
      if is_folder and not entry.name.startswith('.'):
        inner.append(entry.path)
  return sorted(inner)


def _inode_of_path(path: str) -> tuple[int, int]:
  """Returns the device and the inode of a path, which tell a file or a folder
  from all others."""
  status = os.stat(path)
  return status.st_dev, status.st_ino
