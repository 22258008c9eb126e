"""Rotations for clips longer than those a model was trained on: the time axis alone is changed.

Each entry maps the positions and frequencies of the time axis, and may give the whole table a magnitude: turning a
query and a key by a table of magnitude m multiplies their score by m squared, which is an attention temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.registry import Registry

ROPE_SCALINGS = Registry("rope_scaling", group="model/rope_scaling", doc="rotations for longer clips than trained on")

Scaled = tuple[Tensor, Tensor, float]


@ROPE_SCALINGS.register("identity")
def identity(positions: Tensor, frequencies: Tensor, theta: float) -> Scaled:
    """As trained."""
    return positions, frequencies, 1.0


@ROPE_SCALINGS.register("interpolate")
def interpolate(positions: Tensor, frequencies: Tensor, theta: float, *, factor: float = 2.0) -> Scaled:
    """Positions divided by the factor, so that a longer clip spans what was trained (2306.15595).

    Args:
        factor: new length over trained length.
    """
    return positions / _at_least_one(factor), frequencies, 1.0


@ROPE_SCALINGS.register("ntk")
def ntk(positions: Tensor, frequencies: Tensor, theta: float, *, factor: float = 2.0) -> Scaled:
    """A larger base, ``theta * factor^(d / (d - 2))``: the slowest pair is interpolated, the fastest kept (NTK-aware).

    Args:
        factor: new length over trained length.
    """
    d = 2 * len(frequencies)
    base = theta * _at_least_one(factor) ** (d / (d - 2))
    return positions, base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d), 1.0


@ROPE_SCALINGS.register("yarn")
def yarn(
    positions: Tensor,
    frequencies: Tensor,
    theta: float,
    *,
    factor: float = 2.0,
    trained_length: float = 31.0,
    fast: float = 32.0,
    slow: float = 1.0,
) -> Scaled:
    """Pairs that turn often are kept, slow ones interpolated, a ramp between; with YaRN's temperature (2309.00071).

    A pair that turns r times within the trained length is kept for r > fast and interpolated for r < slow. All scores
    are multiplied by ``(0.1 ln factor + 1)^2``.

    Args:
        factor: new length over trained length.
        trained_length: positions that a clip spanned in training; 31 latent frames for 5 s of published Ovi.
        fast: turns from which a pair is kept.
        slow: turns below which a pair is interpolated.

    Raises:
        OviError: when the ramp has no width.
    """
    if not fast > slow > 0:
        raise OviError(f"model.rope_scaling: fast must be above slow and slow above 0, got fast={fast}, slow={slow}")
    turns = trained_length * frequencies / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    scaled = frequencies / _at_least_one(factor)
    return positions, kept * frequencies + (1 - kept) * scaled, 0.1 * math.log(factor) + 1


def _at_least_one(factor: float) -> float:
    if factor < 1:
        raise OviError(f"model.rope_scaling.factor is the new length over the trained one, at least 1; got {factor}")
    return factor
