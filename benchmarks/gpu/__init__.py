"""One command for a fresh machine with one GPU: see __main__.py."""
