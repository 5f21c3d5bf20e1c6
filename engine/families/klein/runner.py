"""Run klein's networks, eagerly at first, compiled and captured after idle time.

Two modes compute the same function with different rounding: "eager" and "compiled". All compiled parts are
switched on at once, so that one mode makes an image throughout and a process changes its mode once.
Graphs replay the same kernels on the same shapes: they change the time, not a bit.
"""

import logging
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.contract import Mode
from engine.diffusion.parts import Parts
from engine.families.klein.compile_thread import CompileThread, full_collections_deferred
from engine.families.klein.compiler import (
    COMPILED_FUNCTIONS,
    Compiled,
    CompileOptions,
    Compiler,
    load_compilers,
    no_recompiles,
    obstacle,
)
from engine.families.klein.conditioning import Conditioning, StepKey
from engine.families.klein.loader import Networks
from engine.families.klein.sample_inputs import SampleInputs, attention_inputs
from engine.families.klein.traces import SavedTraces, structure
from engine.families.klein.transformer import BlockFunctions, Modulations
from engine.families.klein.variants import Variant
from engine.memory.cache import LruCache
from engine.memory.device import Device, DeviceGraph, graph_pool
from engine.memory.offload import OffloadedModule, drop_weights
from engine.nn import bands, ops
from engine.nn.attention import Choice
from engine.nn.ops import Rope

log = logging.getLogger(__name__)

MAX_GRAPHS = 4
"""Number of shapes with a CUDA graph of a step. They share one pool, as large as the largest needs."""


class Runner:
    """Runs the networks of one model behind three functions.

    `tune` makes them faster in idle time.
    """

    def __init__(
        self,
        variant: Variant,
        networks: Networks,
        device: Device,
        options: CompileOptions | None = None,
        attention: Choice | None = None,
    ) -> None:
        """attention: the back end that `choose_operations` put to use."""
        self.variant, self.device, self.options = variant, device, options or CompileOptions()
        self.transformer, self.autoencoder = networks.transformer, networks.autoencoder
        self.text_encoder = networks.text_encoder
        self.eager_reason = obstacle(device, self.options)
        self.banded = networks.banded
        """Whether images are decoded in bands, as a tight memory plan asks for."""
        self.seconds: dict[str, float] = {}
        """Time that each part of tuning took."""
        self._compiler: Callable[[], Compiler | None] = lambda: None
        """A weak reference."""
        self._compiled: Compiled | None = None
        self._text_graph: DeviceGraph | None = None
        self._step_graphs: LruCache[DeviceGraph] = LruCache(MAX_GRAPHS)
        self._used: LruCache[StepKey] = LruCache(MAX_GRAPHS)
        self._pool: Any = None
        self._units: Iterator[bool] | None = None
        self._ran_full = False
        """Whether tuning ran out of memory once."""
        self._may_capture = True
        self.pool_bytes = 0
        """Bytes of the graphs' pool, which nothing else can use though torch counts them as free."""
        self._thread = CompileThread(device.device)
        self._attention = attention or Choice("", ops.PLAIN["attention"], {})
        if self._attention.seconds:
            self.seconds["attention"] = self._attention.seconds

    @property
    def mode(self) -> Mode:
        """Return the mode of the next image, unless its job requests another."""
        return "compiled" if self._compiled else "eager"

    def summary(self) -> str:
        """Return the state of tuning as text."""
        if self.eager_reason:
            return f"eager: {self.eager_reason}"
        if self._compiled is None:
            return "eager, until idle time allows compiling"
        by = f", attention by {self._attention.name}" if self._attention.name else ""
        return f"compiled in {sum(self.seconds.values()):.0f} s{by}, {len(self._step_graphs)} shapes captured"

    # Functions that jobs call.

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return prompt states after the transformer's projection: [1, text_length, hidden].

        Both modes give the same bits.
        """
        return self._text_graph((self._embed(ids), mask)) if self._text_graph else self._text(ids, mask)

    def text_in_parts(self, ids: Tensor, mask: Tensor) -> Parts[Tensor]:
        """Return prompt states like `text`, yielding between layers the share done.

        A GPU takes milliseconds for all of them, so there is nothing to yield.
        """
        if self.device.is_cuda or self._text_graph:
            return self.text(ids, mask)
        device = self.device.device
        states = yield from self.text_encoder.in_parts(ids.to(device), mask.to(device))
        return self.transformer.txt_in(states)

    def encode(self, images: Tensor, mode: Mode) -> Tensor:
        """Encode images to latents.

        [b, 3, p·h, p·w] in [-1, 1] -> [b, channels, h, w], p being the variant's `pixels_per_token`.
        """
        self._thread.extend_pause()
        compiled = self._compiled if mode == "compiled" else None
        if compiled is None:
            return self.autoencoder.encode(images)
        with no_recompiles():
            return compiled.encode(images)

    def decode(self, latent: Tensor, mode: Mode, *, in_bands: bool = False) -> Tensor:
        """Decode a latent to an image.

        [1, channels, h, w] -> [1, 3, p·h, p·w], about [-1, 1]. in_bands: in less memory, more slowly.
        """
        self._thread.extend_pause()
        if in_bands or self.banded:
            return bands.decode(self.autoencoder, latent)
        compiled = self._compiled if mode == "compiled" else None
        if compiled is None:
            return self.autoencoder.decode(latent)
        with no_recompiles():
            return compiled.decode(latent)

    def velocity(self, x: Tensor, mods: Modulations, inputs: Conditioning, mode: Mode) -> Tensor:
        """Return the velocity of the canvas x."""
        compiled = self._compiled if mode == "compiled" else None
        step = (x, inputs.text, mods, inputs.rope, inputs.references)
        if compiled is None:
            return self.transformer(*step, inputs.reference_kv)
        if inputs.reference_kv is None and self._captures:
            # A shape that is replayed is in use, too: else newer ones would push it out, and captures go round.
            self._used.get_or_compute(inputs.key, lambda: inputs.key)
            if graph := self._step_graphs.get(inputs.key):
                return graph(_tensors(step))
        with no_recompiles():
            return self.transformer(*step, inputs.reference_kv, compiled.blocks)

    def velocity_in_parts(self, x: Tensor, mods: Modulations, inputs: Conditioning, mode: Mode) -> Parts[Tensor]:
        """Return the velocity like `velocity`, yielding between blocks the share done.

        Only a CPU computes while it is called; and a mode of compiled code must not stay set during a pause.
        """
        self._thread.extend_pause()
        if not self.device.is_cpu or mode == "compiled":
            return self.velocity(x, mods, inputs, mode)
        return (
            yield from self.transformer.in_parts(
                x, inputs.text, mods, inputs.rope, inputs.references, inputs.reference_kv
            )
        )

    @contextmanager
    def job(self) -> Iterator[None]:
        """Pause the compiling thread while a job runs."""
        self._thread.pause()
        try:
            yield
        finally:
            self._thread.resume()

    # Tuning.

    def tune(self) -> bool:
        """Do a short piece of tuning, and return whether more is left.

        It runs in the thread that runs jobs.
        """
        if self.eager_reason:
            return False
        try:
            if self._units is None:
                self._units = self._tuning()
            with torch.no_grad():
                return next(self._units, False)
        except Exception as exc:  # a compiler may raise anything
            if self._compiled is not None:
                # Only graphs and plans were left, and the compiled parts work without them.
                log.warning("nothing more is captured: %s", exc)
                self.stop_capturing()
                self._units = iter(())
                return False
            if self._ran_full or not isinstance(exc, torch.OutOfMemoryError):
                return self._give_up(exc)
            # The caller makes room. What is compiled already is found in the disk cache.
            self._ran_full, self._units = True, None
            self.stop_capturing()
            raise

    def _give_up(self, exc: Exception) -> bool:
        """Stay eager, which still works."""
        first_line = (str(exc).splitlines() or [""])[0][:200]
        self.eager_reason = f"compiling failed ({type(exc).__name__}: {first_line})"
        self._compiled = None
        self.free_graphs()
        log.warning("images are made eagerly: %s", self.eager_reason, exc_info=exc)
        return False

    def free_graphs(self) -> None:
        """Free the memory of captured graphs."""
        self._text_graph = None
        self._step_graphs.clear()
        self._pool = None  # torch refuses captures in a pool that no graph holds any more
        self.pool_bytes = 0

    def stop_capturing(self) -> None:
        """Free the graphs and capture no more: images need their memory.

        They save less time than an image that is computed twice, or decoded in bands, costs.
        """
        self._may_capture = False
        self.free_graphs()

    def close(self) -> None:
        """Stop tuning and free what it made.

        The generator of pieces refers back to this object, and the compiling thread to all networks.
        """
        if not self._thread.close():
            # It holds the networks until then, and the next model is placed into the memory that is free now.
            copies = [compiler.autoencoder] if (compiler := self._compiler()) else []
            drop_weights(self.transformer, self.autoencoder, self.text_encoder, *copies)
        self._units, self.eager_reason = None, "released"
        self._compiled = None
        self.free_graphs()

    @property
    def _captures(self) -> bool:
        """Return whether steps can be captured.

        Offloaded layers wait for copies, which a graph cannot.
        """
        return self.device.is_cuda and self._may_capture and not self._offloads

    @property
    def _offloads(self) -> bool:
        return any(isinstance(module, OffloadedModule) for module in self.transformer.modules())

    def _tuning(self) -> Iterator[bool]:
        """Do all tuning in order, in short pieces."""
        if self.device.is_cuda:
            yield from self._warm_up()
            yield from self._text_graphs()
        yield from self._beside("compilers loaded", load_compilers, self.options)
        with full_collections_deferred():
            networks = yield from self._compile()
        self._compiled = networks.compiled
        if self._attention.name == "cuDNN":
            yield from self._plan_attention()
        while True:
            yield from self._text_graphs()
            missing = [key for key in self._used if key not in self._step_graphs]
            if missing and self._captures:
                key = missing[-1]
                self._step_graphs.get_or_compute(
                    key,
                    # LruCache types its values, not its keys.
                    partial(self._timed, "step graphs", partial(self._capture_step, key, networks.blocks)),  # type: ignore[arg-type]
                )
                yield True
            else:
                yield False

    def _text_graphs(self) -> Iterator[bool]:
        """Capture the text encoder if it can be and is not."""
        streams = any(isinstance(module, OffloadedModule) for module in self.text_encoder.modules())
        if self.device.is_cuda and self._may_capture and not streams and self._text_graph is None:
            self._text_graph = self._timed("text graph", self._capture_text)
            yield True

    def _compile(self) -> Generator[bool, None, Compiler]:
        """Compile all parts, with saved traces where possible."""
        traces = SavedTraces(self._traces_folder())
        try:
            return (yield from self._compile_with(traces))
        except torch.OutOfMemoryError:
            raise  # no fault of the traces
        except Exception as exc:
            if not traces.enabled:
                raise
            log.warning("saved traces cannot be used, all is traced again: %s", exc)
            traces.drop(COMPILED_FUNCTIONS)
        finally:
            traces.survived()
        return (yield from self._compile_with(traces))

    def _compile_with(self, traces: SavedTraces) -> Generator[bool, None, Compiler]:
        networks: list[Compiler] = []

        def load() -> None:
            networks.append(Compiler(self.variant, self.transformer, self.autoencoder, self.device, self.options))
            self._compiler = weakref.ref(networks[0])

        yield from self._beside("networks", traces.during, load)
        for name, part in networks[0].parts():
            if name == "decoder" and self.banded:
                continue  # bands are decoded eagerly, and a whole image may not fit
            yield from self._beside(name, traces.during, part)
        yield from self._beside("traces saved", traces.save)
        return networks[0]

    def _traces_folder(self) -> Path | None:
        """Return the folder for traces, None where none are kept.

        Of streamed layers they are in many pieces, and another back end has none.
        """
        if self.options.folder is None or self.options.backend != "inductor" or self._offloads:
            return None
        name = structure(self.transformer, self.autoencoder, choices=f"{self._attention.name} {self.device.dtype_name}")
        return self.options.folder / "traces" / name

    def _timed(self, name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        self.device.sync()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return made

    def _beside(self, name: str, work: Callable[..., Any], *arguments: Any) -> Iterator[bool]:
        """Work in the compiling thread, so that jobs need not wait."""
        for _ in self._thread.run(lambda: self._timed(name, lambda: work(*arguments))):
            yield True

    def _warm_up(self) -> Iterator[bool]:
        """Load the kernels and plans that the first images need."""
        side, tokens = self.variant.native_size // self.variant.pixels_per_token, self.variant.text_length
        ids = torch.zeros(1, tokens, dtype=torch.long)
        self._timed("warm-up", lambda: self._text(ids, torch.ones_like(ids)))
        yield True
        example = SampleInputs(self.transformer, self.device, tokens, side, side)
        for count in (0, 1):
            arguments = example.step(0 if self.variant.kv else count * side * side)
            self._timed("warm-up", lambda arguments=arguments: self.transformer(*arguments))
            yield True
        latent = example.latent()
        image = self._timed("warm-up", lambda: self.decode(latent, "eager"))
        yield True
        self._timed("warm-up", lambda: self.autoencoder.encode(image))
        yield True

    def _plan_attention(self) -> Iterator[bool]:
        """Build cuDNN's plans for likely shapes: 41 to 50 ms each, H200."""
        for q, k, v in attention_inputs(self.variant, self.transformer, self.device):
            self._timed("plans", partial(self._attention.attention, q, k, v))
            yield True

    def _embed(self, ids: Tensor) -> Tensor:
        return self.text_encoder.embed(ids.to(self.device.device))

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._read(self._embed(ids), mask.to(self.device.device))

    def _read(self, embedded: Tensor, mask: Tensor) -> Tensor:
        return self.transformer.txt_in(self.text_encoder.read(embedded, mask))

    def _capture_text(self) -> DeviceGraph:
        # Without the table, which on a GPU is always in host memory.
        ids = torch.zeros(1, self.variant.text_length, dtype=torch.long, device=self.device.device)
        return self._capture(self._read, self._embed(ids), torch.ones_like(ids))

    def _capture_step(self, key: StepKey, blocks: BlockFunctions) -> DeviceGraph:
        (rows, columns), references = key
        example = SampleInputs(self.transformer, self.device, self.variant.text_length, rows, columns)

        def step(x: Tensor, text: Tensor, mods: Modulations, rope: Rope, references: Tensor | None) -> Tensor:
            with no_recompiles():
                return self.transformer(x, text, mods, rope, references, None, blocks)

        return self._capture(step, *example.step(sum(h * w for h, w in references))[:-1])

    def _capture(self, function: Callable[..., Tensor], *arguments: Any) -> DeviceGraph:
        self._pool = self._pool or graph_pool()
        graph = DeviceGraph(lambda: function(*arguments), list(_tensors(arguments)), self._pool)
        self.pool_bytes += graph.pool_bytes
        return graph


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors in the arguments of a step, in order."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Modulations):
            for part in (argument.image, argument.text, argument.single, argument.final):
                yield from part
        elif argument is not None:
            yield from _tensors(argument)
