"""VGGish as Frechet audio distances use it: 128 features of windows of 0.96 s, in the weights of torchvggish.

S. Hershey et al., CNN Architectures for Large-Scale Audio Classification, 2017 (arXiv 1609.09430); K. Kilgour et al.,
Frechet Audio Distance, 2019 (arXiv 1812.08466). Features are those before the last ReLU, without principal components
and rounding, as in audioldm_eval and av-benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ovi.errors import OviError
from ovi.metrics.features.base import AUDIO_FEATURES, AudioExtractor
from ovi.metrics.features.inputs import check_waveform
from ovi.metrics.features.mel import htk_mel, magnitudes
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

PUBLISHED = WeightsFile(
    "vggish-10086976.pth", "release v0.1 of torchvggish on GitHub (sha256 begins with the 10086976 of its name)"
)
DIGEST_BEGINS = "10086976"
"""All of its sha256 that is published: PyTorch's hub puts these digits into the name and checks them."""
_VERSION = "before the last ReLU, 96 frames every 96, 1"
_BANDS = 64
_FRAMES = 96
_N_FFT, _LENGTH, _HOP = 512, 400, 160
_LOG_OFFSET = 0.01
_CONVOLUTIONS = (0, 3, 6, 8, 11, 13)
"""Places of convolutions in the published ``features``; a ReLU follows each."""
_POOLS = (2, 5, 10, 15)


@AUDIO_FEATURES.register("vggish")
class VGGish(AudioExtractor):
    """VGGish's 128 features of windows of 0.96 s that follow each other, before the last ReLU.

    What does not fill a window at the end is left out; a clip shorter than one is zero-padded.

    Args:
        path: the file ``vggish-10086976.pth``, or its folder; no other file is taken.

    Raises:
        OviError: when it is missing or another file.
    """

    name = "vggish"
    sample_rate = 16000
    mel: Tensor

    def __init__(self, *, path: str | None = None) -> None:
        super().__init__()
        file = PUBLISHED.find(path, "path of vggish")
        found = file_digest(file)
        if not found.startswith(DIGEST_BEGINS):
            raise OviError(
                f"path of vggish={path}: is not the published file: its sha256 is {found}. It is {PUBLISHED}"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.features, self.embeddings = _convolutions(state), _dense(state)
        self.feature_dim = len(state["embeddings.4.bias"])
        mel = htk_mel(_BANDS, n_fft=_N_FFT, sample_rate=self.sample_rate, low_hz=125.0, high_hz=7500.0)
        self.register_buffer("mel", mel, persistent=False)
        self.digest = combined_digest(found, _VERSION)
        self.freeze()

    def examples(self, waveform: Tensor) -> Tensor:
        """What the network reads of a waveform [N]: log mel magnitudes [R, 96, 64], a frame every 10 ms."""
        waveform = check_waveform(waveform, _LENGTH + _HOP * (_FRAMES - 1))
        loud = magnitudes(waveform, n_fft=_N_FFT, window=_LENGTH, hop=_HOP, padding=None) @ self.mel
        return (loud + _LOG_OFFSET).log().unfold(0, _FRAMES, _FRAMES).transpose(1, 2)

    def forward(self, waveform: Tensor) -> Tensor:
        """Features [R, 128], one row a window, of one clip's waveform [N]."""
        x = self.features(self.examples(waveform)[:, None])
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))  # channels last, as the weights come from TensorFlow


def _convolutions(state: Mapping[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(_POOLS[-1] + 1):
        if place in _POOLS:
            layers.append(nn.MaxPool2d(2))
        elif place in _CONVOLUTIONS:
            wide, deep, *_ = state[f"features.{place}.weight"].shape
            layers.append(nn.utils.skip_init(nn.Conv2d, deep, wide, 3, padding=1))
        else:
            layers.append(nn.ReLU())
    return _loaded(layers, state, "features.")


def _dense(state: Mapping[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in (0, 2, 4):
        wide, deep = state[f"embeddings.{place}.weight"].shape
        layers += [nn.utils.skip_init(nn.Linear, deep, wide), nn.ReLU()]
    return _loaded(layers[:-1], state, "embeddings.")


def _loaded(layers: list[nn.Module], state: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    net = nn.Sequential(*layers)
    net.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return net
