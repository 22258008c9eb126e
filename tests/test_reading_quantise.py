"""Latents in 8 bits: the error is what theory says it is."""

import math

import pytest
import torch

from ovi.data.quantise import dequantise, packed, quantise, relative_rms
from ovi.errors import OviError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "axis"), [((48, 31, 8, 8), 0), ((157, 20), -1)])
def test_no_number_is_off_by_more_than_half_a_step_of_its_channel(shape, axis):
    numbers = normal(*shape) * torch.rand(shape[axis]).mul(9).add(0.1).view(
        [-1 if a == axis % len(shape) else 1 for a in range(len(shape))]
    )
    steps, scale = quantise(numbers, axis=axis)
    assert steps.dtype == torch.int8
    assert scale.shape == (shape[axis],)
    error = (dequantise(steps, scale, axis=axis) - numbers).abs().movedim(axis, 0).flatten(1).amax(1)
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    assert (error > 0.4 * scale).all()


def test_error_of_normal_latents_is_that_of_uniform_rounding():
    """Root mean square of a step / sqrt(12), per channel, in float64; published-size latents lose 1 %."""
    numbers = normal(48, 31, 44, 80)
    steps, scale = quantise(numbers, axis=0)
    expected = math.sqrt(float((scale.double() ** 2).mean()) / 12) / float(numbers.double().square().mean().sqrt())
    error = relative_rms(numbers, dequantise(steps, scale, axis=0))
    assert error == pytest.approx(expected, rel=0.01)
    assert error < 0.012
    psnr = 20 * math.log10(float(numbers.abs().max()) / (error * float(numbers.double().square().mean().sqrt())))
    assert psnr > 52
    # float16 is two thousand times finer than its numbers, so nearly all of the error is the 8 bits'.
    assert relative_rms(numbers, numbers.half()) < 0.0003


def test_half_the_bytes_and_text_untouched():
    tensors = {"video": normal(12, 8, 4, 4).half(), "audio": normal(31, 64).half(), "text": normal(5, 64).half()}
    made = packed(tensors)
    assert set(made) == {"video", "video.scale", "audio", "audio.scale", "text"}
    assert made["text"] is tensors["text"]
    small = sum(made[name].nbytes for name in ("video", "audio"))
    assert small * 2 == sum(tensors[name].nbytes for name in ("video", "audio"))


def test_zeros_stay_zeros_and_extremes_are_kept():
    numbers = torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 1.5]])
    steps, scale = quantise(numbers, axis=0)
    assert torch.equal(dequantise(steps, scale, axis=0)[0], numbers[0])
    assert steps[1, :2].tolist() == [127, -127]
    assert dequantise(steps, scale, axis=0)[1, :2].tolist() == pytest.approx([3.0, -3.0], rel=1e-6)


def test_what_has_no_8_bit_form_is_refused():
    with pytest.raises(OviError, match="not finite"):
        quantise(torch.tensor([[1.0, float("nan")]]), axis=0)
    with pytest.raises(ValueError, match=r"\[3\] scales for 2 channels"):
        dequantise(torch.zeros(2, 5, dtype=torch.int8), torch.ones(3), axis=0)
