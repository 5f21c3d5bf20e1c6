"""Traces of compiled parts on disk: a second start need not trace.

With its kernels in the disk cache, a part still has to be traced: 45 s for all parts of a toy of klein's depth (Xeon),
51 s for the 4B on an H200. Loading their traces takes 8 to 13 s on that Xeon, and the images have the same bits.
torch calls this experimental (`caching_precompile`), and drops the guards that compare objects by identity. So traces
belong to one structure of networks and one choice of operations, what they compute is compared with the plain parts
before use, and a process that dies over them counts against them.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Processes that ended in the middle, after which traces are left alone: they may be why."""

TESTED = "2.13"
"""The oldest torch with which this was tried. 2.11 has the same functions."""

FORGOTTEN = 86_400.0
"""Seconds after which such ends no longer count: a computer may have been switched off three times."""

ATTEMPTS = "attempts"
"""File with the number of processes that ended in the middle."""


class SavedTraces:
    """The traces of one model's parts in a folder.

    folder: None neither loads nor saves anything.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder if _torch_can() else None
        self.enabled = self._folder is not None and self._may_use(self._folder)
        self._counted = self.enabled

    def _may_use(self, folder: Path) -> bool:
        """Return whether to use traces in this process.

        Counts the attempt.
        """
        attempts = folder / ATTEMPTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recent = attempts.exists() and time.time() - attempts.stat().st_mtime < FORGOTTEN
            before = int(attempts.read_text()) if recent else 0
            if before < MAX_ATTEMPTS:
                attempts.write_text(str(before + 1))
        except (OSError, ValueError) as exc:
            log.warning("traces of compiled code are not kept: %s", exc)
            return False
        return before < MAX_ATTEMPTS

    def survived(self) -> None:
        """Forget the attempts: this process has not ended over them."""
        if self._folder is not None and self._counted:
            (self._folder / ATTEMPTS).unlink(missing_ok=True)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Load traces where there are some, note others."""
        if not self.enabled:
            yield
            return
        from torch._dynamo.package import DynamoCache

        # Each of the guards that are left out would be a line in the log.
        guards = logging.getLogger("torch._dynamo.guards")
        level = guards.level
        guards.setLevel(logging.ERROR)
        # torch has one folder for all traces, inside the one for kernels.
        vars(DynamoCache)["path_prefix"] = lambda: str(self._folder)
        try:
            with torch._dynamo.config.patch(caching_precompile=True):
                yield
        finally:
            vars(DynamoCache).pop("path_prefix", None)
            guards.setLevel(level)

    def during(self, work: Callable[[], object]) -> None:
        """Do work with traces in use."""
        with self.used():
            work()

    def save(self) -> None:
        """Write new traces, once all parts have proven right."""
        if not self.enabled:
            return
        from torch._dynamo.precompile_context import PrecompileContext

        try:
            with self.used():
                PrecompileContext.save_to_dynamo_cache()
        except Exception as exc:
            # torch raises RuntimeError for whatever it met. What is compiled works without.
            log.warning("traces of compiled code are not kept: %s", exc)
        finally:
            PrecompileContext.clear()  # it has a copy of each trace

    def drop(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Delete the traces, and forget what these functions loaded of them."""
        from torch._C._dynamo.eval_frame import _reset_precompile_entries
        from torch._dynamo.precompile_context import PrecompileContext

        self.enabled = False
        PrecompileContext.clear()
        for function in functions:
            _reset_precompile_entries(function.__code__)
        torch._dynamo.reset()
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)


def structure(*networks: nn.Module, choices: str) -> str:
    """Return a name for what traces depend on.

    It covers the classes of all modules, and shapes and types of all tensors. choices: of operations.
    """
    lines = [choices]
    for network in networks:
        lines += [f"{name} {type(module).__qualname__}" for name, module in network.named_modules()]
        lines += [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _torch_can() -> bool:
    """Return whether this torch can keep traces on disk."""
    if TorchVersion(torch.__version__) < TorchVersion(TESTED):
        return False
    try:
        from torch._C._dynamo.eval_frame import _reset_precompile_entries  # noqa: F401 - whether it is there
        from torch._dynamo.package import DynamoCache
        from torch._dynamo.precompile_context import PrecompileContext
    except ImportError:
        return False
    return (
        hasattr(torch._dynamo.config, "caching_precompile")
        and hasattr(DynamoCache, "path_prefix")
        and hasattr(PrecompileContext, "save_to_dynamo_cache")
    )
