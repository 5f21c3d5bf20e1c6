"""Noise schedule: the sigmas for a number of steps and canvas tokens."""

import math
from functools import lru_cache

from engine.contract import InvalidJob

# Source: BFL flux2, util/sampling compute_empirical_mu; two lines fitted by them, for 10 and for 200 steps.
_SLOPE_10, _OFFSET_10 = 8.73809524e-05, 1.89833333
_SLOPE_200, _OFFSET_200 = 0.00016927, 0.45666666
# Above this many tokens only the 200-step line is used. The jump there is official behaviour.
_LONG = 4300


def shift(steps: int, canvas_tokens: int) -> float:
    """Return mu, the shift of the noise levels towards noise.

    canvas_tokens: of the canvas alone, without references and text.
    """
    at_200 = _SLOPE_200 * canvas_tokens + _OFFSET_200
    if canvas_tokens > _LONG:
        return at_200
    at_10 = _SLOPE_10 * canvas_tokens + _OFFSET_10
    per_step = (at_200 - at_10) / 190.0
    return at_200 + per_step * (steps - 200.0)


@lru_cache(maxsize=64)
def sigmas(steps: int, canvas_tokens: int) -> tuple[float, ...]:
    """Return `steps + 1` noise levels from 1.0 down to 0.0.

    canvas_tokens: H/16 · W/16 of the image being generated; more tokens keep the noise high for longer.
    Raises InvalidJob if steps < 1.
    """
    if steps < 1:
        raise InvalidJob(f"steps is {steps}; at least 1 is needed.")
    push = math.exp(shift(steps, canvas_tokens))
    linear = (1.0 - i / steps for i in range(steps))
    # The final 0 is added after the shift: shifting it would divide by zero.
    return (*(push / (push + (1.0 / s - 1.0)) for s in linear), 0.0)
