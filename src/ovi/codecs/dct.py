"""A video codec without weights: block DCT that keeps the low frequencies.

Encoding multiplies every block of pixels with one matrix of orthonormal rows (colour times vertical times horizontal
frequency) and, with a temporal stride, every group of frames with another. Decoding multiplies with the transposes. So
decoding is the least-squares best picture that the kept coefficients can say, and encoding it again changes nothing.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from ovi.codecs.base import VIDEO_CODECS, VideoCodec
from ovi.errors import OviError


@VIDEO_CODECS.register("dct")
class BlockDCT(VideoCodec):
    """Orthonormal block DCT that keeps the lowest frequencies; no weights, exact on what it keeps.

    Latent channels are ordered temporal frequency, then brightness and the two colour differences, then zig-zag
    frequency; there are ``temporal_coefficients * (luma_coefficients + 2 * chroma_coefficients)`` of them.

    Args:
        block: pixels per block side, which is the spatial stride.
        luma_coefficients: brightness frequencies kept per block, in zig-zag order.
        chroma_coefficients: frequencies kept of either colour difference.
        temporal_stride: pixel frames per latent frame.
        temporal_coefficients: temporal frequencies kept; None keeps all ``temporal_stride`` of them.
        causal_first_frame: with a temporal stride above 1, whether latent frame 0 holds pixel frame 0 alone, so that
            a first frame can be given as a condition. Its temporal frequencies above 0 are zero, and its frequency 0
            is scaled as if the frame stood still for a whole group.

    Raises:
        OviError: when a count exceeds what the block or the group of frames has.
    """

    analysis: Tensor
    temporal: Tensor

    def __init__(
        self,
        *,
        block: int = 8,
        luma_coefficients: int = 6,
        chroma_coefficients: int = 3,
        temporal_stride: int = 1,
        temporal_coefficients: int | None = None,
        causal_first_frame: bool = True,
    ) -> None:
        for name, value in (("block", block), ("temporal_stride", temporal_stride)):
            if value < 1:
                raise OviError(f"dct: {name} must be at least 1, got {value}")
        for name, value in (("luma_coefficients", luma_coefficients), ("chroma_coefficients", chroma_coefficients)):
            if not 1 <= value <= block * block:
                raise OviError(f"dct: a {block}x{block} block has 1 to {block * block} coefficients, {name} is {value}")
        kept = temporal_stride if temporal_coefficients is None else temporal_coefficients
        if not 1 <= kept <= temporal_stride:
            raise OviError(
                f"dct: temporal_coefficients is {kept}, temporal_stride {temporal_stride} has 1 to that many"
            )
        per_frame = luma_coefficients + 2 * chroma_coefficients
        super().__init__(kept * per_frame, block, temporal_stride, causal_first_frame and temporal_stride > 1)
        self.block = block
        counts = (luma_coefficients, chroma_coefficients, chroma_coefficients)
        self.register_buffer("analysis", block_basis(block, counts).float(), persistent=False)
        self.register_buffer("temporal", dct_matrix(temporal_stride)[:kept].float(), persistent=False)

    def encode_raw(self, signal: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] to coefficients [B, C, F, H/block, W/block].

        Raises:
            OviError: for other channels than 3, sizes that the block does not divide, frames that do not fill groups.
        """
        self._check(signal)
        patches = rearrange(signal, "b c t (h p) (w q) -> b t h w (c p q)", p=self.block, q=self.block)
        frames = patches @ self.analysis.T
        if self.temporal_stride == 1:
            return rearrange(frames, "b t h w n -> b n t h w")
        if not self.causal_first_frame:
            return self._group(frames)
        first = rearrange(frames[:, :1], "b t h w n -> b n t h w") * math.sqrt(self.temporal_stride)
        still = torch.cat([first, first.new_zeros(()).expand(self._rest_shape(first))], dim=1)
        return torch.cat([still, self._group(frames[:, 1:])], dim=2)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Coefficients [B, C, F, h, w] to pixels [B, 3, T, H, W]; not clamped.

        Raises:
            OviError: for another number of channels.
        """
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels:
            raise OviError(f"dct: expected latents [B, {self.latent_channels}, F, h, w], got {list(latent.shape)}")
        if self.temporal_stride == 1:
            frames = rearrange(latent, "b n t h w -> b t h w n")
        elif not self.causal_first_frame:
            frames = self._ungroup(latent)
        else:
            still = latent[:, : self.analysis.shape[0], :1] / math.sqrt(self.temporal_stride)
            frames = torch.cat([rearrange(still, "b n t h w -> b t h w n"), self._ungroup(latent[:, :, 1:])], dim=1)
        return rearrange(
            frames @ self.analysis, "b t h w (c p q) -> b c t (h p) (w q)", c=3, p=self.block, q=self.block
        )

    def _group(self, frames: Tensor) -> Tensor:
        groups = rearrange(frames, "b (f k) h w n -> b f h w n k", k=self.temporal_stride)
        return rearrange(groups @ self.temporal.T, "b f h w n k -> b (k n) f h w")

    def _ungroup(self, latent: Tensor) -> Tensor:
        groups = rearrange(latent, "b (k n) f h w -> b f h w n k", k=self.temporal.shape[0])
        return rearrange(groups @ self.temporal, "b f h w n k -> b (f k) h w n")

    def _rest_shape(self, first: Tensor) -> tuple[int, ...]:
        return (first.shape[0], self.latent_channels - first.shape[1], *first.shape[2:])

    def _check(self, signal: Tensor) -> None:
        if signal.ndim != 5 or signal.shape[1] != 3:
            raise OviError(f"dct: expected pixels [B, 3, T, H, W], got {list(signal.shape)}")
        t, height, width = signal.shape[2:]
        if height % self.block or width % self.block:
            raise OviError(
                f"dct: {height}x{width} pixels do not divide into blocks of {self.block}: change block or size"
            )
        rest = t - 1 if self.causal_first_frame else t
        if t < 1 or rest % self.temporal_stride:
            form = f"{self.temporal_stride}n{' + 1' if self.causal_first_frame else ''}"
            raise OviError(f"dct: {t} frames do not fit: need {form}; change num_frames or temporal_stride")


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II as a matrix [frequency, position], float64."""
    position = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (position + 0.5) * position[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def zigzag(block: int) -> list[tuple[int, int]]:
    """(row, column) frequencies of a block by diagonals, each walked against the one before, as in JPEG (ITU T.81)."""

    def place(at: tuple[int, int]) -> tuple[int, int]:
        diagonal = at[0] + at[1]
        return diagonal, at[0] if diagonal % 2 else at[1]

    return sorted(((row, column) for row in range(block) for column in range(block)), key=place)


def block_basis(block: int, counts: tuple[int, int, int]) -> Tensor:
    """Orthonormal rows [sum of counts, 3 * block * block] over a block's pixels (colour, row, column), float64.

    Colour turns into brightness (r + g + b) and two differences (b - r; r - 2g + b), each scaled to length 1: an
    orthonormal relative of YCbCr, so that squared error of coefficients is squared error of pixels.
    """
    colours = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    waves = dct_matrix(block)
    order = zigzag(block)
    rows = [
        torch.einsum("c,p,q->cpq", colour, waves[row], waves[column]).flatten()
        for colour, count in zip(colours, counts)
        for row, column in order[:count]
    ]
    return torch.stack(rows)
