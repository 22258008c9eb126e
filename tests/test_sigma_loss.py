"""Loss by noise level: planted errors come back per range, over any number of processes, and leave no trace."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ovi.errors import OviError
from ovi.flow import NoiseLevels, logit_normal
from ovi.metrics.sigma_loss import SigmaLoss
from ovi.training.callbacks.sigma_losses import SigmaLosses
from ovi.training.datamodule import ShardsDataModule
from test_training import module_for, trainer_for


def by_hand(sigma, error, buckets) -> tuple[np.ndarray, np.ndarray]:
    """Means and counts in float64, by comparing with the edges one by one."""
    sigma, error = np.asarray(sigma, np.float64), np.asarray(error, np.float64)
    means, counts = [], []
    for n in range(buckets):
        low, high = n / buckets, (n + 1) / buckets
        inside = (sigma >= low) & ((sigma < high) | (n == buckets - 1))
        means.append(error[inside].mean() if inside.any() else math.nan)
        counts.append(int(inside.sum()))
    return np.array(means), np.array(counts)


@pytest.mark.parametrize("buckets", [1, 4, 5, 8])
def test_planted_errors_come_back_per_range_however_batched(buckets):
    g = torch.Generator().manual_seed(0)
    sigma = torch.rand(500, generator=g)
    error = 0.3 + (sigma - 0.4).square() + 0.01 * torch.rand(500, generator=g)
    metric = SigmaLoss(buckets)
    for part in torch.arange(500).split([1, 99, 7, 393]):
        metric.update(sigma[part], error[part])
    means, counts = metric.compute()
    expected, number = by_hand(sigma, error, buckets)
    np.testing.assert_allclose(means.reshape(-1), expected, rtol=2e-6)
    assert counts.reshape(-1).tolist() == number.tolist()
    assert len(logged_by([(sigma, error, error)], buckets)) == 4 * buckets


def test_ends_belong_to_the_outer_ranges_and_an_empty_one_is_no_figure():
    metric = SigmaLoss(4)
    metric.update(torch.tensor([0.0, 1.0, 0.25, 0.2499]), torch.tensor([1.0, 2.0, 3.0, 5.0]))
    means, counts = metric.compute()
    assert counts.tolist() == [2, 1, 0, 1]
    assert means[[0, 1, 3]].tolist() == [3, 3, 2]
    assert means[2].isnan()


def test_no_range_is_refused():
    with pytest.raises(OviError, match="num_buckets must be at least 1, got 0"):
        SigmaLoss(0)
    with pytest.raises(OviError, match=r"callbacks\.sigma_losses\.num_buckets"):
        SigmaLosses(num_buckets=0)


# --- as the callback logs it --------------------------------------------------------------------------------------


def logged_by(batches, num_buckets=5) -> dict[str, float]:
    """What the callback logs of (sigma, video error, audio error) batches, with nothing of Lightning about it."""
    logged: dict[str, float] = {}
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values, **_: logged.update(values))
    trainer = SimpleNamespace(sanity_checking=False)
    callback = SigmaLosses(num_buckets=num_buckets)
    callback.on_validation_epoch_start(trainer, module)
    for n, (sigma, video, audio) in enumerate(batches):
        ones = torch.ones_like(sigma)
        found = {"errors": (video, audio), "levels": NoiseLevels(sigma, sigma, ones, ones)}
        callback.on_validation_batch_end(trainer, module, found, None, n)
    callback.on_validation_epoch_end(trainer, module)
    return logged


def planted(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels that leave 0.4-0.6 empty, and errors that grow with them."""
    sigma = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.8
    sigma = torch.where(sigma > 0.4, sigma + 0.2, sigma)
    return sigma, 1 + sigma, 3 - 2 * sigma


def of_process(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    # Unequal shares, so that a mean of means would be another figure.
    torch.save(logged_by([planted(40, 1), planted(3, 2)] if rank == 0 else [planted(5, 3)]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_log_the_figures_of_one(tmp_path):
    mp.spawn(of_process, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = logged_by([planted(40, 1), planted(3, 2), planted(5, 3)])
    assert first == second
    assert first == pytest.approx(whole, rel=1e-6)
    assert "val_sigma/video_0.4-0.6" not in whole
    assert sum(value for tag, value in whole.items() if tag.startswith("val_sigma_n/video")) == 48
    sigma, video, audio = (torch.cat(x) for x in zip(planted(40, 1), planted(3, 2), planted(5, 3)))
    for name, error in (("video", video), ("audio", audio)):
        means, _ = by_hand(sigma, error, 5)
        assert whole[f"val_sigma/{name}_0-0.2"] == pytest.approx(means[0], rel=1e-6)
        assert whole[f"val_sigma/{name}_0.8-1"] == pytest.approx(means[4], rel=1e-6)


class Kept(L.Callback):
    """Keeps what validation steps return."""

    def __init__(self):
        self.found = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.found.append(outputs)


def fitted(folder, data, *callbacks, **options):
    folder.mkdir()
    module = module_for(data, density=logit_normal)
    trainer = trainer_for(folder, 2, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "end.ckpt")
    return trainer, torch.load(folder / "end.ckpt", weights_only=True)


def test_a_run_logs_them_and_nothing_else_of_it_changes(tiny_shards, tmp_path):
    data, kept = ShardsDataModule(path=str(tiny_shards), batch_size=3), Kept()
    trainer, saved = fitted(tmp_path / "with", data, SigmaLosses(num_buckets=4), kept, num_sanity_val_steps=1)
    plain, saved_plain = fitted(tmp_path / "without", data)
    figures = {tag: float(v) for tag, v in trainer.callback_metrics.items()}
    mine = {tag for tag in figures if tag.startswith("val_sigma")}
    assert {tag: figures[tag] for tag in figures.keys() - mine} == {
        k: float(v) for k, v in plain.callback_metrics.items()
    }
    assert saved["state_dict"].keys() == saved_plain["state_dict"].keys()
    assert "SigmaLosses" not in str(saved["callbacks"])

    found = kept.found[1:]  # the first was the sanity check's
    sigma = torch.cat([step["levels"].video for step in found])
    assert len(sigma) == data.index.num_samples("val")
    for index, name in enumerate(("video", "audio")):
        means, counts = by_hand(sigma, torch.cat([step["errors"][index] for step in found]), 4)
        for n, edges in enumerate(("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")):
            assert figures.get(f"val_sigma_n/{name}_{edges}", 0) == counts[n]
            if counts[n]:
                assert figures[f"val_sigma/{name}_{edges}"] == pytest.approx(means[n], rel=1e-5)
        present = counts > 0
        whole = float((means[present] * counts[present]).sum() / counts.sum())
        assert whole == pytest.approx(figures[f"val/loss_{name}"], rel=1e-4)
