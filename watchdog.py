"""Ends the run on every rank when one of them dies or hangs, and says which, where and since when.

    with Watchdog(output_dir, rank=0, world_size=2, name=name, limits=limits) as watchdog:
        watchdog.enter("forward", step=7, micro_step=0)      # before each phase; a write of 512 bytes

Each rank has a daemon thread. Every BEAT_S it writes the rank's heartbeat (a count, phase, step) to
OUTPUT_DIR/.heartbeats/NAME/rank-N and reads the others'. All it needs is the file system that the ranks share anyway:
it works when rank 0 is the one that hangs, and inside collectives that never return. What ends a run:

  a rank is dead         its process is gone and had not said goodbye       seen within BEAT_S (at once on the SIGTERM
                                                                            that torch's launcher then sends)
  a rank raised          its exception is passed on                         FAILED_GRACE_S, for ranks that fail together
  a rank is stopped      SIGSTOP, a frozen or lost machine: no heartbeat    `limits.silence_s`, 60 s
  a rank hangs           its phase takes longer than its limit              `limits.seconds(phase)`

Whoever sees it first writes the reason to one file, to stderr and to log.txt; every rank then dumps the stacks of all its
threads into OUTPUT_DIR/hang-NAME-rankN.txt and exits with code 4. A rank on this machine that does not come along (stopped,
or holding the interpreter lock) is woken for its stacks with SIGCONT and SIGQUIT and then killed. All are gone ABORT_S after
the sentence. `kill -QUIT PID` dumps a rank's stacks into .heartbeats at any time and lets it go on.

Which rank hangs: every rank enters the same phases in the same order, so the one with the fewest entered is what the others
wait for. Where all have entered as many, all are named: a collective that never returns.

Limits: a call may hold the interpreter lock for as long as its phase's limit on this machine, for `silence_s` on another.
Heartbeat files that cannot be written (a file system away for longer than `silence_s`) end the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from config import mask_secrets

EXIT_CODE = 4
BEAT_S = 2.0
FAILED_GRACE_S = 5.0
ABORT_S = 6.0
RECORD_BYTES = 512  # of a fixed size and written in place: a heartbeat needs no free disk and is never seen in half
FOLDER = ".heartbeats"
RUNNING, FAILED, DONE = "running", "failed", "done"


@dataclass(frozen=True)
class Limits:
    """How long each phase may take, in seconds, and how long a rank may give no sign."""

    start_s: float
    micro_step_s: float
    first_step_s: float
    save_s: float
    silence_s: float = 60.0
    other_s: float = 600.0

    def seconds(self, phase: str, *, first: bool = False) -> float:
        """Limit of a phase; `first`: of the first step at a length, in which kernels are compiled and tuned."""
        if phase in ("data", "forward", "backward", "optimizer"):
            return self.first_step_s if first else self.micro_step_s
        return {"start": self.start_s, "save": self.save_s}.get(phase, self.other_s)

    @property
    def collective_s(self) -> float:
        """Timeout for the process group: longer than any phase, so that this watchdog speaks first."""
        return 2 * max(self.start_s, self.micro_step_s, self.first_step_s, self.save_s, self.other_s) + 600


def derive_limits(*, micro_step_seconds: float | None, checkpoint_bytes: int, hang_timeout_s: float) -> Limits:
    """Limits from the planner's seconds of one micro-step at the longest length (None where no speed is known).

    Ten times the prediction plus ten minutes, half an hour without one; half an hour more for the first step of a length.
    Loading and saving: ten minutes plus the checkpoint's bytes at 50 MB/s, and an hour for the start. `hang_timeout_s` > 0
    replaces the limits of the training phases, and of silence if it is shorter.
    """
    disk_s = 600 + checkpoint_bytes / 50e6
    if hang_timeout_s > 0:
        silence_s = min(60.0, hang_timeout_s)
        return Limits(3600 + disk_s, hang_timeout_s, hang_timeout_s, disk_s, silence_s, min(600.0, hang_timeout_s))
    micro_step_s = 600 + 10 * micro_step_seconds if micro_step_seconds else 1800.0
    return Limits(3600 + disk_s, micro_step_s, micro_step_s + 1800, disk_s)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself. `entered` counts the phases entered; `birth` tells a process from a later one's pid."""

    rank: int
    host: str
    pid: int
    birth: int
    beat: int
    entered: int
    phase: str
    step: int | None
    micro_step: int | None
    limit_s: float
    state: str
    reason: str = ""

    def to_bytes(self) -> bytes:
        reason = self.reason
        while len(text := json.dumps({**self.__dict__, "reason": reason})) > RECORD_BYTES:
            reason = reason[: len(reason) * 3 // 4]
        return text.ljust(RECORD_BYTES).encode()

    @property
    def who(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        at = "" if self.step is None else f" of step {self.step}"
        return f"{self.phase}{at}" + ("" if self.micro_step is None else f", micro-step {self.micro_step}")


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The heartbeat in a file; None where there is none yet, or none that can be read."""
    try:
        return Heartbeat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def process_state(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in clock ticks since boot) of a process of this machine; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


class Watchdog:
    """One rank's watchdog. `name` must be the same on all ranks and new for each start of the run.

    Use as a context manager: leaving it by an exception tells the other ranks. Make it in the main thread.
    """

    def __init__(self, output_dir: str | Path, *, rank: int, world_size: int, name: str, limits: Limits):
        self.output_dir, self.name, self.limits = Path(output_dir), name, limits
        self.rank, self.world_size = rank, world_size
        self.folder = self.output_dir / FOLDER / name
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _remove_old(self.folder.parent, keep=name)
        self._host, self._pid = os.uname().nodename, os.getpid()
        self._birth = process_state(self._pid)[1]
        self._beats = self._entered = 0
        self._state, self._reason = RUNNING, ""
        self._phase = ("start", None, None, limits.seconds("start"), time.monotonic())
        self._file = os.open(self._path(rank), os.O_RDWR | os.O_CREAT)
        self._stacks = open(self.folder / f"stacks-{rank}.txt", "w")  # noqa: SIM115
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True)
        # A signal's Python handler waits for the main thread, which may sit in a collective; this pipe does not
        self._wake, writer = socket.socketpair()
        self._wake.setblocking(False)
        writer.setblocking(False)
        self._writer = writer
        self._old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._terminating = self._aborting = False
        # rank -> (beats last seen, when by this rank's clock), and rank -> when its failure was seen
        self._seen: dict[int, tuple[int, float]] = {}
        self._failed_at: dict[int, float] = {}
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    # --- what the trainer calls

    def enter(self, phase: str, *, step: int | None = None, micro_step: int | None = None, first: bool = False) -> None:
        """This rank begins a phase. Every rank must enter the same phases in the same order."""
        self._phase = (phase, step, micro_step, self.limits.seconds(phase, first=first), time.monotonic())
        self._entered += 1
        self._write()

    def close(self) -> None:
        """Say goodbye and stop watching."""
        self._state = DONE
        self._stop()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._aborting:  # a peer that is being ended breaks this rank's collective: the exit code is the watchdog's
            self._thread.join(2 * ABORT_S)
        if error is None:
            self.close()
        elif self._state == RUNNING:
            # The thread goes on for as long as the interpreter does: leaving may hang, too
            first_line = (mask_secrets(str(error)).splitlines() or [""])[0]
            self._state, self._reason = FAILED, f"{kind.__name__}: {first_line}"
            self._phase = ("exit after an error", *self._phase[1:3], self.limits.seconds("exit"), time.monotonic())
            self._write()

    def _stop(self) -> None:
        self._closed.set()
        self._write()
        signal.set_wakeup_fd(self._old_wakeup)
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")
        self._thread.join(timeout=2 * BEAT_S)
        faulthandler.unregister(signal.SIGQUIT)

    # --- heartbeat

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"

    def _mine(self) -> Heartbeat:
        phase, step, micro_step, limit_s, _ = self._phase
        return Heartbeat(
            rank=self.rank,
            host=self._host,
            pid=self._pid,
            birth=self._birth,
            beat=self._beats,
            entered=self._entered,
            phase=phase,
            step=step,
            micro_step=micro_step,
            limit_s=limit_s,
            state=self._state,
            reason=self._reason,
        )

    def _write(self) -> None:
        # A full disk or a lost server is for the saves to report; the others see the silence
        with contextlib.suppress(OSError):
            os.pwrite(self._file, self._mine().to_bytes(), 0)

    # --- the thread

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._sleep(BEAT_S)
                self._beats += 1
                self._write()
                reason = self._abort_reason() or self._look()
                if reason and not self._closed.is_set():
                    self._abort(reason)
            except Exception:  # a watchdog that dies silently is worse than none
                _to_stderr(f"watchdog of rank {self.rank}: this look failed, the next one follows\n")
                _to_stderr(traceback.format_exc())

    def _sleep(self, seconds: float) -> None:
        ready, _, _ = select.select([self._wake], [], [], seconds)
        if ready:
            with contextlib.suppress(BlockingIOError):
                self._terminating |= signal.SIGTERM in self._wake.recv(4096)

    def _look(self) -> str | None:
        """Why the run must end, or None."""
        now = time.monotonic()
        phase, _, _, limit_s, entered_at = self._phase
        if self._state == FAILED:  # this rank is on its way out with an exit code of its own
            return f"{self._mine().who} hangs in {phase}: {self._reason}" if now - entered_at > limit_s else None
        peers = {r: read_heartbeat(self._path(r)) for r in range(self.world_size) if r != self.rank}
        for rank, peer in peers.items():
            beats = peer.beat if peer else -1
            if rank not in self._seen or self._seen[rank][0] != beats:
                self._seen[rank] = (beats, now)
            reason = self._judge(rank, peer, now) if not peer or peer.state != DONE else None
            if reason:
                return reason
        if now - entered_at > limit_s:
            silent = [p for r, p in peers.items() if p and p.state == RUNNING and now - self._seen[r][1] > 3 * BEAT_S]
            if silent:
                return f"{silent[0].who} has given no sign for {now - self._seen[silent[0].rank][1]:.0f} s; last phase: {silent[0].where}"
            return _overdue([self._mine(), *(p for p in peers.values() if p and p.state == RUNNING)], limit_s, phase)
        return None

    def _judge(self, rank: int, peer: Heartbeat | None, now: float) -> str | None:
        """Why another rank ends the run, or None."""
        silent_s = now - self._seen[rank][1]
        if peer is None:
            return f"rank {rank} has given no sign for {silent_s:.0f} s" if silent_s > self.limits.start_s else None
        here = peer.host == self._host
        process = process_state(peer.pid) if here else None
        gone = here and (process is None or process[1] != peer.birth or process[0] in "ZX")
        last = f"last phase: {peer.where}"
        if peer.state == FAILED:
            since = self._failed_at.setdefault(rank, now)
            if gone or self._terminating or now - since > FAILED_GRACE_S:
                return f"{peer.who} raised {peer.reason}; {last}"
            return None
        if gone:
            return f"{peer.who} is dead (killed, or crashed: see its own last lines); {last}"
        if silent_s > self.limits.silence_s:
            if here and process[0] in "Tt":
                return f"{peer.who} has been stopped for {silent_s:.0f} s (state {process[0]}); {last}"
            # A living process of this machine may hold the interpreter lock in one long call
            if not here or silent_s > peer.limit_s:
                return f"{peer.who} has given no sign for {silent_s:.0f} s; {last}"
        return None

    # --- the end

    def _abort_reason(self) -> str | None:
        try:
            return (self.folder / "abort").read_text()
        except OSError:
            return None

    def _abort(self, reason: str) -> None:
        """Agree on one reason, dump this rank's stacks, see to it that ranks of this machine end, and exit."""
        self._aborting = True
        try:
            first = self._claim(reason)
            path = self.output_dir / f"hang-{self.name}-rank{self.rank}.txt"
            with open(path, "w") as file:
                file.write(f"{reason}\n\nstacks of {self._mine().who}, in {self._mine().where}:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if first:
                self._end_the_others(time.monotonic() + ABORT_S)
        finally:
            os._exit(EXIT_CODE)

    def _claim(self, reason: str) -> bool:
        """Write the reason where all ranks look; True for the rank whose reason it is. That one says it aloud."""
        draft = self.folder / f"abort-by-{self.rank}"
        draft.write_text(reason)
        try:
            os.link(draft, self.folder / "abort")  # atomic: the first one wins, nobody reads half a reason
        except FileExistsError:
            return False
        text = (
            f"ERROR: {reason}; all ranks end with exit code {EXIT_CODE}, "
            f"stacks in {self.output_dir}/hang-{self.name}-rank*.txt"
        )
        _to_stderr(text + "\n")
        with contextlib.suppress(OSError), open(self.output_dir / "log.txt", "a") as log:
            log.write(text + "\n")
        return True

    def _end_the_others(self, deadline: float) -> None:
        """Wait for the ranks of this machine to go; wake and then kill those that do not."""
        beats = [read_heartbeat(self._path(r)) for r in range(self.world_size) if r != self.rank]
        here = [beat for beat in beats if beat and beat.host == self._host]
        remaining = [beat for beat in here if _alive(beat)]
        patience = deadline - ABORT_S / 2
        woken = False
        while remaining and time.monotonic() < deadline:
            if not woken and (time.monotonic() > patience or all(process_state(b.pid)[0] in "Tt" for b in remaining)):
                woken = True
                for beat in remaining:
                    for number in (signal.SIGQUIT, signal.SIGCONT):  # dumped before anything else goes on
                        with contextlib.suppress(OSError):
                            os.kill(beat.pid, number)
            time.sleep(0.1)
            remaining = [beat for beat in remaining if _alive(beat)]
        for beat in remaining:
            with contextlib.suppress(OSError):
                os.kill(beat.pid, signal.SIGKILL)
        for beat in here:
            dump, path = (
                self.folder / f"stacks-{beat.rank}.txt",
                self.output_dir / f"hang-{self.name}-rank{beat.rank}.txt",
            )
            if not path.exists() and dump.exists() and dump.stat().st_size:
                shutil.copyfile(dump, path)


def _alive(beat: Heartbeat) -> bool:
    process = process_state(beat.pid)
    return process is not None and process[1] == beat.birth and process[0] not in "ZX"


def _overdue(beats: list[Heartbeat], limit_s: float, phase: str) -> str:
    """The sentence for a phase that takes too long: who is behind, or all of them."""
    slowest = min(beat.entered for beat in beats)
    behind = sorted((beat for beat in beats if beat.entered == slowest), key=lambda beat: beat.rank)
    last = f"last phase: {behind[0].where}"
    if len(behind) < len(beats):
        who = ", ".join(beat.who for beat in behind)
        return f"{who} hangs: the others have waited in {phase!r} for more than {limit_s:.0f} s; {last}"
    everyone = ", ".join(f"rank {beat.rank}" for beat in behind)
    return (
        f"{everyone}: {phase!r} takes more than its limit of {limit_s:.0f} s (a collective that never returns, or a phase "
        f"slower than planned: raise --hang_timeout_minutes); {last}"
    )


def _remove_old(folder: Path, *, keep: str) -> None:
    """Heartbeats of earlier starts are of no use to anyone."""
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _to_stderr(text: str) -> None:
    """Past sys.stderr's lock, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode("utf-8", "replace"))
