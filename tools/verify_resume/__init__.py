"""Whether a run goes on as if nothing had happened."""
