"""Lineage of images: ancestors, children, siblings of one call."""

from klein_mcp.images.index import Index
from klein_mcp.images.record import SHEET_SECONDS, Record, sheet_of

LONGEST_LINE = 10_000
"""Images that are followed: a library that was tampered with may lead in a circle."""


class Lineage:
    """The lineage of images in a library's index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def root(self, handle: str) -> str:
        """Return the oldest ancestor along first parents, else the image itself."""
        query = (
            "WITH RECURSIVE line (handle, depth) AS (SELECT ?, 0 UNION ALL"
            " SELECT parent, depth + 1 FROM parents JOIN line ON child = line.handle WHERE position = 0 AND depth < ?)"
            " SELECT handle FROM line ORDER BY depth DESC LIMIT 1"
        )
        row = self._index.row(query, handle, LONGEST_LINE)
        return handle if row is None else row[0]

    def children(self, handle: str, *, deleted: bool = False, limit: int = -1) -> list[Record]:
        """Return the images made directly from this one, oldest first.

        deleted: whether deleted ones count that have children of their own. They come last.
        limit: the most images; -1 for all.
        """
        return self._index.all(
            "handle IN (SELECT child FROM parents WHERE parent = ?)"
            " AND (deleted IS NULL OR (? AND EXISTS (SELECT 1 FROM parents WHERE parent = handle)))"
            " ORDER BY deleted IS NOT NULL, number LIMIT ?",
            *(handle, deleted, limit),
        )

    def siblings(self, record: Record) -> list[Record]:
        """Return the images of the call that made this one."""
        near = self._index.all(
            "deleted IS NULL AND client = ? AND tool = ? AND prompt = ?"
            " AND created BETWEEN ? AND ? ORDER BY number LIMIT 64",
            *(record.client, record.tool, record.prompt),
            *(record.created - SHEET_SECONDS, record.created + SHEET_SECONDS),
        )
        return sheet_of(record, near)
