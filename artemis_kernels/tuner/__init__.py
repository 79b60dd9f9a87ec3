"""`tune`: time what could be chosen on this machine, keep what wins; `choices`: what is chosen."""

from .choices import choices
from .run import tune

__all__ = ["choices", "tune"]
