"""Runs of the real trainer on two CPU ranks, watched and killed from outside: the fault campaign's hands.

    setup = Setup.prepare(work)                            # tiny model, token shards, the options of every run
    run = launch(setup, output)                            # accelerate launch train_continual_2m.py, as a user does
    run = Forks(setup).start(output)                       # the same two ranks without the launcher and the imports
    run.wait_for(lambda beat: beat["phase"] == "backward", rank=1)
    run.kill(1); run.finish()

Where a rank is, is read from the heartbeat that its own watchdog keeps in OUTPUT_DIR/.heartbeats: nothing is added to the
trainer. After a SIGKILL the dead rank's file still says what its main thread did last.

`Forks`: a start through `accelerate launch` takes about 10 s here, 7 of them imports and the check of DeepSpeed's C++ op.
One process that has done both forks the ranks and gives each the environment that a real launch was seen to give (asked of
`accelerate launch` once). It has one thread when it forks (checked), no process group and no gloo yet. When a rank dies it does what torch's launcher does: SIGTERM to the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import launched  # noqa: E402

# before numpy and torch are imported: with one thread each, neither starts any, and a fork is safe
os.environ.update({key: launched.environment()[key] for key in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")})

POLL_S = 0.001
RANKS = 2


class Unexpected(Exception):
    """What was seen is not what was promised; the text says what was seen."""


# ---------------------------------------------------------------------------- what is run


@dataclass
class Setup:
    """A tiny model and its data in `work`, and the trainer options that every run has."""

    work: Path
    steps: int
    curriculum: str
    extra: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, work: Path, *, steps: int) -> Setup:
        import tiny

        work.mkdir(parents=True, exist_ok=True)
        tiny.write_tokens(work / "tokens", documents=60)  # so few that the run reads the second shard, too
        (work / "model.json").write_text(json.dumps(tiny.CONFIG))
        cls._own_extensions(work / "extensions")
        return cls(work, steps, f"0:64,{steps // 3}:96,{2 * steps // 3}:128")

    @staticmethod
    def _own_extensions(folder: Path) -> None:
        """A copy of torch's folder of compiled ops for these runs: ranks are killed while they load them."""
        from torch.utils.cpp_extension import _get_build_directory

        theirs = Path(_get_build_directory("cpu_adam", verbose=False)).parent
        shutil.copytree(theirs, folder, ignore=shutil.ignore_patterns("lock", ".ninja_lock"), dirs_exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)

    def options(self, output: Path, *extra: str, data: Path | None = None, curriculum: str | None = None) -> list[str]:
        return [
            *("--data_dir", str(data or self.work / "tokens"), "--output_dir", str(output)),
            *("--model_config", str(self.work / "model.json"), "--deepspeed", launched.DEEPSPEED),
            *("--curriculum", curriculum or self.curriculum, "--num_train_steps", str(self.steps)),
            *("--learning_rate", "1e-3", "--warmup_steps", "2", "--gradient_accumulation_steps", "2"),
            *("--save_steps", "2", "--save_total_limit", "3"),
            *("--segment_tokens", "32", "--token_tile", "48", "--heads_per_group", "1", *self.extra, *extra),
        ]


# ---------------------------------------------------------------------------- runs


@dataclass
class Run:
    """One start of the trainer. `codes` holds the exit code of each rank that is known (the launcher's as rank -1)."""

    output: Path
    log: Path
    started: float
    how: str
    pids: dict[int, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    known: set[str] = field(default_factory=set)
    first_end: float | None = None  # when the first rank had ended
    after_first_s: float = 0.0  # and how long the others took after it

    def heartbeat(self, rank: int) -> dict | None:
        """What this start's `rank` last said of itself; None before its watchdog began."""
        for folder in self._heartbeats():
            with contextlib.suppress(OSError, ValueError):
                return json.loads((folder / f"rank-{rank}").read_text())
        return None

    def _heartbeats(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return [path for path in (self.output / ".heartbeats").iterdir() if path.name not in self.known]
        return []

    def poll(self) -> bool:
        """Whether all of it has ended; collects exit codes."""
        if self.process:
            if self.process.poll() is not None:
                self.codes[-1] = self.process.returncode
            return -1 in self.codes
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def rank_pid(self, rank: int, *, timeout_s: float = 60.0) -> int | None:
        """The process of a rank; None if the run ended first."""
        if self.process and rank not in self.pids:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline and not self.poll():
                self.pids |= _ranks_below(self.process.pid)
                if rank in self.pids:
                    break
                time.sleep(0.01)
        return self.pids.get(rank)

    def wait_until(self, seen, *, timeout_s: float = 90.0) -> bool:
        """Poll until `seen()` is true; False if the run ended first."""
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if seen():
                return True
            if time.monotonic() > deadline:
                self.end()
                raise Unexpected(f"waited {timeout_s:.0f} s in vain; {self.said()[-1500:]}")
            time.sleep(POLL_S)
        return False

    def wait_for(self, wanted, *, rank: int, timeout_s: float = 90.0) -> bool:
        """Poll until `wanted(heartbeat)` is true of the rank's heartbeat; False if the run ended first."""
        return self.wait_until(lambda: (beat := self.heartbeat(rank)) and wanted(beat), timeout_s=timeout_s)

    def send(self, rank: int, number: int) -> bool:
        """Send a signal to a rank; False if it was gone already."""
        pid = self.rank_pid(rank)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def finish(self, *, timeout_s: float = 180.0) -> float:
        """Wait until everything has ended; seconds it took. As torch's launcher: once a rank has failed, SIGTERM the rest."""
        begun = time.monotonic()
        told = False
        while not self.poll():
            if self.codes and self.first_end is None:
                self.first_end = time.monotonic()
            if not self.process and not told and any(code != 0 for code in self.codes.values()):
                time.sleep(0.1)  # torch's launcher looks as often
                for rank in self.pids.keys() - self.codes.keys():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.pids[rank], signal.SIGTERM)
                told = True
            if time.monotonic() - begun > timeout_s:
                self.end()
                raise Unexpected(f"still running after {timeout_s:.0f} s; {self.said()[-1500:]}")
            time.sleep(0.005)
        self.after_first_s = time.monotonic() - (self.first_end or time.monotonic())
        return time.monotonic() - begun

    def end(self) -> None:
        """Kill what is left of this run (only its own processes)."""
        if self.process:
            for pid in (*_ranks_below(self.process.pid).values(), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        for rank in self.pids.keys() - self.codes.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
        while not self.poll():
            time.sleep(0.01)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def succeeded(self) -> bool:
        return bool(self.codes) and all(code == 0 for code in self.codes.values())


def _ranks_below(pid: int) -> dict[int, int]:
    """rank -> process id of the trainer's processes below a launcher, from their environment."""
    found, waiting = {}, [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                for child in map(int, (task / "children").read_text().split()):
                    waiting.append(child)
                    values = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                    rank = next((v[5:] for v in values if v.startswith(b"RANK=")), None)
                    words = Path(f"/proc/{child}/cmdline").read_bytes()
                    if rank is not None and b".py\0" in words and b"accelerate.commands" not in words:
                        found.setdefault(int(rank), child)
    return found


def _known_heartbeats(output: Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {path.name for path in (output / ".heartbeats").iterdir()}
    return set()


def launch(setup: Setup, output: Path, *extra: str, script: str = "train_continual_2m.py", **options) -> Run:
    """Start through `accelerate launch`; stdout and stderr go to a file beside `output`."""
    log = output.with_name(f"{output.name}.log")
    run = Run(output, log, time.monotonic(), "accelerate launch", known=_known_heartbeats(output))
    words = launched.command(script, *setup.options(output, *extra, **options), ranks=RANKS)
    with open(log, "w") as file:
        run.process = subprocess.Popen(
            words, cwd=ROOT, env=launched.environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return run


# ---------------------------------------------------------------------------- forked ranks

SHOW_ENVIRONMENT = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))"


def wait_until_alone() -> None:
    """Until this process has one thread, since a fork would lose the others' locks: a joined one takes a moment to be gone."""
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) == 1:
            return
        time.sleep(0.001)
    raise RuntimeError(f"this process cannot fork ranks, it has threads: {threading.enumerate()}")


class Forks:
    """Starts ranks by fork from this process, which imports torch, DeepSpeed and the trainer once."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.environment = self._ask_launcher()
        os.environ.update(launched.environment())
        import deepspeed.ops.adam  # noqa: F401
        import transformers.models.kimi_linear.modeling_kimi_linear  # noqa: F401

        import checkpointing  # noqa: F401
        import compiled_ops
        import kimi_model  # noqa: F401
        import train_continual_2m  # noqa: F401

        compiled_ops.load_cpu_ops(lambda text: None)

    def _ask_launcher(self) -> dict[int, dict[str, str]]:
        """The environment that `accelerate launch` gives each rank."""
        script, target = self.setup.work / "environment.py", self.setup.work / "environment-rank"
        script.write_text(SHOW_ENVIRONMENT)
        words = launched.command(str(script), str(target), ranks=RANKS)
        subprocess.run(words, cwd=ROOT, env=launched.environment(), check=True, capture_output=True, timeout=120)
        return {rank: json.loads(Path(f"{target}{rank}").read_text()) for rank in range(RANKS)}

    def start(self, output: Path, *extra: str, **options) -> Run:
        return self.start_with(output, self.setup.options(output, *extra, **options))

    def start_with(self, output: Path, words: list[str], environment: dict[str, str] | None = None) -> Run:
        """Fork the ranks of a run with these options; stdout and stderr go to a file beside `output`. `environment` is
        what the launcher would have given besides."""
        wait_until_alone()
        log = output.with_name(f"{output.name}.log")
        run = Run(output, log, time.monotonic(), "forked", known=_known_heartbeats(output))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log.write_text("")
        sys.stdout.flush()
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                self._become_rank(
                    {**self.environment[rank], **(environment or {})}, port, log, words
                )  # does not return
            run.pids[rank] = pid
        return run

    def _become_rank(self, environment: dict[str, str], port: int, log: Path, words: list[str]) -> None:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.chdir(ROOT)
        os.environ.clear()
        os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        # no torchrun, no store of its own to join
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        sys.argv = ["train_continual_2m.py", *words]
        import train_continual_2m
        from config import run_main

        code = 1
        try:
            run_main(train_continual_2m.main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        # an interpreter's own end, without unwinding the campaign's stack that this process has a copy of
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------------- what a run left behind


def folder_content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without the heartbeats (they are no result)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".heartbeats" not in path.parts
    }


def complete_checkpoints(output: Path) -> dict[str, str]:
    """Name -> SHA-256 list of the checkpoints of a run that verify in full."""
    import checkpointing

    found = {}
    for path in checkpointing.list_checkpoints(output):
        if checkpointing.incomplete_reason(path, checksums=True) is None:
            with contextlib.suppress(OSError):
                found[path.name] = (path / "files.json").read_text()
    return found


def listed(output: Path) -> set[str]:
    """Names of the checkpoints that have their final name now."""
    return {path.parent.name for path in output.glob("checkpoint-step*/files.json")}


def limit_memory(pid: int, extra_bytes: int) -> None:
    """Let a process grow by `extra_bytes` of address space and no more."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (size + extra_bytes, size + extra_bytes))


def generator(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed}/{name}")
