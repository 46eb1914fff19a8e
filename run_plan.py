"""A run before it starts: bytes per term and place, seconds per term, and whether it fits. memory_utils.py is its command.

    plan = plan_run(config, shape, num_gpus=2, gpu="h100", gpu_memory_gib=None, host_memory_gib=2048)
    plan.fits, plan.verdict; plan.text()                 # per stage of the curriculum

The pipeline: the model's numbers (model_shape.py), what ZeRO-3 holds (zero3_memory.py, from the DeepSpeed JSON) and what the
engine holds (engine_plan.py) give bytes per term and place (`memory_at`); kernel speeds (hardware.py) give seconds
(`step_seconds`); `plan_run` puts them together per stage of the curriculum and judges. The trainer calls it before it loads
anything, and says with `compare_text` what phase_profiler.py then measured.

What it does not do: no torch is imported (the answer takes less than a second), nothing is guessed for a card without
figures ("n/a"), no network is used.

Units: bytes inside, GiB in what is printed. Symbols: T tokens of one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass

import engine_plan
from config import TrainConfig, UserError, read_json
from hardware import ADAM_BYTES_PER_S, RATES, Gpu, find_gpu, host_memory, sequence_seconds
from model_shape import ModelShape, is_trained, model_flops_per_step
from phase_profiler import PhasePeak
from run_log import human_count, human_time
from zero3_memory import (
    PASSING,
    Memory,
    PinnedPool,
    ZeroSettings,
    gathered_ahead,
    pinned_round_limit,
    zero_memory,
)

GIB = 2**30

# ---------------------------------------------------------------------------------------------- time


def step_seconds(
    shape: ModelShape,
    zero: ZeroSettings,
    gpu: Gpu | None,
    *,
    tokens: int,
    micro_steps: int,
    batch: int,
    ranks: int,
    trainable: str,
    backend: str,
    keep_attention: bool,
) -> dict[str, float] | None:
    """Seconds per term of one optimizer step; None where no kernel was measured on this chip: never a guess.

    Another card of a measured chip is scaled by the datasheets' peaks.
    """
    rates = RATES.get(gpu.chip) if gpu else None
    if rates is None or backend not in ("auto", *rates.attention):
        return None
    sequence = sequence_seconds(
        shape, rates, tokens=tokens, trainable=trainable, backend=backend, keep_attention=keep_attention
    )
    times = micro_steps * batch * rates.peak / gpu.bf16_flops
    seconds = {term: value * times for term, value in sequence.items()}
    owned, trained = shape.total_parameters, shape.trained_parameters(trainable)
    # whole weights reach each GPU twice a micro-step; ZeRO's flat block of them is pinned
    if zero.weights_device != "none":
        seconds["weights to the GPU"] = micro_steps * 2 * zero.weight_bytes * owned / rates.pcie_bytes
    if zero.states_device != "none":
        # a rank's share of each gradient is written to the accumulation buffer and read back every micro-step (added up on
        # the GPU), and written once more for Adam at the last; nothing runs beside a copy from pageable memory
        copies = micro_steps * 2 * zero.accumulation_bytes + zero.master_bytes
        speed = rates.pcie_bytes if zero.pin_states else rates.pageable_bytes
        seconds["gradients to the host"] = copies * trained / ranks / speed
        # clipping reads and writes the gradient; Adam reads weight, gradient and moments, writes weight and moments; the
        # new weight is read and written in bf16
        adam = 2 * zero.master_bytes + (3 * zero.master_bytes + 4 * zero.moment_bytes) + zero.master_bytes
        seconds["CPU Adam"] = trained * (adam + zero.weight_bytes) / ADAM_BYTES_PER_S
    return seconds


# ---------------------------------------------------------------------------------------------- the plan

# Outside torch's allocator: CUDA context, kernels' code, NCCL's buffers
GPU_CONTEXT = int(1.5 * GIB)
# One process with torch, transformers and DeepSpeed (and CUDA's libraries) loaded, before the model. On a GPU: what three runs
# held beyond all other terms, 2.5 GiB each (benchmarks/results/engine_*_h100.json), torch's 2.11 rounding counted
PROCESS_BASE = {"gpu": int(2.5 * GIB), "cpu": int(0.55 * GIB)}
# On the CPU the recurrence runs in plain torch (kernels.kda_reference): tensors of T x chunk x H x K in fp32, about 20 at
# once in backward, and about 40 more stay with malloc; oneDNN keeps a compiled kernel for every number of tokens that an
# expert ever got. Fitted to the runs in benchmarks/results/planner_cpu.json, see benchmarks/NOTES.md.
REFERENCE_CHUNK, REFERENCE_TENSORS = 16, 20 + 40
CPU_KERNEL_CACHE = int(0.45 * GIB)
# Nobody means to train more than this on the CPU: without a GPU the command then asks for the card's name
CPU_PARAMETERS = 1e9
# Of the host's memory, left to the operating system and the page cache, which serves the token shards
HOST_RESERVE = 0.03
# The goal is 100 to 150 B tokens: a schedule of more is taken for a slip
INTENDED_TOKENS = 150e9


@dataclass(frozen=True)
class Machine:
    """What the run has. `gpu`: the card's name or None; `gpu_limit`: bytes of one card, None for CPU processes.

    `num_gpus` counts all machines; `host_limit` and every host figure are of one of `num_machines` equal ones.
    """

    num_gpus: int
    gpu: str | None
    gpu_limit: int | None
    host_limit: int
    pinned_round_limit: int | None
    num_machines: int = 1

    @property
    def local_gpus(self) -> int:
        return self.num_gpus // self.num_machines

    @property
    def usable_host(self) -> int:
        return int(self.host_limit * (1 - HOST_RESERVE))


@dataclass(frozen=True)
class EngineChoice:
    """What the trainer tells the engine, for every stage: options of long_sequence.py, and its share of the card."""

    segment_tokens: int
    heads_per_group: int
    token_tile: int
    offload: str
    attention_outputs: str
    gpu_budget_gib: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum. Memory per term: `gpu` of one card at its fullest, the others of the whole host.

    `gpu_reserve`: what the allocator will have taken by then, earlier stages included; never more than the limit.
    """

    seq_length: int
    steps: int
    micro_steps: int
    tokens_per_step: int
    gpu_phase: str
    memory: Memory
    flops: dict[str, float]
    seconds: dict[str, float] | None
    mfu: float | None
    gpu_reserve: int = 0

    @property
    def gpu_bytes(self) -> int:
        return sum(self.memory.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.memory.pinned.values()) + sum(self.memory.pageable.values())

    @property
    def step_seconds(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None

    def fullness(self, machine: Machine) -> float:
        """Use over limit, of GPU or host, whichever is worse; up to 1.0 fits."""
        gpu = self.gpu_bytes / machine.gpu_limit if machine.gpu_limit else 0.0
        return max(gpu, self.host_bytes / machine.usable_host)


@dataclass(frozen=True)
class Plan:
    """A run before it starts. `fits` and `verdict` judge it; `engine` is what the trainer tells the engine."""

    stages: tuple[StagePlan, ...]
    engine: EngineChoice
    shape: ModelShape
    machine: Machine
    trainable: str
    gpu_hour_usd: float | None
    warnings: tuple[str, ...]

    @property
    def worst(self) -> StagePlan:
        # the host's memory is held from start to end: of equally full stages the longest is what fills it
        return max(self.stages, key=lambda stage: (stage.fullness(self.machine), stage.seq_length))

    @property
    def fits(self) -> bool:
        return self.worst.fullness(self.machine) <= 1.0

    @property
    def total_tokens(self) -> int:
        return sum(stage.steps * stage.tokens_per_step for stage in self.stages)

    @property
    def total_seconds(self) -> float | None:
        """Seconds of the whole schedule; None where no speed is known."""
        if any(stage.seconds is None for stage in self.stages):
            return None
        return sum(stage.steps * stage.step_seconds for stage in self.stages)

    @property
    def cost_usd(self) -> float | None:
        if self.gpu_hour_usd is None or self.total_seconds is None:
            return None
        return self.total_seconds / 3600 * self.machine.num_gpus * self.gpu_hour_usd

    @property
    def verdict(self) -> str:
        """One sentence: does it fit, and which term binds."""
        stage, parts, short = self.worst, [], []
        for what, terms, limit in (
            ("GPU", stage.memory.gpu, self.machine.gpu_limit),
            ("host", {**stage.memory.pinned, **stage.memory.pageable}, self.machine.usable_host),
        ):
            used = sum(terms.values())
            if limit and used:
                largest = max(terms, key=terms.get)
                parts.append(
                    f"{what} {used / GIB:,.1f} of {limit / GIB:,.1f} GiB (largest: {largest}, {terms[largest] / GIB:,.1f})"
                )
                short += [what] * (used > limit)
        if self.fits:
            return f"fits; fullest at {stage.seq_length:,} tokens: {', '.join(parts)}"
        return f"does not fit: {' and '.join(short)} memory is short at {stage.seq_length:,} tokens: {', '.join(parts)}"

    def text(self) -> str:
        """The table for people, the warnings and the verdict."""
        return plan_text(self)

    def to_json(self) -> str:
        """Everything in the table, in bytes, seconds and FLOPs."""
        whole = ("fits", "verdict", "total_tokens", "total_seconds", "cost_usd", "trainable", "warnings")
        stages = [
            {**dataclasses.asdict(s), **{n: getattr(s, n) for n in ("gpu_bytes", "host_bytes", "step_seconds")}}
            for s in self.stages
        ]
        return json.dumps(
            {
                **{name: getattr(self, name) for name in whole},
                "machine": dataclasses.asdict(self.machine),
                "parameters": {"total": self.shape.total_parameters, **self.shape.parameter_counts},
                "engine": dataclasses.asdict(self.engine),
                "stages": stages,
            },
            indent=1,
        )


def plan_run(
    config: TrainConfig,
    shape: ModelShape,
    *,
    num_gpus: int,
    gpu: str | None,
    gpu_memory_gib: float | None,
    host_memory_gib: float | None,
    dataset_tokens: int | None = None,
    zero: ZeroSettings | None = None,
    num_machines: int = 1,
    environ=os.environ,
) -> Plan:
    """Plan `config` on `num_gpus` cards in all. With neither `gpu` nor `gpu_memory_gib`: processes on the CPU.

    `host_memory_gib` None: what this machine has. `zero` None: from the config's DeepSpeed JSON (DeepSpeed's defaults
    where it names none). Raises UserError where the card's memory is neither given nor in the table.
    """
    zero = zero or read_zero(config)
    if gpu is not None and gpu_memory_gib is None:
        if find_gpu(gpu) is None:
            raise UserError(f"gpu: {gpu!r} is in no table here; give its memory with --gpu_memory_gib")
        gpu_memory_gib = find_gpu(gpu).memory_gib
    machine = Machine(
        num_gpus=num_gpus,
        gpu=gpu,
        gpu_limit=int(gpu_memory_gib * GIB) if gpu_memory_gib else None,
        host_limit=int(host_memory_gib * GIB) if host_memory_gib else host_memory(),
        pinned_round_limit=pinned_round_limit(environ),
        num_machines=num_machines,
    )
    last = min(config.num_train_steps, config.stop_after_steps or config.num_train_steps)
    ends = [stage.start_step for stage in config.stages[1:]] + [last]
    lengths = [
        (stage.seq_length, min(end, last) - stage.start_step) for stage, end in zip(config.stages, ends, strict=True)
    ]
    lengths = [(length, steps) for length, steps in lengths if steps > 0]
    longest = max(length for length, _ in lengths)
    engine = choose_engine(config, shape, zero, machine, longest)
    stages = [plan_stage(config, shape, zero, machine, engine, *stage, longest=longest) for stage in lengths]
    stages = tuple(with_reserve(stages, machine.gpu_limit)) if machine.gpu_limit else tuple(stages)
    plan = Plan(stages, engine, shape, machine, config.trainable, config.gpu_hour_usd, ())
    return dataclasses.replace(plan, warnings=tuple(schedule_warnings(config, plan, dataset_tokens)))


def with_reserve(stages: list[StagePlan], limit: int) -> list[StagePlan]:
    """The stages with what the allocator holds in each: it gives nothing back from stage to stage unless it must."""
    used, idle, found = 0, 0, []
    for stage in stages:
        used, idle = max(used, stage.gpu_bytes), max(idle, sum(stage.memory.idle.values()))
        reserve = max(stage.gpu_bytes, min(limit, used + idle)) - GPU_CONTEXT
        found.append(dataclasses.replace(stage, gpu_reserve=reserve))
    return found


def choose_engine(
    config: TrainConfig, shape: ModelShape, zero: ZeroSettings, machine: Machine, seq_length: int
) -> EngineChoice:
    """Tile sizes and what is kept, by the engine's own rule, with the longest sequences in mind.

    Attention outputs are recomputed only where that is what makes the host's memory suffice.
    """
    budget = None
    if machine.gpu_limit:  # the engine counts what is allocated when it plans, but not what comes and goes in a step
        held = gpu_held(config, shape, zero, machine)
        budget = (machine.gpu_limit - GPU_CONTEXT - sum(held.get(term, 0) for term in PASSING)) / GIB
    keeps = ("keep", "recompute") if config.attention_outputs == "auto" else (config.attention_outputs,)
    for keep in keeps:
        open_choice = EngineChoice(
            config.segment_tokens, config.heads_per_group, config.token_tile, config.offload, keep, budget
        )
        found = engine_step(config, shape, zero, machine, open_choice, seq_length)
        choice = dataclasses.replace(
            open_choice,
            segment_tokens=found.segment_tokens,
            heads_per_group=found.heads_per_group,
            token_tile=found.token_tile,
        )
        _, memory = memory_at(config, shape, zero, machine, choice, seq_length, longest=seq_length)
        if sum(memory.pinned.values()) + sum(memory.pageable.values()) <= machine.usable_host:
            return choice
    return choice


def engine_step(
    config: TrainConfig, shape: ModelShape, zero: ZeroSettings, machine: Machine, choice: EngineChoice, seq_length: int
) -> engine_plan.Plan:
    """The engine's own plan for this length, as it will make it when the run is there."""
    held = gpu_held(config, shape, zero, machine)
    resident = sum(size for term, size in held.items() if term not in PASSING)
    return engine_plan.plan_step(
        engine_shape(shape),
        config.per_device_train_batch_size * seq_length,
        element_bytes=zero.weight_bytes,
        options=engine_plan.EngineOptions(**dataclasses.asdict(choice)),
        gpu_bytes=int(choice.gpu_budget_gib * GIB) - resident if machine.gpu_limit else None,
        training=True,
    )


def gpu_held(config: TrainConfig, shape: ModelShape, zero: ZeroSettings, machine: Machine) -> dict[str, int]:
    """What ZeRO takes of each GPU, per term."""
    return _gpu_held(shape, zero, config.trainable, machine.num_gpus, machine.local_gpus)


@functools.lru_cache(maxsize=64)  # a plan asks for it some twenty times, `suggest` for a few hundred plans
def _gpu_held(shape: ModelShape, zero: ZeroSettings, trainable: str, ranks: int, local_ranks: int) -> dict[str, int]:
    return zero_memory(shape, zero, trainable=trainable, ranks=ranks, local_ranks=local_ranks, pool=None).gpu


def engine_shape(shape: ModelShape) -> engine_plan.Shape:
    """The same sizes in the engine's words."""
    return engine_plan.Shape(
        hidden=shape.hidden_size,
        vocab=shape.vocab_size,
        kda_heads=shape.linear_num_heads,
        kda_dim=shape.linear_head_dim,
        conv_width=shape.linear_conv_kernel_dim,
        mla_heads=shape.num_attention_heads,
        nope_dim=shape.qk_nope_head_dim,
        shared_key=shape.qk_rope_head_dim,
        v_dim=shape.v_head_dim,
        latent=shape.kv_lora_rank,
        dense_width=shape.intermediate_size,
        expert_width=shape.moe_intermediate_size,
        shared_width=shape.moe_intermediate_size * shape.num_shared_experts,
        experts=shape.num_experts,
        top_k=shape.experts_per_token,
        layers=tuple(
            ("mla" if i in shape.mla_layers else "kda", "dense" if i in shape.dense_layers else "moe")
            for i in range(shape.num_layers)
        ),
    )


def memory_at(
    config: TrainConfig,
    shape: ModelShape,
    zero: ZeroSettings,
    machine: Machine,
    choice: EngineChoice,
    seq_length: int,
    *,
    longest: int,
) -> tuple[str, Memory]:
    """(the phase of a step in which the GPU is fullest, memory per term) for sequences of this length.

    The engine pins its host memory when the run starts, for sequences of the `longest` length, and holds it to the end.
    """
    local, on_gpu = machine.local_gpus, machine.gpu_limit is not None
    pool = PinnedPool(machine.pinned_round_limit) if on_gpu else None
    memory = zero_memory(shape, zero, trainable=config.trainable, ranks=machine.num_gpus, local_ranks=local, pool=pool)
    phase, buffers = engine_terms(config, shape, zero, machine, choice, seq_length, "gpu")
    for b in buffers:
        memory.add("gpu", b.name, b.bytes)
    for b in engine_terms(config, shape, zero, machine, choice, longest, "host")[1]:
        memory.add("pinned", b.name, local * b.bytes)
    tokens = config.per_device_train_batch_size * seq_length
    if config.engine == "reference":  # bf16 and fp32 logits of the whole sequence and their gradients
        memory.add("gpu", "logits of every token", 12 * tokens * shape.vocab_size)
    if on_gpu:
        engine = sum(b.bytes for b in buffers)
        memory.add("gpu", "allocator: rounding, fragments", int((engine_plan.MARGIN - 1) * engine))
        memory.add("gpu", "CUDA context, NCCL", GPU_CONTEXT)
        resident = engine_step(config, shape, zero, machine, choice, seq_length).stream == "gpu"
        memory.add("idle", "weights gathered ahead", gathered_ahead(shape, zero, resident=resident))
        memory.add("pinned", "pinned blocks: rounding, cache", local * (pool.owned - pool.asked))
    else:  # there is one memory: what a GPU would hold lies in the processes
        for term, size in memory.gpu.items():
            memory.add("pageable", term, local * size)
        memory.gpu.clear()
        memory.idle.clear()
        if shape.kda_layers:
            segment = engine_step(config, shape, zero, machine, choice, seq_length).segment_tokens
            one = min(tokens, segment) * REFERENCE_CHUNK * shape.linear_dim * 4
            memory.add("pageable", "KDA in plain torch", local * REFERENCE_TENSORS * one)
        memory.add("pageable", "oneDNN's compiled kernels", local * CPU_KERNEL_CACHE)
    memory.add("pageable", "Python, libraries", local * PROCESS_BASE["gpu" if on_gpu else "cpu"])
    memory.add("disk", "checkpoints", checkpoint_bytes(shape, zero, config))
    return phase, memory


def engine_terms(
    config: TrainConfig,
    shape: ModelShape,
    zero: ZeroSettings,
    machine: Machine,
    choice: EngineChoice,
    seq_length: int,
    where: str,
) -> tuple[str, list[engine_plan.Buffer]]:
    """The phase of a step in which this place, 'gpu' or 'host', is fullest, and the engine's buffers there in it."""
    buffers = engine_plan.engine_buffers(
        engine_shape(shape),
        config.per_device_train_batch_size * seq_length,
        engine_step(config, shape, zero, machine, choice, seq_length),
        element_bytes=zero.weight_bytes,
        frozen_experts=not is_trained("routed_experts", config.trainable),
    )
    during = lambda phase: [b for b in buffers if b.where == where and (not b.phases or phase in b.phases)]  # noqa: E731
    fullest = max(engine_plan.PHASES, key=lambda phase: sum(b.bytes for b in during(phase)))
    return fullest, during(fullest)


def checkpoint_bytes(shape: ModelShape, zero: ZeroSettings, config: TrainConfig) -> int:
    """Disk of all kept checkpoints and the one being written: master weights and moments, and frozen weights as they are."""
    trained = shape.trained_parameters(config.trainable)
    one = (zero.master_bytes + 2 * zero.moment_bytes) * trained
    one += zero.weight_bytes * (shape.total_parameters - trained)
    kept = config.save_total_limit or math.ceil(config.num_train_steps / config.save_steps)
    return one * (kept + 1)


def plan_stage(
    config: TrainConfig,
    shape: ModelShape,
    zero: ZeroSettings,
    machine: Machine,
    engine: EngineChoice,
    seq_length: int,
    steps: int,
    *,
    longest: int,
) -> StagePlan:
    """Memory, FLOPs and time of `steps` optimizer steps at one length."""
    batch, ranks = config.per_device_train_batch_size, machine.num_gpus
    micro_steps = config.gradient_accumulation_steps
    if config.tokens_per_step is not None:  # data_loader.Schedule's rule
        micro_steps = max(1, round(config.tokens_per_step / (seq_length * batch * ranks)))
    sequences = micro_steps * batch * ranks
    phase, memory = memory_at(config, shape, zero, machine, engine, seq_length, longest=longest)
    flops = model_flops_per_step(shape, seq_length, sequences, trainable=config.trainable)
    card = find_gpu(machine.gpu)
    seconds = step_seconds(
        shape,
        zero,
        card,
        tokens=seq_length,
        micro_steps=micro_steps,
        batch=batch,
        ranks=ranks,
        trainable=config.trainable,
        backend=config.attention_backend,
        keep_attention=engine.attention_outputs != "recompute",
    )
    mfu = sum(flops.values()) / (sum(seconds.values()) * card.bf16_flops * ranks) if seconds else None
    return StagePlan(seq_length, steps, micro_steps, sequences * seq_length, phase, memory, flops, seconds, mfu)


def schedule_warnings(config: TrainConfig, plan: Plan, dataset_tokens: int | None) -> list[str]:
    """Sentences about a schedule that asks for more tokens than are meant or there are."""
    warnings = []
    total, steps = plan.total_tokens, sum(stage.steps for stage in plan.stages)
    longest = max(stage.seq_length for stage in plan.stages)
    least = plan.machine.num_gpus * config.per_device_train_batch_size * longest
    if total > INTENDED_TOKENS:
        offer = least * max(1, int(INTENDED_TOKENS / steps // least))
        advice = f"--tokens_per_step {offer} makes it {human_count(offer * steps)}"
        if offer * steps > INTENDED_TOKENS:
            advice = (
                f"one step is at least {human_count(least)} tokens here, so lower --num_train_steps and the curriculum"
            )
        most = max(stage.tokens_per_step for stage in plan.stages)
        warnings.append(
            f"{steps:,} steps of up to {human_count(most)} tokens are {human_count(total)} tokens in all, where 100 to 150 B "
            f"are meant; {advice}"
        )
    if config.engine == "reference":
        warnings.append(
            "engine reference: planned as the tiled engine plus the logits; the plain path takes far more, use it for short "
            "sequences only"
        )
    if dataset_tokens and total > dataset_tokens:
        warnings.append(
            f"the schedule reads {human_count(total)} tokens but the data set has {human_count(dataset_tokens)}: "
            f"{total / dataset_tokens:.1f} epochs"
        )
    return warnings


def read_zero(config: TrainConfig) -> ZeroSettings:
    return ZeroSettings.from_json(read_json(config.deepspeed) if config.deepspeed else {}, bf16=config.bf16)


# ---------------------------------------------------------------------------------------------- the plan in words


def plan_text(plan: Plan) -> str:
    """The table of a plan: memory per term, FLOPs, time and cost per stage; warnings; verdict."""
    machine, shape, stages = plan.machine, plan.shape, plan.stages
    trained = shape.trained_parameters(plan.trainable)
    card = f"{machine.gpu or 'GPU'} ({machine.gpu_limit / GIB:.1f} GiB)" if machine.gpu_limit else "CPU process"
    lines = [
        f"plan: {human_count(shape.total_parameters)} parameters, {human_count(trained)} trained ({plan.trainable}), on "
        f"{machine.num_gpus} x {card}, host {machine.host_limit / GIB:,.0f} GiB"
        + (f" in each of {machine.num_machines} machines" if machine.num_machines > 1 else "")
    ]
    row = lambda name, cells: lines.append(f"  {name:<40}" + "".join(f"{cell:>12}" for cell in cells))  # noqa: E731
    row("tokens of a sequence", [f"{s.seq_length:,}" for s in stages])
    row("steps", [f"{s.steps:,}" for s in stages])
    row("micro-steps x ranks", [f"{s.micro_steps} x {machine.num_gpus}" for s in stages])
    row("tokens a step", [human_count(s.tokens_per_step) for s in stages])
    # a tiny model in GiB would be a table of zeros
    unit, size = ("GiB", GIB) if max(s.host_bytes for s in stages) >= 8 * GIB else ("MiB", 2**20)
    for place, title in (
        ("gpu", f"GPU, {unit} of one card at its fullest"),
        ("pinned", f"pinned host memory, {unit} of all ranks"),
        ("pageable", f"other process memory, {unit} of all ranks"),
        ("disk", f"disk, {unit}"),
    ):
        terms = dict.fromkeys(term for stage in stages for term in getattr(stage.memory, place))
        lines += [f"{title}:"] if terms else []
        for term in terms:
            row(term, [f"{getattr(s.memory, place).get(term, 0) / size:,.2f}" for s in stages])
        if len(terms) > 1:
            row("  sum", [f"{sum(getattr(s.memory, place).values()) / size:,.2f}" for s in stages])
    if machine.gpu_limit:
        row("GPU fullest during", [s.gpu_phase for s in stages])
        row(f"GPU allocator's reserve by then, {unit}", [f"{s.gpu_reserve / size:,.2f}" for s in stages])
    row(f"host memory in all, {unit}", [f"{s.host_bytes / size:,.2f}" for s in stages])
    lines.append("arithmetic and time:")
    row("model FLOPs a step", [f"{sum(s.flops.values()):.3g}" for s in stages])
    row("  of it full attention", [f"{s.flops['attention'] / sum(s.flops.values()):.1%}" for s in stages])
    lines += _time_lines(plan, row)
    e = plan.engine
    lines.append(
        f"engine: KDA segments of {e.segment_tokens:,} tokens, {e.heads_per_group} MLA heads at a time, tiles of "
        f"{e.token_tile:,} tokens, offload {e.offload}, attention outputs: {e.attention_outputs}"
    )
    lines += [f"WARNING: {warning}" for warning in plan.warnings]
    return "\n".join([*lines, f"verdict: {plan.verdict}"])


def _time_lines(plan: Plan, row) -> list[str]:
    stages, seconds = plan.stages, plan.total_seconds
    if seconds is None:
        peak = find_gpu(plan.machine.gpu)
        if peak is None:
            return ["  step time, tokens/s, MFU, days and cost: n/a (no figures for this card)"]
        least = sum(s.steps * sum(s.flops.values()) for s in stages) / (peak.bf16_flops * plan.machine.num_gpus)
        return [
            f"  step time, tokens/s, MFU, days and cost: n/a (no kernel was measured on this card); its datasheet's peak "
            f"alone would take {human_time(least)}"
        ]
    for term in stages[0].seconds:
        row(f"{term}, s", [f"{s.seconds[term]:,.1f}" for s in stages])
    row("step time", [human_time(s.step_seconds) for s in stages])
    row("tokens/s", [human_count(s.tokens_per_step / s.step_seconds) for s in stages])
    row("MFU", [f"{s.mfu:.1%}" for s in stages])
    row("the stage takes", [human_time(s.steps * s.step_seconds) for s in stages])
    cost = "n/a (give --gpu_hour_usd)" if plan.cost_usd is None else f"${plan.cost_usd:,.0f}"
    return [
        f"whole schedule: {human_count(plan.total_tokens)} tokens in {human_time(seconds)}, "
        f"{seconds / 3600 * plan.machine.num_gpus:,.0f} GPU hours, cost {cost}"
    ]


def compare_text(plan: Plan, seq_length: int, peaks: dict[str, PhasePeak]) -> str:
    """Predicted beside measured for this rank at this length, over all phases a profiler saw; then each phase's peaks.

    A plan for a card may be made on a machine without one: nothing is compared then.
    """
    stage = next(stage for stage in plan.stages if stage.seq_length == seq_length)
    gpu = (stage.gpu_reserve, max((p.gpu_reserved for p in peaks.values()), default=0))
    host = (stage.host_bytes / plan.machine.local_gpus, max((p.process for p in peaks.values()), default=0))
    pairs = [("GPU", *gpu), ("process", *host)] if plan.machine.gpu_limit else [("process", *host)]
    compared = "; ".join(
        f"{what} predicted {predicted / GIB:.2f}, measured {measured / GIB:.2f} GiB ({measured / predicted - 1:+.1%})"
        for what, predicted, measured in pairs
    )
    if plan.machine.gpu_limit and not gpu[1]:
        compared = (
            f"process {host[1] / GIB:.2f} GiB, on the CPU; the plan is one for a GPU, so there is nothing to compare"
        )
    return f"memory of this rank at {seq_length:,} tokens: {compared}\n  {phases_text(peaks)}"


def phases_text(peaks: dict[str, PhasePeak]) -> str:
    """Each phase's peaks on one line; the GPU's where one was used."""
    on_gpu = any(peak.gpu_reserved for peak in peaks.values())
    show = lambda p: (p.gpu_allocated, p.gpu_reserved, p.process) if on_gpu else (p.process,)  # noqa: E731
    phases = [f"{name} {' / '.join(f'{size / GIB:.2f}' for size in show(p))}" for name, p in peaks.items()]
    what = "GPU allocated / reserved / process" if on_gpu else "process"
    return f"peaks per phase, GiB ({what}): {'; '.join(phases)}"
