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
    """Runs a pair of blocks, or a block alone, in training."""

    def __call__(self, number: int, run: Callable[..., Any], *args: Any) -> Any:
        """``run(*args)`` of the block (of a pair, the video's) ``number``, keeping less for the backward pass."""
        ...


@RECOMPUTES.register("none")
def keep() -> Recompute:
    """Keep everything: fastest, most memory."""
    return straight


def straight(number: int, run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)`` as it is."""
    return run(*args)


@RECOMPUTES.register("block")
class WholeBlocks:
    """Keep a pair's input alone and run the pair again in the backward pass: least memory, a third more work.

    Args:
        every: 1 does so for all blocks, 2 for those whose number is a multiple of 2, and so on.

    Raises:
        OviError: for an ``every`` below 1.
    """

    def __init__(self, *, every: int = 1) -> None:
        if every < 1:
            raise OviError(f"model.recompute.every must be at least 1, got {every}")
        self.every = every

    def __call__(self, number: int, run: Callable[..., Any], *args: Any) -> Any:
        if number % self.every:
            return run(*args)
        # There is no dropout in a block: its noise need not be drawn again alike.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


@RECOMPUTES.register("operation")
class CheapOperations:
    """Keep the results of costly operations, run the cheap ones between them again; not for compiled layers.

    Args:
        save: operations whose results are kept: names of ATen operators, and "attention" for every attention kernel.

    Raises:
        OviError: for a name that is no operator.
    """

    def __init__(self, *, save: Iterable[str] = ("mm", "addmm", "bmm", "attention")) -> None:
        self.kept = {name for wanted in save for name in (_ATTENTION if wanted == "attention" else (wanted,))}
        unknown = [name for name in self.kept - set(_ATTENTION) if not hasattr(torch.ops.aten, name)]
        if unknown:
            raise OviError(
                f"model.recompute.save: {', '.join(sorted(unknown))} is no ATen operator; e.g. mm, addmm, bmm"
            )

    def __call__(self, number: int, run: Callable[..., Any], *args: Any) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, self._policy)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _policy(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = getattr(op, "_opname", None) or op._schema.name.split("::")[-1]
        return CheckpointPolicy.MUST_SAVE if name in self.kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_flash_attn_forward",
    "flex_attention",
)
