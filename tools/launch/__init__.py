"""Starting a run on a cluster, each with --dry_run."""
