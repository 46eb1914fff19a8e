"""A plan as a picture: memory by term against sequence length.

draw(config, shape, plan, "memory.png", **machine)
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from config import TrainConfig
from model_shape import ModelShape
from run_log import human_count
from run_plan import GIB, Plan, plan_run


def draw(config: TrainConfig, shape: ModelShape, plan: Plan, path: str, **machine) -> None:
    """Memory by term against sequence length as stacked bars, GPU above, host below, with the limits as lines.

    Each length is planned by itself, so the engine's tiles may change from bar to bar; a GPU bar is the phase of a step in
    which that card is fullest, named above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(stage.seq_length for stage in plan.stages)
    lengths = [max(2, longest * i // 16) for i in range(1, 17)]
    stages = [
        plan_run(dataclasses.replace(config, curriculum=f"0:{length}"), shape, **machine).stages[0]
        for length in lengths
    ]
    panels = [
        ("host memory of one machine", lambda s: {**s.memory.pinned, **s.memory.pageable}, plan.machine.host_limit)
    ]
    if plan.machine.gpu_limit:
        panels.insert(0, ("memory of one GPU at its fullest", lambda s: s.memory.gpu, plan.machine.gpu_limit))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 5 * len(panels)), squeeze=False, layout="constrained")
    for axis, (title, terms_of, limit) in zip(axes[:, 0], panels, strict=True):
        _draw_bars(axis, lengths, [terms_of(stage) for stage in stages], limit)
        if limit == plan.machine.gpu_limit:
            for place, stage in enumerate(stages):
                axis.annotate(stage.gpu_phase, (place, stage.gpu_bytes / GIB), ha="center", va="bottom", fontsize=7)
        axis.set(title=title, xlabel="tokens of a sequence", ylabel="GiB")
    trained = human_count(shape.trained_parameters(plan.trainable))
    figure.suptitle(
        f"{human_count(shape.total_parameters)} parameters, {trained} trained, {plan.machine.num_gpus} x "
        f"{plan.machine.gpu or 'CPU process'}"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_bars(axis, lengths: list[int], bars: list[dict[str, int]], limit: int) -> None:
    """One bar a length; terms that are nowhere 1 % of a bar are drawn as one."""
    from matplotlib import colormaps

    rows = []
    for terms in bars:
        row: Counter[str] = Counter()
        for name, size in terms.items():  # the count in an engine's term changes with the length
            row[re.sub(r"(, \d+| of \d+) (\w+)", "", name)] += size
        rows.append(row)
    share = {name: max(row[name] / sum(row.values()) for row in rows) for row in rows for name in row}
    names = sorted((n for n in share if share[n] >= 0.01), key=lambda n: -share[n])
    stacks = {name: [row[name] / GIB for row in rows] for name in names}
    stacks["everything else"] = [sum(size for n, size in row.items() if n not in names) / GIB for row in rows]
    base = [0.0] * len(rows)
    colours = colormaps["tab20"].colors  # twenty that differ; the palest come last
    for number, (name, heights) in enumerate(stacks.items()):
        colour = colours[(2 * number + 2 * number // 20) % 20]
        axis.bar(range(len(rows)), heights, bottom=base, label=name, color=colour)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axis.axhline(limit / GIB, color="black", linestyle="--", label=f"limit, {limit / GIB:,.1f} GiB")
    axis.set_xticks(range(len(rows)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8)
    axis.set_ylim(0, 1.08 * max(limit / GIB, *base))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
