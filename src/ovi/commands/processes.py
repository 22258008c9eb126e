"""Processes that share one command's work, as torchrun starts them, and the device each works on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ovi.errors import OviError

T = TypeVar("T")


def device_of(given: str) -> torch.device:
    """The device that a setting means; of "auto" this process's own accelerator where there is one.

    Raises:
        OviError: for a device that torch does not know, or with more processes than GPUs.
    """
    if given != "auto":
        try:
            return torch.device(given)
        except RuntimeError as error:
            raise OviError(
                f"device={given}: torch knows no such device; auto, cpu, cuda and cuda:1 are some"
            ) from error
    if torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise OviError(
                f"process {number + 1} of this machine has no GPU, there are {count}: start {count}, or device=cpu"
            )
        return torch.device("cuda", number)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # A CUDA build names CUDA as the accelerator of a machine without a GPU too.
    return found if found is not None and found.type != "cuda" else torch.device("cpu")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes) as torchrun says, joined for the time of the block."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    # Lists and counts travel on the host, a metric's sums where they lie.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def shared(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; the others wait for it.

    Raises:
        OviError: on all, when making it does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except OviError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise OviError(box[1])
    made: T = box[0]
    return made


def gathered(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Records of all processes, each once."""
    everyone = [records]
    if dist.is_available() and dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, records)
    return [dict(items) for items in dict.fromkeys(tuple(r.items()) for records in everyone for r in records)]


__all__ = ["device_of", "gathered", "joined", "shared"]
