"""A diffusion transformer of one modality: embeddings, blocks, head. Video and audio are two instances of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ovi.block import Block
from ovi.errors import OviError
from ovi.lean import modulated_norm
from ovi.patch import Patch, sinusoid
from ovi.registry import Registry
from ovi.rope import Rotation
from ovi.stream import EncodedText, Stream

TOWERS = Registry("tower", group="model/tower", doc="one modality's transformer")

NUM_TIMESTEPS = 1000.0
"""Timestep of pure noise: the time embedding sees sigma times this."""

TEXT_STEP = 64
"""Prompts are padded to a multiple of this many tokens."""

Text = Tensor | Sequence[Tensor]
"""Embeddings of prompts, [B, n, text_dim] or a list of B tensors [n_i, text_dim]."""


class Head(nn.Module):
    """Modulated norm and linear map to the values of each token; the modulation is table + time embedding.

    Args:
        dim: width.
        values: numbers predicted per token.
        eps: of the norm.
    """

    def __init__(self, dim: int, values: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, values)

    def forward(self, s: Stream) -> Tensor:
        shift, scale = (self.modulation + s.time.unsqueeze(2)).unbind(2)
        return self.head(modulated_norm(s.tokens, shift, scale, s.segments, self.eps))


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

    def encode_text(self, text: Text, mask: Tensor | None = None, *, keys: bool = False) -> EncodedText:
        """Prompts as the blocks attend to them; what it returns can be used for any number of forward passes.

        Every prompt is zero-padded to ``text_len``, unmasked, as published models were trained. The rows past a
        prompt are all alike, so a few stand for all of them with the logarithm of their share added to the scores:
        the same softmax at a fraction of the work.

        Args:
            text: [B, n, text_dim], or a list of B embeddings [n_i, text_dim].
            mask: which of ``text_len`` tokens may be attended, [B, text_len] bool.
            keys: also compute every block's keys and values, for repeated use.

        Raises:
            OviError: when an embedding is longer than text_len or of another width, or a mask of another shape.
        """
        if mask is None:
            rows, bias = pad_text(text, self.text_len, self.text_dim, hide_padding=self.mask_text_padding)
        else:
            rows, hidden = pad_text(text, self.text_len, self.text_dim, hide_padding=self.mask_text_padding, whole=True)
            if mask.shape != rows.shape[:2]:
                raise OviError(f"text_mask must be {list(rows.shape[:2])} [B, text_len], got {list(mask.shape)}")
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -float("inf"))
            bias = bias if hidden is None else bias + hidden
        tokens = self.text_embedding(rows.to(next(self.text_embedding.parameters()).dtype))
        return EncodedText(tokens, bias, tuple(b.text_keys(tokens) for b in self.blocks) if keys else ())  # type: ignore[operator]

    def embed(
        self,
        latent: Tensor,
        sigma: Tensor,
        text: EncodedText,
        rope: Rotation,
        *,
        clean_first_frame: bool = False,
        exchange_rope: Rotation | None = None,
        partner_rope: Rotation | None = None,
        mask: Tensor | None = None,
        times: Tensor | None = None,
        rate_hz: float | None = None,
    ) -> Stream:
        """Latent, noise level and text to a stream of tokens.

        Args:
            latent: as the patch takes it, [B, C, F, H, W] or [B, L, C].
            sigma: noise level in 0..1, [B].
            text: from ``encode_text``.
            rope: rotation for self-attention.
            clean_first_frame: the first frame's tokens are given, not noised: they get timestep 0.
            exchange_rope: rotation of this tower's queries to its partner.
            partner_rope: rotation of the partner's keys.
            mask: real tokens, [B, L] bool.
            times: of latent frames or tokens in seconds.
            rate_hz: of latent frames or tokens.
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
        return Stream(
            tokens,
            segments,
            modulation,
            time,
            text.prompt(0),
            grid,
            rope,
            exchange_rope,
            partner_rope,
            mask,
            times,
            rate_hz=rate_hz,
        )

    def head(self, s: Stream) -> Tensor:
        """Stream to the predicted velocity, of the latent's shape."""
        return self.patch_embedding.restore(self.out(s), s.grid)


def pad_text(
    text: Text, text_len: int, text_dim: int, *, hide_padding: bool = False, whole: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Zero-pad embeddings, as short as gives the same attention as padding to text_len.

    Args:
        text: [B, n, text_dim], or a list of B embeddings [n_i, text_dim].
        text_len: length they stand for.
        text_dim: their width.
        hide_padding: no attention to the padding.
        whole: pad to text_len itself.

    Returns:
        [B, T, text_dim], T a multiple of 64 or text_len; and what to add to each token's score, [B, T] float32,
        None for nothing.

    Raises:
        OviError: when an embedding is longer than text_len or of another width.
    """
    shapes = [tuple(text.shape[1:])] * len(text) if isinstance(text, Tensor) else [tuple(t.shape) for t in text]
    lengths = [length for length, _ in shapes]
    for length, width in set(shapes):
        if width != text_dim or length > text_len:
            raise OviError(
                f"a text embedding must be at most [{text_len}, {text_dim}], got {[length, width]}: "
                "use the text encoder the model was built for"
            )
    # At least one row of padding where a prompt is shorter than text_len, to stand for it. Rounded up, so that prompts
    # of many lengths make few shapes for a compiler.
    size = text_len if whole else min(text_len, -(-(max(lengths) + 1) // TEXT_STEP) * TEXT_STEP)
    rows = text if isinstance(text, Tensor) else pad_sequence(list(text), batch_first=True)
    rows = F.pad(rows, (0, 0, 0, size - rows.shape[1]))
    if all(n == size for n in lengths) or (size == text_len and not hide_padding):
        return rows, None
    # Pinned and not waited for: the host runs on while the few numbers travel.
    known = torch.tensor(lengths, dtype=torch.float32, pin_memory=rows.is_cuda)
    n = known.to(rows.device, non_blocking=True)[:, None]
    share = torch.full_like(n, -float("inf")) if hide_padding else torch.log((text_len - n) / (size - n))
    return rows, torch.where(torch.arange(size, device=rows.device) < n, 0.0, share)
