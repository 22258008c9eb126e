"""What all metrics of clips share: how a clip comes in, and sums over clips that any number of processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from ovi.errors import OviError
from ovi.registry import Registry

METRICS = Registry("metric", group="metric", doc="what is measured of clips of pictures and sound")

Direction = Literal["lower", "higher"] | None
"""Which way a figure gets better; None: neither, as of a count."""

_RATE_TOLERANCE = 0.1
"""Sound and picture of one clip may differ in length by this share of it, or by two frames."""


@dataclass(frozen=True, eq=False)
class MeasuredClip:
    """One clip as a metric sees it.

    Attributes:
        frames: uint8 [T, H, W, 3]; frame n lasts from n / fps to (n + 1) / fps.
        waveform: float32 [N], mono; sample n is at n / sample_rate.
        number: of the clip in its set, the same whichever process measures it.
        real: whether it is of the real set that generated clips are held against.
        caption: the prompt; empty when there is none.
        truth: planted facts of the prompt, as synthetic clips have them; empty elsewhere.
        real_waveform: sound of the real clip with the same prompt, where there is one.
    """

    frames: np.ndarray
    waveform: np.ndarray
    number: int = 0
    real: bool = False
    caption: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)
    real_waveform: np.ndarray | None = None


def planted_truth(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Planted facts among what is known about a clip: under ``truth``, as synthetic clips have them, or beside it."""
    inner = fields.get("truth")
    return inner if isinstance(inner, Mapping) else fields


def check_clip(frames: Any, waveform: Any, *, fps: float, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of one clip, seen to be what metrics expect.

    Args:
        frames: uint8 [T, H, W, 3], or the same in floats of whole numbers 0..255.
        waveform: [N], mono.
        fps: frames per second.
        sample_rate: in Hz.

    Raises:
        OviError: for another shape or range, values that are not finite, or a sound that lasts much longer or shorter
            than the picture (which a wrong rate does).
    """
    pictures, sound = (np.asarray(torch.as_tensor(value).cpu()) for value in (frames, waveform))
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or not len(pictures):
        raise OviError(f"frames must be [T, H, W, 3], got {list(pictures.shape)}")
    if sound.ndim != 1 or not len(sound):
        raise OviError(f"waveform must be [N], mono and not empty, got {list(sound.shape)}")
    if pictures.dtype != np.uint8:
        if not np.isfinite(pictures).all():
            raise OviError("frames hold NaN or infinite values: what generated them has failed")
        if pictures.min() < 0 or pictures.max() > 255 or (pictures.max() <= 1 and pictures.dtype.kind == "f"):
            raise OviError(
                f"frames must be uint8, 0..255, got {pictures.dtype} from {pictures.min()} to {pictures.max()}"
            )
        pictures = np.rint(pictures).astype(np.uint8)
    sound = sound.astype(np.float32, copy=False)
    if not np.isfinite(sound).all():
        raise OviError("the waveform holds NaN or infinite values: what generated it has failed")
    seen_s, heard_s = len(pictures) / fps, len(sound) / sample_rate
    if abs(seen_s - heard_s) > max(2 / fps, _RATE_TOLERANCE * seen_s):
        raise OviError(
            f"the picture lasts {seen_s:.3f} s ({len(pictures)} frames at {fps:g} fps), the sound {heard_s:.3f} s "
            f"({len(sound)} samples at {sample_rate} Hz): is one of the rates wrong?"
        )
    return pictures, sound


class ClipMetric(Metric, ABC):
    """Sums of figures over clips of frames and sound.

    Subclasses name their sums in ``SUMS``, add to them in ``add_clip`` and turn them into figures in ``compute``;
    ``clips`` counts all generated clips that came, and ``LOWER``, ``HIGHER`` and ``NEITHER`` say which way each figure
    gets better. Tags are ``<what>_<by which network or method>``, with
    ``<tag>_n`` (clips it rests on) and, where it is not defined for every clip, ``<tag>_coverage`` beside it.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
    """

    SUMS: tuple[str, ...] = ()
    LOWER: tuple[str, ...] = ()
    """Figures that are better the lower they are: tags, or patterns of tags (``*``)."""
    HIGHER: tuple[str, ...] = ()
    """Those that are better the higher they are."""
    NEITHER: tuple[str, ...] = ("*_n", "*_n_real", "*_coverage", "*_windows", "*_windows_real")
    """Those that only say what others rest on, also where a pattern above fits them."""
    USES_REAL = False
    """Whether generated clips are held against a set of real ones: ``update`` then wants both, told by ``real``."""
    USES_COUNTERPART = False
    """Whether ``real_waveform`` is of use: the sound of the real clip with the same prompt."""
    full_state_update = False
    clips: Tensor

    def __init__(self, fps: float, sample_rate: int, **metric_knobs: Any) -> None:
        super().__init__(**metric_knobs)
        if not fps > 0 or not sample_rate > 0:
            raise OviError(f"fps and sample_rate must be above 0, got {fps} and {sample_rate}")
        self.fps, self.sample_rate = float(fps), int(sample_rate)
        for name in ("clips", *self.SUMS):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        frames: np.ndarray | Tensor,
        waveform: np.ndarray | Tensor,
        *,
        number: int = 0,
        real: bool = False,
        caption: str = "",
        truth: Mapping[str, Any] | None = None,
        real_waveform: np.ndarray | None = None,
    ) -> None:
        """Add one clip; arguments as ``MeasuredClip`` has them.

        Raises:
            OviError: as ``check_clip`` does, or for a real clip where none is wanted.
        """
        pictures, sound = check_clip(frames, waveform, fps=self.fps, sample_rate=self.sample_rate)
        if real and not self.USES_REAL:
            raise OviError(f"{type(self).__name__} knows no real set: measure real clips with an instance of their own")
        if not real:
            self.clips += 1
        self.add_clip(MeasuredClip(pictures, sound, number, real, caption, truth or {}, real_waveform))

    @classmethod
    def direction(cls, tag: str) -> Direction:
        """Which way one of its figures gets better.

        Args:
            tag: as ``compute`` gives it.

        Raises:
            KeyError: when the metric does not say, or does not have it.
        """
        if cls.only_counts(tag):
            return None
        ways: tuple[tuple[Direction, tuple[str, ...]], ...] = ("lower", cls.LOWER), ("higher", cls.HIGHER)
        for way, patterns in ways:
            if any(fnmatchcase(tag, pattern) for pattern in patterns):
                return way
        raise KeyError(tag)

    @classmethod
    def only_counts(cls, tag: str) -> bool:
        """Whether one of its figures says what others rest on, and is neither better high nor low."""
        return any(fnmatchcase(tag, pattern) for pattern in cls.NEITHER)

    @abstractmethod
    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip and add to the sums."""

    def identity(self) -> dict[str, Any]:
        """Plain data that decides the figures of a given set of clips: statistics of the real set are kept under it.

        Subclasses add their knobs and, where a network is asked, its ``digest``.
        """
        return {"metric": type(self).__name__, "fps": self.fps, "sample_rate": self.sample_rate}

    # The real set of a metric that uses one; others have none.

    def floor(self) -> dict[str, Tensor]:
        """The figures of one half of the real set against the other, by the same tags: at equal numbers of clips no
        model can be told from perfect below them. Synchronises processes, as ``compute`` does."""
        return {}

    def real_state(self) -> dict[str, Tensor]:
        """Statistics of the real set over all processes, to be kept; every process must ask."""
        return {}

    def load_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take statistics of the real set as ``real_state`` gave them, in place of measuring it; on one process only,
        since sums over processes are taken later."""
        raise OviError(f"{type(self).__name__} keeps no statistics of a real set")
