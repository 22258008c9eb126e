"""Numbered clips of an endless set, and folders of them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovi.data.media import Clip, write_clip
from ovi.data.synthetic.draw import sample_scene
from ovi.data.synthetic.render import render
from ovi.data.synthetic.scene import Scene
from ovi.data.synthetic.words import caption, truth
from ovi.errors import OviError


@dataclass(frozen=True)
class SyntheticClip:
    """A rendered clip, its caption, and the truth as JSON-ready data."""

    clip: Clip
    caption: str
    truth: dict[str, Any]


def synthetic_clip(
    index: int,
    *,
    seed: int,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    **knobs: Any,
) -> SyntheticClip:
    """The clip numbered ``index`` of the endless set that ``seed`` names, whatever was drawn before.

    The margin at either end is two frames at low rates: a bounce is seen only with pictures before and after it.

    Args:
        index, seed: not negative.
        knobs: of ``sample_scene``.
    """
    scene = _scene(index, seed, num_frames, fps, knobs)
    clip = render(scene, fps=fps, num_frames=num_frames, height=height, width=width, sample_rate=sample_rate)
    return SyntheticClip(clip, caption(scene), truth(scene))


def write_synthetic(
    folder: str | Path,
    *,
    num_clips: int,
    seed: int,
    fps: float,
    num_frames: int,
    height: int,
    width: int,
    sample_rate: int,
    knobs: Mapping[str, Any] | None = None,
    num_workers: int = 0,
) -> Path:
    """Write ``clip_000000.mp4`` and so on, and ``captions.jsonl`` with file, caption and truth of each.

    Clips that are there already are kept, so an interrupted run goes on where it stopped. ``synthetic.json`` keeps the
    settings: going on with others would mix two sets.

    Args:
        folder: made where missing.
        num_clips: how many.
        knobs: of ``sample_scene``.
        num_workers: processes to spread the work over; 0 stays in this one.

    Returns:
        The path of ``captions.jsonl``.

    Raises:
        OviError: when the folder holds clips of other settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "seed": seed,
        "fps": fps,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "sample_rate": sample_rate,
        **dict(knobs or {}),
    }
    _claim(folder / "synthetic.json", settings)
    jobs = [(str(folder), index, settings) for index in range(num_clips)]
    if num_workers > 0:
        # Spawned, not forked: the caller may have threads running (torch, FFmpeg), which a fork would leave hanging.
        with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            lines = list(pool.map(_write_one, jobs, chunksize=16))
    else:
        lines = [_write_one(job) for job in jobs]
    captions = folder / "captions.jsonl"
    _write_text(captions, "".join(f"{line}\n" for line in lines))
    return captions


def _scene(index: int, seed: int, num_frames: int, fps: float, knobs: Mapping[str, Any]) -> Scene:
    spans = {"duration_s": num_frames / fps, "margin_s": max(0.1, 2.0 / fps)}
    return sample_scene(np.random.default_rng([seed, index]), **{**spans, **knobs})


def _write_one(job: tuple[str, int, dict[str, Any]]) -> str:
    folder, index, settings = job
    name = f"clip_{index:06d}.mp4"
    path = Path(folder) / name
    knobs = dict(settings)
    if path.exists():  # its words and truth follow from the seed; no need to draw pictures again
        drawn = {name: knobs.pop(name) for name in ("seed", "num_frames", "fps", "height", "width", "sample_rate")}
        scene = _scene(index, drawn["seed"], drawn["num_frames"], drawn["fps"], knobs)
        return json.dumps({"file": name, "caption": caption(scene), "truth": truth(scene)})
    made = synthetic_clip(index, **knobs)
    write_clip(path, made.clip, preset="veryfast")  # thousands of small files: time counts, size does not
    return json.dumps({"file": name, "caption": made.caption, "truth": made.truth})


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Leave the settings in the folder, or check that those found there are the same."""
    text = json.dumps(settings, sort_keys=True, indent=1)
    if path.exists():
        found = json.loads(path.read_text())
        if found != json.loads(text):
            differ = sorted(k for k in {*found, *settings} if found.get(k) != json.loads(text).get(k))
            raise OviError(
                f"{path.parent} holds synthetic clips made with other {', '.join(differ)} "
                f"({', '.join(f'{k}={found.get(k)}' for k in differ)}): give another folder, or empty this one"
            )
    else:
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
