"""The report of runs: what their folders hold (`load`), what is shown of it, and as which files."""
