"""Starts the real trainer under `accelerate launch` on CPU ranks, as a user does, and reads what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import watchdog

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = str(ROOT / "demo" / "deepspeed.json")


def environment() -> dict[str, str]:
    """One thread a rank (two ranks would fight for the cores) and no sign of another launcher."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{k: v for k, v in os.environ.items() if k not in drop and not k.startswith("ACCELERATE_")},
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }


def command(script: str, *options: str, ranks: int, restarts: int = 0) -> list[str]:
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "demo" / "accelerate.yaml"),
    ]
    launch += ["--num_processes", str(ranks), "--main_process_port", "0", "--max_restarts", str(restarts)]
    return [*launch, script, *options]


def launch(script: str, *options: str, ranks: int = 2, timeout_s: int = 300) -> subprocess.CompletedProcess:
    """Run to the end; the caller looks at returncode, stdout and stderr."""
    return subprocess.run(
        command(script, *options, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def train(*options: str, ranks: int = 2) -> str:
    """Run train_continual_2m.py; returns its stdout, fails with everything it said."""
    done = launch("train_continual_2m.py", *options, ranks=ranks)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def signal_rank(output_dir: Path, rank: int, number: signal.Signals) -> int:
    """Send a signal to a rank of the run that is going on there; returns its process id."""
    newest = max((output_dir / watchdog.FOLDER).iterdir(), key=lambda folder: folder.stat().st_mtime)
    pid = watchdog.read_heartbeat(newest / f"rank-{rank}").pid
    os.kill(pid, number)
    return pid


def run_with_signals(
    output_dir: Path, *options: str, signals: dict[str, tuple], restarts: int = 0, timeout_s: int = 300
):
    """Launch two ranks; at the first line that starts with each key of `signals`, in order, send (signal, rank).

    Returns (exit code, stdout, stderr, seconds from the last signal to the end).
    """
    waiting = list(signals.items())
    sent_at, lines = 0.0, []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            ["timeout", str(timeout_s), *command("train_continual_2m.py", *options, ranks=2, restarts=restarts)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        for line in process.stdout:
            lines.append(line)
            if waiting and line.startswith(waiting[0][0]):
                _, (number, rank) = waiting.pop(0)
                signal_rank(output_dir, rank, number)
                sent_at = time.monotonic()
        process.wait()
        seconds = time.monotonic() - sent_at
        errors.seek(0)
        return process.returncode, "".join(lines), errors.read(), seconds


def metrics(output_dir: Path) -> dict[int, dict]:
    """The records of metrics.jsonl by step; a step done twice (dropped, then resumed) counts with its last record."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def losses(output_dir: Path) -> list[float]:
    return [record["loss"] for _, record in sorted(metrics(output_dir).items())]
