"""Small RGB previews of the predicted final image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contract import Rgb8
from engine.diffusion.canvas import to_rgb8

SCALE = 8
"""Image pixels per latent pixel on each side, in every published model."""

MAX_SIDE = 128
"""Pixels of a preview's longer side: 128 × 128 × 3 bytes are 48 KB on the wire."""

_PATCHES, _PATCH_SIDE = 16, 8
"""Patches, and their side in latent pixels: 1,024 for 33 unknowns. Four times as many, or twice the side, moved the
result by under 0.1 dB."""

_RIDGE = 1e-4
"""Keeps channels that never vary out of the fit. Between 1e-6 and 1e-3 the result moves by under 0.1 dB."""


def predict_clean(before: Tensor, x: Tensor, sigma_before: float, sigma: float) -> Tensor:
    """Return the clean latent predicted by the step from `before` to `x`.

    The velocity of the step is recovered as (x - before) / (sigma - sigma_before), without running the model again.
    """
    if sigma == 0:
        return x.float()
    velocity = (x.float() - before.float()) / (sigma - sigma_before)
    return x.float() - sigma * velocity


def spread_steps(steps: int, count: int) -> set[int]:
    """Return up to `count` steps, evenly spread before the last one."""
    return {round(steps * part / (count + 1)) for part in range(1, count + 1)} - {0, steps}


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """Linear map from latent channels to RGB.

    The preview has a pixel for each latent pixel.

    weight: [latent channels + 1, 3]. Its last row is the offset. scale: image pixels per latent pixel.
    """

    weight: Tensor
    scale: int = SCALE

    @classmethod
    def fit(cls, encode: Callable[[Tensor], Tensor], scale: int = SCALE) -> "PreviewMap":
        """Fit the map by least squares on random patches and their latents.

        encode: [b, 3, scale·h, scale·w] in [-1, 1] -> [b, latent channels, h, w], on any device.
        """
        patches = random_patches(_PATCHES, _PATCH_SIDE * scale)
        latents = encode(patches).float().cpu()
        inputs = _with_offset(latents).double()
        targets = F.avg_pool2d(patches, scale).permute(0, 2, 3, 1).reshape(-1, 3).double()
        gram = inputs.T @ inputs + _RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
        return cls(torch.linalg.solve(gram, inputs.T @ targets).float(), scale)

    def __call__(self, latent: Tensor, width: int, height: int) -> Rgb8:
        """Return the preview of a latent [1, channels, h, w].

        width, height: in image pixels, to which the preview is cropped.
        """
        rows, columns = latent.shape[2:]
        image = _with_offset(latent.float()) @ self.weight.to(latent.device)
        image = image.reshape(1, rows, columns, 3).permute(0, 3, 1, 2)
        image = image[:, :, : max(1, round(height / self.scale)), : max(1, round(width / self.scale))]
        shrink = -(-max(image.shape[2:]) // MAX_SIDE)
        return to_rgb8(F.avg_pool2d(image, shrink, ceil_mode=True) if shrink > 1 else image)


def random_patches(count: int, side: int) -> Tensor:
    """Return images of random colours, [count, 3, side, side].

    Each is a gradient under overlapping rectangles.
    """
    generator, least = torch.Generator().manual_seed(0), side // 8

    def colour() -> Tensor:
        return torch.rand((3, 1, 1), generator=generator)

    patches = []
    for index in range(count):
        ramp = torch.linspace(0, 1, side).expand(1, side, side)
        ramp = ramp.mT if index % 2 else ramp
        patch = colour() * ramp + colour() * (1 - ramp)
        for _ in range(6):
            left, top = torch.randint(0, side - least, (2,), generator=generator).tolist()
            width, height = torch.randint(least, side // 2, (2,), generator=generator).tolist()
            patch[:, top : top + height, left : left + width] = colour()
        patches.append(patch)
    return torch.stack(patches) * 2 - 1


def _with_offset(latent: Tensor) -> Tensor:
    """Flatten to rows and append a column of ones.

    [b, c, h, w] -> [b·h·w, c + 1].
    """
    rows = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
    return F.pad(rows, (0, 1), value=1.0)
