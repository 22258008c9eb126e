"""Generated clips against what their prompts planted: how many impacts, and how high the knocks sound.

For clips of one bouncing object, as the synthetic data set has them: its prompts name the number of impacts and one of
three bands of pitch, and its truth says both in numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.impacts import audio_onsets, video_impacts

PITCH_CLASSES = {"low": 355.0, "middle": 938.0, "high": math.inf}
"""Upper ends in Hz of the classes that prompts name: the middle of the gaps between the bands tones are drawn from."""
_SKIP_S, _HEARD_S = 0.004, 0.12
"""A knock begins with a click; then this much of it is heard."""
_LOWEST_HZ, _HIGHEST_HZ = 80.0, 3000.0
_TONAL = 0.2
"""Share of the energy that must lie within a semitone or so of the strongest partial: a noise burst has no pitch."""


def knock_pitch(waveform: np.ndarray, sample_rate: int) -> float:
    """Frequency in Hz of the strongest partial of the knocks in a sound, the median over its onsets.

    Args:
        waveform: [N], mono.
        sample_rate: in Hz.

    Returns:
        NaN where no onset sounds like a tone.

    Raises:
        OviError: for a waveform that is not [N].
    """
    wave = np.asarray(waveform, np.float64)
    onsets = audio_onsets(wave, sample_rate)
    ends = np.append(onsets, len(wave) / sample_rate)[1:]
    found = [_partial(wave, sample_rate, at, end) for at, end in zip(onsets, ends, strict=True)]
    found = [hz for hz in found if not math.isnan(hz)]
    return float(np.exp(np.median(np.log(found)))) if found else math.nan


def pitch_class(hz: float) -> str:
    """The name prompts have for a pitch."""
    return next(name for name, end in PITCH_CLASSES.items() if hz < end)


def semitones(hz: float, of_hz: float) -> float:
    """How far one frequency lies above another."""
    return 12.0 * math.log2(hz / of_hz)


@METRICS.register("planted")
class PlantedFacts(ClipMetric):
    """Share of clips with the number of impacts, seen and heard, and the pitch that their prompts planted.

    ``compute`` gives ``planted_count_video`` and ``planted_count_audio`` (shares whose number of impacts found in the
    picture, and of onsets found in the sound, is the prompt's), ``planted_count_n`` (clips of one ball with known
    facts), ``planted_count_coverage`` (of all clips); ``planted_pitch_class`` (share whose knocks lie in the band the
    prompt names), ``planted_pitch_semitones`` (mean distance from the planted frequency, which no prompt gives away:
    for real and reconstructed clips), ``planted_pitch_n`` (clips of those whose sound has a pitch) and
    ``planted_pitch_coverage``. NaN where no clip has known facts.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
    """

    LOWER = ("planted_pitch_semitones",)
    HIGHER = ("planted_count_*", "planted_pitch_class")
    SUMS = ("known", "seen", "heard", "pitched", "classed", "semitones_off")
    known: Tensor
    seen: Tensor
    heard: Tensor
    pitched: Tensor
    classed: Tensor
    semitones_off: Tensor

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip; without facts, or with those of several balls, it only lowers the coverage."""
        # A list in csv has its facts as text, and nothing where one is not known.
        truth = {name: value for name, value in clip.truth.items() if value not in (None, "")}
        if "count" not in truth or _number(truth, "num_balls", 1) != 1:
            return
        count = _number(truth, "count")
        self.known += 1
        self.seen += int(len(video_impacts(clip.frames, self.fps)) == count)
        self.heard += int(len(audio_onsets(clip.waveform, self.sample_rate)) == count)
        if "pitch" not in truth or "pitch_hz" not in truth:
            return
        if truth["pitch"] not in PITCH_CLASSES:
            raise OviError(f"the planted pitch is {truth['pitch']!r}, not one of {', '.join(PITCH_CLASSES)}")
        hz = knock_pitch(clip.waveform, self.sample_rate)
        if not math.isnan(hz):
            self.pitched += 1
            self.classed += int(pitch_class(hz) == truth["pitch"])
            self.semitones_off += abs(semitones(hz, _number(truth, "pitch_hz")))

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "planted_count_video": self.seen / self.known,
            "planted_count_audio": self.heard / self.known,
            "planted_count_n": self.known,
            "planted_count_coverage": self.known / self.clips,
            "planted_pitch_class": self.classed / self.pitched,
            "planted_pitch_semitones": self.semitones_off / self.pitched,
            "planted_pitch_n": self.pitched,
            "planted_pitch_coverage": self.pitched / self.clips,
        }

    def identity(self) -> dict[str, Any]:
        """What decides the figures."""
        return {**super().identity(), "pitch_classes": list(PITCH_CLASSES.values())}


def _number(truth: Mapping[str, Any], name: str, otherwise: float = math.nan) -> float:
    """A planted fact as a number."""
    value = truth.get(name, otherwise)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OviError(f"the planted {name} is {value!r}, not a number") from None


def _partial(wave: np.ndarray, sample_rate: int, at_s: float, until_s: float) -> float:
    """Frequency of the strongest partial after an onset; NaN where nothing stands out."""
    begin = round((at_s + _SKIP_S) * sample_rate)
    piece = wave[begin : min(round(until_s * sample_rate), begin + round(_HEARD_S * sample_rate))]
    if len(piece) < 0.03 * sample_rate:
        return math.nan
    # Zeros behind it, so that bins are far closer than a semitone; the half-window falls from the attack on.
    size = 1 << (8 * len(piece) - 1).bit_length()
    window = np.cos(0.5 * np.pi * np.arange(len(piece)) / len(piece)) ** 2
    power = np.abs(np.fft.rfft((piece - piece.mean()) * window, size)) ** 2
    hz = np.arange(len(power)) * sample_rate / size
    heard = (hz >= _LOWEST_HZ) & (hz <= _HIGHEST_HZ)
    if not power[heard].sum() > 0:
        return math.nan
    best = int(np.where(heard, power, 0.0).argmax())
    lobe = 2.0 * sample_rate / len(piece)
    near = np.abs(hz - hz[best]) <= max(lobe, 0.06 * hz[best])
    if power[near].sum() < _TONAL * power[hz >= _LOWEST_HZ].sum():
        return math.nan
    left, top, right = np.log(power[best - 1 : best + 2] + 1e-300)
    bend = left - 2.0 * top + right
    return float((best + (0.5 * (left - right) / bend if bend < 0 else 0.0)) * sample_rate / size)
