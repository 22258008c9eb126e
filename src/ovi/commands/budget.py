"""How many steps a run may take: so many, so many operations, or so many seconds of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from ovi.commands.hints import did_you_mean
from ovi.errors import OviError

KINDS = ("steps", "flops", "seconds")


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    Args:
        kind: one of ``KINDS``.
        amount: of it.
    """

    kind: str
    amount: float


def read_budget(config: DictConfig) -> Budget | None:
    """The budget of a run; None where ``trainer.max_steps`` says when it ends.

    Raises:
        OviError: for budgets of two kinds, of an unknown one, or an amount that makes no sense.
    """
    given = OmegaConf.to_container(config.budget, resolve=True) if config.get("budget") is not None else {}
    if not isinstance(given, dict):
        raise OviError(f"budget says of what: budget.steps=600, budget.flops=1e15 or budget.seconds=300; got {given!r}")
    unknown = [str(kind) for kind in given if kind not in KINDS]
    if unknown:
        raise OviError(f"no budget of {unknown[0]!r}.{did_you_mean(unknown[0], KINDS)} There are: {', '.join(KINDS)}")
    chosen = {str(kind): amount for kind, amount in given.items() if amount is not None}
    if len(chosen) > 1:
        raise OviError(f"budget: one kind at a time, got {' and '.join(chosen)}; set all but one of them to null")
    for kind, amount in chosen.items():
        whole = kind != "steps" or isinstance(amount, int)
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf or not whole:
            number = "a whole number" if kind == "steps" else "a number"
            raise OviError(f"budget.{kind} is {number} above 0, got {amount!r}")
        return Budget(kind, float(amount))
    return None


def apply_budget(
    config: DictConfig,
    flops_per_step: Callable[[], float],
    seconds_per_step: Callable[[], float],
    batches_per_epoch: Callable[[], int | None] = lambda: None,
) -> None:
    """Set how many steps a run takes, in place; validation and checkpoints then come at its end, too.

    Args:
        config: of ``ovi train``.
        flops_per_step: counts the operations of an optimizer step, of all processes.
        seconds_per_step: measures the time of one.
        batches_per_epoch: counts the batches of an epoch; None where there are no epochs. Asked where a step takes
            several batches.

    Raises:
        OviError: for a budget that does not last for a step, or as ``read_budget`` does.
    """
    budget, trainer = read_budget(config), config.trainer
    if budget is None:
        if isinstance(trainer.val_check_interval, int) and 0 < trainer.max_steps < trainer.val_check_interval:
            trainer.val_check_interval = trainer.max_steps
        return
    per_step = {"steps": lambda: 1.0, "flops": flops_per_step, "seconds": seconds_per_step}[budget.kind]()
    steps = int(budget.amount / per_step * (1 + 1e-9))
    if steps < 1:
        raise OviError(
            f"budget.{budget.kind}={budget.amount:g} does not last for one step, which takes {per_step:.3g}: raise it"
        )
    # Lightning counts batches here, not steps.
    each = trainer.get("accumulate_grad_batches") or 1
    if isinstance(trainer.val_check_interval, int) and trainer.get("check_val_every_n_epoch") is None:
        steps, interval = rounds(steps, max(1, trainer.val_check_interval // each), exact=budget.kind == "steps")
        batches = batches_of(steps, each, batches_per_epoch() if each > 1 else None)
        trainer.val_check_interval = rounds(batches, interval * each, exact=True)[1]
        checkpoint = config.callbacks.get("checkpoint")
        if checkpoint is not None and isinstance(checkpoint.get("every_n_train_steps"), int):
            checkpoint.every_n_train_steps = interval
    trainer.max_steps = steps


def batches_of(steps: int, each: int, batches_per_epoch: int | None) -> int:
    """Batches that some steps take.

    Args:
        steps: of the optimizer.
        each: batches of a step; the last of an epoch takes what is left.
        batches_per_epoch: None where there are no epochs.
    """
    if not batches_per_epoch:
        return steps * each
    epochs, left = divmod(steps, math.ceil(batches_per_epoch / each))
    return epochs * batches_per_epoch + left * each


def rounds(steps: int, interval: int, *, exact: bool) -> tuple[int, int]:
    """Steps of a run and between validations, so that the last validation is at the end.

    Args:
        steps: of the run at most.
        interval: wished between validations.
        exact: make all the steps, and give way in the interval; else a few steps fewer.

    Returns:
        (steps, interval); steps is a multiple of interval.
    """
    count = max(1, round(steps / interval))
    if exact:
        possible = [c for c in range(1, 2 * count + 1) if steps % c == 0]
        count = min(possible, key=lambda c: abs(math.log(c / count)))
    return steps // count * count, steps // count
