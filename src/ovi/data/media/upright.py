"""How a picture is turned before it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


class Upright(NamedTuple):
    """What brings a decoded picture into the position in which it is shown, by quarter turns and mirrors.

    Args:
        transposed: rows become columns, first.
        mirrored: left and right change places, then.
        upended: top and bottom change places.
    """

    transposed: bool
    mirrored: bool
    upended: bool

    @classmethod
    def of(cls, frame: VideoFrame) -> Upright:
        """As the frame's display matrix says, by the nearest quarter turn; without one it stays as it is."""
        try:
            side_data: Any = frame.side_data  # a mapping by its stubs, and a sequence too
        except ValueError:  # PyAV refuses all of it for a kind that it has no name of; this it finds by itself
            turns = round(frame.rotation / 90) % 4  # anticlockwise
            return cls(turns % 2 == 1, turns in (2, 3), turns in (1, 2))
        for data in side_data:
            if data.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = np.frombuffer(memoryview(data), np.int32)[:5].tolist()
                if abs(b) + abs(c) > abs(a) + abs(d):
                    return cls(True, c < 0, b < 0)
                return cls(False, a < 0, d < 0)
        return cls(False, False, False)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, ...] as it is shown; a view."""
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        return picture[:: -1 if self.upended else 1, :: -1 if self.mirrored else 1]
