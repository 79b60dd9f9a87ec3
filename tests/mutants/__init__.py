"""Deliberate faults, each of which must turn a test red: the proof that the tests look.

    python -m tests.mutants [--only NAME ...] [--list]

`faults.py` is the list, `__main__.py` applies it one by one to a copy of the tree.
"""
