"""Floating-point operations of a call, and the rate the machine reaches in a plain matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION_BACKWARD = (
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Four products of an attention's backward pass, from the shapes [B, H, L, d] of its tensors."""
    batch, heads, queries, width = q
    keys, value_width = v[2], v[3]
    return batch * heads * queries * keys * 4 * (width + value_width)


def by_operation(run: Callable[[], Any]) -> dict[str, int]:
    """Operations of the matrix products, convolutions and attentions in ``run()``, by kernel; a multiply-add is two.

    Kernels that recompute the scores in the backward pass do a product more than the maths asks for. It is not
    counted, so the sum does not depend on which of PyTorch's kernels ran. Kernels of other packages are not seen.
    """
    plain = {getattr(torch.ops.aten, n): _attention_backward for n in _ATTENTION_BACKWARD if hasattr(torch.ops.aten, n)}
    with FlopCounterMode(display=False, custom_mapping=plain) as counter:
        run()
    return {str(kernel): flops for kernel, flops in counter.get_flop_counts().get("Global", {}).items()}


def saw_attention(operations: Mapping[str, int]) -> bool:
    """Whether an attention is among them, as one kernel or as batched products."""
    return any("attention" in kernel or "bmm" in kernel for kernel in operations)


def matmul_peak(device: str, dtype: torch.dtype, *, sizes: tuple[int, ...] | None = None, repeats: int = 5) -> float:
    """Operations a second in the best of ``repeats`` square ``torch.mm`` of each size, in ``dtype``."""
    on_gpu = torch.device(device).type == "cuda"
    best = 0.0
    for n in sizes or ((4096, 8192, 16384) if on_gpu else (1024, 2048)):
        # Not zeros: a GPU draws less power on them and clocks higher than it does on data.
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        for turn in range(repeats + 1):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            if on_gpu:
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
