"""Studies, for python -m tools.study."""
