"""Starting a run as several processes: here, or on a cluster."""
