"""A plan's units over many machines that share a folder: claims for job arrays, or Ray.

    claims = Claims(folder, num_tasks=8, task_index=3)      # a Slurm array: any task can finish another's work
    for task, record in run_on_ray(job, tasks, address="auto"): ...

Neither decides anything about the result: a unit's bytes depend on the plan alone, so a unit that two tasks do because a
claim looked dead, or that Ray runs again after losing a node, is renamed in twice with the same bytes.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config import UserError
from process_pool import Job
from text_sources import Unit

STALE_CLAIM_S = 300.0  # a claim is touched with every batch of text; one this old has lost its owner


class Claims:
    """Files unit_00012.claim in the shared folder that keep tasks from doing the same unit at once."""

    def __init__(self, folder: Path, *, num_tasks: int, task_index: int, stale_s: float = STALE_CLAIM_S):
        self.folder, self.num_tasks, self.task_index, self.stale_s = folder, num_tasks, task_index, stale_s
        self._owner = f"{socket.gethostname()}-{os.getpid()}"

    def order(self, units: list[Unit]) -> list[Unit]:
        """This task's own share first, then everyone else's."""
        mine = [unit for unit in units if unit.index % self.num_tasks == self.task_index]
        return mine + [unit for unit in units if unit.index % self.num_tasks != self.task_index]

    def take(self, unit: Unit) -> bool:
        """Whether this task may do the unit: nobody claims it, or whoever did has not touched the claim for long."""
        try:
            descriptor = os.open(self._path(unit), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            try:
                age = self._now() - self._path(unit).stat().st_mtime
            except FileNotFoundError:
                return False  # just released, so just finished
            if age < self.stale_s:
                return False
            self.touch(unit)
            return True
        os.write(descriptor, self._owner.encode())
        os.close(descriptor)
        return True

    def touch(self, unit: Unit) -> None:
        self._path(unit).touch()

    def release(self, unit: Unit) -> None:
        self._path(unit).unlink(missing_ok=True)

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"unit_{unit.index:05d}.claim"

    def _now(self) -> float:
        """The file server's clock, which dates the claims; this machine's may differ."""
        probe = self.folder / f"clock.{self._owner}.tmp"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


@functools.lru_cache(maxsize=1)
def _started(job: Job) -> Any:
    """The job's state in this Ray worker; workers are used again, so it is loaded once."""
    return job.start(lambda **counts: None)


def _work(job: Job, task: Any) -> Any:
    return job.work(_started(job), task, lambda **counts: None)


def run_on_ray(job: Job, tasks: Iterable, *, address: str) -> Iterator[tuple[Any, Any]]:
    """Do the tasks on a Ray cluster; yields (task, result) as they are done. The counterpart of `process_pool.run`.

    Ray schedules one task per free core, and runs those of a lost node again. `address` is a cluster's, "auto" for the
    one that this machine belongs to, or "local" to start one here. Every node needs this folder of scripts, the tokenizer
    and the output folder at the same paths. Raises UserError if ray is not installed, the cluster cannot be reached, or
    with a task's own sentence.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray: --ray was given but ray is not installed; pip install ray==2.60.0") from None
    try:
        here = str(Path(__file__).resolve().parent)
        ray.init(
            address=address,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
            log_to_driver=False,
            logging_level="error",
            ignore_reinit_error=True,
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"ray: no cluster at {address!r} ({str(error).splitlines()[0]}); start one or check --ray"
        ) from None
    try:
        work = ray.remote(num_cpus=1, max_retries=-1)(_work)
        shared_job = ray.put(job)
        waiting: dict[Any, Any] = {}
        remaining = iter(tasks)
        while True:
            # a few more than can run, so that no core waits for this loop, and no more, so that --max_tokens can end it
            room = 2 + int(ray.cluster_resources().get("CPU", 1)) - len(waiting)
            for _, task in zip(range(room), remaining, strict=False):
                waiting[work.remote(shared_job, task)] = task
            if not waiting:
                return
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from None
                raise
            yield waiting.pop(done), result
    finally:
        ray.shutdown()
