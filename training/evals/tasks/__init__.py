"""Evaluation tasks: one file each, found by its name; see training/evals."""
