"""A function to trace: torch keeps traces of functions in files alone."""

import torch
from torch import Tensor


def part(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 3
