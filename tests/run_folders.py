"""Run folders as training leaves them, with planted figures, for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ovi.data.media import Clip, write_clip

FPS, FRAMES, SIDE, SAMPLE_RATE = 24, 36, 64, 16000
OFFSET, LOSS = "val/av_offset_xcorr_ms", "val/loss"
CAPTIONS = ("a red ball falls onto wood", "a blue ball on metal", "a green ball bounces twice")
DIRECTIONS = ("video_hears_audio", "audio_sees_video")


def clip_file(path: Path, hue: float = 0.1, pitch_hz: float = 440.0) -> Path:
    """A clip of 1.5 s with a ball of one colour and a tone; H.264 and AAC."""
    t = np.arange(FRAMES) / FPS
    y, x = np.mgrid[:SIDE, :SIDE]
    at = SIDE * (0.8 - 0.6 * np.abs(np.sin(4 * t)))
    ball = (y[None] - at[:, None, None]) ** 2 + (x[None] - SIDE / 2) ** 2 < 64
    colour = np.array([127 + 120 * math.cos(2 * math.pi * (hue + k / 3)) for k in range(3)])
    frames = np.where(ball[..., None], colour, 24).astype(np.uint8)
    s = np.arange(int(FRAMES / FPS * SAMPLE_RATE)) / SAMPLE_RATE
    wave = (0.3 * np.sin(2 * math.pi * pitch_hz * s) * np.exp(-4 * (s % 0.5))).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, Clip(frames, wave, FPS, SAMPLE_RATE), preset="ultrafast")
    return path


def run_folder(
    folder: Path,
    *,
    label: str,
    seed: int,
    metrics: Mapping[str, float],
    variant: Mapping[str, str] | None = None,
    status: str = "finished",
    steps: int = 200,
    captions: Sequence[str] = CAPTIONS,
    clip: Path | None = None,
    real_clip: Path | None = None,
    attention_ms: float | None = None,
) -> Path:
    """Write one run's folder.

    Args:
        folder: is made.
        label: of its variant.
        seed: of it.
        metrics: final figures by tag; also, with a curve that falls to them, its learning curves.
        variant: what it differs in.
        status: ``finished``, ``failed`` or ``stopped``; for a running one hold ``ovi.runs.alive.alive(folder)``.
        steps: trained.
        captions: one a clip.
        clip: file that stands for every generated clip; None for no samples.
        real_clip: likewise for the real ones.
        attention_ms: width of the planted band around the diagonal; None for no maps.
    """
    folder.mkdir(parents=True)
    _json(folder / "run.json", {
        "label": label, "variant": dict(variant or {}), "seed": seed,
        "config_hash": hashlib.sha256(f"{label} {seed}".encode()).hexdigest()[:16],
        "sweep": "planted", "began": "2026-01-02T03:04:05",
    })  # fmt: skip
    config = {
        "data": {"path": "data/planted"},
        "trainer": {"max_steps": steps},
        "seed": seed,
        **{key.replace("/", "_"): value for key, value in (variant or {}).items()},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    _json(folder / "versions.json", {
        "command": ["ovi", "sweep", "sweep=planted"], "git": {"commit": "0123456789abcdef", "changed": []},
        "python": "3.11", "machine": "planted", "packages": {"torch": "2.8"},
    })  # fmt: skip
    _curves(folder, metrics, steps)
    if attention_ms is not None:
        _maps(folder / "attention", steps, attention_ms)
    generated = folder / "samples" / f"step_{steps:06d}"
    lines = []
    for number, caption in enumerate(captions):
        figures = {tag.removeprefix("val/"): value for tag, value in metrics.items() if tag == OFFSET}
        lines.append({"step": steps, "number": number, "caption": caption, "figures": figures})
        for source, target in ((clip, generated), (real_clip, folder / "samples" / "real")):
            if source is not None:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target / f"{number:03d}.mp4")
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "finished":
        _json(folder / "summary.json", {
            "steps": steps, "seconds": 80.0, "train_seconds": 60.0 + seed, "flops_per_step": 2e9,
            "flops": 2e9 * steps, "parameters": 2_500_000, "peak_memory_gb": 1.25, "seed": seed,
            "metrics": dict(metrics),
        })  # fmt: skip
    elif status == "failed":
        _json(folder / "failed.json", {"error": "RuntimeError: loss is NaN", "traceback": "...", "when": "2026-01-02"})
    return folder


def sweep_folder(
    root: Path, means: Mapping[str, float], seeds: Sequence[int] = (0, 1, 2), *, clips: bool = True, **options: Any
) -> Path:
    """A sweep of one finished run a variant and seed, ``OFFSET`` being its variant's mean plus (seed - 1) ms.

    Args:
        root: the sweep's folder.
        means: of ``OFFSET`` by fusion.
        seeds: of every variant.
        clips: whether there are samples.
        options: of ``run_folder``.
    """
    real = clip_file(root / ".media" / "real.mp4", 0.6, 660) if clips else None
    for n, (fusion, mean) in enumerate(means.items()):
        clip = (
            clip_file(root / ".media" / f"{n}.mp4", n / max(1, len(means)), 220 * 2 ** (n % 12 / 12)) if clips else None
        )
        for seed in seeds:
            offset = mean + seed - 1
            run_folder(
                root / f"fusion={fusion}_seed{seed}",
                label=f"fusion={fusion}",
                variant={"model/fusion": fusion},
                seed=seed,
                metrics={
                    OFFSET: offset,
                    "val/av_offset_xcorr_coverage": 0.75,
                    "val/av_offset_xcorr_n": 8.0,
                    "val_real/av_offset_xcorr_ms": 6.5,
                    LOSS: 1 + offset / 1000,
                },
                clip=clip,
                real_clip=real,
                **{"attention_ms": mean, **options},
            )
    return root


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _curves(folder: Path, metrics: Mapping[str, float], steps: int) -> None:
    """Learning curves as the CSV logger writes them: a row a step, empty where a tag was not logged."""
    tags = [tag for tag in metrics if not tag.startswith("val_real/")]
    lines = [",".join(["epoch", "step", "train/loss", *tags])]
    for step in range(0, steps, 2):
        lines.append(",".join(["0", str(step), f"{1 + math.exp(-step / 50):.6f}", *("" for _ in tags)]))
        if (step + 2) % (steps // 4) == 0:
            left = 1 + math.exp(-step / 50)
            lines.append(",".join(["0", str(step), "", *(f"{metrics[tag] * left:.6f}" for tag in tags)]))
    path = folder / "curves" / "metrics.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")


def _maps(folder: Path, step: int, width_ms: float) -> None:
    folder.mkdir()
    video, audio = (np.arange(18) + 0.5) / 12, (np.arange(46) + 0.5) / 31
    lines = []
    for direction, rows, columns in zip(DIRECTIONS, (video, audio), (audio, video)):
        far = 1000 * np.abs(columns[None] - rows[:, None])
        shares = np.exp(-far / width_ms)
        shares /= shares.sum(1, keepdims=True)
        Image.fromarray((255 * shares / shares.max()).astype(np.uint8)).save(
            folder / f"step_{step:06d}_{direction}.png"
        )
        lines.append({
            "step": step, "direction": direction, "ms": float((far * shares).sum(1).mean()),
            "uniform_ms": float(far.mean()),
            "query_times": rows.tolist(), "key_times": columns.tolist(), "real": [True] * len(columns),
            "shares": shares.tolist(), "blocks": [{"video": 0, "audio": 0, "ms": 1.0}],
        })  # fmt: skip
    (folder / "maps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


__all__ = ["CAPTIONS", "LOSS", "OFFSET", "clip_file", "run_folder", "sweep_folder"]
