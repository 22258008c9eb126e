"""What CLAP networks of any library share: one window of sound, unit embeddings, a tokenizer that tells texts apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ovi.errors import OviError
from ovi.registry import Registry

CLAP_BACKENDS = Registry("clap_backend", group="clap_backend", doc="CLAP networks that embed sound and text alike")

SAMPLE_RATE = 48_000
WINDOW = 480_000
"""Samples that CLAP hears: ten seconds."""
NUM_TOKENS = 77
"""Tokens that CLAP was trained to read, marks of start and end included; the rest of a text is not seen."""

_PROBES = ("A dog barks twice.", "Rain falls on a tin roof.")


def heard(waveform: Tensor) -> Tensor:
    """The ten seconds of a sound that CLAP hears, by no chance.

    The mean is taken off. Of a longer sound the first ten seconds count, where the libraries cut at random; a shorter
    one is repeated as often as it fits whole, then silence follows (``repeatpad`` of both libraries: a clip of 5.04 s
    comes once, then 4.96 s of silence).

    Args:
        waveform: float [N] at 48 kHz, -1..1.

    Returns:
        float32 [480000].

    Raises:
        OviError: for another shape, no samples, or values that are not finite.
    """
    if waveform.ndim != 1 or not len(waveform):
        raise OviError(f"waveform must be [N], mono and not empty, got {list(waveform.shape)}")
    if not torch.isfinite(waveform).all():
        raise OviError("the waveform holds NaN or infinite values")
    sound = (waveform - waveform.mean(dtype=torch.float64)).to(torch.float32)[:WINDOW]
    sound = sound.repeat(WINDOW // len(sound))
    return nn.functional.pad(sound, (0, WINDOW - len(sound)))


class ClapBackend(nn.Module, ABC):
    """A frozen CLAP network with its tokenizer, in float32 whatever autocast says.

    Attributes:
        name: of the checkpoint, as tags have it.
        digest: hex checksum of the weights and whatever else of its own decides the embeddings.
        embed_dim: D.
    """

    name: str
    digest: str
    embed_dim: int

    @abstractmethod
    def texts(self, captions: list[str]) -> Tensor:
        """Embeddings [B, D] of texts, on the device of the weights."""

    @abstractmethod
    def window(self, waveform: Tensor) -> Tensor:
        """Embedding [D] of a sound of exactly 480,000 samples."""

    @abstractmethod
    def count_tokens(self, caption: str) -> int:
        """Tokens of a text before it is cut at ``NUM_TOKENS``."""

    def train(self, mode: bool = True) -> ClapBackend:
        """Stays in evaluation."""
        return super().train(False)

    def freeze(self) -> None:
        """To be called at the end of ``__init__``."""
        self.float().requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """float32 [B, D], each of length 1.

        Args:
            captions: texts; what lies beyond 77 tokens is not seen.
        """
        return self._unit(lambda: self.texts(list(captions)))

    def embed_audio(self, waveform: Tensor | np.ndarray) -> Tensor:
        """float32 [D] of length 1.

        Args:
            waveform: [N] at 48 kHz, -1..1; ten seconds are heard, as ``heard`` says.
        """
        sound = heard(torch.as_tensor(waveform).to(self.device))
        return self._unit(lambda: self.window(sound))

    def cuts(self, caption: str) -> bool:
        """Whether a text is too long to be read whole."""
        return self.count_tokens(caption) > NUM_TOKENS

    def _unit(self, embed: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return normalize(embed().to(torch.float32), dim=-1)


def check_tokenizer(tokenizer: Callable[..., dict[str, list[list[int]]]], ignored: set[int], knob: str) -> None:
    """See that a tokenizer tells texts apart: one built from missing files knows no words, and every text is alike.

    Args:
        tokenizer: called with a list of texts, gives ``input_ids``.
        ignored: identifiers that carry no words (unknown, padding, start, end).
        knob: what sets it, for messages.

    Raises:
        OviError: when two different texts give the same tokens.
    """
    first, second = ([i for i in ids if i not in ignored] for ids in tokenizer(list(_PROBES))["input_ids"])
    if not first or not second or first == second:
        raise OviError(
            f"{knob}: its tokenizer tells no texts apart ({_PROBES[0]!r} and {_PROBES[1]!r} give the same tokens): it "
            "is a stub, as comes of missing vocabulary files"
        )
