"""Pixels, waveforms and strings to latents and back. Importing the package registers every codec."""

from ovi.codecs import dct, logmel, mmaudio16k, text, umt5, wan22
from ovi.codecs.base import AUDIO_CODECS, TEXT_ENCODERS, VIDEO_CODECS
from ovi.codecs.bundle import Codecs

__all__ = [
    "AUDIO_CODECS",
    "TEXT_ENCODERS",
    "VIDEO_CODECS",
    "Codecs",
    "dct",
    "logmel",
    "mmaudio16k",
    "text",
    "umt5",
    "wan22",
]
