"""Flow matching against closed forms."""

import math

import pytest
import torch

from ovi.errors import OviError
from ovi.flow import (
    DENSITIES,
    TIMESTEPS,
    joint_errors,
    noised,
    shift_sigma,
    tasks,
    token_shifted,
    velocity_error,
    weighted_mean,
)

densities = pytest.mark.parametrize("name", list(DENSITIES))
CLIP = (2560, 157)  # tokens of a video and of its audio


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def distance(sigma, cdf):
    """Kolmogorov's, between draws and a cumulative distribution in closed form."""
    empirical = (torch.arange(len(sigma)) + 0.5) / len(sigma)
    return (cdf(sigma.double().sort().values) - empirical).abs().max()


def significant(count):
    """What the distance exceeds once in a hundred times by chance."""
    return 1.63 / math.sqrt(count)


@densities
def test_noise_levels_lie_in_the_unit_interval_and_repeat(name):
    sigma, again = (DENSITIES[name](10_000, draws(3), 2000) for _ in range(2))
    assert torch.equal(sigma, again)
    assert sigma.min() >= 0
    assert sigma.max() <= 1
    assert sigma.shape == (10_000,)


CDF = {
    "uniform": lambda s, n: s,
    "logit_normal": lambda s, n: normal_cdf(torch.logit(s)),
    "token_shifted": lambda s, n: 0.1 * s + 0.9 * normal_cdf(torch.logit(s) - {0: 0.95, 2560: 1.5, 10**5: 2.05}[n]),
}


@densities
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("num_tokens", [0, 2560, 10**5])
def test_noise_levels_follow_their_distribution(name, shift, num_tokens):
    sigma = DENSITIES[name](20_000, draws(), num_tokens, shift=shift).double()
    plain = sigma / (shift - (shift - 1) * sigma)  # the shift undone
    assert distance(plain, lambda s: CDF[name](s, num_tokens)) < significant(20_000)


@pytest.mark.parametrize(("num_tokens", "mean"), [(1024, 0.95), (1792, 1.225), (2560, 1.5), (4096, 2.05), (157, 0.95)])
def test_the_mean_of_the_logit_follows_the_number_of_tokens(num_tokens, mean):
    sigma = token_shifted(50_000, draws(1), num_tokens, uniform_share=0.0).double()
    assert torch.logit(sigma).mean().item() == pytest.approx(mean, abs=4 / math.sqrt(50_000))


def test_knobs_of_the_token_shifted_density():
    knobs = {"mean": -1.0, "mean_long": 1.0, "num_tokens_short": 0, "num_tokens_long": 100, "std": 0.5}
    sigma = token_shifted(20_000, draws(2), 25, **knobs, uniform_share=0.4)

    def mixture(s):
        return 0.4 * s + 0.6 * normal_cdf((torch.logit(s) + 0.5) / 0.5)

    assert distance(sigma, mixture) < significant(20_000)
    with pytest.raises(OviError, match="num_tokens_long"):
        token_shifted(1, draws(), 1, num_tokens_short=5, num_tokens_long=5)
    with pytest.raises(OviError, match="uniform_share"):
        token_shifted(1, draws(), 1, uniform_share=1.5)


@pytest.mark.parametrize("name", list(TIMESTEPS))
@pytest.mark.parametrize("density", list(DENSITIES))
def test_timesteps_repeat_and_name_levels_and_weights_of_each_sample(name, density):
    levels, again = (TIMESTEPS[name](1000, draws(5), DENSITIES[density], CLIP) for _ in range(2))
    for field in ("video", "audio", "video_weight", "audio_weight"):
        assert torch.equal(getattr(levels, field), getattr(again, field))
        assert getattr(levels, field).shape == (1000,)
        assert 0 <= getattr(levels, field).min() <= getattr(levels, field).max() <= 1


def test_shared_is_one_level_drawn_for_the_videos_tokens():
    levels = TIMESTEPS["shared"](20_000, draws(), DENSITIES["token_shifted"], (4096, 1024))
    assert torch.equal(levels.video, levels.audio)
    assert torch.equal(levels.video, token_shifted(20_000, draws(), 4096))
    assert levels.video_weight.min() == levels.audio_weight.min() == 1


def test_independent_levels_are_uncorrelated_and_each_for_its_tokens():
    levels = TIMESTEPS["independent"](20_000, draws(), DENSITIES["token_shifted"], (2560, 0))
    both = torch.stack([levels.video, levels.audio])
    assert abs(torch.corrcoef(both)[0, 1]) < 4 / math.sqrt(20_000)
    for sigma, num_tokens in zip(both, (2560, 0)):
        assert distance(sigma, lambda s, n=num_tokens: CDF["token_shifted"](s, n)) < significant(20_000)
    assert levels.video_weight.min() == levels.audio_weight.min() == 1


@pytest.mark.parametrize("joint", ["shared", "independent"])
def test_tasks_are_mixed_by_their_shares_and_the_clean_modality_does_not_count(joint):
    n, shares = 40_000, {"a2v": 0.2, "v2a": 0.3}
    levels = tasks(n, draws(), DENSITIES["uniform"], CLIP, joint=joint, **shares)
    to_video, to_audio = levels.audio == 0, levels.video == 0
    both = ~to_video & ~to_audio
    for which, share in ((to_video, 0.2), (to_audio, 0.3), (both, 0.5)):
        assert which.float().mean().item() == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / n))
    assert not (to_video & to_audio).any()
    assert torch.equal(levels.audio_weight, 1 - to_video.float())
    assert torch.equal(levels.video_weight, 1 - to_audio.float())
    for sigma in (levels.video[to_video], levels.audio[to_audio], levels.video[both], levels.audio[both]):
        assert distance(sigma, lambda s: s) < significant(len(sigma))
    assert torch.equal(levels.video[both], levels.audio[both]) == (joint == "shared")


def test_shares_may_leave_no_joint_samples():
    levels = tasks(1000, draws(), DENSITIES["uniform"], CLIP, a2v=0.7, v2a=0.3)
    assert torch.equal(levels.video_weight + levels.audio_weight, torch.ones(1000))


@pytest.mark.parametrize(
    ("knobs", "says"),
    [({"a2v": -0.1}, "a2v and v2a"), ({"a2v": 0.6, "v2a": 0.6}, "0.6 and 0.6"), ({"joint": "both"}, "joint is shared")],
)
def test_bad_mixtures_are_named(knobs, says):
    with pytest.raises(OviError, match=says):
        tasks(1, draws(), DENSITIES["uniform"], CLIP, **knobs)


def test_shift_is_the_published_formula_and_keeps_the_ends():
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(shift_sigma(sigma, 5.0), torch.tensor([0.0, 2.5 / 3, 1.0]))
    with pytest.raises(OviError, match="positive"):
        shift_sigma(sigma, 0.0)


def test_noised_is_the_straight_line_and_velocity_its_slope():
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    x = noised(data, noise, sigma)
    assert torch.equal(x[0], data[0])
    assert torch.allclose(x[1], 0.75 * data[1] + 0.25 * noise[1], atol=1e-6)
    assert torch.allclose(x[2], noise[2], atol=1e-6)
    assert torch.equal(velocity_error(noise - data, data, noise), torch.zeros(3))


def test_masked_error_is_the_mean_over_what_counts():
    prediction = torch.zeros(1, 4, 2)
    data, noise = torch.zeros(1, 4, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1).expand(1, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0]])[..., None]
    assert velocity_error(prediction, data, noise, mask).item() == pytest.approx((1 + 4) / 2)


def test_a_perfect_network_has_no_error_and_noises_are_independent():
    video, audio = torch.zeros(2, 1, 4, 8, 8), torch.zeros(2, 256, 1)
    seen = []

    def network(v, a, sigma):
        seen.append((v, a))
        return v / sigma.view(-1, 1, 1, 1, 1), a / sigma.view(-1, 1, 1)  # data is 0: x = sigma * noise

    errors = joint_errors(network, video, audio, torch.tensor([0.3, 0.8]), generator=torch.Generator().manual_seed(0))
    assert all(e.abs().max() < 1e-9 for e in errors)
    v, a = (x[0].flatten() for x in seen[0])
    assert abs(torch.corrcoef(torch.stack([v, a]))[0, 1]) < 0.25


def test_each_modality_has_its_own_noise_level():
    """The network is told both, and each latent is mixed at its own; a clean one comes as it is."""
    video, audio = torch.randn(2, 1, 2, 2, 2), torch.randn(2, 3, 1)
    sigma = torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.25])
    seen = []

    def network(v, a, told):
        seen.append((v, a, told))
        return torch.zeros_like(v), torch.zeros_like(a)

    errors = joint_errors(network, video, audio, sigma, generator=draws(4))
    generator = draws(4)
    noise_video, noise_audio = (
        torch.randn(video.shape, generator=generator),
        torch.randn(audio.shape, generator=generator),
    )
    v, a, told = seen[0]
    assert told is sigma
    assert torch.allclose(v[0], (video[0] + noise_video[0]) / 2, atol=1e-6)
    assert torch.allclose(v[1], noise_video[1], atol=1e-6)
    assert torch.equal(a[0], audio[0])
    assert torch.allclose(a[1], 0.75 * audio[1] + 0.25 * noise_audio[1], atol=1e-6)
    for error, data, noise in zip(errors, (video, audio), (noise_video, noise_audio)):
        assert torch.allclose(error, (noise - data).square().flatten(1).mean(1))


def test_padded_audio_is_no_part_of_the_error():
    video, audio = torch.randn(2, 1, 2, 2, 2), torch.randn(2, 5, 3)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    garbage = 100 * ~mask[..., None]

    def network(v, a, sigma):
        return torch.zeros_like(v), torch.zeros_like(a) + garbage

    _, error = joint_errors(network, video, audio, torch.tensor([0.5, 0.5]), generator=draws(), audio_mask=mask)
    generator = draws()
    torch.randn(video.shape, generator=generator)
    difference = (torch.randn(audio.shape, generator=generator) - audio).square()
    assert torch.allclose(error, torch.stack([difference[0, :2].mean(), difference[1].mean()]))


def test_losses_are_averaged_over_the_samples_that_count():
    errors = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert weighted_mean(errors, torch.ones(3)).item() == pytest.approx(3)
    assert weighted_mean(errors, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(3.5)
    assert weighted_mean(errors, torch.tensor([0.5, 0.0, 0.25])).item() == pytest.approx((0.5 + 1.5) / 0.75)
    none = weighted_mean(errors, torch.zeros(3))
    none.backward()
    assert none.item() == 0
    assert torch.equal(errors.grad, torch.zeros(3))
