"""What is measured: sizes of the networks and of one batch, and where it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ovi.errors import OviError

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of a video token, in the twin and in every peer."""


@dataclass(frozen=True)
class Setting:
    """One setting of the benchmark; all networks of a run share it.

    Args:
        width: width D of both towers.
        layers: depth.
        heads: attention heads.
        ffn: hidden width of the feed-forward, where a network lets it be chosen.
        batch: samples.
        latent: video latent frames, rows, columns.
        audio_tokens: audio latents a sample.
        text_tokens: true length of a prompt; it is zero-padded to text_len.
        device: ``cpu`` or ``cuda``.
        dtype: of parameters and inputs, ``float32`` or ``bfloat16``.
        threads: CPU threads of PyTorch.
        text_len, text_dim: rows and width of a padded prompt.
        video_channels, audio_channels: of the latents.

    Raises:
        OviError: for sizes that do not divide as they must.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    batch: int
    latent: tuple[int, int, int]
    audio_tokens: int
    text_tokens: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    text_len: int = 512
    text_dim: int = 4096
    video_channels: int = 48
    audio_channels: int = 20

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise OviError(f"width {self.width} does not split into {self.heads} heads: change --width or --heads")
        if any(n % p for n, p in zip(self.latent, PATCH)):
            raise OviError(f"latents of {self.latent} do not divide into patches of {PATCH}: change --latent")
        if not 0 < self.text_tokens <= self.text_len:
            raise OviError(f"--text-tokens must be 1 to {self.text_len}, got {self.text_tokens}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens per axis."""
        frames, rows, columns = (n // p for n, p in zip(self.latent, PATCH))
        return frames, rows, columns

    @property
    def video_tokens(self) -> int:
        """Video tokens a sample."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch has it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise OviError(f"--dtype must name a type of PyTorch such as float32 or bfloat16, got {self.dtype!r}")
        return dtype

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "video_tokens": self.video_tokens}


def ffn_like_published(width: int) -> int:
    """Feed-forward width in the published proportion, 14336 at 3072."""
    return round(width * 14336 / 3072)


PRESETS: dict[str, Setting] = {
    "cpu": Setting(
        width=384, layers=6, heads=6, ffn=1792, batch=2, latent=(8, 16, 16), audio_tokens=40, text_tokens=120
    ),
    # 720x720 at 24 fps for 5 s: the area snapped to multiples of 32 px is 704x736, latents 44x46.
    "gpu": Setting(
        width=3072, layers=4, heads=24, ffn=14336, batch=1, device="cuda", dtype="bfloat16",
        latent=(31, 44, 46), audio_tokens=157, text_tokens=120,
    ),
    "smoke": Setting(
        width=64, layers=2, heads=2, ffn=299, batch=1, latent=(2, 4, 4), audio_tokens=5, text_tokens=7, threads=1
    ),
}  # fmt: skip
"""``cpu`` fits two cores and a few minutes, ``gpu`` is 4 of the published 30 layers at 720x720 for 5 s, ``smoke`` is
for the test suite."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, made once and shared by all networks.

    Args:
        video: [B, C, F, H, W].
        audio: [B, L, C].
        sigma: noise level in 0..1, [B], float32.
        prompts: text embeddings of true length, B of [text_tokens, text_dim].
        text: the same zero-padded, [B, text_len, text_dim].
    """

    video: Tensor
    audio: Tensor
    sigma: Tensor
    prompts: list[Tensor]
    text: Tensor

    @classmethod
    def random(cls, setting: Setting, seed: int = 0) -> Batch:
        """Standard normal latents and prompts, the same for the same seed and device."""
        draw = torch.Generator(setting.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=setting.device).to(setting.torch_dtype)

        video = normal(setting.batch, setting.video_channels, *setting.latent)
        audio = normal(setting.batch, setting.audio_tokens, setting.audio_channels)
        prompts = normal(setting.batch, setting.text_tokens, setting.text_dim)
        text = torch.nn.functional.pad(prompts, (0, 0, 0, setting.text_len - setting.text_tokens))
        sigma = torch.linspace(0.2, 0.9, setting.batch, device=setting.device)
        return cls(video, audio, sigma, list(prompts), text)
