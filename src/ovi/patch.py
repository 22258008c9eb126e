"""Latents to tokens and back: the only place where video and audio towers differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.registry import Registry
from ovi.rope import Rotation, Scaling, audio_rotation, video_rotation

PATCHES = Registry("patch", group="model/patch", doc="latents <-> tokens of a tower")


class Patch(nn.Module, ABC):
    """Embedding of a latent's patches, and the geometry of its tokens.

    Attributes:
        values_per_token: numbers the head predicts for each token.
    """

    values_per_token: int

    @abstractmethod
    def grid(self, latent: Tensor) -> tuple[int, ...]:
        """Token counts per axis of a latent; time first."""

    @abstractmethod
    def embed(self, latent: Tensor) -> Tensor:
        """Latent to tokens [B, L, D]."""

    @abstractmethod
    def restore(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Predicted values [B, L, values_per_token] to a latent."""

    @abstractmethod
    def rotation(
        self,
        times: Tensor,
        grid: tuple[int, ...],
        head_dim: int,
        *,
        theta: float,
        time_axis_only: bool,
        scaling: Scaling | None = None,
    ) -> Rotation:
        """Rotation of all tokens whose positions along time are ``times``."""


@PATCHES.register("video")
class VideoPatch(Patch):
    """Patches of a video latent [B, C, F, H, W] by one strided convolution; tokens run F, H, W.

    Args:
        channels: C.
        dim: width of the tower.
        size: latent frames, rows and columns of a patch; one frame, so that tokens keep the latent's clock.

    Raises:
        OviError: when a patch spans more than one latent frame, or a latent does not divide into patches.
    """

    def __init__(self, channels: int, dim: int, *, size: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        if len(size) != 3 or size[0] != 1:
            raise OviError(f"video patch size must be (1, rows, columns), got {tuple(size)}")
        self.size = (int(size[0]), int(size[1]), int(size[2]))
        self.channels = channels
        self.values_per_token = channels * self.size[1] * self.size[2]
        self.proj = nn.Conv3d(channels, dim, kernel_size=self.size, stride=self.size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def grid(self, latent: Tensor) -> tuple[int, ...]:
        if latent.dim() != 5 or latent.shape[1] != self.channels:
            raise OviError(f"a video latent must be [B, {self.channels}, F, H, W], got {list(latent.shape)}")
        frames, height, width = latent.shape[2:]
        if height % self.size[1] or width % self.size[2]:
            raise OviError(
                f"a video latent of {height}x{width} does not divide into patches of {self.size[1]}x{self.size[2]}: "
                "choose another picture size or model.video.patch.size"
            )
        return frames, height // self.size[1], width // self.size[2]

    def embed(self, latent: Tensor) -> Tensor:
        _, rows, columns = self.size
        patches = rearrange(latent, "b c f (h p) (w q) -> b (f h w) (c p q)", p=rows, q=columns)
        # The kernel equals the stride, so the convolution is a matrix product; as one it runs several times faster.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def restore(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        frames, rows, columns = grid
        return rearrange(
            values,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames,
            h=rows,
            w=columns,
            p=self.size[1],
            q=self.size[2],
        )

    def rotation(
        self,
        times: Tensor,
        grid: tuple[int, ...],
        head_dim: int,
        *,
        theta: float,
        time_axis_only: bool,
        scaling: Scaling | None = None,
    ) -> Rotation:
        return video_rotation(
            times, grid[1], grid[2], head_dim, theta=theta, time_axis_only=time_axis_only, scaling=scaling
        )


class GatedConv(nn.Module):
    """SwiGLU over neighbouring tokens: ``w2(silu(w1 x) * w3 x)``, each a convolution along time without bias.

    Args:
        dim: width in and out.
        kernel: odd kernel width.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        hidden = -(-int(2 * (4 * dim) / 3) // 256) * 256
        self.w1 = nn.Conv1d(dim, hidden, kernel, padding=kernel // 2, bias=False)
        self.w2 = nn.Conv1d(hidden, dim, kernel, padding=kernel // 2, bias=False)
        self.w3 = nn.Conv1d(dim, hidden, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TimePatch(Patch):
    """What patches of a sequence [B, L, C] share: one token per latent, positions in time alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.values_per_token = channels

    def grid(self, latent: Tensor) -> tuple[int, ...]:
        if latent.dim() != 3 or latent.shape[2] != self.channels:
            raise OviError(f"an audio latent must be [B, L, {self.channels}], got {list(latent.shape)}")
        return (latent.shape[1],)

    def restore(self, values: Tensor, grid: tuple[int, ...]) -> Tensor:
        return values

    def rotation(
        self,
        times: Tensor,
        grid: tuple[int, ...],
        head_dim: int,
        *,
        theta: float,
        time_axis_only: bool,
        scaling: Scaling | None = None,
    ) -> Rotation:
        return audio_rotation(times, head_dim, theta=theta, scaling=scaling)


@PATCHES.register("audio")
class AudioPatch(TimePatch):
    """Tokens of an audio latent [B, L, C] by a convolution, SiLU and a gated convolution (published Ovi).

    Args:
        channels: C.
        dim: width of the tower.
        kernel: odd width of all its convolutions, in tokens.
    """

    def __init__(self, channels: int, dim: int, *, kernel: int = 7) -> None:
        super().__init__(channels)
        if kernel % 2 == 0:
            raise OviError(f"model.audio.patch.kernel must be odd, got {kernel}")
        self.proj = nn.Conv1d(channels, dim, kernel, padding=kernel // 2)
        self.mix = GatedConv(dim, kernel)

    def embed(self, latent: Tensor) -> Tensor:
        return self.mix(F.silu(self.proj(latent.transpose(1, 2)))).transpose(1, 2)


@PATCHES.register("linear")
class LinearPatch(TimePatch):
    """Tokens of an audio latent [B, L, C] by one linear map: cheap, for small models.

    Args:
        channels: C.
        dim: width of the tower.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels)
        self.proj = nn.Linear(channels, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def embed(self, latent: Tensor) -> Tensor:
        return self.proj(latent)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Cosines then sines of a timestep in 0..1000 at frequencies 10000^(-i/(dim/2)): [...] -> [..., dim], float32."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).float()
