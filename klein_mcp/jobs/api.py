"""The job API: one owner of every job, any number of listeners."""

from collections.abc import AsyncGenerator
from typing import Protocol

from klein_mcp.jobs.events import NO_PREVIEWS, JobEvent, Listen
from klein_mcp.jobs.request import ImageRequest
from klein_mcp.jobs.status import DaemonStatus, JobStatus


class UnknownJob(LookupError):
    """No such job, or it was forgotten long ago."""


class Jobs(Protocol):
    """Every job of this user.

    `daemon.client` reaches the daemon's, `manager` holds them in its own process.
    Every method but `status` may raise EngineError; those that name a job raise UnknownJob.
    """

    async def submit(self, request: ImageRequest, *, client: str) -> str:
        """Start a job and return its id at once.

        request: with library handles for references.
        client: whose turn it takes in the queue, and whose `last` its images become.
        A job that nobody listens to within a few seconds, and that is not detached, is cancelled.
        """
        ...

    def run(self, request: ImageRequest, *, client: str, listen: Listen = NO_PREVIEWS) -> AsyncGenerator[JobEvent]:
        """Submit and listen in one round trip: Submitted first, then as `events`."""
        ...

    def events(self, job: str, listen: Listen = NO_PREVIEWS) -> AsyncGenerator[JobEvent]:
        """Listen to a job.

        What is saved already and the latest progress at once, then events as they happen.
        The last event is Done, Failed or Cancelled. Closing the iterator leaves the job; the last listener
        to leave a job that is not detached cancels it.
        """
        ...

    def watch(self) -> AsyncGenerator[tuple[JobStatus, JobEvent | None] | None]:
        """Follow the jobs of all clients.

        Steps carry previews. First comes every job that is not over with its latest event, then each event as it
        happens, and None now and then. Ends when the daemon does, and at once where there is none. A watcher neither
        keeps a job going nor cancels it.
        """
        ...

    async def detach(self, job: str) -> JobStatus:
        """Let a job go on without listeners, also across a restart."""
        ...

    async def cancel(self, job: str) -> None:
        """Stop a job within one step.

        Its listeners get Cancelled. A job that is over stays as it is, and one whose last image is being saved is done.
        """
        ...

    async def job(self, job: str) -> JobStatus:
        """Return how far a job is."""
        ...

    async def list(self) -> list[JobStatus]:
        """Return the jobs of all clients, newest first. Never starts a daemon."""
        ...

    async def status(self) -> DaemonStatus:
        """Return what the engine holds and does. Never starts a daemon."""
        ...
