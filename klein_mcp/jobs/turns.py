"""Jobs that wait, in the order of their clients' turns."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.contract import EngineError, Event, Job, Queued

REMEMBERED_CLIENTS = 256
"""Clients whose last turn is remembered; one that was served longer ago counts as new."""

Tell = Callable[[Event | EngineError], None]
"""Takes a ticket's events. Called from any thread; must return at once and not raise."""

Expected = Callable[[Job], float | None]
"""Returns the seconds that a job may take, None where that is unknown."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One job that waits or runs.

    watched: whether its steps should carry previews; may change at any time.
    turn: how many jobs had been taken when it came.
    broke_off: whether the engine failed it unexpectedly, by an error that says nothing of the job.
    """

    job: Job
    client: str
    tell: Tell
    watched: bool = False
    turn: int = 0
    cancelled: bool = False
    position: int | None = None
    began: float = field(default=0.0)
    broke_off: bool = False


class Turns:
    """Waiting tickets, one turn per client in the round.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Ticket]] = {}  # by client
        self._served: dict[str, int] = {}  # when each client was last served, the latest at the end
        self._turn = 0  # jobs taken so far

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return bool(self._waiting)  # needs no lock, unlike a count

    def __iter__(self) -> Iterator[Ticket]:
        """Yield the tickets in the order in which they will run."""
        rounds = itertools.zip_longest(*(self._waiting[client] for client in self._round()))
        return (ticket for turn in rounds for ticket in turn if ticket)

    @property
    def clients(self) -> int:
        """Clients that wait."""
        return len(self._waiting)

    def count(self, client: str) -> int:
        """Return how many jobs of a client wait."""
        return len(self._waiting.get(client, ()))

    def add(self, ticket: Ticket) -> None:
        ticket.turn = self._turn
        self._waiting.setdefault(ticket.client, deque()).append(ticket)

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out, and return whether it waited."""
        line = self._waiting.get(ticket.client)
        if not line or ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.client]
        return True

    def clear(self) -> list[Ticket]:
        """Take all tickets out."""
        tickets = [*itertools.chain(*self._waiting.values())]
        self._waiting.clear()
        return tickets

    def take(self) -> Ticket:
        """Take the next ticket out. Raises IndexError if none waits."""
        client = self._round()[0]
        line = self._waiting[client]
        ticket = line.popleft()
        if not line:
            del self._waiting[client]
        self._turn += 1
        self._served.pop(client, None)
        self._served[client] = self._turn
        if len(self._served) > REMEMBERED_CLIENTS:
            del self._served[next(iter(self._served))]
        return ticket

    def tell_positions(self, running: Sequence[Ticket], slots: int, expected: Expected) -> None:
        """Tell each ticket its position, if that has changed."""
        ahead = len(running) - slots + 1
        seconds = seconds_until_free(running, slots, expected)
        for index, ticket in enumerate(self):
            position = max(0, ahead + index)
            needed = expected(ticket.job)
            seconds = None if seconds is None or needed is None else seconds + needed / slots
            if ticket.position != position:
                ticket.position = position
                ticket.tell(Queued(position, seconds))

    def _round(self) -> list[str]:
        """Return the clients that wait, the one served longest ago first.

        A new one counts as served just before the latest: first of all, a client that takes a new name for each job
        would always be next. Not the order of arrival: a client that sends one job at a time is always the last.
        """
        return sorted(self._waiting, key=self._last_turn)

    def _last_turn(self, client: str) -> tuple[int, bool]:
        """Return when a client was served, and whether it was."""
        served = self._served.get(client)
        return (self._waiting[client][0].turn, False) if served is None else (served, True)


def seconds_until_free(running: Sequence[Ticket], slots: int, expected: Expected) -> float | None:
    """Return the seconds until a slot is free, where that is known."""
    if len(running) < slots:
        return 0.0
    left = []
    for ticket in running:
        total = expected(ticket.job)
        if total is None:
            return None
        left.append(max(0.0, total - (time.monotonic() - ticket.began)))
    return min(left)
