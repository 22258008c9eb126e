"""Frechet video distance, its protocol as data.

``fvd_i3d_16f`` is only what the field means by it: the standard I3D file, 16 consecutive frames, covariance divided by
n (StyleGAN-V, 2112.14683, appendix B). Everything else is ``fd_<network>_<frames>f`` with what differs behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, MeasuredClip
from ovi.metrics.feature_distance import COVARIANCES, FeatureDistance
from ovi.metrics.features.base import VIDEO_FEATURES, VideoExtractor, build_features
from ovi.metrics.frame_rate import frames_at
from ovi.metrics.kernel import MAX_SAMPLES

WINDOWS = ("first", "all")


@dataclass(frozen=True)
class VideoProtocol:
    """Which frames of a clip are looked at, and how their features become a figure.

    Attributes:
        num_frames: of one window.
        stride: every so manyth frame.
        covariance: ``biased`` (divided by n) or ``unbiased`` (by n - 1).
        windows: ``first`` of each clip, or ``all`` that fit without sharing a frame.
        fps_at: frames per second that are looked at, of clips that have more; None looks at all.
        resolution: [H, W] to which the network resizes; told, not chosen.

    Raises:
        OviError: for values outside these.
    """

    num_frames: int = 16
    stride: int = 1
    covariance: str = "biased"
    windows: str = "first"
    fps_at: float | None = None
    resolution: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.stride < 1:
            raise OviError(f"num_frames and stride must be 1 or more, got {self.num_frames} and {self.stride}")
        if self.covariance not in COVARIANCES:
            raise OviError(f"covariance must be {' or '.join(COVARIANCES)}, got {self.covariance!r}")
        if self.windows not in WINDOWS:
            raise OviError(f"windows must be {' or '.join(WINDOWS)}, got {self.windows!r}")
        if self.fps_at is not None and not self.fps_at > 0:
            raise OviError(f"fps_at must be above 0, got {self.fps_at}")

    @property
    def frames_needed(self) -> int:
        """Frames from the first to the last of a window."""
        return (self.num_frames - 1) * self.stride + 1

    def sampling(self) -> str:
        """What tags say of the frames: ``16f``, or for instance ``16f_s2_8fps_all``."""
        rate = "" if self.fps_at is None else f"_{self.fps_at:g}fps"
        stride = "" if self.stride == 1 else f"_s{self.stride}"
        return f"{self.num_frames}f{stride}{rate}{'_all' if self.windows == 'all' else ''}"

    def tag(self, network: str) -> str:
        """Of the Frechet distance over the features of a network; ``fvd`` is only for the standard I3D."""
        kind = "fvd" if network == "i3d" else "fd"
        return f"{kind}_{network}_{self.sampling()}{'_unbiased' if self.covariance == 'unbiased' else ''}"

    def kernel_tag(self, network: str) -> str:
        """Of the kernel distance over them."""
        return f"kd_{network}_{self.sampling()}"


def select_frames(frames: np.ndarray, protocol: VideoProtocol, *, fps: float | None = None) -> np.ndarray:
    """The windows of a clip that a protocol looks at.

    Args:
        frames: uint8 [T, H, W, 3].
        protocol: says which.
        fps: of the clip; only where the protocol has ``fps_at``.

    Returns:
        [W, num_frames, H, W, 3], a copy; one window unless ``windows`` is ``all``.

    Raises:
        OviError: when the clip is too short, or has fewer frames per second than ``fps_at``.
    """
    at, rate = np.arange(len(frames)), ""
    if protocol.fps_at is not None:
        if fps is None or fps < protocol.fps_at:
            raise OviError(f"fps_at={protocol.fps_at:g} must be at most the clips' frame rate, which is {fps}")
        at = frames_at(at, fps, protocol.fps_at)
        rate = f", fps_at={protocol.fps_at:g}"
    if len(at) < protocol.frames_needed:
        raise OviError(
            f"a window spans {protocol.frames_needed} frames (num_frames={protocol.num_frames}, "
            f"stride={protocol.stride}{rate}), the clip has {len(at)}: lower one of these, or take longer clips"
        )
    hop = protocol.num_frames * protocol.stride
    fit = 1 + (len(at) - protocol.frames_needed) // hop if protocol.windows == "all" else 1
    within = np.arange(protocol.num_frames) * protocol.stride
    return frames[at[np.arange(fit)[:, None] * hop + within]]


@METRICS.register("fvd")
class FrechetVideoDistance(FeatureDistance):
    """Frechet and kernel distance between generated and real pictures, over the features of a video network.

    Tags: ``fvd_i3d_16f`` for the standard I3D alone, ``fd_<network>_<frames>f`` for others, ``kd_<network>_<frames>f``
    for the kernel distance; ``_s<stride>``, ``_<rate>fps``, ``_all`` and ``_unbiased`` follow where they differ from
    the standard. Compare only figures of equal n, frame rate and resolution.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz; unused.
        features: name of a video network, or ``{"name": ..., knob: value}``.
        num_frames: of a window, from the start of each clip; None is what the network was trained on.
        stride: look at every so manyth frame.
        covariance: ``biased`` (divided by n, as StyleGAN-V does) or ``unbiased`` (by n - 1).
        windows: ``first`` of each clip, or ``all`` that fit without sharing a frame.
        fps_at: look at so many frames per second, of clips that have more; None looks at all.
        kernel: also give the kernel distance: the better figure for few clips.
        max_samples: features a set that the kernel distance rests on.

    Raises:
        OviError: when the network or its weights cannot be had, or for values outside these.
    """

    LOWER = ("fvd_*", "fd_*", "kd_*")

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        features: str | Mapping[str, Any] = "transnetv2",
        num_frames: int | None = None,
        stride: int = 1,
        covariance: str = "biased",
        windows: str = "first",
        fps_at: float | None = None,
        kernel: bool = True,
        max_samples: int = MAX_SAMPLES,
        **metric_knobs: Any,
    ) -> None:
        extractor: VideoExtractor = build_features(VIDEO_FEATURES, features)
        frames = extractor.num_frames if num_frames is None else num_frames
        height, width = extractor.resolution
        protocol = VideoProtocol(frames, stride, covariance, windows, fps_at, (height, width))
        if fps_at is not None and fps_at > fps:
            raise OviError(f"fps_at={fps_at:g} must be at most the clips' frame rate, which is {fps:g}")
        super().__init__(
            fps,
            sample_rate,
            extractor=extractor,
            tag=protocol.tag(extractor.name),
            kernel_tag=protocol.kernel_tag(extractor.name),
            covariance=covariance,
            kernel=kernel,
            max_samples=max_samples,
            **metric_knobs,
        )
        self.protocol = protocol

    def identity(self) -> dict[str, Any]:
        """What decides the figures."""
        return {**super().identity(), "protocol": asdict(self.protocol)}

    def features_of(self, clip: MeasuredClip) -> Tensor:
        """Features [windows, D], one window after the other: all at once may not fit."""
        windows = torch.from_numpy(select_frames(clip.frames, self.protocol, fps=self.fps))
        return torch.cat([self.extractor(window[None]) for window in windows])
