"""A network under measurement, and the two calls that are measured of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from work import Work

JOINT, VIDEO = "joint", "video"
"""Tasks: picture and sound together, or the picture alone. Ratios are taken within a task."""


@dataclass(frozen=True)
class Candidate:
    """A network with inputs of the run's setting bound to it.

    Args:
        model: the network, in evaluation mode (no dropout; gradients still flow).
        velocities: one forward, giving a velocity for each modality of the task.
        task: JOINT or VIDEO.
        differs: what is not equal to the published Ovi at the same width and depth.
        published: the work of one forward in the published arithmetic, for networks that compute the same function.
    """

    model: nn.Module
    velocities: Callable[[], tuple[Tensor, ...]]
    task: str
    differs: str
    published: tuple[Work, ...] = ()

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        """One forward without gradients."""
        return self.velocities()

    def step(self) -> None:
        """Forward and backward of the mean square of every velocity, summed."""
        torch.stack([v.float().square().mean() for v in self.velocities()]).sum().backward()

    def clear(self) -> None:
        """Set all gradients to None."""
        self.model.zero_grad(set_to_none=True)


def settled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode with its parameters in ``dtype``; buffers (RoPE tables) stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()
