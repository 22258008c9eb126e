"""Distances and scores over features, against closed forms, scipy, torchmetrics and plain loops."""

from __future__ import annotations

import math
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ovi.errors import OviError
from ovi.metrics.frechet import (
    FeatureStatistics,
    FrechetDistance,
    as_rows,
    folded,
    frechet_distance,
    frechet_distance_of,
)
from ovi.metrics.inception import InceptionScore, KLDivergence, inception_score, kl_divergence
from ovi.metrics.kernel import KernelDistance, kernel_audio_distance, kernel_distance, lots


def drawn(number: int, dim: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Features of some non-trivial covariance, in float64."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.geomspace(1.0, 0.05, dim)
    return torch.from_numpy(rng.normal(size=(number, dim)) @ mix + mean)


def by_scipy(x: torch.Tensor, y: torch.Tensor, ddof: int = 0) -> float:
    """The formula as it is written, with scipy's root of the product."""
    one, other = x.numpy(), y.numpy()
    s1, s2 = np.cov(one.T, ddof=ddof), np.cov(other.T, ddof=ddof)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    apart = one.mean(0) - other.mean(0)
    return float(apart @ apart + np.trace(s1 + s2 - 2 * root))


# --- Frechet ------------------------------------------------------------------------------------------------------


def test_gaussians_that_commute_have_a_closed_form():
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    a, b = np.array([4.0, 1.0, 9.0, 0.25, 0.0, 2.0]), np.array([1.0, 1.0, 4.0, 2.25, 1.0, 0.0])
    shift = np.arange(6.0)
    found = frechet_distance(np.zeros(6), basis * a @ basis.T, shift, basis * b @ basis.T)
    assert float(found) == pytest.approx(shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7)


def test_gaussians_that_do_not_commute_have_a_closed_form_in_the_plane():
    """For 2 x 2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = S1 S2."""
    s1, s2 = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    assert not np.allclose(s1 @ s2, s2 @ s1)
    product = s1 @ s2
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    found = frechet_distance(np.zeros(2), s1, np.zeros(2), s2)
    assert float(found) == pytest.approx(np.trace(s1) + np.trace(s2) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 24), (40, 300, 24), (25, 60, 24)])
def test_agrees_with_scipys_root_of_the_product(n, m, dim, unbiased):
    x, y = drawn(n, dim, 1), drawn(m, dim, 2, mean=0.3)
    found = frechet_distance_of(x, y, unbiased=unbiased)
    assert found.dtype == torch.float64
    assert found.ndim == 0
    assert float(found) == pytest.approx(by_scipy(x, y, int(unbiased)), rel=1e-8)


@pytest.mark.parametrize(("n", "m", "dim"), [(10, 12, 64), (64, 64, 64), (10, 500, 64), (500, 400, 64)])
def test_singular_values_and_moments_give_the_same_figure(n, m, dim):
    x, y = drawn(n, dim, 3), drawn(m, dim, 4, mean=0.2)
    moments = [moment for z in (x, y) for moment in (z.mean(0), torch.cov(z.T, correction=0))]
    # Roots of eigenvalues that are 0 but for rounding are off by its root, so the route over moments is the worse.
    assert float(frechet_distance_of(x, y)) == pytest.approx(float(frechet_distance(*moments)), rel=1e-5)


@pytest.mark.parametrize(("n", "dim"), [(12, 300), (600, 40)])
def test_a_set_is_at_no_distance_from_itself_in_any_order(n, dim):
    x = drawn(n, dim, 5, mean=3.0).float()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    spread = float(x.double().var(0).sum())
    assert float(frechet_distance_of(x, x)) < 1e-9 * spread
    assert float(frechet_distance_of(x, x[order])) < 1e-9 * spread


def test_a_shift_alone_gives_its_square():
    x = drawn(50, 8, 6)
    shift = torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert float(frechet_distance_of(x, x + shift)) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_a_scaling_alone_gives_its_share_of_the_spread():
    """S2 = c^2 S1 commutes with it: the distance is (c - 1)^2 tr S1."""
    x = drawn(50, 8, 6)
    x = x - x.mean(0)
    spread = float(x.square().sum() / 50)
    assert float(frechet_distance_of(x, 1.5 * x)) == pytest.approx(0.25 * spread, rel=1e-9)


def test_statistics_of_features_far_from_zero_keep_their_covariance():
    """A mean 1e6 spreads away: sums of x x^T in float64 lose every digit but four of the covariance."""
    x = drawn(900, 12, 7)
    far = x + 1e6 * x.std()
    rows = torch.cat([folded(as_rows(part)) for part in far.split(100)])
    found = FeatureStatistics.of_rows(rows)
    expected = torch.cov(x.T, correction=1)
    error = float((found.covariance(unbiased=True) - expected).norm() / expected.norm())
    raw = (far.T @ far - 900 * torch.outer(far.mean(0), far.mean(0))) / 899
    assert found.count == 900
    assert error < 1e-8
    assert error < 1e-3 * float((raw - expected).norm() / expected.norm())


@pytest.mark.parametrize("n", [20, 5000])
def test_torchmetrics_fid_on_the_same_features_agrees(n):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(nn.Module):
        num_features = 16

        def forward(self, features):
            return features

    x, y = drawn(n, 16, 8), drawn(n + 7, 16, 9, mean=0.1)
    theirs = FrechetInceptionDistance(feature=AsTheyAre(), normalize=False).set_dtype(torch.float64)
    ours = FrechetDistance(16, unbiased=True)
    for real, features in ((True, x), (False, y)):
        theirs.update(features, real=real)
        ours.update(features, real=real)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("disturb", ["noise", "shift", "collapse"])
def test_rises_with_what_is_done_to_the_features(disturb):
    x, noise = drawn(400, 16, 10), drawn(400, 16, 11)
    make = {
        "noise": lambda amount: x + amount * noise,
        "shift": lambda amount: x + amount,
        "collapse": lambda amount: x * (1 - amount) + amount * x.mean(0),
    }[disturb]
    amounts = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    frechet = [float(frechet_distance_of(x, make(amount))) for amount in amounts]
    assert all(a < b for a, b in pairwise(frechet))
    if disturb != "collapse":
        kernel = [float(kernel_distance(make(amount), x)) for amount in amounts]
        assert all(a < b for a, b in pairwise(kernel))


def test_sees_features_exchanged_between_samples():
    """Each feature permuted on its own keeps its mean and variance: only covariances tell."""
    x = drawn(400, 16, 12)
    generator = torch.Generator().manual_seed(3)
    figures = []
    for columns in (0, 2, 6, 12):
        y = x.clone()
        for column in range(columns):
            y[:, column] = y[torch.randperm(400, generator=generator), column]
        figures.append(float(frechet_distance_of(x, y)))
    assert figures[0] < 1e-9
    assert all(a < b for a, b in pairwise(figures))


@pytest.mark.parametrize(("n", "dim", "pieces"), [(30, 64, 7), (1200, 16, 5), (700, 16, 700)])
def test_streamed_in_pieces_it_is_what_the_whole_gives(n, dim, pieces):
    x, y = drawn(n, dim, 13), drawn(n, dim, 14, mean=0.2)
    metric = FrechetDistance(dim)
    for a, b in zip(x.tensor_split(pieces), y.tensor_split(pieces)):
        metric.update(b, real=True)
        metric.update(a, real=False)
    assert float(metric.compute()) == pytest.approx(float(frechet_distance_of(x, y)), rel=1e-10)
    assert len(metric.rows("real")) <= dim + 1 + 256


def test_is_ready_for_another_round_after_reset_and_after_an_error():
    x, y = drawn(40, 8, 15), drawn(40, 8, 16)
    metric = FrechetDistance(8)
    metric.update(x, real=True)
    with pytest.raises(OviError, match=r"2 or more samples a side, got 0 and 40"):
        metric.compute()
    metric.update(y, real=False)
    first = float(metric.compute())
    metric.reset()
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert float(metric.compute()) == pytest.approx(first, rel=1e-10)


@pytest.mark.parametrize("distance", [frechet_distance_of, kernel_distance, kernel_audio_distance])
def test_bad_features_are_refused(distance):
    x = drawn(10, 4)
    with pytest.raises(OviError, match="got 1 and 10"):
        distance(x[:1], x)
    with pytest.raises(OviError, match="as wide in both"):
        distance(x[:, :3], x)
    with pytest.raises(OviError, match=r"must be \[N, D\], got \[10\]"):
        distance(x[:, 0], x)
    spoilt = x.clone()
    spoilt[3, 1] = math.nan
    with pytest.raises(OviError, match="1 of 10 features hold NaN"):
        distance(spoilt, x)


def test_metrics_refuse_features_of_another_width():
    with pytest.raises(OviError, match=r"must be \[B, 5\], got \[10, 4\]"):
        FrechetDistance(5).update(drawn(10, 4), real=True)
    with pytest.raises(OviError, match=r"with B numbers, got \[10, 4\] and 9"):
        KernelDistance(4).update(drawn(10, 4), real=True, numbers=range(9))
    with pytest.raises(OviError, match=r"\[3\], \[4, 4\]"):
        frechet_distance(torch.zeros(3), torch.eye(4), torch.zeros(3), torch.eye(3))


# --- kernel -------------------------------------------------------------------------------------------------------


def by_loops(x: torch.Tensor, y: torch.Tensor, kernel) -> float:
    """The unbiased estimate, term by term."""

    def mean(a, b, skip):
        values = [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        return sum(values) / len(values)

    first, second = x.tolist(), y.tolist()
    return mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)


@pytest.mark.parametrize(("degree", "gamma", "coef0"), [(3, None, 1.0), (2, 0.5, 0.1)])
def test_kernel_distance_is_the_formula(degree, gamma, coef0):
    x, y = drawn(9, 5, 17), drawn(12, 5, 18, mean=0.5)

    def kernel(p, q):
        return ((gamma or 1 / 5) * sum(a * b for a, b in zip(p, q)) + coef0) ** degree

    found = kernel_distance(x.float(), y.float(), degree=degree, gamma=gamma, coef0=coef0)
    assert float(found) == pytest.approx(by_loops(x.float(), y.float(), kernel), rel=1e-10)


def test_kernel_audio_distance_is_the_formula():
    x, y = drawn(9, 5, 17), drawn(12, 5, 18, mean=0.5)
    apart = sorted(math.dist(y[i], y[j]) for i in range(12) for j in range(i))
    width = apart[(len(apart) - 1) // 2]
    expected = 100 * by_loops(x, y, lambda p, q: math.exp(-(math.dist(p, q) ** 2) / (2 * width**2)))
    assert float(kernel_audio_distance(x, y)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distances_are_zero_on_average_between_equals_where_frechet_is_not():
    pool = drawn(4000, 6, 19)
    pairs = [(pool[i : i + 20], pool[i + 20 : i + 40]) for i in range(0, 4000, 40)]
    for distance in (kernel_distance, kernel_audio_distance):
        figures = np.array([float(distance(a, b)) for a, b in pairs])
        assert abs(figures.mean()) < 3 * figures.std() / len(figures) ** 0.5
        assert figures.min() < 0
    frechet = np.array([float(frechet_distance_of(a, b)) for a, b in pairs])
    assert frechet.mean() > 10 * frechet.std() / len(frechet) ** 0.5


def test_kept_samples_are_chosen_by_number_whatever_the_order():
    x, y = drawn(900, 5, 20), drawn(900, 5, 21, mean=0.2)
    figures = []
    for order in (range(900), reversed(range(900)), np.random.default_rng(0).permutation(900)):
        metric = KernelDistance(5, max_samples=100)
        for numbers in np.array_split(np.array(list(order)), 9):
            metric.update(x[numbers], real=True, numbers=numbers)
            metric.update(y[numbers], real=False, numbers=numbers)
        figures.append(float(metric.compute()))
        assert len(metric.rows("real")) <= 100 + 256
    chosen = lots(range(900)).argsort()[:100]
    assert figures[0] == figures[1] == figures[2] == float(kernel_distance(y[chosen], x[chosen]))


def test_lots_are_spread_evenly():
    values = lots(range(4000)).numpy()
    assert np.histogram(values, 10, (0, 1))[0].min() > 330
    assert abs(np.corrcoef(values, np.arange(4000))[0, 1]) < 0.05
    assert not set(values) & set(lots(range(4000), window=1).tolist())


# --- classes ------------------------------------------------------------------------------------------------------


def test_inception_score_of_known_probabilities():
    sure = 1000 * torch.eye(5)
    assert float(inception_score(sure)) == pytest.approx(5.0)
    assert float(inception_score(sure[[0] * 7])) == pytest.approx(1.0)
    assert float(inception_score(torch.zeros(4, 9))) == pytest.approx(1.0)
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    marginal = p.mean(0)
    expected = math.exp(sum((row * np.log(row / marginal)).sum() for row in p) / 2)
    assert float(inception_score(np.log(p) + 3.0)) == pytest.approx(expected, rel=1e-12)


def test_kl_divergence_is_of_the_real_from_the_generated():
    real, generated = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]), np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    expected = (0.7 * math.log(0.7 / 0.2) + 0.2 * math.log(0.2 / 0.5) + 0.1 * math.log(0.1 / 0.3)) / 2
    found = kl_divergence(np.log(generated), np.log(real), epsilon=0.0)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    padded = kl_divergence(np.log(generated), np.log(real))
    terms = real * np.log(real / (generated + 1e-6))
    assert float(padded) == pytest.approx(terms.sum(1).mean(), rel=1e-12)


def test_scores_of_pieces_are_those_of_the_whole():
    generated, real = drawn(50, 7, 22), drawn(50, 7, 23)
    score, divergence = InceptionScore(7), KLDivergence()
    for a, b in zip(generated.split(8), real.split(8)):
        score.update(a)
        divergence.update(a, b)
    assert float(score.compute()) == pytest.approx(float(inception_score(generated)), rel=1e-12)
    assert float(divergence.compute()) == pytest.approx(float(kl_divergence(generated, real)), rel=1e-12)


def test_bad_logits_are_refused():
    good = torch.zeros(3, 4)
    with pytest.raises(OviError, match=r"N of 1 or more, got \[0, 4\]"):
        inception_score(good[:0])
    with pytest.raises(OviError, match=r"one shape, got \[3, 4\] and \[2, 4\]"):
        kl_divergence(good, good[:2])
    with pytest.raises(OviError, match="NaN or infinite"):
        inception_score(good + math.nan)
    with pytest.raises(OviError, match=r"must be \[B, 5\]"):
        InceptionScore(5).update(good)
    for empty in (InceptionScore(4), KLDivergence()):
        with pytest.raises(OviError, match="got 0"), pytest.warns(UserWarning, match="before the ``update``"):
            empty.compute()


# --- processes ----------------------------------------------------------------------------------------------------

CASES = {"folded": (700, 16), "kept": (20, 64), "one_has_none": (400, 12)}


def both_sets(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    n, dim = CASES[case]
    return drawn(n, dim, 24), drawn(n, dim, 25, mean=0.2)


def share(case: str, rank: int, number: int) -> range:
    """What a process of two measures: a third and two thirds, or nothing and all."""
    cut = 0 if case == "one_has_none" else number // 3
    return range(cut) if rank == 0 else range(cut, number)


def measure(rank: int, folder: str) -> None:
    """What each of two processes does."""
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
    found = {}
    for case in CASES:
        x, y = both_sets(case)
        mine, dim = share(case, rank, len(x)), x.shape[1]
        metrics = {
            "frechet": FrechetDistance(dim),
            "kernel": KernelDistance(dim, max_samples=150),
            "score": InceptionScore(dim),
        }
        if len(mine):
            metrics["frechet"].update(x[mine], real=True)
            metrics["frechet"].update(y[mine], real=False)
            metrics["kernel"].update(x[mine], real=True, numbers=mine)
            metrics["kernel"].update(y[mine], real=False, numbers=mine)
            metrics["score"].update(y[mine])
        found[case] = {name: metric.compute() for name, metric in metrics.items()}
    empty = FrechetDistance(4)
    try:
        empty.compute()
    except OviError as error:
        found["empty"] = str(error)
    # Of use again: a metric that raised is not left as it was inside.
    empty.update(drawn(5, 4, 26 + rank), real=True)
    empty.update(drawn(5, 4, 26 + rank), real=False)
    found["afterwards"] = empty.compute()
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_two_processes_give_what_one_gives(tmp_path):
    # This process is one of the two: each import of torchmetrics costs seconds.
    other = mp.get_context("spawn").Process(target=measure, args=(1, str(tmp_path)))
    other.start()
    try:
        measure(0, str(tmp_path))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        other.join(60)
        other.kill()
    assert other.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case in CASES:
        x, y = both_sets(case)
        chosen = lots(range(len(x))).argsort()[:150]
        expected = {
            "frechet": frechet_distance_of(y, x),
            "kernel": kernel_distance(y[chosen], x[chosen]),
            "score": inception_score(y),
        }
        for name, figure in expected.items():
            assert [float(of[case][name]) for of in found] == pytest.approx([float(figure)] * 2, rel=1e-9), (case, name)
    assert all("got 0 and 0" in of["empty"] for of in found)
    assert all(float(of["afterwards"]) < 1e-9 for of in found)
