"""Looking inside a model: what it computes of some tokens, in numbers and as a
page."""
