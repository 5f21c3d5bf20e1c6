"""What fits into this machine's memory."""

from collections.abc import Iterable

from engine.variants import VARIANTS

_PREFERENCE = ("klein-9b-kv", "klein-9b", "klein-4b")
"""What `auto` takes first. Base variants are for fine-tuning and slow: only when named."""


def fitting(installed: Iterable[str], free_bytes: int) -> str | None:
    """The best of the installed variants whose weights and working memory fit into `free_bytes`."""
    there = set(installed)
    return next((name for name in _PREFERENCE if name in there and VARIANTS[name].memory_gb * 1e9 <= free_bytes), None)
