"""When each modality attends when: a twin's exchange as maps over time, and how far from the diagonal they lie.

Kernels of attention return no weights, so that while a recording lasts every paired block computes them beside its own
kernel, from the very queries and keys: what the network computes stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ovi.attention import Attention
from ovi.block import Block
from ovi.errors import OviError
from ovi.fusion import BottleneckFusion, FramewiseFusion, Fusion, StitchFusion
from ovi.fusion.framewise import _edges, _most, _neighbours, _tokens_between
from ovi.fusion.stitch import tokens_of_frames
from ovi.plan import fused_pairs
from ovi.stream import Stream
from ovi.twin import TwinDiT

CHUNK_VALUES = 2**24
"""Weights held at once, in float32: 64 MiB. A clip's whole map can be a hundred times that."""


@dataclass(frozen=True)
class TimeMap:
    """Attention of one modality to the other over time, averaged over heads, space and samples.

    Args:
        shares: [Tq, Tk], what goes to each time of the partner; rows sum to 1, or are NaN where nothing was attended.
        query_times: when the rows are, [Tq] in seconds.
        key_times: when the columns are, [Tk] in seconds.
        real: columns that are no padding, [Tk] bool.
        mass: share of the softmax that went to the partner at all; 1 unless it holds other tokens too.
    """

    shares: Tensor
    query_times: Tensor
    key_times: Tensor
    real: Tensor
    mass: float

    @property
    def offset_ms(self) -> float:
        """Expected ``|t_key - t_query|`` under the attention, mean over the rows, in ms: 0 is on the diagonal."""
        attended = ~self.shares.isnan().any(1)
        return float((self._distances_ms * self.shares).sum(1)[attended].mean())

    @property
    def uniform_ms(self) -> float:
        """The same for attention that is spread evenly over the partner's tokens, and so knows nothing of time."""
        attended = ~self.shares.isnan().any(1)
        return float(self._distances_ms[attended][:, self.real].mean())

    @property
    def _distances_ms(self) -> Tensor:
        return 1000 * (self.key_times[None] - self.query_times[:, None]).abs()


@dataclass(frozen=True)
class PairMaps:
    """The maps of one pair of blocks; None for a direction in which no softmax over the partner's tokens is.

    Args:
        video_block: its number.
        audio_block: its number.
        hears: video's attention to audio, rows being latent frames.
        sees: audio's attention to video, columns being latent frames.
    """

    video_block: int
    audio_block: int
    hears: TimeMap | None
    sees: TimeMap | None


class Recording:
    """The maps of all forward passes while it lasts; see ``record_attention``."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self._pairs = pairs
        self._sums: dict[tuple[int, bool], _Sums] = {}

    @property
    def maps(self) -> list[PairMaps]:
        """Maps of the pairs that exchanged through attention, in order; empty when none did."""
        found = []
        for i, (video, audio) in enumerate(self._pairs):
            hears, sees = (self._sums.get((i, of_video)) for of_video in (True, False))
            if hears is not None or sees is not None:
                maps = (None if sums is None else sums.time_map() for sums in (hears, sees))
                found.append(PairMaps(video, audio, *maps))
        return found

    def _add(self, pair: int, of_video: bool, own: Stream, partner: Stream, shares: Tensor, weights: Tensor) -> None:
        assert own.times is not None
        assert partner.times is not None
        key = pair, of_video
        if key not in self._sums:
            self._sums[key] = _Sums(own.times.cpu(), partner.times.cpu())
        self._sums[key].add(shares, weights, partner)


@contextmanager
def record_attention(model: TwinDiT, *, chunk_values: int = CHUNK_VALUES) -> Iterator[Recording]:
    """Record the exchange of every pair of blocks over time, for the length of a ``with`` block.

    What the network returns does not change. A compiled network runs uncompiled meanwhile. Meant for a few passes
    without gradients; maps of several add up to their mean, over clips of one length.

    - ``ovi``, ``affinity`` and the bridges have one softmax over the partner's tokens in each direction.
    - ``joint`` and ``stitch`` have one over other tokens too: the partner's part is shown, and its mass told. Video
      hears twice in ``stitch``, which is shown together.
    - ``framewise`` is limited in time, and shown so; what audio sees there is one interpolated frame.
    - ``none``, ``film`` and ``bottleneck`` have none: no maps.
    - An out-of-tree strategy is understood where it calls the block's kernel with the queries of all tokens on the keys
      of all the partner's, or of video and audio one after the other.

    Args:
        model: the twin.
        chunk_values: attention weights held at once.

    Raises:
        OviError: in a forward pass, for clips of another length than before.
    """
    pairs = fused_pairs(model.plan)
    recording = Recording(pairs)
    undo: list[Callable[[], None]] = []
    try:
        for i, (fusion, (n, m)) in enumerate(zip(model.fusions, pairs)):
            taps = tuple(
                _Tap(block, of_video, _adder(recording, i, of_video), chunk_values)
                for block, of_video in ((model.video.blocks[n], True), (model.audio.blocks[m], False))
            )
            undo += [tap.remove for tap in taps]
            undo.append(fusion.register_forward_pre_hook(_begin(recording, i, taps)).remove)
            undo.append(fusion.register_forward_hook(_end(taps), always_call=True).remove)
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        for action in reversed(undo):
            action()


def pooled_attention(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    query_bins: Tensor,
    key_bins: Tensor,
    sizes: tuple[int, int],
    *,
    real: Tensor | None = None,
    chunk_values: int = CHUNK_VALUES,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, in float32, summed over bins of queries and of keys, and averaged over heads.

    Args:
        q: as the kernel gets them, [B * G, H, Lq, d].
        k: [B * G, H, Lk, d].
        mask: over keys, [B * G, Lk] bool or added to the scores.
        query_bins: bin of each query, [G, Lq].
        key_bins: bin of each key, [G, Lk]; -1 for none.
        sizes: numbers of bins (Tq, Tk).
        real: queries that count, [B * G, Lq] bool; None for all.
        chunk_values: weights held at once.

    Returns:
        [Tq, Tk], sums of weights over batch, queries and keys, and [Tq], the queries in each bin.
    """
    sums = torch.zeros(*sizes, device=q.device)
    counts = torch.zeros(sizes[0], device=q.device)
    num_heads, num_queries = q.shape[1:3]
    # Keys too are many: a few heads at a time, whose float32 copy is no larger than the weights.
    some_heads = min(num_heads, max(1, chunk_values // k[0, 0].numel()))
    rows = max(1, chunk_values // (some_heads * k.shape[2]))
    for n in range(len(q)):
        group = n % len(query_bins)
        columns = torch.where(key_bins[group] < 0, sizes[1], key_bins[group])  # one more, for what is in no bin
        added = None if mask is None else mask[n]
        if added is not None and added.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=torch.float32).masked_fill(~added, -torch.inf)
        weight = torch.ones_like(q[n, 0, :, 0], dtype=torch.float32) if real is None else real[n].float()
        counts.index_add_(0, query_bins[group], weight)
        for head in range(0, num_heads, some_heads):
            heads = slice(head, head + some_heads)
            keys = k[n, heads].float().transpose(-1, -2) / q.shape[-1] ** 0.5
            for first in range(0, num_queries, rows):
                part = slice(first, first + rows)
                scores = q[n, heads, part].float() @ keys
                weights = (scores if added is None else scores + added.float()).softmax(-1).sum(0) / num_heads
                binned = weights.new_zeros(len(weights), sizes[1] + 1).index_add_(1, columns, weights)
                sums.index_add_(0, query_bins[group, part], binned[:, :-1] * weight[part, None])
    return sums, counts


# --- what a kernel is called with ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bins:
    """Which time each query [G, Lq] and key [G, Lk] of a call belongs to; -1 for a key that is not the partner's."""

    queries: Tensor
    keys: Tensor


@dataclass
class _Sums:
    """Sums over calls of one pair and direction, in float64 on the host."""

    query_times: Tensor
    key_times: Tensor
    shares: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    real: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.shares = torch.zeros(len(self.query_times), len(self.key_times), dtype=torch.float64)
        self.weights = torch.zeros(len(self.query_times), dtype=torch.float64)
        self.real = torch.zeros(len(self.key_times), dtype=torch.bool)

    def add(self, shares: Tensor, weights: Tensor, partner: Stream) -> None:
        if shares.shape != self.shares.shape:
            raise OviError(
                f"attention over {list(shares.shape)} times came after one over {list(self.shares.shape)}: "
                "record clips of one length at a time"
            )
        self.shares += shares.double().cpu()
        self.weights += weights.double().cpu()
        self.real |= torch.ones_like(self.real) if partner.mask is None else partner.mask.any(0).cpu()

    def time_map(self) -> TimeMap:
        # Who has nothing to attend to is let attend padding, and the result dropped.
        shares = self.shares * self.real
        of_partner = shares.sum(1, keepdim=True)
        shares = torch.where(of_partner > 0, shares / of_partner, torch.nan)
        mass = float(of_partner.sum() / self.weights.sum())
        return TimeMap(shares, self.query_times.double(), self.key_times.double(), self.real, mass)


_Adder = Callable[[Stream, Stream, Tensor, Tensor], None]


class _Tap:
    """Stands in for one block's kernel and listens.

    Keys that the block made of its own tokens or of its prompt are known by identity: a call on them is no exchange.
    """

    def __init__(self, block: Any, of_video: bool, add: _Adder, chunk_values: int) -> None:
        self.block: Block = block
        self.of_video, self.add, self.chunk_values = of_video, add, chunk_values
        self.kernel: Attention = self.block.attention
        self.current: tuple[Fusion, Stream, Stream] | None = None
        self.own_keys: list[Tensor] = []
        self.block.attention = self
        for name in ("qkv", "cross_qkv"):
            vars(self.block)[name] = self._noting(getattr(self.block, name))

    def remove(self) -> None:
        self.block.attention = self.kernel
        for name in ("qkv", "cross_qkv"):
            del vars(self.block)[name]

    def begin(self, fusion: Fusion, own: Stream, partner: Stream) -> None:
        self.current, self.own_keys = (fusion, own, partner), []

    def end(self) -> None:
        self.current, self.own_keys = None, []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        result = self.kernel(q, k, v, mask)
        if self.current is not None and not any(k is own for own in self.own_keys):
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                self._listen(*self.current, q, k, mask)
        return result

    def _noting(self, make: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            made = make(*args, **kwargs)
            self.own_keys.append(made[1])
            return made

        return noted

    def _listen(self, fusion: Fusion, own: Stream, partner: Stream, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        bins = _bins(fusion, own, partner, self.of_video, q.shape[2], k.shape[2])
        if bins is None:
            return
        groups = len(bins.queries)
        real = None if own.mask is None or groups > 1 else own.mask
        sizes = own.grid[0], partner.grid[0]
        shares, weights = pooled_attention(
            q, k, mask, bins.queries, bins.keys, sizes, real=real, chunk_values=self.chunk_values
        )
        self.add(own, partner, shares, weights)


def _bins(
    fusion: Fusion, own: Stream, partner: Stream, of_video: bool, num_queries: int, num_keys: int
) -> _Bins | None:
    """How the tokens of an exchange's call lie in time; None for a call that is no attention to the partner's."""
    ours, theirs = _times_of_tokens(own), _times_of_tokens(partner)
    if isinstance(fusion, BottleneckFusion):
        return None
    num_frames = own.grid[0]
    if of_video and isinstance(fusion, FramewiseFusion | StitchFusion) and num_queries * num_frames == len(ours):
        index, heard = _heard(fusion, own, partner)
        if num_keys == index.shape[1]:
            frames = torch.arange(num_frames, device=ours.device)
            return _Bins(frames[:, None].expand(-1, num_queries), torch.where(heard, index, -1))
    if num_queries != len(ours):
        return None
    keys = _keys_in_one_softmax(fusion, own, ours, theirs, of_video, num_keys)
    return None if keys is None else _Bins(ours[None], keys[None])


def _keys_in_one_softmax(
    fusion: Fusion, own: Stream, ours: Tensor, theirs: Tensor, of_video: bool, num_keys: int
) -> Tensor | None:
    def after(nothing: int, times: Tensor) -> Tensor | None:
        return torch.cat([times.new_full((nothing,), -1), times]) if num_keys == nothing + len(times) else None

    if isinstance(fusion, StitchFusion):
        # Beside the prompt stand all audio tokens, or one mean for each video frame.
        return after(own.text.tokens.shape[1], theirs if of_video else theirs.unique())
    if num_keys == len(theirs):
        return theirs
    if of_video:
        return after(len(ours), theirs)
    return torch.cat([theirs, torch.full_like(ours, -1)]) if num_keys == len(theirs) + len(ours) else None


def _times_of_tokens(s: Stream) -> Tensor:
    """Number of the latent frame or token in time that each token belongs to, [L]."""
    count = s.tokens.shape[1]
    return torch.arange(count, device=s.tokens.device) // (count // s.grid[0])


def _heard(fusion: Fusion, v: Stream, a: Stream) -> tuple[Tensor, Tensor]:
    """The audio tokens that each frame's attention is limited to, [F, n], and which of these are heard, [F, n]."""
    if isinstance(fusion, StitchFusion):
        return tokens_of_frames(v, a)
    assert isinstance(fusion, FramewiseFusion)
    edges, count, window = _edges(v), v.grid[0], fusion.window
    frames = torch.arange(count, device=edges.device)
    starts, ends = edges[(frames - window).clamp(min=0)], edges[(frames + window + 1).clamp(max=count)]
    return _tokens_between(a, starts, ends, _most(a, v, 2 * window + 1))


def _interpolated(fusion: FramewiseFusion, v: Stream, a: Stream) -> tuple[Tensor, Tensor]:
    """What audio tokens see over time where each sees one interpolated frame: the weights of the interpolation.

    Attention there is among the pixels of that frame and shares nothing out in time.
    """
    found = _neighbours(a, v, fusion.nearest)
    shares = found.weights.new_zeros(a.grid[0], v.grid[0])
    for frames, weights in zip(found.frames, found.weights):
        shares.scatter_add_(1, frames[:, None], weights[:, None])
    real = shares.new_ones(a.grid[0]) if a.mask is None else a.mask.float().mean(0)
    return shares * real[:, None], real


def _adder(recording: Recording, pair: int, of_video: bool) -> _Adder:
    def add(own: Stream, partner: Stream, shares: Tensor, weights: Tensor) -> None:
        recording._add(pair, of_video, own, partner, shares, weights)

    return add


def _begin(recording: Recording, pair: int, taps: tuple[_Tap, ...]) -> Callable[[nn.Module, Any], None]:
    def begin(fusion: nn.Module, args: Any) -> None:
        v, a = args[0], args[1]
        assert isinstance(fusion, Fusion)
        for tap, (own, partner) in zip(taps, ((v, a), (a, v))):
            tap.begin(fusion, own, partner)
        if isinstance(fusion, FramewiseFusion):
            recording._add(pair, False, a, v, *_interpolated(fusion, v, a))

    return begin


def _end(taps: tuple[_Tap, ...]) -> Callable[[nn.Module, Any, Any], None]:
    def end(fusion: nn.Module, args: Any, result: Any) -> None:
        for tap in taps:
            tap.end()

    return end
