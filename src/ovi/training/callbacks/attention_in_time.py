"""Shows when each modality attends when, block by block, and how far that is from the diagonal."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from ovi.attention_maps import PairMaps, TimeMap, record_attention
from ovi.data.batch import LatentBatch
from ovi.data.files import whole_file
from ovi.errors import OviError
from ovi.flow import noised
from ovi.training.callbacks.joint_eval import append_record, tensorboard
from ovi.training.datamodule import ShardsDataModule
from ovi.twin import TwinDiT

DIRECTIONS = {"video_hears_audio": "hears", "audio_sees_video": "sees"}
"""Tags and the attributes of ``PairMaps``."""

FOLDER = "attention"
RECORD = "maps.jsonl"
"""In that folder: a line a drawing and direction, with the mean map as numbers."""

Panel = tuple[str, TimeMap]


class AttentionInTime(L.Callback):
    """Draws the exchange's attention over time at the end of validation, as figures 2 and 3 of Ovi do (2510.01284).

    One forward pass a clip at one noise level, of the first validation samples with noise of their own that stays the
    same in every round, by the weights that validation sees: averaged ones if there are any. The main process alone.

    For each direction, ``video_hears_audio`` and ``audio_sees_video``: an image ``attention/<direction>`` of some pairs
    of blocks and their mean, in multiples of even attention; ``attention/<direction>_ms``, the expected distance in
    time between what attends and what is attended, mean over blocks, with ``_uniform_ms`` as that of even attention
    (nothing known of time); the same for every pair as ``attention_blocks/<direction>_ms_<video block>``; and
    ``attention/<direction>_mass`` where the softmax holds other tokens than the partner's.

    The run's folder gets the same, so that no event file need be read: ``attention/step_<n>_<direction>.png``, and a
    line in ``attention/maps.jsonl`` with the mean map and its times.

    A strategy without such a softmax (none, film, bottleneck) is told of once, and nothing is drawn. Neither is it with
    weights in shards, which no process can run alone.

    Args:
        sigma: noise level of both modalities.
        num_clips: samples averaged over.
        every_n_rounds: validation rounds from one drawing to the next, the first one included.
        num_shown: pairs of blocks in an image, spread over the depth.

    Raises:
        OviError: for counts below 1 or a noise level outside 0..1.
    """

    def __init__(self, *, sigma: float = 0.5, num_clips: int = 2, every_n_rounds: int = 1, num_shown: int = 5) -> None:
        counts = {"num_clips": num_clips, "every_n_rounds": every_n_rounds, "num_shown": num_shown}
        for name, value in counts.items():
            if value < 1:
                raise OviError(f"callbacks.attention_in_time.{name} must be at least 1, got {value}")
        if not 0 <= sigma <= 1:
            raise OviError(f"callbacks.attention_in_time.sigma must be in 0..1, got {sigma}")
        self.sigma, self.num_clips, self.every_n_rounds, self.num_shown = sigma, num_clips, every_n_rounds, num_shown
        self._rounds, self._off = 0, False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._rounds += 1
        if self._off or not trainer.is_global_zero or (self._rounds - 1) % self.every_n_rounds:
            return
        began = time.perf_counter()
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            self._give_up("weights in shards cannot be run by one process alone")
            return
        try:
            maps = self._maps(trainer, pl_module)
            if not maps:
                self._give_up("this fusion has no softmax over the partner's tokens")
                return
            self._show(trainer, pl_module, maps)
        except Exception as error:  # a picture is not worth a run
            self._give_up(f"{type(error).__name__}: {error}")
            return
        pl_module.log("val/attention_in_time_s", time.perf_counter() - began, rank_zero_only=True)

    def _maps(self, trainer: L.Trainer, module: L.LightningModule) -> list[PairMaps]:
        data: ShardsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        model, precision = cast(TwinDiT, module.model), trainer.precision_plugin
        samples = [s for s in data.first_validation_samples(self.num_clips) if s.video.numel() and s.audio.numel()]
        if not samples:
            raise OviError("none of the first validation samples has both pictures and sound")
        with torch.no_grad(), precision.forward_context(), record_attention(model) as recording:
            for number, sample in enumerate(samples):
                batch = sample.to(module.device)
                video, audio = (precision.convert_input(x) for x in self._noised(batch, number))
                text = [precision.convert_input(t) for t in batch.text]
                sigma = torch.full((1,), self.sigma, device=module.device)
                model(video, audio, sigma, text, text, audio_mask=batch.audio_mask)
        return recording.maps

    def _noised(self, sample: LatentBatch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Drawn on the host, so that the noise is the same on any device.
        draws = torch.Generator().manual_seed(number)

        def at_sigma(x: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(x.shape, generator=draws).to(x.device)
            return noised(x, noise, torch.full((1,), self.sigma, device=x.device))

        return at_sigma(sample.video), at_sigma(sample.audio)

    def _show(self, trainer: L.Trainer, module: L.LightningModule, maps: list[PairMaps]) -> None:
        writer = tensorboard(trainer)
        for direction, attribute in DIRECTIONS.items():
            found = [(pair, getattr(pair, attribute)) for pair in maps if getattr(pair, attribute) is not None]
            if not found:
                continue
            of_blocks = [time_map for _, time_map in found]
            figures = {
                "ms": _mean([m.offset_ms for m in of_blocks]),
                "uniform_ms": _mean([m.uniform_ms for m in of_blocks]),
            }
            mass = _mean([m.mass for m in of_blocks])
            if mass < 1 - 1e-4:
                figures["mass"] = mass
            values = {f"attention/{direction}_{name}": value for name, value in figures.items()}
            for pair, time_map in found:
                values[f"attention_blocks/{direction}_ms_{pair.video_block:02d}"] = time_map.offset_ms
            module.log_dict(values, rank_zero_only=True)
            step = (len(found) - 1) / max(1, min(self.num_shown, len(found)) - 1)
            chosen = [found[round(i * step)] for i in range(min(self.num_shown, len(found)))]
            panels = [(f"video {p.video_block}, audio {p.audio_block}", m) for p, m in chosen]
            mean = mean_map(of_blocks)
            if len(found) > 1:
                panels.insert(0, (f"mean of {len(found)} pairs", mean))
            picture = attention_image(panels, direction)
            self._keep(trainer, direction, picture, map_record(mean, found, figures))
            if writer is not None:
                writer.add_image(f"attention/{direction}", picture, trainer.global_step, dataformats="HWC")

    def _keep(self, trainer: L.Trainer, direction: str, picture: np.ndarray, numbers: dict[str, Any]) -> None:
        folder = Path(trainer.default_root_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, format="png", optimize=True)
        with whole_file(folder / f"step_{trainer.global_step:06d}_{direction}.png") as file:
            file.write(encoded.getvalue())
        append_record(folder / RECORD, {"step": trainer.global_step, "direction": direction, **numbers})

    def _give_up(self, why: str) -> None:
        self._off = True
        rank_zero_warn(f"attention in time is not shown in this run: {why}")

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rounds = int(state_dict["rounds"])


def mean_map(maps: Sequence[TimeMap]) -> TimeMap:
    """The mean of several maps over the same times."""
    shares = torch.stack([m.shares for m in maps]).nanmean(0)
    mass = _mean([m.mass for m in maps])
    return TimeMap(shares, maps[0].query_times, maps[0].key_times, maps[0].real, mass)


def map_record(mean: TimeMap, found: Sequence[tuple[PairMaps, TimeMap]], figures: dict[str, float]) -> dict[str, Any]:
    """One direction's mean map as plain data.

    Args:
        mean: over the pairs.
        found: every pair of blocks and its map.
        figures: what is told of the whole: ``ms``, ``uniform_ms``, perhaps ``mass``.

    Returns:
        The figures; ``query_times`` [Tq] and ``key_times`` [Tk] in seconds; ``real`` [Tk], keys that are no padding;
        ``shares`` [Tq][Tk], rows of sum 1, null where nothing was attended; ``blocks``, each pair's numbers and ``ms``.
    """
    shares = np.round(mean.shares.numpy(), 5).tolist()
    return {
        **figures,
        "query_times": np.round(mean.query_times.numpy(), 5).tolist(),
        "key_times": np.round(mean.key_times.numpy(), 5).tolist(),
        "real": mean.real.tolist(),
        "shares": [None if np.isnan(row).any() else row for row in shares],
        "blocks": [{"video": p.video_block, "audio": p.audio_block, "ms": m.offset_ms} for p, m in found],
    }


def attention_image(panels: Sequence[Panel], direction: str) -> np.ndarray:
    """Maps side by side as a picture, uint8 [height, width, 3].

    Args:
        panels: (title, map) each; the title gets the map's distance from the diagonal.
        direction: which way it goes, ``video_hears_audio`` or ``audio_sees_video``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attends, attended = direction.split("_")[0], direction.split("_")[2]
    # Even attention is 1 everywhere; one scale for all, so that a flat block does not look like a sharp one.
    pictures = [m.shares.numpy() * int(m.real.sum()) for _, m in panels]
    top = max(2.0, float(np.nanquantile(np.concatenate([p.ravel() for p in pictures]), 0.995)))
    figure = Figure(figsize=(2.6 * len(panels) + 1.1, 3.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, picture, (title, time_map) in zip(axes, pictures, panels):
        across, down = (_edges_s(times.numpy()) for times in (time_map.key_times, time_map.query_times))
        mesh = axis.pcolormesh(across, down, picture, cmap="magma", vmin=0, vmax=top)
        axis.set_facecolor("0.6")  # nothing attended
        ends = max(across[0], down[0]), min(across[-1], down[-1])
        axis.plot(ends, ends, color="white", linewidth=0.6, linestyle=(0, (1, 4)))
        axis.set_title(f"{title}\n{time_map.offset_ms:.0f} ms, even {time_map.uniform_ms:.0f} ms", fontsize=8)
        axis.set_xlabel(f"{attended} (s)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    axes[0].set_ylabel(f"{attends} (s)", fontsize=8)
    bar = figure.colorbar(mesh, ax=list(axes), fraction=0.03)
    bar.set_label("attention, times even", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _edges_s(times: np.ndarray) -> np.ndarray:
    """Edges of cells around times, half way between neighbours."""
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    half = (times[-1] - times[-2]) / 2 if len(times) > 1 else max(float(times[0]), 0.01)
    return np.array([max(0.0, times[0] - half), *middles, times[-1] + half])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
