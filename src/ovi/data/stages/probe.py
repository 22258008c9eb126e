"""Files that cannot give a clip, left out by their header before anything is decoded."""

from __future__ import annotations

from ovi.data.media import probe
from ovi.data.stages.base import STAGES, Candidate, Filter, Limit, Rejected


@STAGES.register("probe")
class Probe(Filter):
    """Keeps files that open and have picture, sound, length and rate as asked for.

    Figures: ``file_s``, ``fps``, ``sample_rate``.

    Args:
        picture: whether there must be one.
        sound: whether there must be a sound track.
        min_s: shortest file, in seconds; None is no limit.
        max_s: longest file, in seconds; None is no limit.
        min_fps: slowest picture rate, frames per second; None is no limit.
        max_fps: fastest picture rate, frames per second; None is no limit.
        min_sample_rate: lowest rate of the sound, in Hz; None is no limit.
    """

    name = "probe"
    needs = frozenset()

    def __init__(
        self,
        *,
        picture: bool = True,
        sound: bool = True,
        min_s: float | None = None,
        max_s: float | None = None,
        min_fps: float | None = None,
        max_fps: float | None = None,
        min_sample_rate: float | None = None,
    ) -> None:
        self.picture, self.sound = picture, sound
        self.limits = (
            Limit("file_s", "too_short", "probe.min_s", low=min_s),
            Limit("file_s", "too_long", "probe.max_s", high=max_s),
            Limit("fps", "slow_frame_rate", "probe.min_fps", low=min_fps),
            Limit("fps", "fast_frame_rate", "probe.max_fps", high=max_fps),
            Limit("sample_rate", "low_sample_rate", "probe.min_sample_rate", low=min_sample_rate),
        )

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        info = probe(candidate.path)
        figures = {"file_s": info.duration_s}
        if info.has_video:
            figures["fps"] = info.fps
        if info.has_audio:
            figures["sample_rate"] = info.sample_rate
        candidate = candidate.with_figures(figures)
        if self.picture and not info.has_video:
            return self.reject(
                candidate, "no_video", f"{candidate.path}: has no video stream; probe.picture asks for one"
            )
        if self.sound and not info.has_audio:
            return self.reject(
                candidate, "no_audio", f"{candidate.path}: has no audio stream; probe.sound asks for one"
            )
        return self.within_limits(candidate)
