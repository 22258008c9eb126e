"""What training computes again changes no number, and keeps as little as it says."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovi.errors import OviError
from ovi.recompute import RECOMPUTES
from test_twin import inputs, twin

PRODUCTS = {"mm", "addmm", "bmm"}


class Count(TorchDispatchMode):
    """Counts matrix products and all other operations."""

    def __init__(self):
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[-1] in PRODUCTS:
            self.products += 1
        else:
            self.others += 1
        return func(*args, **(kwargs or {}))


def gradients(recompute):
    model = twin("ovi", recompute=recompute, tower={"num_blocks": 4})
    with Count() as count:
        video, audio = model(*inputs())
        (video.square().mean() + audio.square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, count


@pytest.fixture(scope="module")
def kept():
    return gradients(None)


@pytest.mark.parametrize("name", list(RECOMPUTES))
def test_gradients_stay(name, kept):
    for parameter, gradient in gradients(RECOMPUTES[name]())[0].items():
        assert torch.equal(gradient, kept[0][parameter]), parameter


def test_blocks_run_twice_and_every_second_one_half_as_often(kept):
    every = [gradients(RECOMPUTES["block"](every=n))[1].products - kept[1].products for n in (1, 2, 4)]
    assert every[0] > 0
    assert every == [every[0], every[0] // 2, every[0] // 4]


def test_costly_operations_are_not_repeated(kept):
    """Cheap ones are; and leaving a kind of product out of what is kept repeats it."""
    count = gradients(RECOMPUTES["operation"]())[1]
    assert count.products == kept[1].products
    assert count.others > kept[1].others * 1.2
    assert gradients(RECOMPUTES["operation"](save=["mm", "attention"]))[1].products > kept[1].products


def test_nothing_is_recomputed_without_gradients():
    model, runs = twin("ovi"), []
    model.recompute = lambda n, run, *args: runs.append(n) or run(*args)
    with torch.no_grad():
        model(*inputs())
    assert runs == []
    model(*inputs())
    assert runs == [0, 1]


def test_bad_knobs_are_named():
    with pytest.raises(OviError, match=r"recompute.every must be at least 1, got 0"):
        RECOMPUTES["block"](every=0)
    with pytest.raises(OviError, match="adm is no ATen operator"):
        RECOMPUTES["operation"](save=["mm", "adm"])
