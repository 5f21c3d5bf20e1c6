"""Trains the decoder on the computed encoder's latents, slightly noised.

`python -m engine.nano.training.train_decoder FOLDER OUT --seconds 100` leaves decoder.safetensors in OUT. The latents
stay what they are, so that a trained transformer goes on fitting. `--denoised` also takes what the transformer in OUT
makes of noisy latents, in half of the batches: the decoder then sharpens what the transformer leaves soft.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engine.diffusion.tokens import unpatchify
from engine.nano.training.compiled_training import multiplies_bf16
from engine.nano.training.compositor import BACKGROUNDS, Compositor
from engine.nano.training.denoised import OTHER_SHAPES, Denoised
from engine.nano.training.folder import load_autoencoder, load_extras, save_autoencoder
from engine.nano.training.frames import SQUARE, Frame, canvases
from engine.nano.training.model import Nano
from engine.nano.training.pca_encoder import as_one_convolution, fit_encoder
from engine.nano.training.shards import DECODER, save_decoder
from engine.nano.training.sprites import KINDS
from engine.nano.words import NOUNS
from engine.nn.autoencoder import Autoencoder

RATE = 2e-3
LATENT_NOISE = 0.12
"""At most this much on the normalised latents: what the transformer gets slightly wrong still decodes well."""
EMA = 0.998
REPORTS = "decoder.jsonl"
REPORT_SECONDS = 15.0
"""Between two reports. Chosen, not measured."""
USABLE = 24.0
"""Decibels of a decoder that may wear references. One of 14, all that 75 s of a GPU left (see `main`), made half of the
references noise: 94 % of edits were done after two million samples."""
ENERGY_WEIGHT = 1.5
"""Of the difference in gradient energy between neighbourhoods. Without it the best guess at an outline whose place is
not certain to the pixel is a soft one: outlines had 0.56 of the true energy at 256 × 256.
It was 1 with four levels; the two were not compared."""
ENERGY_WINDOW = 5
"""Side of a neighbourhood in pixels."""
EDGE, EDGE_WEIGHT = 4, 4.0
"""The outermost pixels count more: convolutions see padding there, which left a ring of errors."""


def crowded(
    compositor: Compositor, frame: Frame, count: int, things: int, generator: torch.Generator, known: int = len(NOUNS)
) -> Tensor:
    """Render images with objects anywhere.

    They have more outlines a pixel than scenes of the world. known: nouns that may stand there, the first ones.
    """

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    nouns = torch.rand(count, things, generator=generator) < 0.75
    kind = torch.where(nouns, draw(known, count, things), draw(len(KINDS), count, things, low=len(NOUNS)))
    size = torch.tensor([0, 0, 1, 1, 1, 2])[draw(6, count, things)]
    width, height = frame.pixels
    centre = torch.stack((draw(width, count, things), draw(height, count, things)), -1)
    device = compositor.sprites.device
    return compositor(frame, *(x.to(device) for x in (draw(len(BACKGROUNDS), count), kind, size, centre)))


def local_energy(image: Tensor) -> Tensor:
    """Return the gradient energy of each neighbourhood.

    The root of the mean squared step between neighbouring pixels of [n, 3, h, w].
    """
    across = F.pad(image.diff(dim=-1).square(), (0, 1))
    down = F.pad(image.diff(dim=-2).square(), (0, 0, 0, 1))
    return (F.avg_pool2d((across + down).mean(1, keepdim=True), ENERGY_WINDOW, stride=2) + 1e-5).sqrt()


def reconstruction_loss(image: Tensor, decoded: Tensor) -> Tensor:
    """Compare colours, outlines and sharpness.

    Colours by both norms, outlines as steps between neighbouring pixels.
    """
    error = decoded - image
    weight = torch.full(error.shape[-2:], EDGE_WEIGHT, device=error.device)
    weight[EDGE:-EDGE, EDGE:-EDGE] = 1.0
    outlines = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    sharpness = (local_energy(decoded) - local_energy(image)).abs().mean()
    return ((error.abs() + 2 * error.pow(2)) * weight).mean() + 0.8 * outlines + ENERGY_WEIGHT * sharpness


def psnr(image: Tensor, decoded: Tensor) -> float:
    """Return the mean over images in [-1, 1], in dB."""
    error = ((image - decoded.clamp(-1, 1)) / 2).pow(2).mean(dim=(1, 2, 3))
    return (-10 * torch.log10(error)).mean().item()


def edge_error(image: Tensor, decoded: Tensor) -> float:
    """Return the 99th percentile of errors at the border, of 255.

    The border is the outermost two pixels.
    """
    error = (image - decoded.clamp(-1, 1)).abs() * 127.5
    ring = torch.ones(error.shape[-2:], dtype=torch.bool, device=error.device)
    ring[2:-2, 2:-2] = False
    return error[:, :, ring].flatten()[::7].quantile(0.99).item()


Pairs = Callable[[], tuple[Tensor, Tensor]]
"""Returns images and the latents (of the decoder's own form) that should be decoded to them."""


class DecoderTraining:
    """The decoder, its average, its optimiser and the images it learns from.

    denoised: also learn from these pairs, every second step. nouns: of the nano, the only ones shown.
    """

    layout = torch.contiguous_format

    def __init__(
        self, autoencoder: Autoencoder, device: str, batch: int, seed: int, rate: float = RATE,
        denoised: Pairs | None = None, native_size: int = 2 * SQUARE, nouns: int = len(NOUNS),
    ) -> None:  # fmt: skip
        self.rate, self.denoised, self.nouns = rate, denoised, nouns
        self.native, self.shapes = canvases(native_size)
        self.autoencoder = autoencoder.to(device).requires_grad_(False)
        self.average = copy.deepcopy(autoencoder)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        self.compositor = Compositor(self.native.scale).to(device)
        self.encode = as_one_convolution(autoencoder).requires_grad_(False)
        decoder = autoencoder.decoder.requires_grad_(True)
        if device == "cpu":
            # A step of 4 images of 256 × 256 on two cores: 0.30 s instead of 0.40.
            self.layout = torch.channels_last
        decoder.to(memory_format=self.layout)  # type: ignore[call-overload] - torch's stubs
        self.parameters: list[Tensor] = list(decoder.parameters())
        fused = device.startswith("cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        # Noise in proportion to each channel's spread: that is how the transformer errs.
        spread = autoencoder.bn.running_var.sqrt()[None, :, None, None]
        self.deviation = unpatchify(spread)[..., :1, :1] * LATENT_NOISE
        self.device = torch.device(device)
        held = torch.Generator().manual_seed(1)
        self.held = crowded(self.compositor, self.native, 16, 2, held, nouns)
        self.steps = 0

    def _images(self) -> Tensor:
        frame = self.native
        if float(torch.rand((), generator=self.generator)) < OTHER_SHAPES:
            frame = self.shapes[int(torch.randint(len(self.shapes), (), generator=self.generator))]
        things = 2 if float(torch.rand((), generator=self.generator)) < 0.5 else 4
        return crowded(self.compositor, frame, self.batch, things, self.generator, self.nouns)

    @torch.no_grad()
    def _pairs(self) -> tuple[Tensor, Tensor]:
        image = self._images()
        latent = self.encode(image)
        much = torch.rand(len(image), 1, 1, 1, device=self.device)
        return image, latent + self.deviation * much * torch.randn(latent.shape, device=self.device)

    def step(self, done: float) -> Tensor:
        """Learn from one batch.

        done: 0 … 1, sets the learning rate.
        """
        rate = self.rate * min(1.0, (self.steps + 1) / 100) * (0.01 + 0.495 * (1 + math.cos(math.pi * min(done, 1.0))))
        self.optimizer.param_groups[0]["lr"] = rate
        image, latent = self.denoised() if self.denoised and self.steps % 2 else self._pairs()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=multiplies_bf16(self.device)):
            decoded = self.autoencoder.decoder(latent.contiguous(memory_format=self.layout))
        loss = reconstruction_loss(image, decoded.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(EMA, (self.steps + 1) / (self.steps + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.decoder.parameters()), self.parameters, 1 - keep)
        return loss.detach()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        decoded = self.average.decode(self.average.encode(self.held))
        energy = local_energy(decoded.clamp(-1, 1)).square().mean() / local_energy(self.held).square().mean()
        return {
            "decibels": round(psnr(self.held, decoded), 2),
            "edge": round(edge_error(self.held, decoded), 1),
            "energy": round(energy.item(), 3),
        }


def train_decoder(training: DecoderTraining, out: Path, seconds: float) -> None:
    """Train until the time is over, saving the average at each report."""
    start = reported = time.monotonic()
    before = 0
    while (now := time.monotonic()) - start < seconds:
        training.step((now - start) / seconds)
        if now - reported > REPORT_SECONDS:
            speed = (training.steps - before) / (now - reported)
            reported, before = now, training.steps
            _report(training, out, {"seconds": round(now - start), "steps_per_second": round(speed, 1)})
    _report(training, out, {"seconds": round(time.monotonic() - start), "final": True})


def _report(training: DecoderTraining, out: Path, facts: dict) -> None:
    line = json.dumps({"decoder": training.steps, **facts, **training.measure()})
    print(line, flush=True)
    with (out / REPORTS).open("a") as log:
        log.write(line + "\n")
    save_decoder(training.average.decoder, out)


def is_finished(out: Path) -> bool:
    """Return whether a training in `out` ended with a usable decoder."""
    lines = out / REPORTS
    # What follows the last line's end is still being written.
    whole, end, _ = lines.read_text().rpartition("\n") if lines.exists() else ("", "", "")
    last = json.loads(whole.splitlines()[-1]) if end else {}
    return bool(last.get("final")) and last["decibels"] >= USABLE


@torch.no_grad()
def take_decoder(nano: Nano, out: Path, nouns: int) -> bool:
    """Give nano the decoder in `out`, if one fits.

    Returns whether the decoder it then has is of use, and leaves it in `out`. nouns: those it is tried on.
    """
    autoencoder, (square, _) = nano.autoencoder, canvases(nano.native_size)
    if (out / DECODER).exists():
        own = copy.deepcopy(autoencoder.decoder.state_dict())
        try:
            autoencoder.decoder.load_state_dict({name: t.float() for name, t in load_file(out / DECODER).items()})
        except RuntimeError:
            # It is another nano's. What fits of it was copied.
            autoencoder.decoder.load_state_dict(own)
    compositor = Compositor(square.scale).to(nano.device)
    images = crowded(compositor, square, 8, 2, torch.Generator().manual_seed(1), nouns)
    save_decoder(autoencoder.decoder, out)
    return psnr(images, autoencoder.decode(autoencoder.encode(images))) >= USABLE


def compute_encoder(folder: Path) -> None:
    """Compute the folder's encoder and latent statistics from images of all objects.

    The latents change, so this comes before all other training.
    """
    autoencoder, (square, _) = load_autoencoder(folder), canvases(load_extras(folder)["native_size"])
    generator, compositor = torch.Generator().manual_seed(0), Compositor(square.scale)
    images = [crowded(compositor, square, 32, 2, generator) for _ in range(16)]
    fit_encoder(autoencoder, torch.cat(images))
    save_autoencoder(autoencoder, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a nano in diffusers format")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images a step (CPU 4, CUDA 48)")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--denoised", action="store_true", help="learn from what the transformer in OUT makes, too")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3), help="of --denoised")
    parser.add_argument("--encoder", action="store_true", help="compute the encoder anew first; the latents change")
    args = parser.parse_args()
    if args.encoder:
        compute_encoder(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device.startswith("cuda")
    batch = args.batch or (48 if on_gpu else 4)
    # Its workers are forked before the device is touched.
    denoised = Denoised(args.folder, args.out, args.device, batch, args.workers) if args.denoised else None
    # No `cudnn.benchmark`: it tries every kernel anew for each of eleven canvases, and left 0.3 steps a second (H200).
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    autoencoder = load_autoencoder(args.folder)
    if (args.out / DECODER).exists():
        decoder = load_file(args.out / DECODER)
        autoencoder.decoder.load_state_dict({name: tensor.float() for name, tensor in decoder.items()})
    seed = time.time_ns() % 2**31
    own = load_extras(args.folder)
    training = DecoderTraining(
        autoencoder, args.device, batch, seed, args.rate, denoised, own["native_size"], len(own["nouns"])
    )
    train_decoder(training, args.out, args.seconds)
    if denoised:
        denoised.close()


if __name__ == "__main__":
    main()
