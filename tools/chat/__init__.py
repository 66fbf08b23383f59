"""A conversation with a model: python -m tools.chat."""
