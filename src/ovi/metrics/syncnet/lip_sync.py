"""LSE-D and LSE-C: distance of lips and speech by SyncNet, and how sure it is of their offset.

Protocol of syncnet_python (github.com/joonson/syncnet_python), which Wav2Lip (arXiv 2008.10010, section 4.2) made a
measure of: 25 fps, 16 kHz, windows of five pictures at 224 pixels and 20 cepstra, distances at up to 15 frames' shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ovi.errors import OviError
from ovi.metrics.clip_metric import METRICS, ClipMetric, MeasuredClip
from ovi.metrics.features.weights import WeightsFile, file_digest
from ovi.metrics.frame_rate import frames_at
from ovi.metrics.sound import is_silent, resampled
from ovi.metrics.syncnet.cepstra import SAMPLE_RATE, cepstra
from ovi.metrics.syncnet.network import SIDE, WINDOW_CEPSTRA, WINDOW_FRAMES, SyncNet, load_syncnet

PUBLISHED = WeightsFile(
    "syncnet_v2.model",
    "the authors' page (www.robots.ox.ac.uk/~vgg/software/lipsync)",
    "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
)
FPS = 25.0
LARGEST_SHIFT = 15
_AT_ONCE = 10
_FRAME_SAMPLES = 640
_FRAME_CEPSTRA = 4


@dataclass(frozen=True)
class LipSync:
    """How lips and speech of one clip agree.

    Attributes:
        distance: LSE-D, the mean distance at the best shift; lower is better.
        confidence: LSE-C, the median over shifts of the mean distance minus the least; higher is better.
        shift_frames: of the speech, at 25 fps; positive when it is late, as all offsets here (what syncnet_python
            prints as "AV offset" has the other sign).
    """

    distance: float
    confidence: float
    shift_frames: int


def lip_sync(faces: Tensor, speech: Tensor, *, largest_shift: int = LARGEST_SHIFT) -> LipSync:
    """Distances of every window of faces to the windows of speech around it.

    Beyond the ends speech is zeros, as in the published code.

    Args:
        faces: embeddings [T, D].
        speech: embeddings [T, D] of the same instants.
        largest_shift: shifts up to this many frames are tried.

    Raises:
        OviError: for other shapes, or embeddings that are not finite.
    """
    if faces.ndim != 2 or faces.shape != speech.shape or not len(faces):
        raise OviError(f"embeddings must be two of the same [T, D], got {list(faces.shape)} and {list(speech.shape)}")
    if not (torch.isfinite(faces).all() and torch.isfinite(speech).all()):
        raise OviError("embeddings of SyncNet are not finite")
    padded = F.pad(speech, (0, 0, largest_shift, largest_shift))
    means = torch.stack(
        [
            F.pairwise_distance(faces, padded[shift : shift + len(faces)]).double().mean()
            for shift in range(2 * largest_shift + 1)
        ]
    )
    best = int(means.argmin())
    return LipSync(float(means[best]), float(means.median() - means[best]), best - largest_shift)


@METRICS.register("syncnet")
class LipSyncError(ClipMetric):
    """Agreement of lips and speech by SyncNet's published weights (LSE-C and LSE-D), for clips of one face.

    ``compute`` gives ``lse_c_syncnet`` (confidence, higher is better), ``lse_d_syncnet`` (distance, lower is better),
    each with ``..._n`` (clips it rests on) and ``..._coverage`` (of all): clips of under 7 frames at 25 fps, and silent
    ones, are left out. Published figures track and crop faces first, and SyncNet knows nothing else: no face is looked
    for here, so clips must be such crops, and the knob below says that they are. Clips that are not square are cut to
    their middle.

    Args:
        fps: frames per second of the clips.
        sample_rate: of their sound, in Hz.
        path: the file ``syncnet_v2.model``, or its folder; no other file is taken.
        faces_fill_frame: must be true: clips are crops of one face, as its tracker makes them.

    Raises:
        OviError: when the weights are missing or other ones, or clips are not said to be faces.
    """

    LOWER = ("lse_d_syncnet",)
    HIGHER = ("lse_c_syncnet",)
    SUMS = ("total_distance", "total_confidence", "covered")
    total_distance: Tensor
    total_confidence: Tensor
    covered: Tensor

    def __init__(
        self,
        fps: float,
        sample_rate: int,
        *,
        path: str | None = None,
        faces_fill_frame: bool = False,
        **metric_knobs: Any,
    ) -> None:
        super().__init__(fps, sample_rate, **metric_knobs)
        file = PUBLISHED.find(path, "path of syncnet")
        if not faces_fill_frame:
            raise OviError(
                "SyncNet measures crops of one face, and looks for none: its figures on other pictures mean nothing. "
                "Where clips are such crops, set faces_fill_frame=true"
            )
        self.network: SyncNet = load_syncnet(file)
        self.digest = file_digest(file)

    def identity(self) -> dict[str, Any]:
        """With the checksum of the weights."""
        return {**super().identity(), "digest": self.digest}

    def add_clip(self, clip: MeasuredClip) -> None:
        """Measure one clip; one that is too short or silent only lowers the coverage."""
        if is_silent(clip.waveform):
            return
        embedded = self.embeddings(clip.frames, clip.waveform)
        if embedded is not None:
            found = lip_sync(*embedded)
            self.total_distance += found.distance
            self.total_confidence += found.confidence
            self.covered += 1

    def embeddings(self, frames: np.ndarray, waveform: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """Embeddings [T, 1024] of faces and of speech, one a frame at 25 fps; None for a clip too short for two."""
        pictures = frames_at(frames, self.fps, FPS)
        sound = resampled(waveform, self.sample_rate, SAMPLE_RATE)
        count = min(len(pictures), len(sound) // _FRAME_SAMPLES) - WINDOW_FRAMES
        if count < 2:
            return None
        device = self.covered.device
        spoken = torch.from_numpy(cepstra(sound)).float()  # [windows, 13]
        faces, speech = [], []
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for begin in range(0, count, _AT_ONCE):
                numbers = range(begin, min(begin + _AT_ONCE, count))
                shown = face_pictures(pictures[begin : numbers.stop - 1 + WINDOW_FRAMES])
                windows = torch.stack([shown[n : n + WINDOW_FRAMES].transpose(0, 1) for n in range(len(numbers))])
                heard = torch.stack([spoken[n * _FRAME_CEPSTRA :][:WINDOW_CEPSTRA].T[None] for n in numbers])
                faces.append(self.network.embed_faces(windows.to(device)))
                speech.append(self.network.embed_speech(heard.to(device)))
        return torch.cat(faces), torch.cat(speech)

    def compute(self) -> dict[str, Tensor]:
        """The figures as scalars."""
        return {
            "lse_c_syncnet": self.total_confidence / self.covered,
            "lse_c_syncnet_n": self.covered,
            "lse_c_syncnet_coverage": self.covered / self.clips,
            "lse_d_syncnet": self.total_distance / self.covered,
            "lse_d_syncnet_n": self.covered,
            "lse_d_syncnet_coverage": self.covered / self.clips,
        }


def face_pictures(frames: np.ndarray) -> Tensor:
    """[T, 3, 224, 224], 0..255, in OpenCV's order of blue, green, red: the middle square, resized.

    Args:
        frames: uint8 [T, H, W, 3], red first.
    """
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    square = np.ascontiguousarray(frames[:, top : top + side, left : left + side, ::-1])
    pictures = torch.from_numpy(square).permute(0, 3, 1, 2).float()
    if side == SIDE:
        return pictures
    return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True).round().clamp(0, 255)
