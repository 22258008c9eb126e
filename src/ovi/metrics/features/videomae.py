"""VideoMAE V2 as content-debiased FVD uses it: a giant transformer fine-tuned on Something-Something V2.

L. Wang et al., VideoMAE V2, 2023 (arXiv 2303.16727); S. Ge et al., On the Content Bias in FVD, 2024 (arXiv 2404.12391):
its features weigh motion more against the look of single frames than I3D's do. Preprocessing is that of their package
cd-fvd 0.1.1: 0..1, bilinear to 224 x 224 without antialiasing, and no normalisation by ImageNet's mean, which the
network was fine-tuned with: figures published with it are without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.errors import OviError
from ovi.metrics.features.base import VIDEO_FEATURES, VideoExtractor
from ovi.metrics.features.inputs import check_frames
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

PUBLISHED = WeightsFile(
    "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    "the model zoo of VideoMAE V2 (OpenGVLab)",
    "5a210a92f035dff30c53b46157b612e7a1a5d3c99700e1b2d71da5c399ca7e70",
)
_VERSION = "cd-fvd 0.1.1: 0..1, bilinear 224; mean of tokens after fc_norm, 1"
_HEADS = 16


@VIDEO_FEATURES.register("videomae")
class VideoMAE(VideoExtractor):
    """VideoMAE V2's 1408 pooled features of 16 frames at 224 x 224: for content-debiased FVD. Takes 4 GB of memory.

    Args:
        path: the file ``vit_g_hybrid_pt_1200e_ssv2_ft.pth``, or its folder; no other file is taken.

    Raises:
        OviError: when it is missing or another file.
    """

    name = "videomae"
    resolution = (224, 224)

    def __init__(self, *, path: str | None = None) -> None:
        super().__init__()
        file = PUBLISHED.find(path, "path of videomae")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        self.net = VisionTransformer(state.get("module", state.get("model", state)), num_heads=_HEADS)
        self.feature_dim = self.net.fc_norm.normalized_shape[0]
        self.digest = combined_digest(file_digest(file), _VERSION)
        self.freeze()

    def forward(self, frames: Tensor) -> Tensor:
        """Features [B, 1408] of uint8 frames [B, 16, H, W, 3]."""
        x = check_frames(frames, self.num_frames).flatten(0, 1).permute(0, 3, 1, 2)
        small = [F.interpolate(one.float() / 255.0, size=self.resolution, mode="bilinear") for one in x.split(1)]
        return self.net(torch.cat(small).unflatten(0, frames.shape[:2]).transpose(1, 2))


class VisionTransformer(nn.Module):
    """[B, 3, T, H, W] to the normalised mean of its tokens [B, D]; sizes are those of the state dict.

    Parameters are called as published: ``patch_embed.proj``, ``blocks.N.{norm1, attn.{qkv, q_bias, v_bias, proj},
    norm2, mlp.{fc1, fc2}}``, ``fc_norm``; positions are sines, not parameters, and ``head`` is left out.

    Args:
        state: as published.
        num_heads: which shapes do not tell.

    Raises:
        OviError: when names in the state dict are missing or beyond these.
    """

    def __init__(self, state: Mapping[str, Tensor], num_heads: int) -> None:
        super().__init__()
        kept = {key: value for key, value in state.items() if not key.startswith("head.")}
        try:
            patches = kept["patch_embed.proj.weight"]
            hidden = len(kept["blocks.0.mlp.fc1.bias"])
            depth = len({key.split(".")[1] for key in kept if key.startswith("blocks.")})
            with torch.device("meta"):
                dim, channels, time, high, wide = patches.shape
                self.patch_embed = nn.ModuleDict(
                    {"proj": nn.Conv3d(channels, dim, (time, high, wide), (time, high, wide))}
                )
                self.blocks = nn.ModuleList(_Block(dim, hidden, num_heads) for _ in range(depth))
                self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
            self.to_empty(device="cpu").load_state_dict(kept)  # cast to float32 on the way in
        except (KeyError, RuntimeError) as error:
            raise OviError(f"the state dict is not of VideoMAE V2: {error}") from error

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch_embed["proj"](video).flatten(2).transpose(1, 2)
        x = x + _positions(*x.shape[1:]).to(x)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(1))


class _Block(nn.Module):
    def __init__(self, dim: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # keys have none
        parts = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _positions(count: int, dim: int) -> Tensor:
    """[count, dim]: sines at even, cosines at odd places, of wavelengths 2 pi to 20000 pi tokens."""
    pairs = torch.arange(dim, dtype=torch.float64) // 2
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000.0 ** (2.0 * pairs / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())
