"""Generated clips measured in validation: the same figures on any number of ranks, and nothing that stops training."""

import json
import os
import socket
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy

from ovi.errors import OviError
from ovi.fusion import FUSIONS
from ovi.generate import Generator
from ovi.metrics.av_offset import AVOffset
from ovi.metrics.clip_metric import ClipMetric
from ovi.patch import LinearPatch, VideoPatch
from ovi.sampling import euler
from ovi.tower import Tower
from ovi.training.callbacks.joint_eval import CLIP_RECORD, RECORD, JointEvalCallback, append_record
from ovi.training.callbacks.throughput import Throughput
from ovi.training.datamodule import ShardsDataModule
from ovi.training.module import TwinModule
from ovi.twin import build_twin


class Loudness(ClipMetric):
    """Mean absolute sample of generated clips, and its distance to the real ones'."""

    SUMS = ("generated", "real", "num_real", "numbers")
    USES_REAL = True
    USES_COUNTERPART = True

    def add_clip(self, clip):
        level = float(abs(clip.waveform).mean())
        if clip.real:
            self.real += level
            self.num_real += 1
        else:
            assert clip.real_waveform.shape == clip.waveform.shape
            self.generated += level
            self.numbers += 10**clip.number

    def compute(self):
        return {"loudness": self.generated / self.clips, "gap": self.generated / self.clips - self.real / self.num_real,
                "numbers": self.numbers}  # fmt: skip

    def floor(self):
        return {"loudness": self.real_state()["real"] / self.real_state()["num_real"]}

    def real_state(self):
        self.sync(should_sync=torch.distributed.is_initialized())
        state = {"real": self.real.clone(), "num_real": self.num_real.clone()}
        if self._is_synced:
            self.unsync()
        return state

    def load_real_state(self, state):
        self.real, self.num_real = state["real"], state["num_real"]


class Broken(Loudness):
    def add_clip(self, clip):
        raise RuntimeError("planted failure")


def run(folder, shards, *, steps=2, ranks=1, interval=1, precision="32-true", **knobs):
    data = ShardsDataModule(path=str(shards), batch_size=2)
    torch.manual_seed(7)
    tower = {"dim": 24, "num_heads": 2, "num_blocks": 1, "ffn_dim": 32, "freq_dim": 16}
    model = build_twin(
        data.layout,
        video=partial(Tower, patch=VideoPatch, **tower),
        audio=partial(Tower, patch=LinearPatch, **tower),
        fusion=FUSIONS["ovi"],
    )
    for part in (model.video, model.audio):  # which begins at 0, so that nothing before it would show
        torch.nn.init.normal_(part.out.head.weight, std=0.1)
    # With a rate of 0 the weights stay what they were, whatever the ranks: figures must then be equal.
    module = TwinModule(model, optimizer=partial(torch.optim.AdamW, lr=0.0))
    options = {"metrics": {"loud": Loudness, "offset": AVOffset}, "num_clips": 5, "num_real": 3, **knobs}
    generator = Generator(sampler=partial(euler, shift=1.0), num_steps=2, batch_size=2)
    callback = JointEvalCallback(generator=generator, **options)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=ranks, max_steps=steps, max_epochs=-1, precision=precision,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        val_check_interval=interval, check_val_every_n_epoch=None, reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False, num_sanity_val_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[callback, Throughput(every_n_steps=1)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    lines = Path(folder, RECORD).read_text().splitlines() if Path(folder, RECORD).exists() else []
    return trainer, [json.loads(line) for line in lines]


def test_every_round_is_a_line_with_figures_counts_and_the_real_floor(tiny_shards, tmp_path):
    trainer, rounds = run(tmp_path, tiny_shards)
    assert [r["step"] for r in rounds] == [1, 2]
    for found in rounds:
        assert found["num_generated"] == 5
        assert found["generated"]["numbers"] == 11111  # every number once
        assert found["generated"]["gap"] == pytest.approx(found["generated"]["loudness"] - found["real"]["loudness"])
        assert found["generated"]["av_offset_xcorr_n"] == 5
        assert found["real"]["av_offset_xcorr_n"] == 3
    assert rounds[0]["num_real"] == 3
    assert rounds[1]["num_real"] is None  # kept from the first round
    assert rounds[0]["generated"] == rounds[1]["generated"]  # weights stay, so do the clips
    metrics = trainer.callback_metrics
    assert float(metrics["val/loudness"]) == pytest.approx(rounds[1]["generated"]["loudness"])
    assert float(metrics["val_real/loudness"]) == pytest.approx(rounds[1]["real"]["loudness"])
    assert float(metrics["val/num_clips"]) == 5


def test_every_clip_of_every_round_is_a_line_whose_figures_average_to_the_rounds(tiny_shards, tmp_path):
    _, rounds = run(tmp_path, tiny_shards)
    lines = [json.loads(line) for line in (tmp_path / CLIP_RECORD).read_text().splitlines()]
    assert [(line["step"], line["number"]) for line in lines] == [(s, n) for s in (1, 2) for n in range(5)]
    prompts = ShardsDataModule(path=str(tiny_shards))
    for found in rounds:
        assert "clips" not in found
        mine = [line for line in lines if line["step"] == found["step"]]
        values = [v for line in mine if (v := line["figures"]["av_offset_xcorr_ms"]) is not None]
        assert len(values) == round(5 * found["generated"]["av_offset_xcorr_coverage"])
        mean = sum(values) / len(values) if values else None
        assert mean == pytest.approx(found["generated"]["av_offset_xcorr_ms"])
        for line in mine:  # of distances, which Loudness says it is, a clip has none
            assert list(line["figures"]) == ["av_offset_xcorr_ms"]
    prompts.setup("fit")
    captions = [prompts.validation_sample(n % len(prompts.validation_numbers)).captions[0] for n in range(5)]
    assert [line["caption"] for line in lines[:5]] == captions


def test_more_clips_than_prompts_begin_again_with_other_noise(tiny_shards, tmp_path):
    _, rounds = run(tmp_path, tiny_shards, steps=1, num_clips=8, num_real=None)
    num_val = ShardsDataModule(path=str(tiny_shards)).index.num_samples("val")
    assert num_val < 8
    assert rounds[0]["generated"]["numbers"] == 11111111
    assert rounds[0]["num_real"] == num_val


def test_a_failing_metric_is_off_and_training_goes_on(tiny_shards, tmp_path):
    with pytest.warns(UserWarning, match=r"'broken' failed and is off.*planted failure"):
        trainer, rounds = run(tmp_path, tiny_shards, metrics={"broken": Broken, "loud": Loudness})
    assert trainer.global_step == 2
    assert len(rounds) == 2
    assert rounds[1]["failed"] == {"broken": "RuntimeError: planted failure"}
    assert "loudness" in rounds[1]["generated"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_clips_are_generated_in_the_trainers_precision(tiny_shards, tmp_path, precision):
    seen = []

    class Spy:
        def consume(self, clip, trainer):
            seen.append(clip.clip.waveform.dtype)

        def report(self, trainer, module):
            pass

    _, rounds = run(tmp_path / "low", tiny_shards, steps=1, precision=precision, consumers={"spy": Spy()})
    _, exact = run(tmp_path / "exact", tiny_shards, steps=1)
    assert rounds[0]["failed"] == {}
    assert {str(dtype) for dtype in seen} == {"float32"}
    found, wanted = (r[0]["generated"]["loudness"] for r in (rounds, exact))
    assert found == pytest.approx(wanted, rel=0.1)
    assert found != wanted


def test_what_fails_outside_of_metrics_is_off_and_training_goes_on(tiny_shards, tmp_path):
    class Full:
        def consume(self, clip, trainer):
            raise OSError(28, "No space left on device")

        def report(self, trainer, module):
            pass

    with pytest.warns(UserWarning, match=r"off from now on \(OSError.*No space left"):
        trainer, rounds = run(tmp_path, tiny_shards, consumers={"full": Full()})
    assert trainer.global_step == 2
    assert rounds == []


def test_rounds_keep_their_distance(tiny_shards, tmp_path):
    _, rounds = run(tmp_path, tiny_shards, steps=5, every_n_steps=2, metrics={}, num_clips=1)
    assert [r["step"] for r in rounds] == [1, 3, 5]


def test_another_run_reads_the_real_statistics(tiny_shards, tmp_path):
    cache = str(tmp_path / "cache")
    _, first = run(tmp_path / "a", tiny_shards, steps=1, cache_dir=cache)
    _, second = run(tmp_path / "b", tiny_shards, steps=1, cache_dir=cache)
    assert (first[0]["num_real"], second[0]["num_real"]) == (3, None)
    assert (first[0]["generated"], first[0]["real"]) == (second[0]["generated"], second[0]["real"])
    _, third = run(tmp_path / "c", tiny_shards, steps=1, cache_dir=cache, num_real=2)
    assert third[0]["num_real"] == 2


def test_what_cannot_be_measured_shows_before_training(tiny_shards, tmp_path):
    def no_weights(fps, sample_rate):
        raise OviError("it needs the file weights.pt")

    with pytest.raises(OviError, match=r"metric 'needy'.*weights.pt"):
        run(tmp_path, tiny_shards, metrics={"needy": no_weights})
    with pytest.raises(OviError, match="num_clips must be at least 1"):
        JointEvalCallback(generator=Generator(), num_clips=0)


def test_figures_that_are_not_finite_are_null_in_the_record(tmp_path):
    append_record(tmp_path / "m.jsonl", {"step": 1, "generated": {"a": float("nan"), "b": 2.0}})
    append_record(tmp_path / "m.jsonl", {"step": 2, "generated": {"a": float("inf")}})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "generated": {"a": None, "b": 2.0}}, {"step": 2, "generated": {"a": None}}]


def _rank(rank, port, folder, shards):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    run(folder, shards, steps=2, ranks=2, interval=2, metrics={"loud": Loudness, "offset": AVOffset})


@pytest.mark.slow
def test_one_and_two_ranks_give_the_same_figures(tiny_shards, tmp_path):
    _, alone = run(tmp_path / "one", tiny_shards, steps=2, interval=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, tmp_path / "two", tiny_shards), 2)
    (found,) = [json.loads(line) for line in (tmp_path / "two" / RECORD).read_text().splitlines()]
    assert found["num_generated"] == 5
    for side in ("generated", "real"):
        assert found[side] == pytest.approx(alone[0][side], rel=1e-6, nan_ok=True)
