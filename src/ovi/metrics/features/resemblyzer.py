"""Resemblyzer's speaker encoder: real weights that come in a wheel, so that a distance of voices needs no download.

L. Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018 (arXiv 1710.10467). It hears who speaks and
how; of music and effects it knows little: to be reported under its own name, never as FAD.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.metrics.features.base import AUDIO_FEATURES, AudioExtractor
from ovi.metrics.features.inputs import check_waveform
from ovi.metrics.features.mel import magnitudes, slaney_mel
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

PUBLISHED = WeightsFile(
    "pretrained.pt",
    "the wheel of Resemblyzer 0.1.4",
    "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
    17_090_379,
)
_VERSION = "raised to -30 dBFS, silence kept, 160 frames every 77, 1"
_BANDS = 40
_LENGTH, _HOP = 400, 160
"""Samples of a Fourier transform and from one to the next: 25 and 10 ms."""
_FRAMES, _STEP = 160, 77
"""Transforms in a window, and from one to the next: 1.6 s, 1.3 a second."""
_COVERAGE = 0.75
"""Share of the last window that must be sound."""
_LOUDNESS = 10.0 ** (-30 / 20)
"""Root mean square, full scale 1, to which quieter sound is raised: -30 dBFS."""


@AUDIO_FEATURES.register("resemblyzer")
class Resemblyzer(AudioExtractor):
    """Resemblyzer's speaker embeddings [256] of windows of 1.6 s, 1.3 a second: real weights that ship in a wheel.

    Sound below -30 dBFS is raised to it, as upstream does: the network reads mel power, not its logarithm, so loudness
    counts. Long silences stay in, which upstream cuts out with a voice detector: a clip's time line is part of what is
    judged. A clip shorter than a window is zero-padded; a last window that is less than three quarters sound is left
    out where there are others.

    Raises:
        OviError: when Resemblyzer is not installed or ships other weights.
    """

    name = "resemblyzer"
    feature_dim = 256
    sample_rate = 16000
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        # The package is not imported: it needs webrtcvad, which fails beside a new setuptools.
        file = PUBLISHED.find_in_package("resemblyzer", "Resemblyzer")
        state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
        with torch.device("meta"):
            self.lstm = nn.LSTM(_BANDS, self.feature_dim, num_layers=3, batch_first=True)
            self.linear = nn.Linear(self.feature_dim, self.feature_dim)
        of_training = ("similarity_weight", "similarity_bias")
        kept = {key: value for key, value in state.items() if key not in of_training}
        self.to_empty(device="cpu").load_state_dict(kept)
        mel = slaney_mel(_BANDS, n_fft=_LENGTH, sample_rate=self.sample_rate, low_hz=0.0, high_hz=self.sample_rate / 2)
        self.register_buffer("mel", mel, persistent=False)
        self.digest = combined_digest(file_digest(file), _VERSION)
        self.freeze()

    def forward(self, waveform: Tensor) -> Tensor:
        """Features [R, 256] of unit length, one row a window, of one clip's waveform [N]."""
        waveform = check_waveform(waveform)
        count = _num_windows(len(waveform))
        level = waveform.square().mean().sqrt()
        waveform = waveform * torch.where((level > 0) & (level < _LOUDNESS), _LOUDNESS / level, 1.0)
        waveform = F.pad(waveform, (0, max(0, _HOP * (_STEP * (count - 1) + _FRAMES) - len(waveform))))
        power = magnitudes(waveform, n_fft=_LENGTH, window=_LENGTH, hop=_HOP, padding="constant").square()
        windows = (power @ self.mel).unfold(0, _FRAMES, _STEP)[:count].transpose(1, 2)
        _, (hidden, _) = self.lstm(windows)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


def _num_windows(num_samples: int) -> int:
    """Windows that a sound is cut into."""
    frames = math.ceil((num_samples + 1) / _HOP)
    count = math.ceil(max(1, frames - _FRAMES + _STEP + 1) / _STEP)
    heard = (num_samples / _HOP - _STEP * (count - 1)) / _FRAMES
    return count - 1 if heard < _COVERAGE and count > 1 else count
