"""What is asked of a file: so many pictures of a size, and the sound that goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ovi.data.media.clip import Crop, MediaError
from ovi.errors import OviError

VariableFrameRate = Literal["reject", "resample"]
WithoutSound = Literal["reject", "silence"]


@dataclass(frozen=True)
class Span:
    """What every clip read in one call has in common; ``read_clip`` says what each means.

    Raises:
        OviError: for sizes, rates and words that make no clip.
    """

    fps: float
    num_frames: int
    height: int
    width: int
    sample_rate: int
    variable_frame_rate: VariableFrameRate
    without_sound: WithoutSound = "reject"
    crop: Crop | None = None

    def __post_init__(self) -> None:
        may_be_absent = {"height": not self.width, "width": not self.height, "sample_rate": self.height > 0}
        for name in ("fps", "num_frames", "height", "width", "sample_rate"):
            value = getattr(self, name)
            if not value > 0 and not (value == 0 and may_be_absent.get(name, False)):
                raise OviError(f"{name} must be positive, got {value!r}")
        if self.without_sound not in ("reject", "silence"):
            raise OviError(f"without_sound is 'reject' or 'silence', got {self.without_sound!r}")
        if self.variable_frame_rate not in ("reject", "resample"):
            raise OviError(f"variable_frame_rate is 'reject' or 'resample', got {self.variable_frame_rate!r}")

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_frames / self.fps

    @property
    def num_samples(self) -> int:
        """Samples of sound."""
        return round(self.num_frames * self.sample_rate / self.fps)


def ends_early(
    path: str | Path, what: str, has_s: float, needs_s: float, promised_s: float, start_s: float
) -> MediaError:
    """The error for a stream that ends early: its header tells a damaged file from a short one."""
    if promised_s >= needs_s:
        return MediaError(
            "truncated",
            f"{path}: {what} ends {has_s:.3f} s in, though the header promises {promised_s:.3f} s; "
            "the file is cut off or damaged",
        )
    return MediaError(
        "too_short",
        f"{path}: {what} ends {has_s:.3f} s in, but the clip lasts from {start_s:.3f} to {needs_s:.3f} s; "
        "lower num_frames or start_s",
    )
