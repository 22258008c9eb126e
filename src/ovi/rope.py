"""Rotary position embedding of two clocks: how token indices become positions, tables, and their application.

An alignment turns latent frames and audio tokens into positions on one axis. Positions times frequencies are angles;
an angle turns one adjacent pair of a head's dimensions. Video splits a head into time, height and width; audio turns
the time dimensions only and leaves the rest as they are (spec: an audio token sits at height 0, width 0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

from ovi.clock import Clock
from ovi.errors import OviError
from ovi.registry import Registry

Alignment = Callable[[Clock, int, int], tuple[Tensor, Tensor]]
"""(clock, latent frames F, audio tokens L) -> positions [F] and [L] on one time axis, float64."""

Scaling = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]
"""(positions [n], frequencies [m], base) of the time axis -> both, changed, and a magnitude for all of the table."""

ROPE_ALIGNMENTS = Registry(
    "rope_alignment", group="model/rope_alignment", doc="latent frames and audio tokens -> positions in time"
)


Rotation = Tensor
"""Cosine and sine of the angle of every adjacent pair of a head's dimensions, [L, d/2, 2], float32."""


@ROPE_ALIGNMENTS.register("none")
def unaligned(clock: Clock, num_latent_frames: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Frame i at i, token j at j: the two clocks know nothing of each other (UniVerse-1, BridgeDiT)."""
    return _indices(num_latent_frames), _indices(num_tokens)


@ROPE_ALIGNMENTS.register("scale")
def scale(clock: Clock, num_latent_frames: int, num_tokens: int, *, factor: float = 0.19676) -> tuple[Tensor, Tensor]:
    """Frame i at i, token j at factor*j: the form of the published Ovi weights (2510.01284, section 3).

    Args:
        factor: latent frames per audio token as the checkpoint was trained with; 0.19676 for all published ones.
    """
    return _indices(num_latent_frames), _indices(num_tokens) * factor


@ROPE_ALIGNMENTS.register("ratio")
def ratio(clock: Clock, num_latent_frames: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Frame i at i, token j at j times the clock's true rate ratio; ignores that a causal first frame is shorter."""
    return _indices(num_latent_frames), _indices(num_tokens) * clock.ratio


@ROPE_ALIGNMENTS.register("seconds")
def seconds(
    clock: Clock, num_latent_frames: int, num_tokens: int, *, units_per_s: float | None = None
) -> tuple[Tensor, Tensor]:
    """Every token at the centre of its own time span (LTX-2, 2601.03233); exact for any length or rate.

    Args:
        units_per_s: positions per second; None takes the latent frame rate, so that neighbouring frames lie 1 apart
            as in the other alignments.
    """
    unit = clock.latent_fps if units_per_s is None else units_per_s
    video = torch.tensor(clock.video_times_s(num_latent_frames), dtype=torch.float64)
    audio = torch.tensor(clock.audio_times_s(num_tokens), dtype=torch.float64)
    return video * unit, audio * unit


@ROPE_ALIGNMENTS.register("ratio_audio")
def ratio_audio(
    clock: Clock, num_latent_frames: int, num_tokens: int, *, first_frame: bool = False
) -> tuple[Tensor, Tensor]:
    """Token j at j, frame i at i times tokens per latent frame: audio keeps its own clock (MOVA, 2602.08794).

    Args:
        first_frame: count a causal first frame as the one pixel frame it is, so that later frames come earlier.
    """
    frames = _indices(num_latent_frames) / clock.ratio
    if first_frame and clock.causal_first_frame:
        short = (1 - 1 / clock.video_stride) / clock.ratio
        frames = torch.where(frames > 0, frames - short, frames)
    return frames, _indices(num_tokens)


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head given to time, height and width: 128 -> 44, 42, 42.

    Raises:
        OviError: when a share is odd, so that pairs cannot be formed.
    """
    space = 2 * (head_dim // 6)
    time = head_dim - 2 * space
    if time % 2 or head_dim < 12:  # two pairs an axis, or its frequencies have no range
        raise OviError(
            f"a head of {head_dim} dimensions cannot be split into pairs for time, height and width: "
            "choose dim / num_heads even and at least 12"
        )
    return time, space, space


def video_rotation(
    times: Tensor,
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float,
    time_axis_only: bool,
    scaling: Scaling | None = None,
) -> Rotation:
    """Rotation of F*H*W video tokens, width fastest.

    Args:
        times: position of every latent frame, [F].
        height: token rows H.
        width: token columns W.
        head_dim: dimensions of a head.
        theta: base of the frequencies.
        time_axis_only: leave height and width unrotated.
        scaling: of the time axis, for clips longer than those trained on.
    """
    dims = axis_dims(head_dim)
    along_time, magnitude = _time_angles(times, dims[0], theta, scaling)
    parts = [along_time, *(_angles(_indices(n), _frequencies(dim, theta)) for n, dim in zip((height, width), dims[1:]))]
    if time_axis_only:
        parts[1:] = [torch.zeros_like(p) for p in parts[1:]]
    shape = (len(times), height, width)
    grids = [
        p.view(*[-1 if axis == i else 1 for i in range(3)], p.shape[-1]).expand(*shape, -1)
        for axis, p in enumerate(parts)
    ]
    return _rotation(torch.cat(grids, -1).flatten(0, 2), magnitude)


def audio_rotation(times: Tensor, head_dim: int, *, theta: float, scaling: Scaling | None = None) -> Rotation:
    """Rotation of audio tokens at ``times`` [L]: time frequencies first, the other dimensions of the head at rest."""
    time_dim = axis_dims(head_dim)[0]
    angles, magnitude = _time_angles(times, time_dim, theta, scaling)
    return _rotation(torch.cat([angles, angles.new_zeros(len(times), (head_dim - time_dim) // 2)], -1), magnitude)


def rotate(x: Tensor, rotation: Rotation, *, back: bool = False) -> Tensor:
    """Turn every adjacent pair of x by its angle: one complex product, in float32, back in x's type.

    Args:
        x: heads [B, H, L, d].
        rotation: of the L tokens.
        back: turn the other way, which undoes it and is its gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # Tokens before heads is how projections lie in memory, so that nothing is copied; the result lies so too.
    pairs = x.transpose(1, 2).to(wide).contiguous().unflatten(-1, (-1, 2))
    table = rotation.to(wide).unsqueeze(1)
    if torch.compiler.is_compiling():  # which fuses real arithmetic, not complex
        (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        sin = -sin if back else sin
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        turns = torch.view_as_complex(table)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * (turns.conj() if back else turns))
    return turned.flatten(-2).to(x.dtype).transpose(1, 2)


def _indices(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


def _frequencies(dim: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _time_angles(positions: Tensor, dim: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, float]:
    frequencies, magnitude = _frequencies(dim, theta), 1.0
    if scaling is not None:
        positions, frequencies, magnitude = scaling(positions, frequencies, theta)
    return _angles(positions, frequencies), magnitude


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """positions [n] times frequencies [m] -> [n, m], float64 (the library alone would keep float32)."""
    table = RotaryEmbedding(2 * len(frequencies), custom_freqs=frequencies, cache_if_possible=False)
    # The library repeats every angle for both members of a pair; one of each is enough here.
    return table(positions)[..., ::2].detach()


def _rotation(angles: Tensor, magnitude: float = 1.0) -> Rotation:
    return (torch.stack((angles.cos(), angles.sin()), -1) * magnitude).float()
