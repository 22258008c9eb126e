"""What metrics of whole clips share: sums over clips that any number of processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ovi.errors import OviError


class ClipMetric(Metric, ABC):
    """Sums of figures over clips of frames and sound.

    Subclasses name their sums in ``SUMS``, add to them in ``add_clip`` and turn them into figures in ``compute``;
    ``clips`` counts all that came.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
    """

    SUMS: tuple[str, ...] = ()
    full_state_update = False
    clips: Tensor

    def __init__(self, *, fps: float, sample_rate: int, **metric_knobs: Any) -> None:
        super().__init__(**metric_knobs)
        self.fps, self.sample_rate = fps, sample_rate
        for name in ("clips", *self.SUMS):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, frames: np.ndarray | Tensor, waveform: np.ndarray | Tensor) -> None:
        """Add one clip ([T, H, W, 3] uint8 and [N]) or a batch of them ([B, ...] each)."""
        pictures, sounds = np.asarray(torch.as_tensor(frames).cpu()), np.asarray(torch.as_tensor(waveform).cpu())
        if pictures.ndim == 4:
            pictures, sounds = pictures[None], sounds[None]
        if len(pictures) != len(sounds):
            raise OviError(f"{len(pictures)} clips of frames, but {len(sounds)} waveforms")
        for picture, sound in zip(pictures, sounds, strict=True):
            self.clips += 1
            self.add_clip(picture, sound)

    @abstractmethod
    def add_clip(self, frames: np.ndarray, waveform: np.ndarray) -> None:
        """Measure one clip and add to the sums."""
