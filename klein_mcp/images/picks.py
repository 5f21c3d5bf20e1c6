"""Images that a person chose for a client's next call."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from klein_mcp.images.index import Index

_EXISTS = "EXISTS (SELECT 1 FROM pictures WHERE handle = picks.image AND deleted IS NULL)"
"""By the index of handles. `image IN (SELECT …)` read the whole table: 25 ms with 100,000 images."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A person's choice for a client. reported: whether a result mentioned it."""

    image: str
    mask: str | None
    reported: bool


class Picks:
    """The choices in a library's index, at most one for each client."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def choose(self, client: str, image: str, mask: str | None = None) -> None:
        """Record a person's choice of an image for `client`'s next call."""
        self._index.write(
            "INSERT OR REPLACE INTO picks (client, image, mask, created, newest)"
            " VALUES (?, ?, ?, ?, (SELECT coalesce(max(number), 0) FROM pictures))",
            *(client, image, mask, time.time()),
        )

    def of(self, client: str) -> Pick | None:
        """Return the person's choice, unless `client` has made an image since."""
        # By number, as a clock may be set back. Older picks have a time alone.
        row = self._index.row(
            "SELECT image, mask, reported FROM picks WHERE client = ? AND NOT EXISTS (SELECT 1 FROM pictures"
            " WHERE client = picks.client AND tool != 'open' AND deleted IS NULL"
            " AND number > coalesce(newest, 0) AND (newest IS NOT NULL OR pictures.created > picks.created))"
            f" AND {_EXISTS}",
            client,
        )
        return None if row is None else Pick(row[0], row[1], bool(row[2]))

    def report(self, client: str) -> Pick | None:
        """Return an unreported choice and mark it as reported."""
        with self._index.lock:
            unheard = f"SELECT image, mask FROM picks WHERE client = ? AND NOT reported AND {_EXISTS}"
            row = self._index.row(unheard, client)
            if row is None:  # nearly always, and a write would wait for whoever holds the index
                return None
            self._index.write("UPDATE picks SET reported = 1 WHERE client = ?", client)
        return Pick(row[0], row[1], True)

    def unreported(self) -> list[str]:
        """Return the clients of unreported picks, the latest pick first."""
        unheard = f"SELECT client FROM picks WHERE NOT reported AND {_EXISTS}"
        return [client for (client,) in self._index.rows(f"{unheard} ORDER BY coalesce(newest, 0) DESC, created DESC")]

    def hand_over(self, clients: Sequence[str], receiver: str) -> None:
        """Give the pick of the first client to `receiver`.

        Those of the other clients are dropped.
        """
        first, *others = clients
        with self._index.transaction():
            taken = self._index.execute("UPDATE OR REPLACE picks SET client = ? WHERE client = ?", receiver, first)
            for client in others if taken else ():  # not if another agent was first
                if client != receiver:
                    self._index.execute("DELETE FROM picks WHERE client = ?", client)

    def images(self) -> set[str]:
        """Return the handles of all images that are somebody's choice now."""
        clients = [client for (client,) in self._index.rows("SELECT client FROM picks")]
        return {pick.image for client in clients if (pick := self.of(client)) is not None}
