"""Euler's method along the flow, from noise to image: yields after each step."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> dx/dsigma, all of one shape."""


def euler(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One step of dx/dsigma = v, summed in fp32 and handed back in the dtype of v."""
    return (x.float() + (sigma_next - sigma) * velocity.float()).to(velocity.dtype)


def denoise(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """x after each step; `sigmas` falls from 1.0 to 0.0."""
    for sigma, sigma_next in pairwise(sigmas):
        x = euler(x, velocity(x, sigma), sigma, sigma_next)
        yield x


def guided(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance: away from the prediction without a prompt."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        away = unconditional(x, sigma)
        return away + guidance * (conditional(x, sigma) - away)

    return velocity
