"""Optimisers, their schedules, and the rules of muP."""
