"""What a fusion strategy is: a short program over the phases of a pair of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from ovi.block import Block
from ovi.registry import Registry
from ovi.stream import Control, Stream

FUSIONS = Registry("fusion", group="model/fusion", doc="how the two towers exchange meaning in a pair of blocks")


class Fusion(nn.Module, ABC):
    """One per pair of blocks. It owns the order in which the blocks' phases run and what flows across.

    Args:
        video: the pair's video block, for its sizes only.
        audio: the pair's audio block, likewise.
    """

    one_clock = False
    """Whether one softmax holds self-attention and the exchange, so that both must have the same positions."""

    def __init__(self, video: Block, audio: Block) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        """Run both blocks once; ``control`` scales what crosses in each direction, 0 being exactly off."""
