"""A batch of latents as training sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents with their prompts.

    Args:
        video: [B, C, F, H, W], float32.
        audio: [B, L, C], float32.
        text: B embeddings [n_i, text_dim], float32.
        captions: B prompts.
        keys: B sample keys.
        extra: B dictionaries of whatever else the samples' json holds, such as planted truths.
        audio_mask: real audio tokens, [B, L] bool; None when all are.
    """

    video: Tensor
    audio: Tensor
    text: list[Tensor]
    captions: list[str]
    keys: list[str]
    extra: list[dict[str, Any]]
    audio_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.video.shape[0]

    def to(self, device: torch.device | str) -> LatentBatch:
        """The batch with its tensors on another device."""
        return replace(
            self,
            video=self.video.to(device, non_blocking=True),
            audio=self.audio.to(device, non_blocking=True),
            text=[t.to(device, non_blocking=True) for t in self.text],
            audio_mask=None if self.audio_mask is None else self.audio_mask.to(device, non_blocking=True),
        )
