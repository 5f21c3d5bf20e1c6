"""Delivers a person's pick to the right agent."""

import re
from typing import Any

from klein_mcp.images.library import Record, Store
from klein_mcp.images.picks import Pick

STUDIO = "studio"
"""The client name of the browser page: a person, not an agent."""

NEXT = "next agent"
"""The client name under which a pick waits for whichever agent calls next."""

_OF_A_PROCESS = re.compile(r"(?:front-end|session)-(\d+)-")
"""The name of an agent that lasts no longer than the process that serves it."""


def is_connected(client: str) -> bool:
    """Return whether an agent may still call under this name.

    Callers of the other APIs, commands and the studio are no agents: they never ask for `last`.
    """
    if process := _OF_A_PROCESS.match(client):
        import psutil

        return psutil.pid_exists(int(process[1]))
    return client.startswith("token-")


def agent_for(store: Store, record: Record, client: str) -> str:
    """Return the client whose `last` a pick becomes.

    In a chat it is the chat's own client. In the browser it is the agent that made the image or its nearest
    ancestor; if no such agent is connected, it is the next one that calls.
    """
    if client != STUDIO:
        return client
    waiting, seen = [record], {record.handle}
    while waiting:
        each = waiting.pop(0)
        if each.tool != "open" and is_connected(each.client):
            return each.client
        parents = [parent for handle in each.parents if (parent := store.find(handle)) and handle not in seen]
        seen |= {parent.handle for parent in parents}
        waiting += parents
    return NEXT


def claim(store: Store, client: str) -> None:
    """Give an agent the latest pick that no other one waits for.

    A pick for an agent that has ended since is one of them.
    """
    waiting = [other for other in store.picks.unreported() if other == client or not is_connected(other)]
    if waiting and waiting != [client]:
        store.picks.hand_over(waiting, client)


def reported(line: dict[str, Any], pick: Pick) -> dict[str, Any]:
    """Return a result's line with the pick behind its first entry."""
    picked = {"image": pick.image, **({"mask": pick.mask} if pick.mask else {})}
    (name, value), *rest = line.items()
    return {name: value, "picked": picked, **dict(rest)}
