"""No exchange."""

from __future__ import annotations

from ovi.block import Block
from ovi.fusion.base import FUSIONS, Fusion
from ovi.stream import Control, Stream


@FUSIONS.register("none")
class NoFusion(Fusion):
    """Two towers side by side: what every additive strategy equals when both gates are 0."""

    def forward(self, v: Stream, a: Stream, video: Block, audio: Block, control: Control) -> tuple[Stream, Stream]:
        return video(v), audio(a)
