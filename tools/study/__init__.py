"""From a question to a table that survives review: docs/studies.md."""
