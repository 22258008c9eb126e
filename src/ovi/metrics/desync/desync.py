"""DeSync: mean offset that Synchformer hears between sound and picture.

Protocol of av-benchmark (github.com/hkchengrex/av-benchmark), as papers report it: 25 fps, 224 pixels, 16 kHz; the
offset of the first 14 segments of a clip (4.8 s) and of its last 14, each the likeliest of 21 from -2 s to 2 s;
magnitudes, averaged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.desync.inputs import picture_segments, prepared, sound_segments
from ovi.metrics.desync.synchformer import Synchformer, load_synchformer
from ovi.metrics.features.weights import WeightsFile, file_digest
from ovi.metrics.sound import is_silent

PUBLISHED = WeightsFile(
    "synchformer_state_dict.pth",
    "release v0.1 of MMAudio (github.com/hkchengrex/MMAudio)",
    "5b2f5594b0730f70e41e549b7c94390c",
    950_058_171,
)
LARGEST_S = 2.0
_AT_ONCE = 2
"""Segments encoded at a time: memory stays bounded, and processors are busy already."""


def offset_grid(classes: int = 21) -> Tensor:
    """Offsets in seconds that the classes stand for, ascending and even over -2..2."""
    return torch.linspace(-LARGEST_S, LARGEST_S, classes)


def desync_seconds(logits: Tensor) -> float:
    """Mean magnitude in seconds of the likeliest offsets.

    Args:
        logits: [R, classes], one row a stretch of the clip.

    Raises:
        OviError: for another shape, or values that are not finite.
    """
    if logits.ndim != 2 or not len(logits) or not torch.isfinite(logits).all():
        raise OviError(f"logits must be [R, classes] and finite, got {list(logits.shape)}")
    return float(offset_grid(logits.shape[1]).abs()[logits.argmax(1).cpu()].mean())


@METRICS.register("desync")
class DeSync(ClipMetric):
    """Mean offset in seconds that Synchformer hears between sound and picture (DeSync), by its published weights.

    ``compute`` gives ``desync_synchformer`` in seconds (0..2; NaN when no clip is long enough),
    ``desync_synchformer_n`` (clips it rests on) and ``desync_synchformer_coverage`` (of all): clips under 4.8 s and
    silent ones are left out.
    Chance is about 1.05 s.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        path: the file ``synchformer_state_dict.pth``, or its folder; no other file is taken.

    Raises:
        OviError: when the weights are missing or other ones.
    """

    LOWER = ("desync_synchformer",)
    SUMS = ("total_s", "covered")
    total_s: Tensor
    covered: Tensor

    def __init__(self, fps: float, sample_rate: int, *, path: str | None = None, **metric_knobs: Any) -> None:
        super().__init__(fps, sample_rate, **metric_knobs)
        file = PUBLISHED.find(path, "path of desync")
        self.network: Synchformer = load_synchformer(file)
        self.digest = file_digest(file)

    def identity(self) -> dict[str, Any]:
        """With the checksum of the weights."""
        return {**super().identity(), "digest": self.digest}

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip; one that is too short or silent only lowers the coverage."""
        if is_silent(clip.waveform):
            return
        logits = self.clip_logits(clip.frames, clip.waveform)
        if logits is not None:
            self.total_s += desync_seconds(logits)
            self.covered += 1

    def clip_logits(self, frames: np.ndarray, waveform: np.ndarray) -> Tensor | None:
        """Logits [2, 21] of a clip's first and last 4.8 s; None for a shorter one."""
        frames, waveform, count = prepared(frames, waveform, fps=self.fps, sample_rate=self.sample_rate)
        reads = self.network.config.segments
        if count < reads:
            return None
        first, last = range(reads), range(count - reads, count)
        device = self.total_s.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seen: dict[int, Tensor] = {}
            heard: dict[int, Tensor] = {}
            for begin in range(0, count, _AT_ONCE):
                numbers = range(begin, min(begin + _AT_ONCE, count))
                if not any(n in first or n in last for n in numbers):
                    continue
                config = self.network.config
                pictures = picture_segments(frames, numbers, config.side).to(device)
                sounds = sound_segments(waveform, numbers, bands=config.mel_bands, mel_frames=config.mel_frames)
                seen |= dict(zip(numbers, self.network.encode_pictures(pictures), strict=True))
                heard |= dict(zip(numbers, self.network.encode_sound(sounds.to(device)), strict=True))
            rows = [
                self.network.logits(torch.stack([seen[n] for n in part]), torch.stack([heard[n] for n in part]))
                for part in (first, last)
            ]
        return torch.stack(rows)

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "desync_synchformer": self.total_s / self.covered,
            "desync_synchformer_n": self.covered,
            "desync_synchformer_coverage": self.covered / self.clips,
        }
