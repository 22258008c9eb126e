"""The clock of a pair of latents: rates are configured, everything else is derived from them.

One place answers how many latent frames or audio tokens a clip has, where each lies in seconds, and how the two rates
relate. No other module multiplies a rate by a length.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ovi.errors import OviError


@dataclass(frozen=True)
class Clock:
    """Rates of a video latent and an audio latent that belong together.

    The defaults are those of the published Ovi (Wan2.2 VAE at 24 fps, MMAudio 16 kHz VAE).

    Args:
        fps: pixel frames per second.
        video_stride: pixel frames per latent frame.
        causal_first_frame: whether the first latent frame holds one pixel frame only, as in causal video VAEs.
        sample_rate: audio samples per second, in Hz.
        audio_stride: samples per audio token.
    """

    fps: float = 24.0
    video_stride: int = 4
    causal_first_frame: bool = True
    sample_rate: int = 16000
    audio_stride: int = 512

    def __post_init__(self) -> None:
        for name in ("fps", "video_stride", "sample_rate", "audio_stride"):
            if not getattr(self, name) > 0:
                raise OviError(f"clock: {name} must be positive, got {getattr(self, name)!r}")

    @property
    def latent_fps(self) -> float:
        """Latent video frames per second, after the first."""
        return self.fps / self.video_stride

    @property
    def tokens_per_s(self) -> float:
        """Audio tokens per second."""
        return self.sample_rate / self.audio_stride

    @property
    def ratio(self) -> float:
        """Latent frames per audio token: 0.192 with the published rates."""
        return self.latent_fps / self.tokens_per_s

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of ``num_frames`` pixel frames: 121 -> 31.

        Raises:
            OviError: when the frames do not fill the last latent frame.
        """
        first = 1 if self.causal_first_frame else 0
        if num_frames < max(1, first) or (num_frames - first) % self.video_stride:
            near = max(0, round((num_frames - first) / self.video_stride)) * self.video_stride + first
            near = max(near, first or self.video_stride)
            form = f"{self.video_stride}n{' + 1' if first else ''}"
            raise OviError(f"{num_frames} frames do not fit latent frames: need {form}, the nearest is {near}")
        return (num_frames - first) // self.video_stride + first

    def num_frames(self, num_latent_frames: int) -> int:
        """Pixel frames that decode from ``num_latent_frames``: 31 -> 121."""
        first = 1 if self.causal_first_frame else 0
        return (num_latent_frames - first) * self.video_stride + first

    def num_samples(self, num_frames: int) -> int:
        """Audio samples that sound while ``num_frames`` pixel frames are shown, rounded to the nearest sample."""
        return round(num_frames * self.sample_rate / self.fps)

    def num_audio_tokens(self, num_samples: int) -> int:
        """Whole audio tokens in ``num_samples``: 80,640 -> 157."""
        return num_samples // self.audio_stride

    def lengths(self, num_frames: int) -> tuple[int, int]:
        """(latent frames, audio tokens) of a clip of ``num_frames`` pixel frames."""
        return self.num_latent_frames(num_frames), self.num_audio_tokens(self.num_samples(num_frames))

    def duration_s(self, num_frames: int) -> float:
        """Length in seconds of ``num_frames`` pixel frames."""
        return num_frames / self.fps

    def video_times_s(self, num_latent_frames: int) -> list[float]:
        """Centre of every latent frame's span of pixel frames, in seconds; pixel frame n lasts from n/fps on."""
        if not self.causal_first_frame:
            return [(i + 0.5) * self.video_stride / self.fps for i in range(num_latent_frames)]
        rest = [(1 + (i - 0.5) * self.video_stride) / self.fps for i in range(1, num_latent_frames)]
        return [0.5 / self.fps, *rest][:num_latent_frames]

    def audio_times_s(self, num_tokens: int) -> list[float]:
        """Centre of every audio token, in seconds."""
        return [(j + 0.5) / self.tokens_per_s for j in range(num_tokens)]

    def rope_factor(self, num_frames: int) -> float:
        """Factor that published Ovi stretches audio positions by: latent frames over fractional tokens of the clip.

        121 frames give 31 / (121/24 s * 31.25 tokens/s) = 0.19676. It counts the first latent frame as a whole one, so
        a clock made with it drifts against true time; see ``ROPE_ALIGNMENTS``.
        """
        return self.num_latent_frames(num_frames) / (self.duration_s(num_frames) * self.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Clock) -> list[str]:
        """What differs, one phrase per rate; empty when both clocks tell the same time."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{k} {mine[k]:g} against {theirs[k]:g}" for k in mine if not math.isclose(mine[k], theirs[k], rel_tol=1e-9)
        ]
