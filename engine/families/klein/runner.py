"""Run klein's networks, eagerly at first, compiled and captured after idle time.

Two modes compute the same function with different rounding: "eager" and "compiled". All compiled parts are
switched on at once, so that one mode makes an image throughout and a process changes its mode once.
Graphs replay the same kernels on the same shapes: they change the time, not a bit.
"""

import copy
import importlib.util
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.contract import Mode
from engine.diffusion.canvas import GRID, size_for_aspect
from engine.diffusion.parts import Parts
from engine.diffusion.tokens import patchify, unpatchify
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import (
    BlockFunctions,
    DoubleBlock,
    KVPair,
    Modulations,
    SingleBlock,
    Transformer,
)
from engine.families.klein.variants import Variant
from engine.memory.cache import LruCache
from engine.memory.device import Device, DeviceGraph, graph_pool
from engine.memory.offload import OffloadedModule
from engine.nn import bands, ops
from engine.nn.attention import Choice, quickest
from engine.nn.autoencoder import Autoencoder, Decoder, Encoder
from engine.nn.ops import Rope

log = logging.getLogger(__name__)

MAX_GRAPHS = 4
"""Number of shapes with a CUDA graph of a step. They share one pool, as large as the largest needs."""

POLL = 0.05
"""Seconds that a call of `tune` waits for the compiling thread. A new job waits no longer than this."""

ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Shapes of images that are likely to be asked for."""

STOP = 5.0
"""Maximum seconds for which `close` waits for the compiling thread."""

MAX_PAUSE = 20.0
"""Maximum seconds for which a job pauses the compiling thread, in case both wait for one lock."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """Options of compilation.

    enabled: False never compiles. folder: the compilers' disk cache, None for their own default.
    everywhere: a backend for tests, which compiles also on devices where it does not pay.
    """

    enabled: bool = False
    folder: Path | None = None
    backend: str = "inductor"
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """Compiled forms of the networks' parts."""

    blocks: BlockFunctions
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]


StepKey = tuple[int, int, tuple[tuple[int, int], ...]]
"""Rows and columns of the canvas in tokens, and those of each reference that takes part in the steps."""


class Runner:
    """Runs the networks of one model behind three functions.

    `tune` makes them faster in idle time.
    """

    def __init__(
        self,
        variant: Variant,
        transformer: Transformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: Device,
        options: CompileOptions | None = None,
    ) -> None:
        self.variant, self.device, self.options = variant, device, options or CompileOptions()
        self.transformer, self.autoencoder, self.text_encoder = transformer, autoencoder, text_encoder
        self.eager_reason = obstacle(device, self.options)
        self.banded = False
        """Whether images are decoded in bands, as a tight memory plan asks for."""
        self.seconds: dict[str, float] = {}
        """Time that each part of tuning took."""
        self._compiled: Compiled | None = None
        self._text_graph: DeviceGraph | None = None
        self._step_graphs: LruCache[DeviceGraph] = LruCache(MAX_GRAPHS)
        self._used: LruCache[StepKey] = LruCache(MAX_GRAPHS)
        self._pool: Any = None
        self._units: Iterator[bool] | None = None
        self._gate = PauseGate()
        self._thread: threading.Thread | None = None
        self._attention = Choice("", ops.PLAIN["attention"], {})
        if device.is_cuda:
            self._attention = self._quickest_attention()
            ops.choose(norm_silu=ops.two_pass_norm_silu, attention=self._attention.attention)

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
        return self._text_graph((ids, mask)) if self._text_graph else self._text(ids, mask)

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

        [b, 3, 16h, 16w] in [-1, 1] -> [b, channels, h, w].
        """
        compiled = self._compiled if mode == "compiled" else None
        if compiled is None:
            return self.autoencoder.encode(images)
        with _no_recompiles():
            return compiled.encode(images)

    def decode(self, latent: Tensor, mode: Mode, *, in_bands: bool = False) -> Tensor:
        """Decode a latent to an image.

        [1, channels, h, w] -> [1, 3, 16h, 16w], about [-1, 1]. in_bands: in less memory, more slowly.
        """
        if in_bands or self.banded:
            return bands.decode(self.autoencoder, latent)
        compiled = self._compiled if mode == "compiled" else None
        if compiled is None:
            return self.autoencoder.decode(latent)
        with _no_recompiles():
            return compiled.decode(latent)

    def velocity(
        self,
        key: StepKey,
        x: Tensor,
        text: Tensor,
        mods: Modulations,
        rope: Rope,
        references: Tensor | None,
        reference_kv: Sequence[KVPair] | None,
        mode: Mode,
    ) -> Tensor:
        """Return the velocity of the canvas x.

        The arguments are those of Transformer.forward.
        """
        compiled = self._compiled if mode == "compiled" else None
        if compiled is None:
            return self.transformer(x, text, mods, rope, references, reference_kv)
        if reference_kv is None and self._captures:
            if graph := self._step_graphs.get(key):
                return graph(_tensors((x, text, mods, rope, references)))
            self._used.get_or_compute(key, lambda: key)
        with _no_recompiles():
            return self.transformer(x, text, mods, rope, references, reference_kv, compiled.blocks)

    def velocity_in_parts(
        self,
        key: StepKey,
        x: Tensor,
        text: Tensor,
        mods: Modulations,
        rope: Rope,
        references: Tensor | None,
        reference_kv: Sequence[KVPair] | None,
        mode: Mode,
    ) -> Parts[Tensor]:
        """Return the velocity like `velocity`, yielding between blocks the share done.

        Only a CPU computes while it is called; and a mode of compiled code must not stay set during a pause.
        """
        if not self.device.is_cpu or mode == "compiled":
            return self.velocity(key, x, text, mods, rope, references, reference_kv, mode)
        return (yield from self.transformer.in_parts(x, text, mods, rope, references, reference_kv))

    @contextmanager
    def job(self) -> Iterator[None]:
        """Pause the compiling thread while a job runs."""
        self._gate.pause()
        try:
            yield
        finally:
            self._gate.resume()

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
                return next(self._units)
        except Exception as exc:
            # A compiler may raise anything; the eager mode still works.
            first_line = (str(exc).splitlines() or [""])[0][:200]
            self.eager_reason = f"compiling failed ({type(exc).__name__}: {first_line})"
            self._compiled = None
            self._text_graph = None
            self._step_graphs.clear()
            log.warning("images are made eagerly: %s", self.eager_reason, exc_info=exc)
            return False

    def close(self) -> None:
        """Stop tuning and free what it made.

        The generator of pieces refers back to this object, and the compiling thread to all networks.
        """
        self._gate.stop()
        if self._thread is not None:
            # In a compiler's own C code or beside its processes it cannot be stopped, and ends there by itself.
            self._thread.join(STOP)
        self._units, self._thread, self.eager_reason = None, None, "released"
        self._compiled = self._text_graph = None
        self._step_graphs.clear()

    @property
    def _captures(self) -> bool:
        """Return whether steps can be captured.

        Offloaded layers wait for copies, which a graph cannot.
        """
        return self.device.is_cuda and not self._offloads

    @property
    def _offloads(self) -> bool:
        return any(isinstance(module, OffloadedModule) for module in self.transformer.modules())

    def _tuning(self) -> Iterator[bool]:
        """Do all tuning in order, in short pieces."""
        if self.device.is_cuda:
            yield from self._warm_up()
            if not any(isinstance(module, OffloadedModule) for module in self.text_encoder.modules()):
                self._text_graph = self._timed("text graph", self._capture_text)
                yield True
        yield from self._aside("compilers loaded", _load_compilers, self.options)
        networks = Compiler(self.variant, self.transformer, self.autoencoder, self.device, self.options)
        for name, part in networks.parts():
            yield from self._aside(name, part)
        self._compiled = networks.compiled
        if self._attention.name == "cuDNN":
            yield from self._plan_attention()
        while True:
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

    def _timed(self, name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        self.device.sync()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return made

    def _aside(self, name: str, work: Callable[..., Any], *arguments: Any) -> Iterator[bool]:
        """Run `work` in another thread, so that jobs need not wait."""
        failed: list[BaseException] = []

        def body() -> None:
            sys.settrace(self._gate.trace)
            try:
                with torch.no_grad():
                    self._timed(name, lambda: work(*arguments))
            except BaseException as exc:
                failed.append(exc)
            finally:
                sys.settrace(None)

        self._thread = thread = threading.Thread(target=body, name="klein-compile", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL)
            yield True
        if failed:
            raise failed[0]

    def _warm_up(self) -> Iterator[bool]:
        """Load the kernels and plans that the first images need."""
        side, tokens = self.variant.native_size // GRID, self.variant.text_length
        ids = torch.zeros(1, tokens, dtype=torch.long)
        self._timed("warm-up", lambda: self._text(ids, torch.ones_like(ids)))
        yield True
        example = SampleInputs(self.transformer, self.device, tokens, side, side)
        for count in (0, 1):
            arguments = example.step(0 if self.variant.kv else count * side * side)
            self._timed("warm-up", lambda arguments=arguments: self.transformer(*arguments))
            yield True
        latent = example.latent()
        image = self._timed("warm-up", lambda: self.autoencoder.decode(latent))
        yield True
        self._timed("warm-up", lambda: self.autoencoder.encode(image))
        yield True

    def _quickest_attention(self) -> Choice:
        """Try the attention back ends on an image of the native size."""
        tokens = self.variant.text_length + (self.variant.native_size // GRID) ** 2
        q, k, v = (self._heads(tokens) for _ in range(3))
        return self._timed("attention", lambda: quickest(q, k, v, self.device.sync))

    def _plan_attention(self) -> Iterator[bool]:
        """Build cuDNN's plans for likely shapes: 41 to 50 ms each, H200."""
        area = self.variant.native_size**2
        for aspect in ASPECTS:
            width, height = size_for_aspect(aspect, area)
            canvas = width * height // GRID**2
            for references in (0, canvas):
                keys = self.variant.text_length + canvas + references
                # The last block has queries of the canvas alone.
                for queries in (keys - (references if self.variant.kv else 0), canvas):
                    k = self._heads(keys)
                    self._timed("plans", partial(self._attention.attention, self._heads(queries), k, k))
                    yield True

    def _heads(self, tokens: int) -> Tensor:
        shape = self.transformer.shape
        size = (1, tokens, shape.hidden // shape.head_dim, shape.head_dim)
        return torch.randn(size, device=self.device.device, dtype=self.device.dtype)

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        device = self.device.device
        return self.transformer.txt_in(self.text_encoder(ids.to(device), mask.to(device)))

    def _capture_text(self) -> DeviceGraph:
        ids = torch.zeros(1, self.variant.text_length, dtype=torch.long, device=self.device.device)
        return self._capture(self._text, ids, torch.ones_like(ids))

    def _capture_step(self, key: StepKey, blocks: BlockFunctions) -> DeviceGraph:
        rows, columns, references = key
        example = SampleInputs(self.transformer, self.device, self.variant.text_length, rows, columns)

        def step(x: Tensor, text: Tensor, mods: Modulations, rope: Rope, references: Tensor | None) -> Tensor:
            with _no_recompiles():
                return self.transformer(x, text, mods, rope, references, None, blocks)

        return self._capture(step, *example.step(sum(h * w for h, w in references))[:-1])

    def _capture(self, function: Callable[..., Tensor], *arguments: Any) -> DeviceGraph:
        self._pool = self._pool or graph_pool()
        return DeviceGraph(lambda: function(*arguments), list(_tensors(arguments)), self._pool)


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
        if not self._open.is_set():
            self._open.wait(max(0.0, self._until - time.monotonic()))
        if self._stopped:
            raise Stopped


def _no_recompiles() -> AbstractContextManager[Any]:
    """Run eagerly what the compiled form does not cover.

    No job waits for a compiler.
    """
    return torch.compiler.set_stance("eager_on_recompile")


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


class SampleInputs:
    """Inputs of the networks for one shape.

    They serve to compile, to capture or to warm up.
    """

    def __init__(self, transformer: Transformer, device: Device, text: int, rows: int, columns: int) -> None:
        self._transformer, self._device = transformer, device
        self._text, self._rows, self._columns = text, rows, columns

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device.device, dtype=self._device.dtype)

    def latent(self) -> Tensor:
        """Return a latent of the canvas."""
        return self._randn(1, self._transformer.shape.channels, self._rows, self._columns)

    def image(self) -> Tensor:
        """Return pixels of the canvas."""
        return self._randn(1, 3, GRID * self._rows, GRID * self._columns).clamp(-1, 1)

    def step(self, references: int, kv: bool = False) -> tuple[Any, ...]:
        """Return the arguments of Transformer.forward.

        references: number of their tokens, which take part in the steps or (kv) give keys and values.
        """
        shape, canvas = self._transformer.shape, self._rows * self._columns
        tokens = self._text + canvas + (0 if kv else references)
        angles = torch.rand(tokens, shape.head_dim // 2, device=self._device.device)
        seen = self._randn(1, references, shape.hidden) if references and not kv else None
        heads = (1, references, shape.hidden // shape.head_dim, shape.head_dim)
        blocks = shape.double_blocks + shape.single_blocks
        pairs = [(self._randn(*heads), self._randn(*heads))] * blocks if kv and references else None
        mods = self._transformer.modulations(torch.ones(1, device=self._device.device, dtype=self._device.dtype))
        rope = (angles.cos(), angles.sin())
        return self._randn(1, canvas, shape.channels), self._randn(1, self._text, shape.hidden), mods, rope, seen, pairs


class Compiler:
    """Compiles the repeated blocks for all sizes, and the channels-last autoencoder."""

    def __init__(
        self,
        variant: Variant,
        transformer: Transformer,
        autoencoder: Autoencoder,
        device: Device,
        options: CompileOptions,
    ) -> None:
        self.variant, self.transformer, self.device = variant, transformer, device
        # These are copies: in eager mode channels-last is slower, and a job may request that mode at any time.
        # torch's stubs have no overload of Module.to for a memory format alone.
        self.autoencoder = copy.deepcopy(autoencoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Streamed layers cut a block into several graphs: which slot holds the weights, and an event, are in none. They
        # are excluded here, not by a decorator, which would import the compilers wherever the module is imported.
        streamed = [module for module in transformer.modules() if isinstance(module, OffloadedModule)]
        for module in streamed:
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign] - of this object alone
        compile_ = self._compile(options, fullgraph=not streamed)
        self.blocks = BlockFunctions(
            compile_(DoubleBlock.forward), compile_(SingleBlock.forward), compile_(SingleBlock.forward_rows)
        )
        self._decoder, self._encoder = compile_(Decoder.forward), compile_(Encoder.forward)
        side = max(8, variant.native_size // GRID)
        # No two dimensions are equal, and none is 1: torch would require such a coincidence of every later shape.
        self._example = SampleInputs(transformer, device, variant.text_length, side - 1, side + 1)
        self._small = SampleInputs(transformer, device, variant.text_length, side // 2 - 1, side // 2 + 1)

    @staticmethod
    def _compile(options: CompileOptions, *, fullgraph: bool) -> Callable[[Any], Callable[..., Any]]:
        return lambda function: torch.compile(function, dynamic=True, fullgraph=fullgraph, backend=options.backend)

    @property
    def compiled(self) -> Compiled:
        return Compiled(self.blocks, self.decode, self.encode)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode like Autoencoder.decode."""
        z = unpatchify(self.autoencoder.bn.restore(latent)).contiguous(memory_format=torch.channels_last)
        return self._decoder(self.autoencoder.decoder, z).contiguous()

    def encode(self, images: Tensor) -> Tensor:
        """Encode like Autoencoder.encode."""
        z = self._encoder(self.autoencoder.encoder, images.contiguous(memory_format=torch.channels_last))
        return self.autoencoder.bn.normalise(patchify(z.contiguous()))

    def parts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield each part's name and the call that compiles it.

        The call runs the part on the example.
        """
        for references in (0, 1) if self.variant.kv else (0,):
            yield "blocks", partial(_with_constant_floats, self._step, references)
        # Two sizes are compiled: torch chooses another convolution for small ones on some devices.
        for example in (self._example, self._small):
            yield "decoder", partial(_with_constant_floats, lambda example=example: self.decode(example.latent()))
        for example in (self._example, self._small):
            yield "encoder", partial(_with_constant_floats, lambda example=example: self.encode(example.image()))

    def _step(self, references: int) -> None:
        x, text, mods, rope, seen, pairs = self._example.step(11 * references, self.variant.kv)
        self.transformer(x, text, mods, rope, seen, pairs, self.blocks)


def _with_constant_floats(compile_: Callable[..., Any], *arguments: Any) -> None:
    """Compile with the epsilons of norms as constants.

    With sizes left open torch leaves Python's floats open as well, and traces all again when it finds that it cannot:
    a decoder of klein's depth from the disk cache took 26.7 s instead of 12.3 (one core, torch 2.13).
    """
    # Set here, because torch's configuration is that of a thread.
    with torch._dynamo.config.patch(specialize_float=True):
        compile_(*arguments)


def _load_compilers(options: CompileOptions) -> None:
    """Point the compilers' disk caches at the folder."""
    if options.folder is not None:
        # torch and Triton read these names; there is no other way to configure them. Set, not only where they are
        # missing: some imports put torch's own default there, and nothing would be found after a restart.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.folder / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(options.folder / "triton")


def obstacle(device: Device, options: CompileOptions) -> str:
    """Return why nothing is compiled on this device, or ""."""
    if not options.enabled:
        return "compiling is off"
    if options.everywhere:
        return ""
    if not device.is_nvidia:
        return f"compiling does not pay on {device.device.type}"
    if not device.has_tensor_cores:
        return f"compiling does not pay in {device.dtype_name}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "there is no C compiler"
    return ""


def cache_folder(root: Path, device: Device) -> Path:
    """Return the folder of the compilers' disk cache, inside `root`.

    It is specific to this torch and this device.
    """
    return root / f"torch-{torch.__version__}-{'-'.join(device.name.split())}".replace("+", "-")
