"""Klein: one loaded model, and the recipe from a job to a picture."""

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engine.contract import (
    CacheUse,
    ChangeMask,
    Event,
    InvalidJob,
    Job,
    Loading,
    OutOfMemory,
    Result,
    Rgb8,
    Stage,
    Step,
)
from engine.diffusion.canvas import GRID, Canvas, fit_reference, shaped, to_rgb8, to_tensor
from engine.diffusion.change_mask import find_change
from engine.diffusion.preview import PreviewMap, predict_clean, spread_steps
from engine.diffusion.sampler import Velocity, denoise, guided
from engine.diffusion.schedule import sigmas
from engine.diffusion.tokens import grid_positions, pack, reference_time, text_positions, unpack, unpatchify
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.footprint import activation_memory, device_bytes, memory_info
from engine.families.klein.loader import LoadOptions, load
from engine.families.klein.text_encoder import TextEncoder, Tokenizer
from engine.families.klein.transformer import KV, Modulations, Transformer
from engine.families.klein.variants import Variant
from engine.memory.cache import TensorCache, content_hash
from engine.memory.device import Device
from engine.memory.plan import gb
from engine.nn.autoencoder import Autoencoder
from engine.nn.layers import Rope

Thing = TypeVar("Thing")

MAX_STEPS = 200
"""More than any published klein was made for (base: 50); beyond it a typing error is likelier than a wish."""
MAX_GUIDANCE = 100
MAX_SEED = 2**63 - 1


class Klein:
    """One model in memory."""

    def __init__(
        self,
        variant: Variant,
        transformer: Transformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        device: Device,
        fingerprint: str = "",
        cache: TensorCache | None = None,
        placement_summary: str = "",
        limit: int | None = None,
    ) -> None:
        """placement_summary: where its weights are, in words. limit: bytes of the device it may use in all."""
        self.variant = variant
        self.placement_summary = placement_summary
        self.limit = limit
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.device = device
        self.fingerprint = fingerprint
        self.cache = cache if cache is not None else TensorCache(0)
        self._ropes: _Latest[Rope] = _Latest(16)
        self._said: _Latest[Modulations] = _Latest(256)
        self._preview_map: PreviewMap | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: Device,
        cache: TensorCache | None = None,
        options: LoadOptions | None = None,
    ) -> Generator[Loading, None, "Klein"]:
        """Read a model onto the device, telling how far it is; the generator's return value is the model.

        Raises BadWeights, or OutOfMemory before much is read.
        """
        yield Loading(checkpoint.variant.name, 0.0)
        # First, because it is small: what is wrong with it is said before gigabytes are read.
        tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.variant.text_length)
        options = options or LoadOptions()
        networks = yield from load(checkpoint, device, options)
        return cls(
            checkpoint.variant,
            networks.transformer,
            networks.autoencoder,
            networks.text_encoder,
            tokenizer,
            device,
            networks.fingerprint,
            cache,
            networks.placement,
            options.limit,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the device that its weights take, without the ring that streamed layers pass through."""
        return device_bytes((self.transformer, self.autoencoder, self.text_encoder), self.device.device)

    def free(self, there: int) -> int:
        """Of the device's `there` free bytes, those that the user's limit leaves to it."""
        return there if self.limit is None else max(0, min(there, self.limit - self.weight_bytes))

    @torch.inference_mode()
    def run(self, job: Job, previews: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Paint `job`; the last event is the Painting. Closing the iterator stops the work and frees its memory.

        previews: asked before each step whether somebody watches. Raises InvalidJob before anything is computed.
        """
        variant, clock, warnings = self.variant, _StageClock(self.device), []
        steps, guidance = self._plan(job, warnings)
        frame, references = self._frame(job, warnings)
        self._fits(frame, references)

        # 1. The prompt, as states the transformer reads; a guided model also reads an empty one.
        yield Stage("prompt")
        with clock("prompt"):
            text, prompt_known = self._read(job.prompt, warnings)
            no_text = self._read("", [])[0] if guidance > 1 else None

        # 2. The references, as tokens that take part in every step, or as keys and values kept for all of them.
        known: CacheUse = "none"
        seen: Tensor | None = None
        kept: Sequence[KV] | None = None
        if references:
            yield Stage("references")
            with clock("references"):
                if variant.kv:
                    kept, hit = self._keep(references)
                else:
                    seen, hit = self._see(references)
                known = "hit" if hit else "miss"

        # 3. Noise, drawn on the CPU whatever the device, so that a seed means the same picture everywhere.
        rows, columns = frame.canvas_height // GRID, frame.canvas_width // GRID
        generator = torch.Generator().manual_seed(job.seed)
        noise = torch.randn((1, self.transformer.shape.channels, rows, columns), generator=generator)
        x = pack(noise).to(self.device.device, self.device.dtype)

        # 4. From noise to latent, one Euler step at a time.
        yield Stage("denoise")
        sizes = tuple((image.shape[0] // GRID, image.shape[1] // GRID) for image in references)
        rope = self._rope(rows, columns, () if variant.kv else sizes)
        velocity = self._velocity(text, rope, seen, kept)
        if no_text is not None:
            velocity = guided(velocity, self._velocity(no_text, rope, seen, kept), guidance)
        levels = sigmas(steps, rows * columns)
        stepping = denoise(velocity, x, levels)
        partial_steps = spread_steps(steps, job.partials)
        for i in range(steps):
            watched, decoding = previews(), i + 1 in partial_steps
            # A copy, since a sampler may step in place; only where it is looked at.
            before = x.clone() if watched or decoding else None
            with clock("denoise"):
                x = next(stepping)
            preview = partial = None
            if before is not None:
                clean = unpack(predict_clean(before, x, levels[i], levels[i + 1]), rows)
                preview = self._preview(clean, frame) if watched else None
            if before is not None and decoding:
                with clock("decode"):
                    decoded = self.autoencoder.decode(clean.to(self.device.dtype))
                    partial = frame.lift(to_rgb8(decoded))
            yield Step(i + 1, steps, preview, partial)

        # 5. From latent to picture.
        yield Stage("decode")
        with clock("decode"):
            decoded = self.autoencoder.decode(unpack(x, rows))
        change: ChangeMask | None = None
        if job.find_change:
            with clock("change"):
                decoded, change = self._find_change(decoded, references[0], frame)
        yield Result(
            image=frame.lift(to_rgb8(decoded)),
            seed=job.seed,
            model=variant.name,
            fingerprint=self.fingerprint,
            steps=steps,
            guidance=guidance,
            ms=clock.ms,
            cache={"prompt": "hit" if prompt_known else "miss", "references": known},
            warnings=tuple(warnings),
            change=change,
        )

    @torch.inference_mode()
    def prefetch(self, image: Rgb8) -> None:
        """Do now what an edit of `image` will need, so that it starts warm."""
        seen = Canvas.of(image.shape[1], image.shape[0], self.variant.max_size**2).lay(image)
        if self.variant.kv:
            self._keep([seen])
        else:
            self._latents(seen, content_hash(seen))
        self._round_trip(seen)

    def _find_change(self, decoded: Tensor, reference: Rgb8, frame: Canvas) -> tuple[Tensor, ChangeMask]:
        """The decoded edit, matched to its reference outside the change, and the change mask."""
        size = slice(frame.inner_height), slice(frame.inner_width)
        round_trip = self._round_trip(reference).float() / 127.5 - 1
        found = find_change(decoded[:, :, *size], round_trip[:, :, *size])
        opacity = frame.lift_mask((found.opacity * 255).round().byte().cpu().numpy())
        across, down = frame.width / frame.inner_width, frame.height / frame.inner_height
        box = found.faint_box and _scaled(found.faint_box, across, down)
        shift = round(found.shift[0] * across), round(found.shift[1] * down)
        return found.painted, ChangeMask(opacity, found.whole, found.faint, box, shift, found.drift)

    def _round_trip(self, image: Rgb8) -> Tensor:
        """What the autoencoder makes of a reference: [1, 3, h, w] uint8 on the device."""
        key = content_hash(image)

        def decode() -> list[Tensor]:
            decoded = self.autoencoder.decode(unpack(self._latents(image, key)[0], image.shape[0] // GRID))
            return [((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()]

        return self.cache.get_or((self.fingerprint, "round trip", key), decode)[0][0]

    def _preview(self, latent: Tensor, canvas: Canvas) -> Rgb8:
        """Return the small image that a normalised latent stands for."""
        if self._preview_map is None:
            # Fitted with the first watcher: a model that nobody watches pays nothing.
            self._preview_map = PreviewMap.fit(self._encode_plain)
        plain = unpatchify(self.autoencoder.bn.restore(latent))
        return self._preview_map(plain, canvas.inner_width, canvas.inner_height)

    def _encode_plain(self, images: Tensor) -> Tensor:
        """[b, 3, 8h, 8w] -> latents before patches and normalisation, [b, c, h, w]."""
        return self.autoencoder.encoder(images.to(self.device.device, self.device.dtype))

    def _plan(self, job: Job, warnings: list[str]) -> tuple[int, float]:
        """Steps and guidance, after checking what can be checked before any work."""
        variant = self.variant
        if len(job.references) > variant.max_references:
            raise InvalidJob(
                f"{len(job.references)} references; {variant.name} takes at most {variant.max_references}.",
                hint="Compose in two rounds.",
            )
        if job.find_change and not job.align:
            raise InvalidJob("find_change needs align: only what lies in one frame can be compared.")
        if not 0 <= job.seed <= MAX_SEED:
            raise InvalidJob(f"seed is {job.seed}; it must lie in 0 … 2^63-1.")
        steps = variant.steps if job.steps is None else job.steps
        if not 1 <= steps <= MAX_STEPS:
            raise InvalidJob(f"steps is {steps}; it must lie in 1 … {MAX_STEPS}.")
        guidance = variant.guidance if job.guidance is None else job.guidance
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise InvalidJob(f"guidance is {guidance:g}; it must lie in 0 … {MAX_GUIDANCE}.")
        if guidance > 1 and variant.distilled:
            warnings.append(f"guidance {guidance:g} is ignored: {variant.name} is distilled and needs none")
            guidance = 1.0
        return steps, guidance

    def _frame(self, job: Job, warnings: list[str]) -> tuple[Canvas, list[Rgb8]]:
        """The canvas, and the references as the model sees them."""
        variant = self.variant
        area = variant.max_size**2
        references = list(job.references)
        if job.align:
            if not references:
                raise InvalidJob("align needs a reference to be aligned with.")
            height, width = references[0].shape[:2]
            frame = Canvas.of(width, height, area, variant.native_size**2 if job.close_up else 0)
            seen = [frame.lay(references[0])]
        else:
            seen, frame = [], None
        seen += [fit_reference(image, variant.reference_size**2) for image in references[len(seen) :]]
        if frame is None:
            width, height = _size(job, seen, variant)
            if min(width, height) < GRID:
                raise InvalidJob(f"The size is {width}×{height}; each side needs at least {GRID} pixels.")
            frame = Canvas.of(width, height, area)
        if frame.inner_width < frame.width or frame.inner_height < frame.height:
            warnings.append(
                f"painted at {frame.inner_width}×{frame.inner_height}, the size {variant.name} was made for, "
                f"and resampled to {frame.width}×{frame.height}"
            )
        return frame, seen

    def _fits(self, frame: Canvas, references: list[Rgb8]) -> None:
        """Refuse early what the memory that is free now cannot hold. Raises OutOfMemory."""
        pixels = frame.canvas_width * frame.canvas_height
        seen = sum(image.shape[0] * image.shape[1] for image in references)
        shapes = (self.variant, self.transformer, self.autoencoder, self.device.dtype)
        work = activation_memory(*shapes, pixels=pixels, references=seen)
        there = memory_info(self.device)
        # What is remembered can be forgotten for it.
        free = self.free(there.free + self.cache.stats().bytes)
        if work.bytes <= free:
            return
        sides = (side for side in (1024, 768, 512, 256) if side**2 < pixels)
        fitting = (side for side in sides if activation_memory(*shapes, pixels=side**2, references=seen).bytes <= free)
        side = next(fitting, None)
        raise OutOfMemory(
            f"{frame.canvas_width}×{frame.canvas_height} with {len(references)} references takes {gb(work.bytes)} "
            f"besides the weights; {gb(free)} of the {there.device} are {'free' if self.limit is None else 'allowed'}.",
            hint=f"{side}×{side} would fit." if side else "Use fewer references, or end what else uses the device.",
        )

    def _read(self, prompt: str, warnings: list[str]) -> tuple[Tensor, bool]:
        """Prompt states after the transformer's own projection: [1, text_length, hidden]."""
        tokens = self.tokenizer(prompt)
        if strange := self.variant.unknown_words(prompt):
            warnings.append(f"{self.variant.name} was never taught {', '.join(strange)}, and guesses")
        if tokens.cut:
            warnings.append(
                f"the prompt is {tokens.cut} tokens longer than the {self.variant.text_length} {self.variant.name} "
                "reads; its end was cut"
            )

        def read() -> list[Tensor]:
            ids, mask = tokens.ids.to(self.device.device), tokens.mask.to(self.device.device)
            return [self.transformer.txt_in(self.text_encoder(ids, mask))]

        (states,), hit = self.cache.get_or((self.fingerprint, "prompt", prompt), read)
        return states, hit

    def _latents(self, image: Rgb8, key: str) -> tuple[Tensor, bool]:
        """A reference's latent tokens, [1, tokens, channels]."""

        def encode() -> list[Tensor]:
            return [pack(self.autoencoder.encode(to_tensor(image).to(self.device.device, self.device.dtype)))]

        (tokens,), hit = self.cache.get_or((self.fingerprint, "latent", key), encode)
        return tokens, hit

    def _see(self, images: list[Rgb8]) -> tuple[Tensor, bool]:
        """All references as tokens of the hidden width, one after the other."""
        found = [self._latents(image, content_hash(image)) for image in images]
        return self.transformer.img_in(torch.cat([tokens for tokens, _ in found], dim=1)), all(hit for _, hit in found)

    def _keep(self, images: list[Rgb8]) -> tuple[list[KV], bool]:
        """Keys and values of the ordered references: swapped or alone, they would be others."""
        keys = tuple(content_hash(image) for image in images)

        def prefill() -> list[Tensor]:
            tokens = torch.cat([self._latents(image, key)[0] for image, key in zip(images, keys, strict=True)], dim=1)
            sizes = tuple((image.shape[0] // GRID, image.shape[1] // GRID) for image in images)
            kept = self.transformer.prefill(self.transformer.img_in(tokens), self._reference_rope(sizes))
            return [tensor for kv in kept for tensor in kv]

        flat, hit = self.cache.get_or((self.fingerprint, "kv", keys), prefill)
        return list(zip(flat[::2], flat[1::2], strict=True)), hit

    def _velocity(self, text: Tensor, rope: Rope, seen: Tensor | None, kept: Sequence[KV] | None) -> Velocity:
        return lambda x, sigma: self.transformer(x, text, self._modulations(sigma), rope, seen, kept)

    def _modulations(self, sigma: float) -> Modulations:
        return self._said.get_or(sigma, lambda: self._make_modulations(sigma))

    def _make_modulations(self, sigma: float) -> Modulations:
        # Rounded to the model's dtype in units of 1000, as in training and in diffusers; Euler keeps the exact sigma.
        thousandths = torch.tensor([1000.0 * sigma]).to(self.device.dtype)
        return self.transformer.modulations((thousandths / 1000).to(self.device.device))

    def _rope(self, rows: int, columns: int, references: tuple[tuple[int, int], ...]) -> Rope:
        return self._ropes.get_or((rows, columns, references), lambda: self._make_rope(rows, columns, references))

    def _make_rope(self, rows: int, columns: int, references: tuple[tuple[int, int], ...]) -> Rope:
        text, canvas = text_positions(self.variant.text_length), grid_positions(rows, columns)
        return self.transformer.rope(torch.cat([text, canvas, *_reference_positions(references)]))

    def _reference_rope(self, references: tuple[tuple[int, int], ...]) -> Rope:
        return self.transformer.rope(torch.cat(_reference_positions(references)))


def _size(job: Job, seen: list[Rgb8], variant: Variant) -> tuple[int, int]:
    """Width and height of the picture: as asked, or of the shape asked, or the first reference's, or native."""
    if job.width and job.height:
        return job.width, job.height
    if job.aspect is not None:
        return shaped(job.aspect, variant.native_size**2)
    height, width = seen[0].shape[:2] if seen else (variant.native_size, variant.native_size)
    return job.width or width, job.height or height


def _scaled(box: tuple[int, int, int, int], across: float, down: float) -> tuple[int, int, int, int]:
    """A box of the canvas in pixels of the picture."""
    x, y, width, height = box
    return round(x * across), round(y * down), max(1, round(width * across)), max(1, round(height * down))


def _reference_positions(sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    return [grid_positions(h, w, reference_time(i)) for i, (h, w) in enumerate(sizes)]


class _Latest(Generic[Thing]):
    """The last few things made, by key.

    Not functools.lru_cache: around a method it holds the object that holds it, and a released model would stay in
    memory until Python next looks for circles.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._things: OrderedDict[Hashable, Thing] = OrderedDict()

    def get_or(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        if key not in self._things:
            self._things[key] = make()
            if len(self._things) > self._most:
                self._things.popitem(last=False)
        self._things.move_to_end(key)
        return self._things[key]


class _StageClock:
    """Milliseconds of wall time by stage."""

    def __init__(self, device: Device) -> None:
        self.ms: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._device.sync()
        self.ms[stage] = round(self.ms.get(stage, 0.0) + 1000 * (time.perf_counter() - start), 1)
