"""Metric states of a varying number of rows, which any process may have none of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class _Kind:
    width: int
    limit: int
    shrink: Callable[[Tensor], Tensor]


class RowStates(Metric):
    """A metric with states of rows [n, width] in float64 that stay within a limit and are put together over processes.

    torchmetrics' own "cat" states cannot be: a process that saw nothing would send a tensor of another shape and type.
    """

    def __init__(self, *args: Any, **metric_knobs: Any) -> None:
        super().__init__(*args, **metric_knobs)
        self._kinds: dict[str, _Kind] = {}

    def add_row_state(self, name: str, width: int, *, limit: int, shrink: Callable[[Tensor], Tensor]) -> None:
        """A state of rows.

        Args:
            name: of the state.
            width: of a row.
            limit: as soon as there are more rows than this,
            shrink: puts fewer in their place.
        """
        self.add_state(name, [], dist_reduce_fx="cat")
        self._kinds[name] = _Kind(width, limit, shrink)
        self._empty(name)

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Put rows [n, width] to a state."""
        kept: list[Tensor] = getattr(self, name)
        kept.append(rows.to(kept[0]))
        kind = self._kinds[name]
        if sum(map(len, kept)) > kind.limit:
            kept[:] = [kind.shrink(torch.cat(kept))]

    def rows(self, name: str) -> Tensor:
        """All rows of a state [n, width]: of this process, or of all of them where states are synchronised."""
        kept = getattr(self, name)
        return kept if isinstance(kept, Tensor) else torch.cat(kept)

    def set_rows(self, name: str, rows: Tensor) -> None:
        """Put rows [n, width] in place of those of a state."""
        setattr(self, name, [rows.to(self.device, torch.float64)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for name in self._kinds:
            self._empty(name)

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable | None = None,
    ) -> Iterator[None]:
        """As torchmetrics has it, but a metric that raises inside is of use afterwards."""
        self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def over_processes(self) -> Any:
        """States are those of all processes inside ``with``; every process must enter."""
        return self.sync_context(self.dist_sync_fn, should_sync=self._to_sync)

    def _empty(self, name: str) -> None:
        # A block without rows says width and type where no other does.
        self.set_rows(name, torch.zeros(0, self._kinds[name].width))
