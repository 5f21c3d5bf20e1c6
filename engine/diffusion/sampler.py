"""Euler sampler of the flow from noise to image."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from engine.diffusion.parts import Parts, within

Velocity = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> dx/dsigma, all of one shape."""
VelocityParts = Callable[[Tensor, float], Parts[Tensor]]
"""The same, computed in parts."""


def euler(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Return x after one Euler step of dx/dsigma = velocity.

    Computed in fp32 and returned in the dtype of `velocity`.
    """
    return (x.float() + (sigma_next - sigma) * velocity.float()).to(velocity.dtype)


def step(velocity: VelocityParts, x: Tensor, sigma: float, sigma_next: float) -> Parts[Tensor]:
    """Compute one Euler step in parts."""
    return euler(x, (yield from velocity(x, sigma)), sigma, sigma_next)


def denoise(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield x after each step.

    sigmas: noise levels, falling from 1.0 to 0.0.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x = euler(x, velocity(x, sigma), sigma, sigma_next)
        yield x


def guided(conditional: VelocityParts, unconditional: VelocityParts, guidance: float) -> VelocityParts:
    """Return the velocity with classifier-free guidance.

    It extrapolates from the prediction without a prompt through the one with it.
    """

    def velocity(x: Tensor, sigma: float) -> Parts[Tensor]:
        away = yield from within(unconditional(x, sigma), 0.0, 0.5)
        towards = yield from within(conditional(x, sigma), 0.5, 1.0)
        return away + guidance * (towards - away)

    return velocity
