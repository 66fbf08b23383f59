"""The configs of runs: one file a system, and every default in base.py."""

import pathlib

FOLDER = pathlib.Path(__file__).parent
