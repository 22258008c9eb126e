"""Whether tensors fit a model: everything that is missing, unexpected or misshapen, in one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ovi.checkpoint.files import Weights
from ovi.checkpoint.names import as_ours, some
from ovi.errors import OviError


def in_our_names(weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by our names and in our shapes, and the names that are not of the checkpoint's scheme.

    Raises:
        OviError: when two tensors have one name of ours.
    """
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    for theirs, tensor in weights.tensors.items():
        name = weights.scheme.to_ours(theirs)
        if name is None:
            unknown.append(theirs)
        elif name in ours:
            raise OviError(
                f"{weights.origin}: {theirs} is there twice, under the name {weights.scheme.from_ours(name)} too"
            )
        else:
            ours[name] = as_ours(name, tensor)
    return ours, unknown


def check_fit(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, Tensor],
    unknown: Iterable[str],
    weights: Weights,
    hint: str = "",
) -> None:
    """See that tensors are those of a model, no more, no fewer, and of its shapes.

    Args:
        expected: shapes by our names.
        got: tensors by our names.
        unknown: further names in the checkpoint.
        weights: for names and origin in the message.
        hint: what to do about it, said last.

    Raises:
        OviError: listing all that is wrong, in the checkpoint's own names.
    """

    def named(ours: str) -> str:
        return weights.scheme.from_ours(ours) or ours

    wrong = [f"missing {named(name)}" for name in expected if name not in got]
    wrong += [f"unexpected {name}" for name in (*map(named, (n for n in got if n not in expected)), *unknown)]
    wrong += [
        f"{named(name)} is {list(got[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in got and tuple(got[name].shape) != shape
    ]
    if wrong:
        raise OviError(
            f"{weights.origin}: the checkpoint does not fit the model, {len(wrong)} tensors: {some(wrong, 20)}" + hint
        )
