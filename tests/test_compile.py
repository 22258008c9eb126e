"""Compiled pairs of blocks: no graph breaks, no recompilation across steps and depth, the same numbers."""

import shutil

import pytest
import torch
import torch._dynamo

from ovi.errors import OviError
from ovi.fusion import FUSIONS
from ovi.recompute import RECOMPUTES
from test_twin import inputs, twin


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_one_graph_serves_every_pair_and_every_step(fusion):
    """``fullgraph`` raises on a break; depth and noise level make no new graph, training makes one more."""
    eager, model = twin(fusion, tower={"num_blocks": 4}), twin(fusion, tower={"num_blocks": 4})
    model.compile_layers(backend="aot_eager")
    video, audio, sigma, text, _ = inputs()
    with torch.no_grad():
        encoded = model.encode_text(text, text)
        for level in (sigma, 1 - sigma, sigma / 2):
            for a, b in zip(model(video, audio, level, *encoded), eager(video, audio, level, text, text)):
                assert (a - b).abs().max() < 1e-5
    assert graphs() == 1
    losses = []
    for twice in (model, eager):
        for _ in range(2):
            v, a = twice(video, audio, sigma, text, text)
        losses.append(v.square().mean() + a.square().mean())
        losses[-1].backward()
    assert graphs() == 2
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * (1 + q.grad.abs().max()), name


@torch.no_grad()
def test_one_modality_and_a_clean_first_frame_compile_too():
    eager, model = twin("ovi"), twin("ovi")
    model.compile_layers(backend="aot_eager")
    video, audio, sigma, text, _ = inputs()
    for call, options in (
        ((video, None, sigma, text, None), {}),
        ((video, audio, sigma, text, text), {"clean_first_frame": True}),
    ):
        for a, b in zip(model(*call, **options), eager(*call, **options)):
            assert (a is None and b is None) or (a - b).abs().max() < 1e-5


def test_what_cannot_be_compiled_is_said():
    with pytest.raises(OviError, match="recompute=none or block"):
        twin("ovi", recompute=RECOMPUTES["operation"]()).compile_layers()


def test_compiled_blocks_can_be_recomputed():
    eager, model = twin("ovi"), twin("ovi", recompute=RECOMPUTES["block"]())
    model.compile_layers(backend="aot_eager")
    for each in (eager, model):
        video, audio = each(*inputs())
        (video.square().mean() + audio.square().mean()).backward()
    for p, q in zip(model.parameters(), eager.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


def test_names_of_the_weights_stay():
    model = twin("ovi")
    names = list(model.state_dict())
    model.compile_layers(backend="eager")
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_generated_code_gives_the_same_numbers():
    eager, model = twin("ovi"), twin("ovi")
    model.compile_layers()
    with torch.no_grad():
        for a, b in zip(model(*inputs()), eager(*inputs())):
            assert (a - b).abs().max() < 1e-5
