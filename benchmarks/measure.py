"""Everything that is measured of a set of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import flops
import memory
import timing
import work
from candidate import Candidate
from setting import Setting

KINDS = ("forward", "step")
"""A forward without gradients; a training step, forward and backward without the optimiser."""

DEFINITIONS = {
    "forward": "without gradients",
    "step": "forward and backward of the mean square of every velocity; gradients None before; no optimiser",
    "speed": "median over rounds of the baseline's time over this one's in the same round: above 1 is faster",
    "flops": "matrix products, convolutions and attentions as they ran; a multiply-add counts two, and scores "
    "recomputed in a backward pass do not count. 'published' is the same of the published arithmetic in closed form, "
    "whose prompts are 512 rows with the padding; a network that computes the same from fewer rows runs fewer",
    "share_of_peak": "flops / median time / best rate of torch.mm in the same type and run",
    "forward_bytes": "peak of allocated bytes in a forward without gradients, above what was allocated before it",
    "step_bytes": "the same of a training step with all gradients allocated before it: activations and workspace",
    "step_with_gradients_bytes": "the same with gradients None before, so that they count as they appear",
    "memory": "this step_bytes / the baseline's: below 1 is less",
}


def operations(candidate: Candidate) -> dict[str, Any]:
    """FLOPs by kind as the network runs them, and those of the published arithmetic where it has the same function.

    An attention that runs in another package's kernel (flash-attn) is not seen; it is then taken from the closed form.
    """
    found: dict[str, Any] = {"from": "counter"}
    for kind, run in (("forward", candidate.forward), ("step", candidate.step)):
        seen = flops.by_operation(run)
        found[kind] = sum(seen.values())
        if candidate.published and not flops.saw_attention(seen):
            found[kind] += _known(kind, [w for w in candidate.published if isinstance(w, work.Attention)])
            found["from"] = "counter, attention from the closed form"
    candidate.clear()
    if candidate.published:
        found["published"] = {kind: _known(kind, candidate.published) for kind in KINDS}
    return found


def _known(kind: str, works: Sequence[work.Work]) -> int:
    return work.forward_flops(works) if kind == "forward" else work.step_flops(works)


def times(
    candidates: Mapping[str, Candidate], setting: Setting, *, rounds: int, warmup: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind and name: in a round all candidates' forwards in turn, then all their steps."""
    tasks: dict[str, timing.Task] = {}
    for name, candidate in candidates.items():
        tasks[f"forward {name}"] = timing.Task(candidate.forward)
    for name, candidate in candidates.items():
        tasks[f"step {name}"] = timing.Task(candidate.step, before=candidate.clear, after=candidate.clear)
    on_gpu = torch.device(setting.device).type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else timing.nothing
    taken = timing.interleaved(tasks, rounds=rounds, warmup=warmup, synchronise=wait)
    return {kind: {name: taken[f"{kind} {name}"] for name in candidates} for kind in KINDS}


def peaks(candidate: Candidate, device: str) -> dict[str, int]:
    """Peak memory of a forward and of a training step, with and without the gradients; see DEFINITIONS."""
    forward = memory.peak_bytes(candidate.forward, device)
    candidate.clear()
    with_gradients = memory.peak_bytes(candidate.step, device)
    memory.allocate_gradients(candidate.model)
    step = memory.peak_bytes(candidate.step, device)
    candidate.clear()
    return {"forward_bytes": forward, "step_bytes": step, "step_with_gradients_bytes": with_gradients}


def measured(
    candidates: Mapping[str, Candidate],
    setting: Setting,
    *,
    baselines: Mapping[str, str],
    rounds: int,
    warmup: int,
    same_work: Mapping[str, str],
    peak_sizes: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Figures by candidate, and the matmul peak they are set against.

    Args:
        candidates: by name.
        setting: that they were built for.
        baselines: name of the candidate that ratios are taken to, by task.
        rounds: times kept of each.
        warmup: rounds before those.
        same_work: a candidate whose FLOPs are those of another, by name.
        peak_sizes: of the square products that show the machine's peak; None chooses by device.
    """
    counts = {name: operations(c) for name, c in candidates.items() if name not in same_work}
    counts |= {name: counts[other] for name, other in same_work.items()}
    peak = flops.matmul_peak(setting.device, setting.torch_dtype, sizes=peak_sizes)
    taken = times(candidates, setting, rounds=rounds, warmup=warmup)
    # Once before and once after: the better one is nearer to what the machine can do.
    peak = max(peak, flops.matmul_peak(setting.device, setting.torch_dtype, sizes=peak_sizes))
    bytes_ = {name: peaks(c, setting.device) for name, c in candidates.items()}
    models = {}
    for name, candidate in candidates.items():
        base = baselines.get(candidate.task)
        figures: dict[str, Any] = {
            "task": candidate.task,
            "differs": candidate.differs,
            "parameters": sum(p.numel() for p in candidate.model.parameters()),
            "flops": counts[name],
            "baseline": base,
        }
        for kind in KINDS:
            rate = counts[name][kind] / timing.median(taken[kind][name])
            figures[kind] = {
                **timing.summary(taken[kind][name]),
                "flops_per_s": rate,
                "share_of_peak": rate / peak,
                "speed": timing.speed(taken[kind][name], taken[kind][base]) if base else None,
            }
        figures["memory"] = {
            **bytes_[name],
            "memory": bytes_[name]["step_bytes"] / bytes_[base]["step_bytes"] if base else None,
        }
        models[name] = figures
    return {"matmul_peak_flops_per_s": peak, "definitions": DEFINITIONS, "models": models}
