"""Operations that keep only their input: against the plain formulas, in float64 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from ovi.lean import gelu_linear, modulated_norm, normed_heads
from ovi.rope import audio_rotation

EPS = 1e-6


def drawn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(**options)


def rotation(tokens=5, head_dim=12):
    return audio_rotation(torch.arange(tokens, dtype=torch.float64) * 0.7, head_dim, theta=100.0).double()


def plain_norm(x, shift, scale, segments):
    each = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, each]) + shift[:, each]


def plain_heads(x, weight, heads, table):
    y = (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    if table is None:
        return y
    return torch.view_as_real(
        torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(table)
    ).flatten(-2)


@pytest.mark.parametrize("segments", [(5,), (2, 3)], ids=str)
def test_modulated_norm(segments):
    args = [drawn(2, 5, 12), drawn(2, len(segments), 12), drawn(2, len(segments), 12) / 3]
    args = [a.requires_grad_() for a in args]
    assert torch.allclose(modulated_norm(*args, segments, EPS), plain_norm(*args, segments), atol=1e-12)
    assert gradcheck(lambda *a: modulated_norm(*a, segments, EPS), args)


@pytest.mark.parametrize("table", [None, rotation()], ids=["still", "rotated"])
def test_normed_heads(table):
    x, weight = drawn(2, 5, 24).requires_grad_(), drawn(24).requires_grad_()
    assert torch.allclose(normed_heads(x, weight, 2, EPS, table), plain_heads(x, weight, 2, table), atol=1e-12)
    assert gradcheck(lambda *a: normed_heads(*a, 2, EPS, table), (x, weight))


def test_the_gradient_that_comes_in_is_not_written_to():
    x, weight = drawn(2, 5, 12).requires_grad_(), drawn(12).requires_grad_()
    gradient = drawn(2, 2, 5, 6)
    kept = gradient.clone()
    normed_heads(x, weight, 2, EPS).backward(gradient)
    assert torch.equal(gradient, kept)


def test_gelu_linear():
    x, linear = drawn(2, 3, 5).requires_grad_(), torch.nn.Linear(5, 4).double()

    def call(x, weight, bias):
        return torch.func.functional_call(Wrapped(linear), {"linear.weight": weight, "linear.bias": bias}, x)

    assert gradcheck(call, (x, *linear.parameters()))
    assert torch.allclose(gelu_linear(x, linear), linear(F.gelu(x, approximate="tanh")))


class Wrapped(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return gelu_linear(x, self.linear)


def test_frozen_weights_get_no_gradient():
    x, linear = drawn(2, 3, 5).requires_grad_(), torch.nn.Linear(5, 4).double().requires_grad_(False)
    gelu_linear(x, linear).sum().backward()
    assert linear.weight.grad is None
    assert x.grad is not None


def test_what_a_fine_tuning_method_puts_in_place_of_a_linear_is_called():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, adapted = drawn(2, 5), Adapted(5, 4).double()
    assert torch.allclose(gelu_linear(x, adapted), adapted(F.gelu(x, approximate="tanh")))


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        (lambda x: modulated_norm(x, torch.zeros(2, 1, 64), torch.zeros(2, 1, 64), (50,), EPS), 1),
        (lambda x: normed_heads(x, torch.ones(64), 2, EPS), 1),
        (lambda x: gelu_linear(x, torch.nn.Linear(64, 8)), 1),
        (lambda x: F.linear(F.gelu(x), torch.ones(8, 64, requires_grad=True)), 2),  # the measure itself can tell
    ],
)
def test_only_the_input_is_kept(call, kept):
    x, sizes = torch.randn(2, 50, 64, requires_grad=True), []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        call(x)
    assert sum(size >= x.numel() for size in sizes) == kept


@pytest.mark.parametrize("segments", [(50,), (10, 40)], ids=str)
def test_half_precision_is_rounded_once(segments):
    """Computed in float32 inside: the error against float64 is that of storing the result, and the same backward."""
    wide = [drawn(2, 50, 64), drawn(2, len(segments), 64), drawn(2, len(segments), 64)]
    half = [w.bfloat16().requires_grad_() for w in wide]
    truth = [h.detach().double().requires_grad_() for h in half]
    ours, exact = modulated_norm(*half, segments, EPS), plain_norm(*truth, segments)
    assert ours.dtype == torch.bfloat16
    gradient = drawn(2, 50, 64).bfloat16()
    ours.backward(gradient)
    exact.backward(gradient.double())
    for a, b in ((ours, exact), *((h.grad, t.grad) for h, t in zip(half, truth))):
        assert (a.double() - b).norm() / b.norm() < 8e-3


def test_autocast_gives_attention_one_type():
    x, weight, table = torch.randn(2, 5, 24).bfloat16(), torch.ones(24), rotation().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert normed_heads(x, weight, 2, EPS, table).dtype == torch.bfloat16
        assert normed_heads(x, weight, 2, EPS).dtype == torch.bfloat16


def test_hooks_of_a_linear_are_called():
    linear, calls = torch.nn.Linear(5, 4), []
    linear.register_forward_hook(lambda m, args, out: calls.append(out))
    gelu_linear(torch.randn(2, 5), linear)
    assert len(calls) == 1
