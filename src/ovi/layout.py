"""What a set of latents looks like to a network: channels, text width, and the clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ovi.clock import Clock


@dataclass(frozen=True)
class LatentLayout:
    """The wiring between latents and a twin; comes from a shard set's index or from a checkpoint.

    Args:
        video_channels: channels of a video latent [C, F, H, W].
        audio_channels: channels of an audio latent [L, C].
        text_dim: width of a text embedding.
        text_len: the most text tokens a prompt has.
        clock: the rates of both latents.
    """

    video_channels: int
    audio_channels: int
    text_dim: int
    text_len: int
    clock: Clock = field(default_factory=Clock)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentLayout:
        return cls(**{**values, "clock": Clock(**values["clock"])})

    def differences(self, other: LatentLayout) -> list[str]:
        """What differs, one phrase each; empty when latents of one layout can be fed to a network of the other."""
        names = ("video_channels", "audio_channels", "text_dim", "text_len")
        mine = [
            f"{n} {getattr(self, n)} against {getattr(other, n)}"
            for n in names
            if getattr(self, n) != getattr(other, n)
        ]
        return mine + self.clock.differences(other.clock)
