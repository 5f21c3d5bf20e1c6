"""Who paints next: a bounded queue, one turn per client in the round, and the one thread that drives the engine."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from engine.contract import Busy, EngineError, EngineFailed, EngineStatus, Event, Job, Loading, Queued, Result
from klein_mcp.jobs.timing import TimingHistory

log = logging.getLogger(__name__)

REMEMBERED = 256
"""Clients whose last turn is remembered; one that was served longer ago counts as new."""

LULL = 0.3
"""Seconds without a job before the engine works ahead. The next picture of the same call comes sooner and would have to
wait for it; nobody has looked at a picture and asked for a change in less."""

Tell = Callable[[Event | EngineError], None]
"""Where a ticket's events go. Called from any thread; must return at once and not raise."""


class Executor(Protocol):
    """What drives the pixels: engine.engine.Engine, or a fake of the same shape in a test."""

    def run(self, job: Job) -> Iterator[Event]: ...
    def status(self) -> EngineStatus: ...
    def release(self) -> None: ...
    def prefetch(self) -> bool: ...


@dataclass(eq=False, slots=True)
class Ticket:
    """One job in the queue or under the brush, and everybody who waits for it."""

    job: Job
    client: str
    waiters: list[Tell]
    cancelled: bool = False
    latest: Event | None = None

    def say(self, event: Event) -> None:
        self.latest = event
        self.tell(event)

    def tell(self, event: Event | EngineError) -> None:
        for tell in self.waiters:
            tell(event)


class Queue:
    """Takes jobs from any thread; `work` is the body of the thread that paints them."""

    def __init__(
        self,
        make_painter: Callable[[], Executor],
        *,
        size: int,
        keep_alive: float,
        history: TimingHistory | None = None,
    ) -> None:
        self._make_painter = make_painter
        self._painter: Executor | None = None
        self._size = size
        self._keep_alive = keep_alive
        self._change = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}  # by client
        self._turns: dict[str, int] = {}  # when each client was last served, the latest at the end
        self._turn = itertools.count(1)
        self._running: Ticket | None = None
        self._closed = False
        self._resting = True  # nothing is loaded that could be released
        self._idle_since = time.monotonic()
        self._history = history or TimingHistory()
        self._began = 0.0
        self._done = self._failed = 0

    def put(self, job: Job, client: str, tell: Tell, *, promised: bool = False) -> Ticket:
        """promised: its client has been told to come back for it, so it finds a place whatever waits.

        Raises Busy when the queue is full, EngineFailed when it is closed.
        """
        ticket = Ticket(job, client, [tell])
        with self._change:
            if self._closed:
                raise _stopped()
            waiting = self._count()
            if waiting >= self._size and not promised:
                raise Busy(
                    f"The queue is full: {waiting} pictures are waiting, at most {self._size} may.",
                    retry_after=self._seconds_until_a_place(),
                )
            self._waiting.setdefault(client, deque()).append(ticket)
            self._tell_positions()
            self._change.notify_all()
        return ticket

    def adopt(self, job: Job, client: str, tell: Tell) -> Ticket | None:
        """Wait for the same job of the same client too, if it waits or is being painted; None where there is none.

        Whoever asked for it goes on being told: it may be another call for the same picture.
        """
        with self._change:
            for ticket in self._tickets():
                if ticket.client == client and ticket.job == job and not ticket.cancelled:
                    ticket.waiters = [*ticket.waiters, tell]
                    if ticket.latest is not None:
                        tell(ticket.latest)
                    return ticket
        return None

    def cancel(self, ticket: Ticket, tell: Tell) -> None:
        """A waiting job leaves; a running one is put down at its next yield. Once is enough, twice does no harm.

        tell: who hangs up; the job goes on for whoever else waits for it.
        """
        with self._change:
            ticket.waiters = [waiter for waiter in ticket.waiters if waiter is not tell]
            if ticket.waiters:
                return
            ticket.cancelled = True
            line = self._waiting.get(ticket.client, ())
            if ticket in line:
                line.remove(ticket)  # type: ignore[union-attr]
                if not line:
                    del self._waiting[ticket.client]
                self._tell_positions()

    def close(self) -> None:
        """Take no more jobs; whoever waits is told so, and the job under the brush is put down."""
        with self._change:
            self._closed = True
            tickets = self._tickets()
            self._waiting.clear()
            for ticket in tickets:
                ticket.cancelled = True
                ticket.tell(_stopped())
            self._change.notify_all()

    @property
    def idle_seconds(self) -> float:
        """How long nothing has waited or been painted."""
        with self._change:
            return 0.0 if self._running or self._waiting else time.monotonic() - self._idle_since

    def status(self) -> dict[str, Any]:
        """Cheap, from any thread."""
        with self._change:
            state = {
                "waiting": self._count(),
                "size": self._size,
                "clients": len(self._waiting),
                "running": self._running is not None,
                "done": self._done,
                "failed": self._failed,
            }
            painter = self._painter
        state = {"queue": state, "seconds": self._history.tables()}
        return {**state, **({"engine": painter.status().to_json()} if painter else {})}

    def work(self) -> None:
        """Paint until closed."""
        while ticket := self._next():
            outcome = self._paint(ticket)
            with self._change:
                self._running = None
                self._idle_since = time.monotonic()
                if isinstance(outcome, Result):
                    self._done += 1
                    seconds = self._idle_since - self._began - outcome.ms.get("load", 0.0) / 1000
                    self._history.note(ticket.job, outcome, seconds)
                elif isinstance(outcome, EngineError):
                    self._failed += 1
                if outcome is not None and not ticket.cancelled:
                    ticket.tell(outcome)
            # Kept while nobody comes, these would keep a job's references and an error's half-loaded weights.
            del ticket, outcome
            self._prefetch()

    def _next(self) -> Ticket | None:
        while True:
            with self._change:
                woken = True
                while not self._waiting and not self._closed and woken:
                    woken = self._change.wait(None if self._resting else self._keep_alive)
                if self._closed:
                    return None
                if self._waiting:
                    return self._take()
            # Outside the lock: putting tens of gigabytes away takes its time, and only this thread drives the painter.
            self._rest()

    def _take(self) -> Ticket:
        self._resting = False
        client = self._round()[0]
        line = self._waiting[client]
        self._running, self._began = line.popleft(), time.monotonic()
        if not line:
            del self._waiting[client]
        self._turns.pop(client, None)
        self._turns[client] = next(self._turn)
        if len(self._turns) > REMEMBERED:
            del self._turns[next(iter(self._turns))]
        self._tell_positions()
        return self._running

    def _prefetch(self) -> None:
        """While nobody waits: the engine may do ahead what the next job is likely to need."""
        with self._change:
            if self._change.wait_for(lambda: self._waiting or self._closed, LULL):
                return
        try:
            while self._painter and not self._waiting and not self._closed and self._painter.prefetch():
                pass
        except Exception:
            # Nobody asked for it, so nobody is told; the job that needs it will meet the problem itself.
            log.exception("the engine broke off while it prepared for the next job")

    def _rest(self) -> None:
        """Nobody came for a while: the weights leave memory."""
        self._resting = True
        if self._painter:
            log.info("idle for %.0f s: releasing the weights", self._keep_alive)
            try:
                self._painter.release()
            except Exception:
                # The thread that paints must outlive it; the next job will load over what is left.
                log.exception("the weights could not be released")

    def _paint(self, ticket: Ticket) -> Result | EngineError | None:
        """The picture or what went wrong; None if it was cancelled."""
        try:
            return self._drive(ticket)
        except EngineError as problem:
            # Its traceback and its cause hold the frames it came from, and these whatever they had loaded.
            problem.__cause__ = problem.__context__ = None
            return problem.with_traceback(None)
        except Exception as problem:
            log.exception("the engine broke off")
            first_line = (str(problem).splitlines() or [""])[0]
            return EngineFailed(
                f"The engine broke off: {type(problem).__name__}: {first_line}".rstrip(": ") + ".",
                hint="Its log, named by `klein-mcp status`, has the details.",
            )

    def _drive(self, ticket: Ticket) -> Result | None:
        if not self._painter:
            ticket.say(Loading(ticket.job.model, 0.0))
        with closing(self._ready().run(ticket.job)) as events:  # type: ignore[type-var]
            percent = painting = None
            for event in events:
                if ticket.cancelled:
                    return None
                if isinstance(event, Result):
                    painting = event
                    continue
                # The engine pauses after each of some hundred tensors; a hundred frames are enough.
                if isinstance(event, Loading) and percent == (percent := int(100 * event.fraction)):
                    continue
                ticket.say(event)
        if not painting:
            raise EngineFailed("The engine ended without a picture.")
        return painting

    def _ready(self) -> Executor:
        if not self._painter:
            self._painter = self._make_painter()
            # From here on it paints: the seconds that torch takes to come in must not be expected of the next job.
            self._began = time.monotonic()
        return self._painter

    def _round(self) -> list[str]:
        """Clients that wait, whoever was served longest ago first, new ones before all.

        Not the order of arrival: a client that sends one job at a time is always the last to arrive.
        """
        return sorted(self._waiting, key=lambda client: self._turns.get(client, 0))

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _tickets(self) -> list[Ticket]:
        """The one that is being painted first."""
        return [*([self._running] if self._running else []), *itertools.chain(*self._waiting.values())]

    def _tell_positions(self) -> None:
        ahead = 1 if self._running else 0
        seconds = self._seconds_left()
        for position, ticket in enumerate(self._in_turn(), ahead):
            seconds = _sum(seconds, self._history.seconds(ticket.job))
            if not isinstance(ticket.latest, Queued) or ticket.latest.position != position:
                ticket.say(Queued(position, seconds))

    def _seconds_left(self) -> float | None:
        """For the picture under the brush."""
        if not self._running:
            return 0.0
        whole = self._history.seconds(self._running.job)
        return None if whole is None else max(0.0, whole - (time.monotonic() - self._began))

    def _seconds_until_a_place(self) -> float:
        # Where nothing has been measured yet, a guess that makes nobody hammer at the door.
        return max(1.0, round(self._seconds_left() or 5.0, 1))

    def _in_turn(self) -> Iterator[Ticket]:
        """Waiting tickets in the order in which they will be painted if nobody comes or leaves."""
        rounds = itertools.zip_longest(*(self._waiting[client] for client in self._round()))
        return (ticket for turn in rounds for ticket in turn if ticket)


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _stopped() -> EngineFailed:
    return EngineFailed("The engine was stopped.", hint="The next call starts it again.")
