"""Solvers against the reference's trajectories; guidance against its own formula; sampling of a known flow."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ovi.errors import OviError
from ovi.guidance import GUIDANCES, Guidance, Pass, Prompts, cfg, guided
from ovi.sampling import SAMPLERS, sample

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_solver_follows_the_reference_trajectory(name):
    golden = load_file(GOLDEN / f"solver_{name}.safetensors")
    scheduler = SAMPLERS[name](10, shift=5.0)
    x = golden["in.latent"]
    for i, t in enumerate(scheduler.timesteps):
        assert abs(float(t) - float(golden["out.timesteps"][i])) < 1e-3
        v = torch.einsum("ij,bjfhw->bifhw", golden["in.matrix"], x) + torch.sin(x) * t / 1000
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert (x - golden["out.trajectory"][i + 1]).abs().max() < 2e-5


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_solves_the_flow_of_a_gaussian(name):
    """For data ~ N(m, s^2) the velocity field is linear in x and its flow is known in closed form."""
    m, s = 2.0, 0.5

    def velocity(video, audio, sigma):
        def v(x):
            t = sigma.view(-1, *[1] * (x.dim() - 1))
            variance = (1 - t) ** 2 * s**2 + t**2
            slope = (t - (1 - t) * s**2) / variance
            return slope * (x - (1 - t) * m) - m

        return v(video), v(audio)

    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 3, 2, 4, 4, generator=generator)
    audio = torch.randn(2, 5, 3, generator=generator)
    v, a = sample(velocity, video, audio, sampler=partial(SAMPLERS[name], shift=1.0), num_steps=200)
    assert (v - (m + s * video)).abs().max() < 0.03
    assert (a - (m + s * audio)).abs().max() < 0.03


def test_given_first_frame_stays():
    first = torch.full((1, 3, 1, 2, 2), 7.0)
    seen = []

    def velocity(video, audio, sigma):
        seen.append(video[:, :, :1].clone())
        return torch.ones_like(video), torch.ones_like(audio)

    v, _ = sample(velocity, torch.zeros(1, 3, 3, 2, 2), torch.zeros(1, 4, 2), num_steps=3, first_frame=first)
    assert all(torch.equal(s, first) for s in seen)
    assert len(seen) == 3
    assert torch.equal(v[:, :, :1], first)
    assert not torch.equal(v[:, :, 1:2], first)


def prompts(n):
    return Prompts(
        [torch.tensor([[2.0]])] * n,
        [torch.tensor([[3.0]])] * n,
        [torch.tensor([[5.0]])] * n,
        [torch.tensor([[7.0]])] * n,
    )


def fake_model(calls):
    def model(video, audio, sigma, video_text, audio_text, *, skip_blocks, a2v, v2a):
        calls.append((video.shape[0], tuple(skip_blocks)))
        v = torch.stack([t.sum() for t in video_text]).view(-1, 1, 1, 1, 1)
        a = torch.stack([t.sum() for t in audio_text]).view(-1, 1, 1)
        gate = a2v if isinstance(a2v, float) else a2v.view(-1, 1, 1, 1, 1)
        return v.expand_as(video) * gate, a.expand_as(audio)

    return model


def test_cfg_is_negative_plus_scaled_difference_in_one_batch():
    calls = []
    field = guided(fake_model(calls), cfg(video_scale=4, audio_scale=3), prompts(2))
    v, a = field(torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 3, 1), torch.full((2,), 0.5))
    assert calls == [(4, ())]
    assert torch.allclose(v, torch.full_like(v, 5 + 4 * (2 - 5)))
    assert torch.allclose(a, torch.full_like(a, 7 + 3 * (3 - 7)))


def test_passes_that_skip_other_blocks_run_apart():
    calls = []
    field = guided(fake_model(calls), cfg(skip_blocks=[11]), prompts(1))
    field(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 3, 1), torch.full((1,), 0.5))
    assert calls == [(1, ()), (1, (11,))]


def test_gates_differ_within_one_batch():
    calls = []
    rule = Guidance((Pass(), Pass(a2v=0.0)), (3.0, -2.0), (1.0, 0.0))
    v, a = guided(fake_model(calls), rule, prompts(2))(torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 3, 1), torch.ones(2))
    assert calls == [(4, ())]
    assert torch.allclose(v, torch.full_like(v, 6.0))
    assert torch.allclose(a, torch.full_like(a, 3.0))


@pytest.mark.parametrize("name", list(GUIDANCES))
def test_weights_of_every_rule_sum_to_one(name):
    rule = GUIDANCES[name]()
    assert sum(rule.video_weights) == pytest.approx(1)
    assert sum(rule.audio_weights) == pytest.approx(1)


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(OviError, match="summing to 1"):
        Guidance((Pass(),), (2.0,), (1.0,))
