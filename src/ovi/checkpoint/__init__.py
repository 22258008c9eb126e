"""Weights in and out: published Ovi, Wan2.2's video tower, our own runs."""

from ovi.checkpoint.files import Source, Weights, find_weights, read_weights
from ovi.checkpoint.into import check_towers, check_twin, load_towers, load_twin, towers_in, wanted_towers
from ovi.checkpoint.names import from_reference, to_our_name, to_published_name, to_reference
from ovi.checkpoint.published import PUBLISHED_FACTOR, differences, rope_factor
from ovi.checkpoint.reference import WHOLE, load_reference, save_reference
from ovi.checkpoint.republish import republish
from ovi.checkpoint.sizes import HEAD_DIM, stored_clock, stored_config
from ovi.checkpoint.skeleton import without_storage
from ovi.checkpoint.write import write_weights, written_under

__all__ = [
    "HEAD_DIM",
    "PUBLISHED_FACTOR",
    "WHOLE",
    "Source",
    "Weights",
    "check_towers",
    "check_twin",
    "differences",
    "find_weights",
    "from_reference",
    "load_reference",
    "load_towers",
    "load_twin",
    "read_weights",
    "republish",
    "rope_factor",
    "save_reference",
    "stored_clock",
    "stored_config",
    "to_our_name",
    "to_published_name",
    "to_reference",
    "towers_in",
    "wanted_towers",
    "without_storage",
    "write_weights",
    "written_under",
]
