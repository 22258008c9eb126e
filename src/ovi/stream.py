"""What flows through a twin: one modality's tokens with their conditions, and the control over the exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovi.rope import Rotation


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tower's prompts of a batch, as its blocks attend to them.

    Args:
        tokens: after the tower's text MLP, [B, T, D].
        mask: added to the scores of each token, [B, T] float; None adds nothing.
        keys: keys and values [B, H, T, d] for the block that comes next, where they were computed beforehand.
    """

    tokens: Tensor
    mask: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A batch's prompts for one tower, ready for any number of forward passes; made by ``Tower.encode_text``.

    Args:
        tokens: [B, T, D].
        mask: [B, T] float, or None.
        keys: keys and values of every block; empty to compute them in every pass.
    """

    tokens: Tensor
    mask: Tensor | None
    keys: tuple[tuple[Tensor, Tensor], ...] = ()

    def prompt(self, block: int) -> Prompt:
        """What block number ``block`` attends to."""
        return Prompt(self.tokens, self.mask, self.keys[block] if self.keys else None)


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
        text: the prompt.
        grid: token counts per axis: (F, H, W) or (L,).
        rope: rotation of self-attention's queries and keys.
        exchange_rope: rotation of this modality's queries in attention to its partner; None without a partner.
        partner_rope: rotation of the partner's keys in that attention, at this modality's head width.
        mask: which tokens are real, [B, L] bool; None when all are.
        times: when each latent frame [F] or token [L] is, at its centre, in seconds.
        values_only: samples whose self-attention is replaced by its values, [B] bool (a guidance pass); None for none.
        rate_hz: latent frames, after a shorter first one, or tokens per second; the host knows it, times it does not.
    """

    tokens: Tensor
    segments: tuple[int, ...]
    modulation: Tensor
    time: Tensor
    text: Prompt
    grid: tuple[int, ...]
    rope: Rotation
    exchange_rope: Rotation | None = None
    partner_rope: Rotation | None = None
    mask: Tensor | None = None
    times: Tensor | None = None
    values_only: Tensor | None = None
    rate_hz: float | None = None

    def with_tokens(self, tokens: Tensor) -> Stream:
        """The same conditions around other tokens."""
        return replace(self, tokens=tokens)

    def with_text(self, text: Prompt) -> Stream:
        """The same tokens under another prompt, or with another block's keys of it."""
        return replace(self, text=text)

    def with_values_only(self, which: Tensor | None) -> Stream:
        """The same tokens, these samples' next self-attention replaced by its values."""
        return self if which is self.values_only else replace(self, values_only=which)

    def samples(self, indices: list[int]) -> Stream:
        """These samples of the batch alone."""

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else _rows(x, indices)

        text = self.text
        keys = text.keys and (_rows(text.keys[0], indices), _rows(text.keys[1], indices))
        return replace(
            self,
            tokens=_rows(self.tokens, indices),
            modulation=_rows(self.modulation, indices),
            time=_rows(self.time, indices),
            text=Prompt(_rows(text.tokens, indices), some(text.mask), keys),
            mask=some(self.mask),
            values_only=some(self.values_only),
        )

    def with_samples(self, indices: list[int], tokens: Tensor) -> Stream:
        """The tokens of these samples replaced by ``tokens`` [len(indices), L, D]."""
        new = dict(zip(indices, tokens.split(1)))
        rows = enumerate(self.tokens.split(1))
        return self.with_tokens(torch.cat([new.get(i, old) for i, old in rows]))


def add_gated(x: Tensor, term: Tensor, gate: Tensor, segments: tuple[int, ...]) -> Tensor:
    """``x + term * gate`` with one gate per segment: x and term [B, L, D], gate [B, S, D]."""
    if len(segments) == 1:
        return torch.addcmul(x, term, gate)
    parts = enumerate(zip(x.split(segments, dim=1), term.split(segments, dim=1)))
    return torch.cat([torch.addcmul(own, added, gate[:, i : i + 1]) for i, (own, added) in parts], 1)


Gate = float | Tensor
"""Strength of one direction of the exchange: a number, or one per sample [B]."""


@dataclass(frozen=True, slots=True)
class Control:
    """Gates of the exchange: ``a2v`` scales what video hears, ``v2a`` what audio sees. 1 is on, 0 exactly off."""

    a2v: Gate = 1.0
    v2a: Gate = 1.0

    def samples(self, indices: list[int]) -> Control:
        """The gates of these samples of a batch alone."""
        a2v, v2a = (_rows(g, indices) if isinstance(g, Tensor) else g for g in (self.a2v, self.v2a))
        return Control(a2v, v2a)


def _rows(x: Tensor, indices: list[int]) -> Tensor:
    """x[indices] without an index tensor, which would have to travel to the device."""
    first, count = indices[0], len(indices)
    if indices == list(range(first, first + count)):
        return x[first : first + count]
    return torch.stack([x[i] for i in indices])


def apply_gate(term: Tensor, gate: Gate) -> Tensor:
    """Scale a term of the exchange, [B, ...], by its gate."""
    if isinstance(gate, Tensor):
        return term * gate.to(term.dtype).view(-1, *[1] * (term.dim() - 1))
    return term if gate == 1.0 else term * gate
