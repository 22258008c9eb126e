"""I3D as published FVD figures use it: the TorchScript file of StyleGAN-V, whose class logits are the features.

J. Carreira and A. Zisserman, Quo Vadis, 2017 (arXiv 1705.07750); T. Unterthiner et al., FVD, 2019 (arXiv 1812.01717);
I. Skorokhodov et al., StyleGAN-V, 2022 (arXiv 2112.14683), whose protocol is 16 consecutive frames and 2048 clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovi.metrics.features.base import VIDEO_FEATURES, VideoExtractor
from ovi.metrics.features.inputs import check_frames
from ovi.metrics.features.weights import WeightsFile, combined_digest, file_digest

PUBLISHED = WeightsFile(
    "i3d_torchscript.pt",
    "the FVD code of StyleGAN-V",
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    51_235_320,
)
_VERSION = "rescale, resize, return_features, 1"


@VIDEO_FEATURES.register("i3d")
class I3D(VideoExtractor):
    """I3D's 400 logits from the standard TorchScript file, which rescales and resizes to 224 x 224 itself: for FVD.

    Args:
        path: the file ``i3d_torchscript.pt``, or its folder; no other file is taken.

    Raises:
        OviError: when it is missing or another file.
    """

    name = "i3d"
    feature_dim = 400
    resolution = (224, 224)

    def __init__(self, *, path: str | None = None) -> None:
        super().__init__()
        file = PUBLISHED.find(path, "path of i3d")
        self.net = torch.jit.load(str(file), map_location="cpu")
        self.digest = combined_digest(file_digest(file), _VERSION)
        self.freeze()

    def forward(self, frames: Tensor) -> Tensor:
        """Features [B, 400] of uint8 frames [B, T, H, W, 3]."""
        x = check_frames(frames).permute(0, 4, 1, 2, 3).float()
        # Otherwise the first calls are run as written and later ones fused, to other last digits.
        with torch.jit.optimized_execution(False):
            return self.net(x, rescale=True, resize=True, return_features=True)
