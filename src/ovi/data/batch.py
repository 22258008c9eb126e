"""A batch of latents as training sees it, and the one block of memory in which a loading process hands it over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ovi.data.reading.blocks import Block


class Skipped(NamedTuple):
    """A sample that could not be read: its key (empty where the shard does not let it be known), its shard, and why."""

    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'sample {self.key} ' if self.key else ''}{self.reason}"


@dataclass  # not frozen: Lightning copies and sets fields where a precision casts its inputs
class LatentBatch:
    """Clean latents with their prompts; all samples of a batch have one shape.

    Tensors are of the type stored until ``to`` moves them, and float32 from there on: half the bytes go over.

    Args:
        video: [B, C, F, H, W]; [B, C, 0, 0, 0] where the samples have sound alone.
        audio: [B, L, C]; [B, 0, C] where the samples have no sound.
        text: B embeddings [n_i, text_dim].
        captions: B prompts.
        keys: B sample keys.
        extra: B dictionaries of whatever else the samples' json holds, such as planted truths.
        audio_mask: real audio tokens, [B, L] bool; None when all are.
        skipped: samples of this batch that were left out because they are damaged.
    """

    video: Tensor
    audio: Tensor
    text: list[Tensor]
    captions: list[str]
    keys: list[str]
    extra: list[dict[str, Any]]
    audio_mask: Tensor | None = None
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return self.video.shape[0]

    @property
    def has_video(self) -> bool:
        """Whether the samples have pictures; without, the video latents hold no number."""
        return self.video.shape[2:].numel() > 0

    @property
    def has_audio(self) -> bool:
        """Whether the samples have sound; without, the audio latents hold no number."""
        return self.audio.shape[1] > 0

    def to(self, device: torch.device | str) -> LatentBatch:
        """The batch in float32 with its tensors on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True).float()

        return replace(
            self,
            video=moved(self.video),
            audio=moved(self.audio),
            text=_all_moved(self.text, device),
            audio_mask=None if self.audio_mask is None else self.audio_mask.to(device, non_blocking=True),
        )


def _all_moved(texts: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Embeddings on another device in float32, in one transfer where they lie in a row."""
    row = _row_of(texts)
    if row is None:
        return [t.to(device, non_blocking=True).float() for t in texts]
    return list(row.to(device, non_blocking=True).float().split([len(t) for t in texts]))


def _row_of(texts: list[Tensor]) -> Tensor | None:
    """The matrix whose consecutive rows the texts are; None where they are not."""
    if len(texts) < 2 or any(t.ndim != 2 or not t.is_contiguous() for t in texts):
        return None
    first, at = texts[0], texts[0].data_ptr()
    for t in texts:
        same = t.dtype == first.dtype and t.shape[1] == first.shape[1]
        if not same or t.data_ptr() != at or t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        at += t.nbytes
    return first.as_strided((sum(map(len, texts)), first.shape[1]), (first.shape[1], 1))


@dataclass(frozen=True)
class PackedBatch:
    """A batch in one block of bytes, which goes from one process to another without a copy, and to a GPU in one.

    Args:
        block: uint8, or what becomes that in the process it is sent to; video, audio and text rows in a line, each
            beginning at a multiple of ``ALIGNMENT``.
        capacity: samples that the video and audio rows have room for; those of skipped samples stay empty, at the end.
        dtype: of the numbers in it.
        video, audio: shapes of a sample.
        text_lens: rows of each sample's text.
        text_dim: of a row.
        captions, keys, extra, skipped: as in ``LatentBatch``.
    """

    block: Tensor | Block
    capacity: int
    dtype: torch.dtype
    video: tuple[int, ...]
    audio: tuple[int, ...]
    text_lens: list[int]
    text_dim: int
    captions: list[str]
    keys: list[str]
    extra: list[dict[str, Any]] = field(default_factory=list)
    skipped: tuple[Skipped, ...] = ()

    def pin_memory(self) -> PackedBatch:
        """The batch in memory that a GPU can fetch from by itself."""
        assert isinstance(self.block, Tensor)
        return replace(self, block=self.block.pin_memory())

    def unpack(self) -> LatentBatch:
        """The batch; its tensors share the block's memory."""
        assert isinstance(self.block, Tensor)
        size, at, parts = len(self.keys), 0, []
        rows = ((self.capacity, self.video), (self.capacity, self.audio), (sum(self.text_lens), (self.text_dim,)))
        for count, shape in rows:
            num_bytes = count * math.prod(shape) * self.dtype.itemsize
            parts.append(self.block[at : at + num_bytes].view(self.dtype).view(count, *shape))
            at += aligned(num_bytes)
        video, audio, text = parts
        texts = list(text.split(self.text_lens))
        return LatentBatch(video[:size], audio[:size], texts, self.captions, self.keys, self.extra, None, self.skipped)


ALIGNMENT = 64
"""Bytes at whose multiples the parts of a block begin."""


def aligned(num_bytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
