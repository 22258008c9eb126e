"""Several metrics over one stream of clips: real figures beside generated ones, and no failure stops the others."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import ClipMetric, MeasuredClip, check_clip

MetricFactory = Callable[[float, int], ClipMetric]
"""Builds a metric from (fps, sample_rate), as the nodes of the registry do."""

CACHE_FORMAT = 1


@dataclass
class Figures:
    """What came out.

    Attributes:
        generated: figures of the generated clips by tag.
        real: the same of the real clips. For distances that is one half of them against the other: the floor under
            which, at equal numbers of clips, no model can be told from perfect.
        num_generated: clips measured, over all processes.
        num_real: real clips measured; None where kept statistics stand for all of them.
        num_unusable: generated clips that could not be measured at all (NaN, no sound, wrong length).
        failed: why a metric was given up, by its name.
        clips: of the generated clips one by one, by number, where they were asked for.
    """

    generated: dict[str, float] = field(default_factory=dict)
    real: dict[str, float] = field(default_factory=dict)
    num_generated: int = 0
    num_real: int | None = 0
    num_unusable: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    clips: list[ClipFigures] = field(default_factory=list)


@dataclass
class ClipFigures:
    """Figures of one generated clip: of the metrics that average over clips, without what only counts.

    Attributes:
        number: of the clip in its set.
        caption: its prompt.
        figures: by tag; NaN where one is not defined for this clip.
    """

    number: int
    caption: str
    figures: dict[str, float] = field(default_factory=dict)


class MetricSuite:
    """Feeds metrics clip by clip, generated and real, and gathers their figures over all processes.

    A metric that raises is given up: reported once through ``warn``, on every process alike, its figures absent from
    then on. A clip that no metric could use (values that are not finite, sound of another length) is left out and
    counted.

    The real set is measured once: with a cache folder its statistics are kept on disk under a key of the metric's
    identity (its knobs, its network's checksum) and ``real_set``, and read instead of measuring again.

    Args:
        factories: by name, builds a metric; None switches one off.
        fps: frames per second of all clips.
        sample_rate: of their sound, in Hz.
        warn: told of failures, in full sentences.
        cache: folder for statistics of real sets; None keeps none.
        num_real: clips of the whole real set: statistics of fewer, some being damaged, are not kept.
        by_clip: whether to give the figures of each generated clip too. Nothing is computed twice for it.
        real_set: plain data that names the real clips for the cache: their checksums, how many, how they are read.

    Raises:
        OviError: when a metric cannot be built, for instance for want of its weights: before anything long starts.
    """

    def __init__(
        self,
        factories: Mapping[str, MetricFactory | None],
        *,
        fps: float,
        sample_rate: int,
        warn: Callable[[str], None],
        cache: Path | None = None,
        real_set: Any = None,
        num_real: int | None = None,
        by_clip: bool = False,
    ) -> None:
        self.by_clip = by_clip
        self._clips: list[tuple[int, str, dict[str, dict[str, float]]]] = []
        self.fps, self.sample_rate, self.warn = fps, sample_rate, warn
        self.cache, self.real_set, self.num_real = cache, real_set, num_real
        self.failed: dict[str, str] = {}
        self._told: set[str] = set()
        self._metrics: dict[str, ClipMetric] = {}
        self._of_real: dict[str, ClipMetric] = {}
        self._kept: dict[str, dict[str, float]] = {}
        self._unusable, self._num_generated, self._num_real = 0, 0, 0
        missing: str | None = None
        for name, factory in factories.items():
            if factory is None:
                continue
            try:
                self._metrics[name] = metric = factory(fps, sample_rate)
            except OviError as error:
                missing = f"metric {name!r}: {error}. Or switch it off: metrics.{name}=null"
                break
            if not metric.USES_REAL:
                # A shallow copy has sums of its own after a reset, and the same networks: they may be large.
                self._of_real[name] = copy.copy(metric)
                self._of_real[name].reset()
        # Weights may lack on one machine alone: the others must not wait for it.
        if not _all_processes(missing is None):
            raise OviError(missing or "a metric cannot be built by another process; its message says why")
        self._loaded = set(self._read_cache())

    @property
    def names(self) -> list[str]:
        """Metrics that are on and have not failed."""
        return [name for name in self._metrics if name not in self.failed]

    @property
    def wants_real(self) -> bool:
        """Whether real clips are needed: some metric has not seen them, in this run or in an earlier one."""
        return any(name not in self._loaded for name in self.names)

    @property
    def wants_counterpart(self) -> bool:
        """Whether a generated clip should come with the sound of the real clip of the same prompt."""
        return any(self._metrics[name].USES_COUNTERPART for name in self.names)

    @property
    def needing_real(self) -> list[str]:
        """Metrics that have no figure without a real set."""
        return [name for name in self.names if self._metrics[name].USES_REAL]

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """What each metric says of itself: knobs, and the checksum of its network."""
        return {name: self._metrics[name].identity() for name in self._metrics}

    def to(self, device: torch.device | str) -> MetricSuite:
        """Move all networks and sums; MPS, which has no float64, leaves them on the host."""
        if torch.device(device).type == "mps":
            device = "cpu"
        for metric in (*self._metrics.values(), *self._of_real.values()):
            metric.to(device)
        return self

    def add(self, clip: MeasuredClip) -> None:
        """Measure one clip; real ones go to the metrics that have not seen the real set yet."""
        try:
            check_clip(clip.frames, clip.waveform, fps=self.fps, sample_rate=self.sample_rate)
        except OviError as error:
            which = "real clip" if clip.real else "generated clip"
            self._tell(f"{which} {clip.number} is left out: {error}", once=f"unusable {which}")
            self._unusable += not clip.real
            return
        if clip.real:
            self._num_real += 1
        else:
            self._num_generated += 1
        of_clip: dict[str, dict[str, float]] = {}
        for name in self.names:
            if clip.real and name in self._loaded:
                continue
            metric = self._metrics[name]
            if clip.real and not metric.USES_REAL:
                metric = self._of_real[name]
            alone = self.by_clip and not clip.real and not metric.USES_REAL and metric.full_state_update is False
            # Called, a metric measures the clip, gives its figures, and adds what it measured to its sums.
            measure: Callable[..., Any] = metric if alone else metric.update
            try:
                figures = measure(
                    clip.frames,
                    clip.waveform,
                    number=clip.number,
                    real=clip.real and metric.USES_REAL,
                    caption=clip.caption,
                    truth=clip.truth,
                    real_waveform=clip.real_waveform,
                )
                if alone:
                    of_clip[name] = {tag: x for tag, x in _floats(figures).items() if not metric.only_counts(tag)}
            except Exception as error:  # whatever a metric, a library or a plug-in raises
                self._give_up(name, error)
        if self.by_clip and not clip.real:
            self._clips.append((clip.number, clip.caption, of_clip))

    def figures(self) -> Figures:
        """All figures over all processes, then ready for the next round of generated clips; every process must call it.

        Real statistics that were measured are kept from here on.
        """
        self._agree_on_failures()
        measured = [name for name in self.names if name not in self._loaded]
        counts = _sum_over_processes(
            torch.tensor([self._num_generated, self._num_real, self._unusable], dtype=torch.int64)
        ).tolist()
        found = Figures(num_generated=counts[0], num_real=counts[1] if measured else None, num_unusable=counts[2])
        for name in list(self.names):
            metric = self._metrics[name]
            try:
                if name in measured and counts[1]:
                    self._kept[name] = self._real_figures(name)
                found.real.update(self._kept.get(name, {}))
                if counts[0]:
                    figures = _floats(metric.compute())
                    twice = figures.keys() & found.generated.keys()
                    if twice:
                        raise OviError(f"another metric gives {', '.join(sorted(twice))} too: take one of them away")
                    found.generated.update(figures)
            except Exception as error:  # as in add; every process computes the same and fails alike
                self._give_up(name, error)
            else:
                if name in self._kept and name in measured:
                    if self.num_real in (None, counts[1]):
                        self._write_cache(name)
                    self._loaded.add(name)
        found.failed = dict(self.failed)
        found.clips = self._clips_of_all()
        self._reset_generated()
        return found

    def _clips_of_all(self) -> list[ClipFigures]:
        """Clips of all processes by number; a metric that was given up has no figures."""
        return [
            ClipFigures(number, caption, {tag: x for name in self.names for tag, x in by_metric.get(name, {}).items()})
            for number, caption, by_metric in sorted(_of_all_processes(self._clips), key=lambda clip: clip[0])
        ]

    # --- the real set ---------------------------------------------------------------------------------------------

    def _real_figures(self, name: str) -> dict[str, float]:
        metric = self._metrics[name]
        return _floats(metric.floor() if metric.USES_REAL else self._of_real[name].compute())

    def _reset_generated(self) -> None:
        """Forget the generated clips; statistics of the real ones stay."""
        for name in self.names:
            metric = self._metrics[name]
            state = metric.real_state() if metric.USES_REAL and name in self._loaded else None
            metric.reset()
            if state and _rank() == 0:
                metric.load_real_state(state)
        self._unusable, self._num_generated, self._num_real = 0, 0, 0
        self._clips = []

    def _key(self, name: str) -> str:
        content = {"format": CACHE_FORMAT, "metric": self._metrics[name].identity(), "real": self.real_set}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _read_cache(self) -> Iterator[str]:
        """Names of the metrics whose real set another run has measured."""
        for name, metric in self._metrics.items():
            file = None if self.cache is None else self.cache / f"{self._key(name)}.pt"
            # All processes must agree on what is measured again, also when one of them sees another disk.
            if not _all_processes(file is not None and file.is_file()):
                continue
            assert file is not None
            stored: dict[str, Any] | None = None
            try:
                stored = torch.load(file, map_location="cpu", weights_only=True)
                self._kept[name] = dict(stored["figures"])  # type: ignore[index]
                if metric.USES_REAL and _rank() == 0:
                    metric.load_real_state(stored["state"])  # type: ignore[index]
            except Exception as error:
                self._tell(f"{file} cannot be read ({error}): its statistics are measured anew", once=str(file))
                stored = None
            if _all_processes(stored is not None):
                yield name
            else:
                self._kept.pop(name, None)
                metric.reset()

    def _write_cache(self, name: str) -> None:
        metric = self._metrics[name]
        state = metric.real_state() if metric.USES_REAL else {}
        if self.cache is None or _rank() != 0:
            return
        file = self.cache / f"{self._key(name)}.pt"
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            torch.save({"figures": self._kept[name], "state": {k: v.cpu() for k, v in state.items()}}, partial)
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            self._tell(f"statistics of the real set are not kept: {file} cannot be written ({error})", once="cache")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    # --- failures -------------------------------------------------------------------------------------------------

    def _give_up(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}"
        self._metrics[name].reset()

    def _agree_on_failures(self) -> None:
        """What failed on one process is off on all: they must compute together, or wait for each other forever."""
        if _is_distributed():
            gathered: list[dict[str, str] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.failed)
            for other in gathered:
                self.failed = {**(other or {}), **self.failed}
        self.report_failures()

    def report_failures(self) -> None:
        """Warn of each metric given up, once."""
        for name, why in self.failed.items():
            self._tell(f"metric {name!r} failed and is off from now on ({why})", once=f"failed {name}")

    def _tell(self, sentence: str, *, once: str) -> None:
        if once not in self._told:
            self._told.add(once)
            self.warn(sentence)


def _floats(figures: Mapping[str, Tensor]) -> dict[str, float]:
    return {tag: float(value) for tag, value in figures.items()}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _sum_over_processes(counts: Tensor) -> Tensor:
    if _is_distributed():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        counts = counts.to(device)
        dist.all_reduce(counts)
    return counts.cpu()


def _of_all_processes(mine: list[Any]) -> list[Any]:
    if not _is_distributed():
        return mine
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return [one for part in gathered for one in part]


def _all_processes(yes: bool) -> bool:
    """Whether all processes say so."""
    no = _sum_over_processes(torch.tensor([0 if yes else 1], dtype=torch.int64))
    return not int(no)
