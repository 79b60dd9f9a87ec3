"""The one error for what a user can put right: a configuration, a model, an adapter file."""

from collections.abc import Iterable
from difflib import get_close_matches


class AdapterError(ValueError):
    """Bad configuration, model or file. The message is one complete sentence; nothing changed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'a' or 'b'?` for the names closest to `name`, or an empty string."""
    close = get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join `items` by commas; past `limit`, say only how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
