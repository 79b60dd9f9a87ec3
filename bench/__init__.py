"""Measurements of speed. Run from the repository's root: `python -m bench.train_step --help`."""
