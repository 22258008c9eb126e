"""What extractors are given, seen to be what they expect: other numbers would be measured without a word."""

from __future__ import annotations

import torch
from torch import Tensor

from ovi.errors import OviError


def check_frames(frames: Tensor, num_frames: int | None = None) -> Tensor:
    """The frames themselves.

    Args:
        frames: uint8 [B, T, H, W, 3].
        num_frames: the only T that will do, where there is one.

    Raises:
        OviError: for anything else.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise OviError(f"frames must be uint8 [B, T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if num_frames is not None and frames.shape[1] != num_frames:
        raise OviError(f"this network takes clips of {num_frames} frames, got {frames.shape[1]}: change num_frames")
    return frames


def check_waveform(waveform: Tensor, at_least: int = 1) -> Tensor:
    """The waveform in float32, zero-padded at its end to ``at_least`` samples.

    Args:
        waveform: [N], mono, -1..1.
        at_least: samples of the shortest sound that the network takes.

    Raises:
        OviError: for another shape, or values that are not finite.
    """
    if waveform.ndim != 1 or not len(waveform):
        raise OviError(f"a waveform must be [N], mono and not empty, got {list(waveform.shape)}")
    if not torch.isfinite(waveform).all():
        raise OviError("the waveform holds NaN or infinite values: what generated it has failed")
    return torch.nn.functional.pad(waveform.float(), (0, max(0, at_least - len(waveform))))
