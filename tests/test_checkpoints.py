"""What a run leaves behind when it ends, and that it can be gone on with as if it had not ended."""

import pytest
import torch

import ovi

SMALL = ("model.video.dim=24", "model.video.num_heads=2", "model.video.num_blocks=1", "model.video.ffn_dim=32")
QUIET = ("callbacks.joint_eval=null", "callbacks.attention_in_time=null", "callbacks.progress=null")
QUIET += ("+trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "+trainer.limit_val_batches=0")
QUIET += ("trainer.val_check_interval=null", "logger.tensorboard=null", "callbacks.dashboard=null")


@pytest.fixture
def run(tiny_shards, tmp_path):
    def call(name, *words):
        base = (f"data.path={tiny_shards}", "data.batch_size=2", "callbacks.checkpoint.every_n_train_steps=4")
        ovi.compose(*SMALL, *QUIET, *base, *words).train(tmp_path / name)
        return tmp_path / name / "checkpoints"

    return call


def load(file):
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("length", ["trainer.max_steps=6", "trainer.max_steps=4", "trainer.max_epochs=1"])
def test_the_last_checkpoint_holds_all_steps(run, length):
    words = [length] if "steps" in length else [length, "trainer.max_steps=-1", "optim.schedule=null"]
    folder = run("a", *words)
    last = load(folder / "last.ckpt")
    expected = {"trainer.max_steps=6": 6, "trainer.max_steps=4": 4}.get(length)
    steps = last["global_step"]
    assert steps == expected or (expected is None and steps % 4)
    assert [file.name for file in folder.glob("step_*")] == [f"step_{steps:06d}.ckpt"]


def test_epochs_are_counted_as_ever(run):
    last = load(run("a", "trainer.max_epochs=2", "trainer.max_steps=-1", "optim.schedule=null") / "last.ckpt")
    assert last["epoch"] == 1
    assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 1
    assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2


def test_a_run_that_ended_goes_on_as_if_it_had_not(run):
    """Weights that are trained, and their averages, which take their place at a run's end."""
    whole = load(run("whole", "trainer.max_steps=9", "optim.schedule=null") / "last.ckpt")
    first = run("first", "trainer.max_steps=6", "optim.schedule=null")
    went_on = load(
        run("second", "trainer.max_steps=9", "optim.schedule=null", f"resume={first / 'last.ckpt'}") / "last.ckpt"
    )
    assert whole["global_step"] == went_on["global_step"] == 9
    for kind in ("state_dict", "current_model_state"):
        for name, value in whole[kind].items():
            assert torch.equal(value, went_on[kind][name]), (kind, name)
    name = next(n for n, v in whole["state_dict"].items() if v.is_floating_point() and v.numel() > 100)
    assert not torch.equal(whole["state_dict"][name], whole["current_model_state"][name])
