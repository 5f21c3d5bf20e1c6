"""Orders that were handed over because painting them outlasts a call: painted to their end, whoever still waits.

Each is a small file, so that it outlives this process too: a promise made to an agent is kept by the next daemon.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contract import EngineError
from klein_mcp import atomic
from klein_mcp.jobs.backend import UnknownJob

if TYPE_CHECKING:
    from klein_mcp.jobs.service import JobResult, Service

log = logging.getLogger(__name__)

ANSWER = 1.0
"""Seconds after which somebody who asks for a job gets its state though it is not done."""

REMEMBERED = 24 * 3600.0
"""Seconds for which a finished job can be asked after; its pictures stay in the library."""

MOST = 1000
"""Finished jobs that can be asked after, a file of about a kilobyte each; more within a day is a client that loops."""

ATTEMPTS = 2
"""Daemons that may die over one order."""

_OVER = ("done", "failed")


class JobManager:
    """make_service: a Service on this process's queue; made with the first order, as it opens the library."""

    def __init__(self, folder: Path, make_service: Callable[[], "Service"]) -> None:
        self._folder = folder
        self._make_service = make_service
        self._service: Service | None = None
        self._jobs: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def resume(self) -> None:
        """Go on with what the daemon before us did not finish; forget what was finished long ago."""
        for beside in self._folder.glob("*.json.*"):  # it was killed while it wrote
            with contextlib.suppress(OSError):
                beside.unlink()
        for path in self._folder.glob("*.json"):
            try:
                job = json.loads(path.read_text())
                job["since"] = float(job["since"])
                if job["state"] in _OVER:
                    self._jobs[path.stem] = job
                    continue
                with contextlib.suppress(OSError):  # a crash may then go uncounted, but the promise is kept
                    self._write(path.stem, _once_more(job))
                self._start(path.stem, job)
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("%s is no job of ours", path)
        self._forget()

    async def take(self, order: Mapping[str, Any], *, client: str, made: Mapping[str, Any] | None) -> str:
        """Promise `order`. Returns its handle once the job that may be under the brush for it is ours.

        Raises OSError if the promise cannot be written down, and ValueError, TypeError or KeyError for no order.
        """
        from klein_mcp.jobs.request import ImageRequest

        ImageRequest.from_json(order)
        name = "j" + secrets.token_hex(6)
        job = {"order": dict(order), "client": client, "made": made, "attempts": 0, "since": time.time()}
        self._write(name, _once_more(job))
        self._start(name, job)
        self._forget()
        await self._until(lambda: job.get("begun") or name not in self._tasks, 5.0)
        return name

    async def state(self, name: str) -> dict[str, Any]:
        """As Backend.kept. Raises UnknownJob."""
        job = self._jobs.get(name)
        if job is None:
            raise UnknownJob(name)
        await self._until(lambda: job["state"] in _OVER, ANSWER)
        hidden = ("order", "client", "attempts", "since", "begun")
        return {key: value for key, value in job.items() if key not in hidden}

    async def aclose(self) -> None:
        """Put everything down; the next daemon resumes it."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._service:
            self._service.close()

    def _start(self, name: str, job: dict[str, Any]) -> None:
        self._jobs[name] = job
        self._tasks[name] = asyncio.create_task(self._paint(name))

    def _forget(self) -> None:
        """What was finished long ago, or before MOST others, can no longer be asked after."""
        over = [name for name, job in self._jobs.items() if job["state"] in _OVER]
        over.sort(key=lambda name: self._jobs[name]["since"], reverse=True)
        for rank, name in enumerate(over):
            if rank >= MOST or time.time() - self._jobs[name]["since"] > REMEMBERED:
                del self._jobs[name]
                with contextlib.suppress(OSError):
                    self._file(name).unlink(missing_ok=True)

    async def _paint(self, name: str) -> None:
        job = self._jobs[name]
        try:
            if job["attempts"] > ATTEMPTS:
                raise EngineError(
                    f"The engine crashed {ATTEMPTS} times on this picture.",
                    hint="Try a smaller size, or another model.",
                )
            outcome = await self._run(name)
            job.update(state="done", progress=1.0, message="done", eta_s=0.0, **_told(outcome))
        except asyncio.CancelledError:
            job["attempts"] -= 1  # put down, not crashed
            raise
        except Exception as problem:
            from klein_mcp.errors import RequestError, explain

            if not isinstance(problem, EngineError | RequestError):
                log.exception("an order that was handed over failed")
            job.update(
                state="failed",
                error={
                    "message": (explain(problem) if isinstance(problem, EngineError) else str(problem))
                    or type(problem).__name__,
                    "hint": "",
                },
            )
        finally:
            self._tasks.pop(name, None)
            job["since"] = time.time()
            with contextlib.suppress(OSError):
                self._write(name, job)
            await self._tell()

    async def _run(self, name: str) -> "JobResult":
        from klein_mcp.jobs.context import CallContext
        from klein_mcp.jobs.request import ImageRequest

        if not self._service:
            self._service = self._make_service()
        job, started = self._jobs[name], time.monotonic()

        async def tell(done: float, total: float, message: str) -> None:
            share = done / total
            gone = time.monotonic() - started
            job.update(state="painting", progress=round(share, 3), message=message, begun=True)
            job["eta_s"] = round(gone * (1 - share) / share, 1) if share > 0.1 else None
            await self._tell()

        return await self._service.paint(
            ImageRequest.from_json(job["order"]), CallContext(client=job["client"], tell=tell)
        )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], Any], seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(condition)

    def _write(self, name: str, job: dict[str, Any]) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic.write(self._file(name), json.dumps(job))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _once_more(job: dict[str, Any]) -> dict[str, Any]:
    """Waiting, with one attempt more on its account."""
    job.update(state="queued", progress=0.0, message="waiting", eta_s=None, attempts=job["attempts"] + 1)
    job.pop("begun", None)
    return job


def _told(outcome: "JobResult") -> dict[str, Any]:
    pictures = [made.to_json() for made in outcome.made]
    return {"pictures": pictures, "warnings": list(outcome.warnings), "ms": dict(outcome.ms)}
