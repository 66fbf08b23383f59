"""Conversations with a model, turn by turn."""
