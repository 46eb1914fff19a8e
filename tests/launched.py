"""Starts the real trainer under `accelerate launch` on CPU ranks, as a user does, and reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def command(script: str, *options: str, ranks: int) -> list[str]:
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "demo" / "accelerate.yaml"),
    ]
    return [*launch, "--num_processes", str(ranks), "--main_process_port", "0", script, *options]


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


def metrics(output_dir: Path) -> dict[int, dict]:
    """The records of metrics.jsonl by step; a step done twice (dropped, then resumed) counts with its last record."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records}


def losses(output_dir: Path) -> list[float]:
    return [record["loss"] for _, record in sorted(metrics(output_dir).items())]
