"""Word error rate of the speech in clips: what the prompt has said, against what a recogniser hears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.text import word_error_rate

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.features.base import build_features
from ovi.metrics.prompts import spoken_words
from ovi.metrics.recognisers import RECOGNISERS, Recogniser
from ovi.metrics.sound import is_silent, resampled

NORMALISERS = ("english", "basic")


def normaliser(name: str, spellings: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """How texts are brought into one form before words are counted: Whisper's published normalisers.

    Args:
        name: ``basic``: lower case, punctuation and symbols to spaces, what stands in brackets left out. ``english``:
            also numbers as digits (several in a row as one: "one two" is 12), contractions and titles
            written out, hesitations left out.
        spellings: for ``english``, words with the spelling to count by.

    Raises:
        OviError: for another name.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name not in NORMALISERS:
        raise OviError(f"metric wer: normaliser={name}: expected {', '.join(NORMALISERS)}")
    published = EnglishTextNormalizer(dict(spellings or {})) if name == "english" else BasicTextNormalizer()

    def normal(text: str) -> str:
        # Marks that the published form leaves standing alone are no words.
        return " ".join(word for word in published(text).split() if any(map(str.isalnum, word)))

    return normal


def word_errors(heard: str, said: str) -> tuple[int, int]:
    """(errors, words said): the fewest words put in, left out and exchanged, of texts already normalised."""
    words = len(said.split())
    if not words:
        return len(heard.split()), 0
    return round(float(word_error_rate([heard], [said])) * words), words


@METRICS.register("wer")
class WordErrorRate(ClipMetric):
    """Word error rate of spoken prompts: errors over words of the texts between ``<S>`` and ``<E>``.

    A rate of the whole set, sum of errors over sum of words; it can exceed 1. Several texts of a prompt count as one,
    in order. A clip whose prompt has nothing said is skipped; a silent one misses all its words and is not shown to the
    recogniser, which may hear words in silence.

    ``compute`` gives ``wer_<recogniser>``, ``wer_<recogniser>_n`` (words said) and ``wer_<recogniser>_coverage``
    (clips with words to say, of all).

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        recogniser: by name, or ``{"name": ..., knob: value, ...}``.
        normaliser: english, or basic for other languages that part words by spaces.

    Raises:
        OviError: for an unknown normaliser, or a recogniser that cannot be had.
    """

    LOWER = ("wer_*",)
    SUMS = ("errors", "words", "spoken")
    errors: Tensor
    words: Tensor
    spoken: Tensor

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        recogniser: str | Mapping[str, Any] = "whisper",
        normaliser: Literal["english", "basic"] = "english",
    ) -> None:
        super().__init__(fps, sample_rate)
        if normaliser not in NORMALISERS:
            raise OviError(f"metric wer: normaliser={normaliser}: expected {', '.join(NORMALISERS)}")
        self.recogniser: Recogniser = build_features(RECOGNISERS, recogniser)
        self.normaliser = normaliser

    def add_clip(self, clip: MeasuredClip) -> None:
        """Hold one clip's words against its prompt's."""
        normal = normaliser(self.normaliser, self.recogniser.spellings)
        said = normal(" ".join(spoken_words(clip.caption)))
        if not said.split():
            return
        errors, words = word_errors("" if is_silent(clip.waveform) else normal(self._heard(clip)), said)
        self.spoken += 1
        self.errors += errors
        self.words += words

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars; NaN where no prompt had words."""
        tag = f"wer_{self.recogniser.name}"
        return {
            tag: self.errors / self.words,
            f"{tag}_n": self.words,
            f"{tag}_coverage": self.spoken / self.clips,
        }

    def identity(self) -> dict[str, Any]:
        """With the recogniser's checksum."""
        of_recogniser = {"name": self.recogniser.name, "digest": self.recogniser.digest}
        language = getattr(self.recogniser, "language", None)
        return {
            **super().identity(),
            "recogniser": {**of_recogniser, "language": language},
            "normaliser": self.normaliser,
        }

    def _heard(self, clip: MeasuredClip) -> str:
        wave = resampled(clip.waveform, self.sample_rate, self.recogniser.sample_rate)
        return self.recogniser(torch.from_numpy(wave).clamp(-1, 1))
