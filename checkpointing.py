"""Checkpoints that are whole or not there: save under a temporary name, verify, rename; find, check and load again.

    save_checkpoint(engine, fp32, state, config=config)      # every rank calls; OUTPUT_DIR/checkpoint-step500
    path = find_checkpoint("latest", output_dir)             # newest complete one, says which it skipped and why
    state = load_checkpoint(engine, fp32, path, ...)

A checkpoint folder holds DeepSpeed's own shards (`zero/`), `fp32.safetensors` (the decay parameters and their moments),
`config.json` of the model, `trainer_state.json`, and `files.json`, written last: every file's size and SHA-256.
A folder without a `files.json` that matches is not a checkpoint. `latest` (a text file with the folder's name) moves
after the rename. No learning-rate, loader or random state is saved: each is a pure function of (config, step).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from config import TrainConfig, UserError

NAME = re.compile(r"checkpoint-step(\d+)$")
TEMPORARY = ".writing-"
# Options that decide what is computed: a resumed run must have the same
MATHEMATICS = (
    "curriculum per_device_train_batch_size gradient_accumulation_steps tokens_per_step learning_rate warmup_steps "
    "lr_scheduler_type num_train_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed bf16 "
    "trainable document_mask"
).split()


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint says about the run. `step` optimizer steps are done; the next one is number `step`."""

    step: int
    tokens_seen: int
    stage: int
    skipped_in_a_row: int
    skipped_total: int
    world_size: int
    manifest_hash: str
    model_fingerprint: str
    options: dict
    versions: dict


def model_fingerprint(model_config) -> str:
    """SHA-256 over the shape-giving values of the model's config: two models with equal ones can swap checkpoints."""
    values = model_config.to_dict()
    for changing in (
        "max_position_embeddings model_max_length use_cache transformers_version _name_or_path dtype torch_dtype "
        "architectures"
    ).split():
        values.pop(changing, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def checkpoint_name(step: int) -> str:
    return f"checkpoint-step{step}"


# ---------------------------------------------------------------------------------------------- writing


def save_checkpoint(engine, fp32, state: TrainerState, *, config: TrainConfig, model_config, log) -> Path:
    """Write OUTPUT_DIR/checkpoint-stepN; every rank calls it and returns when the checkpoint is complete.

    `engine`: DeepSpeed engine (ZeRO-3); `fp32`: kimi_model.Fp32Optimizer. All ranks must see one file system.
    Raises OSError if the disk is full; the temporary folder is then left for inspection and the last checkpoint stays.
    """
    import torch.distributed as dist
    from safetensors.torch import save_file

    started = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = Path(config.output_dir) / checkpoint_name(state.step)
    working = final.with_name(TEMPORARY + final.name)
    if rank == 0:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(working), tag="zero", save_latest=False)
    if rank == 0:
        save_file(fp32.state(), str(working / "fp32.safetensors"))
        model_config.to_json_file(str(working / "config.json"), use_diff=False)
        (working / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
    dist.barrier()
    # Hashing and fsync are shared out: at 49 B parameters they read 0.6 TB
    files = _files_of(working)
    mine = {name: _fsynced_record(working / name) for name in files[rank::world_size]}
    records: list = [None] * world_size
    dist.all_gather_object(records, mine)
    if rank == 0:
        merged = {name: record for part in records for name, record in sorted(part.items())}
        _write_synced(working / "files.json", json.dumps(merged, indent=1))
        for folder in {working, *(path.parent for path in map(working.joinpath, files))}:
            _fsync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        os.rename(working, final)
        _write_synced(final.parent / ".latest.writing", final.name + "\n")
        os.rename(final.parent / ".latest.writing", final.parent / "latest")
        _fsync_folder(final.parent)
        _retain(final.parent, config.save_total_limit, log)
    dist.barrier()
    gib = sum(record["bytes"] for part in records for record in part.values()) / 2**30
    log.line(f"saved {final} ({gib:.2f} GiB in {time.perf_counter() - started:.1f} s)")
    return final


def _files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "files.json")


def _fsynced_record(path: Path) -> dict:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _retain(output_dir: Path, limit: int, log) -> None:
    """Delete the oldest complete checkpoints beyond `limit` (0 keeps all); incomplete folders are left alone."""
    complete = [path for path in list_checkpoints(output_dir) if incomplete_reason(path) is None]
    for path in complete[limit:] if limit else []:
        shutil.rmtree(path)
        log.line(f"deleted {path} (save_total_limit {limit})")


# ---------------------------------------------------------------------------------------------- finding and checking


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-stepN folders of `output_dir`, newest (highest step) first."""
    folder = Path(output_dir)
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-step*") if (match := NAME.search(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def incomplete_reason(path: Path, *, checksums: bool = False) -> str | None:
    """Why `path` is not a complete checkpoint, or None if it is. Sizes always, contents with `checksums`."""
    try:
        records = json.loads((path / "files.json").read_text())
    except FileNotFoundError:
        return "it has no files.json, so its writing was cut off"
    except (OSError, ValueError) as error:
        return f"files.json cannot be read ({error})"
    for name, record in records.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != record["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, files.json says {record['bytes']}"
        if checksums:
            with open(file, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != record["sha256"]:
                    return f"{name} does not match its checksum"
    return None


def find_checkpoint(wanted: str, output_dir: str, *, log) -> Path | None:
    """The folder to resume from. 'latest': the newest complete one in `output_dir`, None if there is none at all.

    Raises UserError for a named folder that is missing or incomplete, and when every checkpoint there is is incomplete.
    """
    if wanted != "latest":
        path = Path(wanted)
        if not path.is_dir():
            raise UserError(
                f"resume_from_checkpoint: folder {wanted!r} does not exist; "
                f"in {output_dir} there are: {', '.join(p.name for p in list_checkpoints(output_dir)) or 'none'}"
            )
        reason = incomplete_reason(path)
        if reason:
            raise UserError(f"resume_from_checkpoint: {wanted} is incomplete: {reason}; use 'latest' or another folder")
        return path
    candidates = list_checkpoints(output_dir)
    for path in candidates:
        reason = incomplete_reason(path)
        if reason is None:
            return path
        log.warn(f"skipping {path}: {reason}")
    if candidates:
        raise UserError(
            f"resume_from_checkpoint: no complete checkpoint in {output_dir}; {len(candidates)} are damaged"
        )
    return None


def read_state(path: Path) -> TrainerState:
    """The checkpoint's trainer_state.json. Raises UserError with the file's name if it is not one of ours."""
    file = path / "trainer_state.json"
    try:
        return TrainerState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"resume_from_checkpoint: {file} cannot be read ({error})") from None


def options_of(config: TrainConfig) -> dict:
    """The options that decide the mathematics, for trainer_state.json."""
    return {name: getattr(config, name) for name in MATHEMATICS}


def check_resume(state: TrainerState, *, config: TrainConfig, manifest_hash: str, fingerprint: str, world_size: int):
    """Raise one UserError that names everything in which the checkpoint and this run differ."""
    problems = []
    if state.model_fingerprint != fingerprint:
        problems.append("the checkpoint is of another model (its config.json differs from this run's)")
    if state.manifest_hash != manifest_hash:
        problems.append(
            f"the checkpoint was trained on another data set (manifest {state.manifest_hash[:12]}, "
            f"now {manifest_hash[:12]}); give the --data_dir it was started with"
        )
    if state.world_size != world_size:
        problems.append(f"the checkpoint was written by {state.world_size} processes, this run has {world_size}")
    for name, value in options_of(config).items():
        if name in state.options and state.options[name] != value:
            problems.append(f"{name}: the checkpoint has {state.options[name]!r}, this run {value!r}")
    if problems:
        raise UserError("\n".join(f"resume_from_checkpoint: {problem}" for problem in problems))


def load_checkpoint(engine, fp32, path: Path) -> None:
    """Load model, optimizer and fp32 parameters from a complete checkpoint; every rank calls it."""
    from safetensors.torch import load_file

    loaded, _ = engine.load_checkpoint(str(path), tag="zero", load_lr_scheduler_states=False)
    if loaded is None:
        raise UserError(f"resume_from_checkpoint: DeepSpeed found no shards in {path / 'zero'}")
    fp32.load_state(load_file(str(path / "fp32.safetensors")))
