"""Solvers against the reference's trajectories; guidance against its own formula; sampling of a known flow."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ovi.errors import OviError
from ovi.guidance import GUIDANCES, Guidance, Pass, Prompts, cfg, guided, modality
from ovi.sampling import SAMPLERS, sample
from small_twins import inputs, twin

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["euler", "unipc", "dpmpp"])
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


@pytest.mark.parametrize(("name", "exact"), [("euler", True), ("unipc", False), ("dpmpp", False)])
def test_the_solver_decides_which_sigma_the_network_is_given(name, exact):
    """Its own noise level under Euler, cut to whole thousandths under the others (spec, 'Sampling')."""
    scheduler, seen = SAMPLERS[name](7, shift=2.7), []

    def velocity(video, audio, sigma):
        seen.append(1000 * sigma.double())
        return torch.zeros_like(video), torch.zeros_like(audio)

    sample(velocity, *latents(1), sampler=partial(SAMPLERS[name], shift=2.7), num_steps=7)
    told, own = torch.cat(seen), 1000 * scheduler.sigmas[:-1].double()
    assert torch.allclose(told, own if exact else own.floor(), atol=1e-3)
    assert len(told) == 7


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_is_enough_for_a_straight_flow(name):
    """Noise - data is constant along the straight line to a single point."""
    target = [torch.full_like(x, 3.0) for x in latents(2)]
    noise = [x + 1 for x in latents(2)]
    done = sample(lambda *_: (noise[0] - target[0], noise[1] - target[1]), *noise, sampler=SAMPLERS[name], num_steps=1)
    for x, wanted in zip(done, target):
        assert torch.allclose(x, wanted, atol=0.01)  # UniPC starts at 0.999


def prompts(n):
    return Prompts(
        [torch.tensor([[2.0]])] * n,
        [torch.tensor([[3.0]])] * n,
        [torch.tensor([[5.0]])] * n,
        [torch.tensor([[7.0]])] * n,
    )


def latents(n):
    return torch.zeros(n, 1, 1, 2, 2), torch.zeros(n, 3, 1)


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


@pytest.mark.parametrize(
    ("at_once", "expected"), [(None, [(2, ((), (11,)))]), (2, [(2, ((), (11,)))]), (1, [(1, ()), (1, (11,))])]
)
def test_passes_go_together_or_as_many_as_asked(at_once, expected):
    calls = []
    field = guided(fake_model(calls), cfg(skip_blocks=[11]), prompts(1), passes_at_once=at_once)
    v, _ = field(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 3, 1), torch.full((1,), 0.5))
    assert calls == expected
    assert torch.allclose(v, torch.full_like(v, 5 + 4 * (2 - 5)))


def test_prompts_are_encoded_once():
    calls, encoded = [], []
    model = fake_model(calls)
    model.encode_text = lambda video, audio: encoded.append(len(video)) or (video, audio)
    field = guided(model, cfg(), prompts(2))
    for _ in range(3):
        field(torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 3, 1), torch.ones(2))
    assert encoded == [4]


def test_gates_differ_within_one_batch():
    calls = []
    rule = Guidance((Pass(), Pass(a2v=0.0)), (3.0, -2.0), (1.0, 0.0))
    v, a = guided(fake_model(calls), rule, prompts(2))(torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 3, 1), torch.ones(2))
    assert calls == [(4, ())]
    assert torch.allclose(v, torch.full_like(v, 6.0))
    assert torch.allclose(a, torch.full_like(a, 3.0))


class Told:
    """A network whose velocities are a code of what one sample of a pass was given.

    Its text, 1e2 * its gate, 1e4 * blocks skipped, 1e6 * blocks perturbed, 1e8 * its sigma, 1e9 * its latent's mean,
    1e10 and 1e11 * the same two of its partner.
    """

    def __init__(self):
        self.keywords, self.sizes, self.paired = [], [], []

    def __call__(self, video, audio, sigma, video_text, audio_text, *, a2v, v2a, skip_blocks, **further):
        n = len(video)
        self.keywords.append(set(further))
        self.sizes.append(n)
        self.paired.append(isinstance(sigma, tuple))
        sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        means = [x.double().flatten(1).mean(1) for x in (video, audio)]
        codes = []
        for latent, text, gate, own, partner in ((video, video_text, a2v, 0, 1), (audio, audio_text, v2a, 1, 0)):
            code = torch.stack([t.double().sum() for t in text]) + 100 * torch.as_tensor(gate).double().expand(n)
            for scale, blocks in ((1e4, skip_blocks), (1e6, further.get("perturb_blocks", ()))):
                nested = any(isinstance(b, tuple) for b in blocks)
                code = code + scale * torch.tensor([sum(blocks[i] if nested else blocks) for i in range(n)]).double()
            code = code + 1e8 * sigmas[own].double() + 1e9 * means[own]
            code = code + 1e10 * sigmas[partner].double() + 1e11 * means[partner]
            codes.append(code.view(-1, *[1] * (latent.dim() - 1)).expand_as(latent))
        return codes[0], codes[1]


def code(text, *, gate=1, skipped=0, perturbed=0, sigma=0.5, partner=0.5, partner_latent=1):
    """What ``Told`` says of such a pass; the latents of these tests are 1 all over, their sigma 0.5."""
    own = text + 1e2 * gate + 1e4 * skipped + 1e6 * perturbed + 1e8 * sigma + 1e9
    return own + 1e10 * partner + 1e11 * partner_latent


NULL = {"partner": 0, "partner_latent": 0}


# Text is 2 positive and 5 negative for video, 3 and 7 for audio.
RULES = {
    "none": ({}, code(2), code(3)),
    "cfg": (
        {"video_scale": 4.0, "audio_scale": 2.5, "skip_blocks": [4, 7]},
        code(5, skipped=11) + 4.0 * (code(2) - code(5, skipped=11)),
        code(7, skipped=11) + 2.5 * (code(3) - code(7, skipped=11)),
    ),
    "modality": (
        {
            "text_video": 3.0, "perturb_video": 0.5, "exchange_video": 2.0,
            "text_audio": 7.0, "perturb_audio": 1.0, "exchange_audio": 4.0,
            "perturb_blocks": [2, 3], "rescale": 0.0,
        },
        4.5 * code(2) - 2.0 * code(5) - 0.5 * code(2, perturbed=5) - 1.0 * code(2, gate=0),  # 3 + 0.5 + 2 - 1
        11.0 * code(3) - 6.0 * code(7) - 1.0 * code(3, perturbed=5) - 3.0 * code(3, gate=0),  # 7 + 1 + 4 - 1
    ),
    "dual": (
        {"text_video": 5.0, "exchange_video": 2.0, "text_audio": 3.0, "exchange_audio": 4.0},
        5.0 * code(2) + (2.0 - 5.0) * code(5) + (1 - 2.0) * code(5, gate=0),
        3.0 * code(3) + (4.0 - 3.0) * code(7) + (1 - 4.0) * code(7, gate=0),
    ),
    "sync": (
        {"video_scale": 3.0, "audio_scale": 1.5},
        3.0 * code(2) + (1 - 3.0) * code(2, **NULL),
        1.5 * code(3) + (1 - 1.5) * code(3, **NULL),
    ),
    "interaction": (
        {"video_scale": 3.0, "audio_scale": 1.5},
        3.0 * code(2) + (1 - 3.0) * code(2, gate=0),
        1.5 * code(3) + (1 - 1.5) * code(3, gate=0),
    ),
}  # fmt: skip
rules = pytest.mark.parametrize("name", list(GUIDANCES))


def ones(n):
    return torch.ones(n, 1, 2, 2, 2, dtype=torch.float64), torch.ones(n, 3, 2, dtype=torch.float64)


@rules
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_every_rule_is_its_formula(name, at_once):
    """Passes told apart by text, gates, blocks, sigma and null; the formulas of the table in spec/fusion.md by hand."""
    knobs, video, audio = RULES[name]
    told, sigma = Told(), torch.full((2,), 0.5)
    v, a = guided(told, GUIDANCES[name](**knobs), prompts(2), passes_at_once=at_once)(*ones(2), sigma)
    assert torch.allclose(v, torch.full_like(v, video), rtol=1e-14)
    assert torch.allclose(a, torch.full_like(a, audio), rtol=1e-14)


def test_all_passes_of_a_step_are_one_batch_unless_asked():
    for at_once, sizes in ((None, [12]), (3, [9, 3]), (1, [3, 3, 3, 3])):
        told = Told()
        rule = modality(perturb_video=1.0, perturb_blocks=[1])
        guided(told, rule, prompts(3), passes_at_once=at_once)(*ones(3), torch.full((3,), 0.5))
        assert told.sizes == sizes


@rules
def test_a_network_is_told_only_what_a_pass_asks_for(name):
    """Neither ``perturb_blocks`` nor a sigma for each modality reaches a plain callable that no rule needs it for."""
    told = Told()
    guided(told, GUIDANCES[name](**RULES[name][0]), prompts(1))(*ones(1), torch.full((1,), 0.5))
    assert told.keywords == [{"perturb_blocks"} if name == "modality" else set()]
    assert told.paired == [name == "sync"]


NEUTRAL = {
    "none": {},
    "cfg": {"video_scale": 1.0, "audio_scale": 1.0},
    "modality": {
        f"{term}_{of}": 0.0 if term == "perturb" else 1.0
        for term in ("text", "perturb", "exchange")
        for of in ("video", "audio")
    },
    "dual": {f"{term}_{of}": 1.0 for term in ("text", "exchange") for of in ("video", "audio")},
    "sync": {"video_scale": 1.0, "audio_scale": 1.0},
    "interaction": {"video_scale": 1.0, "audio_scale": 1.0},
}


@rules
def test_neutral_scales_are_the_conditional_pass_alone(name):
    """Bit for bit, and nothing else runs: no negative prompt is needed either."""
    rule = GUIDANCES[name](**NEUTRAL[name])
    told = Told()
    v, a = guided(told, dataclasses.replace(rule, rescale=0.0), prompts(2))(*ones(2), torch.full((2,), 0.5))
    assert told.sizes == [2]
    assert not rule.needs_negative
    assert torch.equal(v, torch.full_like(v, code(2)))
    assert torch.equal(a, torch.full_like(a, code(3)))


@pytest.mark.parametrize(
    ("name", "video", "audio"),
    [
        ("cfg", code(5), code(7)),
        ("sync", code(2, **NULL), code(3, **NULL)),
        ("interaction", code(2, gate=0), code(3, gate=0)),
    ],
)
def test_a_scale_of_zero_is_what_a_rule_guides_away_from(name, video, audio):
    told, rule = Told(), GUIDANCES[name](video_scale=0.0, audio_scale=0.0)
    v, a = guided(told, rule, prompts(1))(*ones(1), torch.full((1,), 0.5))
    assert 0 not in rule.used
    assert torch.equal(v, torch.full_like(v, video))
    assert torch.equal(a, torch.full_like(a, audio))


def test_modalities_are_guided_apart():
    """With the exchange scale of one alone, the other stays conditional."""
    v, a = guided(Told(), GUIDANCES["interaction"](video_scale=3.0, audio_scale=1.0), prompts(1))(
        *ones(1), torch.full((1,), 0.5)
    )
    assert torch.allclose(v, torch.full_like(v, 3.0 * code(2) - 2.0 * code(2, gate=0)), rtol=1e-14)
    assert torch.equal(a, torch.full_like(a, code(3)))


def test_modalities_may_come_at_levels_of_their_own():
    told = Told()
    v, a = guided(told, cfg(), prompts(1))(*ones(1), (torch.tensor([0.25]), torch.tensor([0.75])))
    assert told.paired == [True]
    wanted_video = code(5, sigma=0.25, partner=0.75) + 4 * (2 - 5)
    wanted_audio = code(7, sigma=0.75, partner=0.25) + 3 * (3 - 7)
    assert torch.allclose(v, torch.full_like(v, wanted_video), rtol=1e-14)
    assert torch.allclose(a, torch.full_like(a, wanted_audio), rtol=1e-14)


def random_passes(seed):
    """A network that answers each pass with other noise, and what it answered."""
    answers = []

    def model(video, audio, sigma, *texts, **keywords):
        g = torch.Generator().manual_seed(seed)
        answers.append([3 * torch.randn(x.shape, generator=g) - 1 for x in (video, audio)])
        return answers[-1]

    return model, answers


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("given", [False, True])
def test_rescaling_brings_the_deviation_to_the_conditional_one(strength, given):
    """Against numpy, on clean estimates, per sample and modality; a given first frame takes no part."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 3, 3, generator=g), torch.randn(3, 6, 2, generator=g)
    sigma = np.array([0.3, 0.8, 1.0])
    model, answers = random_passes(1)
    rule = dataclasses.replace(cfg(video_scale=5.0, audio_scale=3.0), rescale=strength)
    field = guided(model, rule, prompts(3), clean_first_frame=given)
    done = field(*x, torch.tensor(sigma, dtype=torch.float32))
    for latent, answer, scale, result in zip(x, answers[0], (5.0, 3.0), done):
        positive, negative = np.split(answer.double().numpy(), 2)
        for i in range(3):
            own = latent[i].double().numpy()
            conditional = own - sigma[i] * positive[i]
            p = own - sigma[i] * (negative[i] + scale * (positive[i] - negative[i]))
            counted = np.s_[:, 1:] if given and own.ndim == 4 else np.s_[:]
            p = p * (strength * conditional[counted].std() / p[counted].std() + 1 - strength)
            clean = own - sigma[i] * result[i].double().numpy()
            assert np.abs(clean - p).max() < 1e-4
            if strength == 1:
                assert clean[counted].std() == pytest.approx(conditional[counted].std(), rel=1e-4)


def test_rescaling_needs_the_conditional_pass_even_without_weight():
    told = Told()
    rule = Guidance((Pass(), Pass(a2v=0.0)), (0.0, 1.0), (0.0, 1.0), rescale=0.5)
    guided(told, rule, prompts(1))(*ones(1), torch.full((1,), 0.5))
    assert told.sizes == [2]


@pytest.mark.parametrize("sigma", [0.0, 0.001, 0.4])
def test_rescaling_changes_nothing_where_nothing_guides(sigma):
    """Down to no noise at all, where a clean estimate says nothing of the velocity."""
    model, answers = random_passes(2)
    rule = Guidance((Pass(),), (1.0,), (1.0,), rescale=1.0)
    done = guided(model, rule, prompts(2))(torch.randn(2, 1, 2, 2, 2), torch.randn(2, 4, 1), torch.full((2,), sigma))
    for result, answer in zip(done, answers[0]):
        assert torch.allclose(result, answer, atol=1e-5)


KNOBS = {"modality": {"perturb_video": 1.0, "perturb_audio": 0.5, "perturb_blocks": (1,)}, "cfg": {"skip_blocks": (0,)}}


@rules
@torch.no_grad()
def test_one_batch_is_passes_in_sequence_on_a_real_twin(name):
    model = twin()
    video, audio, sigma, text, _ = inputs(3)
    negative = [-t for t in text]
    rule = GUIDANCES[name](**KNOBS.get(name, {}))
    fields = [
        guided(model, rule, Prompts(text, text, negative, negative), passes_at_once=n)(video, audio, sigma)
        for n in (None, 1, 2)
    ]
    for other in fields[1:]:
        for a, b in zip(fields[0], other):
            assert (a - b).abs().max() < 1e-5 * a.abs().max().clamp_min(1)
    plain = model(video, audio, sigma, text, text)
    for a, b in zip(fields[0], plain):  # a rule that changes nothing would pass the above
        assert torch.allclose(a, b) == (name == "none")


@rules
def test_weights_of_every_rule_sum_to_one(name):
    rule = GUIDANCES[name]()
    assert sum(rule.video_weights) == pytest.approx(1)
    assert sum(rule.audio_weights) == pytest.approx(1)
    assert rule.passes[0] == Pass()
    for weights, null in ((rule.video_weights, "video"), (rule.audio_weights, "audio")):
        assert all(weight == 0 for p, weight in zip(rule.passes, weights) if p.null == null)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Guidance((Pass(),), (2.0,), (1.0,)), "video weight a pass, summing to 1"),
        (lambda: Guidance((Pass(), Pass(null="audio")), (1.0, 0.0), (0.5, 0.5)), "whose audio is a null"),
        (lambda: Guidance((Pass(null="sound"),), (1.0,), (1.0,)), "null is 'video', 'audio' or None, got 'sound'"),
        (lambda: Guidance((Pass(),), (1.0,), (1.0,), rescale=1.5), "rescale must be in 0 to 1, got 1.5"),
        (lambda: modality(perturb_audio=1.0), "perturb_blocks"),
    ],
)
def test_bad_guidance_is_named(make, says):
    with pytest.raises(OviError, match=says):
        make()
