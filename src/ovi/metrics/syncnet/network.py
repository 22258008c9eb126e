"""SyncNet: embeddings of five pictures of a face and of 0.2 s of speech, near each other where the lips say it.

J. S. Chung and A. Zisserman, Out of time, ACCV 2016 workshops; the network and names of ``syncnet_v2.model``:
netcnnaud, netfcaud, netcnnlip and netfclip, each a sequence whose numbers count activations and pools too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovi.errors import OviError

SIDE = 224
WINDOW_FRAMES = 5
WINDOW_CEPSTRA = 20
NUM_CEPSTRA = 13
EMBEDDING = 1024


class SyncNet(nn.Module):
    """Both towers at their published size."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_block(nn.Conv2d(1, 64, 3, padding=1)),
            nn.Identity(),  # a pool of one by one: it keeps the count
            *_block(nn.Conv2d(64, 192, 3, padding=1)),
            nn.MaxPool2d(3, (1, 2)),
            *_block(nn.Conv2d(192, 384, 3, padding=1)),
            *_block(nn.Conv2d(384, 256, 3, padding=1)),
            *_block(nn.Conv2d(256, 256, 3, padding=1)),
            nn.MaxPool2d(3, 2),
            *_block(nn.Conv2d(256, 512, (5, 4))),
        )
        self.netcnnlip = nn.Sequential(
            *_block(nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), padding=(0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), padding=(0, 1, 1)),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(256, 512, (1, 6, 6))),
        )
        self.netfcaud, self.netfclip = _dense(), _dense()

    def train(self, mode: bool = True) -> SyncNet:
        """Stays in evaluation: its norms would follow the clips that are measured."""
        return super().train(False)

    def embed_faces(self, windows: Tensor) -> Tensor:
        """[B, 1024] of windows of five pictures [B, 3, 5, 224, 224]: blue, green, red, each 0..255."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))

    def embed_speech(self, windows: Tensor) -> Tensor:
        """[B, 1024] of windows of cepstra [B, 1, 13, 20], one every 10 ms."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))


def load_syncnet(file: str | Path) -> SyncNet:
    """The network with the weights of a state dict; only the counters of batches, which nothing reads, may be missing.

    Raises:
        OviError: when names or shapes are others.
    """
    with torch.device("meta"):
        network = SyncNet()
    state: dict[str, Any] = dict(torch.load(file, map_location="cpu", weights_only=True))
    for key in network.state_dict():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=torch.long))
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise OviError(f"{file} holds other weights than SyncNet's: {str(error)[:500]}") from error
    return network.train(False).requires_grad_(False)


def _block(convolution: nn.Conv2d | nn.Conv3d) -> list[nn.Module]:
    norm = nn.BatchNorm3d if isinstance(convolution, nn.Conv3d) else nn.BatchNorm2d
    return [convolution, norm(convolution.out_channels), nn.ReLU()]


def _dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, EMBEDDING))
