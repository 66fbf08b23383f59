"""Studies whose truth is known: what is simulated in the place of training."""
