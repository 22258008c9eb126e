"""Near-duplicates: clips that look alike, and sound alike, at the same moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.fft import dctn

from ovi.data.media import Clip
from ovi.data.stages.base import STAGES, Limit, SetStage, Verdict
from ovi.data.stages.near_hashes import Distances, NearHashes
from ovi.errors import OviError

PICTURE_BITS = 64
"""Of one picture's hash."""
_SIDE = 32
_AUDIO_TIMES, _AUDIO_BANDS = 16, 17
AUDIO_BITS = (_AUDIO_TIMES - 1) * (_AUDIO_BANDS - 1)
_SOUND_WORDS = -(-AUDIO_BITS // 64)
_AUDIO_FLOOR = 1e-8
"""Mean square of a band below which all is alike: -80 dB of full scale."""
_AUDIO_HZ = (100.0, 4000.0)


@STAGES.register("duplicates")
class Duplicates(SetStage):
    """Keeps one of clips that show, and sound, nearly the same; the first by key.

    A few pictures at fixed shares of the clip's time are hashed to 64 bits each (signs of low DCT coefficients), the
    sound to 240 (which bands grow over which, from one piece of time to the next: after Haitsma and Kalker, 2002).
    Every pair within the threshold is found: among a million clips in a minute or two, more only where very many look
    alike and sound different. Clips of the same scene cut at other times are no duplicates to it. Figures:
    ``duplicate_bits``, bits of the pictures that differ between a clip left out and the nearest kept one.

    Args:
        num_pictures: hashed of every clip.
        max_share: of the pictures' bits that may differ in duplicates, 0..0.5; unrelated clips differ in about 0.5.
        sound: whether duplicates must also sound alike.
        max_sound_share: of the sound's bits that may differ, 0..0.5.
    """

    name = "duplicates"

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

    def look(self, clip: Clip) -> str:
        """Hashes of the pictures and of the sound in hexadecimal, each filled up to words of 64 bits."""
        words = f"{picture_hash(clip, self.num_pictures):0{self.num_pictures * PICTURE_BITS // 4}x}"
        return words + (f"{sound_hash(clip):0{_SOUND_WORDS * 16}x}" if self.sound else "")

    def join(self, keys: Sequence[str], signatures: Iterable[str]) -> Iterator[Verdict]:
        """Every clip that is within the threshold of one before it that is kept."""
        packed = b"".join(map(bytes.fromhex, signatures))
        words = np.frombuffer(packed, np.uint64).reshape(len(keys), -1) if keys else np.empty((0, 1), np.uint64)
        pictures, sounds = words[:, : self.num_pictures], words[:, self.num_pictures :]
        hashes = NearHashes(pictures, sounds, Distances(self.max_bits, self.max_sound_bits))
        kept = hashes.kept()
        others = np.setdiff1d(np.arange(len(keys)), kept, assume_unique=True)
        for place, bits, other in zip(others, *hashes.nearest(others, kept)):
            yield Verdict(
                int(place),
                "duplicate",
                f"shows the same as {keys[other]} ({bits} of {self.num_pictures * PICTURE_BITS} bits differ); lower "
                f"duplicates.max_share to keep it",
                {"duplicate_bits": float(bits)},
                "duplicate_bits",
                float(self.max_bits),
            )


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
