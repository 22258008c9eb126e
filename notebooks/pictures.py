"""Pictures of the README out of the notebooks' subjects: ``python notebooks/pictures.py [--run RUN --data LATENTS]``.

``docs/time_alignment.png`` needs nothing. ``docs/attention_in_time.png`` shows a trained run, such as the demo's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import ovi
from ovi.attention_maps import record_attention
from ovi.training.callbacks.attention_in_time import attention_image, mean_map

DOCS = Path(__file__).parents[1] / "docs"


def time_alignment() -> Figure:
    """How far the published audio clock drifts from the video's, and where RoPE alone makes attention peak."""
    clock = ovi.Clock()
    figure = Figure(figsize=(11, 3), dpi=90, layout="constrained")
    axes = figure.subplots(1, 3)
    frames, tokens = clock.lengths(241)
    video_s, audio_s = np.array(clock.video_times_s(frames)), np.array(clock.audio_times_s(tokens))
    for name, label in (("scale", "published, 0.19676"), ("ratio", "true ratio, 0.192"), ("seconds", "seconds")):
        video, audio = ovi.ROPE_ALIGNMENTS[name](clock, frames, tokens)
        inside = (audio >= video[1]) & (audio <= video[-1])
        late_ms = 1000 * (np.interp(audio, video, video_s) - audio_s)
        axes[0].plot(audio_s[inside], late_ms[inside], label=label)
    axes[0].axvline(121 / 24, color="0.7", linestyle=":")
    axes[0].set_title("how late a sound seems to the picture")
    axes[0].set_xlabel("its true time (s); dotted: end of a 5 s clip")
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    frames, tokens = clock.lengths(121)
    video_s, audio_s = video_s[:frames], audio_s[:tokens]
    frequencies = 10000 ** (-torch.arange(0, 44, 2, dtype=torch.float64) / 44)
    for axis, name in zip(axes[1:], ("none", "seconds")):
        video, audio = ovi.ROPE_ALIGNMENTS[name](clock, frames, tokens)
        kernel = torch.cos((video[:, None] - audio[None])[..., None] * frequencies).mean(-1)
        axis.pcolormesh(audio_s, video_s, kernel, cmap="magma", rasterized=True)
        axis.plot([0, 5], [0, 5], color="white", linewidth=0.7, linestyle=":")
        axis.set_title(f"what RoPE favours, alignment {name}")
        axis.set_xlabel("audio (s)")
        axis.set_ylabel("video (s)")
    return figure


def attention(run: Path, latents: Path, sigma: float = 0.5, num_clips: int = 4) -> np.ndarray:
    """What video hears in a trained run, mean over blocks and every block, uint8 [height, width, 3]."""
    trained, batch = ovi.load(run), ovi.latents(latents).batch(num_clips, split="val")
    draws = torch.Generator().manual_seed(0)
    video, audio = ((1 - sigma) * x + sigma * torch.randn(x.shape, generator=draws) for x in (batch.video, batch.audio))
    with torch.no_grad(), record_attention(trained.model) as recording:
        trained.model(video, audio, torch.full((num_clips,), sigma), batch.text, batch.text)
    found = [(pair, pair.hears) for pair in recording.maps if pair.hears is not None]
    panels = [(f"mean of {len(found)} pairs", mean_map([m for _, m in found]))]
    panels += [(f"video {pair.video_block}, audio {pair.audio_block}", m) for pair, m in found[:4]]
    return attention_image(panels, "video_hears_audio")


def main() -> None:
    """Draw what can be drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a trained run whose fusion attends")
    parser.add_argument("--data", type=Path, default=Path("data/demo/latents"), help="latents it was trained on")
    arguments = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    files = [DOCS / "time_alignment.png"]
    time_alignment().savefig(files[0])
    if arguments.run is not None:
        files.append(DOCS / "attention_in_time.png")
        Image.fromarray(attention(arguments.run, arguments.data)).quantize(128).save(files[1], optimize=True)
    for file in files:
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
