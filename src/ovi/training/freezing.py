"""Parts of a twin that training leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ovi.errors import OviError


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze the weights of some parts, in place.

    Args:
        model: the twin.
        parts: names of its modules or weights, or patterns of them: ``video``, ``fusions.0``, ``*.ffn`` for all
            feed-forwards; () for none.

    Raises:
        OviError: for a part that is nowhere, or when nothing is left to train.
    """
    if isinstance(parts, str):
        raise OviError(f"optim.frozen is a list of parts, such as [video,audio]; got {parts!r}")
    weights = dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules() if name]  # a fusion may have no weights
    for part in parts:
        named = [name for name in weights if fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")]
        if not named and not any(fnmatchcase(name, part) for name in modules):
            words = sorted({word for name in weights for word in name.split(".") if not word.isdigit()})
            raise OviError(
                f"optim.frozen: no weights are called {part!r}. Patterns match whole names, such as "
                f"{next(iter(weights))}: video, audio and fusions are the largest parts, '*.ffn' all feed-forwards; "
                f"words in names: {', '.join(words)}"
            )
        for name in named:
            weights[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise OviError(f"optim.frozen={list(parts)} leaves nothing to train: name fewer parts")
