"""Parity of every system with its implementation in transformers."""
