"""Engine: loads models, runs jobs and prepares the next one when idle."""

import gc
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from engine.auto import AutoChoice, does_not_load
from engine.contract import (
    BadWeights,
    DeviceLost,
    EngineConfig,
    EngineError,
    EngineStatus,
    Event,
    Job,
    KnownModel,
    Loading,
    Mode,
    ModelInfo,
    OutOfMemory,
    Result,
    Rgb8,
)
from engine.families.klein import lora
from engine.families.klein.answers import Answers
from engine.families.klein.checkpoint import Checkpoint, FileState
from engine.families.klein.compiler import CompileOptions, cache_folder, obstacle
from engine.families.klein.footprint import memory_info
from engine.families.klein.loader import LoadOptions, prepare
from engine.families.klein.pipeline import SEEDS, Klein
from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.memory.cache import LruCache, TensorCache, budgets
from engine.memory.device import Device
from engine.memory.offload import ring_bytes
from engine.memory.plan import CONTEXT, gb
from engine.registry import InstalledModel, ModelRegistry


class Engine:
    """Runs jobs on one device with one model loaded at a time."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        """Raises InvalidJob for a device or number format that this machine lacks."""
        self.config = config = config or EngineConfig()
        self.registry = ModelRegistry(
            config.models,
            config.hub,
            small_decoder=config.decoder == "small",
            variant=config.variant,
            text_encoder=config.text_encoder,
            vae=config.vae,
            answers=Answers(config.answers),
        )
        self.device = Device.choose(config.device, config.dtype)
        self.cache = TensorCache(config.cache_bytes or 0, config.spill_bytes or 0)
        self._latest: Rgb8 | None = None  # the image made last
        self._prefetched: Rgb8 | None = None  # the image of which an edit was prepared last
        self.previews = False
        """Whether steps carry a preview. May be set while a job runs."""
        self._klein: Klein | None = None
        self._modes: LruCache[Mode] = LruCache(SEEDS)  # of every model since the start: one may be loaded again
        self._name = ""
        self.auto = AutoChoice(self.registry.installed_models, self._obstacle)
        self._damaged: dict[Path, FileState] = {}  # transformers that did not load, with all files as they were then
        self._tried = FileState.of(())  # the files that were loaded last, or failed to
        if config.threads:
            torch.set_num_threads(config.threads)

    def run(self, job: Job) -> Iterator[Event]:
        """Run `job`, loading its model first if necessary.

        Raises EngineError. If the device runs out of memory, the cache is cleared and the job started once more.
        """
        try:
            yield from self._run_twice_if_full(job)
        except RuntimeError as exc:
            if self.device.is_lost():
                raise self._device_lost(exc) from None
            raise

    def _run_twice_if_full(self, job: Job) -> Iterator[Event]:
        # In bands a GPU computes the same bits in less memory, more slowly. On a CPU bf16 is rounded otherwise.
        for in_bands in (False, self.device.is_cuda):
            try:
                yield from self._run(job, in_bands)
                return
            except (RuntimeError, MemoryError) as exc:
                if not _is_out_of_memory(exc):
                    raise
            # Only after the exception is released: its traceback holds the tensors of the job that failed.
            if self._klein is not None:
                self._klein.runner.stop_capturing()
            self._clear_cache()
        raise self._out_of_memory()

    def prefetch(self, image: "Rgb8 | None" = None) -> bool:
        """Do a short piece of work for later jobs, in idle time.

        Returns False if there was nothing to do.

        First an edit of `image`, or of the latest result, is prepared; then, call by call, the model is tuned.
        """
        image = self._latest if image is None else image
        if self._klein is None:
            return False
        try:
            if image is None or image is self._prefetched:
                return self._klein.runner.tune()
            self._latest = self._prefetched = image
            self._klein.prefetch(image)
            return True
        except (RuntimeError, MemoryError) as exc:
            if not _is_out_of_memory(exc):
                if self.device.is_lost():
                    raise self._device_lost(exc) from None
                raise
        # Prefetching is optional: the next job does this work itself.
        self._clear_cache()
        return True

    def _run(self, job: Job, in_bands: bool) -> Iterator[Event]:
        klein, ms = yield from self._load(job.model)
        self._latest = None
        for event in klein.run(job, lambda: self.previews, in_bands=in_bands):
            if isinstance(event, Result):
                self._latest = event.image
                event = replace(event, ms={"load": ms, **event.ms})
            yield event

    def _clear_cache(self) -> None:
        self.cache.clear()
        self.device.empty_cache()

    def _device_lost(self, exc: Exception) -> DeviceLost:
        reason = (str(exc).splitlines() or [""])[0].removesuffix(".")
        return DeviceLost(
            f"The {self.device.label} no longer answers this process: {reason}.",
            hint="Try again: a new process may reach it.",
        )

    def _out_of_memory(self) -> OutOfMemory:
        memory = memory_info(self.device)
        return OutOfMemory(
            f"The {memory.device} ran full twice: of its {gb(memory.total)}, weights hold {gb(self._weight_bytes())} "
            f"and {gb(memory.free)} are free, too little for this image.",
            hint="Ask for a smaller size or fewer references, or end what else uses it.",
        )

    def _load(self, model: str) -> Generator[Loading, None, tuple[Klein, float]]:
        if model != "auto":
            return (yield from self._load_named(model))
        try:
            while True:
                name = self.auto.name(self._name)
                try:
                    return (yield from self._load_named(name))
                except (BadWeights, OutOfMemory) as exc:
                    # Some faults appear only while loading, such as values that are not finite. The next best is used.
                    if name == EMBEDDED:
                        raise
                    self.auto.failed(name, exc, self._tried)
        finally:
            self.auto.forget_temporary()

    def _load_named(self, name: str) -> Generator[Loading, None, tuple[Klein, float]]:
        """Load a model from the first of its files that loads."""
        if self._klein is not None and self._name == name:
            return self._klein, 0.0
        self._tried = FileState.of(())
        failed: dict[Path, BadWeights] = {}
        # Any other file is what its name says: an older image's may be asked for again.
        variant = self.config.variant if name == self.config.model else None
        while True:
            checkpoint = self._resolve(name, variant)
            if checkpoint.transformer in failed:  # there is no other file of it
                raise next(iter(failed.values()))
            try:
                return (yield from self._load_checkpoint(name, checkpoint))
            except BadWeights as exc:
                # A copy: the traceback holds the tensors that were loaded.
                failed[checkpoint.transformer] = BadWeights(exc.message, hint=exc.hint, fix=exc.fix)
                self._damaged[checkpoint.transformer] = self._tried

    def _resolve(self, name: str, variant: str | None) -> Checkpoint:
        """Return the files of a model, those last that failed before."""
        self._damaged = {path: files for path, files in self._damaged.items() if files.are_unchanged()}
        return self.registry.resolve(name, variant, self.config.quant, self._is_resident, self._damaged)

    def _load_checkpoint(self, name: str, checkpoint: Checkpoint) -> Generator[Loading, None, tuple[Klein, float]]:
        options = self._options(loras=True)
        self._tried = FileState.of((*self._tried.paths, *checkpoint.parts, *(one.path for one in options.loras)))
        self.release()
        limit = self.config.memory_limit
        self.device.cap(None if limit is None else max(0, limit - CONTEXT))
        start = time.perf_counter()
        self._klein = yield from Klein.load(
            checkpoint, self.device, self.cache, options, self._compile_options(), self._modes
        )
        cache, spill = budgets(
            self._klein.free(self.device.free_bytes()), self.device.host_bytes(), cpu=self.device.is_cpu
        )
        config = self.config
        self.cache.resize(
            cache if config.cache_bytes is None else config.cache_bytes,
            spill if config.spill_bytes is None else config.spill_bytes,
        )
        self._name = name
        self.auto.has_loaded(name)
        self._damaged.pop(checkpoint.transformer, None)
        return self._klein, round(1000 * (time.perf_counter() - start), 1)

    def _compile_options(self) -> CompileOptions:
        root = self.config.compile_cache
        folder = cache_folder(root, self.device) if root else None
        return CompileOptions(enabled=self.config.compile == "auto", folder=folder)

    def compile_obstacle(self) -> str:
        """Return why no model is compiled on this machine, or ""."""
        return obstacle(self.device, self._compile_options())

    def _options(self, *, loras: bool) -> LoadOptions:
        """Return the options of loading.

        Raises ModelNotFound for a LoRA that does not exist.
        """
        found = tuple(lora.resolve_lora(text, self.registry.paths) for text in self.config.loras) if loras else ()
        return LoadOptions(self.config.quant, found, self.config.memory_limit)

    def _obstacle(self, name: str) -> str:
        """Return why a model, by name, cannot be resident, or ""."""
        try:
            fits = self._fits(self._resolve(name, None))
        except EngineError as exc:
            return does_not_load(exc)
        return "" if fits else "does not fit into the memory that is free"

    def _is_resident(self, checkpoint: Checkpoint) -> bool:
        """Return whether a model loads and its transformer stays on the device."""
        try:
            return self._fits(checkpoint)
        except EngineError:
            return False

    def _fits(self, checkpoint: Checkpoint) -> bool:
        """Return whether all of a transformer would stay on the device.

        The memory of the model that is loaded now, and of the cache, counts as free: `release` gives it back.
        Raises BadWeights or OutOfMemory.
        """
        klein = self._klein
        ring = ring_bytes(klein.transformer, klein.text_encoder) if klein else 0
        held = self._weight_bytes() + ring + self.cache.stats().bytes
        return prepare(checkpoint, self.device, self._options(loras=False), held).is_resident

    def _weight_bytes(self) -> int:
        klein = self._klein  # another thread may release it while this one asks
        return klein.weight_bytes if klein else 0

    def release(self) -> None:
        """Free the memory of weights and cache.

        The next job loads its model again.
        """
        if self._klein is not None:
            self._klein.runner.close()
        self._klein = None
        self._name = ""
        self._latest = self._prefetched = None
        # Modules of an offload ring refer to each other: without this their buffers would stay until some later time.
        gc.collect()
        self.device.drop_workspaces()
        self._clear_cache()

    def status(self) -> EngineStatus:
        """Return the state of the engine.

        Cheap, and safe from any thread.
        """
        installed, klein = self.registry.installed(), self._klein
        return EngineStatus(
            device=str(self.device.device),
            dtype=self.device.dtype_name,
            threads=torch.get_num_threads(),
            free_bytes=self._free_bytes(),
            loaded=self._name or None,
            placement=klein.placement_summary if klein else None,
            weights_bytes=self._weight_bytes(),
            cache=self.cache.stats(),
            mode=klein.runner.mode if klein else "eager",
            tuning=klein.runner.summary() if klein else "",
            models=tuple(
                KnownModel(name, row.licence, str(installed[name]), self.auto.obstacles.get(name, ""))
                if name in installed
                else KnownModel(name, row.licence, None)
                for name, row in VARIANTS.items()
            ),
        )

    def _free_bytes(self) -> int:
        try:
            return self.device.free_bytes()
        except RuntimeError:
            return 0  # a lost GPU does not answer, and a status that fails could not say what else there is

    def models(self) -> tuple[ModelInfo, ...]:
        """Return every installed model and its fit into the memory now free."""
        return tuple(self._model_info(source) for source in self.registry.installed_models())

    def _model_info(self, source: InstalledModel) -> ModelInfo:
        info = ModelInfo(source.name, source.format, str(source.path), VARIANTS[source.name].licence)
        try:
            checkpoint = self.registry.checkpoint(source)
            info = replace(info, text_encoder=str(checkpoint.text_encoder), vae=str(checkpoint.vae))
            prepared = prepare(checkpoint, self.device, self._options(loras=True))
        except EngineError as exc:
            return replace(info, error=f"{exc.message} {exc.hint}".strip(), fix=exc.fix)
        return replace(info, bytes=prepared.bytes, placement=prepared.plan.summary(prepared.needs))


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Messages of Metal, Linux and Windows, for which torch has no exception class."""


def _is_out_of_memory(exc: RuntimeError | MemoryError) -> bool:
    own = isinstance(exc, torch.OutOfMemoryError | MemoryError)
    return own or any(words in str(exc) for words in _OUT_OF_MEMORY)
