"""A run's folder: its config, checkpoints, figures and lock."""
