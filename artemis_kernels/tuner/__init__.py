"""`tune`: time what dispatch could choose on this machine, and keep what wins."""

from .run import tune

__all__ = ["tune"]
