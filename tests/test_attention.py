"""Every attention kernel that can run here against a softmax in float64."""

import sys
from types import ModuleType

import pytest
import torch

from ovi import attention
from ovi.attention import ATTENTIONS, flash_versions, use_attention
from ovi.errors import OviError

RUNNABLE = [name for name in ATTENTIONS if name != "flash" or (flash_versions() and torch.cuda.is_available())]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(q, k, v, mask=None):
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        mask = mask[:, None, None]
        scores = scores.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v.double()


def heads(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    # As projections leave them: tokens before heads in memory.
    return [torch.randn(2, n, 3, 32, generator=g).to(DEVICE, dtype).transpose(1, 2) for n in (40, 72, 72)]


def masks():
    some = torch.arange(72) < torch.tensor([[50], [72]])
    shift = torch.randn(2, 72, generator=torch.Generator().manual_seed(1)).masked_fill(~some, -float("inf"))
    return {"none": None, "bool": some.to(DEVICE), "float": shift.to(DEVICE)}


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("name", RUNNABLE)
@torch.no_grad()
def test_kernels_agree_with_float64(name, mask):
    dtype, most = (torch.bfloat16, 2e-2) if name == "flash" else (torch.float32, 3e-6)
    q, k, v = heads(dtype)
    result = ATTENTIONS[name]()(q, k, v, masks()[mask])
    assert result.dtype == dtype
    assert (result - exact(q, k, v, masks()[mask])).abs().max() < most


@pytest.mark.parametrize("name", [n for n in RUNNABLE if n not in ("flash", "flex")])
def test_gradients_agree_with_float64(name):
    mask = masks()["float"]
    q, k, v = (x.requires_grad_() for x in heads())
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ATTENTIONS[name]()(q, k, v, mask).square().sum().backward()
    exact(*wide, mask).square().sum().backward()
    for x, w in zip((q, k, v), wide):
        assert (x.grad - w.grad).abs().max() < 2e-5


def test_flex_says_where_it_cannot_train():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU: flex trains here")
    q, k, v = (x.requires_grad_() for x in heads())
    with pytest.raises(OviError, match="attention=sdpa"):
        ATTENTIONS["flex"]()(q, k, v)


@pytest.fixture
def installed(monkeypatch):
    """Plants flash-attn packages that compute exactly, tokens before heads, and note which was called."""
    called = []

    def plant(version, module, returns=lambda x: x):
        fake = ModuleType(module)
        fake.flash_attn_func = lambda q, k, v: (
            called.append(version)
            or returns(exact(*(x.transpose(1, 2) for x in (q, k, v))).to(q.dtype).transpose(1, 2))
        )
        monkeypatch.setitem(sys.modules, module, fake)
        attention.flash_versions.cache_clear()
        attention._flash_kernel.cache_clear()

    monkeypatch.setattr(attention, "_flash_takes", lambda q: q.dtype == torch.bfloat16)
    yield plant, called
    attention.flash_versions.cache_clear()
    attention._flash_kernel.cache_clear()


def test_flash_is_called_tokens_before_heads_and_the_highest_version_wins(installed):
    plant, called = installed
    plant(2, "flash_attn")
    plant(3, "flash_attn_interface", returns=lambda x: (x, None))
    q, k, v = heads(torch.bfloat16)
    for build in (ATTENTIONS["flash"], ATTENTIONS["auto"]):
        assert (build()(q, k, v) - exact(q, k, v)).abs().max() < 2e-2
    ATTENTIONS["flash"](version=2)(q, k, v)
    assert called == [3, 3, 2]


def test_auto_leaves_masks_and_full_precision_to_sdpa(installed):
    plant, called = installed
    plant(2, "flash_attn")
    ATTENTIONS["auto"]()(*heads(torch.float32))
    ATTENTIONS["auto"]()(*heads(torch.bfloat16), masks()["bool"])
    assert called == []
    with pytest.raises(OviError, match=r"needs float16 or bfloat16 on CUDA, got torch.float32"):
        ATTENTIONS["flash"]()(*heads(torch.float32))


@pytest.mark.parametrize(("version", "says"), [(None, "none is installed"), (4, r"pip install 'ovi\[flash4\]'")])
def test_absent_flash_is_said_when_it_is_chosen(version, says):
    if flash_versions():
        pytest.skip("flash-attn is installed here")
    with pytest.raises(OviError, match=says):
        ATTENTIONS["flash"](version=version)


def test_a_model_changes_its_kernel_as_a_whole():
    from test_twin import inputs, twin

    model, calls = twin("ovi"), []
    use_attention(model, lambda q, k, v, mask=None: calls.append(q.shape) or ATTENTIONS["sdpa"]()(q, k, v, mask))
    model(*inputs())
    assert len(calls) == len(model.fusions) * (2 * 2 + 2)  # self and text attention of both, and the exchange
