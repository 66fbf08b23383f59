"""Tokenising a corpus with many machines, into shards that runs read."""
