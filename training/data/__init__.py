"""Data: where text comes from, and how it becomes batches."""
