"""Recurrences beside attention: the state of a head stands for all tokens
before."""
