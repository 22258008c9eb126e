"""The order of batches: every sample exactly once, the same on any number of workers, within the budget."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovi.data.reading.buckets import Batches, batch_sizes, form_batches
from ovi.data.reading.order import Stream, fractions, interleaved, quotas
from ovi.data.reading.plan import Position, ReadingPlan
from ovi.errors import OviError

shards = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=10)


def plan_of(shards, seed=0, sizes=(3, 4, 5), window=16, **knobs):
    """A plan of one set whose shards are (samples, bucket)."""
    train = knobs.get("train", True)
    stream = Stream(tuple(n for n, _ in shards), seed=seed, window=window, shuffle=train)
    return ReadingPlan((stream,), (tuple(b for _, b in shards),), sizes, **knobs)


def numbers(batches):
    return [batches[i].tolist() for i in range(len(batches))]


@settings(deadline=None, max_examples=150)
@given(shards=shards, world_size=st.integers(1, 9), epoch=st.integers(0, 3), seed=st.integers(0, 5))
def test_ranks_share_every_whole_batch_and_make_equally_many(shards, world_size, epoch, seed):
    plan = plan_of(shards, seed)
    row = numbers(plan.batches(epoch))
    ranks = [numbers(plan.of_rank(epoch, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {plan.num_batches(world_size)}
    dealt = [batch for step in zip(*ranks) for batch in step]
    if len(row) >= world_size:
        assert dealt == row[: len(dealt)]
        assert len(row) - len(dealt) < world_size
    seen = Counter(n for batch in row for n in batch)
    assert set(seen.values()) <= {1}
    buckets = np.repeat([b for _, b in shards], [n for n, _ in shards])
    for bucket in set(buckets.tolist()):
        total = int((buckets == bucket).sum())
        mine = [batch for batch in row if buckets[batch[0]] == bucket]
        assert all((buckets[batch] == bucket).all() for batch in mine)
        size = plan.batch_sizes[bucket]
        assert sum(map(len, mine)) == (total - total % size if total >= size else total)


@settings(deadline=None, max_examples=150)
@given(shards=shards, world_size=st.integers(1, 9))
def test_validation_holds_every_sample_and_repeats_none_while_there_are_enough(shards, world_size):
    plan = plan_of(shards, train=False)
    ranks = [numbers(plan.of_rank(0, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(n for batches in ranks for batch in batches for n in batch)
    total = sum(n for n, _ in shards)
    assert set(seen) == set(range(total))
    per_rank = plan.num_batches(world_size)
    if total >= per_rank * world_size:
        assert set(seen.values()) == {1}


@settings(deadline=None, max_examples=100)
@given(shards=shards, world_size=st.integers(1, 5), done=st.integers(0, 20), after=st.integers(1, 5))
def test_another_number_of_ranks_loses_no_batch(shards, world_size, done, after):
    plan = plan_of(shards)
    row = numbers(plan.batches(1))
    done = min(done, len(row) // world_size)
    where = Position(1, done, world_size).on(after)
    rest = [numbers(plan.of_rank(1, rank, after))[where.batch :] for rank in range(after)]
    dealt = [batch for step in zip(*rest) for batch in step]
    begin = where.batch * after
    assert begin <= done * world_size < begin + after
    assert row[begin : begin + len(dealt)] == dealt or len(row) < after
    if done * world_size % after == 0:
        assert begin == done * world_size


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), window=st.integers(1, 200), seed=st.integers(0, 9))
def test_a_pass_is_a_permutation_that_stays_near_a_few_shards(sizes, window, seed):
    stream = Stream(tuple(sizes), seed=seed, window=window)
    order = stream.one_pass(3)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    for number in range(len(sizes)):
        places = np.flatnonzero(shard == number)
        assert places[-1] - places[0] < window + 2 * max(sizes)


def test_orders_repeat_by_seed_and_pass_and_differ_otherwise():
    orders = {
        tuple(Stream((20, 20, 20), seed=seed, window=30).one_pass(number).tolist())
        for seed in (0, 1, 2)
        for number in (0, 1, 2)
    }
    assert len(orders) == 9
    assert Stream((20, 20), seed=4).one_pass(5).tolist() == Stream((20, 20), seed=4).one_pass(5).tolist()


def test_an_order_is_the_same_on_every_machine():
    """Golden: a checkpoint of today must mean the same tomorrow. Hashes worked out by hand in plain integers."""

    def splitmix(start, index):
        mask = 2**64 - 1
        x = (start + index * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    import hashlib

    start = int.from_bytes(hashlib.blake2b(repr(("samples", 1, 0, 2)).encode(), digest_size=8).digest(), "big")
    keys = [splitmix(start, i) for i in range(12)]
    expected = sorted(range(12), key=keys.__getitem__)
    assert Stream((12,), seed=1, window=5).one_pass(2).tolist() == expected


def test_shuffling_is_uniform_within_a_window():
    """Every sample at every place equally often: chi-squared over 400 passes of 12 samples."""
    counts = np.zeros((12, 12))
    for number in range(400):
        counts[np.arange(12), Stream((4, 4, 4), window=12).one_pass(number)] += 1
    expected = 400 / 12
    statistic = ((counts - expected) ** 2 / expected).sum()
    # 121 degrees of freedom: mean 121, deviation 15.6; four of them.
    assert 121 - 63 < statistic < 121 + 63


def test_a_window_of_everything_mixes_across_shards():
    first = np.concatenate([Stream((20,) * 5, window=100).one_pass(n)[:20] // 20 for n in range(20)])
    # 400 draws over 5 shards: 80 each, and a fifth of that is four standard deviations.
    assert all(abs((first == shard).sum() - 80) < 40 for shard in range(5))


def test_fractions_are_uniform():
    values = fractions(100_000, "test")
    assert 0 <= values.min() <= values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 100_000**0.5
    assert abs(values.var() - 1 / 12) < 0.001


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 1000))
def test_quotas_are_within_one_of_their_shares(weights, total):
    found = quotas(weights, total)
    assert sum(found) == total
    assert all(abs(n - total * w / sum(weights)) < 1 + 1e-9 for n, w in zip(found, weights))


def test_interleaving_keeps_each_order_and_spreads_evenly():
    rows = [np.arange(0, 60), np.arange(100, 130)]
    merged = interleaved(rows, 0)
    assert [n for n in merged if n < 100] == list(range(60))
    assert [n for n in merged if n >= 100] == list(range(100, 130))
    for at in range(0, 90, 9):
        assert 1 <= (merged[at : at + 9] >= 100).sum() <= 5


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(20, 90),
)
def test_mixtures_are_exact_and_visit_all_samples_equally(sets, w0, w1, total):
    """Over any number of epochs, a set's samples come equally often to within one."""
    sets = (sets * 2)[:2]
    streams = tuple(Stream(sizes, window=8, name=n) for n, sizes in enumerate(sets))
    buckets = tuple((0,) * len(sizes) for sizes in sets)
    plan = ReadingPlan(streams, buckets, (1,), weights=(float(w0), float(w1)), num_samples=total)
    first = streams[0].num_samples
    counts = np.zeros(first + streams[1].num_samples, int)
    for epoch in range(4):
        drawn = plan.samples(epoch)
        assert abs((drawn < first).sum() - total * w0 / (w0 + w1)) < 1
        counts += np.bincount(drawn, minlength=len(counts))
    assert np.ptp(counts[:first]) <= 1
    assert np.ptp(counts[first:]) <= 1


def test_drawing_with_replacement_gives_every_sample_the_same_chance():
    stream = Stream((1, 2, 5), window=4, replace=True)
    drawn = np.concatenate([stream.one_pass(n) for n in range(3000)])
    counts = np.bincount(drawn, minlength=8)
    assert len(drawn) == 8 * 3000
    # Two samples a draw, of one shard in five of eight draws: at most twice the variance of single draws.
    assert np.abs(counts - 3000).max() < 4 * (2 * 3000) ** 0.5
    assert len(set(stream.one_pass(0).tolist())) < 8 or len(set(stream.one_pass(1).tolist())) < 8


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.integers(500, 3000), st.integers(1, 50) | st.none())
def test_a_token_budget_is_kept_and_used(tokens, budget, most):
    for count, size in zip(tokens, batch_sizes(tokens, batch_size=most, token_budget=budget)):
        assert size * count <= budget
        assert most is None or size <= most
        assert size == most or (size + 1) * count > budget


def test_batches_come_in_the_order_they_fill():
    samples, buckets = np.arange(10), np.array([0, 1, 0, 1, 1, 0, 0, 1, 1, 0])
    row = form_batches(samples, buckets, [2, 3], drop_last=False)
    assert numbers(row) == [[0, 2], [1, 3, 4], [5, 6], [7, 8], [9]]
    assert numbers(form_batches(samples, buckets, [2, 3], drop_last=True)) == [[0, 2], [1, 3, 4], [5, 6]]
    assert numbers(form_batches(samples, buckets, [9, 3], drop_last=True)) == [[1, 3, 4], [0, 2, 5, 6, 9]]


def test_batches_are_halved_largest_first():
    row = Batches(np.arange(9), np.array([0, 4, 6, 9]))
    assert numbers(row.split(2)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_a_budget_that_no_sample_fits_is_named():
    with pytest.raises(OviError, match=r"900 latent positions exceeds data\.token_budget=500"):
        batch_sizes([100, 900], batch_size=None, token_budget=500)
