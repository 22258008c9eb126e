"""The data module under a real Trainer: epochs, interruption anywhere, ranks, mixtures, damage."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from latent_sets import copy_set, write_set
from ovi.data.reading.plan import Position
from ovi.errors import OviError
from ovi.training.datamodule import ShardsDataModule

NUM, BATCH = 19, 4
PER_EPOCH = NUM // BATCH


class Model(L.LightningModule):
    """Keeps the keys of every batch that it takes a step on."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys, self.stop_at = [], stop_at
        self.val_keys = []

    def training_step(self, batch, batch_idx):
        assert batch.video.dtype == torch.float32
        if len(self.keys) == self.stop_at:
            raise KeyboardInterrupt
        self.keys.append(batch.keys)
        return (self.weight - batch.video.mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.val_keys += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveAt(L.Callback):
    """Saves a checkpoint at a hook once so many steps are done."""

    def __init__(self, path, step, hook="on_train_batch_end"):
        setattr(self, hook, lambda trainer, *_, **__: self.save(trainer))
        self.path, self.step = path, step

    def save(self, trainer):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer_for(folder, steps, *callbacks, **knobs):
    options = {
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "reload_dataloaders_every_n_epochs": 0,
    }
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=steps, callbacks=list(callbacks), **{**options, **knobs}
    )


def data_for(index, **knobs):
    return ShardsDataModule(path=str(index.folder), **{"batch_size": BATCH, "shuffle_buffer": 8, **knobs})


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), {"train": [5, 5, 5, 4], "val": [3]})


@pytest.fixture(scope="module")
def whole(index, tmp_path_factory):
    """Keys of fourteen steps without a break: three epochs and a half."""
    model = Model()
    trainer_for(tmp_path_factory.mktemp("whole"), 14).fit(model, datamodule=data_for(index))
    return model.keys


def test_an_epoch_gives_every_sample_at_most_once_and_epochs_differ(whole):
    epochs = [[key for keys in whole[at : at + PER_EPOCH] for key in keys] for at in range(0, 12, PER_EPOCH)]
    assert all(len(set(epoch)) == PER_EPOCH * BATCH for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("reload", [0, 1])
def test_the_order_does_not_depend_on_reloading(index, whole, tmp_path, reload):
    model = Model()
    trainer_for(tmp_path, 10, reload_dataloaders_every_n_epochs=reload).fit(model, datamodule=data_for(index))
    assert model.keys == whole[:10]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("reload", [0, 1])
def test_resuming_anywhere_gives_the_very_next_batch(index, whole, tmp_path, hook, step, reload):
    """Saved within an epoch, at its last batch, or by a validation in between; killed some steps later."""
    if hook == "on_validation_end" and step % 3:
        pytest.skip("no validation there")
    first = Model(stop_at=step + 2)
    options = {"reload_dataloaders_every_n_epochs": reload}
    trainer = trainer_for(tmp_path, 14, SaveAt(tmp_path / "a.ckpt", step, hook), **options)
    with pytest.raises(SystemExit):
        trainer.fit(first, datamodule=data_for(index))
    rest = Model()
    trainer_for(tmp_path, 14, **options).fit(rest, datamodule=data_for(index), ckpt_path=tmp_path / "a.ckpt")
    assert first.keys[:step] + rest.keys == whole


@pytest.mark.parametrize("steps", [(2, 5, 7, 14), (4, 8, 14), (3, 4, 5, 14)])
@pytest.mark.parametrize("reload", [0, 1])
def test_runs_that_end_at_max_steps_and_are_continued_are_one_run(index, whole, tmp_path, steps, reload):
    keys, checkpoint = [], None
    for number, stop in enumerate(steps):
        model = Model()
        trainer = trainer_for(tmp_path, stop, reload_dataloaders_every_n_epochs=reload)
        trainer.fit(model, datamodule=data_for(index), ckpt_path=checkpoint)
        checkpoint = tmp_path / f"{number}.ckpt"
        trainer.save_checkpoint(checkpoint)
        keys += model.keys
    assert keys == whole


def test_a_checkpoint_at_an_epochs_end_continues_with_the_next(index, whole, tmp_path):
    first = Model(stop_at=9)
    trainer = trainer_for(tmp_path, 14, SaveAt(tmp_path / "a.ckpt", 8, "on_train_epoch_end"))
    with pytest.raises(SystemExit):
        trainer.fit(first, datamodule=data_for(index))
    rest = Model()
    trainer_for(tmp_path, 14).fit(rest, datamodule=data_for(index), ckpt_path=tmp_path / "a.ckpt")
    assert rest.keys == whole[8:]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0)])
def test_resuming_on_another_number_of_workers(index, whole, tmp_path, before, after):
    first = Model(stop_at=7)
    trainer = trainer_for(tmp_path, 14, SaveAt(tmp_path / "a.ckpt", 6))
    with pytest.raises(SystemExit):
        trainer.fit(first, datamodule=data_for(index, num_workers=before))
    assert first.keys == whole[:7]
    rest = Model()
    data = data_for(index, num_workers=after)
    trainer_for(tmp_path, 14).fit(rest, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    assert rest.keys == whole[6:]


def fake_trainer(steps, *, world_size=1, rank=0):
    """A trainer as the data module sees one, that has made so many steps."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=steps))
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        world_size=world_size,
        global_rank=rank,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("before", "after", "done"), [(2, 1, 4), (1, 2, 6), (4, 2, 3), (2, 4, 4), (3, 2, 3), (2, 3, 4)]
)
def test_resuming_on_another_number_of_ranks_loses_nothing(tmp_path, before, after, done):
    index = write_set(tmp_path, {"train": [12] * 4, "val": [1]})
    read, states = [], []
    for rank in range(before):
        data = data_for(index, batch_size=2)
        data.trainer = fake_trainer(0, world_size=before, rank=rank)
        loader = iter(data.train_dataloader())
        read += [key for _ in range(done) for key in next(loader).keys]
        data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = done
        states.append(data.state_dict())
    assert all(state == states[0] for state in states)
    rest = []
    for rank in range(after):
        resumed = data_for(index, batch_size=2)
        resumed.trainer = fake_trainer(done, world_size=after, rank=rank)
        resumed.load_state_dict(states[0])
        rest += [key for batch in resumed.train_dataloader() for key in batch.keys]
    assert set(read) | set(rest) == {f"clip-{n:04d}" for n in range(48)}
    assert len(set(read) & set(rest)) == 2 * (before * done % after)


def test_other_data_begins_the_epoch_anew_and_says_so(index):
    data = data_for(index)
    data.load_state_dict({"epoch": 2, "batch": 3, "world_size": 1, "plan": data.train_plan.fingerprint})
    assert data.state_dict()["batch"] == 3
    other = data_for(index, batch_size=2)
    with pytest.warns(UserWarning, match="epoch 2 begins anew"):
        other.load_state_dict(data.state_dict())
    assert other._begin() == Position(2, 0, 1)


def test_an_epoch_that_the_trainer_cuts_short_goes_on_in_its_next(index, whole, tmp_path):
    model = Model()
    trainer_for(tmp_path, 14, limit_train_batches=3).fit(model, datamodule=data_for(index))
    assert model.keys == whole


def test_validation_leaves_nothing_out_on_any_number_of_ranks(tmp_path):
    index = write_set(tmp_path, {"train": [4], "val": [7, 4]})
    for world_size in (1, 2, 3, 4, 8, 11):
        data, seen, lengths = data_for(index, val_batch_size=3), [], set()
        for rank in range(world_size):
            data.trainer = fake_trainer(0, world_size=world_size, rank=rank)
            batches = [batch.keys for batch in data.val_dataloader()]
            lengths.add(len(batches))
            seen += [key for keys in batches for key in keys]
        assert sorted(seen) == [f"clip-{n:04d}" for n in range(4, 15)]
        assert len(lengths) == 1


def test_lightning_may_not_share_samples_out_as_well(index):
    data = data_for(index)
    data.trainer = fake_trainer(0, world_size=2)
    data.trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(OviError, match="use_distributed_sampler=false"):
        data.train_dataloader()


# --- damage ----------------------------------------------------------------------------------------------------------


def test_training_goes_on_without_a_damaged_shard_and_counts_it(index, whole, tmp_path):
    folder = copy_set(index, tmp_path / "set")
    (folder / "train-000001.tar").write_bytes(b"\0" * (folder / "train-000001.tar").stat().st_size)
    data = ShardsDataModule(path=str(folder), batch_size=BATCH, shuffle_buffer=8)
    model = Model()
    with pytest.warns(UserWarning, match=r"left out: .*train-000001\.tar.*holds 0 samples, the index says 5"):
        trainer_for(tmp_path, 8).fit(model, datamodule=data)
    bad = {f"clip-{n:04d}" for n in range(5, 10)}
    assert [[key for key in keys if key not in bad] for keys in whole[:8]] == model.keys
    assert data.skipped.total == sum(key in bad for keys in whole[:8] for key in keys)


def test_shards_that_are_missing_or_copied_in_part_are_left_out_and_named(index, tmp_path):
    folder = copy_set(index, tmp_path / "set")
    (folder / "train-000001.tar").unlink()
    cut = folder / "train-000002.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"2 of \d+ shards are missing or not whole.*000001.tar: is in the index but"):
        data = ShardsDataModule(path=str(folder), batch_size=1, shuffle_buffer=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = [key for batch in data.train_dataloader() for key in batch.keys]
    rest = {f"clip-{n:04d}" for n in range(index.num_samples("train"))} - {f"clip-{n:04d}" for n in range(5, 15)}
    assert rest < set(keys)
    assert not {f"clip-{n:04d}" for n in range(5, 10)} & set(keys)
    with pytest.raises(OviError, match=r"train-000001\.tar: is in the index but not there"):
        ShardsDataModule(path=str(folder), batch_size=1, strict=True)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(OviError, match="is in the index but not there"):
        ShardsDataModule(path=str(folder), batch_size=1)


def test_strict_stops(index, tmp_path):
    folder = copy_set(index, tmp_path / "set")
    (folder / "train-000001.tar").write_bytes(b"\0" * (folder / "train-000001.tar").stat().st_size)
    data = ShardsDataModule(path=str(folder), batch_size=BATCH, shuffle_buffer=8, strict=True)
    with pytest.raises(OviError, match=r"train-000001\.tar.*data\.strict=false"):
        trainer_for(tmp_path, 8).fit(Model(), datamodule=data)


# --- shapes and mixtures ---------------------------------------------------------------------------------------------


def test_sound_alone_and_other_sizes_come_in_batches_of_their_own(tmp_path):
    shapes = [None, {"video": (12, 8, 4, 4), "audio": (31, 64)}, {"video": None, "audio": (62, 64)}, None]
    index = write_set(tmp_path, {"train": [6, 6, 6], "val": [2]}, shapes=shapes)
    data = data_for(index, batch_size=None, token_budget=260, shuffle_buffer=100)
    found = {}
    for batch in data.train_dataloader():
        positions = batch.video[0, 0].numel() + batch.audio.shape[1]
        assert len(batch) * positions <= 260
        found.setdefault((tuple(batch.video.shape[1:]), tuple(batch.audio.shape[1:])), []).append(batch)
    sizes = {shape: [len(batch) for batch in batches] for shape, batches in found.items()}
    assert sizes == {
        ((12, 8, 2, 2), (31, 64)): [4],
        ((12, 8, 4, 4), (31, 64)): [1] * 6,
        ((12, 0, 0, 0), (62, 64)): [4],
    }
    alone = found[((12, 0, 0, 0), (62, 64))][0]
    assert not alone.has_video
    assert alone.has_audio
    assert torch.equal(alone.audio[:, 0, 0].float(), -torch.tensor([float(k[5:]) for k in alone.keys]))


def test_a_mixture_gives_each_set_its_share_and_all_its_samples(tmp_path):
    write_set(tmp_path / "a", {"train": [5, 5], "val": [2]}, prefix="a")
    write_set(tmp_path / "b", {"train": [30], "val": [1]}, prefix="b")
    sets = {"a": {"path": str(tmp_path / "a"), "weight": 3}, "b": {"path": str(tmp_path / "b"), "weight": 1}}
    data = ShardsDataModule(sets=sets, batch_size=1, shuffle_buffer=8)
    counts = {}
    for epoch in range(3):
        numbers = data.train_plan.samples(epoch)
        assert ((numbers < 10).sum(), (numbers >= 10).sum()) == (30, 10)
        for number in numbers.tolist():
            counts[number] = counts.get(number, 0) + 1
    assert {counts[n] for n in range(10)} == {9}
    assert {counts[n] for n in range(10, 40)} == {1}
    assert len([b for b in data.val_dataloader()]) == 3


def test_a_list_of_sets_gives_every_sample_once(tmp_path):
    for name, count in (("a", 5), ("b", 11)):
        write_set(tmp_path / name, {"train": [count], "val": [1]}, prefix=name)
    data = ShardsDataModule(sets=[str(tmp_path / "a"), str(tmp_path / "b")], batch_size=2, shuffle_buffer=8)
    keys = sorted(key for batch in data.train_dataloader() for key in batch.keys)
    assert keys == [f"a-{n:04d}" for n in range(5)] + [f"b-{n:04d}" for n in range(11)]
    assert data.first_validation_samples(5)[1].keys == ["b-0011"]


def _other_statistics(content):
    content["codecs"]["state"]["audio"] = {"fitted": True, "mean": [1.0], "std": [2.0]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: (c["clock"].update(fps=12), c["latent_shapes"].update(audio=[20, 64])), "fps 8 against 12"),
        (lambda c: c["codecs"]["text"]["knobs"].update(text_dim=32), "text.knobs.text_dim 64 against 32"),
        (lambda c: c["latent_shapes"].update(video=[9, 8, 2, 2]), "video channels 12 against 9"),
        (_other_statistics, "other statistics of the audio latents"),
    ],
)
def test_sets_that_do_not_agree_are_refused(index, tmp_path, change, expected):
    other = copy_set(index, tmp_path / "other", change)
    with pytest.raises(OviError, match=rf"first and second cannot be mixed.*{expected}"):
        ShardsDataModule(sets={"first": str(index.folder), "second": str(other)})


def test_resampling_draws_with_replacement_by_weight(tmp_path):
    write_set(tmp_path / "a", {"train": [1] * 6, "val": [1]}, prefix="a")
    write_set(tmp_path / "b", {"train": [1] * 6, "val": [1]}, prefix="b")
    sets = {n: {"path": str(tmp_path / n), "weight": w} for n, w in (("a", 1), ("b", 2))}
    data = ShardsDataModule(sets=sets, batch_size=3, resampled=True, samples_per_epoch=300, shuffle_buffer=4)
    numbers = torch.from_numpy(data.train_plan.samples(0))
    counts = numbers.bincount(minlength=12)
    assert (counts[:6].sum(), counts[6:].sum()) == (100, 200)
    # 200 draws over 6: 33 each, deviation 5.3; four of them.
    assert ((counts[6:] - 200 / 6).abs() < 22).all()
    assert len(data.train_dataloader().batches) == 100


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"batch_size": None}, "batch_size, data.token_budget, or both"),
        ({"token_budget": 5}, r"63 latent positions exceeds data.token_budget=5"),
        ({"sets": ["a"]}, "not both"),
        ({"path": None}, "data.path=FOLDER for one set, or data.sets"),
        ({"path": None, "sets": {"a": {"path": "x", "wieght": 1}}}, r"data.sets.a: needs a path"),
        ({"path": None, "sets": {"a": {"path": "{}", "weight": -1}}}, "positive number, got -1"),
        ({"path": None, "sets": {"a": "{}", "b": {"path": "{}", "weight": 1}}}, "a has no weight"),
        ({"path": None, "sets": ["{}", "{}"]}, "names a folder twice"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_impossible_knobs_are_named(index, knobs, expected):
    def placed(value):
        if isinstance(value, str):
            return value.format(index.folder)
        if isinstance(value, dict):
            return {k: placed(v) for k, v in value.items()}
        return [placed(v) for v in value] if isinstance(value, list) else value

    with pytest.raises(OviError, match=expected):
        ShardsDataModule(**{"path": str(index.folder), **placed(knobs)}).train_dataloader()
