"""What every stage agrees on: candidates go in, candidates come out, and whatever is left out is handed over with why.

A candidate is a span of a media file. It gathers figures on its way (seconds, decibels, speeds ...), whether a stage
rejects it or not, so that a report can show where thresholds fall. Stages are generators over candidates: nothing runs
before somebody asks for the next one, and only stages of level "set" hold all of them, without their clips.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from ovi.data.media import Clip, Crop, MediaError, VariableFrameRate, read_clip
from ovi.data.sources import ClipFormat, SourceItem
from ovi.data.stopwatch import step, stepping
from ovi.errors import OviError
from ovi.registry import Registry

STAGES = Registry("stage", group="stage", doc="steps from media files to the clips worth encoding")

Level = Literal["file", "clip", "set"]


@dataclass(frozen=True)
class Candidate:
    """A span of a media file on its way to becoming a clip.

    Args:
        path: of the file.
        key: unique and stable name; stages that split add to it.
        file: the path as captions and reports name it.
        start_s: where the span begins, in seconds after the file's first picture.
        duration_s: of the span; None is up to the file's end.
        caption: prompt; empty without one.
        extra: further fields of the caption file.
        figures: what the stages have measured so far, by name.
        form: length, size and rates of the clip to read; set by the stage ``windows``.
        variable_frame_rate: "reject" or "resample", as for ``read_clip``.
        crop: rectangle to read instead of the whole picture.
        missing: "video" of sound alone, "audio" of pictures alone.
        clip: pictures and sound, once a stage has read them.
    """

    path: Path
    key: str
    file: str = ""
    start_s: float = 0.0
    duration_s: float | None = None
    caption: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    form: ClipFormat | None = None
    variable_frame_rate: str = "reject"
    crop: Crop | None = None
    missing: frozenset[str] = frozenset()
    clip: Clip | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, item: SourceItem) -> Candidate:
        """The whole file of a source's item."""
        return cls(item.path, item.key, item.file, caption=item.caption, extra=item.extra)

    def with_figures(self, figures: Mapping[str, float]) -> Candidate:
        """The same with further figures."""
        return replace(self, figures={**self.figures, **{name: float(value) for name, value in figures.items()}})

    def decoded(self) -> Candidate:
        """The same with its clip read; reading happens once.

        Raises:
            MediaError: when the file cannot give it.
            OviError: when no stage has said what a clip is.
        """
        if self.clip is not None:
            return self
        if self.form is None:
            raise OviError(
                f"{self.path}: is a whole file, and this stage looks at clips: put the stage windows before it"
            )
        with step("read"):
            clip = read_clip(
                self.path,
                start_s=self.start_s,
                crop=self.crop,
                variable_frame_rate=cast(VariableFrameRate, self.variable_frame_rate),
                **asdict(self.form),
            )
        return replace(self, clip=clip)

    def record(self) -> dict[str, Any]:
        """JSON-ready: where it comes from and its figures; a figure that is not a number is None."""
        return {
            "file": self.file or str(self.path),
            "start_s": self.start_s,
            "duration_s": self.duration_s,
            "key": self.key,
            "figures": {name: _finite(value) for name, value in self.figures.items()},
        }


@dataclass(frozen=True)
class Rejected:
    """A candidate left out, and why.

    Args:
        candidate: with the figures known by then.
        stage: name of the stage that left it out.
        reason: short code to count by.
        message: what came, what was expected and which knob to turn.
        figure: name of the figure that decided; None where none did.
        threshold: its limit.
    """

    candidate: Candidate
    stage: str
    reason: str
    message: str
    figure: str | None = None
    threshold: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The figure that decided, by its name; empty where none did."""
        return {} if self.figure is None else {self.figure: self.candidate.figures[self.figure]}

    def record(self) -> dict[str, Any]:
        """A line of ``rejected.jsonl``."""
        about = self.candidate.record()
        return {
            "file": about["file"],
            "start_s": about["start_s"],
            "reason": self.reason,
            "message": self.message,
            "stage": self.stage,
            "figure": self.figure,
            "value": None if self.figure is None else about["figures"][self.figure],
            "threshold": self.threshold,
            "duration_s": about["duration_s"],
            "key": about["key"],
            "figures": about["figures"],
        }


RejectedSink = Callable[[Rejected], None]
"""Takes what a stage leaves out: ``list.append`` will do."""


@dataclass(frozen=True)
class Limit:
    """Range within which a figure must lie, ends included; a figure that is no number passes.

    Args:
        figure: its name.
        reason: code for what lies outside.
        knob: of the stage, for the message.
        low, high: None is no limit.
    """

    figure: str
    reason: str
    knob: str
    low: float | None = None
    high: float | None = None

    def broken(self, value: float) -> float | None:
        """The end that a value lies beyond, if any."""
        if self.low is not None and value < self.low:
            return self.low
        if self.high is not None and value > self.high:
            return self.high
        return None


class Stage(ABC):
    """A step that passes candidates on, changes, splits or rejects them.

    Attributes:
        name: its name in the registry, as rejections name it.
        level: "file" looks at whole files or spans of them, "clip" at clips of a fixed form, which it reads, and
            "set" at all clips together: a ``SetStage``.
        limits: ranges its figures must keep to, for reports.
        needs: "video", "audio" or both: ``run_stages`` passes candidates that lack one of them by, without a figure.
    """

    name: ClassVar[str]
    level: ClassVar[Level] = "file"
    needs: ClassVar[frozenset[str]] = frozenset({"video", "audio"})
    limits: tuple[Limit, ...] = ()

    @abstractmethod
    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        """Pass candidates on, one by one.

        Args:
            candidates: taken as they are needed.
            rejected: called with each that is left out.
        """

    def reject(
        self, candidate: Candidate, reason: str, message: str, figure: str | None = None, threshold: float | None = None
    ) -> Rejected:
        """A rejection by this stage."""
        return Rejected(candidate, self.name, reason, message, figure, threshold)

    def unreadable(self, candidate: Candidate, error: MediaError | OSError) -> Rejected:
        """The rejection of a candidate whose file cannot be read."""
        if isinstance(error, MediaError):
            return self.reject(candidate, error.reason, str(error))
        return self.reject(candidate, "unreadable", f"{candidate.path}: {error.strerror or error}")

    def within_limits(self, candidate: Candidate) -> Candidate | Rejected:
        """The candidate, or its rejection by the first limit that one of its figures breaks."""
        for limit in self.limits:
            value = candidate.figures.get(limit.figure, math.nan)
            end = limit.broken(value)
            if end is not None:
                asked = f"at least {end:g}" if end == limit.low and value < end else f"at most {end:g}"
                message = f"{candidate.path}: {limit.figure} is {value:.4g}, {limit.knob} asks for {asked}"
                return self.reject(candidate, limit.reason, message, limit.figure, end)
        return candidate


class Filter(Stage):
    """A stage that takes candidates one at a time and keeps each or not."""

    @abstractmethod
    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        """The candidate with its figures, perhaps changed, or its rejection.

        Raises:
            MediaError, OSError: when the file cannot be read; the candidate is then rejected.
        """

    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        for candidate in candidates:
            try:
                verdict = self.judge(candidate)
            except (MediaError, OSError) as error:
                verdict = self.unreadable(candidate, error)
            if isinstance(verdict, Rejected):
                # Whoever keeps rejections must not keep their pictures.
                rejected(replace(verdict, candidate=replace(verdict.candidate, clip=None)))
            else:
                yield verdict


class ClipFilter(Filter):
    """A filter that measures clips and keeps those whose figures lie within ``limits``."""

    level = "clip"

    @abstractmethod
    def measure(self, clip: Clip) -> Mapping[str, float]:
        """Figures of a clip, by name."""

    def judge(self, candidate: Candidate) -> Candidate | Rejected:
        candidate = candidate.decoded()
        assert candidate.clip is not None
        return self.within_limits(candidate.with_figures(self.measure(candidate.clip)))


@dataclass(frozen=True)
class Verdict:
    """Why a stage of level "set" leaves a clip out.

    Args:
        place: of the clip among those it was given.
        reason: short code to count by.
        message: what is said of the clip, and which knob to turn; its file is named before it.
        figures: what was measured, by name.
        figure: name of the figure that decided; None where none did.
        threshold: its limit.
    """

    place: int
    reason: str
    message: str
    figures: Mapping[str, float] = field(default_factory=dict)
    figure: str | None = None
    threshold: float | None = None


class SetStage(Stage):
    """A stage that compares all clips: each is looked at alone, anywhere; what was seen is then joined, once."""

    level = "set"

    @abstractmethod
    def look(self, clip: Clip) -> Any:
        """A clip's signature, JSON-ready and small: those of all clips are held together."""

    @abstractmethod
    def join(self, keys: Sequence[str], signatures: Iterable[Any]) -> Iterator[Verdict]:
        """The clips to leave out, whatever process looked at which.

        A verdict must not hang on clips that stand behind: when files are added to a set, what is there stays.

        Args:
            keys: of the clips, ascending; those of files added later stand behind, ascending as well.
            signatures: of the same clips.
        """

    def left_out(self, candidate: Candidate, verdict: Verdict) -> Rejected:
        """The rejection that a verdict on a candidate is."""
        message = f"{candidate.path}: from {candidate.start_s:.3f} s {verdict.message}"
        candidate = candidate.with_figures(verdict.figures)
        return self.reject(candidate, verdict.reason, message, verdict.figure, verdict.threshold)

    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        """Pass candidates on by key, once all have been looked at."""
        looked: list[tuple[Candidate, Any]] = []
        for candidate in candidates:
            try:
                clip = candidate.decoded().clip
            except (MediaError, OSError) as error:
                rejected(self.unreadable(candidate, error))
                continue
            assert clip is not None
            looked.append((replace(candidate, clip=None), self.look(clip)))
        looked.sort(key=lambda entry: entry[0].key)
        found = self.join([candidate.key for candidate, _ in looked], (signature for _, signature in looked))
        verdicts = {verdict.place: verdict for verdict in found}
        for place, (candidate, _) in enumerate(looked):
            if place in verdicts:
                rejected(self.left_out(candidate, verdicts[place]))
            else:
                yield candidate


def run_stages(
    stages: Mapping[str, Stage | None], candidates: Iterable[Candidate], rejected: RejectedSink
) -> Iterator[Candidate]:
    """Chain stages in the order given.

    Args:
        stages: by any name; None switches one off.
        candidates: what goes in, such as ``Candidate.of`` of a source's items.
        rejected: called with each candidate that a stage leaves out.

    Returns:
        What is left, as it comes.

    Raises:
        OviError: for stages in an order that cannot work, or one that was not given its wiring.
    """
    reached = ""
    stream: Iterator[Candidate] = iter(candidates)
    for name, stage in stages.items():
        if stage is None:
            continue
        if not isinstance(stage, Stage):
            raise OviError(f"stage {name}: expected a Stage or null, got {type(stage).__name__}; call it on its wiring")
        if stage.level == "file" and reached:
            raise OviError(f"stage {name} looks at files and must come before {reached}, which looks at clips")
        if stage.level != "file":
            reached = reached or name
        stream = stepping(name, partial(_whole_ones, stage, rejected), stream)
    return stream


def _whole_ones(stage: Stage, rejected: RejectedSink, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Candidates through a stage, those that lack what it needs past it, in order."""
    past: deque[Candidate] = deque()

    def whole() -> Iterator[Candidate]:
        for candidate in candidates:
            if stage.needs & candidate.missing:
                past.append(candidate)
            else:
                yield candidate

    for candidate in stage(whole(), rejected):
        while past:
            yield past.popleft()
        yield candidate
    yield from past


def limits_of(stages: Mapping[str, Stage | None]) -> dict[str, list[float]]:
    """The ends of all limits by figure, as a report marks them."""
    ends: dict[str, list[float]] = {}
    for stage in stages.values():
        for limit in stage.limits if stage is not None else ():
            ends.setdefault(limit.figure, []).extend(end for end in (limit.low, limit.high) if end is not None)
    return ends


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
