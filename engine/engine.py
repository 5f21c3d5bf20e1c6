"""Engine: whatever models are asked for, each loaded when it is first needed. The one thing the daemon holds."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.contract import EngineError, Event, Job, Loading, OutOfMemory, Result, Rgb8
from engine.families.klein import lora
from engine.families.klein.loader import LoadOptions, prepare, room
from engine.families.klein.pipeline import Klein
from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.memory.cache import TensorCache, budgets
from engine.memory.device import Device
from engine.memory.plan import best, gb
from engine.registry import InstalledModel, ModelRegistry


class Engine:
    """Whatever models are asked for, each loaded when it is first needed; one in memory at a time."""

    def __init__(
        self,
        models: Sequence[Path] = (),
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        hub: Path | None = None,
        remember: int | None = None,
        spill: int | None = None,
        variant: str | None = None,
        quant: str | None = None,
        loras: Sequence[str] = (),
        memory: float | None = None,
        decoder: str = "full",
    ) -> None:
        """models, hub: where to look for them.

        variant: what the user says a single file is, where it cannot tell itself. quant: fp8 or nvfp4 for the
        transformer's blocks, None for what the files hold. loras: name or path, each with an optional :scale.
        memory: GB of the device that may be used, None for all that is free. decoder: full or small.

        remember, spill: bytes kept between jobs for prompts and references, on the device and in the host's memory;
        None for a share of what is free once the model is loaded.
        """
        self.shelf = ModelRegistry(tuple(models), hub, small_decoder=decoder == "small")
        self.placement = Device.choose(device, dtype)
        self.memory = TensorCache(remember or 0, spill or 0)
        self._remember, self._spill = remember, spill
        self.previews = False
        """Whether somebody watches: steps then carry a preview. May be set while a job runs."""
        self._foreseen: Rgb8 | None = None
        self._klein: Klein | None = None
        self._name = self._chosen = ""
        self._auto: tuple[dict[str, Path], str] | None = None  # what was installed, and the best of it
        self._variant, self._quant, self._loras = variant, quant, tuple(loras)
        self._limit = None if memory is None else round(memory * 1e9)
        if threads:
            torch.set_num_threads(threads)

    def run(self, job: Job) -> Iterator[Event]:
        """Paint `job` with the model it names, loading that first if need be. Raises EngineError.

        If the device runs full, what is remembered is forgotten and the job begun once more.
        """
        for _ in range(2):
            try:
                yield from self._paint(job)
                return
            except (RuntimeError, MemoryError) as problem:
                if not _ran_full(problem):
                    raise
            # Not before the exception is gone: its traceback holds the tensors of the job that failed.
            self._forget()
        raise self._full()

    def foresee(self) -> bool:
        """In idle time: prepare for an edit of the picture just painted. False if there was nothing to do."""
        image, self._foreseen = self._foreseen, None
        if image is None or self._klein is None:
            return False
        try:
            self._klein.foresee(image)
            return True
        except (RuntimeError, MemoryError) as problem:
            if not _ran_full(problem):
                raise
        # Nobody asked for it; the next job will do this work itself.
        self._forget()
        return True

    def _paint(self, job: Job) -> Iterator[Event]:
        klein, ms = yield from self._load(job.model)
        self._foreseen = None
        for event in klein.run(job, lambda: self.previews):
            if isinstance(event, Result):
                self._foreseen = event.image
                event = replace(event, ms={"load": ms, **event.ms})
            yield event

    def _forget(self) -> None:
        self.memory.clear()
        self.placement.empty_cache()

    def _full(self) -> OutOfMemory:
        there = room(self.placement)
        return OutOfMemory(
            f"The {there.device} ran full twice: of its {gb(there.total)}, weights hold {gb(self._held())} "
            f"and {gb(there.free)} are free, too little for this picture.",
            hint="Ask for a smaller size or fewer references, or end what else uses it.",
        )

    def _load(self, model: str) -> Generator[Loading, None, tuple[Klein, float]]:
        name = self._choice() if model == "auto" else model
        if self._klein is not None and self._name == name:
            return self._klein, 0.0
        checkpoint = self.shelf.find(name, self._variant, self._quant)
        loras = tuple(lora.find(text, self.shelf.paths) for text in self._loras)
        self.release()
        start = time.perf_counter()
        options = LoadOptions(self._quant, loras, self._limit)
        self._klein = yield from Klein.load(checkpoint, self.placement, self.memory, options)
        near, far = budgets(self._klein.free(self.placement.free_bytes()), self.placement.host_bytes())
        self.memory.resize(
            near if self._remember is None else self._remember, far if self._spill is None else self._spill
        )
        self._name = name
        return self._klein, round(1000 * (time.perf_counter() - start), 1)

    def _choice(self) -> str:
        # What auto has once chosen stays while it is loaded: memory that it fills itself must not speak against it.
        if not self._chosen or self._chosen != self._name:
            self._chosen = self.best()
        return self._chosen

    def best(self) -> str:
        """The best installed model that this machine holds without streaming its transformer, else the embedded one."""
        installed = self.shelf.installed()
        if self._klein is None or self._auto is None or self._auto[0] != installed:
            self._auto = installed, best(installed, self._holds) or EMBEDDED
        return self._auto[1]

    def _holds(self, name: str) -> bool:
        """Whether all of the transformer would stay on the device, were nothing else loaded."""
        held, options = self._held(), LoadOptions(self._quant, (), self._limit)
        try:
            ready = prepare(self.shelf.find(name, None, self._quant), self.placement, options, held)
        except EngineError:
            return False
        return ready.plan.blocks == len(ready.needs.blocks)

    def _held(self) -> int:
        klein = self._klein  # another thread may release it while this one asks
        return klein.held if klein else 0

    def release(self) -> None:
        """Give the weights' memory back; the next job loads again."""
        self._klein = None
        self._name = ""
        self._foreseen = None
        self._forget()

    def status(self) -> dict[str, Any]:
        """What is installed, loaded and remembered."""
        installed, klein = self.shelf.installed(), self._klein
        return {
            "device": str(self.placement.device),
            "dtype": str(self.placement.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "loaded": self._name or None,
            "weights": klein.lives if klein else None,
            "weights_bytes": self._held(),
            "free_bytes": self.placement.free_bytes(),
            "remembered": self.memory.counts(),
            "models": [
                {"name": name, "licence": row.licence, "path": str(installed[name]) if name in installed else None}
                for name, row in VARIANTS.items()
            ],
        }

    def models(self) -> list[dict[str, Any]]:
        """Every model that is there, and how it would live in the memory that is free now, or why it cannot."""
        return [self._model(source) for source in self.shelf.sources()]

    def _model(self, source: InstalledModel) -> dict[str, Any]:
        about: dict[str, Any] = {"name": source.name, "format": source.format, "path": str(source.path)}
        about["licence"] = VARIANTS[source.name].licence
        try:
            checkpoint = self.shelf.checkpoint(source)
            loras = tuple(lora.find(text, self.shelf.paths) for text in self._loras)
            ready = prepare(checkpoint, self.placement, LoadOptions(self._quant, loras, self._limit))
        except EngineError as problem:
            return about | {"bytes": None, "fits": False, "memory": str(problem)}
        return about | {"bytes": ready.bytes, "fits": True, "memory": ready.plan.says(ready.needs)}


_FULL = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch says it where it has no exception of its own for it: Metal, Linux, Windows."""


def _ran_full(problem: RuntimeError | MemoryError) -> bool:
    own = isinstance(problem, torch.OutOfMemoryError | MemoryError)
    return own or any(words in str(problem) for words in _FULL)
