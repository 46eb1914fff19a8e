"""What would make a plan fit, or fit a budget: the changes a user could make, tried on the plan itself.

suggest(config, shape, plan, **machine)              # sentences, cheapest first
budget_schedule(config, plan, hours=300)             # the schedule that this much time buys
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field

from config import TrainConfig
from model_shape import ModelShape
from run_log import human_count, human_time
from run_plan import GIB, HOST_RESERVE, Plan, plan_run, read_zero
from zero3_memory import ZeroSettings


@dataclass(frozen=True)
class Change:
    """One thing a user could change: what to write, and what it does to the planner's inputs."""

    label: str
    config: dict = field(default_factory=dict)
    zero: dict = field(default_factory=dict)
    machine: dict = field(default_factory=dict)


def possible_changes(config: TrainConfig, zero: ZeroSettings, plan: Plan) -> list[Change]:
    """Every lever there is, cheapest first."""
    changes = []
    fixed = [n for n in ("segment_tokens", "heads_per_group", "token_tile") if getattr(config, n) is not None]
    if fixed:
        changes.append(Change(f"leave {', '.join(fixed)} to the planner", config=dict.fromkeys(fixed)))
    if config.offload == "gpu":
        changes.append(Change("--offload auto", config={"offload": "auto"}))
    if config.attention_outputs == "keep":
        changes.append(Change("--attention_outputs recompute", config={"attention_outputs": "recompute"}))
    if zero.accumulation_bytes == 4:
        changes.append(
            Change(
                '"data_types": {"grad_accum_dtype": "bf16"} in the DeepSpeed JSON (rounds sums of many micro-steps)',
                zero={"accumulation_bytes": 2},
            )
        )
    if config.trainable == "all":
        changes.append(Change("--trainable no_experts (routed experts frozen)", config={"trainable": "no_experts"}))
    if zero.master_bytes == 4:
        changes.append(
            Change(
                '"bf16_master_weights_and_grads": true and "bf16_optimizer_states": true under "bf16" in the DeepSpeed JSON '
                "(small updates are rounded away)",
                zero={"master_bytes": 2, "moment_bytes": 2},
            )
        )
    if zero.states_device == "cpu":
        # master, moments and gradient are read, all but the gradient written back
        swapped = plan.shape.trained_parameters(config.trainable) * (3 * zero.master_bytes + 4 * zero.moment_bytes)
        changes.append(
            Change(
                '"offload_optimizer": {"device": "nvme", "nvme_path": ...} (a fast disk: each step reads and writes '
                f"{swapped / 1e12:,.2f} TB)",
                zero={"states_device": "nvme"},
            )
        )
    for processes in range(plan.machine.local_gpus - 1, 0, -1):
        changes.append(
            Change(
                f"--num_processes {processes} (each GPU's sequence takes host memory)", machine={"num_gpus": processes}
            )
        )
    changes.append(
        Change(
            "a second machine like this one",
            machine={"num_gpus": 2 * plan.machine.num_gpus, "num_machines": 2 * plan.machine.num_machines},
        )
    )
    return changes


def suggest(config: TrainConfig, shape: ModelShape, plan: Plan, **machine) -> list[str]:
    """What would make the plan fit, cheapest first, each alone with its effect; `machine`: plan_run's other arguments.

    Then what is enough together, and up to which length the run fits as it stands.
    """
    zero = read_zero(config)

    def replan(changes: list[Change]) -> Plan:
        values = {**machine, **{k: v for change in changes for k, v in change.machine.items()}}
        return plan_run(
            dataclasses.replace(config, **{k: v for change in changes for k, v in change.config.items()}),
            shape,
            zero=dataclasses.replace(zero, **{k: v for change in changes for k, v in change.zero.items()}),
            **values,
        )

    lines, together, enough = [], [], None
    for change in possible_changes(config, zero, plan):
        alone = replan([change])
        lines.append(f"{change.label}: {_effect(plan, alone)}")
        if enough is None and not plan.fits and "num_machines" not in change.machine:
            together.append(change)
            enough = replan(together) if replan(together).fits else None
    if plan.fits:
        return ["it fits as it is; what each change would do:", *lines]
    if enough:
        needed = _without_the_needless(together, lambda changes: replan(changes).fits)
        lines.append(f"enough together: {'; '.join(c.label.split(' (')[0] for c in needed)}: {replan(needed).verdict}")
    else:
        lines.append("all changes on this machine together are not enough at this length")
    longest = longest_that_fits(config, shape, **machine)
    lines.append(
        f"as it stands the run fits up to {longest:,} tokens a sequence: end the curriculum there"
        if longest
        else "as it stands the run fits at no length"
    )
    need = max(stage.host_bytes for stage in plan.stages) / (1 - HOST_RESERVE) / GIB
    lines.append(f"as it stands the run needs {need:,.0f} GiB of host memory a machine")
    return lines


def _without_the_needless(changes: list[Change], fits) -> list[Change]:
    """Drop, dearest first, what the rest can do without."""
    needed = list(changes)
    for change in reversed(changes):
        rest = [c for c in needed if c is not change]
        if fits(rest):
            needed = rest
    return needed


def _effect(before: Plan, after: Plan) -> str:
    host = [max(stage.host_bytes for stage in plan.stages) / GIB for plan in (before, after)]
    parts = [f"host {host[0]:,.0f} -> {host[1]:,.0f} GiB"]
    if before.machine.gpu_limit:
        gpu = [max(stage.gpu_bytes for stage in plan.stages) / GIB for plan in (before, after)]
        if abs(gpu[1] - gpu[0]) > 0.05:
            parts.append(f"GPU {gpu[0]:,.1f} -> {gpu[1]:,.1f} GiB")
    if before.total_seconds and after.total_seconds:
        speed = after.total_tokens / after.total_seconds / (before.total_tokens / before.total_seconds)
        if abs(speed - 1) > 0.005:
            parts.append(f"speed x {speed:.2f}")
    return ", ".join(parts) + (", fits" if after.fits else "")


def longest_that_fits(config: TrainConfig, shape: ModelShape, *, step: int = 65536, **machine) -> int:
    """The longest sequence, a multiple of `step`, up to the curriculum's longest, at which the run fits; 0 for none."""
    most = max(stage.seq_length for stage in config.stages)
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        at = dataclasses.replace(config, curriculum=f"0:{middle * step}")
        low, high = (middle, high) if plan_run(at, shape, **machine).fits else (low, middle - 1)
    return low * step


def budget_schedule(config: TrainConfig, plan: Plan, *, hours: float) -> str:
    """The schedule that `hours` of this machine buy: every stage cut by the same factor, tokens a step as they are."""
    if plan.total_seconds is None:
        return "budget: n/a, the speed of this card is not known"
    share = min(1.0, hours * 3600 / plan.total_seconds)
    steps = [math.floor(stage.steps * share + 1e-6) for stage in plan.stages]  # a tenth of 2,500 is 250, not 249.99
    starts = [0, *itertools.accumulate(steps)]
    bought = [(start, stage, n) for start, stage, n in zip(starts, plan.stages, steps, strict=False) if n]
    if not bought:
        first = plan.stages[0]
        return f"budget: {hours:,.1f} hours buy no step of each stage; one step takes {human_time(first.step_seconds)}"
    tokens = sum(stage.tokens_per_step * n for _, stage, n in bought)
    curriculum = ",".join(f"{start}:{stage.seq_length}" for start, stage, _ in bought)
    each = "; ".join(
        f"{n:,} steps of {human_count(stage.tokens_per_step)} tokens at {stage.seq_length:,}" for _, stage, n in bought
    )
    return (
        f"budget: {hours:,.1f} hours on {plan.machine.num_gpus} GPUs buy {human_count(tokens)} tokens ({each})\n"
        f'  --num_train_steps {sum(steps)} --curriculum "{curriculum}"'
    )
