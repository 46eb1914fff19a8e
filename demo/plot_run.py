"""Draw a training run from its metrics.jsonl: loss, sequence length, tokens/s and memory over steps.

python demo/plot_run.py demo/out/run [FILE.png]        # any run's output_dir
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_steps(run: Path) -> list[dict]:
    """One record a step; where a run was resumed from an earlier checkpoint the later record of a step counts."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for _, record in sorted({r["step"]: r for r in records}.items())]


def draw(steps: list[dict], resumed_at: list[int], file: Path, title: str) -> None:
    x = [r["step"] for r in steps]
    figure, axes = plt.subplots(4, 1, sharex=True, figsize=(9, 10), height_ratios=(3, 1.2, 1.6, 1.6))
    rows = (
        ("loss", [r["loss"] for r in steps], "C0", "plot"),
        ("tokens per\nsequence", [r["seq_length"] for r in steps], "C1", "step"),
        ("tokens/s", [r["tokens_per_second"] for r in steps], "C2", "plot"),
        ("peak memory\nof rank 0, GiB", [r["peak_gib"] for r in steps], "C3", "plot"),
    )
    for axis, (label, y, color, kind) in zip(axes, rows, strict=True):
        getattr(axis, kind)(x, y, color=color, **({"where": "mid"} if kind == "step" else {}))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for step in resumed_at:
            axis.axvline(step + 0.5, color="0.4", linestyle=":", linewidth=1)
        if label != "loss":
            axis.set_ylim(bottom=0)
    axes[1].set_yticks(sorted({r["seq_length"] for r in steps}))
    axes[1].tick_params(axis="y", labelsize=7)
    for step in resumed_at:
        axes[0].annotate("stopped, resumed", (step + 0.5, axes[0].get_ylim()[1]), fontsize=8, ha="center", va="bottom")
    axes[0].set_title(title, pad=18)
    axes[-1].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def resume_points(run: Path) -> list[int]:
    """Steps from which the run was resumed, out of its log."""
    lines = (run / "log.txt").read_text().splitlines()
    return [int(line.split(": step ")[1].split(",")[0]) for line in lines if line.startswith("resumed from ")]


def main() -> None:
    run = Path(sys.argv[1])
    file = Path(sys.argv[2]) if len(sys.argv) > 2 else run / "run.png"
    steps = read_steps(run)
    first, last = steps[0]["loss"], sum(r["loss"] for r in steps[-10:]) / len(steps[-10:])
    draw(
        steps,
        resume_points(run),
        file,
        f"{run}: loss {first:.2f} -> {last:.2f} (mean of the last 10) in {len(steps)} steps",
    )
    print(f"{file}: {len(steps)} steps, loss {first:.3f} -> {last:.3f} (mean of the last 10)")


if __name__ == "__main__":
    main()
