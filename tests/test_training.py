"""The Lightning side on real shards: fair draws, exact resume, averaged weights, what is written and logged."""

import json
from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latent_sets import write_set
from ovi.data.batch import LatentBatch
from ovi.data.media import probe
from ovi.errors import OviError
from ovi.flow import independent, logit_normal, shared, tasks
from ovi.fusion import FUSIONS
from ovi.generate import Generator
from ovi.guidance import GUIDANCES, cfg
from ovi.metrics.av_offset import AVOffset
from ovi.metrics.impacts import MeanImpactOffset
from ovi.patch import LinearPatch, VideoPatch
from ovi.sampling import euler
from ovi.tower import Tower
from ovi.training.callbacks.ema import WarmupEMA
from ovi.training.callbacks.joint_eval import JointEvalCallback
from ovi.training.callbacks.sample_logger import SampleLogger, spectrogram_image
from ovi.training.callbacks.throughput import Throughput
from ovi.training.datamodule import ShardsDataModule
from ovi.training.module import TwinModule
from ovi.twin import build_twin


def module_for(data, fusion="ovi", seed=0, **knobs):
    torch.manual_seed(7)
    tower = {"dim": 24, "num_heads": 2, "num_blocks": 1, "ffn_dim": 32, "freq_dim": 16}
    model = build_twin(
        data.layout,
        video=partial(Tower, patch=VideoPatch, **tower),
        audio=partial(Tower, patch=LinearPatch, **tower),
        fusion=FUSIONS[fusion],
    )
    return TwinModule(model, optimizer=partial(torch.optim.AdamW, lr=3e-3), seed=seed, **knobs)


def trainer_for(folder, steps, **knobs):
    options = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": steps,
        "check_val_every_n_epoch": None,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, **{**options, **knobs})


class Losses(L.Callback):
    """Keeps every training loss and the keys it came from."""

    def __init__(self):
        self.losses, self.keys = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.keys.append(batch.keys)


def test_training_learns(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=8)
    module, losses = module_for(data), Losses()
    trainer = trainer_for(tmp_path, 60, callbacks=[losses])
    trainer.fit(module, datamodule=data)
    assert np.mean(losses.losses[-8:]) < 0.85 * np.mean(losses.losses[:4])
    metrics = trainer.callback_metrics
    expected = 0.85 * metrics["val/loss_video"] + 0.15 * metrics["val/loss_audio"]
    assert float(metrics["val/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_variants_see_the_same_data_and_draws(tiny_shards, tmp_path):
    """Two models that differ in fusion train on the same samples, noises and noise levels."""
    seen = []
    for fusion in ("ovi", "none"):
        data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
        module, losses, inputs = module_for(data, fusion), Losses(), []
        forward = module.model.forward

        def spy(video, audio, sigma, *rest, forward=forward, inputs=inputs, **options):
            inputs.append((video.sum().item(), audio.sum().item(), [s.tolist() for s in sigma]))
            return forward(video, audio, sigma, *rest, **options)

        module.model.forward = spy
        trainer_for(tmp_path, 6, callbacks=[losses], limit_val_batches=0).fit(module, datamodule=data)
        seen.append((losses.keys, inputs))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 6


def test_epochs_differ_and_each_covers_the_set(tiny_shards, tmp_path):
    data, losses = ShardsDataModule(path=str(tiny_shards), batch_size=1), Losses()
    count = data.index.num_samples("train")
    trainer_for(tmp_path, 2 * count, callbacks=[losses], limit_val_batches=0).fit(module_for(data), datamodule=data)
    order = [key for keys in losses.keys for key in keys]
    assert sorted(order[:count]) == sorted(order[count:])
    assert len(set(order)) == count
    assert order[:count] != order[count:]


def test_resuming_at_an_epochs_end_continues_exactly(tiny_shards, tmp_path):
    def run(folder, epochs, checkpoint=None):
        data, losses = ShardsDataModule(path=str(tiny_shards), batch_size=4), Losses()
        per_epoch = data.index.num_samples("train") // 4
        trainer = trainer_for(folder, epochs * per_epoch, callbacks=[losses, WarmupEMA(decay=0.9)], limit_val_batches=0)
        trainer.fit(module_for(data), datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / "end.ckpt")
        return losses

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", 4)
    half = run(tmp_path / "b", 2)
    rest = run(tmp_path / "b", 4, tmp_path / "b" / "end.ckpt")
    assert half.keys + rest.keys == whole.keys
    # At the end of fit the averaged weights replace the current ones, so the losses after it start from those.
    assert half.losses == pytest.approx(whole.losses[: len(half.losses)])


def test_text_dropout_hides_prompts_in_training_alone(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=8)
    module, texts = module_for(data, text_dropout=1.0), {"train": [], "val": []}
    forward = module.model.forward

    def spy(video, audio, sigma, video_text, audio_text, **options):
        texts["train" if module.training else "val"] += [t.abs().sum().item() for t in video_text]
        return forward(video, audio, sigma, video_text, audio_text, **options)

    module.model.forward = spy
    trainer_for(tmp_path, 2).fit(module, datamodule=data)
    assert max(texts["train"]) == 0
    assert min(texts["val"]) > 0


def first_batch(data):
    return next(iter(data.train_dataloader())).to("cpu")


def spied(module):
    """What the model is called with, and the values logged, by name."""
    calls, logged, forward = [], {}, module.model.forward

    def spy(video, audio, sigma, *texts, **options):
        calls.append({"video": video, "audio": audio, "sigma": sigma, **options})
        return forward(video, audio, sigma, *texts, **options)

    module.model.forward = spy
    module.log_dict = lambda values, **_: logged.update(values)
    return calls, logged


@pytest.mark.parametrize(("task", "given"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_is_clean_and_only_the_other_counts(tiny_shards, task, given):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    shares = {"a2v": 0.0, "v2a": 0.0, task: 1.0}
    module = module_for(data, density=logit_normal, timesteps=partial(tasks, **shares), audio_weight=0.5)
    calls, logged = spied(module)
    batch = first_batch(data)
    loss = module.training_step(batch, 0)
    levels = dict(zip(("video", "audio"), calls[0]["sigma"]))
    other = "video" if given == "audio" else "audio"
    assert torch.equal(levels[given], torch.zeros(4))
    assert torch.equal(calls[0][given], getattr(batch, given))
    assert levels[other].min() > 0
    assert float(loss.detach()) == pytest.approx(
        {"video": 0.85, "audio": 0.5}[other] * float(logged[f"train/loss_{other}"])
    )
    assert set(logged) == {"train/loss", f"train/loss_{other}"}
    loss.backward()
    gradients = [p.grad.abs().max() for p in getattr(module.model, given).out.parameters()]
    assert max(gradients) == 0  # what the network says of a given modality teaches nothing


def test_losses_of_mixed_tasks_are_means_over_their_samples(tiny_shards):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=8)
    module = module_for(data, timesteps=partial(tasks, a2v=0.4, v2a=0.4))
    torch.nn.init.normal_(module.model.video.out.head.weight, std=0.1)
    _, logged = spied(module)
    batch = first_batch(data)
    module.training_step(batch, 0)
    draws = module._draws(1, 0)
    levels = module.timesteps(8, draws, module.density, (0, 0))
    assert 0 < levels.video_weight.sum() < 8
    video, audio = module._errors(batch, levels, draws, text_dropout=0.1)
    assert torch.allclose(logged["train/loss_video"], video[levels.video_weight == 1].mean())
    assert torch.allclose(logged["train/loss_audio"], audio[levels.audio_weight == 1].mean())


@pytest.mark.parametrize("timesteps", [shared, independent, tasks])
def test_validation_is_at_one_level_for_both_and_always_the_same(tiny_shards, timesteps):
    """Whatever training draws: as in sampling, without dropouts, so that losses compare."""
    data = ShardsDataModule(path=str(tiny_shards), batch_size=8)
    batch, seen = first_batch(data), []
    for module in (
        module_for(data),
        module_for(data, timesteps=timesteps, text_dropout=1.0, exchange_dropout=1.0),
    ):
        calls, logged = spied(module)
        module.validation_step(batch, 3)
        module.validation_step(batch, 3)
        assert set(calls[0]) == {"video", "audio", "sigma"}
        assert torch.equal(*calls[0]["sigma"])
        assert torch.equal(calls[0]["video"], calls[1]["video"])
        assert set(logged) == {"val/loss", "val/loss_video", "val/loss_audio"}
        seen.append((calls[0]["video"], calls[0]["audio"], calls[0]["sigma"][0], logged["val/loss"]))
    assert all(torch.equal(a, b) for a, b in zip(*seen))


def test_exchange_dropout_shuts_both_gates_of_whole_samples_in_training_alone(tiny_shards):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=8)
    batch = first_batch(data)
    plain, dropping = module_for(data), module_for(data, exchange_dropout=0.3)
    (calls, _), (gated, _) = spied(plain), spied(dropping)
    for i in range(40):
        plain.training_step(batch, i)
        dropping.training_step(batch, i)
    assert all({"a2v", "v2a"}.isdisjoint(call) for call in calls)
    gates = torch.stack([call["a2v"] for call in gated])
    assert torch.equal(gates, torch.stack([call["v2a"] for call in gated]))
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert (gates == 0).float().mean().item() == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / 320) ** 0.5)
    assert len(gates.unique(dim=0)) > 20
    for a, b in zip(calls, gated):  # the other draws are what they were
        assert torch.equal(a["video"], b["video"])
        assert torch.equal(a["sigma"][0], b["sigma"][0])


def test_levels_are_drawn_for_the_tokens_of_each_modality(tiny_shards):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=2)
    asked = []

    def density(batch_size, generator, num_tokens):
        asked.append(num_tokens)
        return torch.full((batch_size,), 0.5)

    module = module_for(data, density=density, timesteps=independent)
    spied(module)
    batch = first_batch(data)
    module.training_step(batch, 0)
    _, _, frames, height, width = batch.video.shape
    assert asked[-2:] == [frames * (height // 2) * (width // 2), batch.audio.shape[1]]


def test_padded_audio_is_neither_heard_nor_learnt(tiny_shards):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=2)
    module, batch = module_for(data), first_batch(data)
    _, logged = spied(module)
    for tower in (module.model.video, module.model.audio):
        torch.nn.init.normal_(tower.out.head.weight, std=0.1)
    mask = torch.ones(batch.audio.shape[:2], dtype=torch.bool)
    mask[0, 5:] = False
    losses = []
    for value in (0.0, 50.0):
        audio = torch.where(mask[..., None], batch.audio, value)
        module.training_step(replace(batch, audio=audio, audio_mask=mask), 0)
        losses.append((logged["train/loss_video"], logged["train/loss_audio"]))
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-4)


@pytest.mark.parametrize("knob", ["text_dropout", "exchange_dropout"])
def test_a_dropout_that_is_no_share_is_named(tiny_shards, knob):
    with pytest.raises(OviError, match=rf"flow\.{knob} is a share of samples, 0 to 1, got 1\.5"):
        module_for(ShardsDataModule(path=str(tiny_shards)), **{knob: 1.5})


def test_noise_levels_that_make_no_sense_are_named_before_training(tiny_shards):
    with pytest.raises(OviError, match=r"flow\.timesteps\.a2v and v2a are shares"):
        module_for(ShardsDataModule(path=str(tiny_shards)), timesteps=partial(tasks, a2v=0.9))


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory):
    """A short run with all callbacks, as the train command sets it up."""
    folder = tmp_path_factory.mktemp("run")
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    module = module_for(data, record={"note": "kept"})
    generator = Generator(sampler=partial(euler, shift=1.0), num_steps=2, guidance=cfg(), batch_size=2)
    weights = []

    class Spy:
        def consume(self, clip, trainer):
            weights.append(module.model.video.out.head.weight.detach().clone())

        def report(self, trainer, module):
            pass

    consumers = {
        "media": SampleLogger(num_shown=1),
        "spy": Spy(),
        "off": None,
    }
    callbacks = [
        JointEvalCallback(
            generator=generator,
            metrics={"a": AVOffset, "b": MeanImpactOffset, "off": None},
            consumers=consumers,
            num_clips=3,
        ),
        Throughput(every_n_steps=2),
        WarmupEMA(decay=0.5),
    ]
    trainer = trainer_for(
        folder, 8, callbacks=callbacks, val_check_interval=4, log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder, trainer, module, weights


def test_clips_are_written_as_playable_files(finished):
    folder, *_ = finished
    for sub in ("real", "step_000004", "step_000008"):
        files = sorted((folder / "samples" / sub).glob("*.mp4"))
        assert [f.name for f in files] == ["000.mp4", "001.mp4", "002.mp4"]
        info = probe(files[0])
        assert (info.width, info.height, info.fps, info.sample_rate) == (32, 32, 8, 16000)
        assert info.has_audio
        assert info.duration_s == pytest.approx(1.5, abs=0.05)


def test_tensorboard_holds_scalars_animation_sound_and_spectrogram(finished):
    folder, *_ = finished
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "audio": 0, "scalars": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {"train/loss", "train/loss_video", "val/loss_audio", "train/samples_per_s", "train/data_wait_share"}
    wanted |= {"train/validation_share"}
    wanted |= {f"{stage}/{tag}" for stage in ("val", "val_real") for tag in ("av_offset_xcorr_n", "impact_offset_ms")}
    assert wanted <= scalars
    assert events.Scalars("val/av_offset_xcorr_n")[-1].value == 3
    gif = events.Images("generated/0/video")[-1].encoded_image_string
    assert gif[:6] == b"GIF89a"
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(gif))
    assert picture.n_frames == 12
    assert picture.size == (96, 96)
    assert events.Images("generated/0/spectrogram")[-1].encoded_image_string[1:4] == b"PNG"
    assert events.Audio("real/0/sound")[-1].sample_rate == 16000


def test_real_clips_pass_once_and_generated_ones_every_round(finished):
    *_, weights = finished
    assert len(weights) == 3 + 2 * 3


def test_clips_come_from_the_averaged_weights(finished):
    folder, _, _, weights = finished
    saved = torch.load(folder / "end.ckpt", weights_only=True)
    averaged = saved["state_dict"]["model.video.out.head.weight"]
    assert torch.equal(weights[-1], averaged)
    assert saved["ovi"] == {"note": "kept"}


def test_averages_follow_the_warmed_up_decay(tiny_shards, tmp_path):
    """Against the recurrence in float64; after few steps the average is near the weights, not near the start."""

    class Weights(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(pl_module.model.audio.out.head.bias.detach().double().clone())

    data, weights = ShardsDataModule(path=str(tiny_shards), batch_size=4), Weights()
    ema = WarmupEMA(decay=0.3, update_every_n_steps=2)
    trainer_for(tmp_path, 9, callbacks=[weights, ema], limit_val_batches=0).fit(
        module := module_for(data), datamodule=data
    )
    expected = weights.seen[1]  # the first update copies
    for n, step in enumerate((3, 5, 7), start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights.seen[step]
    assert torch.allclose(module.model.audio.out.head.bias.double(), expected, atol=1e-6)
    with pytest.raises(OviError, match="decay"):
        WarmupEMA(decay=1.0)


def test_generated_clips_depend_on_seed_and_number_alone(tiny_shards):
    data = ShardsDataModule(path=str(tiny_shards))
    model = module_for(data).model.eval()
    torch.nn.init.normal_(model.video.out.head.weight, std=0.1)
    samples = data.first_validation_samples(3)
    texts = [s.text[0] for s in samples]
    shapes = (tuple(samples[0].video.shape[1:]), tuple(samples[0].audio.shape[1:]))

    def clips(indices, **knobs):
        generator = Generator(sampler=euler, num_steps=2, **knobs)
        return [
            latent
            for video, _ in generator.latents(model, shapes, [texts[i] for i in indices], indices)
            for latent in video
        ]

    one, two = clips([0, 1, 2], batch_size=1), clips([0, 1, 2], batch_size=3)
    third = clips([2], batch_size=2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two))
    assert torch.allclose(third[0], one[2], atol=1e-5)
    assert not torch.allclose(clips([0], seed=1)[0], one[0], atol=1e-2)


@pytest.mark.parametrize("guidance", list(GUIDANCES))
def test_a_given_first_frame_is_the_first_frame(tiny_shards, guidance):
    data = ShardsDataModule(path=str(tiny_shards))
    model = module_for(data).model.eval()
    sample = data.first_validation_samples(1)[0]
    shapes = (tuple(sample.video.shape[1:]), tuple(sample.audio.shape[1:]))
    generator = Generator(sampler=euler, num_steps=2, guidance=GUIDANCES[guidance])
    first = sample.video[:, :, :1]
    ((video, audio),) = generator.latents(model, shapes, sample.text, [0], first_frame=first)
    assert torch.equal(video[:, :, :1], first)
    assert video.isfinite().all()
    assert audio.isfinite().all()


def test_a_set_without_validation_trains_and_says_so(tiny_shards, tmp_path):
    index = json.loads((tiny_shards / "index.json").read_text())
    index["splits"]["val"] = {"shards": [], "num_samples": 0}
    folder = tmp_path / "set"
    folder.mkdir()
    for shard in tiny_shards.glob("train*.tar"):
        (folder / shard.name).symlink_to(shard)
    (folder / "index.json").write_text(json.dumps(index))
    data = ShardsDataModule(path=str(folder), batch_size=4)
    with pytest.warns(UserWarning, match="no validation"):
        trainer_for(tmp_path, 2).fit(module_for(data), datamodule=data)


def test_a_small_set_fills_a_batch_as_far_as_it_goes(tiny_shards, tmp_path):
    data, losses = ShardsDataModule(path=str(tiny_shards), batch_size=1000), Losses()
    trainer_for(tmp_path, 2, callbacks=[losses], limit_val_batches=0).fit(module_for(data), datamodule=data)
    assert len(losses.keys[0]) == data.index.num_samples("train")


def test_epochs_have_orders_of_their_own_without_a_new_loader(tiny_shards, tmp_path):
    data, losses = ShardsDataModule(path=str(tiny_shards), batch_size=1), Losses()
    count = data.index.num_samples("train")
    trainer = trainer_for(
        tmp_path, 2 * count, callbacks=[losses], limit_val_batches=0, reload_dataloaders_every_n_epochs=0
    )
    trainer.fit(module_for(data), datamodule=data)
    assert sorted(losses.keys[:count]) == sorted(losses.keys[count:])
    assert losses.keys[:count] != losses.keys[count:]


def test_missing_data_is_named_at_once(tmp_path):
    with pytest.raises(OviError, match=r"index\.json: not found.*data\.path"):
        ShardsDataModule(path=str(tmp_path))


def test_spectrogram_shows_a_tone_where_it_is():
    from ovi.data.media import Clip

    t = np.arange(16000) / 16000
    wave = np.where(t > 0.5, np.sin(2 * np.pi * 2000 * t), 0).astype(np.float32)
    image = spectrogram_image(Clip(np.zeros((8, 4, 4, 3), np.uint8), wave, 8, 16000), height=128, width=100)
    brightness = image.astype(int).sum(2)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert column >= 49
    assert row == pytest.approx(128 * (1 - 2000 / 8000), abs=3)  # low frequencies at the bottom


def test_batches_move_whole():
    batch = LatentBatch(torch.zeros(1, 1), torch.zeros(1, 1), [torch.zeros(1)], ["c"], ["k"], [{}])
    assert batch.to("meta").audio_mask is None
    moved = replace(batch, audio_mask=torch.ones(1, 1)).to("meta")
    assert moved.audio_mask.device.type == "meta"
    assert {moved.video.device.type, moved.audio.device.type, moved.text[0].device.type} == {"meta"}
    assert moved.captions == ["c"]


@pytest.mark.parametrize("present", ["video", "audio"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_samples_of_one_modality_train_its_tower_as_with_the_exchange_shut(tiny_shards, fusion, present):
    """Another's latents at gates of 0 give the same loss: nothing of the stand-in is seen or heard."""
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    module = module_for(data, fusion=fusion, timesteps=partial(tasks, a2v=0.5, v2a=0.5))
    for tower in (module.model.video, module.model.audio):
        torch.nn.init.normal_(tower.out.head.weight, std=0.1)
    batch = first_batch(data)
    size = len(batch)
    missing = {"audio": batch.audio[:, :0]} if present == "video" else {"video": batch.video[:, :, :0, :0, :0]}
    alone = replace(batch, **missing)
    _, logged = spied(module)
    loss = module.training_step(alone, 0)
    other = "audio" if present == "video" else "video"
    assert f"train/loss_{other}" not in logged
    draws = module._draws(1, 0)
    levels = shared(size, draws, module.density, (1, 1))
    # Noise of both comes from one generator, video first: only the video's is the same beside another audio.
    if present == "video":
        video, _ = module._errors(batch, levels, draws, text_dropout=module.text_dropout, alone=True)
        assert float(logged["train/loss_video"]) == pytest.approx(float(video.mean()), rel=1e-5)
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in getattr(module.model, present).parameters() if p.grad is not None) > 0
    gradients = [p.grad.abs().max() for p in getattr(module.model, other).out.parameters() if p.grad is not None]
    assert max(gradients, default=torch.zeros(())) == 0


@pytest.mark.parametrize(("accumulated", "max_steps"), [(1, -1), (2, -1), (3, 4)])
def test_a_schedule_by_epochs_ends_where_the_run_does(tiny_shards, tmp_path, accumulated, max_steps):
    """Against the steps that Lightning really made; a linear schedule must have come down to 0 by then."""
    data, rates = ShardsDataModule(path=str(tiny_shards), batch_size=4), []
    module = module_for(data)

    def linear(optimizer, num_training_steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_training_steps)

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module.schedule = linear
    trainer = trainer_for(
        tmp_path, max_steps, max_epochs=3, accumulate_grad_batches=accumulated, callbacks=[Rates()],
        val_check_interval=None, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    steps = -(-(data.index.num_samples("train") // 4) // accumulated) * 3
    assert trainer.global_step == (steps if max_steps < 0 else min(steps, max_steps))
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_a_schedule_without_an_end_is_named(tiny_shards, tmp_path):
    data = ShardsDataModule(path=str(tiny_shards), batch_size=4)
    module = module_for(data, schedule=lambda optimizer, num_training_steps: None)
    with pytest.raises(OviError, match=r"max_epochs=-1 it has no end: set trainer\.max_steps"):
        trainer_for(tmp_path, -1, val_check_interval=None, limit_val_batches=0).fit(module, datamodule=data)


class Written(TwinModule):
    """Writes what each rank's validation batches are worth, as they come."""

    def validation_step(self, batch, batch_idx):
        made = super().validation_step(batch, batch_idx)
        means = [float(errors.mean()) for errors in made["errors"]]
        row = [len(batch), *(mean if has else None for mean, has in zip(means, (batch.has_video, batch.has_audio)))]
        with open(f"{self.rows}-{self.global_rank}", "a") as file:
            file.write(json.dumps(row) + "\n")
        return made


@pytest.mark.parametrize(
    ("ranks", "shapes"),
    [
        (1, [None, {"video": None, "audio": (31, 64)}, None]),
        (1, [None, {"video": None, "audio": (31, 64)}, {"video": None, "audio": (31, 64)}]),
        pytest.param(2, [None, {"video": None, "audio": (31, 64)}, None], marks=pytest.mark.slow),
    ],
)
def test_validation_losses_are_means_over_the_samples_that_have_them(tmp_path, ranks, shapes):
    """On ranks that see other modalities in another order, too; NaN for what no sample has."""
    write_set(tmp_path / "set", {"train": [4], "val": [5, 2]}, shapes=shapes)
    data = ShardsDataModule(path=str(tmp_path / "set"), batch_size=3)
    module = module_for(data)
    module.__class__, module.rows = Written, str(tmp_path / "rows")
    knobs = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {}
    trainer = trainer_for(tmp_path, 1, **knobs)
    trainer.validate(module, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [[json.loads(line) for line in (tmp_path / f"rows-{rank}").open()] for rank in range(ranks)]
    assert len({tuple(row[1] is None for row in mine) for mine in rows}) == ranks  # no two ranks see the same
    for at, name in ((1, "video"), (2, "audio")):
        counted = [(row[0], row[at]) for mine in rows for row in mine if row[at] is not None]
        if counted:
            expected = sum(n * value for n, value in counted) / sum(n for n, _ in counted)
            assert found[f"val/loss_{name}"] == pytest.approx(expected, rel=1e-5)
        else:
            assert np.isnan(found[f"val/loss_{name}"])
    assert np.isfinite(found["val/loss"])
