"""A diffusion transformer of one modality: embeddings, blocks, head. Video and audio are two instances of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ovi.block import Block
from ovi.errors import OviError
from ovi.patch import Patch, sinusoid
from ovi.registry import Registry
from ovi.rope import Rotation
from ovi.stream import Stream, modulate

TOWERS = Registry("tower", group="model/tower", doc="one modality's transformer")

NUM_TIMESTEPS = 1000.0
"""Timestep of pure noise: the time embedding sees sigma times this."""


class Head(nn.Module):
    """Modulated norm and linear map to the values of each token; the modulation is table + time embedding.

    Args:
        dim: width.
        values: numbers predicted per token.
        eps: of the norm.
    """

    def __init__(self, dim: int, values: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, values)

    def forward(self, s: Stream) -> Tensor:
        shift, scale = (self.modulation + s.time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(s.tokens), shift, scale, s.segments))


@TOWERS.register("dit")
class Tower(nn.Module):
    """The transformer that Ovi uses for both modalities (2510.01284, section 3; the video one is Wan2.2-TI2V-5B's).

    Args:
        channels: channels of its latent.
        text_dim: width of text embeddings.
        text_len: text tokens; shorter prompts are zero-padded to it before the text MLP.
        patch: builds the Patch from (channels, dim).
        dim: width D.
        num_heads: attention heads.
        num_blocks: depth.
        ffn_dim: hidden width of the feed-forward; None takes 4 * dim.
        freq_dim: width of the timestep's sinusoid.
        theta: base of the RoPE frequencies.
        mask_text_padding: hide the zero-padding of prompts from attention; published weights were trained without.
        eps: of all norms.

    Raises:
        OviError: when the heads do not divide the width.
    """

    def __init__(
        self,
        channels: int,
        text_dim: int,
        text_len: int,
        *,
        patch: Callable[[int, int], Patch],
        dim: int = 3072,
        num_heads: int = 24,
        num_blocks: int = 30,
        ffn_dim: int | None = None,
        freq_dim: int = 256,
        theta: float = 10000.0,
        mask_text_padding: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 2:
            raise OviError(
                f"a tower of dim {dim} does not split into {num_heads} heads of even width: change dim or num_heads"
            )
        self.dim, self.num_heads, self.text_dim, self.text_len = dim, num_heads, text_dim, text_len
        self.freq_dim, self.theta, self.mask_text_padding = freq_dim, theta, mask_text_padding
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim or 4 * dim, eps) for _ in range(num_blocks))
        patch_embedding = patch(channels, dim)
        self.out = Head(dim, patch_embedding.values_per_token, eps)
        self.reset_parameters()
        self.patch_embedding = patch_embedding  # after the reset: a patch initialises itself

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    def reset_parameters(self) -> None:
        """The reference's initialisation (spec, 'Initialisation')."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.text_embedding, self.time_embedding):
            for layer in embedding:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.out.head.weight)

    def embed(
        self,
        latent: Tensor,
        sigma: Tensor,
        text: Tensor | Sequence[Tensor],
        rope: Rotation,
        *,
        clean_first_frame: bool = False,
        exchange_rope: Rotation | None = None,
        partner_rope: Rotation | None = None,
        mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Stream:
        """Latent, noise level and text to a stream of tokens.

        Args:
            latent: as the patch takes it, [B, C, F, H, W] or [B, L, C].
            sigma: noise level in 0..1, [B].
            text: [B, n, text_dim], or a list of B embeddings [n_i, text_dim].
            rope: rotation for self-attention.
            clean_first_frame: the first frame's tokens are given, not noised: they get timestep 0.
            exchange_rope: rotation of this tower's queries to its partner.
            partner_rope: rotation of the partner's keys.
            mask: real tokens, [B, L] bool.
            text_mask: text tokens that may be attended, [B, text_len] bool.
        """
        grid = self.patch_embedding.grid(latent)
        tokens = self.patch_embedding.embed(latent)
        timestep = sigma[:, None] * NUM_TIMESTEPS
        segments: tuple[int, ...] = (tokens.shape[1],)
        if clean_first_frame:
            first = tokens.shape[1] // grid[0]
            segments = (first, tokens.shape[1] - first)
            timestep = torch.cat([torch.zeros_like(timestep), timestep], 1)
        time = self.time_embedding(sinusoid(timestep, self.freq_dim).to(tokens.dtype))
        modulation = self.time_projection(time).unflatten(-1, (6, self.dim))
        padded, lengths = pad_text(text, self.text_len, self.text_dim)
        if text_mask is None and self.mask_text_padding:
            text_mask = torch.arange(self.text_len, device=padded.device) < lengths[:, None].to(padded.device)
        embedded = self.text_embedding(padded.to(tokens.dtype))
        return Stream(
            tokens, segments, modulation, time, embedded, grid, rope, exchange_rope, partner_rope, mask, text_mask
        )

    def head(self, s: Stream) -> Tensor:
        """Stream to the predicted velocity, of the latent's shape."""
        return self.patch_embedding.restore(self.out(s), s.grid)


def pad_text(text: Tensor | Sequence[Tensor], text_len: int, text_dim: int) -> tuple[Tensor, Tensor]:
    """Zero-pad embeddings to [B, text_len, text_dim]; also their true lengths [B].

    Raises:
        OviError: when an embedding is longer than text_len or of another width.
    """
    for t in text:
        if t.shape[-1] != text_dim or t.shape[0] > text_len:
            raise OviError(
                f"a text embedding must be at most [{text_len}, {text_dim}], got {list(t.shape)}: "
                "use the text encoder the model was built for"
            )
    lengths = torch.tensor([t.shape[0] for t in text])
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, text_len - t.shape[0])) for t in text])
    return padded, lengths
