"""The published twin's work in closed form: matrix products and attentions, their operations and bytes.

Counted from the sizes alone, without running a network: it states what a counter must find, and what a machine that
is not at hand would have to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from setting import PATCH, Setting

FREQUENCIES = 256
"""Width of the timestep's sinusoid."""

KERNEL = 7
"""Width of the audio patch's convolutions, in tokens."""


@dataclass(frozen=True)
class Product:
    """``times`` products [rows, inner] x [inner, columns] with a weight.

    Args:
        input_gradient: whether training needs the gradient of the left side; inputs of the network need none.
    """

    rows: int
    inner: int
    columns: int
    times: int = 1
    input_gradient: bool = True

    @property
    def forward_flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times

    @property
    def backward_flops(self) -> int:
        return self.forward_flops * (2 if self.input_gradient else 1)

    @property
    def forward_elements(self) -> int:
        """Elements read and written: both sides and the result, once each."""
        return self.times * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)

    @property
    def backward_elements(self) -> int:
        """The same of the product for the weight's gradient and that for the input's: equal sizes."""
        return self.forward_elements * (2 if self.input_gradient else 1)


@dataclass(frozen=True)
class Attention:
    """``times`` attentions of ``heads`` heads (batch included) of ``width``, whose scores never leave the chip."""

    heads: int
    queries: int
    keys: int
    width: int
    times: int = 1

    @property
    def forward_flops(self) -> int:
        return 4 * self.heads * self.queries * self.keys * self.width * self.times

    @property
    def backward_flops(self) -> int:
        return 2 * self.forward_flops

    @property
    def forward_elements(self) -> int:
        """q, k and v read, the result written."""
        return self.times * self.heads * self.width * (2 * self.queries + 2 * self.keys)

    @property
    def backward_elements(self) -> int:
        """q, k, v, result and its gradient read, three gradients written."""
        return self.times * self.heads * self.width * (4 * self.queries + 4 * self.keys)


Work = Product | Attention


def twin(setting: Setting, *, time_per_token: bool = False) -> Iterator[Work]:
    """All products and attentions of one forward of the published twin.

    Args:
        time_per_token: embed the timestep once a token, as the original does, and not once a sample.
    """
    yield from tower(setting, "video", time_per_token=time_per_token)
    yield from tower(setting, "audio", time_per_token=time_per_token)
    own, other = setting.video_tokens, setting.audio_tokens
    for queries, keys in ((own, other), (other, own)):
        yield Product(setting.batch * keys, setting.width, setting.width, 2 * setting.layers)
        yield Attention(setting.batch * setting.heads, queries, keys, setting.head_dim, setting.layers)


def tower(setting: Setting, modality: str, *, time_per_token: bool = False) -> Iterator[Work]:
    """Those of one tower without the exchange; ``modality`` is ``video`` or ``audio``."""
    width, layers, batch = setting.width, setting.layers, setting.batch
    tokens = setting.video_tokens if modality == "video" else setting.audio_tokens
    rows, text_rows = batch * tokens, batch * setting.text_len
    times = rows if time_per_token else batch
    yield Product(times, FREQUENCIES, width, input_gradient=False)
    yield Product(times, width, width)
    yield Product(times, width, 6 * width)
    yield Product(text_rows, setting.text_dim, width, input_gradient=False)
    yield Product(text_rows, width, width)
    if modality == "video":
        values = setting.video_channels * PATCH[0] * PATCH[1] * PATCH[2]
        yield Product(rows, values, width, input_gradient=False)
    else:
        values = setting.audio_channels
        hidden = -(-int(8 * width / 3) // 256) * 256
        yield Product(rows, KERNEL * values, width, input_gradient=False)
        yield Product(rows, KERNEL * width, hidden, 2)
        yield Product(rows, KERNEL * hidden, width)
    yield Product(rows, width, width, 6 * layers)  # q, k, v, o of self-attention, q and o of the text's
    yield Product(text_rows, width, width, 2 * layers)
    yield Product(rows, width, setting.ffn, layers)
    yield Product(rows, setting.ffn, width, layers)
    yield Attention(batch * setting.heads, tokens, tokens, setting.head_dim, layers)
    yield Attention(batch * setting.heads, tokens, setting.text_len, setting.head_dim, layers)
    yield Product(rows, width, values)


def forward_flops(work: Iterable[Work]) -> int:
    return sum(w.forward_flops for w in work)


def step_flops(work: Iterable[Work]) -> int:
    """Forward and backward."""
    return sum(w.forward_flops + w.backward_flops for w in work)


def forward_elements(work: Iterable[Work]) -> int:
    return sum(w.forward_elements for w in work)


def step_elements(work: Iterable[Work]) -> int:
    """Forward and backward."""
    return sum(w.forward_elements + w.backward_elements for w in work)
