"""Decides which job runs next.

A bounded queue, one turn per client in the round, one thread per executor slot.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from engine.contract import (
    Busy,
    EngineError,
    EngineFailed,
    EngineStatus,
    Event,
    Job,
    Loading,
    Queued,
    Result,
    Rgb8,
    Stage,
)
from klein_mcp.jobs.executor import Executor
from klein_mcp.jobs.status import QueueStatus
from klein_mcp.jobs.timing import TimingHistory

log = logging.getLogger(__name__)

REMEMBERED_CLIENTS = 256
"""Clients whose last turn is remembered; one that was served longer ago counts as new."""

IDLE_BEFORE_PREFETCH = 0.3
"""Seconds without a job before the engine works ahead. The next image of the same call comes sooner and would have to
wait for it; nobody has looked at an image and asked for a change in less."""

STAGE_PAUSE = 0.5
"""Seconds between two events of one stage that listeners hear of."""

Tell = Callable[[Event | EngineError], None]
"""Takes a ticket's events. Called from any thread; must return at once and not raise."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One job that waits or runs.

    watched: whether its steps should carry previews; may change at any time.
    """

    job: Job
    client: str
    tell: Tell
    watched: bool = False
    cancelled: bool = False
    position: int | None = None
    began: float = field(default=0.0)


class Queue:
    """Takes jobs from any thread and runs them in its own."""

    def __init__(
        self,
        make_executor: Callable[[], Executor],
        *,
        size: int,
        keep_alive: float,
        history: TimingHistory | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        """make_executor: called by the first job's thread, as it may take seconds.

        size: jobs that may wait.
        keep_alive: seconds without a job until the executor releases its weights.
        on_death: called from a thread that ends by an error of ours; no job is run any more.
        """
        self._on_death = on_death
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self._size = size
        self._keep_alive = keep_alive
        self._change = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}  # by client
        self._turns: dict[str, int] = {}  # when each client was last served, the latest at the end
        self._turn = itertools.count(1)
        self._running: list[Ticket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._loaded = False  # there may be weights that could be released
        self._latest_image: Rgb8 | None = None
        self._prefetch_at = 0.0
        self._idle_since = time.monotonic()
        self._history = history or TimingHistory()
        self._done = self._failed = 0

    def put(self, job: Job, client: str, tell: Tell, *, watched: bool = False, bypass_limit: bool = False) -> Ticket:
        """Queue `job`. bypass_limit: it belongs to a request that was accepted before.

        Raises Busy when the queue is full, EngineFailed when it is closed.
        """
        ticket = Ticket(job, client, tell, watched)
        with self._change:
            if not bypass_limit:
                self.check_place(client)
            if self._closed:
                raise engine_stopped()
            self._waiting.setdefault(client, deque()).append(ticket)
            self._tell_positions()
            self._grow()
            self._change.notify_all()
        return ticket

    def check_place(self, client: str) -> None:
        """Raise Busy if one more job of `client` would find no place.

        A client may have as many jobs waiting as there are places left. One alone can take half of them, and so
        there is a place for whoever comes next.
        """
        with self._change:
            waiting, own = self._count(), len(self._waiting.get(client, ()))
            left = self._size - waiting
            if left > own:
                return
            message = f"The queue is full: {waiting} images are waiting, at most {self._size} may."
            if left > 0:
                message = f"{own} of your images are waiting; the other {left} places are for other clients."
            raise Busy(message, retry_after=self._seconds_until_a_place())

    def cancel(self, ticket: Ticket) -> None:
        """Drop a waiting job.

        Stop a running one at its next yield. Twice does no harm.
        """
        with self._change:
            ticket.cancelled = True
            line = self._waiting.get(ticket.client)
            if line and ticket in line:
                line.remove(ticket)
                if not line:
                    del self._waiting[ticket.client]
                self._tell_positions()

    def prefetch(self, image: Rgb8) -> None:
        """Prepare for an edit of `image`.

        Once no job has come for a moment.
        """
        with self._change:
            self._latest_image, self._prefetch_at = image, time.monotonic() + IDLE_BEFORE_PREFETCH
            self._change.notify_all()

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new jobs and stop all others.

        timeout: seconds to wait for running ones.
        """
        with self._change:
            self._closed = True
            tickets = [*self._running, *itertools.chain(*self._waiting.values())]
            self._waiting.clear()
            for ticket in tickets:
                ticket.cancelled = True
                ticket.tell(engine_stopped())
            self._change.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread is threading.current_thread():
                continue  # it closes the queue as it ends
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last job ended.

        0 while one waits or runs.
        """
        with self._change:
            return 0.0 if self._running or self._waiting else time.monotonic() - self._idle_since

    def status(self) -> QueueStatus:
        """Describe the queue, from any thread."""
        with self._change:
            return QueueStatus(
                waiting=self._count(),
                size=self._size,
                clients=len(self._waiting),
                running=bool(self._running),
                done=self._done,
                failed=self._failed,
            )

    def engine_status(self) -> EngineStatus | None:
        """Describe the executor.

        None before the first job.
        """
        executor = self._executor
        return executor.status() if executor else None

    def seconds(self) -> dict[str, dict[str, float]]:
        """Seconds per image by model and size, as measured here."""
        return self._history.tables()

    # -- threads -------------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Start a thread if a job waits though a slot is free."""
        slots = self._executor.slots if self._executor else 1
        busy = len(self._running)
        if len(self._threads) < slots and self._count() + busy > len(self._threads):
            thread = threading.Thread(target=self._work, name=f"executor-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        """Run jobs until closed, or end visibly."""
        try:
            self._run_jobs()
        except BaseException:
            # Jobs and state files are checked where they come in, so this is an error of ours. A dead thread would
            # leave a queue in which everybody waits for ever.
            log.exception("the thread that runs jobs ended")
            self.close()
            if self._on_death:
                self._on_death()

    def _run_jobs(self) -> None:
        while ticket := self._next():
            outcome = self._run(ticket)
            with self._change:
                self._running.remove(ticket)
                self._idle_since = time.monotonic()
                if isinstance(outcome, Result):
                    self._done += 1
                    self._note(ticket, outcome)
                elif isinstance(outcome, EngineError):
                    self._failed += 1
                if outcome is not None and not ticket.cancelled:
                    ticket.tell(outcome)
            # An idle thread that kept these would keep a job's references and an error's half-loaded weights.
            del ticket, outcome

    def _note(self, ticket: Ticket, outcome: Result) -> None:
        seconds = self._idle_since - ticket.began - outcome.ms.get("load", 0.0) / 1000
        try:
            self._history.note(ticket.job, outcome, seconds)
        except Exception:
            log.exception("the time of an image could not be recorded")

    def _expected(self, job: Job) -> float | None:
        """Return the seconds that `job` may take, None where that is unknown."""
        try:
            return self._history.seconds(job)
        except Exception:
            # An estimate is worth no job: an odd one, or an odd history, must not stop the queue.
            log.exception("the time of an image could not be estimated")
            return None

    def _next(self) -> Ticket | None:
        """Return the next job, None once closed.

        Meanwhile it prefetches, and unloads an idle model.
        """
        while True:
            with self._change:
                if self._closed:
                    return None
                if self._waiting:
                    return self._take()
                now = time.monotonic()
                image = None
                if self._latest_image is not None and now >= self._prefetch_at:
                    image, self._latest_image = self._latest_image, None
                elif self._loaded and not self._running and now >= self._idle_since + self._keep_alive:
                    self._loaded = False
                else:
                    self._change.wait(self._seconds_until_idle_work(now))
                    continue
            # Outside the lock: moving tens of gigabytes takes time, and no job runs in this thread.
            if image is not None:
                self._prefetch_now(image)
            else:
                self._unload_idle()

    def _seconds_until_idle_work(self, now: float) -> float | None:
        due = []
        if self._latest_image is not None:
            due.append(self._prefetch_at)
        if self._loaded and not self._running:
            due.append(self._idle_since + self._keep_alive)
        return max(0.0, min(due) - now) if due else None

    def _take(self) -> Ticket:
        self._loaded = True
        client = self._round()[0]
        line = self._waiting[client]
        ticket = line.popleft()
        ticket.began = time.monotonic()
        self._running.append(ticket)
        if not line:
            del self._waiting[client]
        self._turns.pop(client, None)
        self._turns[client] = next(self._turn)
        if len(self._turns) > REMEMBERED_CLIENTS:
            del self._turns[next(iter(self._turns))]
        self._tell_positions()
        return ticket

    def _prefetch_now(self, image: Rgb8) -> None:
        executor = self._executor
        try:
            while executor and not self._waiting and not self._closed and executor.prefetch(image):
                pass
        except Exception:
            # Nobody asked for it; the job that needs it will meet the error itself.
            log.exception("the engine failed while it prepared for the next job")

    def _unload_idle(self) -> None:
        executor = self._executor
        if executor is None:
            return
        log.info("idle for %.0f s: releasing the weights", self._keep_alive)
        try:
            executor.release()
        except Exception:
            # This thread must outlive it; the next job loads over what is left.
            log.exception("the weights could not be released")

    def _run(self, ticket: Ticket) -> Result | EngineError | None:
        """Return the result or the error.

        None if it was cancelled.
        """
        try:
            return self._execute(ticket)
        except EngineError as exc:
            # Its traceback and its cause hold the frames it came from, and these whatever they had loaded.
            exc.__cause__ = exc.__context__ = None
            return exc.with_traceback(None)
        except Exception as exc:
            log.exception("the engine broke off")
            first_line = (str(exc).splitlines() or [""])[0]
            return EngineFailed(
                f"The engine broke off: {type(exc).__name__}: {first_line}".rstrip(": ") + ".",
                hint="Its log, named by `klein-mcp status`, has the details.",
            )

    def _execute(self, ticket: Ticket) -> Result | None:
        if not self._executor:
            ticket.tell(Loading(ticket.job.model, 0.0))
        executor = self._ready(ticket)
        with closing(executor.run(ticket.job, lambda: ticket.watched)) as events:  # type: ignore[type-var]
            last_percent = None
            stage, stage_at = "", 0.0
            result = None
            for event in events:
                if ticket.cancelled:
                    return None
                if isinstance(event, Result):
                    result = event
                    continue
                if isinstance(event, Loading):
                    # The engine yields after each of some hundred tensors; a hundred events are enough.
                    percent = int(100 * event.fraction)
                    if percent == last_percent:
                        continue
                    last_percent = percent
                if isinstance(event, Stage):
                    # It yields after each layer of a prompt, too: on a fast machine hundreds in a second.
                    now = time.monotonic()
                    if event.name == stage and now < stage_at + STAGE_PAUSE:
                        continue
                    stage, stage_at = event.name, now
                ticket.tell(event)
        if not result:
            raise EngineFailed("The engine ended without an image.")
        return result

    def _ready(self, ticket: Ticket) -> Executor:
        if not self._executor:
            executor = self._make_executor()
            with self._change:
                self._executor = executor
                # The seconds that torch takes to import must not be expected of the next job.
                ticket.began = time.monotonic()
                self._grow()
        return self._executor  # type: ignore[return-value]

    # -- turns and positions -------------------------------------------------------------------------------------------

    def _round(self) -> list[str]:
        """Clients that wait.

        The one served longest ago first and new ones before all.
        Not the order of arrival: a client that sends one job at a time is always the last to arrive.
        """
        return sorted(self._waiting, key=lambda client: self._turns.get(client, 0))

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _tell_positions(self) -> None:
        slots = self._executor.slots if self._executor else 1
        ahead = len(self._running) - slots + 1
        seconds = self._seconds_left()
        for index, ticket in enumerate(self._in_turn()):
            position = max(0, ahead + index)
            needed = self._expected(ticket.job)
            seconds = None if seconds is None or needed is None else seconds + needed / slots
            if ticket.position != position:
                ticket.position = position
                ticket.tell(Queued(position, seconds))

    def _seconds_left(self) -> float | None:
        """Seconds until a slot is free, where that is known."""
        slots = self._executor.slots if self._executor else 1
        if len(self._running) < slots:
            return 0.0
        left = []
        for ticket in self._running:
            total = self._expected(ticket.job)
            if total is None:
                return None
            left.append(max(0.0, total - (time.monotonic() - ticket.began)))
        return min(left)

    def _seconds_until_a_place(self) -> float:
        # Where nothing has been measured yet, a guess that lets nobody retry in a tight loop.
        return max(1.0, round(self._seconds_left() or 5.0, 1))

    def _in_turn(self) -> Iterator[Ticket]:
        """Yield waiting tickets in the order in which they will run."""
        rounds = itertools.zip_longest(*(self._waiting[client] for client in self._round()))
        return (ticket for turn in rounds for ticket in turn if ticket)


def engine_stopped() -> EngineFailed:
    """Make the error for whoever waits while the engine is stopped."""
    return EngineFailed("The engine was stopped.", hint="The next call starts it again.")
