"""Peak of the memory a call allocates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

# The profiler's library reports on itself at every start otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes held at any moment of ``run()`` above those held when it began.

    On CUDA the caching allocator's own count of live bytes. On the CPU the running sum of the profiler's allocation
    events: every tensor and workspace that PyTorch's allocator hands out, to the byte; scratch that a library behind
    it (oneDNN, MKL) takes from the system by itself is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    kineto = recorded.profiler.kineto_results  # type: ignore[union-attr]
    return highest_sum(event.nbytes() for event in kineto.events() if event.name() == "[memory]")


def highest_sum(changes: Iterable[int]) -> int:
    """Highest running sum of allocations (+) and releases (-), 0 at least."""
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def allocate_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient of zeros, so that a step's peak counts activations and not gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
