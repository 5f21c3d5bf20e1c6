"""A time limit on work in this process."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread after so many seconds.

    Limits may stand inside each other. Only the main thread can be interrupted, and in another there is no limit.
    A call of a library that hangs is not interrupted: the parent kills the process then.
    """
    if threading.current_thread() is not threading.main_thread() or seconds == float("inf"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    outer_handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    outer_left = signal.setitimer(signal.ITIMER_REAL, 0)[0]
    mine = not outer_left or seconds < outer_left
    if mine:
        signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds if mine else outer_left))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, outer_left - (time.monotonic() - start)))
