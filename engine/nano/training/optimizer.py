"""Muon for the matrices inside the blocks, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from engine.nano.training.compiled_training import PRODUCTS

MOMENTUM = 0.95
BETAS = (0.9, 0.99)
ADAM_SHARE = 0.7
"""AdamW's learning rate as a share of Muon's."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
"""Source of both: Keller Jordan's Muon, also torch.optim.Muon's default."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return roughly orthogonal matrices near [n, rows, columns], by Newton-Schulz."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(PRODUCTS)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Optimizer:
    """Updates all parameters, orthogonalising matrices of one shape together."""

    def __init__(self, learned: nn.Module) -> None:
        self._shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
        others: list[Tensor] = []
        for name, parameter in learned.named_parameters():
            if parameter.ndim == 2 and ("blocks." in name or "layers." in name):
                self._shapes[parameter.shape].append(parameter)
            else:
                others.append(parameter)
        self.parameters = [*(p for group in self._shapes.values() for p in group), *others]
        self._momentum = [torch.zeros(len(g), *shape, device=g[0].device) for shape, g in self._shapes.items()]
        fused = bool(others) and others[0].is_cuda
        self._adam = torch.optim.AdamW(others, lr=0.0, betas=BETAS, weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Move down the gradient, clipped to norm 1, and return its norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for momentum, (shape, group) in zip(self._momentum, self._shapes.items(), strict=True):
            gradient = torch.stack([p.grad for p in group])  # type: ignore[misc] - after backward each has one
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalise(gradient.lerp_(momentum, MOMENTUM))
            # The update then has AdamW's usual size. Source: Moonlight, arXiv 2502.16982.
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * 0.2 * max(shape) ** 0.5)
        for settings in self._adam.param_groups:
            settings["lr"] = ADAM_SHARE * rate
        self._adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict:
        return {"momentum": self._momentum, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for mine, saved in zip(self._momentum, state["momentum"], strict=True):
            mine.copy_(saved)
        self._adam.load_state_dict(state["adam"])
