"""Flow matching against closed forms."""

import math

import pytest
import torch

from ovi.errors import OviError
from ovi.flow import TIMESTEPS, joint_errors, noised, shift_sigma, velocity_error


@pytest.mark.parametrize("name", list(TIMESTEPS))
def test_noise_levels_lie_in_the_unit_interval_and_repeat(name):
    draws = [TIMESTEPS[name](10_000, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].min() >= 0
    assert draws[0].max() <= 1
    assert draws[0].shape == (10_000,)


@pytest.mark.parametrize("name", list(TIMESTEPS))
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_follow_their_distribution(name, shift):
    """Kolmogorov distance to the closed-form cumulative distribution."""
    sigma = TIMESTEPS[name](20_000, torch.Generator().manual_seed(0), shift=shift).double().sort().values
    plain = sigma / (shift - (shift - 1) * sigma)  # the shift undone
    cdf = {"uniform": lambda s: s, "logit_normal": lambda s: 0.5 * (1 + torch.erf(torch.logit(s) / math.sqrt(2)))}[name]
    empirical = (torch.arange(20_000) + 0.5) / 20_000
    assert (cdf(plain) - empirical).abs().max() < 1.63 / math.sqrt(20_000)


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
