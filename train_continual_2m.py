"""Continual pretraining of Kimi-Linear from 1M to 2M tokens of context: config, data, model, optimizer, loop.

    accelerate launch --config_file accelerate_config_h100.yaml train_continual_2m.py \
        --config config_h100_2x.yaml --data_dir ./data/tokenized_2m --output_dir ./checkpoints/kimi-2m-h100 \
        --deepspeed deepspeed_config_h100.json

    python train_continual_2m.py --config config_h100_2x.yaml --dry_run      # the resolved plan, nothing started

The pipeline: options are checked against each other and against the data (before any process group exists, so that a
mistake costs a second), the planner says what the run needs, the model is loaded under DeepSpeed ZeRO-3, a checkpoint
is resumed if asked for, then one optimizer step after another. Everything that a step depends on is a pure function of
(config, data, step): tokens, learning rate, random seed. So resuming needs the weights, the moments and the step.

Exit codes: 0 done or stopped by SIGTERM/Ctrl-C with a checkpoint, 2 a mistake in the input or a checkpoint that cannot be
written, 3 five steps in a row with a non-finite loss or gradient or a spike of one (checkpoint written), 4 a rank died or hung
(watchdog.py: all ranks end, the reason and every rank's stacks are in output_dir; the last checkpoint stands).

Symbols: B sequences per micro-step and rank, T tokens of the stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import data_loader
import run_plan
import watchdog
from config import (
    HUB_MODEL,
    TrainConfig,
    UserError,
    cross_check,
    load_config,
    mask_secrets,
    read_json,
    run_main,
    world_size_of,
)
from deepspeed_start import make_optimizer, resolve_deepspeed, start_accelerator
from model_shape import KIMI_LINEAR_48B, ModelShape
from phase_profiler import PhaseProfiler
from run_log import RunLog, git_commit, human_count, say, versions
from step_guard import StepGuard
from step_meter import Meter
from zero3_memory import set_allocator

MAX_SKIPS_IN_A_ROW = 5
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "fla-core", "flash-attn-4", "triton", "numpy", "wandb")


def main() -> int:
    config = load_config()
    set_allocator()

    # --- check everything that can be checked without a GPU, a process group or the weights
    world_size = world_size_of(config)
    problems = cross_check(config, world_size=world_size)
    if world_size is None and not config.dry_run:
        problems.append(
            "launch: no processes were launched; start with 'accelerate launch --config_file accelerate_config_h100.yaml "
            "train_continual_2m.py ...' (or add --dry_run to see the plan)"
        )
    deepspeed_json = config.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not deepspeed_json and not config.dry_run:
        problems.append("deepspeed: no DeepSpeed JSON is given; add --deepspeed deepspeed_config_h100.json")
    if problems:
        raise UserError("\n".join(problems))
    processes = world_size or planned_processes(config)
    dataset = open_data(config)
    schedule = data_loader.Schedule(
        stages=config.stages,
        num_train_steps=config.num_train_steps,
        world_size=processes,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        tokens_per_step=config.tokens_per_step,
    )
    shape = model_shape(config)

    # --- say what the run needs, before the money is spent
    plan = make_plan(config, shape, processes, dataset)
    say(schedule.describe(dataset))
    say(plan.text())
    if config.dry_run:
        say("\nresolved options:")
        say("\n".join(f"  {name}: {value}" for name, value in dataclasses.asdict(config).items()))
        return 0
    if not plan.fits and not config.force:
        model = config.model_config or config.model_name_or_path
        raise UserError(
            f"plan: {model} {plan.verdict}; see 'python memory_utils.py --suggest', or start anyway with --force"
        )

    # --- the model's config, the data's tokenizer and the checkpoint must fit each other, before anything is written
    import kimi_model

    model_config = kimi_model.read_model_config(config)
    check_data(dataset, config, model_config)
    check_disk(config, shape)
    resume = find_resume(config, dataset, schedule, model_config, deepspeed_json)
    return train(config, deepspeed_json, dataset, schedule, shape, plan, model_config, resume)


# ---------------------------------------------------------------------------------------------- before the start


def planned_processes(config: TrainConfig) -> int:
    """Process count for a plan when nothing was launched: the Accelerate YAML's, else 1."""
    if config.accelerate_config:
        from config import read_yaml

        return int(read_yaml(config.accelerate_config).get("num_processes") or 1)
    return 1


def open_data(config: TrainConfig):
    """The token data set; a dry run may come before the data exists."""
    try:
        return data_loader.open_dataset(config.data_dir)
    except UserError as error:
        if not config.dry_run:
            raise
        say(f"data: {error} (planning without it)")
        return None


def model_shape(config: TrainConfig) -> ModelShape:
    """Shapes for planning and FLOPs, without loading weights; the released model's where only its Hub name is given."""
    if config.model_config:
        return ModelShape.from_config_dict(read_json(config.model_config))
    local = Path(config.model_name_or_path) / "config.json"
    if local.is_file():
        return ModelShape.from_config_dict(read_json(str(local)))
    if Path(config.model_name_or_path).exists() or config.model_name_or_path.startswith((".", "/")):
        raise UserError(f"model_name_or_path: {config.model_name_or_path!r} has no config.json")
    if config.model_name_or_path != HUB_MODEL:
        say(f"plan: {config.model_name_or_path} is planned with the shapes of {HUB_MODEL}")
    return KIMI_LINEAR_48B


def make_plan(config: TrainConfig, shape, processes: int, dataset):
    gpu, memory_gib = found_gpu()
    return run_plan.plan_run(
        config,
        shape,
        num_gpus=processes,
        gpu=gpu,
        gpu_memory_gib=config.gpu_memory_gib or memory_gib,
        host_memory_gib=config.host_memory_gib,
        dataset_tokens=dataset.total_tokens if dataset else None,
    )


def found_gpu() -> tuple[str | None, float | None]:
    """Name and memory in GiB of this machine's GPU, or (None, None)."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
    return properties.name, properties.total_memory / 2**30


def check_data(dataset, config: TrainConfig, model_config) -> None:
    """Refuse data that is too short, or whose ids are not this model's: by vocabulary size, and by the tokenizer's content
    where the model's is at hand."""
    manifest, first = dataset.manifest, config.stages[0].seq_length
    if dataset.total_tokens < first:
        raise UserError(
            f"data_dir: {config.data_dir} holds {dataset.total_tokens:,} tokens, less than one sequence of the first stage "
            f"({first:,}); tokenize more data or shorten the curriculum"
        )
    if manifest.vocab_size > model_config.vocab_size:
        raise UserError(
            f"data_dir: {config.data_dir} was written with tokenizer {manifest.tokenizer_name!r} of "
            f"{manifest.vocab_size} ids, but the model has {model_config.vocab_size}; tokenize with the model's tokenizer"
        )
    if config.model_config:
        return
    from encoders import tokenizer_hash

    try:
        expected = tokenizer_hash(config.model_name_or_path)
    except UserError as error:
        say(f"WARNING: the data's tokenizer cannot be compared with the model's: {error}")
        return
    if expected != manifest.tokenizer_hash:
        raise UserError(
            f"data_dir: {config.data_dir} was written with tokenizer {manifest.tokenizer_name!r} "
            f"(hash {manifest.tokenizer_hash[:12]}), not with that of {config.model_name_or_path} ({expected[:12]}); "
            "tokenize with the model's tokenizer"
        )


def check_disk(config: TrainConfig, shape) -> None:
    """One checkpoint must fit the disk before the run starts; later each save checks again."""
    import checkpointing

    trained = shape.trained_parameters(config.trainable)
    needed = checkpointing.expected_bytes(trained, shape.total_parameters - trained)
    problem = checkpointing.space_problem(config.output_dir, needed)
    if problem and not config.force:
        raise UserError(f"{problem}, or start anyway with --force")


def run_options(config: TrainConfig, schedule, deepspeed_json: str) -> dict:
    """Everything of this run that a checkpoint must agree with, by name."""
    import checkpointing

    return checkpointing.options_of(config, schedule.sequences_per_step, read_json(deepspeed_json))


def find_resume(config: TrainConfig, dataset, schedule, model_config, deepspeed_json: str):
    """(folder, TrainerState) to resume from, or None; refuses a checkpoint of another model, data set or mathematics."""
    import checkpointing

    if not config.resume_from_checkpoint:
        return None
    path = checkpointing.find_checkpoint(config.resume_from_checkpoint, config.output_dir, say=say)
    if path is None:
        if config.replay_step is not None:
            raise UserError(f"replay_step: there is no checkpoint in {config.output_dir} to run it on")
        say(f"resume_from_checkpoint: no checkpoint in {config.output_dir} yet, starting at step 0")
        return None
    state = checkpointing.read_state(path)
    allowed = checkpointing.check_resume(
        state,
        options=run_options(config, schedule, deepspeed_json),
        manifest_hash=dataset.manifest_hash,
        fingerprint=checkpointing.model_fingerprint(model_config),
        allowed=config.allowed_changes,
    )
    for sentence in allowed:
        say(f"WARNING: resume: {sentence}")
    if state.step > config.num_train_steps:
        raise UserError(
            f"resume_from_checkpoint: {path} is at step {state.step}, beyond num_train_steps {config.num_train_steps}"
        )
    done = schedule.step(max(0, state.step - 1))
    position = done.start_token + (done.tokens if state.step else 0)
    if position != state.tokens_seen:
        say(
            f"WARNING: resume: the next step reads from stream token {position:,}, the checkpoint says that it has seen "
            f"{state.tokens_seen:,} (tokens_seen): those between are "
            f"{'skipped' if position > state.tokens_seen else 'read again'}"
        )
    if done.stage_index != state.stage:
        text = f"{path} says stage {state.stage}, the curriculum {done.stage_index} at step {state.step}"
        if "curriculum" not in config.allowed_changes:
            raise UserError(f"resume_from_checkpoint: {text}; trainer_state.json was changed")
        say(f"WARNING: resume: {text}")
    return path, state


def verify_resume(config: TrainConfig, dataset, schedule, model_config, deepspeed_json: str, resume, log: RunLog):
    """Compare every byte of the checkpoint with its checksum, shared out over the ranks; 'latest' falls back to an older one.

    Rank 0 moves a damaged one that 'latest' found aside, so that neither this run nor a restart takes it again.
    """
    from torch.distributed import barrier

    import checkpointing

    while resume:
        path, _ = resume
        reason = checkpointing.verified_by_all_ranks(path)
        if reason is None:
            return resume
        if config.resume_from_checkpoint != "latest":
            raise UserError(f"resume_from_checkpoint: {path} is damaged: {reason}; use 'latest' or another folder")
        log.warn(f"{path} is damaged: {reason}; it is renamed to damaged-{path.name}")
        if log.is_main:
            path.rename(path.with_name(f"damaged-{path.name}"))
        barrier()
        resume = find_resume(config, dataset, schedule, model_config, deepspeed_json)
    raise UserError(f"resume_from_checkpoint: every checkpoint in {config.output_dir} was damaged; see the lines above")


# ---------------------------------------------------------------------------------------------- start-up


def phase_limits(config: TrainConfig, plan, checkpoint_bytes: int) -> watchdog.Limits:
    """How long a phase may take before the run counts as hung: from the planner's slowest micro-step."""
    predicted = [stage.step_seconds / stage.micro_steps for stage in plan.stages if stage.step_seconds]
    return watchdog.derive_limits(
        micro_step_seconds=max(predicted, default=None),
        checkpoint_bytes=checkpoint_bytes,
        hang_timeout_s=60 * config.hang_timeout_minutes,
    )


def start_watchdog(config: TrainConfig, limits: watchdog.Limits, accelerator) -> watchdog.Watchdog:
    """This rank's watchdog, under a name that rank 0 gives to this start of the run."""
    from torch.distributed import broadcast_object_list

    name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]
    broadcast_object_list(name, src=0)
    return watchdog.Watchdog(
        config.output_dir,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        name=name[0],
        limits=limits,
    )


def cap_gpu_memory(config: TrainConfig, device) -> None:
    """Hold the allocator to --gpu_memory_gib, so that a plan for a smaller card is tested for what it claims."""
    import torch

    if config.gpu_memory_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib / total), device)


def write_header(log: RunLog, config: TrainConfig, deepspeed_json: str, accelerator, model_config, dataset) -> None:
    """The log begins with what is needed to read it as evidence: versions, hardware, source, every option."""
    import torch

    from kimi_model import describe_layers

    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    log.line(f"run: commit {git_commit()}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    log.line("versions: " + ", ".join(f"{k} {v}" for k, v in versions(PACKAGES).items()))
    log.line(f"hardware: {accelerator.num_processes} x {name}, host {os.uname().nodename}")
    log.line(
        f"distributed: {accelerator.distributed_type.value}, ZeRO stage {accelerator.deepspeed_plugin.zero_stage}, "
        f"backend {torch.distributed.get_backend()}, {accelerator.num_processes} ranks"
    )
    manifest = dataset.manifest
    log.line(
        f"data: {config.data_dir}, {human_count(dataset.total_tokens)} tokens in {manifest.documents} documents, "
        f"tokenizer {manifest.tokenizer_name}, manifest {dataset.manifest_hash[:12]}"
    )
    log.line(f"model: {config.model_config or config.model_name_or_path}\n{describe_layers(model_config)}")
    if log.is_main:
        path = Path(config.output_dir) / "resolved_config.json"
        resolved = {
            "options": dataclasses.asdict(config),
            "deepspeed": resolve_deepspeed(deepspeed_json, config),
            "model": json.loads(model_config.to_json_string(use_diff=False)),
        }
        path.write_text(mask_secrets(json.dumps(resolved, indent=1)))
        log.line(f"config: every resolved option, DeepSpeed's and the model's in {path}")


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warmup to the peak, then constant, linear to 0 or cosine to 0 at num_train_steps. Pure function of step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.num_train_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def install_engine(model, config: TrainConfig, plan, dataset, log: RunLog) -> None:
    """The tiled engine by default; the plain transformers forward when asked for."""
    from kimi_model import gather_whole_layers, install_long_sequence

    if config.engine == "reference":
        log.line("engine: reference (transformers' own forward; memory grows with tokens x vocabulary)")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gather_whole_layers(model)
        return

    chosen = plan.engine
    report = install_long_sequence(
        model,
        segment_tokens=config.segment_tokens or chosen.segment_tokens,
        heads_per_group=config.heads_per_group or chosen.heads_per_group,
        token_tile=config.token_tile or chosen.token_tile,
        offload=config.offload if config.offload != "auto" else chosen.offload,
        attention_outputs=(
            config.attention_outputs if config.attention_outputs != "auto" else chosen.attention_outputs
        ),
        attention_backend=config.attention_backend,
        document_separator_id=dataset.manifest.eos_token_id if config.document_mask else None,
        gpu_budget_gib=chosen.gpu_budget_gib,
        reserve_tokens=config.per_device_train_batch_size * max(stage.seq_length for stage in config.stages),
    )
    log.line(f"engine: {report}")


# ---------------------------------------------------------------------------------------------- training


def train(config: TrainConfig, deepspeed_json: str, dataset, schedule, shape, plan, model_config, resume) -> int:
    """Processes, watchdog, log; then the model, then the loop. Returns the exit code."""
    import checkpointing

    trained = shape.trained_parameters(config.trainable)
    needed = checkpointing.expected_bytes(trained, shape.total_parameters - trained)
    limits = phase_limits(config, plan, needed)
    accelerator = start_accelerator(config, deepspeed_json, collective_timeout_s=limits.collective_s)
    rank, device = accelerator.process_index, accelerator.device
    cap_gpu_memory(config, device)
    log = RunLog(config.output_dir, rank=rank)
    with start_watchdog(config, limits, accelerator) as watch:
        write_header(log, config, deepspeed_json, accelerator, model_config, dataset)
        if resume:
            resume = verify_resume(config, dataset, schedule, model_config, deepspeed_json, resume, log)
        loader = data_loader.WindowLoader(dataset, schedule, seed=config.seed, rank=rank)
        if config.replay_step is None:
            loader.begin(resume[1].step if resume else 0)
        profiler = PhaseProfiler()
        with profiler.phase("load"):
            engine, fp32 = build(config, deepspeed_json, dataset, plan, model_config, accelerator, resume, log)
        loaded = run_plan.phases_text(profiler.peaks)
        log.line(f"model and optimizer ready in {profiler.peaks['load'].seconds:.1f} s; {loaded}")
        progress = Progress()
        guard = StepGuard(norm_factor=config.spike_factor, loss_factor=config.loss_spike_factor)
        if resume:
            path, state = resume
            progress = Progress(state.step, state.tokens_seen, state.skipped_in_a_row, state.skipped_total)
            guard.losses.extend(state.recent_losses)
            guard.norms.extend(state.recent_norms)
            log.line(f"resumed from {path}: step {progress.step}, {human_count(progress.tokens_seen)} tokens seen")
        if config.replay_step is not None:
            from replay import replay_step

            replay_step(
                engine, fp32, loader, schedule, config.replay_step, seed=config.seed, enter=watch.enter, log=log
            )
            exit_code = 0
        else:
            guard.install(engine.optimizer)
            saver = checkpointing.Saver(engine, fp32, config=config, model_config=model_config, needed=needed, log=log)
            facts = {
                "world_size": accelerator.num_processes,
                "manifest_hash": dataset.manifest_hash,
                "model_fingerprint": checkpointing.model_fingerprint(model_config),
                "model": config.model_config or config.model_name_or_path,
                "tokenizer": dataset.manifest.tokenizer_name,
                "options": run_options(config, schedule, deepspeed_json),
                "versions": versions(PACKAGES),
            }
            log.start_wandb(
                project=config.wandb_project,
                name=config.wandb_run_name,
                mode=config.wandb_mode,
                config=dataclasses.asdict(config),
            )
            log.line(f"stop: 'kill -TERM {os.getpid()}' or Ctrl-C ends the run after its micro-step, with a checkpoint")
            end = min(config.num_train_steps, config.stop_after_steps or config.num_train_steps)
            ranks, gpu = accelerator.num_processes, found_gpu()[0]
            meter = Meter(shape, config.trainable, schedule, profiler, device, ranks, end, gpu)
            run = Run(watch, profiler, StopSignal(device), saver, guard)
            try:
                exit_code = loop(engine, fp32, loader, schedule, config, plan, progress, meter, run, facts, log)
            except checkpointing.SaveError as error:
                log.warn(f"{error}; every complete checkpoint stays, the run ends")
                raise UserError(
                    f"output_dir: {error}; every complete checkpoint stays: make room, or give another --output_dir and name "
                    "the checkpoint, then go on with --resume_from_checkpoint"
                ) from None
        loader.close()
        watch.enter("end")
        log.close()
        accelerator.end_training()
    return exit_code


def build(config: TrainConfig, deepspeed_json: str, dataset, plan, model_config, accelerator, resume, log: RunLog):
    """(DeepSpeed engine, optimizer of the fp32 parameters), with a checkpoint's state if there is one to resume from."""
    import checkpointing
    import kimi_model

    device = accelerator.device
    model = kimi_model.load_model(config, model_config, device=device)
    source = None if config.model_config else config.model_name_or_path
    fp32_leaves, fp32_buffers = kimi_model.take_fp32(model, checkpoint=source, device=device)
    kimi_model.set_trainable(model, config.trainable)
    install_engine(model, config, plan, dataset, log)
    optimizer = make_optimizer(model, config, deepspeed_json, log)
    engine, _ = accelerator.prepare(model, optimizer)
    kimi_model.restore_fp32_buffers(engine.module, fp32_buffers)
    fp32 = kimi_model.Fp32Optimizer(fp32_leaves, fp32_buffers, config)
    if resume:
        checkpointing.load_checkpoint(engine, fp32, *resume, log=log)
    return engine, fp32


def loop(engine, fp32, loader, schedule, config: TrainConfig, plan, progress, meter, run, facts: dict, log) -> int:
    """Optimizer steps from `progress.step` on, with checkpoints. Returns the exit code."""
    import torch

    import checkpointing

    def state():
        return checkpointing.TrainerState(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            stage=schedule.step(max(0, progress.step - 1)).stage_index,
            skipped_in_a_row=progress.skipped_in_a_row,
            skipped_total=progress.skipped_total,
            recent_losses=list(run.guard.losses),
            recent_norms=list(run.guard.norms),
            **facts,
        )

    saved_at = progress.step if progress.step else None
    exit_code = 0
    while progress.step < meter.end and not run.stop.requested:
        step_plan = schedule.step(progress.step)
        if meter.stage not in (None, step_plan.stage_index):
            log.line(meter.predicted_beside_measured(plan))
        torch.manual_seed(config.seed + progress.step)
        learning_rate = learning_rate_at(progress.step, config)
        run.begin(progress.step, first_of_length=meter.stage != step_plan.stage_index)
        meter.start()
        result = train_step(engine, fp32, loader, step_plan, learning_rate, config, run)
        if result is None:  # stopped inside the step: its gradients are dropped, the resumed run does it again
            break
        progress.advance(step_plan, skipped=bool(result.skipped))
        record = meter.finish(step_plan, result, learning_rate)
        log.metrics({**record, "tokens_seen": progress.tokens_seen})
        if result.skipped:
            log.warn(
                f"step {step_plan.step} skipped on all ranks ({result.skipped}): loss {result.loss}, gradient norm "
                f"{result.grad_norm} (stream tokens {step_plan.start_token} to "
                f"{step_plan.start_token + step_plan.tokens}); {progress.skipped_in_a_row} in a row; look at it with "
                f"--resume_from_checkpoint latest --replay_step {step_plan.step}"
            )
        if progress.step % config.logging_steps == 0 or progress.step == meter.end:
            log.line(meter.text(record))
        if progress.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            log.warn(
                f"{MAX_SKIPS_IN_A_ROW} steps in a row had a non-finite loss or gradient, or a spike: checkpoint, then exit 3"
            )
            exit_code = 3
            break
        if progress.step % config.save_steps == 0 and progress.step < meter.end:
            with run.phase("save"):
                run.saver.start(state())
                if not config.background_save:
                    run.saver.finish()
            saved_at = progress.step
    if meter.stage is not None:
        log.line(meter.predicted_beside_measured(plan))
    if run.stop.requested:
        log.line(f"stopped by {run.stop.name} after step {progress.step}; resume with --resume_from_checkpoint latest")
    with run.phase("save"):
        run.saver.finish()
        if saved_at != progress.step:
            run.saver.save(state())
        run.saver.close()
    log.line(f"done: {progress.step} of {config.num_train_steps} steps, {human_count(progress.tokens_seen)} tokens")
    return exit_code


@dataclasses.dataclass
class Progress:
    """Where the run is: `step` optimizer steps are done (skipped ones count, their tokens too)."""

    step: int = 0
    tokens_seen: int = 0
    skipped_in_a_row: int = 0
    skipped_total: int = 0

    def advance(self, step_plan, *, skipped: bool) -> None:
        self.step += 1
        self.tokens_seen += step_plan.tokens
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_total += int(skipped)


@dataclasses.dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    skipped: str | None  # why the step changed nothing, or None


class StopSignal:
    """SIGTERM or Ctrl-C on any rank stops all ranks at the same micro-step."""

    def __init__(self, device):
        self.device, self.requested, self.name, self._local = device, False, "a signal", False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        self._local, self.name = True, signal.Signals(number).name

    def agree(self, *, writing: bool) -> tuple[bool, bool]:
        """(any rank was asked to stop, any rank is still `writing`); every rank calls it once a micro-step."""
        import torch

        flags = torch.tensor([float(self._local), float(writing)], device=self.device)
        torch.distributed.all_reduce(flags)
        stop, any_writing = (bool(flag) for flag in flags.tolist())
        self.requested = stop
        return stop, any_writing


@dataclasses.dataclass
class Run:
    """What watches over a step: who must know its phase, what may stop it, what is being saved meanwhile."""

    watch: watchdog.Watchdog
    profiler: PhaseProfiler
    stop: StopSignal
    saver: object
    guard: StepGuard
    step: int = 0
    first_of_length: bool = False

    def begin(self, step: int, *, first_of_length: bool) -> None:
        self.step, self.first_of_length = step, first_of_length

    def enter(self, phase: str, micro_step: int | None = None) -> None:
        self.watch.enter(phase, step=self.step, micro_step=micro_step, first=self.first_of_length)

    @contextlib.contextmanager
    def phase(self, name: str, micro_step: int | None = None):
        self.enter(name, micro_step)
        with self.profiler.phase(name):
            yield

    def between_micro_steps(self) -> bool:
        """Complete a checkpoint that all ranks have written by now. Whether the run is to stop."""
        stop, any_writing = self.stop.agree(writing=self.saver.writing)
        if self.saver.active and not any_writing:
            self.finish_save()
        return stop

    def finish_save(self) -> None:
        if self.saver.active:
            with self.phase("save"):
                self.saver.finish()


def train_step(
    engine, fp32, loader, step_plan, learning_rate: float, config: TrainConfig, run: Run
) -> StepResult | None:
    """One optimizer step over `step_plan.accumulation_steps` micro-steps; None if a stop was asked for inside it.

    The loss of a step is the mean over its sequences on all ranks. A non-finite gradient anywhere makes the global norm
    non-finite on every rank, and DeepSpeed drops the step; a non-finite loss and a spike are made to do the same.
    """
    import torch

    device = engine.device
    fp32.zero_grad()
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(step_plan.accumulation_steps):
        run.enter("data", micro_step)
        input_ids = torch.from_numpy(loader.micro_batch(step_plan.step, micro_step)).to(device)
        # Told before the forward, since ZeRO-3 copies gradients to the host only at the boundary
        engine.set_gradient_accumulation_boundary(micro_step == step_plan.accumulation_steps - 1)
        with run.phase("forward", micro_step):
            loss = engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss / step_plan.accumulation_steps
        loss_sum += loss.detach()
        if not torch.isfinite(loss):
            loss = loss * float("nan")
        with run.phase("backward", micro_step):
            engine.backward(loss, scale_wrt_gas=False)
        if run.between_micro_steps():
            return None
    run.finish_save()  # the update below changes what is being written
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    with run.phase("optimizer"):
        fp32.reduce_gradients()
        torch.distributed.all_reduce(loss_sum)
        run.guard.loss = (loss_sum / torch.distributed.get_world_size()).item()
        engine.step()
        skipped = run.guard.reason if engine.optimizer.overflow else None
        if not skipped:
            clip = config.max_grad_norm
            factor = min(1.0, clip / (run.guard.norm + 1e-6)) if clip > 0 else 1.0
            fp32.step(lr=learning_rate, clip_factor=factor)
            run.guard.accept()
    return StepResult(run.guard.loss, run.guard.norm, skipped)


if __name__ == "__main__":
    run_main(main)
