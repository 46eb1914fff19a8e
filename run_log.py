"""What a run says and writes down: rank-aware lines, metrics.jsonl, W&B, and units in words.

    log = RunLog(output_dir, rank=0)
    log.line("text")                  # rank 0 prints it and appends it to OUTPUT_DIR/log.txt
    log.metrics({"step": 1, ...})     # one JSON object a line in OUTPUT_DIR/metrics.jsonl, and W&B

Values of environment variables that are named like secrets are masked in everything that is said or written
(config.mask_secrets). Imports no more than config.py does; wandb is imported when a project is asked for.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from config import UserError, mask_secrets


def rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def say(text: str = "") -> None:
    """Print on rank 0, at once."""
    if rank() == 0:
        print(mask_secrets(text), flush=True)


def human_count(number: float) -> str:
    """1234567 -> '1.23M' (decimal units, for tokens and parameters)."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.2f}"


def human_time(seconds: float) -> str:
    """Seconds -> '1.7 years', '3d 04h', '2h05m', '3m20s', '12s'."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds >= 365 * 86400:
        return f"{seconds / (365 * 86400):.1f} years"
    if seconds >= 86400:
        return f"{int(seconds // 86400)}d {int(seconds % 86400 // 3600):02d}h"
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{seconds:.0f}s"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of `packages`; 'absent' where one is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_commit() -> str:
    """The commit of this checkout, with '+changes' when the tree differs from it; 'unknown' outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class RunLog:
    """The log of one training run. Only rank 0 prints and writes; every rank may call.

    A log that cannot be written ends the run (OSError): a run without evidence is worth little.
    """

    def __init__(self, output_dir: str | Path, *, rank: int):
        self.is_main = rank == 0
        self.wandb = None
        if self.is_main:
            self.folder = Path(output_dir)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._text = open(self.folder / "log.txt", "a", buffering=1)  # noqa: SIM115
            self._jsonl = open(self.folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._text.write(mask_secrets(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n"))

    def line(self, text: str = "") -> None:
        if self.is_main:
            text = mask_secrets(text)
            print(text, flush=True)
            self._text.write(text + "\n")

    def warn(self, text: str) -> None:
        self.line(f"WARNING: {text}")

    def metrics(self, values: dict) -> None:
        if not self.is_main:
            return
        # NaN is no JSON: a skipped step's loss becomes null
        safe = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        self._jsonl.write(mask_secrets(json.dumps(safe)) + "\n")
        if self.wandb is not None and "step" in values:
            self.wandb.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=values["step"])

    def start_wandb(self, *, project: str | None, name: str | None, mode: str, config: dict) -> None:
        """Start W&B on rank 0 if a project is named. Raises UserError if wandb is not installed."""
        if not self.is_main or not project or mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"wandb_project: {project!r} was asked for but wandb is not installed; "
                "pip install wandb, or leave --wandb_project away"
            ) from None
        given = sys.argv
        sys.argv = [mask_secrets(word) for word in given]  # wandb records them
        try:
            self.wandb = wandb.init(
                project=mask_secrets(project),
                name=name and mask_secrets(name),
                mode=mode,
                dir=str(self.folder),
                config=json.loads(mask_secrets(json.dumps(config))),
                # silent: its own summary at the end would push ours off the screen
                settings=wandb.Settings(silent=True, console="off"),
            )
        finally:
            sys.argv = given
        self.line(f"W&B: project {project}, mode {mode}, files in {self.wandb.dir}")

    def close(self) -> None:
        if self.is_main:
            if self.wandb is not None:
                self.wandb.finish()
                self.wandb = None
            self._text.close()
            self._jsonl.close()
