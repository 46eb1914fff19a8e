"""A pool of spawned processes for long pieces of work, one per core.

    for task, result in run(job, tasks, workers=2, on_progress=bar.add): ...

Why not concurrent.futures: workers here report while they work, a worker that is killed (out of memory) must be an error
that names its task and never a hang, and nothing may be forked (forking after Rust threads have run hangs).

A job is a picklable object with `start(report) -> state`, called once in each process, and
`work(state, task, report) -> result`, where report(**counts) sends progress.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from config import UserError


class Job(Protocol):
    def start(self, report: Callable[..., None]) -> Any:
        """Load what every task needs; the result is passed to `work`."""

    def work(self, state: Any, task: Any, report: Callable[..., None]) -> Any:
        """Do one task and return its result (picklable)."""


class WorkerLost(Exception):
    """A worker process ended without an answer. `task` is what it worked on, `code` its exit code (negative: signal)."""

    def __init__(self, task, code: int | None):
        super().__init__(f"the worker on {task} ended with code {code}")
        self.task, self.code = task, code


def cores() -> int:
    """Cores this process may use (a cgroup or taskset may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worker(connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        try:
            report = lambda **counts: connection.send(("progress", counts))  # noqa: E731
            state = job.start(report)
            connection.send(("ready", None))
            while (task := connection.recv()) is not None:
                connection.send(("done", job.work(state, task, report)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the parent is gone
        except UserError as error:
            connection.send(("user error", str(error)))
        except Exception:
            connection.send(("crash", traceback.format_exc()))
    except (BrokenPipeError, ConnectionResetError):
        return


def run(
    job: Job, tasks: Iterable, *, workers: int, on_progress: Callable[[Any, dict], None] = lambda task, counts: None
) -> Iterator[tuple[Any, Any]]:
    """Do the tasks in `workers` processes, handed out in order; yields (task, result) as they are done.

    `tasks` is drawn lazily, so the caller may end it early. Raises UserError with a worker's own sentence,
    RuntimeError with its traceback, or WorkerLost; the other workers are ended first. `on_progress(task, counts)` gets
    what workers report, with no task while they start.
    """
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    processes: dict[Any, multiprocessing.Process] = {}
    busy: dict[Any, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        while processes:
            for connection in multiprocessing.connection.wait(list(processes)):
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    processes[connection].join()
                    raise WorkerLost(busy.get(connection), processes[connection].exitcode) from None
                if kind == "user error":
                    raise UserError(content)
                if kind == "crash":
                    raise RuntimeError(f"a worker failed on {busy.get(connection)}:\n{content}")
                if kind == "progress":
                    on_progress(busy.get(connection), content)
                    continue
                if kind == "done":
                    yield busy.pop(connection), content
                try:
                    busy[connection] = next(waiting)
                except StopIteration:
                    connection.send(None)
                    processes.pop(connection).join()
                    connection.close()
                else:
                    try:
                        connection.send(busy[connection])
                    except (BrokenPipeError, ConnectionResetError):
                        processes[connection].join()
                        raise WorkerLost(busy[connection], processes[connection].exitcode) from None
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()
