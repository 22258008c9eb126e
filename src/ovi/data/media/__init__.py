"""Media files in and out: pictures and sound of one span of time, sample-accurate, through PyAV.

Time is the file's presentation time, counted from the first picture: edit lists, codec priming and streams that start
at different times are honoured, because everything is placed by timestamp and nothing by counting. Frame n of a clip
lasts from n/fps to (n+1)/fps and shows what the source shows at the middle of that span, so there is no drift between
rates, and a source at the clip's own rate is taken frame for frame.
"""

from ovi.data.media.clip import Clip, Crop, MediaError, MediaInfo
from ovi.data.media.header import probe
from ovi.data.media.reading import iter_clips, read_clip
from ovi.data.media.span import VariableFrameRate, WithoutSound
from ovi.data.media.writing import write_clip

__all__ = [
    "Clip",
    "Crop",
    "MediaError",
    "MediaInfo",
    "VariableFrameRate",
    "WithoutSound",
    "iter_clips",
    "probe",
    "read_clip",
    "write_clip",
]
