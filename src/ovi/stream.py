"""What flows through a twin: one modality's tokens with their conditions, and the control over the exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ovi.rope import Rotation


@dataclass(frozen=True, slots=True)
class Stream:
    """One modality inside a forward pass.

    A *segment* is a run of tokens with one timestep: a clip has one, a clip whose first frame is given has two. All
    modulations are kept per segment, never per token.

    Args:
        tokens: [B, L, D].
        segments: token count of each segment, summing to L.
        modulation: time projection per segment, [B, S, 6, D].
        time: time embedding per segment, for the head, [B, S, D].
        text: text tokens after the tower's text MLP, [B, n, D].
        grid: token counts per axis: (F, H, W) or (L,).
        rope: rotation of self-attention's queries and keys.
        exchange_rope: rotation of this modality's queries in attention to its partner; None without a partner.
        partner_rope: rotation of the partner's keys in that attention, at this modality's head width.
        mask: which tokens are real, [B, L] bool; None when all are.
        text_mask: which text tokens may be attended, [B, n] bool; None for all.
    """

    tokens: Tensor
    segments: tuple[int, ...]
    modulation: Tensor
    time: Tensor
    text: Tensor
    grid: tuple[int, ...]
    rope: Rotation
    exchange_rope: Rotation | None = None
    partner_rope: Rotation | None = None
    mask: Tensor | None = None
    text_mask: Tensor | None = None

    def with_tokens(self, tokens: Tensor) -> Stream:
        """The same conditions around other tokens."""
        return Stream(
            tokens,
            self.segments,
            self.modulation,
            self.time,
            self.text,
            self.grid,
            self.rope,
            self.exchange_rope,
            self.partner_rope,
            self.mask,
            self.text_mask,
        )


def modulate(x: Tensor, shift: Tensor, scale: Tensor, segments: tuple[int, ...]) -> Tensor:
    """``x * (1 + scale) + shift`` with one shift and scale per segment: x [B, L, D], the others [B, S, D]."""
    if len(segments) == 1:
        return torch.addcmul(shift, x, 1 + scale)
    parts = x.split(segments, dim=1)
    return torch.cat([torch.addcmul(shift[:, i : i + 1], p, 1 + scale[:, i : i + 1]) for i, p in enumerate(parts)], 1)


def gated(x: Tensor, gate: Tensor, segments: tuple[int, ...]) -> Tensor:
    """``x * gate`` with one gate per segment: x [B, L, D], gate [B, S, D]."""
    if len(segments) == 1:
        return x * gate
    return torch.cat([p * gate[:, i : i + 1] for i, p in enumerate(x.split(segments, dim=1))], 1)


Gate = float | Tensor
"""Strength of one direction of the exchange: a number, or one per sample [B]."""


@dataclass(frozen=True, slots=True)
class Control:
    """Gates of the exchange: ``a2v`` scales what video hears, ``v2a`` what audio sees. 1 is on, 0 exactly off."""

    a2v: Gate = 1.0
    v2a: Gate = 1.0


def apply_gate(term: Tensor, gate: Gate) -> Tensor:
    """Scale a term of the exchange, [B, ...], by its gate."""
    if isinstance(gate, Tensor):
        return term * gate.to(term.dtype).view(-1, *[1] * (term.dim() - 1))
    return term if gate == 1.0 else term * gate
