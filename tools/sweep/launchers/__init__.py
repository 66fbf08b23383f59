"""How a sweep's runs are started: here, or on a SLURM cluster."""
