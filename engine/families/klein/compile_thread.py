"""A thread that compiles beside jobs and pauses while one runs."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.memory.device import make_current
from engine.memory.offload import in_turn

POLL = 0.05
"""Seconds between two looks at whether the thread is done. A new job waits no longer than this."""

STOP = 5.0
"""Maximum seconds for which `close` waits for the thread."""

MAX_PAUSE = 20.0
"""Maximum seconds for which a job without progress pauses the compiling thread, in case both wait for one lock."""


NEVER = 2**31 - 1
"""The largest threshold of garbage collection."""


class Stopped(BaseException):
    """Ends the compiling thread. No Exception, which compilers catch."""


class PauseGate:
    """Pauses a Python thread between two calls, while another has work.

    Compilers are Python: beside one, each of the thousands of calls of a job would wait for the interpreter lock.
    Measured on an H200 without this: jobs of 0.14 s took 0.3 to 36 s. Tracing makes compiling slower, by 1.8 on a CPU.
    """

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._until = 0.0
        self._stopped = False

    def pause(self) -> None:
        """Pause the traced thread at its next call."""
        self._until = time.monotonic() + MAX_PAUSE
        self._open.clear()

    def extend(self) -> None:
        """Let a pause, if there is one, last MAX_PAUSE from now."""
        self._until = time.monotonic() + MAX_PAUSE

    def resume(self) -> None:
        """Resume the traced thread."""
        self._open.set()

    def stop(self) -> None:
        """End the traced thread at its next call, by an exception."""
        self._stopped = True
        self._open.set()

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        """Wait while paused.

        sys.settrace calls this at every call of a Python function.
        """
        if not in_turn():
            while not self._open.is_set() and (left := self._until - time.monotonic()) > 0:
                self._open.wait(left)
        if self._stopped:
            raise Stopped


class CompileThread:
    """Runs compiling for a device, one piece at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gate = PauseGate()
        self._thread: threading.Thread | None = None

    def pause(self) -> None:
        """Pause what runs, for a job."""
        self._gate.pause()

    def extend_pause(self) -> None:
        """Note that the job makes progress."""
        self._gate.extend()

    def resume(self) -> None:
        """Let it go on."""
        self._gate.resume()

    def run(self, work: Callable[[], object]) -> Iterator[None]:
        """Start the work and yield every POLL seconds until it is done.

        Raises what the work raised.
        """
        failed: list[BaseException] = []

        def body() -> None:
            sys.settrace(self._gate.trace)
            try:
                make_current(self._device)
                with torch.no_grad():
                    work()
            except BaseException as exc:
                failed.append(exc)
            finally:
                sys.settrace(None)

        self._thread = thread = threading.Thread(target=body, name="klein-compile", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            yield
        if failed:
            error = failed.pop()
            try:
                raise error
            finally:
                # Its traceback refers to this frame: a circle that would keep tensors of its other frames on the GPU.
                del error

    def close(self) -> bool:
        """End the thread at its next call, and return whether it has.

        In a compiler's own C code or beside its processes it cannot be stopped, and ends there by itself.
        """
        self._gate.stop()
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        thread.join(STOP)
        return not thread.is_alive()


@contextmanager
def full_collections_deferred() -> Iterator[None]:
    """Defer garbage collection of all objects to the end.

    A compiler makes hundreds of thousands of objects, and Python stops every thread while it looks through all of them:
    three times, for 0.5 to 1.3 s, in compiling one decoder (a Xeon at a load of 5), without freeing memory of note.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        gc.collect()
