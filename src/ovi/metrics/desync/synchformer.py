"""Synchformer: which of 21 offsets sound and picture are apart by.

V. Iashin, W. Xie, E. Rahtu and A. Zisserman, Synchformer, ICASSP 2024 (arXiv 2401.16423). Segments of 0.64 s are
encoded on their own: pictures by a Motionformer with divided space-time attention (arXiv 2106.05392), sound by an Audio
Spectrogram Transformer (arXiv 2104.01778); in both, attention to one more token gathers space, or frequency. A
transformer reads the tokens of 14 segments of either and names the offset.

Names of parts are those of the published state dict, which is why they are as they are:

    vfeat_extractor   cls_token, pos_embed, temp_embed, patch_embed_3d.proj, blocks.N.{norm1, attn, norm2, mlp, norm3,
                      timeattn}, norm, spatial_attn_agg; patch_embed.proj is in the file and of no use
    afeat_extractor   ast.embeddings, ast.encoder.layer.N, ast.layernorm (names of transformers 4, which version 5 has
                      changed: its own AST does not take them), freq_attn_agg
    vproj, aproj      one linear layer each
    transformer       OFF_tok, MOD_tok, vis_in_lnorm, aud_in_lnorm, pos_emb_cfg.pos_emb, blocks.N.{ln1, attn, ln2, mlp},
                      ln_f, off_head
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.errors import OviError


@dataclass(frozen=True)
class SynchformerConfig:
    """Sizes; the defaults are those of the published weights.

    Attributes:
        width: of all tokens.
        depth: blocks of either encoder.
        heads: of attention in either encoder.
        mlp_ratio: hidden width of the feed-forward parts, in widths.
        side: of the square pictures, in pixels.
        segment_frames: pictures of a segment.
        patch: side of a patch, in pixels of a picture and in bands and frames of a spectrogram.
        tubelet: pictures a patch spans.
        mel_bands, mel_frames: of a segment's spectrogram.
        mel_stride: from patch to patch in a spectrogram, where they overlap.
        sync_depth, sync_heads: of the last transformer.
        segments: it reads, of either.
        classes: offsets it tells apart.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    side: int = 224
    segment_frames: int = 16
    patch: int = 16
    tubelet: int = 2
    mel_bands: int = 128
    mel_frames: int = 66
    mel_stride: int = 10
    sync_depth: int = 3
    sync_heads: int = 8
    segments: int = 14
    classes: int = 21

    @property
    def seen_tokens(self) -> int:
        """Tokens of a segment's pictures: one a tubelet."""
        return self.segment_frames // self.tubelet

    @property
    def spectrogram_grid(self) -> tuple[int, int]:
        """Patches along frequency and along time."""
        return (
            (self.mel_bands - self.patch) // self.mel_stride + 1,
            (self.mel_frames - self.patch) // self.mel_stride + 1,
        )


class Synchformer(nn.Module):
    """The whole network.

    Args:
        config: its sizes.
    """

    def __init__(self, config: SynchformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SynchformerConfig()
        self.vfeat_extractor = _PictureEncoder(config)
        self.afeat_extractor = _SoundEncoder(config)
        self.vproj = nn.Linear(config.width, config.width)
        self.aproj = nn.Linear(config.width, config.width)
        self.transformer = _OffsetTransformer(config)

    def train(self, mode: bool = True) -> Synchformer:
        """Stays in evaluation."""
        return super().train(False)

    def encode_pictures(self, segments: Tensor) -> Tensor:
        """Tokens [S, tokens, width] of segments [S, frames, 3, side, side] in -1..1."""
        return self.vfeat_extractor(segments)

    def encode_sound(self, spectrograms: Tensor) -> Tensor:
        """Tokens [S, tokens, width] of log mel spectrograms [S, bands, frames]."""
        return self.afeat_extractor(spectrograms)

    def logits(self, seen: Tensor, heard: Tensor) -> Tensor:
        """Logits [classes] of the offsets, of the tokens of as many segments as the network reads, [S, tokens, width].

        Raises:
            OviError: for another number of segments.
        """
        if not len(seen) == len(heard) == self.config.segments:
            raise OviError(f"Synchformer reads {self.config.segments} segments, got {len(seen)} and {len(heard)}")
        return self.transformer(self.vproj(seen).flatten(0, 1), self.aproj(heard).flatten(0, 1))


def load_synchformer(file: str | Path, config: SynchformerConfig | None = None) -> Synchformer:
    """The network with the weights of a state dict, every one of which must be used.

    Raises:
        OviError: when names or shapes are others.
    """
    with torch.device("meta"):
        network = Synchformer(config)
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    except RuntimeError as error:
        raise OviError(f"{file} holds other weights than Synchformer's: {str(error)[:500]}") from error
    return network.float().train(False).requires_grad_(False)


# --- pictures --------------------------------------------------------------------------------------------------------


class _PictureEncoder(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch
        self.grid = config.side // patch
        self.frames = config.seen_tokens
        self.patch_embed = _Patches(nn.Conv2d(3, width, patch, patch))
        size = (config.tubelet, patch, patch)
        self.patch_embed_3d = _Patches(nn.Conv3d(3, width, size, size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, self.frames, width))
        self.blocks = nn.ModuleList(_DividedBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.spatial_attn_agg = _Gather(config)

    def forward(self, segments: Tensor) -> Tensor:
        x = self.patch_embed_3d.proj(segments.transpose(1, 2))  # [S, width, t, h, w]
        x = x.flatten(3).permute(0, 2, 3, 1)  # [S, t, h w, width]
        x = x + self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat((first, x.flatten(1, 2)), 1)
        for block in self.blocks:
            x = block(x, self.frames)
        x = self.norm(x[:, 1:]).unflatten(1, (self.frames, -1))
        return self.spatial_attn_agg(x.flatten(0, 1)).unflatten(0, (-1, self.frames))


class _Patches(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.proj = projection


class _DividedBlock(nn.Module):
    """Attention along time, then within each frame, then feed-forward."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(3))
        self.attn = _DividedAttention(config.width, config.heads)
        self.timeattn = _DividedAttention(config.width, config.heads)
        self.mlp = _FeedForward(config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = x + self.timeattn(self.norm3(x), frames, along_time=True)
        x = x + self.attn(self.norm1(x), frames, along_time=False)
        return x + self.mlp(self.norm2(x))


class _DividedAttention(nn.Module):
    """The first token attends to all; any other to the first and those of its own place, or of its own frame."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, frames: int, *, along_time: bool) -> Tensor:
        # [S, heads, tokens, channels] each
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v)

        def grouped(tokens: Tensor) -> Tensor:
            tokens = tokens[:, :, 1:].unflatten(2, (frames, -1))
            return tokens.transpose(2, 3) if along_time else tokens

        def with_first(tokens: Tensor) -> Tensor:
            rest = grouped(tokens)
            return torch.cat((tokens[:, :, None, :1].expand(-1, -1, rest.shape[2], -1, -1), rest), 3)

        rest = F.scaled_dot_product_attention(grouped(q), with_first(k), with_first(v))
        rest = (rest.transpose(2, 3) if along_time else rest).flatten(2, 3)
        return self.proj(torch.cat((first, rest), 2).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Gather(nn.TransformerEncoderLayer):
    """One encoder layer over [B, N, width] and a token of its own, which it gives back: [B, width]."""

    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__(
            config.width,
            config.heads,
            config.mlp_ratio * config.width,
            dropout=0.0,
            activation=nn.GELU(),
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1))[:, 0]


# --- sound -----------------------------------------------------------------------------------------------------------


class _SoundEncoder(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.grid = config.spectrogram_grid
        self.ast = _SpectrogramTransformer(config)
        self.freq_attn_agg = _Gather(config)

    def forward(self, spectrograms: Tensor) -> Tensor:
        x = self.ast(spectrograms)[:, 2:].unflatten(1, self.grid)  # [S, frequencies, times, width]
        return self.freq_attn_agg(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, self.grid[1]))


class _SpectrogramTransformer(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        self.embeddings = _SpectrogramEmbeddings(config)
        self.encoder = _Layers(_SpectrogramLayer(config) for _ in range(config.depth))
        self.layernorm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, spectrograms: Tensor) -> Tensor:
        x = self.embeddings(spectrograms)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)


class _Layers(nn.Module):
    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class _SpectrogramEmbeddings(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        high, wide = config.spectrogram_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, high * wide + 2, config.width))
        self.patch_embeddings = _Projection(nn.Conv2d(1, config.width, config.patch, config.mel_stride))

    def forward(self, spectrograms: Tensor) -> Tensor:
        x = self.patch_embeddings.projection(spectrograms[:, None]).flatten(2).transpose(1, 2)
        first = (token.expand(len(x), -1, -1) for token in (self.cls_token, self.distillation_token))
        return torch.cat((*first, x), 1) + self.position_embeddings


class _Projection(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection


class _SpectrogramLayer(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.attention = _SpectrogramAttention(width, config.heads)
        self.intermediate, self.output = _Dense(width, hidden), _Dense(hidden, width)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class _SpectrogramAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = _SelfAttention(width, heads)
        self.output = _Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.attention(x))


class _Dense(nn.Module):
    def __init__(self, wide: int, to: int) -> None:
        super().__init__()
        self.dense = nn.Linear(wide, to)


class _SelfAttention(nn.Module):
    """Softmax attention of [..., N, width], without the layer behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


# --- both ------------------------------------------------------------------------------------------------------------


class _OffsetTransformer(nn.Module):
    def __init__(self, config: SynchformerConfig) -> None:
        super().__init__()
        width = config.width
        tokens = 2 + config.segments * (config.seen_tokens + config.spectrogram_grid[1])
        self.OFF_tok = nn.Parameter(torch.zeros(1, 1, width))
        self.MOD_tok = nn.Parameter(torch.zeros(1, 1, width))
        self.vis_in_lnorm, self.aud_in_lnorm, self.ln_f = (nn.LayerNorm(width) for _ in range(3))
        self.pos_emb_cfg = _Positions(tokens, width)
        self.blocks = nn.Sequential(*(_SyncBlock(width, config.sync_heads) for _ in range(config.sync_depth)))
        self.off_head = nn.Linear(width, config.classes)

    def forward(self, seen: Tensor, heard: Tensor) -> Tensor:
        x = torch.cat((self.OFF_tok[0], self.vis_in_lnorm(seen), self.MOD_tok[0], self.aud_in_lnorm(heard)))
        x = self.blocks(x + self.pos_emb_cfg.pos_emb[0])
        return self.off_head(self.ln_f(x[0]))


class _Positions(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, tokens, width))


class _SyncBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _SyncAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class _SyncAttention(_SelfAttention):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(super().forward(x))
