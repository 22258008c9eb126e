"""Writes generated clips as mp4 files and shows them in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from ovi.data.media import Clip, write_clip
from ovi.training.callbacks.joint_eval import ValidationClip, tensorboard


class SampleLogger:
    """Consumer that keeps what was generated.

    The mp4s go to ``samples/step_<n>/`` in the run's folder, the real counterparts to ``samples/real/``. TensorBoard
    gets, for the first few, an animation, the sound and its spectrogram.

    Args:
        num_shown: clips that go to TensorBoard.
        scale: enlargement of the animation, by nearest neighbour, so that small pictures can be seen.
    """

    def __init__(self, *, num_shown: int = 4, scale: int = 3) -> None:
        self.num_shown, self.scale = num_shown, scale

    def consume(self, clip: ValidationClip, trainer: L.Trainer) -> None:
        folder = "real" if clip.real else f"step_{trainer.global_step:06d}"
        path = Path(trainer.default_root_dir) / "samples" / folder / f"{clip.index:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, clip.clip)
        writer = tensorboard(trainer)
        # The main process shows the first of its own share.
        if writer is None or clip.index // trainer.world_size >= self.num_shown:
            return
        kind, step = "real" if clip.real else "generated", trainer.global_step
        add_animation(writer, f"{kind}/{clip.index}/video", clip.clip, step, self.scale)
        peak = max(1e-6, float(np.abs(clip.clip.waveform).max()))
        # The page's player has no gain of its own; normalised, quiet sounds can be heard.
        writer.add_audio(
            f"{kind}/{clip.index}/sound", clip.clip.waveform[None] / peak, step, sample_rate=clip.clip.sample_rate
        )
        writer.add_image(f"{kind}/{clip.index}/spectrogram", spectrogram_image(clip.clip), step, dataformats="HWC")
        writer.add_text(f"{kind}/{clip.index}/caption", clip.caption, step)

    def report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is not None:
            writer.flush()


def add_animation(writer: Any, tag: str, clip: Clip, step: int, scale: int) -> None:
    """Enter a clip's frames as an animated GIF.

    TensorBoard's own ``add_video`` writes nothing, silently, with moviepy 2; its image plugin plays GIFs.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = [Image.fromarray(f) for f in np.repeat(np.repeat(clip.frames, scale, 1), scale, 2)]
    buffer = io.BytesIO()
    # GIF keeps time in hundredths of a second.
    durations = np.diff(np.round(np.arange(len(frames) + 1) * 100 / clip.fps)).astype(int) * 10
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations.tolist(), loop=0)
    height, width = clip.frames.shape[1] * scale, clip.frames.shape[2] * scale
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def spectrogram_image(clip: Clip, *, height: int = 128, width: int = 384) -> np.ndarray:
    """Log-magnitude spectrogram of a clip's sound as an image [height, width, 3], low frequencies at the bottom."""
    from matplotlib import colormaps
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    transform = ShortTimeFFT(hann(512), hop=128, fs=clip.sample_rate)
    level = 20 * np.log10(np.abs(transform.stft(clip.waveform)) + 1e-5)
    level = np.clip((level - level.max() + 80) / 80, 0, 1)[::-1]
    coloured = (colormaps["magma"](level)[..., :3] * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coloured).resize((width, height), Image.Resampling.BILINEAR))
