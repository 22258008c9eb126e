"""LoRA: what is trained, what it computes, and that it merges into plain weights."""

from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import PUBLISHED_FORM
from ovi.adapters import ADAPTERS, is_adapted, load_adapters, lora, merge_adapters, merged_state, save_adapters
from ovi.checkpoint import load_reference, read_weights
from ovi.commands.convert import convert
from ovi.commands.restore import read_checkpoint, restore
from ovi.errors import OviError
from ovi.fusion import FUSIONS
from small_twins import inputs, twin, woken

pytest.importorskip("peft")


def adapted(fusion="ovi", **knobs):
    """A float64 twin with adapters whose B is no longer zero."""
    model = woken(twin(fusion)).double()
    lora(model, **knobs)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.double()


def targets_of(fusion):
    own = fusion not in ("none", "joint")  # joint takes the blocks' own weights where towers are of one width
    return ["self_attn", "cross_attn", "ffn"] + ["fusions"] * own


def run(model):
    video, audio, sigma, text, _ = inputs()
    text = [t.double() for t in text]
    return model(video.double(), audio.double(), sigma.double(), text, text)


@pytest.mark.parametrize("fusion", list(FUSIONS))
@torch.no_grad()
def test_merged_weights_are_base_plus_ba(fusion):
    model = adapted(fusion, rank=3, alpha=6, targets=targets_of(fusion))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base, expected = twin(fusion).state_dict(), run(model)
    plain = merged_state(before, {"name": "lora", "knobs": {"rank": 3, "alpha": 6}})
    merge_adapters(model)
    assert not is_adapted(model)
    assert list(model.state_dict()) == list(plain) == list(base)
    changed = 0
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        by_hand = before.get(f"{layer}.base_layer.weight")
        if by_hand is not None:
            changed += 1
            a, b = (before[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            assert torch.allclose(tensor, by_hand + 6 / 3 * b @ a, atol=1e-12, rtol=0)
            assert torch.allclose(plain[name], tensor, atol=1e-12, rtol=0)
    assert changed >= 2 * 2 * 10
    for ours, theirs in zip(run(model), expected):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_adapters_alone_are_trained_and_all_of_them(fusion):
    """A layer whose weights were read beside its forward would leave its adapter without a gradient."""
    model = adapted(fusion, rank=2, targets=targets_of(fusion))
    video, audio = run(model)
    (video.square().sum() + audio.square().sum()).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    wanted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert got == wanted


@torch.no_grad()
def test_it_starts_as_it_was():
    model = woken(twin()).double()
    expected = run(model)
    lora(model, rank=4)
    assert all(torch.equal(a, b) for a, b in zip(run(model.double()), expected))
    with pytest.raises(OviError, match="has adapters already"):
        lora(model)


@torch.no_grad()
def test_adapters_alone_go_out_and_in(tmp_path):
    model = adapted(rank=2, targets=["q", "v"])
    expected = run(model)
    file = save_adapters(model, tmp_path / "mine")
    assert file.stat().st_size < 100_000
    other = woken(twin()).double()
    load_adapters(other, tmp_path / "mine")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run(other.double()), expected))
    with pytest.raises(OviError, match="no adapters that can be read"):
        load_adapters(twin(), tmp_path)
    with pytest.raises(OviError, match=r"another model: this one has no linear layer .*blocks\.1"):
        load_adapters(twin(tower={"num_blocks": 1}), tmp_path / "mine")
    with pytest.raises(OviError, match="the model has no adapters"):
        save_adapters(twin(), tmp_path)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"rank": 0}, "rank from 1"),
        ({"dropout": 1.0}, "dropout in 0 to below 1"),
        ({"targets": ["self_atn"]}, r"no linear layer has self_atn in its name; there are .*self_attn"),
        ({"targets": []}, "has nothing in its name"),
    ],
)
def test_what_makes_no_sense_is_refused(knobs, said):
    model = twin()
    with pytest.raises(OviError, match=said):
        lora(model, **knobs)
    assert not is_adapted(model)


@pytest.fixture(scope="module")
def tuned(train, published_run, tmp_path_factory) -> Path:
    """Folder of a run that fine-tuned the published run by LoRA."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    words = ["adapter=lora", "adapter.rank=2", "adapter.alpha=4", f"init_from={published_run}", "trainer.max_steps=3"]
    train(folder, *PUBLISHED_FORM, *words, "callbacks.ema=null", "optim.optimizer.lr=0.1")
    return folder


@torch.no_grad()
def test_a_tuned_run_restores_converts_and_loads_back(tuned, published_run, tmp_path):
    """The base stays bit for bit; what is restored and what is published is base + B A, of low rank."""
    before, merged = restore(published_run).model.state_dict(), restore(tuned).model.state_dict()
    assert list(before) == list(merged)
    raw = read_checkpoint(tuned)["state_dict"]
    changed = []
    for name, tensor in before.items():
        layer, _, leaf = name.rpartition(".")
        kept = [raw[key] for key in (f"model.{name}", f"model.{layer}.base_layer.{leaf}") if key in raw]
        assert torch.equal(kept[0], tensor), name
        if not torch.equal(merged[name], tensor):
            changed.append(name)
            rank = torch.linalg.matrix_rank((merged[name] - tensor).double(), atol=1e-5)
            assert 1 <= rank <= 2, name
    assert len(changed) == 2 * 2 * 8 + 2 * 4  # q, k, v, o of two attentions a block; k and v of two directions a pair
    [file] = convert(tuned, tmp_path / "tuned.safetensors")
    again = load_reference(file).state_dict()
    assert set(again) == set(merged)
    assert all(torch.equal(again[name].flatten(), merged[name].flatten()) for name in merged)
    assert set(read_weights(tuned).tensors) == set(merged)


def test_a_tuned_run_continues(train, tuned, tmp_path):
    words = ["adapter=lora", "adapter.rank=2", "adapter.alpha=4", "callbacks.ema=null", f"resume={tuned}"]
    summary = train(tmp_path / "more", *PUBLISHED_FORM, *words, "trainer.max_steps=4")
    assert summary["steps"] == 4


def test_adapters_want_weights_to_start_from(train, tmp_path):
    with pytest.raises(OviError, match=r"adapter=lora .* set init_from"):
        train(tmp_path, "adapter=lora")


def test_towers_alone_are_not_enough(train, published_run, tmp_path):
    """What they lack would stay as it was drawn, frozen; a twin whose fusion has no weights lacks nothing."""
    words = [*PUBLISHED_FORM, "adapter=lora", "trainer.max_steps=1"]
    with pytest.raises(OviError, match=r"those of fusions would be drawn by chance"):
        train(tmp_path, *words, f"init_towers={published_run}")
    with pytest.raises(OviError, match=r"those of audio would be drawn by chance"):
        train(tmp_path, *words, "model/fusion=none", f"init_towers={{video: {published_run}}}")
    words += ["model/fusion=none", "adapter.targets=[self_attn]"]
    assert train(tmp_path / "both", *words, f"init_towers={published_run}")["steps"] == 1


def test_none_does_nothing():
    model = twin()
    assert ADAPTERS["none"](model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert partial(lora, rank=1)(model) is None
