"""Which video block runs beside which audio block, and which of these pairs exchange."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from ovi.errors import OviError

LayerPlan = list[tuple[int | None, int | None]]
"""Steps of a twin in order: a (video block, audio block) pair that exchanges, or one block alone beside None."""

PlanSpec = str | Sequence[int] | Sequence[Sequence[int]]
"""How a plan is said: see ``layer_plan``."""

FORMS = "all, every:K, first:K, last:K, spread:K, [3,7,...] or [[video,audio],...]"


def layer_plan(spec: PlanSpec, num_video: int, num_audio: int) -> LayerPlan:
    """The steps of a twin of two depths.

    Blocks of equal number are partners; what the deeper tower has beyond the other runs alone, as do all blocks that
    the plan leaves out.

    Args:
        spec: ``all``; ``every:K`` (pairs 0, K, 2K, ...); ``first:K``; ``last:K`` (of the pairs there are);
            ``spread:K`` (K pairs spread evenly over both depths, the first and the last blocks among them: towers of
            unequal depth); numbers of pairs; or (video block, audio block) pairs themselves.
        num_video: blocks of the video tower.
        num_audio: blocks of the audio tower.

    Raises:
        OviError: for another form, a number out of range, or pairs that are not in increasing order.
    """
    pairs = _pairs(spec, num_video, num_audio)
    last = (-1, -1)
    for pair in pairs:
        if not (last[0] < pair[0] < num_video and last[1] < pair[1] < num_audio):
            raise OviError(
                f"model.plan={spec}: pair {list(pair)} after {list(last) if last[0] >= 0 else 'none'} does not fit "
                f"towers of {num_video} and {num_audio} blocks: numbers must increase and stay below the depths"
            )
        last = pair
    plan: LayerPlan = []
    v = a = 0
    for video, audio in [*pairs, (num_video, num_audio)]:
        # Blocks between two exchanges know nothing of each other: any order gives the same numbers.
        for own, other in zip_longest(range(v, video), range(a, audio)):
            plan += [step for step in ((own, None), (None, other)) if step != (None, None)]
        if video < num_video:
            plan.append((video, audio))
        v, a = video + 1, audio + 1
    return plan


def fused_pairs(plan: LayerPlan) -> list[tuple[int, int]]:
    """The pairs of a plan that exchange, in order."""
    return [(v, a) for v, a in plan if v is not None and a is not None]


def _pairs(spec: PlanSpec, num_video: int, num_audio: int) -> list[tuple[int, int]]:
    both = min(num_video, num_audio)
    if not isinstance(spec, str):
        entries: list[object] = list(spec)
        if all(isinstance(n, int) for n in entries):
            return [(n, n) for n in entries]  # type: ignore[misc]
        if all(isinstance(n, Iterable) for n in entries):
            listed: list[tuple[int, ...]] = [tuple(n) for n in entries]  # type: ignore[arg-type]
            if all(len(n) == 2 and all(isinstance(x, int) for x in n) for n in listed):
                return [(n[0], n[1]) for n in listed]
        raise OviError(f"model.plan={spec}: expected {FORMS}")
    if spec == "all":
        return [(n, n) for n in range(both)]
    word, _, number = spec.partition(":")
    if word not in ("every", "first", "last", "spread") or not number.isdigit() or int(number) < 1:
        raise OviError(f"model.plan={spec}: expected {FORMS}, K at least 1")
    k = int(number)
    if k > both:
        raise OviError(f"model.plan={spec}: towers of {num_video} and {num_audio} blocks have only {both} pairs")
    if word == "spread":
        steps = [i / max(1, k - 1) for i in range(k)]
        return [(round(s * (num_video - 1)), round(s * (num_audio - 1))) for s in steps]
    chosen = {"every": range(0, both, k), "first": range(k), "last": range(both - k, both)}[word]
    return [(n, n) for n in chosen]
