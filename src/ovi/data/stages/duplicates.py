"""Near-duplicates: clips that look alike, and sound alike, at the same moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.fft import dctn

from ovi.data.media import Clip, MediaError
from ovi.data.stages.base import STAGES, Candidate, Limit, RejectedSink, Stage
from ovi.errors import OviError

PICTURE_BITS = 64
"""Of one picture's hash."""
_SIDE = 32
_AUDIO_TIMES, _AUDIO_BANDS = 16, 17
AUDIO_BITS = (_AUDIO_TIMES - 1) * (_AUDIO_BANDS - 1)
_AUDIO_FLOOR = 1e-8
"""Mean square of a band below which all is alike: -80 dB of full scale."""
_AUDIO_HZ = (100.0, 4000.0)


@STAGES.register("duplicates")
class Duplicates(Stage):
    """Keeps one of clips that show, and sound, nearly the same; the first by key.

    A few pictures at fixed shares of the clip's time are hashed to 64 bits each (signs of low DCT coefficients), the
    sound to 240 (which bands grow over which, from one piece of time to the next: after Haitsma and Kalker, 2002).
    Every pair within the threshold is found. This stage gathers all candidates before it passes the first on, without
    their clips: about 1 kB each. Clips of the same scene cut at other times are no duplicates to it. Figures:
    ``duplicate_bits``, differing bits to the nearest kept clip that came up; absent where none did.

    Args:
        num_pictures: hashed of every clip.
        max_share: of the pictures' bits that may differ in duplicates, 0..0.5; unrelated clips differ in about 0.5.
        sound: whether duplicates must also sound alike.
        max_sound_share: of the sound's bits that may differ, 0..0.5.
    """

    name = "duplicates"
    level = "set"

    def __init__(
        self, *, num_pictures: int = 4, max_share: float = 0.1, sound: bool = True, max_sound_share: float = 0.2
    ) -> None:
        for knob, value in (("max_share", max_share), ("max_sound_share", max_sound_share)):
            if not 0 <= value < 0.5:
                raise OviError(f"duplicates.{knob} must be 0 to below 0.5, got {value!r}")
        if num_pictures < 1:
            raise OviError(f"duplicates.num_pictures must be at least 1, got {num_pictures}")
        self.num_pictures, self.sound = num_pictures, sound
        self.max_bits = int(max_share * num_pictures * PICTURE_BITS)
        self.max_sound_bits = int(max_sound_share * AUDIO_BITS)
        self.limits = (Limit("duplicate_bits", "duplicate", "duplicates.max_share", low=self.max_bits + 1),)

    def __call__(self, candidates: Iterable[Candidate], rejected: RejectedSink) -> Iterator[Candidate]:
        hashed: list[tuple[Candidate, int, int]] = []
        for candidate in candidates:
            try:
                clip = candidate.decoded().clip
            except (MediaError, OSError) as error:
                rejected(self.unreadable(candidate, error))
                continue
            assert clip is not None
            sound = sound_hash(clip) if self.sound else 0
            hashed.append((replace(candidate, clip=None), picture_hash(clip, self.num_pictures), sound))
        hashed.sort(key=lambda entry: entry[0].key)
        kept = NearHashes(self.num_pictures * PICTURE_BITS, self.max_bits)
        for number, (candidate, picture, sound) in enumerate(hashed):
            near = sorted(kept.colliding(picture))
            same = [
                (bits, other)
                for bits, other in near
                if bits <= self.max_bits and (sound ^ hashed[other][2]).bit_count() <= self.max_sound_bits
            ]
            if near:
                candidate = candidate.with_figures({"duplicate_bits": (same or near)[0][0]})
            if same:
                bits, other = same[0]
                message = (
                    f"{candidate.path}: from {candidate.start_s:.3f} s shows the same as {hashed[other][0].key} "
                    f"({bits} of {self.num_pictures * PICTURE_BITS} bits differ); lower duplicates.max_share to keep it"
                )
                rejected(self.reject(candidate, "duplicate", message, "duplicate_bits", float(self.max_bits)))
            else:
                kept.add(picture, number)
                yield candidate


class NearHashes:
    """Hashes, searched for all within a Hamming distance.

    Bits are dealt to one more band than may differ: two hashes within the distance then agree in at least one band
    (the pigeonhole principle), so that looking up every band misses none.

    Args:
        num_bits: of a hash.
        max_distance: bits that may differ.
    """

    def __init__(self, num_bits: int, max_distance: int) -> None:
        bands = min(max_distance + 1, num_bits)
        edges = [num_bits * n // bands for n in range(bands + 1)]
        self.bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self.tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in self.bands]
        self.hashes: dict[int, int] = {}

    def add(self, value: int, number: int) -> None:
        """Enter a hash under a number."""
        self.hashes[number] = value
        for table, (low, mask) in zip(self.tables, self.bands):
            table[value >> low & mask].append(number)

    def colliding(self, value: int) -> Iterator[tuple[int, int]]:
        """(distance, number) of every hash that agrees in a band: all within the distance, and some beyond."""
        found: set[int] = set()
        for table, (low, mask) in zip(self.tables, self.bands):
            found.update(table.get(value >> low & mask, ()))
        for number in found:
            yield (value ^ self.hashes[number]).bit_count(), number


def picture_hash(clip: Clip, num_pictures: int) -> int:
    """Signs of the 64 lowest DCT coefficients but the mean, of pictures at fixed shares of a clip's time.

    Args:
        clip: any size; pictures are averaged to 32 x 32.
        num_pictures: at (n + 0.5) / ``num_pictures`` of the clip.
    """
    bits: list[bool] = []
    for n in range(num_pictures):
        frame = clip.frames[int((n + 0.5) / num_pictures * len(clip.frames))]
        spectrum = dctn(_small(frame), norm="ortho")[:9, :9].ravel()[1:]
        order = np.argsort(np.add.outer(np.arange(9), np.arange(9)).ravel()[1:], kind="stable")[:PICTURE_BITS]
        # What flat pictures have here is noise: a coefficient must stand out of it to count.
        bits += (spectrum[order] > 2.0).tolist()
    return _number(bits)


def sound_hash(clip: Clip) -> int:
    """Signs of the differences of band energies, along frequency and then along time: 240 bits.

    Args:
        clip: any sample rate; bands lie between 100 and 4000 Hz, or to half the rate.
    """
    wave = np.asarray(clip.waveform, np.float64)
    pieces = np.array_split(wave, _AUDIO_TIMES)
    high_hz = min(_AUDIO_HZ[1], 0.5 * clip.sample_rate)
    edges = np.geomspace(min(_AUDIO_HZ[0], high_hz / 4), high_hz, _AUDIO_BANDS + 1)
    energy = np.empty((_AUDIO_TIMES, _AUDIO_BANDS))
    for n, piece in enumerate(pieces):
        window = np.hanning(len(piece))
        power = max(float(len(piece) * np.square(window).sum()), 1.0)
        spectrum = 2.0 * np.abs(np.fft.rfft(piece * window)) ** 2 / power
        hz = np.fft.rfftfreq(len(piece), 1 / clip.sample_rate)
        band = np.digitize(hz, edges) - 1
        for b in range(_AUDIO_BANDS):
            energy[n, b] = spectrum[band == b].sum()
    # Noise that an encoder leaves in silence must not make bits.
    level = np.log(energy + _AUDIO_FLOOR)
    change = np.diff(np.diff(level, axis=1), axis=0)
    return _number((change > 0.05).ravel().tolist())


def _small(frame: np.ndarray) -> np.ndarray:
    """Grey picture averaged to 32 x 32, whatever its size, in levels of 0..255."""
    grey = frame.mean(-1, dtype=np.float64)
    return _shares(len(grey)) @ grey @ _shares(grey.shape[1]).T


def _shares(size: int) -> np.ndarray:
    """[32, size]: how much of each pixel falls into each of 32 equal parts; rows sum to 1."""
    edges = np.linspace(0, size, _SIDE + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * _SIDE / size


def _number(bits: list[bool]) -> int:
    return int("".join("01"[bit] for bit in bits), 2)
