"""A sweep's report: its figures, tables, plots and page."""
