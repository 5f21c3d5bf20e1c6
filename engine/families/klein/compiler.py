"""Compiles klein's networks, where that pays."""

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.diffusion.tokens import patchify, unpatchify
from engine.families.klein.sample_inputs import SampleInputs
from engine.families.klein.transformer import PLAIN_BLOCKS, BlockFunctions, DoubleBlock, SingleBlock, Transformer
from engine.families.klein.variants import Variant
from engine.memory.device import Device
from engine.memory.offload import OffloadedModule
from engine.nn.autoencoder import Autoencoder, Decoder, Encoder

TOLERANCE = 0.1
"""Relative difference between a compiled and a plain part, by the norm: far above rounding and far below a mistake.
Observed: 2e-5 at most in a decoder of klein's shape in fp32; rows in another order differ by 1.4."""


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


COMPILED_FUNCTIONS = (
    DoubleBlock.forward, SingleBlock.forward, SingleBlock.forward_rows, Decoder.forward, Encoder.forward
)  # fmt: skip


class CompiledDiffers(RuntimeError):
    """A compiled part computes something else than the plain one."""


def compare(name: str, compiled: Tensor, plain: Tensor) -> None:
    """Compare the results of a compiled and a plain part.

    Raises CompiledDiffers if they are not equal but for rounding.
    """
    if not plain.isfinite().all():
        return  # random weights may overflow: no comparison is possible
    difference = (compiled.float() - plain.float()).norm()
    if not difference <= TOLERANCE * plain.float().norm():
        raise CompiledDiffers(f"the compiled {name} differ from the plain ones by {float(difference):.3g}")


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
        # These are copies: on a GPU channels-last is slower in eager mode, which a job may request at any time.
        in_order = copy.deepcopy(autoencoder)
        self.autoencoder = in_order.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's stubs
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
        token = variant.pixels_per_token
        side = max(8, variant.native_size // token)
        # No two dimensions are equal, and none is 1: torch would require such a coincidence of every later shape.
        self._example = SampleInputs(transformer, device, variant.text_length, side - 1, side + 1, token)
        self._small = SampleInputs(transformer, device, variant.text_length, side // 2 - 1, side // 2 + 1, token)

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

        It runs the part on the example, and compares it with the plain part on a small one. Raises CompiledDiffers.
        """
        for references in (0, 1) if self.variant.kv else (0,):
            yield "blocks", partial(_with_constant_floats, self._step, references)
        # Two sizes are compiled: torch chooses another convolution for small ones on some devices.
        yield "decoder", partial(_with_constant_floats, lambda: self.decode(self._example.latent()))
        yield "decoder", partial(_with_constant_floats, self._small_decode)
        yield "encoder", partial(_with_constant_floats, lambda: self.encode(self._example.image()))
        yield "encoder", partial(_with_constant_floats, self._small_encode)

    def _step(self, references: int) -> None:
        self._velocity(self._example.step(11 * references, self.variant.kv), self.blocks)
        arguments = self._small.step(11 * references, self.variant.kv)
        compare("blocks", self._velocity(arguments, self.blocks), self._velocity(arguments, PLAIN_BLOCKS))

    def _velocity(self, arguments: tuple[Any, ...], blocks: BlockFunctions) -> Tensor:
        return self.transformer(*arguments, blocks)

    def _small_decode(self) -> None:
        latent = self._small.latent()
        compare("decoder", self.decode(latent), self.autoencoder.decode(latent))

    def _small_encode(self) -> None:
        image = self._small.image()
        compare("encoder", self.encode(image), self.autoencoder.encode(image))


def _with_constant_floats(compile_: Callable[..., Any], *arguments: Any) -> None:
    """Compile with the epsilons of norms as constants.

    With sizes left open torch leaves Python's floats open as well, and traces all again when it finds that it cannot:
    a decoder of klein's depth from the disk cache took 26.7 s instead of 12.3 (one core, torch 2.13).
    """
    # Set here, because torch's configuration is that of a thread.
    with torch._dynamo.config.patch(specialize_float=True):
        compile_(*arguments)


def load_compilers(options: CompileOptions) -> None:
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
        return device.passed_over or f"compiling does not pay on {device.device.type}"
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


def no_recompiles() -> AbstractContextManager[Any]:
    """Run eagerly what the compiled form does not cover.

    No job waits for a compiler.
    """
    return torch.compiler.set_stance("eager_on_recompile")
