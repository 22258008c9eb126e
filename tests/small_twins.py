"""Twins small enough for a test, and what to feed them."""

from functools import partial

import torch

from ovi.clock import Clock
from ovi.fusion import FUSIONS
from ovi.layout import LatentLayout
from ovi.patch import AudioPatch, VideoPatch
from ovi.rope import ROPE_ALIGNMENTS
from ovi.tower import Tower
from ovi.twin import build_twin

LAYOUT = LatentLayout(4, 6, 8, 5, Clock(fps=8, video_stride=1, causal_first_frame=False))
TOWER = {"dim": 24, "num_heads": 2, "num_blocks": 2, "ffn_dim": 32, "freq_dim": 16}


def twin(fusion="ovi", alignment="seconds", layout=LAYOUT, seed=0, live=True, **knobs):
    torch.manual_seed(seed)
    tower = {**TOWER, **knobs.pop("tower", {})}
    model = build_twin(
        layout,
        video=partial(Tower, patch=VideoPatch, **tower),
        audio=partial(Tower, patch=AudioPatch, **{**tower, **knobs.pop("audio_tower", {})}),
        fusion=FUSIONS[fusion] if isinstance(fusion, str) else fusion,
        rope_alignment=ROPE_ALIGNMENTS[alignment],
        **knobs,
    ).eval()
    if live:  # the head starts at zero: without this every output would be its bias
        for tower in (model.video, model.audio):
            torch.nn.init.normal_(tower.out.head.weight, std=0.3)
    return model


def inputs(batch=2, frames=4, tokens=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 4, frames, 4, 4, generator=g)
    audio = torch.randn(batch, tokens, 6, generator=g)
    text = [torch.randn(1 + i % 5, 8, generator=g) for i in range(batch)]
    return video, audio, torch.linspace(0.2, 0.9, batch), text, text


def woken(model):
    """The twin with every zero of its fusions drawn anew, so that each strategy does what it will do once trained."""
    torch.manual_seed(7)
    for p in model.fusions.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.3)
    return model
