"""Files of detached jobs, which survive restarts of the daemon."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from klein_mcp import atomic
from klein_mcp.jobs.record import JobRecord
from klein_mcp.private import read_private_text

log = logging.getLogger(__name__)


class JobFiles:
    """A folder with a file for each detached job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> Iterator[JobRecord]:
        """Yield the jobs of the last daemon. Remove half-written files."""
        for unfinished in self._folder.glob("*.json.*"):  # the last daemon was killed while it wrote
            with contextlib.suppress(OSError):
                unfinished.unlink()
        for path in self._folder.glob("*.json"):
            try:
                job = JobRecord.from_json(path.stem, json.loads(read_private_text(path)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                log.warning("%s is not a job that can be read", path)
                continue
            yield job

    def write(self, job: JobRecord, *, durable: bool = False) -> None:
        """Write a job.

        durable: whether it is on the disk when this returns.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic.atomic_write(self._file(job), json.dumps(job.to_json()), durable=durable)

    def update(self, job: JobRecord) -> None:
        """Write a job if it is detached."""
        if job.detached:
            with contextlib.suppress(OSError):  # a full disk: the job goes on in memory
                self.write(job)

    def remove(self, job: JobRecord) -> None:
        """Delete the file of a job, if it has one."""
        with contextlib.suppress(OSError):
            self._file(job).unlink(missing_ok=True)

    def _file(self, job: JobRecord) -> Path:
        return self._folder / f"{job.id}.json"
