"""Decides which job runs next.

A bounded queue, one turn per client in the round, one thread per executor slot.
"""

import logging
import threading
import time
from collections.abc import Callable

from engine.contract import (
    Busy,
    DeviceLost,
    EngineError,
    EngineFailed,
    EngineStatus,
    Job,
    Loading,
    Result,
    Rgb8,
)
from klein_mcp.jobs import running
from klein_mcp.jobs.executor import Executor
from klein_mcp.jobs.status import QueueStatus
from klein_mcp.jobs.timing import TimingHistory
from klein_mcp.jobs.turns import Tell, Ticket, Turns, seconds_until_free

log = logging.getLogger(__name__)

WARM_LOAD_MS = 5.0
"""Milliseconds of loading above which a job found no loaded model; to find a loaded one takes less than 1."""

IDLE_BEFORE_PREFETCH = 0.3
"""Seconds without a job before the engine works ahead. The next image of the same call comes sooner and would have to
wait for it; nobody has looked at an image and asked for a change in less."""

BROKEN = 3
"""Jobs that break off one after another until the engine counts as broken."""


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
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        """make_executor: called by the first job's thread, as it may take seconds.

        size: jobs that may wait.
        keep_alive: seconds without a job until the executor releases its weights.
        on_death: called from a thread that ends by an error of ours; no job is run any more.
        on_broken: called from a job's thread, before its error is passed on, once the engine is broken. Then no job is
        run any more: those that wait hear nothing, and are the caller's to end. Without it jobs go on.
        """
        self._on_death = on_death
        self._on_broken = on_broken
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self._size = size
        self._keep_alive = keep_alive
        self._change = threading.Condition()
        self._waiting = Turns()
        self._running: list[Ticket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._loaded = False  # there may be weights that could be released
        self._latest_image: Rgb8 | None = None
        self._prefetch_at = 0.0
        self._idle_since = time.monotonic()
        self._history = history or TimingHistory()
        self._done = self._failed = 0
        self._broken_off = 0  # jobs in a row

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
            self._waiting.add(ticket)
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
            waiting, own = len(self._waiting), self._waiting.count(client)
            left = self._size - waiting
            if left > own:
                return
            message = f"The queue is full: {waiting} images are waiting, at most {self._size} may."
            if left > 0:
                others = "place is" if left == 1 else f"{left} places are"
                mine = f"{own} of your images {'is' if own == 1 else 'are'} waiting"
                message = f"{mine}; the other {others} for other clients."
            raise Busy(message, retry_after=self._seconds_until_a_place())

    def cancel(self, ticket: Ticket) -> None:
        """Drop a waiting job.

        Stop a running one at its next yield. Twice does no harm.
        """
        with self._change:
            ticket.cancelled = True
            if self._waiting.remove(ticket):
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
            for ticket in (*self._running, *self._waiting.clear()):
                ticket.cancelled = True
                ticket.tell(engine_stopped())
            self._change.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread is threading.current_thread():
                continue  # it closes the queue as it ends
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def is_broken(self) -> bool:
        """Whether the device is lost, or the last jobs all broke off.

        A new process may mend it.
        """
        return self._broken_off >= BROKEN

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
                waiting=len(self._waiting),
                size=self._size,
                clients=self._waiting.clients,
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
        with self._change:
            return self._history.tables()

    # -- threads -------------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Start threads while a job waits though a slot is free."""
        wanted = min(self._slots, len(self._waiting) + len(self._running))
        while len(self._threads) < wanted:
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
            outcome = running.run(ticket, self._ready, self._find_slots)
            with self._change:
                self._running.remove(ticket)
                self._idle_since = time.monotonic()
                if isinstance(outcome, Result):
                    self._done += 1
                    self._broken_off = 0
                    self._note(ticket, outcome)
                elif isinstance(outcome, EngineError):
                    self._failed += 1
                    self._count_failure(outcome, ticket.broke_off)
                if outcome is not None and not ticket.cancelled:
                    ticket.tell(outcome)
            # An idle thread that kept these would keep a job's references and an error's half-loaded weights.
            del ticket, outcome
        if self._loaded and not self.is_broken:
            # An orderly end: else what the engine does in idle time would look as if it had ended the process.
            self._release()

    def _count_failure(self, error: EngineError, broke_off: bool) -> None:
        was_broken = self.is_broken
        if isinstance(error, DeviceLost):
            self._broken_off = BROKEN  # every later job would meet it, too
        elif broke_off:
            self._broken_off += 1
        if self.is_broken and not was_broken:
            log.error("the engine is broken: %s", error)
            if self._on_broken:
                self._on_broken()

    @property
    def _has_ended(self) -> bool:
        return self._closed or (self.is_broken and self._on_broken is not None)

    def _note(self, ticket: Ticket, outcome: Result) -> None:
        seconds = self._idle_since - ticket.began
        if outcome.ms.get("load", 0.0) > WARM_LOAD_MS:
            # The engine's own start is in it, too, and torch's: only its stages are the image's.
            seconds = sum(spent for stage, spent in outcome.ms.items() if stage != "load") / 1000
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
                if self._has_ended:
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
        ticket = self._waiting.take()
        ticket.began = time.monotonic()
        self._running.append(ticket)
        self._tell_positions()
        self._grow()
        return ticket

    def _prefetch_now(self, image: Rgb8) -> None:
        executor = self._executor
        try:
            while executor and not self._waiting and not self._closed and executor.prefetch(image):
                pass
        except DeviceLost as exc:
            log.exception("the engine failed while it prepared for the next job")
            with self._change:
                self._count_failure(exc, broke_off=False)
        except Exception:
            # Nobody asked for it; the job that needs it will meet the error itself.
            log.exception("the engine failed while it prepared for the next job")

    def _unload_idle(self) -> None:
        log.info("idle for %.0f s: releasing the weights", self._keep_alive)
        self._release()

    def _release(self) -> None:
        executor = self._executor
        if executor is None:
            return
        try:
            executor.release()
        except Exception:
            # This thread must outlive it; the next job loads over what is left.
            log.exception("the weights could not be released")

    def _ready(self, ticket: Ticket) -> Executor:
        """Return the executor, which the first job's thread makes."""
        if not self._executor:
            ticket.tell(Loading(ticket.job.model, 0.0))
            executor = self._make_executor()
            with self._change:
                self._executor = executor
                # The seconds that torch takes to import must not be expected of the next job.
                ticket.began = time.monotonic()
                self._grow()
        return self._executor  # type: ignore[return-value]

    def _find_slots(self) -> None:
        """Use the slots that the executor has found by now."""
        with self._change:
            self._grow()
            self._tell_positions()

    # -- positions -----------------------------------------------------------------------------------------------------

    @property
    def _slots(self) -> int:
        return self._executor.slots if self._executor else 1

    def _tell_positions(self) -> None:
        self._waiting.tell_positions(self._running, self._slots, self._expected)

    def _seconds_until_a_place(self) -> float:
        # Where nothing has been measured yet, a guess that lets nobody retry in a tight loop.
        return max(1.0, round(seconds_until_free(self._running, self._slots, self._expected) or 5.0, 1))


def engine_stopped() -> EngineFailed:
    """Make the error for whoever waits while the engine is stopped."""
    return EngineFailed("The engine was stopped.", hint="The next call starts it again.")
