"""One step looked at alone: forward and backward on a checkpoint's weights, nothing updated, nothing saved.

    accelerate launch ... train_continual_2m.py ... --resume_from_checkpoint checkpoint-step100 --replay_step 117

Prints the loss of every sequence with its place in the data (stream tokens, shards), the gradient norm of every layer and
how many of its gradients are not finite. The step's data and seed are those of the run; its weights are the checkpoint's,
so a step that was skipped right after the checkpoint is seen as it was.
"""

from __future__ import annotations

import math
import re

import torch
import torch.distributed as dist

from run_log import human_count


def replay_step(engine, fp32, loader, schedule, step: int, *, seed: int, enter, log) -> None:
    """Every rank calls it. `enter(phase, step=, micro_step=)` tells the watchdog; results go to `log.line` of rank 0."""
    plan = schedule.step(step)
    torch.manual_seed(seed + step)
    fp32.zero_grad()
    mine = []
    for micro_step in range(plan.accumulation_steps):
        enter("data", step=step, micro_step=micro_step)
        input_ids = torch.from_numpy(loader.micro_batch(step, micro_step)).to(engine.device)
        engine.set_gradient_accumulation_boundary(micro_step == plan.accumulation_steps - 1)
        enter("forward", step=step, micro_step=micro_step, first=True)
        output = engine(input_ids=input_ids, labels=input_ids, use_cache=False)
        mine += [(micro_step, row, loss) for row, loss in enumerate(_row_losses(output, input_ids))]
        enter("backward", step=step, micro_step=micro_step, first=True)
        engine.backward(output.loss / plan.accumulation_steps, scale_wrt_gas=False)
    fp32.reduce_gradients()
    enter("report", step=step)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    log.line(
        f"replay of step {step}: {plan.sequences} sequences of {plan.seq_length:,} tokens, stream tokens "
        f"{plan.start_token:,} to {plan.start_token + plan.tokens:,}"
    )
    log.line(f"{'sequence':>9} {'rank':>5} {'micro-step':>11} {'loss':>10}  where")
    rows = [
        ((micro_step * schedule.world_size + rank) * schedule.batch + row, rank, micro_step, loss)
        for rank, records in enumerate(found)
        for micro_step, row, loss in records
    ]
    for sequence, rank, micro_step, loss in sorted(rows):
        where = _place(loader, schedule, plan, sequence)
        log.line(f"{sequence:>9} {rank:>5} {micro_step:>11} {loss:>10.4f}  {where}")
    log.line(f"{'layer':<36} {'gradients':>10} {'norm':>12} {'not finite':>11}")
    for name, (count, square, bad) in _layer_gradients(engine, fp32).items():
        log.line(f"{name:<36} {human_count(count):>10} {math.sqrt(square):>12.5g} {bad:>11.0f}")
    log.line("replay: nothing was updated, nothing was saved")


def _row_losses(output, input_ids) -> list[float]:
    """Mean loss of each row; of the whole micro-batch where the model gives no losses per token (--engine reference)."""
    if getattr(output, "token_losses", None) is None:
        return [output.loss.item()] * len(input_ids)
    return (output.token_losses.float().sum(1) / (input_ids.shape[1] - 1)).tolist()


def _place(loader, schedule, plan, sequence: int) -> str:
    """Stream tokens of a sequence of the step, and the shards they lie in."""
    stream, start = loader.streams[0], plan.start_token + sequence * plan.seq_length
    if loader.mixture is not None:
        number = schedule.sequence_number(plan.step, sequence)
        part = loader.mixture.owner(number)
        stream, start = loader.streams[part], schedule.tokens_of_part(loader.mixture, part, number)
    shards = stream.dataset.manifest.shards
    pieces = ", ".join(
        f"{shards[shard].name} {first:,} to {first + count:,}"
        for _, shard, first, count in stream.pieces(start, plan.seq_length)
    )
    return f"stream {start:,} to {start + plan.seq_length:,}: {stream.dataset.folder} {pieces}"


def _layer_gradients(engine, fp32) -> dict[str, tuple[int, float, float]]:
    """{layer: (number of gradients, sum of squares, number not finite)} over all ranks, in the model's order."""
    names: dict[str, int] = {}
    rows: list[list[float]] = []

    def add(name: str, gradient: torch.Tensor, count: int, share: float) -> None:
        place = names.setdefault(name, len(names))
        if place == len(rows):
            rows.append([0.0, 0.0, 0.0])
        gradient = gradient.double()
        for column, value in enumerate((count, gradient.square().sum().item(), (~gradient.isfinite()).sum().item())):
            rows[place][column] += share * value

    optimizer = engine.optimizer
    partitions = optimizer.get_fp32_grad_partitions()
    for group, parameters in enumerate(optimizer.fp16_groups):
        for index, parameter in enumerate(parameters):
            add(_layer_of(engine.param_names[parameter]), partitions[group][index], parameter.ds_numel, 1.0)
    ranks = dist.get_world_size()
    for key, leaf in fp32.named.items():
        if leaf.grad is not None:  # every rank holds all of it
            add(f"{key.rpartition('.')[0]} (fp32)", leaf.grad, leaf.numel() * ranks, 1.0 / ranks)
    total = torch.tensor(rows, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    ordered = sorted(names, key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
    return {
        name: (int(total[names[name]][0].item() / ranks), total[names[name]][1].item(), total[names[name]][2].item())
        for name in ordered
    }


def _layer_of(name: str) -> str:
    """'model.layers.3.mlp.experts.down_proj' -> 'layers.3.mlp'; what is outside the layers keeps its name."""
    match = re.search(r"layers\.\d+\.\w+", name)
    return match[0] if match else name
