"""The video VAE that Wan2.2 and Ovi were trained on, from its published weights.

Time needs no chunks of ours: the network is causal and the library walks it one latent frame at a time with cached
features, so memory hardly grows with a clip's length and the result is that of one pass. In space the library's own
tiling counts encoder tiles in 2x2 patches and decoder tiles in pixels, so one setting means two sizes; tiles are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ovi.codecs.base import VIDEO_CODECS, VideoCodec
from ovi.codecs.published import (
    PublishedLatents,
    find_dtype,
    load_strictly,
    read_safetensors,
    safetensors_files,
    weights_folder,
)
from ovi.errors import OviError

REPO = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
STEM = "diffusion_pytorch_model"


@VIDEO_CODECS.register("wan22")
class Wan22(PublishedLatents, VideoCodec):
    """Video VAE of Wan2.2 by its published weights: 48 channels for 16x16 pixels and 4 frames, the first frame alone.

    A latent is the posterior's mean, normalised with the checkpoint's own ``latents_mean`` and ``latents_std``.
    Tiles see less around them than whole frames do: within ``overlap`` of an inner edge a tile's result fades into its
    neighbour's, and attention in the network's middle spans a tile in place of the frame. So tiled latents are close
    to those of whole frames, not equal.

    Args:
        path: folder of the model, or ``owner/name`` of a hub repository, which is then downloaded
            (Wan-AI/Wan2.2-TI2V-5B-Diffusers).
        subfolder: folder inside it with config.json and the safetensors weights; empty for ``path`` itself.
        dtype: type the network computes in: bfloat16, float16 or float32; in and out is float32.
        encode_tile: side in pixels of the squares that frames are encoded in; null takes whole frames.
        decode_tile: the same of decoding, which takes about three times the memory.
        overlap: pixels that neighbouring tiles share at least.
        batch_size: clips per pass; memory grows with it.

    Raises:
        OviError: for missing or unfit files, weights of another VAE, or tiles that do not fit.
    """

    # Tiles too: they approximate the very same latents, and in a set of several sizes only the large need them.
    incidental_knobs = frozenset({"path", "subfolder", "dtype", "encode_tile", "decode_tile", "overlap", "batch_size"})

    def __init__(
        self,
        *,
        path: str,
        subfolder: str = "vae",
        dtype: str = "bfloat16",
        encode_tile: int | None = None,
        decode_tile: int | None = 768,
        overlap: int = 128,
        batch_size: int = 1,
    ) -> None:
        compute = find_dtype("wan22", dtype)
        expected = f"{subfolder or '.'}/config.json and {subfolder or '.'}/{STEM}.safetensors"
        patterns = [f"{subfolder}/*" if subfolder else "*"]
        root = weights_folder("wan22", path, repo=REPO, patterns=patterns, expected=expected)
        if root.joinpath("Wan2.2_VAE.pth").is_file() and not root.joinpath(subfolder, "config.json").is_file():
            raise OviError(
                f"wan22: {root} holds the original Wan2.2_VAE.pth, whose layout the library cannot map; take the "
                f"folder {subfolder} of {REPO}"
            )
        folder = root / subfolder
        files = safetensors_files("wan22", folder, STEM, repo=REPO)

        from diffusers import AutoencoderKLWan

        config = json.loads((folder / "config.json").read_text())
        stride = _check_config(config, folder)
        # On no device: memory and random numbers for weights that are about to be replaced would be wasted.
        with torch.device("meta"):
            known = {name: value for name, value in config.items() if name != "clip_output"}
            model: Any = AutoencoderKLWan.from_config(known)
        load_strictly("wan22", model, read_safetensors("wan22", files), folder, compute)
        VideoCodec.__init__(self, int(config["z_dim"]), stride, int(config.get("scale_factor_temporal", 4)), True)
        for name, tile in (("encode_tile", encode_tile), ("decode_tile", decode_tile)):
            if tile is not None and (tile % stride or tile <= overlap):
                raise OviError(
                    f"wan22: {name} must be a multiple of {stride} pixels above overlap={overlap}, or null; got {tile}"
                )
        if overlap < 0 or overlap % stride or batch_size < 1:
            raise OviError(
                f"wan22: overlap must be a multiple of {stride} pixels and batch_size at least 1, "
                f"got {overlap} and {batch_size}"
            )
        self.model, self.weight_files, self.dtype = model, files, compute
        self.encode_tile, self.decode_tile, self.overlap, self.batch_size = (
            encode_tile,
            decode_tile,
            overlap,
            batch_size,
        )
        self.mean.copy_(torch.tensor(config["latents_mean"]))
        self.std.copy_(torch.tensor(config["latents_std"]))
        self.fitted = True

    def encode_raw(self, signal: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in -1..1 to posterior means [B, C, (T - 1) / 4 + 1, H / 16, W / 16], float32.

        Raises:
            OviError: for other channels than 3, sizes the stride does not divide, or frames that are not 4n + 1.
        """
        stride = self.spatial_stride
        if signal.ndim != 5 or signal.shape[1] != 3:
            raise OviError(f"wan22: expected pixels [B, 3, T, H, W], got {list(signal.shape)}")
        t, height, width = signal.shape[2:]
        if height % stride or width % stride or min(height, width) < stride:
            raise OviError(f"wan22: {height}x{width} pixels do not divide by {stride}: change height or width")
        if t % self.temporal_stride != 1:
            # The library would drop the odd frames at the end without a word.
            raise OviError(f"wan22: {t} frames do not fit: need {self.temporal_stride}n + 1; change num_frames")
        return self._pass(self._encode, signal, self.encode_tile, 1 / stride)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] to pixels [B, 3, 4 (F - 1) + 1, 16 h, 16 w] in -1..1, float32.

        Raises:
            OviError: for another number of channels.
        """
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels:
            raise OviError(f"wan22: expected latents [B, {self.latent_channels}, F, h, w], got {list(latent.shape)}")
        tile = self.decode_tile and self.decode_tile // self.spatial_stride
        return self._pass(self._decode, latent, tile, self.spatial_stride)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels.to(self.dtype)).latent_dist.mode().float()

    def _decode(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent.to(self.dtype)).sample.float()

    def _pass(self, through: Callable[[Tensor], Tensor], signal: Tensor, tile: int | None, scale: float) -> Tensor:
        """Through the network by batches and tiles; ``tile`` is in the signal's samples, ``scale`` output per input."""
        unit = self.spatial_stride if scale < 1 else 1
        overlap = self.overlap * unit // self.spatial_stride
        parts = [
            through(part)
            if tile is None or max(part.shape[-2:]) <= tile
            else tiled(through, part, tile=tile, overlap=overlap, unit=unit, scale=scale)
            for part in signal.split(self.batch_size)
        ]
        # A clip at 720p decodes to more than a gigabyte: not copied when it is the only one.
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def tiled(
    through: Callable[[Tensor], Tensor], signal: Tensor, *, tile: int, overlap: int, unit: int, scale: float
) -> Tensor:
    """Map a signal in overlapping squares, their results blended by weights that rise linearly from inner edges.

    Args:
        through: maps [..., h, w] to [..., h * scale, w * scale].
        signal: [..., H, W].
        tile: side of a square, in the signal's samples; an axis that is no longer is not cut.
        overlap: samples that neighbours share at least; they share more where that spaces tiles evenly.
        unit: tiles begin at multiples of it.
        scale: samples of the result per sample of the signal.

    Returns:
        [..., H * scale, W * scale].
    """
    spans = [tile_spans(size, tile, overlap, unit) for size in signal.shape[-2:]]
    result = total = None
    for (top, bottom), (left, right) in product(*spans):
        part = through(signal[..., top:bottom, left:right])
        edges = [int(edge * scale) for edge in (top, bottom, left, right)]
        ramp = max(1, int(overlap * scale))
        down = _ramp(part.shape[-2], ramp, top > 0, bottom < signal.shape[-2], part)
        across = _ramp(part.shape[-1], ramp, left > 0, right < signal.shape[-1], part)
        weight = down[:, None] * across
        if result is None or total is None:
            size = [int(side * scale) for side in signal.shape[-2:]]
            result, total = part.new_zeros(*part.shape[:-2], *size), part.new_zeros(size)
        result[..., edges[0] : edges[1], edges[2] : edges[3]] += part.mul_(weight)
        total[edges[0] : edges[1], edges[2] : edges[3]] += weight
    assert result is not None
    assert total is not None
    return result.div_(total)


def tile_spans(size: int, tile: int, overlap: int, unit: int) -> list[tuple[int, int]]:
    """Begin and end of the fewest tiles that cover an axis with at least ``overlap`` in common, evenly spaced."""
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [(size - tile) * i // (count - 1) // unit * unit for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramp(length: int, ramp: int, before: bool, after: bool, like: Tensor) -> Tensor:
    at = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    weight = torch.ones_like(at)
    if before:
        weight = torch.minimum(weight, at / ramp)
    if after:
        weight = torch.minimum(weight, (length - at) / ramp)
    return weight


def _check_config(config: dict[str, Any], folder: Any) -> int:
    """Pixels per latent row; refuses what is not the Wan2.2 form."""
    if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise OviError(
            f"wan22: {folder} is a {config['_class_name']}, expected an AutoencoderKLWan: check path, subfolder"
        )
    channels, patch = config.get("z_dim"), config.get("patch_size")
    if not config.get("is_residual") or not patch or channels is None:
        raise OviError(
            f"wan22: {folder} is not the Wan2.2 VAE (is_residual={config.get('is_residual')}, patch_size={patch}, "
            f"z_dim={channels}; expected true, 2 and 48; Wan2.1's VAE is another): take the vae of {REPO}"
        )
    for name in ("latents_mean", "latents_std"):
        if len(config.get(name, [])) != channels:
            raise OviError(f"wan22: {folder}/config.json must give {channels} values as {name}: take the vae of {REPO}")
    stride = patch * 2 ** (len(config.get("dim_mult", [1, 2, 4, 4])) - 1)
    if config.get("scale_factor_spatial", stride) != stride:
        raise OviError(
            f"wan22: {folder}/config.json says scale_factor_spatial={config['scale_factor_spatial']}, but its layers "
            f"make {stride}: take the vae of {REPO}"
        )
    return stride
