"""What the shapes of a pair of latents fix: rotations and times of their tokens, as tables."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovi.clock import Clock
from ovi.rope import Alignment, Rotation, Scaling
from ovi.tower import Tower

MOST_SHAPES = 16
"""Shapes whose tables are kept; the oldest go first."""

Grids = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens per axis of video and audio, time first."""


class Geometry(NamedTuple):
    """Tables of (video, audio) each.

    Args:
        own: rotations in self-attention.
        queries: rotations as queries of the exchange.
        partner: rotations of each one's partner's keys.
        times: of latent frames [F] and tokens [L], in seconds.
    """

    own: tuple[Rotation, Rotation]
    queries: tuple[Rotation, Rotation]
    partner: tuple[Rotation, Rotation]
    times: tuple[Tensor, Tensor]


class Positions(NamedTuple):
    """How tokens are placed; as in ``TwinDiT``."""

    clock: Clock
    self_alignment: Alignment
    rope_alignment: Alignment
    rope_scaling: Scaling | None
    time_axis_only: bool


class Geometries:
    """Geometries of the shapes seen last."""

    def __init__(self) -> None:
        self._kept: dict[Any, Geometry] = {}

    def of(self, positions: Positions, towers: tuple[Tower, Tower], grids: Grids, device: torch.device) -> Geometry:
        """The geometry of a pair of grids, built once for a device and for whatever its tables depend on."""
        key = (grids, device, positions, *(tower.theta for tower in towers))
        if key not in self._kept:
            while len(self._kept) >= MOST_SHAPES:
                self._kept.pop(next(iter(self._kept)))
            # Validation may come first, in inference mode, and training could not use tensors made there.
            with torch.inference_mode(False):
                self._kept[key] = build_geometry(positions, towers, grids, device)
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}


def build_geometry(positions: Positions, towers: tuple[Tower, Tower], grids: Grids, device: torch.device) -> Geometry:
    """Tables computed on the host in float64, then moved.

    Raises:
        OviError: when a tower's heads cannot be rotated so.
    """

    def pair(alignment: Alignment, *, time_axis_only: bool, of_partner: bool) -> tuple[Rotation, Rotation]:
        times, built = alignment(positions.clock, grids[0][0], grids[1][0]), []
        for i, tower in enumerate(towers):
            # A partner's keys are rotated by the partner's positions at the querying tower's head width.
            source = 1 - i if of_partner else i
            rotation = towers[source].patch_embedding.rotation(
                times[source],
                grids[source],
                tower.head_dim,
                theta=tower.theta,
                time_axis_only=time_axis_only,
                scaling=positions.rope_scaling,
            )
            built.append(rotation.to(device))
        return built[0], built[1]

    clock, only = positions.clock, positions.time_axis_only
    seconds_of = clock.video_times_s(grids[0][0]), clock.audio_times_s(grids[1][0])
    return Geometry(
        own=pair(positions.self_alignment, time_axis_only=False, of_partner=False),
        queries=pair(positions.rope_alignment, time_axis_only=only, of_partner=False),
        partner=pair(positions.rope_alignment, time_axis_only=only, of_partner=True),
        times=(torch.tensor(seconds_of[0]).to(device), torch.tensor(seconds_of[1]).to(device)),
    )
