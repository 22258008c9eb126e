"""Models without storage: shapes and names at once, at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made inside are on the meta device, and their weights are neither drawn nor scaled.

    On the meta device that would do nothing, but the first such call imports PyTorch's decompositions and SymPy: 2.4 s
    and 86 MB, more than all else that it takes to load a twin.
    """
    with torch.device("meta"), _ShapesAlone():
        yield


class _ShapesAlone(TorchFunctionMode):
    """Leaves out what changes values and no shape; all other functions run as ever."""

    # What an initialisation calls, and what its arithmetic operators come down to.
    _DRAWS = (Tensor.uniform_, Tensor.normal_, init.uniform_, init.normal_, init.kaiming_uniform_)
    _SCALES = (Tensor.mul, Tensor.mul_, Tensor.div, Tensor.div_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in self._DRAWS or (func in self._SCALES and not isinstance(args[1], Tensor)):
            return named["tensor"] if "tensor" in named else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **named)
