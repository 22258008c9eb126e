"""Our twin as a candidate."""

from __future__ import annotations

import torch
from torch import nn

import work
from candidate import JOINT, VIDEO, Candidate, settled
from ovi.clock import Clock
from ovi.fusion import FUSIONS
from ovi.patch import PATCHES
from ovi.rope import ROPE_ALIGNMENTS
from ovi.tower import Tower
from ovi.twin import TwinDiT
from setting import Batch, Setting


def twin(setting: Setting) -> TwinDiT:
    """A twin of the published form in the setting's sizes; its heads, zero at the start, get values."""
    sizes = {
        "dim": setting.width,
        "num_heads": setting.heads,
        "num_blocks": setting.layers,
        "ffn_dim": setting.ffn,
    }
    torch.manual_seed(0)
    with torch.device(setting.device):
        towers = [
            Tower(channels, setting.text_dim, setting.text_len, patch=PATCHES[modality], **sizes)  # type: ignore[arg-type]
            for modality, channels in (("video", setting.video_channels), ("audio", setting.audio_channels))
        ]
        model = TwinDiT(*towers, Clock(), fusion=FUSIONS["ovi"], rope_alignment=ROPE_ALIGNMENTS["scale"])  # type: ignore[arg-type]
        for tower in towers:
            nn.init.normal_(tower.out.head.weight, std=setting.width**-0.5)
    settled(model, setting.torch_dtype)
    return model


def joint(model: TwinDiT, setting: Setting, batch: Batch) -> Candidate:
    """Picture and sound."""

    def velocities() -> tuple[torch.Tensor, ...]:
        return model(batch.video, batch.audio, batch.sigma, batch.prompts, batch.prompts)  # type: ignore[no-any-return]

    return Candidate(model, velocities, JOINT, "nothing: the published form", tuple(work.twin(setting)))


def video_alone(model: TwinDiT, setting: Setting, batch: Batch) -> Candidate:
    """The video tower of a twin called without sound."""

    def velocities() -> tuple[torch.Tensor, ...]:
        return (model(batch.video, None, batch.sigma, batch.prompts, None)[0],)

    said = "the video tower alone, no exchange"
    return Candidate(model.video, velocities, VIDEO, said, tuple(work.tower(setting, "video")))


def compiled(setting: Setting) -> TwinDiT:
    """The same twin again with its layers compiled: the one place that says how."""
    model = twin(setting)
    model.compile_layers()
    return model
