"""Run one loaded klein model from a job to an image."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from engine.contract import (
    BadWeights,
    CacheUse,
    ChangeMask,
    Event,
    Job,
    Loading,
    Mode,
    OutOfMemory,
    Result,
    Rgb8,
    Stage,
    StageName,
    Step,
)
from engine.diffusion.canvas import Canvas, to_rgb8, to_tensor
from engine.diffusion.change_mask import find_change
from engine.diffusion.parts import Parts, beside, within
from engine.diffusion.preview import PreviewMap, predict_clean, spread_steps
from engine.diffusion.sampler import VelocityParts, guided, step
from engine.diffusion.schedule import sigmas
from engine.diffusion.tokens import grid_positions, pack, reference_positions, text_positions, unpack, unpatchify
from engine.families.klein.checkpoint import Checkpoint
from engine.families.klein.compiler import CompileOptions
from engine.families.klein.conditioning import Conditioning, TokenSize
from engine.families.klein.estimate import Estimator, trial_speed
from engine.families.klein.footprint import activation_memory, device_bytes, does_not_fit, memory_info
from engine.families.klein.job_inputs import Reference, canvas_of, fit_images, read_settings
from engine.families.klein.loader import LoadOptions, Networks, load
from engine.families.klein.operations import choose_operations
from engine.families.klein.reading import read_prompt
from engine.families.klein.runner import Runner
from engine.families.klein.stage_clock import StageClock
from engine.families.klein.text_encoder import Tokenizer
from engine.families.klein.transformer import KVPair, Modulations
from engine.families.klein.variants import Variant
from engine.memory.cache import LruCache, TensorCache
from engine.memory.device import Device
from engine.memory.plan import ActivationMemory
from engine.nn.attention import Choice
from engine.nn.ops import Rope

SEEDS = 4096
"""Number of jobs whose mode is remembered, to warn when the same seed is computed in the other mode."""


class Klein:
    """One model in memory."""

    def __init__(
        self,
        variant: Variant,
        networks: Networks,
        tokenizer: Tokenizer,
        device: Device,
        cache: TensorCache | None = None,
        *,
        limit: int | None = None,
        compile_options: CompileOptions | None = None,
        attention: Choice | None = None,
        modes: LruCache[Mode] | None = None,
    ) -> None:
        """Take a loaded model.

        limit: bytes of the device it may use in total. attention: the back end in use.
        modes: the mode of the latest images, by what was asked for.
        """
        self.variant, self.tokenizer, self.device, self.limit = variant, tokenizer, device, limit
        self.transformer, self.autoencoder = networks.transformer, networks.autoencoder
        self.text_encoder = networks.text_encoder
        self.fingerprint, self.placement_summary = networks.fingerprint, networks.placement
        self._warnings = networks.warnings
        self.cache = cache if cache is not None else TensorCache(0)
        self.runner = Runner(variant, networks, device, compile_options, attention)
        shapes = (self.transformer.shape, self.autoencoder, self.text_encoder)
        self.estimator = Estimator(variant, *shapes, self._trial_speed())
        self._ropes: LruCache[Rope] = LruCache(16)
        self._modulation_cache: LruCache[Modulations] = LruCache(256)
        self._modes = LruCache(SEEDS) if modes is None else modes
        self._preview_map: PreviewMap | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: Device,
        cache: TensorCache | None = None,
        options: LoadOptions | None = None,
        compile_options: CompileOptions | None = None,
        modes: LruCache[Mode] | None = None,
    ) -> Generator[Loading, None, "Klein"]:
        """Load a model onto the device and report progress.

        The generator's return value is the model.
        Raises BadWeights, or OutOfMemory before much is read.
        """
        variant, options = checkpoint.variant, options or LoadOptions()
        yield Loading(variant.name, 0.0)
        # This comes first because it is small: its errors are raised before gigabytes are read.
        tokenizer = Tokenizer(checkpoint.tokenizer, variant.text_length)
        networks = yield from load(checkpoint, device, options)
        attention = choose_operations(variant, networks.transformer, device)
        return cls(
            variant, networks, tokenizer, device, cache,
            limit=options.limit, compile_options=compile_options, attention=attention, modes=modes,
        )  # fmt: skip

    @torch.no_grad()
    def _trial_speed(self) -> float:
        rows = (self.variant.native_size // self.variant.pixels_per_token) ** 2
        return trial_speed(self.transformer, self.device, rows)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of weights on the device, without the offload ring."""
        return device_bytes((self.transformer, self.autoencoder, self.text_encoder), self.device.device)

    def free(self, free_bytes: int) -> int:
        """Clamp the device's free bytes to the user's memory limit."""
        return free_bytes if self.limit is None else max(0, min(free_bytes, self.limit - self.weight_bytes))

    @torch.no_grad()
    def run(self, job: Job, previews: Callable[[], bool] = lambda: False, *, in_bands: bool = False) -> Iterator[Event]:
        """Run `job` and yield its events, the Result last.

        Closing the iterator stops the work and frees its memory.
        previews: asked before each step whether a client wants previews. in_bands: decode in less memory, more slowly.
        Raises InvalidJob before anything is computed.
        """
        with self.runner.job():
            yield from self._run(job, previews, in_bands)

    def _run(self, job: Job, previews: Callable[[], bool], in_bands: bool) -> Iterator[Event]:
        variant, clock, warnings = self.variant, StageClock(self.device), list(self._warnings)
        steps, guidance = read_settings(job, variant, warnings)
        canvas, references = fit_images(job, variant, warnings)
        in_bands = self._decodes_in_bands(canvas, references) or in_bands
        mode = self._mode(job, warnings)

        estimate = self.estimator.image(
            math.prod(canvas.tokens), tuple(math.prod(each.tokens) for each in references), steps,
            guided=guidance > 1, changed=job.find_change,
        )  # fmt: skip

        def progress(stage: StageName, share: float) -> Stage:
            return Stage(stage, share, estimate.left(stage, share, clock.ms))

        # 1. Encode the prompt to states for the transformer; a guided model also encodes an empty one.
        yield progress("prompt", 0.0)
        reading = read_prompt(job.prompt, variant, new=not references, place=job.place)
        warnings += reading.warnings
        rows, columns = canvas.tokens
        drawn: list[Tensor] = []

        def draw_and_hash() -> None:
            drawn.append(self._noise(job.seed, rows, columns))
            for reference in references:
                _ = reference.key

        prompts = [beside(self._prompt_states(reading.text, warnings), draw_and_hash)]
        if guidance > 1:
            prompts.append(self._prompt_states("", []))
        states: list[tuple[Tensor, bool]] = []
        for i, parts in enumerate(prompts):
            parts = within(parts, i / len(prompts), (i + 1) / len(prompts))
            states.append((yield from clock.parts("prompt", parts, progress, pause=0)))
        (text, prompt_hit), *rest = states
        no_text = rest[0][0] if rest else None
        if prompt_hit:
            estimate.spared.add("prompt")

        # 2. Prepare the references: tokens that take part in every step, or keys and values for all steps.
        reference_use: CacheUse = "none"
        if references:
            yield progress("references", 0.0)
            with clock("references"):
                condition, hit = self._condition(canvas.tokens, text, references, mode)
            reference_use = "hit" if hit else "miss"
            estimate.spared |= {"references"} if hit else set()
        else:
            condition = Conditioning(canvas.tokens, text, self._rope(canvas.tokens))

        # 3. Go from noise to latent, one Euler step at a time.
        x = drawn[0].to(self.device.device)
        yield progress("denoise", 0.0)
        velocity = self._velocity(condition, mode)
        if no_text is not None:
            unconditional = self._velocity(replace(condition, text=no_text), mode)
            velocity = guided(velocity, unconditional, guidance)
        levels = sigmas(steps, rows * columns)
        partial_steps = spread_steps(steps, job.partials)
        for i in range(steps):
            watched, decoding = previews(), i + 1 in partial_steps
            # This is a copy, since a sampler may step in place. It is made only if it is used.
            before = x.clone() if watched or decoding else None
            parts = within(step(velocity, x, levels[i], levels[i + 1]), i / steps, (i + 1) / steps)
            x = yield from clock.parts("denoise", parts, progress)
            if decoding or i + 1 == steps:
                _refuse_not_finite(x, variant.name)
            preview = partial = None
            if before is not None:
                clean = unpack(predict_clean(before, x, levels[i], levels[i + 1]), rows)
                preview = self._preview(clean, canvas) if watched else None
                if decoding:
                    with clock("decode"):
                        decoded = self.runner.decode(clean.to(self.device.dtype), mode, in_bands=in_bands)
                        partial = canvas.crop(to_rgb8(decoded))
            yield Step(i + 1, steps, preview, partial, estimate.left("denoise", (i + 1) / steps, clock.ms))

        # 4. Decode the latent to an image.
        yield progress("decode", 0.0)
        with clock("decode"):
            decoded = self.runner.decode(unpack(x, rows), mode, in_bands=in_bands)
        change: ChangeMask | None = None
        if job.find_change:
            with clock("change"):
                decoded, change = self._find_change(decoded, references[0], canvas, mode, in_bands)
        image = canvas.crop(to_rgb8(decoded))
        self.estimator.learn(estimate, clock.ms)
        yield Result(
            image=image,
            seed=job.seed,
            model=variant.name,
            fingerprint=self.fingerprint,
            steps=steps,
            guidance=guidance,
            ms=clock.ms,
            cache={"prompt": "hit" if prompt_hit else "miss", "references": reference_use},
            warnings=tuple(warnings),
            dtype=self.device.dtype_name,
            mode=mode,
            change=change,
            read_as="" if reading.text == job.prompt else reading.text,
            painted=(canvas.content_width, canvas.content_height) if canvas.enlarges else None,
        )

    @torch.no_grad()
    def prefetch(self, image: Rgb8) -> None:
        """Compute in advance what an edit of `image` needs."""
        canvas = canvas_of(self.variant, image.shape[1], image.shape[0])
        reference = Reference.padded(image, canvas)
        try:
            in_bands = self._decodes_in_bands(canvas, [reference])
        except OutOfMemory:
            return  # a job that asks for the edit raises it
        # The compiling thread may use the same ring of streamed layers.
        with self.runner.job():
            if self.variant.kv:
                self._reference_kv([reference], self.runner.mode)
            else:
                self._latents(reference, self.runner.mode)
            self._round_trip(reference, self.runner.mode, in_bands=in_bands)

    def _find_change(
        self, decoded: Tensor, reference: Reference, canvas: Canvas, mode: Mode, in_bands: bool
    ) -> tuple[Tensor, ChangeMask]:
        """Return the edit and its change mask.

        The edit is matched to its reference outside the change.
        """
        size = slice(canvas.content_height), slice(canvas.content_width)
        round_trip = self._round_trip(reference, mode, in_bands=in_bands).float() / 127.5 - 1
        found = find_change(decoded[:, :, *size], round_trip[:, :, *size])
        opacity = canvas.crop_mask((found.opacity * 255).round().byte().cpu().numpy())
        across, down = canvas.width / canvas.content_width, canvas.height / canvas.content_height
        box = found.faint_box and _scaled(found.faint_box, across, down)
        shift = round(found.shift[0] * across), round(found.shift[1] * down)
        return found.painted, ChangeMask(opacity, found.whole, found.faint, box, shift, found.drift)

    def _round_trip(self, reference: Reference, mode: Mode, *, in_bands: bool = False) -> Tensor:
        """Encode and decode the reference: [1, 3, h, w] uint8."""

        def decode() -> list[Tensor]:
            latent = unpack(self._latents(reference, mode)[0], reference.tokens[0])
            decoded = self.runner.decode(latent, mode, in_bands=in_bands)
            return [((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()]

        return self.cache.get_or_compute((self.fingerprint, "round trip", mode, reference.key), decode)[0][0]

    def _mode(self, job: Job, warnings: list[str]) -> Mode:
        """Return the job's mode if it is available, else the runner's."""
        mode = self.runner.mode
        if job.mode == "eager":
            mode = "eager"
        elif job.mode == "compiled" and mode == "eager":
            warnings.append(f"computed eagerly, not by compiled kernels as asked for: {self.runner.summary()}")
        key = (self.fingerprint, job.prompt, job.seed, job.size, job.steps, job.guidance, len(job.references))
        before = self._modes.get(key)
        if before not in (None, mode):
            warnings.append(
                f"computed by {mode} kernels, the same seed before by {before} ones: the images differ by rounding"
            )
        self._modes.insert(key, mode)
        return mode

    def _preview(self, latent: Tensor, canvas: Canvas) -> Rgb8:
        """Return the small image that a normalised latent stands for."""
        if self._preview_map is None:
            # The preview is fitted when first used: a model without previews pays nothing.
            self._preview_map = PreviewMap.fit(self._encode_plain, self.autoencoder.shape.pixels_per_latent)
        plain = unpatchify(self.autoencoder.bn.restore(latent))
        return self._preview_map(plain, canvas.content_width, canvas.content_height)

    def _encode_plain(self, images: Tensor) -> Tensor:
        """Encode images to latents before patchify and normalisation.

        [b, 3, p·h, p·w] -> [b, c, h, w], p being `pixels_per_latent`.
        """
        return self.autoencoder.encoder(images.to(self.device.device, self.device.dtype))

    def _decodes_in_bands(self, canvas: Canvas, references: list[Reference]) -> bool:
        """Return whether the job only fits if it decodes in bands.

        Raises OutOfMemory if it does not hold the job at all.
        """
        token = self.variant.pixels_per_token**2
        reference_pixels = [token * math.prod(reference.tokens) for reference in references]

        def work(pixels: int) -> ActivationMemory:
            shapes = (self.variant, self.transformer, self.autoencoder, self.device.dtype)
            return activation_memory(*shapes, pixels=pixels, references=reference_pixels)

        pixels = canvas.canvas_width * canvas.canvas_height
        memory, needed = memory_info(self.device), work(pixels)
        # The cache makes room.
        free = self.free(memory.free + self.cache.stats().bytes)
        whole = needed.on(memory) + (memory.context if self.limit else 0)
        in_bands = self.runner.banded or whole > free
        wanted = needed.least if in_bands else whole
        # The graphs' memory counts as free, and only they can use it.
        if free - self.runner.pool_bytes < wanted <= free:
            self.runner.stop_capturing()
        if in_bands and needed.least > free:
            size, limited = (canvas.canvas_width, canvas.canvas_height), self.limit is not None
            raise does_not_fit(size, len(references), memory.device, free, work, limited=limited)
        self._make_room(free - wanted - self.runner.pool_bytes, references)
        return in_bands and needed.banded > 0

    def _make_room(self, limit: int, references: list[Reference]) -> None:
        """Evict what these references do not use, down to `limit` bytes."""
        if self.cache.stats().bytes <= limit:
            return
        keys = [reference.key for reference in references]
        parts = [("kv", tuple(keys)), *((part, key) for part in ("latent", "round trip") for key in keys)]
        modes = get_args(Mode)
        if self.cache.make_room(limit, {(self.fingerprint, part, mode, key) for part, key in parts for mode in modes}):
            self.device.empty_cache()

    def _prompt_states(self, prompt: str, warnings: list[str]) -> Parts[tuple[Tensor, bool]]:
        """Return the prompt states after the transformer's projection: [1, text_length, hidden].

        It yields the share that is done between the encoder's layers, each of which takes a second on a slow machine.
        """
        tokens = self.tokenizer(prompt)
        if tokens.cut:
            warnings.append(
                f"the prompt is {tokens.cut} tokens longer than the {self.variant.text_length} {self.variant.name} "
                "reads; its end was cut"
            )
        key = (self.fingerprint, "prompt", prompt)
        if (kept := self.cache.get(key)) is not None:
            return kept[0], True
        states = yield from self.runner.text_in_parts(tokens.ids, tokens.mask)
        return self.cache.insert(key, [states])[0], False

    def _noise(self, seed: int, rows: int, columns: int) -> Tensor:
        """Return the seed's noise in host memory: [1, rows · columns, channels].

        It is drawn on the CPU in fp32 on every device, so that a seed means the same image everywhere.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, self.transformer.shape.channels, rows, columns), generator=generator)
        return pack(noise).to(self.device.dtype)

    def _condition(
        self, canvas: TokenSize, text: Tensor, references: list[Reference], mode: Mode
    ) -> tuple[Conditioning, bool]:
        """Return the step inputs, and whether all references were in the cache."""
        if self.variant.kv:
            pairs, hit = self._reference_kv(references, mode)
            return Conditioning(canvas, text, self._rope(canvas), reference_kv=pairs), hit
        sizes = tuple(reference.tokens for reference in references)
        tokens, hit = self._reference_tokens(references, mode)
        return Conditioning(canvas, text, self._rope(canvas, sizes), sizes, tokens), hit

    def _latents(self, reference: Reference, mode: Mode) -> tuple[Tensor, bool]:
        """Return a reference's latent tokens, [1, tokens, channels]."""

        def encode() -> list[Tensor]:
            pixels = to_tensor(reference.image, self.device.device).to(self.device.dtype)
            return [pack(self.runner.encode(pixels, mode))]

        (tokens,), hit = self.cache.get_or_compute((self.fingerprint, "latent", mode, reference.key), encode)
        return tokens, hit

    def _reference_tokens(self, references: list[Reference], mode: Mode) -> tuple[Tensor, bool]:
        """Return all references as consecutive tokens of the hidden width."""
        found = [self._latents(reference, mode) for reference in references]
        return self.transformer.img_in(torch.cat([tokens for tokens, _ in found], dim=1)), all(hit for _, hit in found)

    def _reference_kv(self, references: list[Reference], mode: Mode) -> tuple[list[KVPair], bool]:
        """Return the keys and values of the references, in their order.

        Another order, or one reference alone, gives other keys and values.
        """
        keys = tuple(reference.key for reference in references)

        def prefill() -> list[Tensor]:
            tokens = torch.cat([self._latents(reference, mode)[0] for reference in references], dim=1)
            sizes = tuple(reference.tokens for reference in references)
            pairs = self.transformer.prefill(self.transformer.img_in(tokens), self._reference_rope(sizes))
            return [tensor for pair in pairs for tensor in pair]

        flat, hit = self.cache.get_or_compute((self.fingerprint, "kv", mode, keys), prefill)
        return list(zip(flat[::2], flat[1::2], strict=True)), hit

    def _velocity(self, inputs: Conditioning, mode: Mode) -> VelocityParts:
        return lambda x, sigma: self.runner.velocity_in_parts(x, self._modulations(sigma), inputs, mode)

    def _modulations(self, sigma: float) -> Modulations:
        return self._modulation_cache.get_or_compute(sigma, lambda: self._compute_modulations(sigma))

    def _compute_modulations(self, sigma: float) -> Modulations:
        # In training and in diffusers, 1000·sigma is rounded to the model's dtype. Euler keeps the exact sigma.
        thousandths = torch.tensor([1000.0 * sigma]).to(self.device.dtype)
        return self.transformer.modulations((thousandths / 1000).to(self.device.device))

    def _rope(self, canvas: TokenSize, references: tuple[TokenSize, ...] = ()) -> Rope:
        return self._ropes.get_or_compute((canvas, references), lambda: self._compute_rope(canvas, references))

    def _compute_rope(self, size: TokenSize, references: tuple[TokenSize, ...]) -> Rope:
        text, canvas = text_positions(self.variant.text_length), grid_positions(*size)
        return self.transformer.rope(torch.cat([text, canvas, *reference_positions(references)]))

    def _reference_rope(self, references: tuple[TokenSize, ...]) -> Rope:
        return self.transformer.rope(torch.cat(reference_positions(references)))


def _refuse_not_finite(latent: Tensor, model: str) -> None:
    """Raise BadWeights for a latent with NaN or infinity.

    Such a latent would be decoded to a black image.
    """
    if not bool(torch.isfinite(latent).all()):
        raise BadWeights(
            f"{model} computed numbers that are not finite: its weights, or a LoRA on them, are broken.",
            hint="Leave the LoRA away, or download the model again.",
        )


def _scaled(box: tuple[int, int, int, int], across: float, down: float) -> tuple[int, int, int, int]:
    """Scale a box of the canvas to pixels of the image."""
    x, y, width, height = box
    return round(x * across), round(y * down), max(1, round(width * across)), max(1, round(height * down))
