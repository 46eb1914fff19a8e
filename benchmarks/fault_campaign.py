"""Faults on purpose: the real trainer on two CPU ranks is killed, stopped, starved and fed damaged files; what it promises
must hold each time.

    make faults                                             # everything, under 20 minutes on 2 idle cores
    python benchmarks/fault_campaign.py --short             # a few of each, as in make test
    python benchmarks/fault_campaign.py --only kills data   # some kinds

Each run is train_continual_2m.py under Accelerate and DeepSpeed ZeRO-3 with CPU offload and gloo, on a tiny Kimi-Linear
model through three lengths of a curriculum, a checkpoint every second step, three of them kept. The yardstick is one run
that nothing disturbed: every step's last accepted loss and every byte of the final checkpoint must be equal to it.

Nothing in the trainer knows of this. Kills go by the heartbeats and folders that it writes; damage is done to its files;
a full disk is a small tmpfs (skipped, and said so, where mounting is not allowed); memory runs out by RLIMIT_AS. Some of
the runs are started by `accelerate launch`, the others by fork (fault_runs.py says why and how). The NaN comes from
tests/nan_worker.py, which multiplies one rank's loss. Mutations of small files run in process (fault_mutations.py).

Every choice is drawn from --seed. One JSON line per fault goes to --log (benchmarks/results/faults.jsonl), between a line
with the environment and a summary; a table goes to stdout. Exit code 1 if anything was not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fault_mutations
import fault_runs
from fault_runs import RANKS, ROOT, Forks, Run, Setup, Unexpected, complete_checkpoints, folder_content, launch, listed
from portable_text import portable

import launched  # isort: skip  (from tests/, which fault_runs puts on the path)

STEPS = (24, 12)  # in full, in short
KEPT = 3  # --save_total_limit
LATEST = ("--resume_from_checkpoint", "latest")
IN_A_STEP = ("data", "forward", "backward", "optimizer")
PHASES = ("load", "save", *IN_A_STEP)
# How long after a phase's begin a kill comes at most: about as long as the phase takes here
DELAY_S = {"data": 0.001, "forward": 0.02, "backward": 0.02, "optimizer": 0.003, "save": 0.03}
# What a failed allocation says in Python, torch, C++, the kernel and oneDNN
OUT_OF_MEMORY = (
    "MemoryError",
    "can't allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
    "could not create a primitive",
)
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy")
# kind -> (how many in full, how many in short)
COUNTS = {
    "kills": (50, 3),
    "launched_kills": (12, 1),  # of the kills
    "signals": (10, 2),
    "launched_signals": (4, 0),
    "mutations": (200, 40),
    "mutated_starts": (12, 0),
}


class Campaign:
    """What all faults share: the work folder, the undisturbed run, the log."""

    def __init__(self, work: Path, log: Path, *, seed: int, short: bool):
        self.work, self.seed, self.short = work, seed, short
        self.setup = Setup.prepare(work, steps=STEPS[short])
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(log, "w")  # noqa: SIM115
        self.records: list[dict] = []
        self.live: list[Run] = []
        self.forks: Forks | None = None
        self.load_s = {}

    def count(self, name: str) -> int:
        return COUNTS[name][self.short]

    def draw(self, name: str):
        return fault_runs.generator(self.seed, name)

    def write(self, record: dict) -> None:
        text = portable(json.dumps(record), WORK=self.work)
        self._log.write(text + "\n")
        self._log.flush()  # a fork must not take unwritten lines with it

    def record(self, fault: str, as_promised: bool, **facts) -> None:
        record = {"fault": fault, "as_promised": as_promised, **facts}
        self.records.append(record)
        self.write(record)
        mark = "ok  " if as_promised else "FAIL"
        said = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("seen", "done"))
        print(
            f"{mark} {fault}: {facts.get('done', '')} -> {str(facts.get('seen', ''))[:200]} ({said[:160]})", flush=True
        )

    @contextlib.contextmanager
    def fault(self, name: str, **facts):
        """One fault: the block fills `facts` and raises Unexpected for what was not promised. Leaves no process behind."""
        begun = time.monotonic()
        try:
            yield facts
            as_promised = True
        except Unexpected as error:
            as_promised, facts["seen"] = False, str(error)
        finally:
            self.end_all()
        self.record(name, as_promised, **facts, seconds=round(time.monotonic() - begun, 2))

    def end_all(self) -> None:
        while self.live:
            run = self.live.pop()
            if not run.poll():
                run.end()

    def start(self, output: Path, *extra: str, by_launcher: bool = False, **options) -> Run:
        if by_launcher:
            run = launch(self.setup, output, *extra, **options)
        else:
            self.forks = self.forks or Forks(self.setup)
            run = self.forks.start(output, *extra, **options)
        self.live.append(run)
        return run

    # --- the yardstick

    def undisturbed(self) -> None:
        """The run that all others are compared with, started as a user does."""
        output = self.work / "run"
        begun = time.monotonic()
        run = self.start(output, by_launcher=True)
        run.wait_for(lambda beat: beat["phase"] in IN_A_STEP, rank=0)
        self.load_s["accelerate launch"] = time.monotonic() - begun
        run.finish()
        if not run.succeeded():
            raise SystemExit(f"the undisturbed run failed:\n{run.said()[-4000:]}")
        self.losses = launched.losses(output)
        self.final = (output / f"checkpoint-step{self.setup.steps}" / "files.json").read_text()
        begun = time.monotonic()
        with self.fault("forked ranks equal launched ones", done="an undisturbed run of forked ranks") as facts:
            run = self.start(self.work / "forked")
            begun = time.monotonic()
            run.wait_for(lambda beat: beat["phase"] in IN_A_STEP, rank=0)
            self.load_s["forked"] = time.monotonic() - begun
            run.finish()
            if not run.succeeded():
                raise Unexpected(f"exit codes {run.codes}: {last_words(run)}")
            facts["seen"] = self.same_end(run.output)

    def same_end(self, output: Path) -> str:
        """Raise Unexpected unless losses and final checkpoint are those of the undisturbed run, bit for bit."""
        if not (output / "metrics.jsonl").exists():
            raise Unexpected(f"no step was done: {output.with_name(f'{output.name}.log').read_text()[-800:]}")
        losses = launched.losses(output)
        if losses != self.losses:
            step = next((i for i, (a, b) in enumerate(zip(losses, self.losses, strict=False)) if a != b), len(losses))
            raise Unexpected(f"losses differ from step {step + 1} on (of {len(losses)})")
        complete = complete_checkpoints(output)
        final = complete.get(f"checkpoint-step{self.setup.steps}")
        if final != self.final:
            ours, theirs = json.loads(final or "{}"), json.loads(self.final)
            files = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise Unexpected(f"the final checkpoint differs in {', '.join(files)}")
        return f"{len(losses)} losses and the final checkpoint bit-equal"

    def half(self) -> Path:
        """The output folder of a run that stopped at step 8, to be copied; checkpoints of steps 4, 6 and 8."""
        output = self.work / "half"
        if not output.exists():
            run = self.start(output, "--stop_after_steps", "8")
            run.finish()
            if not run.succeeded():
                raise Unexpected(f"the run to step 8 failed: {run.said()[-1000:]}")
        return output

    def copy_of(self, folder: Path, name: str) -> Path:
        target = self.work / name
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".heartbeats")))

    def resume_to_the_end(self, output: Path) -> str:
        run = self.start(output, *LATEST)
        run.finish()
        if not run.succeeded():
            raise Unexpected(f"the resumed run ended with {run.codes}: {last_words(run)}")
        return self.same_end(output)


def last_words(run: Run) -> str:
    """The sentences of a run that failed: its own errors, else its end."""
    lines = [line for line in run.said().splitlines() if line.startswith(("error: ", "ERROR: "))]
    return " | ".join(lines[-3:]) or run.said()[-600:]


def newest_step(output: Path) -> int:
    complete = complete_checkpoints(output)
    return max((int(name.removeprefix("checkpoint-step")) for name in complete), default=0)


# ---------------------------------------------------------------------------- kills and signals


def writing(output: Path) -> dict[str, int]:
    """The folders of unfinished saves, by inode."""
    with contextlib.suppress(OSError):
        return {e.name: e.inode() for e in os.scandir(output) if e.name.startswith(".writing-checkpoint")}
    return {}


def wait_for_moment(campaign: Campaign, run: Run, draw, rank: int, phases) -> tuple[bool, str]:
    """Wait for a drawn phase and a drawn time inside it; (whether the run still goes on, the phase aimed at)."""
    aim, later_steps, fraction = draw.choice(phases), draw.randint(0, 3), draw.random()
    if aim == "load":
        run.rank_pid(rank)
        ready_at = run.started + fraction * campaign.load_s[run.how]
        return run.wait_until(lambda: time.monotonic() > ready_at), aim
    first: list[int] = []

    def in_phase(beat) -> bool:
        if beat["step"] is None:
            return False
        first.append(beat["step"])
        return beat["step"] >= first[0] + later_steps and beat["phase"] == aim

    if aim == "save":
        stale = writing(run.output)
        going_on = run.wait_until(lambda: writing(run.output).items() - stale.items())
    else:
        going_on = run.wait_for(in_phase, rank=rank)
    time.sleep(fraction * DELAY_S[aim])
    return going_on, aim


def lost_checkpoints(output: Path, before: set[str]) -> list[str]:
    """Checkpoints that were complete before and are neither complete now nor retired by newer complete ones."""
    complete = complete_checkpoints(output)
    step = lambda name: int(name.removeprefix("checkpoint-step"))  # noqa: E731
    newer = lambda name: sum(step(other) > step(name) for other in complete)  # noqa: E731
    return sorted(name for name in before if name not in complete and newer(name) < KEPT)


class Chain:
    """Runs resumed one after another in one output folder until it is finished, then the next folder."""

    def __init__(self, campaign: Campaign, name: str):
        self.campaign, self.name, self.number = campaign, name, 0

    @property
    def output(self) -> Path:
        return self.campaign.work / f"{self.name}{self.number}"

    def start(self, by_launcher: bool) -> Run:
        return self.campaign.start(self.output, *LATEST, by_launcher=by_launcher)

    def finished(self) -> None:
        """The folder's run went to its end: it must equal the undisturbed one."""
        with self.campaign.fault(f"{self.name}: the end", done=f"chain {self.number} resumed to its end") as facts:
            facts["seen"] = self.campaign.same_end(self.output)
        self.number += 1

    def finish(self) -> None:
        if self.output.exists():
            self.start(by_launcher=False).finish()
            self.finished()


def kills(campaign: Campaign) -> None:
    """SIGKILL of a random rank at a random moment, then a restart with --resume_from_checkpoint latest."""
    chain, total = Chain(campaign, "kill"), campaign.count("kills")
    every = max(1, total // campaign.count("launched_kills"))
    number = attempt = 0
    while number < total:
        draw = campaign.draw(f"kill/{number}/{attempt}")
        rank, by_launcher = draw.randrange(RANKS), number % every == 0
        run = chain.start(by_launcher)
        going_on, aim = wait_for_moment(campaign, run, draw, rank, PHASES)
        before = listed(run.output)
        if not going_on or not run.send(rank, signal.SIGKILL):
            run.finish()
            if run.succeeded():  # it was done before its time came
                attempt += 1
                chain.finished()
                continue
        with campaign.fault("SIGKILL of a rank", done=f"kill {number}: rank {rank}, aimed at {aim}") as facts:
            at_s = time.monotonic() - run.started
            ended_s = run.finish()
            beat = run.heartbeat(rank) or {}
            facts |= {
                "number": number,
                "how": run.how,
                "rank": rank,
                "at_s": round(at_s, 3),
                "phase_at_death": "load" if beat.get("phase", "start") == "start" else beat["phase"],
                "step": beat.get("step"),
                "inside_a_save": sorted(writing(run.output)),
                "complete_before": len(before),
                "others_ended_after_s": round(ended_s, 2),
                "exit_codes": run.codes,
            }
            lost = lost_checkpoints(run.output, before)
            if lost:
                raise Unexpected(f"lost {', '.join(lost)}")
            if run.succeeded():
                raise Unexpected("a killed run ended with exit code 0")
            facts["seen"] = f"{len(complete_checkpoints(run.output))} complete checkpoints, none lost"
        number, attempt = number + 1, 0
    chain.finish()


def signals(campaign: Campaign) -> None:
    """SIGTERM or SIGINT to a random rank inside a step: a checkpoint of the last accepted step, exit code 0 on all ranks."""
    chain, total = Chain(campaign, "signal"), campaign.count("signals")
    number = attempt = 0
    while number < total:
        draw = campaign.draw(f"signal/{number}/{attempt}")
        rank, name = draw.randrange(RANKS), ("SIGTERM", "SIGINT")[number % 2]
        run = chain.start(by_launcher=number < campaign.count("launched_signals"))
        going_on, aim = wait_for_moment(campaign, run, draw, rank, IN_A_STEP)
        if not going_on or not run.send(rank, getattr(signal, name)):
            run.finish()
            attempt += 1
            chain.finished()
            continue
        with campaign.fault(f"{name} to a rank", done=f"signal {number}: rank {rank} in {aim}") as facts:
            facts |= {"number": number, "how": run.how, "rank": rank, "ended_after_s": round(run.finish(), 2)}
            facts["exit_codes"] = run.codes
            if not run.succeeded():
                raise Unexpected(f"exit codes {run.codes}: {last_words(run)}")
            done, saved = max(launched.metrics(run.output), default=0), newest_step(run.output)
            if done != saved:
                raise Unexpected(f"step {done} was accepted, the newest complete checkpoint is of step {saved}")
            if "stopped by" not in run.said() and done < campaign.setup.steps:
                raise Unexpected("it does not say that it was stopped")
            facts["seen"] = f"exit code 0, complete checkpoint of step {saved}"
        number, attempt = number + 1, 0
    chain.finish()


def build_lock(campaign: Campaign) -> None:
    """What a rank killed while torch builds an op leaves behind: later starts must not wait for its lock."""
    lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / "lock"
    lock.touch()
    with campaign.fault("lock of a killed op build", done="a start beside it, through the launcher") as facts:
        run = campaign.start(campaign.work / "lock", "--stop_after_steps", "2", by_launcher=True)
        run.finish(timeout_s=120)
        facts |= {"how": run.how, "exit_codes": run.codes}
        if not run.succeeded() or "was left by a process that was killed" not in run.said():
            raise Unexpected(f"exit codes {run.codes}: {last_words(run)}")
        facts["seen"] = "removed, said so, two steps done"


# ---------------------------------------------------------------------------- disks and checkpoint files


@contextlib.contextmanager
def small_disk(folder: Path):
    """A tmpfs on `folder` that may be resized; yields None where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk(campaign: Campaign) -> None:
    """The disk fills up in the middle of a save, and is too full before one."""
    import checkpointing

    with small_disk(campaign.work / "disk") as resize:
        if resize is None:
            print("skipped: disk full (no small tmpfs can be mounted here: not root)", flush=True)
            campaign.write({"skipped": "disk full during a save", "why": "mounting a tmpfs is not allowed here"})
            return
        output = campaign.work / "disk" / "run"
        run = campaign.start(output, "--stop_after_steps", "4")
        run.finish()
        used = shutil.disk_usage(output).used
        size = sum(path.stat().st_size for path in (output / "checkpoint-step4").rglob("*") if path.is_file())
        trained = _parameters(campaign)
        needed = checkpointing.expected_bytes(trained, 0)
        before = complete_checkpoints(output)
        for name, room, promised in (
            ("disk full during a save", (needed + size) // 2, "No space left on device"),
            ("disk too full for a save", needed // 2, "GiB free"),
        ):
            done = f"{room:,} bytes free, a checkpoint has {size:,}"
            with campaign.fault(name, done=done) as facts:
                resize(used + room)
                run = campaign.start(output, *LATEST)
                run.finish()
                facts["exit_codes"] = run.codes
                refused_by_name(run, {2}, promised)
                after = complete_checkpoints(output)
                if {name: after.get(name) for name in before} != before:
                    raise Unexpected(f"complete before: {sorted(before)}, now: {sorted(after)}")
                facts["seen"] = f"{last_words(run)[:150]}; every complete checkpoint stays"
        with campaign.fault("room again after a full disk", done="resized to 64 MiB, resumed") as facts:
            resize("64m")
            facts["seen"] = campaign.resume_to_the_end(output)


def _parameters(campaign: Campaign) -> int:
    from model_shape import ModelShape

    return ModelShape.from_config_dict(json.loads((campaign.work / "model.json").read_text())).total_parameters


def flip(path: Path, draw) -> str:
    content = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} flipped in {path.name}"


def truncate(path: Path, draw) -> str:
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size))
    return f"{path.name} truncated to {path.stat().st_size} of {size} bytes"


def checkpoint_files(campaign: Campaign) -> None:
    """Each file of a checkpoint, flipped and truncated: refused by name, nothing touched; 'latest' takes the one before."""
    files = sorted(
        str(path.relative_to(campaign.half() / "checkpoint-step8"))
        for path in (campaign.half() / "checkpoint-step8").rglob("*")
        if path.is_file()
    )
    if campaign.short:
        files = campaign.draw("files").sample(files, 1)
    for name in files:
        for damage in (flip, truncate):
            output = campaign.copy_of(campaign.half(), "damaged")
            checkpoint = output / "checkpoint-step8"
            done = damage(checkpoint / name, campaign.draw(f"{name}/{damage.__name__}"))
            with campaign.fault("checkpoint file damaged, resumed by name", done=done) as facts:
                before = folder_content(output)
                run = campaign.start(output, "--resume_from_checkpoint", str(checkpoint))
                run.finish()
                facts["exit_codes"] = run.codes
                # a record changed in files.json makes a sound file a damaged one
                refused_by_name(run, {2}, *([name] if name != "files.json" else [name, "does not match its checksum"]))
                if folder_content(output) != before:
                    raise Unexpected("files of the output folder were changed")
                facts["seen"] = f"exit code 2, nothing written: {last_words(run)[:200]}"
    for name in ["files.json"] if campaign.short else ["files.json", "fp32.safetensors"]:
        output = campaign.copy_of(campaign.half(), "damaged")
        done = flip(output / "checkpoint-step8" / name, campaign.draw(f"latest/{name}"))
        with campaign.fault("checkpoint file damaged, resumed by 'latest'", done=done) as facts:
            facts["seen"] = campaign.resume_to_the_end(output)
            said = (output.with_name("damaged.log")).read_text()
            warned = next((line for line in said.splitlines() if "checkpoint-step8" in line and "skipping" in line), "")
            if (name not in warned and "checksum" not in warned) or "checkpoint-step6" not in said:
                raise Unexpected(f"not named, or not resumed from step 6: {warned or said[-500:]}")
            facts["seen"] += f", from step 6 on: {warned[:160]}"


def refused_by_name(run: Run, codes: set[int], *names: str) -> None:
    """Raise Unexpected unless a rank ended with 2, every rank with one of `codes`, and an error sentence holds one of
    `names`. A rank that is slower to find the same mistake may get the launcher's SIGTERM first."""
    if 2 not in run.codes.values() or not set(run.codes.values()) <= codes | {-signal.SIGTERM}:
        raise Unexpected(f"exit codes {run.codes}: {last_words(run)}")
    sentences = [line for line in run.said().splitlines() if line.startswith("error: ")]
    if not any(name in sentence for sentence in sentences for name in names):
        raise Unexpected(f"no sentence names {' or '.join(names)}: {last_words(run)}")


def latest(campaign: Campaign) -> None:
    """`latest` missing, empty, pointing nowhere: the newest complete checkpoint is taken all the same."""
    cases = {
        "missing": None,
        "empty": b"",
        "pointing nowhere": b"checkpoint-step99\n",
        "random bytes": bytes(range(128, 192)),
    }
    for name, content in list(cases.items())[: 1 if campaign.short else None]:
        output = campaign.copy_of(campaign.half(), "latest")
        (output / "latest").unlink()
        if content is not None:
            (output / "latest").write_bytes(content)
        with campaign.fault("`latest` damaged", done=f"{name}, then --resume_from_checkpoint latest") as facts:
            facts["seen"] = campaign.resume_to_the_end(output)
            if "checkpoint-step8: step 8" not in output.with_name("latest.log").read_text():
                raise Unexpected("it did not resume from step 8")
            facts["seen"] = f"resumed from step 8; {facts['seen']}"


# ---------------------------------------------------------------------------- data


def data(campaign: Campaign) -> None:
    """A shard flipped, replaced by one of the same size, truncated, missing; the first that is read and a later one."""
    import data_loader
    from config import TrainConfig

    manifest = data_loader.open_dataset(str(campaign.work / "tokens")).manifest
    order = data_loader.epoch_order(len(manifest.shards), seed=TrainConfig().seed, epoch=0)
    first, second = (manifest.shards[place].name for place in order[:2])

    def replace(path: Path, draw) -> str:
        path.write_bytes(draw.randbytes(path.stat().st_size))
        return f"{path.name} replaced by another file of its size"

    def remove(path: Path, draw) -> str:
        path.unlink()
        return f"{path.name} removed"

    cases = [(flip, first), (flip, second), (replace, second), (truncate, first), (truncate, second), (remove, second)]
    if campaign.short:
        cases = [(replace, second), (truncate, first)]
    for damage, shard in cases:
        tokens = campaign.copy_of(campaign.work / "tokens", "damaged_tokens")
        output = campaign.copy_of(campaign.half(), "on_damaged_data")
        done = damage(tokens / f"{shard}.bin", campaign.draw(f"data/{damage.__name__}/{shard}"))
        with campaign.fault("data shard damaged", done=done) as facts:
            before = folder_content(output)
            run = campaign.start(output, *LATEST, data=tokens)
            run.finish()
            facts["exit_codes"] = run.codes
            at_start = damage in (truncate, remove)
            # found while training: the rank that reads the shard ends with 2; the one that waits for it with 4, or with 1
            # where the broken collective is quicker than the watchdog
            refused_by_name(run, {2} if at_start else {1, 2, 4}, f"{shard}.bin")
            if at_start and folder_content(output) != before:
                raise Unexpected("files of the output folder were changed")
            right = dict(enumerate(campaign.losses, 1))
            records = launched.metrics(output)
            if any(records[step]["loss"] != right[step] for step in records):
                raise Unexpected("a step was trained on the damaged shard")
            if lost := lost_checkpoints(output, {"checkpoint-step4", "checkpoint-step6", "checkpoint-step8"}):
                raise Unexpected(f"lost {lost}")
            facts["seen"] = f"after step {max(records)}: {last_words(run)[:200]}"


# ---------------------------------------------------------------------------- hangs, memory, NaN


def hang(campaign: Campaign) -> None:
    """SIGSTOP of a random rank: all ranks end within the watchdog's time, the sentence names the rank, exit code 4."""
    import watchdog

    cases = [(0.2, False)] if campaign.short else [(0.2, False), (0.2, True), (0.0, True)]
    for number, (minutes, by_launcher) in enumerate(cases):
        draw = campaign.draw(f"hang/{number}")
        rank = draw.randrange(RANKS)
        limits = watchdog.derive_limits(micro_step_seconds=None, checkpoint_bytes=0, hang_timeout_s=60 * minutes)
        stated_s = limits.silence_s + 2 * watchdog.BEAT_S + watchdog.ABORT_S
        output = campaign.work / f"hang{number}"
        run = campaign.start(output, "--hang_timeout_minutes", str(minutes), by_launcher=by_launcher)
        run.rank_pid(rank)
        _, aim = wait_for_moment(campaign, run, draw, rank, IN_A_STEP)
        with campaign.fault(
            "SIGSTOP of a rank", done=f"rank {rank} in {aim}, --hang_timeout_minutes {minutes}"
        ) as facts:
            run.send(rank, signal.SIGSTOP)
            ended_s = run.finish()
            facts |= {"how": run.how, "ended_after_s": round(ended_s, 1), "stated_s": stated_s, "exit_codes": run.codes}
            # torch's launcher looks ten times a second and then ends itself
            if ended_s > stated_s + (3 if by_launcher else 0):
                raise Unexpected(f"ended after {ended_s:.1f} s, stated {stated_s:.0f} s")
            sentence = next(
                (line for line in run.said().splitlines() if f"rank {rank}" in line and "stop" in line), None
            )
            if sentence is None:
                raise Unexpected(f"no sentence names rank {rank}: {run.said()[-800:]}")
            if not by_launcher and run.codes[1 - rank] != watchdog.EXIT_CODE:
                raise Unexpected(f"exit codes {run.codes}, stated {watchdog.EXIT_CODE}")
            if not list(output.glob("hang-*rank*.txt")):
                raise Unexpected("no stacks were written")
            facts["seen"] = f"all ranks gone {ended_s:.1f} s later (stated {stated_s:.0f}): {sentence[:200]}"


def memory(campaign: Campaign) -> None:
    """One rank may not grow any more (RLIMIT_AS) when sequences get sixteen times longer: a real failed allocation."""
    import watchdog

    stated_s = watchdog.FAILED_GRACE_S + 2 * watchdog.BEAT_S + watchdog.ABORT_S
    for rank in (1,) if campaign.short else (0, 1):
        output = campaign.work / f"memory{rank}"
        run = campaign.start(output, curriculum="0:64,6:1024")
        with campaign.fault("a rank out of memory", done=f"rank {rank} may grow by 4 MiB") as facts:
            run.wait_for(lambda beat: (beat["step"] or 0) >= 2, rank=rank)
            fault_runs.limit_memory(run.pids[rank], 4 << 20)
            run.finish()
            facts |= {
                "others_ended_after_s": round(run.after_first_s, 2),
                "stated_s": stated_s,
                "exit_codes": run.codes,
            }
            if run.succeeded() or run.codes[rank] == 0:
                raise Unexpected(f"exit codes {run.codes}: the limit did not bite")
            cause = next((line for line in run.said().splitlines() for words in OUT_OF_MEMORY if words in line), None)
            if cause is None:
                raise Unexpected(f"nothing says that memory ran out: {run.said()[-800:]}")
            if run.after_first_s > stated_s:
                raise Unexpected(f"the other rank ended {run.after_first_s:.1f} s later, stated {stated_s:.0f} s")
            facts["cause"] = cause.strip()[:200]
            facts["seen"] = (
                f"both ranks gone, the second {run.after_first_s:.1f} s after the first: {facts['cause'][:120]}"
            )


def nan(campaign: Campaign) -> None:
    """tests/nan_worker.py: rank 1's loss is NaN at chosen steps. Every rank skips exactly those, and the run ends with 3."""
    output = campaign.work / "nan"
    with campaign.fault("NaN on one rank", done="steps 2 and 4 to 8 of rank 1") as facts:
        run = campaign.start(output, by_launcher=True, script="tests/nan_worker.py")
        run.finish()
        skipped = [step for step, record in sorted(launched.metrics(output).items()) if record["skipped"]]
        said = run.said()
        facts |= {"how": run.how, "skipped": skipped, "exit_codes": run.codes}
        if skipped != [2, 4, 5, 6, 7, 8] or said.count("exitcode  : 3") < 1 or newest_step(output) != 8:
            raise Unexpected(f"skipped {skipped}, newest checkpoint {newest_step(output)}: {said[-800:]}")
        facts["seen"] = "skipped on all ranks, checkpoint of step 8, exit code 3 after five in a row"


# ---------------------------------------------------------------------------- mutations


def mutations(campaign: Campaign) -> None:
    """Random damage to every small file, in two processes of their own; then real starts with some that were accepted."""
    fault_mutations.write_inputs(campaign.work, campaign.setup.options(campaign.work / "run"))
    written = json.loads((campaign.work / "run" / "resolved_config.json").read_text())
    with campaign.fault("what a start writes down", done="resolved_config.json") as facts:
        missing = {"options", "deepspeed", "model"} - written.keys()
        if missing:
            raise Unexpected(f"it does not hold {', '.join(sorted(missing))}: a change there would not show")
        facts["seen"] = "options, DeepSpeed's JSON as resolved, the model's config in full"
    # both change files below WORK: the second has its own copy
    other = campaign.work.with_name(f"{campaign.work.name}_second")
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    for name in ("tokens", "run"):
        shutil.copytree(campaign.work / name, other / name)
    shutil.copy(campaign.work / "model.json", other)
    fault_mutations.write_inputs(
        other, Setup(other, campaign.setup.steps, campaign.setup.curriculum).options(other / "run")
    )
    processes = []
    for number, work in enumerate((campaign.work, other)):
        words = [sys.executable, str(ROOT / "benchmarks" / "fault_mutations.py"), "--work", str(work)]
        words += ["--seed", str(campaign.seed), "--count", str(campaign.count("mutations"))]
        words += ["--kinds", *fault_mutations.KINDS[number::2]]
        target = campaign.work / f"mutations{number}.jsonl"
        with open(target, "w") as file, open(target.with_suffix(".err"), "w") as errors:
            process = subprocess.Popen(words, cwd=ROOT, env=launched.environment(), stdout=file, stderr=errors)
        processes.append((process, target))
    accepted = []
    for process, target in processes:
        if process.wait() != 0:
            raise SystemExit(f"the mutations could not be tried:\n{target.with_suffix('.err').read_text()[-3000:]}")
        for line in target.read_text().splitlines():
            record = json.loads(line.replace(str(other), str(campaign.work)))
            content = record.pop("content", None)
            as_promised = record["outcome"] in fault_mutations.AS_PROMISED
            if content is not None:
                accepted.append((record, content))
            if not as_promised:
                campaign.record(**{**record, "as_promised": False})
            else:  # 1,800 lines are for the log, not for the screen
                campaign.records.append({**record, "as_promised": True})
                campaign.write({**record, "as_promised": True})
    shutil.rmtree(other)
    mutated_starts(campaign, accepted)


def mutated_starts(campaign: Campaign, accepted: list[tuple[dict, str]]) -> None:
    """Two real steps with files whose change was accepted: they run, or end with a sentence."""
    files = fault_mutations.targets(campaign.work)
    # numbers beyond all sense may be accepted (a schedule may be long) but cannot be tried here
    tried = [(r, c) for r, c in accepted if not any(len(word) > 9 and word.isdigit() for word in r["done"].split())]
    wanted = ("training_yaml", "deepspeed_json", "model_json")
    tried = [
        (r, c) for r, c in tried if r["fault"].removeprefix("mutation of ") in wanted and "output_dir" not in r["done"]
    ]
    draw = campaign.draw("starts")
    for record, content in draw.sample(tried, min(len(tried), campaign.count("mutated_starts"))):
        path = files[record["fault"].removeprefix("mutation of ")].path
        kept = path.read_bytes()
        output = campaign.work / "mutated"
        shutil.rmtree(output, ignore_errors=True)
        path.write_text(content)
        try:
            with campaign.fault("start with an accepted mutation", done=f"{path.name}: {record['done']}") as facts:
                words = ("--config", str(campaign.work / "config.yaml"), "--output_dir", str(output))
                # the launcher would have been given the damaged folder's DeepSpeed JSON
                given = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(campaign.work / "deepspeed.json")}
                run = campaign.forks.start_with(output, [*words, "--stop_after_steps", "2"], given)
                campaign.live.append(run)
                run.finish()
                facts["exit_codes"] = run.codes
                if not run.succeeded():
                    refused_by_name(run, {2}, "")
                if "Traceback" in run.said():
                    raise Unexpected(f"a traceback: {run.said()[-600:]}")
                facts["seen"] = "two steps done" if run.succeeded() else last_words(run)
        finally:
            path.write_bytes(kept)


# ---------------------------------------------------------------------------- the command

KINDS = {
    f.__name__: f
    for f in (kills, signals, build_lock, disk, checkpoint_files, latest, data, hang, memory, nan, mutations)
}
EXPECTED = {
    "forked ranks equal launched ones": "bit-equal",
    "SIGKILL of a rank": "no complete checkpoint lost, resumes",
    "kill: the end": "losses and final checkpoint bit-equal",
    "SIGTERM to a rank": "checkpoint of the last step, exit 0",
    "SIGINT to a rank": "checkpoint of the last step, exit 0",
    "signal: the end": "losses and final checkpoint bit-equal",
    "lock of a killed op build": "removed, the run starts",
    "disk full during a save": "a sentence, exit 2; complete checkpoints stay",
    "disk too full for a save": "a sentence, exit 2; complete checkpoints stay",
    "room again after a full disk": "resumes, bit-equal",
    "checkpoint file damaged, resumed by name": "named, exit 2, nothing written",
    "checkpoint file damaged, resumed by 'latest'": "named, the one before, bit-equal",
    "`latest` damaged": "newest complete one, bit-equal",
    "data shard damaged": "named, never trained on",
    "SIGSTOP of a rank": "all ranks end in the stated time",
    "a rank out of memory": "all ranks end in the stated time",
    "NaN on one rank": "all ranks skip the same steps",
    "what a start writes down": "every value that decides the run",
    "start with an accepted mutation": "runs, or a sentence",
}


def table(records: list[dict]) -> str:
    lines = [f"| {'fault':<45} | count | {'expected':<48} | seen |", f"|{'-' * 47}|------:|{'-' * 50}|------|"]
    for fault in dict.fromkeys(record["fault"] for record in records):
        rows = [record for record in records if record["fault"] == fault]
        good = sum(record["as_promised"] for record in rows)
        expected = EXPECTED.get(fault, "a sentence, or an equal (or shown) run")
        outcomes = Counter(record["outcome"] for record in rows if "outcome" in record)
        seen = f"{good} of {len(rows)}" + "".join(f", {count} {name}" for name, count in sorted(outcomes.items()))
        if fault == "SIGKILL of a rank":
            phases = Counter(record.get("phase_at_death", "?") for record in rows)
            inside = sum(bool(record.get("inside_a_save")) for record in rows)
            seen += " (" + ", ".join(f"{count} in {name}" for name, count in sorted(phases.items()))
            seen += f"; {inside} inside a save)"
        lines.append(f"| {fault:<45} | {len(rows):>5} | {expected:<48} | {seen} |")
    return "\n".join(lines)


def environment(arguments) -> dict:
    from run_log import git_commit, versions

    return {
        "commit": git_commit(),
        "versions": versions(PACKAGES),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg(),
        "seed": arguments.seed,
        "short": arguments.short,
        "only": arguments.only,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few faults of each kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds of faults")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--log", type=Path, help="raw log; default: benchmarks/results/faults.jsonl, short: in --work")
    parser.add_argument("--work", type=Path, help="folder for runs; default: a temporary one, deleted at the end")
    arguments = parser.parse_args()
    # two kinds have tests of their own, which need no campaign
    arguments.only = arguments.only or [
        kind for kind in KINDS if not (arguments.short and kind in ("build_lock", "nan"))
    ]
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        # not TemporaryDirectory: a forked rank would take its clean-up along and do it at its own end
        work = arguments.work or Path(tempfile.mkdtemp(prefix="faults-"))
        if not arguments.work:
            stack.callback(shutil.rmtree, work)
        results = ROOT / "benchmarks" / "results"
        partial = arguments.short or len(arguments.only) < len(KINDS)
        log = arguments.log or (work if partial else results) / "faults.jsonl"
        campaign = Campaign(work, log, seed=arguments.seed, short=arguments.short)
        campaign.write({"environment": environment(arguments)})
        try:
            campaign.undisturbed()
            seconds = {}
            for kind in arguments.only:
                print(f"--- {kind} [{time.monotonic() - begun:.0f} s]", flush=True)
                started = time.monotonic()
                try:
                    KINDS[kind](campaign)
                except Unexpected as error:  # outside of a single fault: what comes after it in this kind was not tried
                    campaign.record(kind, False, seen=str(error))
                    campaign.end_all()
                seconds[kind] = round(time.monotonic() - started, 1)
        finally:
            campaign.end_all()
        failed = [record for record in campaign.records if not record["as_promised"]]
        total_s = time.monotonic() - begun
        summary = {
            "faults": len(campaign.records),
            "not_as_promised": len(failed),
            "seconds": round(total_s, 1),
            "seconds_by_kind": seconds,
            "start_to_first_step_s": {how: round(s, 1) for how, s in campaign.load_s.items()},
            "load_at_end": os.getloadavg(),
        }
        campaign.write({"summary": summary})
        print(
            f"\n{table(campaign.records)}\n\n{len(campaign.records)} faults, {len(failed)} not as promised, {total_s:.0f} s"
        )
        print(f"raw log: {log}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
