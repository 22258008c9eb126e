"""Trading time for memory in training: what the backward pass computes again instead of keeping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ovi.errors import OviError
from ovi.registry import Registry

RECOMPUTES = Registry("recompute", group="model/recompute", doc="what training computes again instead of keeping")


class Recompute(Protocol):
    """Runs a pair of blocks in training."""

    def __call__(self, number: int, run: Callable[..., Any], *args: Any) -> Any:
        """``run(*args)`` of pair ``number``, counted from 0, keeping less than usual for the backward pass."""
        ...


@RECOMPUTES.register("none")
def keep() -> Recompute:
    """Keep everything: fastest, most memory."""
    return lambda number, run, *args: run(*args)


@RECOMPUTES.register("block")
def block(*, every: int = 1) -> Recompute:
    """Keep a pair's input alone and run the pair again in the backward pass: least memory, a third more work.

    Args:
        every: 1 does so for all pairs, 2 for every second one, and so on.
    """
    if every < 1:
        raise OviError(f"model.recompute.every must be at least 1, got {every}")

    def runs(number: int, run: Callable[..., Any], *args: Any) -> Any:
        if number % every:
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    return runs


@RECOMPUTES.register("operation")
def operation(*, save: Iterable[str] = ("mm", "addmm", "bmm", "attention")) -> Recompute:
    """Keep the results of costly operations, run the cheap ones between them again.

    Args:
        save: operations whose results are kept: names of ATen operators, and "attention" for every attention kernel.
    """
    kept = {name for wanted in save for name in (_ATTENTION if wanted == "attention" else (wanted,))}
    unknown = [name for name in kept - set(_ATTENTION) if not hasattr(torch.ops.aten, name)]
    if unknown:
        raise OviError(f"model.recompute.save: {', '.join(sorted(unknown))} is no ATen operator; e.g. mm, addmm, bmm")

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = getattr(op, "_opname", None) or op._schema.name.split("::")[-1]
        return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def runs(number: int, run: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return runs


_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_flash_attn_forward",
    "flex_attention",
)
