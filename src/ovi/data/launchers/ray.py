"""Units done by the actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
import pickle
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ovi.data.encode_folder import EncodeFolder
from ovi.data.launchers.base import LAUNCHERS, LOOK_S, Launcher, Report, Unit, Worker, num_done, num_in_all
from ovi.data.reading.remote import is_remote
from ovi.data.shard_worker import ShardWorker
from ovi.data.waiting import pause
from ovi.errors import OviError

_BLOCKS = 4096
"""The most pieces that Ray Data keeps apart: units beyond that share one, and a retry looks which are done."""


@LAUNCHERS.register("ray")
class Ray(Launcher):
    """Actors of a Ray cluster, which hold the codecs and are handed units by Ray Data; this process leads.

    An actor that dies is started again, and the unit it had is done again; finished ones are not. Folders that are no
    URL must be there on every machine of the cluster.

    Args:
        address: of a running cluster, or "auto"; None starts one on this machine, and ends it.
        num_actors: processes that work; None takes as many as the cluster holds.
        num_cpus: processors that each is given; torch uses as many threads.
        num_gpus: GPUs that each is given; fractions share one.
        device: where each encodes, such as "cuda"; None is the processor.
        max_tries: of one unit whose actors are killed, before the run is given up.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        num_actors: int | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        device: str | None = None,
        max_tries: int = 4,
    ) -> None:
        if num_actors is not None and num_actors < 1:
            raise OviError(f"launcher.num_actors must be at least 1, got {num_actors}")
        if num_cpus <= 0 or num_gpus < 0:
            raise OviError(f"launcher.num_cpus must be above 0 and num_gpus at least 0, got {num_cpus} and {num_gpus}")
        self.address, self.num_actors, self.device = address, num_actors, device
        self.num_cpus, self.num_gpus, self.max_tries = num_cpus, num_gpus, max_tries
        self._started = False

    def __enter__(self) -> Ray:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise OviError(f"launcher=ray needs Ray Data ({error}); install ovi with the extra ray") from None
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            if self.address is None:
                # Units are small: what Ray keeps by default for passing data on would take a third of the memory.
                quiet |= {"include_dashboard": False, "object_store_memory": 2**28}
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise OviError(
                    f"launcher.address={self.address}: Ray cannot be reached or started ({error}); null starts a "
                    f"cluster on this machine"
                ) from error
            self._started = True
        ray.data.DataContext.get_current().enable_progress_bars = False  # ours says more
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def __call__(
        self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker, begins_at: float, report: Report
    ) -> int:
        total, num_new, waits_since = num_in_all(units), 0, time.monotonic()
        while True:
            finished = folder.finished()
            left = [name for name in units if name not in finished]
            if not left:
                return num_new
            base, looked = num_done(units, finished), time.monotonic()
            if base:
                report(base, total)
            mine = [name for name in left if folder.claims.take(name)]
            finished = folder.finished()
            for name in [name for name in mine if name in finished]:
                folder.claims.give_back(name)
                mine.remove(name)
            if not mine:
                pause(waits_since, folder.storage.poll_s)
                continue
            count = 0
            for name in self._done(folder, {name: units[name] for name in mine}, worker):
                folder.claims.give_back(name)
                num_new, count = num_new + len(units[name]), count + len(units[name])
                if time.monotonic() - looked > LOOK_S:
                    base, count, looked = num_done(units, folder.finished()), 0, time.monotonic()
                report(min(base + count, total), total)
            waits_since = time.monotonic()

    def _done(self, folder: EncodeFolder, units: Mapping[str, Unit], worker: Worker) -> Iterator[str]:
        import ray

        rows = [{"unit": name, "work": pickle.dumps(unit)} for name, unit in units.items()]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
            EncodeUnits,
            batch_size=1,
            fn_constructor_args=(
                pickle.dumps(worker),
                _everywhere(folder.location),
                os.getcwd(),
                self.device,
                self.max_tries,
                uuid.uuid4().hex,
                folder.scratch,
            ),
            compute=ray.data.ActorPoolStrategy(
                size=min(self._num_actors(ray.cluster_resources()), len(rows)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus or None,
        )
        # Ray Data starts an actor that died again, and gives it its unit again, without end.
        for row in dataset.iter_rows():
            if row["error"]:
                raise OviError(str(row["error"]))
            yield str(row["unit"])

    def _num_actors(self, resources: Mapping[str, Any]) -> int:
        """As many as fit, unless a number is set."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        room = min(int(float(resources.get(kind, 0)) / need) for kind, need in wanted.items() if need)
        if room < 1:
            has = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in wanted)
            raise OviError(
                f"no actor of launcher.num_cpus={self.num_cpus:g} and num_gpus={self.num_gpus:g} fits the cluster, "
                f"which has {has}"
            )
        return min(room, self.num_actors or room)


class EncodeUnits:
    """What an actor holds: a worker, built once, and the folder it writes to.

    Args:
        worker: pickled.
        location: of the folder.
        directory: that paths of the source start from.
        device: where to compute.
        max_tries: of one unit; the last of those that end with this process killed says so.
        run: what tells this run's tries from those of others.
        scratch: folder for what is uploaded; None takes the system's for temporary files.
    """

    def __init__(
        self,
        worker: bytes,
        location: str,
        directory: str,
        device: str | None,
        max_tries: int,
        run: str,
        scratch: str | None,
    ) -> None:
        import torch

        self.trouble, self.max_tries, self.run = "", max_tries, run
        try:
            os.chdir(directory)
        except OSError:
            self.trouble = (
                f"{directory}: this run's working folder is not there on {os.uname().nodename}; Ray's machines must "
                f"share it, or start from a folder that all of them have"
            )
        if num_threads := _num_threads():
            torch.set_num_threads(num_threads)
        self.worker: Worker = pickle.loads(worker)
        self.worker.to(device)
        if isinstance(self.worker, ShardWorker):
            self.worker.num_workers = 0  # actors are the processes
        self.folder = EncodeFolder(location, scratch=scratch)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        """Do units that have no record yet."""
        names = [str(name) for name in batch["unit"]]
        errors = [self.trouble or self._do(name, bytes(work)) for name, work in zip(names, batch["work"])]
        return {"unit": names, "error": errors}

    def _do(self, name: str, work: bytes) -> str:
        """Do a unit; returns what is to be said to the user, for whom a stack of Ray's would bury it."""
        if self.folder.record(name) is not None:
            return ""
        note = f"tries-{name}"
        before = self.folder.record(note) or {}
        tries = before["tries"] if before.get("run") == self.run else 0
        if tries == self.max_tries:
            return (
                f"{name}: the actor that worked on it was killed {tries} times, most likely for want of memory: give "
                f"each more by a lower launcher.num_actors, then run the same command again to continue"
            )
        self.folder.finish(note, {"run": self.run, "tries": tries + 1})
        try:
            for _ in self.worker(self.folder, [(name, pickle.loads(work))], lambda: None):
                pass
        except OviError as error:
            return str(error) or type(error).__name__
        finally:
            # An actor ends at some time after its last unit: the process that leads could not remove what it holds.
            self.worker.release()
        self.folder.forget(note)
        return ""


def _num_threads() -> int:
    """Processors that Ray has given this actor."""
    import ray

    return int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))


def _everywhere(location: str) -> str:
    return location if is_remote(location) else str(Path(location).absolute())


__all__ = ["EncodeUnits", "Ray"]
