"""Which files a pattern with * and ** names: each file once, whatever links
lead to it."""

from collections.abc import Iterator
import contextlib
import glob
import os

_ANY_DEPTH = '**'


def find_files(pattern: str) -> tuple[str, ...]:
  """Finds the files that a pattern matches, sorted by their paths.

  In the pattern ** stands for no folder, or several, whose names do not begin
  with a dot. Links are followed. A file to which several paths lead is there
  once, by a path that ends in no link where there is one.

  Args:
    pattern: an absolute path with * and **.
  """
  # Paths that end in no link come before other paths to the same file, which
  # setdefault then leaves out. A file is known by its inode.
  paths = sorted({*filter(os.path.isfile, _find_paths(pattern))})
  paths.sort(key=os.path.islink)
  path_of_inode: dict[tuple[int, int], str] = {}
  for path in paths:
    path_of_inode.setdefault(_inode_of_path(path), path)
  return tuple(sorted(path_of_inode.values()))


def _find_paths(pattern: str) -> Iterator[str]:
  """Yields the paths that a pattern matches, some perhaps twice.

  Args:
    pattern: an absolute path with * and **.
  """
  parts = pattern.split(os.sep)
  if _ANY_DEPTH not in parts:
    yield from glob.iglob(pattern)
    return
  # Match what stands before the first ** to folders, and what stands after it
  # in each folder below these; it may have another **, hence the recursion.
  place = parts.index(_ANY_DEPTH)
  pattern_above = os.sep.join(parts[:place]) or os.sep
  pattern_below = os.sep.join(parts[place + 1:]) or '*'
  for folder in _walk_folders(sorted(glob.glob(pattern_above))):
    yield from _find_paths(os.path.join(glob.escape(folder), pattern_below))


def _walk_folders(tops: list[str]) -> Iterator[str]:
  """Yields some folders and all folders below them, each once. A folder to
  which a link leads comes last, and only where no other path leads to it.

  Args:
    tops: the folders to begin with.
  """
  seen = set()
  # `folders` is a stack, whose last one is next. Links wait until no folder is
  # left. Folders that were seen are known by inode, so that a link which leads
  # round in a circle ends.
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

    # The folders in it come before its neighbours, in the order of the names.
    inner = _list_folders(folder)
    for path in inner:
      if os.path.islink(path):
        links.append(path)
    for path in reversed(inner):
      if not os.path.islink(path):
        folders.append(path)


def _list_folders(folder: str) -> list[str]:
  """Returns the folders in a folder, and the links to folders, sorted. A folder
  that may not be read has none, as the shell has it."""
  inner = []
  with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
    for entry in entries:
      # For a link, is_dir would raise where it leads round in a circle.
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
