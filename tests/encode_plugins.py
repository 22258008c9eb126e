"""Codecs and stages of a user's own module, as tests plant them; another process must find them by this name."""

import os
import signal
from pathlib import Path
from typing import ClassVar

import torch

from ovi.codecs.base import TEXT_ENCODERS, VIDEO_CODECS
from ovi.codecs.dct import BlockDCT
from ovi.codecs.text import HashedText
from ovi.data.stages.base import STAGES, Filter


@STAGES.register("tests_deadly")
class Deadly(Filter):
    """Kills its process at one file, each time.

    Args:
        file: its name.
        once: file that notes that it was done, so that it happens no more; None is each time.
    """

    name = "tests_deadly"
    level = "clip"

    def __init__(self, *, file: str, once: str | None = None) -> None:
        self.file, self.once = file, once

    def judge(self, candidate):
        if candidate.file == self.file and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return candidate


@VIDEO_CODECS.register("tests_video")
class PluginVideo(BlockDCT):
    """A codec that notes its batches, runs out of memory on large ones, and gives NaN for black clips.

    Args:
        most: clips that it has memory for.
        dark: mean level below which it has none at all, 0..255.
    """

    batches: ClassVar[list[int]] = []

    def __init__(self, *, most: int = 99, dark: float = -1.0) -> None:
        super().__init__()
        self.most, self.dark = most, dark

    def encode_raw(self, signal):
        self.batches.append(len(signal))
        levels = (signal.mean((1, 2, 3, 4)) + 1) * 127.5
        if len(signal) > self.most or (levels < self.dark).any():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Planted")
        latents = super().encode_raw(signal)
        latents[levels == 0] = float("nan")
        return latents


@TEXT_ENCODERS.register("tests_text")
class PluginText(HashedText):
    """A text encoder that notes what it is asked.

    Args:
        text_dim: width of an embedding.
    """

    asked: ClassVar[list[list[str]]] = []

    def __init__(self, *, text_dim: int = 8) -> None:
        super().__init__(text_dim=text_dim)

    def encode(self, prompts):
        self.asked.append(prompts)
        return super().encode(prompts)
