"""PANNs' Cnn14, a tagger of AudioSet, as av-benchmark uses it: 2048 features and 527 classes of a whole clip.

Q. Kong et al., PANNs, 2020 (arXiv 1912.10211). Published parameters are ``bn0``, ``conv_block1..6.{conv1, bn1, conv2,
bn2}``, ``fc1``, ``fc_audioset``, ``logmel_extractor.melW`` (the mel filters, Slaney's) and ``spectrogram_extractor.*``
(a Fourier transform with a Hann window as convolutions, which is computed here instead).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovi.errors import OviError
from ovi.metrics.features.base import AUDIO_FEATURES, AudioExtractor
from ovi.metrics.features.inputs import check_waveform
from ovi.metrics.features.mel import magnitudes
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

_ORIGIN = "Zenodo record 3987831"
PUBLISHED = {
    16000: WeightsFile(
        "Cnn14_16k_mAP=0.438.pth",
        _ORIGIN,
        "e2ee543a27919542c2ea03eabaa70b24dcd4e6c8e05621de6b67a94e4c5058e6",
        358_668_570,
    ),
    32000: WeightsFile(
        "Cnn14_mAP=0.431.pth",
        _ORIGIN,
        "0dc499e40e9761ef5ea061ffc77697697f277f6a960894903df3ada000e34b31",
        327_428_481,
    ),
}
"""By sample rate in Hz."""
_VERSION = "fc1 after ReLU, whole clip, 1"
_BLOCKS = 6
_SHORTEST_FRAMES = 2 ** (_BLOCKS - 1)
"""Fewer would be halved to none."""
_LEAST_POWER = 1e-10
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    _RECONSTRUCT,
    np.ndarray,
    np.dtype,
    np.dtypes.Int64DType,
]
"""What the 16 kHz file holds beside tensors: the sampler of its training, in arrays of NumPy, by its older name too."""


@AUDIO_FEATURES.register("panns")
class PANNs(AudioExtractor):
    """PANNs' Cnn14: 2048 features of a whole clip, and logits of AudioSet's 527 classes.

    A clip shorter than 0.31 s is zero-padded.

    Args:
        path: the file ``Cnn14_16k_mAP=0.438.pth`` (for 32000 Hz ``Cnn14_mAP=0.431.pth``), or its folder; no other file
            is taken.
        sample_rate: 16000, as in av-benchmark, or 32000, in Hz: which of the two networks.

    Raises:
        OviError: when it is missing or another file, or for another rate.
    """

    has_classes = True

    def __init__(self, *, path: str | None = None, sample_rate: int = 16000) -> None:
        super().__init__()
        if sample_rate not in PUBLISHED:
            raise OviError(f"sample_rate={sample_rate}: panns has networks for {' and '.join(map(str, PUBLISHED))} Hz")
        file = PUBLISHED[sample_rate].find(path, "path of panns")
        self.name = f"panns_cnn14_{sample_rate // 1000}k"
        self.sample_rate = sample_rate
        self.hop = sample_rate // 100
        with torch.serialization.safe_globals(_HARMLESS):
            state = torch.load(file, map_location="cpu", weights_only=True)["model"]
        self.net = _Cnn14({key: value for key, value in state.items() if not key.startswith("spectrogram_extractor.")})
        self.feature_dim = self.net.fc1.out_features
        self.digest = combined_digest(file_digest(file), _VERSION)
        self.freeze()

    def forward(self, waveform: Tensor) -> Tensor:
        """Features [1, 2048] of one clip's waveform [N]."""
        waveform = check_waveform(waveform, self.hop * (_SHORTEST_FRAMES - 1))
        n_fft = 2 * (self.net.melW.shape[0] - 1)
        power = magnitudes(waveform, n_fft=n_fft, window=n_fft, hop=self.hop, padding="reflect").square()
        return self.net(power)[None]

    def logits(self, waveform: Tensor) -> Tensor:
        """Logits [527] of AudioSet's classes, several of which may hold at once, of one clip's waveform [N]."""
        features = self(waveform)[0]
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return self.net.fc_audioset(features)


class _Cnn14(nn.Module):
    """Power [frames, frequencies] to features [D]; sizes are those of the state dict."""

    melW: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        state = {key.removeprefix("logmel_extractor."): value for key, value in state.items()}
        self.register_buffer("melW", torch.empty_like(state["melW"]))
        self.bn0 = nn.BatchNorm2d(state["melW"].shape[1])
        for n in range(1, _BLOCKS + 1):
            wide, deep, *_ = state[f"conv_block{n}.conv1.weight"].shape
            self.add_module(f"conv_block{n}", _Block(deep, wide))
        self.fc1 = _linear(state["fc1.weight"])
        self.fc_audioset = _linear(state["fc_audioset.weight"])
        self.load_state_dict(state)

    def forward(self, power: Tensor) -> Tensor:
        decibels = 10.0 * (power @ self.melW).clamp_min(_LEAST_POWER).log10()
        x = self.bn0(decibels.T[None, :, :, None]).permute(0, 3, 2, 1)  # normalised band by band
        for n in range(1, _BLOCKS + 1):
            x = self.get_submodule(f"conv_block{n}")(x)
            x = F.avg_pool2d(x, 2) if n < _BLOCKS else x
        x = x.mean(3)
        return F.relu(self.fc1(x.amax(2) + x.mean(2)))[0]


class _Block(nn.Module):
    def __init__(self, deep: int, wide: int) -> None:
        super().__init__()
        self.conv1 = nn.utils.skip_init(nn.Conv2d, deep, wide, 3, padding=1, bias=False)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, wide, wide, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def _linear(weight: Tensor) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
