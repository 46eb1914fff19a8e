"""Checkpoints that are whole or not there: save under a temporary name, verify, rename; find, check, load, export.

    python checkpointing.py --verify ./checkpoints/run/checkpoint-step500           # every byte against its checksum
    python checkpointing.py --export ./checkpoints/run/checkpoint-step500 ./model   # the Hub's own layout

    save_checkpoint(engine, fp32, state, config=config)      # every rank calls; OUTPUT_DIR/checkpoint-step500
    path = find_checkpoint("latest", output_dir)             # newest complete one, says which it skipped and why
    state = load_checkpoint(engine, fp32, path, ...)

A checkpoint folder holds DeepSpeed's own shards (`zero/`), `fp32.safetensors` (the decay parameters and their moments),
`config.json` of the model, `trainer_state.json`, and `files.json`, written last: every file's size and SHA-256.
A folder without a `files.json` that matches is not a checkpoint. `latest` (a text file with the folder's name) moves
after the rename. No learning-rate, loader or random state is saved: each is a pure function of (config, step).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import TrainConfig, UserError, run_main
from run_log import human_count, say

NAME = re.compile(r"checkpoint-step(\d+)$")
TEMPORARY = ".writing-"
# Options that decide what is computed: a resumed run must have the same
MATHEMATICS = (
    "curriculum learning_rate warmup_steps lr_scheduler_type num_train_steps weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm seed bf16 trainable document_mask"
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
    model: str
    tokenizer: str
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


def expected_bytes(trained: int, frozen: int) -> int:
    """About what a checkpoint takes: fp32 master weights and two moments of the trained parameters, frozen ones in bf16."""
    return 12 * trained + 2 * frozen


def space_problem(output_dir: str, needed: int) -> str | None:
    """A sentence if the disk of `output_dir` (which may not exist yet) has not `needed` bytes free, else None."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"output_dir: a checkpoint takes about {needed / 2**30:.1f} GiB but {folder} has {free / 2**30:.1f} GiB free; "
        "give another --output_dir or a lower --save_total_limit"
    )


def save_checkpoint(engine, fp32, state: TrainerState, *, config: TrainConfig, model_config, needed: int, log) -> Path:
    """Write OUTPUT_DIR/checkpoint-stepN; every rank calls it and returns when the checkpoint is complete.

    `engine`: DeepSpeed engine (ZeRO-3); `fp32`: kimi_model.Fp32Optimizer; `needed`: see `expected_bytes`. All ranks must
    see one file system. Raises OSError on every rank, before a byte is written, if the disk is too full; if it fills up
    all the same, the temporary folder goes at the next save. Either way every complete checkpoint stays.
    """
    import torch.distributed as dist
    from safetensors.torch import save_file

    started = time.perf_counter()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = Path(config.output_dir) / checkpoint_name(state.step)
    working = final.with_name(TEMPORARY + final.name)
    problem = [None]
    if rank == 0:
        for stale in final.parent.glob(f"{TEMPORARY}*"):  # of a save that was cut off
            shutil.rmtree(stale)
        problem = [space_problem(config.output_dir, needed)]
        if not problem[0]:
            working.mkdir(parents=True)
    dist.broadcast_object_list(problem, src=0)  # ranks fail together
    if problem[0]:
        raise OSError(f"step {state.step} is not saved: {problem[0]}")
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
        replaced = final.with_name(f"{TEMPORARY}replaced-{final.name}")
        if final.exists():  # moved aside, since deleting takes long and a kill inside it would leave neither
            os.rename(final, replaced)
        os.rename(working, final)
        shutil.rmtree(replaced, ignore_errors=True)
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


def find_checkpoint(wanted: str, output_dir: str, *, say=say) -> Path | None:
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
        say(f"WARNING: skipping {path}: {reason}")
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


def options_of(config: TrainConfig, sequences_per_step: list[int]) -> dict:
    """What decides the mathematics, for trainer_state.json. Batch, accumulation and processes count only in the number
    of sequences of a step (one number a stage): how they are shared out changes nothing but the order of sums."""
    return {**{name: getattr(config, name) for name in MATHEMATICS}, "sequences_per_step": sequences_per_step}


def check_resume(state: TrainerState, *, options: dict, manifest_hash: str, fingerprint: str) -> None:
    """Raise one UserError that names everything in which the checkpoint and this run differ."""
    problems = []
    if state.model_fingerprint != fingerprint:
        problems.append("the checkpoint is of another model (its config.json differs from this run's)")
    if state.manifest_hash != manifest_hash:
        problems.append(
            f"the checkpoint was trained on another data set (manifest {state.manifest_hash[:12]}, "
            f"now {manifest_hash[:12]}); give the --data_dir it was started with"
        )
    for name, value in options.items():
        if name in state.options and state.options[name] != value:
            problems.append(f"{name}: the checkpoint has {state.options[name]!r}, this run {value!r}")
    if problems:
        raise UserError("\n".join(f"resume_from_checkpoint: {problem}" for problem in problems))


def load_checkpoint(engine, fp32, path: Path, state: TrainerState, *, log) -> None:
    """Load model, optimizer and fp32 parameters from a complete checkpoint; every rank calls it.

    For another number of processes than wrote it, DeepSpeed's universal checkpoint is made beside it first (the size of
    the checkpoint again, deleted after loading).
    """
    import torch.distributed as dist
    from safetensors.torch import load_file

    # DeepSpeed's universal load gives every parameter group the first one's values
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    universal = path.with_name(f"{TEMPORARY}universal-{path.name}")
    other_world = state.world_size != dist.get_world_size()
    if other_world:
        log.line(
            f"resume: {path.name} was written by {state.world_size} processes, converting for {dist.get_world_size()}"
        )
        if dist.get_rank() == 0:
            _convert_to_universal(path / "zero", universal / "zero")
        dist.barrier()
        engine._config.load_universal_checkpoint = True
    loaded, _ = engine.load_checkpoint(
        str(universal if other_world else path), tag="zero", load_lr_scheduler_states=False
    )
    if loaded is None:
        raise UserError(f"resume_from_checkpoint: DeepSpeed found no shards in {path / 'zero'}")
    for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    if other_world:
        engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(universal)
    fp32.load_state(load_file(str(path / "fp32.safetensors")))


def _convert_to_universal(zero_folder: Path, output: Path) -> None:
    """Run DeepSpeed's own converter in a process of its own (it starts worker processes)."""
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir(parents=True)
    words = ["--input_folder", str(zero_folder), "--output_folder", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise OSError(f"{zero_folder}: converting for another number of processes failed:\n{done.stderr[-2000:]}")


# ---------------------------------------------------------------------------------------------- export

SHARD_BYTES = 4_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json tiktoken.model vocab.json merges.txt "
    "tokenization_kimi.py chat_template.jinja generation_config.json"
).split()


def export(checkpoint: Path, output: Path, *, tokenizer: str | None = None) -> None:
    """Write the checkpoint's weights as a model folder in the Hub's own layout, which `from_pretrained` loads.

    Weights are read tensor by tensor from DeepSpeed's memory-mapped fp32 master copies and written in the run's dtype
    (what was fp32 in the released model stays fp32), so host memory holds about one shard of 4 GB. The folder appears
    under its name when all of it is written and read back. Raises UserError if the checkpoint is damaged or the output
    exists.
    """
    reason = incomplete_reason(checkpoint, checksums=True)
    if reason:
        raise UserError(f"export: {checkpoint} cannot be exported: {reason}")
    if output.exists():
        raise UserError(f"export: {output} exists already; give a new folder")
    state = read_state(checkpoint)
    working = output.with_name(TEMPORARY + output.name)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    count = _write_shards(working, _hub_state(checkpoint, bf16=state.options["bf16"]))
    _write_config(checkpoint, working, bf16=state.options["bf16"])
    copied = _copy_tokenizer(tokenizer or state.tokenizer, working)
    (working / "README.md").write_text(_model_card(state, count))
    _read_back(working)
    for file in working.iterdir():
        _fsynced_record(file)
    os.rename(working, output)
    _fsync_folder(output.parent)
    say(f"{output}: {human_count(count)} parameters of step {state.step}, tokenizer: {copied}")


def _hub_state(checkpoint: Path, *, bf16: bool):
    """(name, tensor) of every weight under the released model's names, one at a time."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    from kimi_model import FP32_BUFFERS, hub_fp32_name, hub_tensors

    dtype = torch.bfloat16 if bf16 else torch.float32
    lazy = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="zero", lazy_mode=True)
    for name, tensor in lazy.items():
        if not name.endswith(FP32_BUFFERS):  # kept exactly in fp32.safetensors
            for hub_name, part in hub_tensors(name, tensor.contiguous().to(dtype)):
                yield hub_name, part.contiguous()
    for key, tensor in load_file(str(checkpoint / "fp32.safetensors")).items():
        if key.endswith(".value"):
            yield hub_fp32_name(key.removesuffix(".value")), tensor


def _write_shards(folder: Path, tensors) -> int:
    """Safetensors files of at most SHARD_BYTES and their index, under the Hub's names. Returns the parameter count."""
    from safetensors.torch import save_file

    files: list[list[str]] = []
    shard: dict = {}
    size = total = count = 0

    def close_shard():
        save_file(shard, str(folder / f"shard-{len(files)}"), metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > SHARD_BYTES:
            close_shard()
            size = 0
        shard[name] = tensor.clone()  # a slice of a big tensor would keep all of it in memory
        size += nbytes
        total += nbytes
        count += tensor.numel()
    close_shard()
    weight_map = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(folder / f"shard-{number}", folder / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return count


def _write_config(checkpoint: Path, folder: Path, *, bf16: bool) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    values["architectures"] = ["KimiLinearForCausalLM"]
    values["dtype"] = "bfloat16" if bf16 else "float32"
    values["use_cache"] = True
    values.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def _copy_tokenizer(name: str, folder: Path) -> str:
    """Tokenizer and generation config from the folder (or Hub cache) that the data was tokenized with."""
    from encoders import tokenizer_folder

    try:
        source = tokenizer_folder(name)
    except UserError as error:
        return f"not copied ({error}); give --tokenizer FOLDER"
    found = [file for file in TOKENIZER_FILES if (source / file).is_file()]
    for file in found:
        shutil.copyfile(source / file, folder / file)
    return f"{len(found)} files of {name}"


def _model_card(state: TrainerState, count: int) -> str:
    options = "\n".join(f"| {name} | {value} |" for name, value in state.options.items())
    versions = ", ".join(f"{name} {version}" for name, version in state.versions.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# Continually pretrained Kimi-Linear, step {state.step}\n\n"
        f"{human_count(count)} parameters, started from `{state.model}`, trained on {state.tokens_seen:,} tokens "
        f"({state.skipped_total} steps skipped) of the data set with manifest `{state.manifest_hash}`, tokenizer "
        f"`{state.tokenizer}`, by {state.world_size} processes.\n\n"
        f"| option | value |\n|---|---|\n{options}\n\nVersions: {versions}\n"
    )


def _read_back(folder: Path) -> None:
    """Open every shard again and compare names and sizes with the index, before the folder gets its name."""
    from safetensors import safe_open

    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file.name))
    if found != weight_map:
        raise OSError(f"{folder}: the shards read back do not hold what the index names")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a checkpoint, or export it as a model in the Hub's layout.")
    parser.add_argument("--verify", metavar="CHECKPOINT", help="compare every file with its size and checksum")
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "DIR"), help="write a model folder")
    parser.add_argument("--tokenizer", help="with --export: the tokenizer folder to copy (default: the data's)")
    arguments = parser.parse_args()
    if not arguments.verify and not arguments.export:
        parser.error("give --verify CHECKPOINT or --export CHECKPOINT DIR")
    if arguments.verify:
        path = Path(arguments.verify)
        reason = incomplete_reason(path, checksums=True) if path.is_dir() else "the folder does not exist"
        if reason:
            raise UserError(f"verify: {path} is no complete checkpoint: {reason}")
        say(f"{path}: complete, every file matches its checksum (step {read_state(path).step})")
    if arguments.export:
        export(Path(arguments.export[0]), Path(arguments.export[1]), tokenizer=arguments.tokenizer)
    return 0


if __name__ == "__main__":
    run_main(main)
