"""Delivers a person's pick to the right agent."""

from typing import Any

from klein_mcp.images.library import Record, Store
from klein_mcp.images.picks import Pick

STUDIO = "studio"
"""The client name of the browser page: a person, not an agent."""


def agent_for(store: Store, record: Record, client: str) -> str:
    """Return the client whose `last` a pick becomes.

    In a chat it is the chat's own client. In the browser it is the agent that made the image or its nearest
    ancestor, else the agent that made an image last.
    """
    if client != STUDIO:
        return client
    waiting, seen = [record], {record.handle}
    while waiting:
        each = waiting.pop(0)
        if each.client != STUDIO and each.tool != "open":
            return each.client
        parents = [parent for handle in each.parents if (parent := store.find(handle)) and handle not in seen]
        seen |= {parent.handle for parent in parents}
        waiting += parents
    return store.latest_client(besides=STUDIO) or STUDIO


def reported(line: dict[str, Any], pick: Pick) -> dict[str, Any]:
    """Return a result's line with the pick behind its first entry."""
    picked = {"image": pick.image, **({"mask": pick.mask} if pick.mask else {})}
    (name, value), *rest = line.items()
    return {name: value, "picked": picked, **dict(rest)}
