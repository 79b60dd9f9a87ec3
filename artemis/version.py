"""The version of the distribution, written into every adapter file."""

__version__ = "0.1.0"
