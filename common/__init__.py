"""The room that all others stand on: errors, declared fields, kinds of layer.

It is imported before all packages that are installed, so that a Python without
them is told of in one sentence.
"""

import importlib.util
import sys

if importlib.util.find_spec('absl') is None:
  sys.exit(f'error: {sys.executable} has none of the packages that this '
           'project needs: activate its environment with '
           '`. .venv/bin/activate`, which `make train` creates')
