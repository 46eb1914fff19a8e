"""Checkpoints that are whole or not there: save under a temporary name, verify, rename; find, check, load, export.

    python checkpointing.py --verify_checkpoint ./checkpoints/run/checkpoint-step500   # every byte against its checksum
    python checkpointing.py --export ./checkpoints/run/checkpoint-step500 ./model   # the Hub's own layout

    saver = Saver(engine, fp32, config=config, ...)          # on every rank
    saver.start(state); ...; saver.finish()                  # OUTPUT_DIR/checkpoint-step500, written while training goes on
    path = find_checkpoint("latest", output_dir)             # newest complete one, says which it skipped and why
    load_checkpoint(engine, fp32, path, read_state(path), log=log)

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
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from config import MATHEMATICS, TrainConfig, UserError, read_json, run_main, unknown_key
from durable_files import fsync_path, write_file_durably
from hashed_files import chunks_sha256
from run_log import human_count, say
from step_guard import WINDOW

NAME = re.compile(r"checkpoint-step(\d+)$")
TEMPORARY = ".writing-"
SMALL_BYTES = 64 * 2**20  # files below are hashed by whoever looks at a checkpoint: 0.04 s
REQUIRED = ("trainer_state.json", "config.json", "fp32.safetensors")


class SaveError(OSError):
    """A checkpoint could not be written; raised on every rank. Every complete checkpoint is as it was."""


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
    # Of the last accepted steps, oldest first: what the spike rule compares with (step_guard.py)
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)


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


class Saver:
    """Writes OUTPUT_DIR/checkpoint-stepN while training goes on; every rank makes one and calls it in the same order.

        saver.start(state)          # returns when everything to be written is known: milliseconds
        ...forward, backward...     # a thread per rank writes meanwhile (shard_files.py)
        saver.finish()              # before the optimizer's next step: waits, then files.json, rename, `latest`

    Nothing is copied but the buffers and the fp32 leaves (kilobytes): what is written changes in the optimizer's step only.
    In the main thread because they are collectives: DeepSpeed's gathering of persistent parameters and the agreement of all
    ranks. `needed`: see `expected_bytes`. All ranks must see one file system. SaveError is raised on every rank, by `start`
    if the disk is too full and by `finish` if writing failed; every complete checkpoint stays.
    """

    def __init__(self, engine, fp32, *, config: TrainConfig, model_config, needed: int, log):
        from shard_files import ShardFiles

        self.engine, self.fp32, self.config, self.model_config = engine, fp32, config, model_config
        self.needed, self.log = needed, log
        self.shards = engine.checkpoint_engine = ShardFiles()
        self.state: TrainerState | None = None
        self.waited_s = 0.0
        self._deleting: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """A save was started and not finished; the same on all ranks."""
        return self.state is not None

    @property
    def writing(self) -> bool:
        """This rank's thread has not written everything yet."""
        return self.shards.writing

    def start(self, state: TrainerState) -> None:
        import torch.distributed as dist
        from safetensors.torch import save

        self.finish()
        self._started = time.perf_counter()
        self.final = Path(self.config.output_dir) / checkpoint_name(state.step)
        self.working = self.final.with_name(TEMPORARY + self.final.name)
        _on_rank_0(self._prepare, f"step {state.step} is not saved")
        self.state = state
        self.engine.save_checkpoint(str(self.working), tag="zero", save_latest=False)
        if dist.get_rank() == 0:
            self.shards.add(self.working / "fp32.safetensors", save(self.fp32.state()))
            self.shards.add(self.working / "config.json", self.model_config.to_json_string(use_diff=False).encode())
            text = json.dumps(dataclasses.asdict(state), indent=1)
            self.shards.add(self.working / "trainer_state.json", text.encode())
        self.shards.start()
        self.waited_s = time.perf_counter() - self._started

    def finish(self) -> None:
        """Complete the save that was started, if one was; returns when the checkpoint has its name."""
        import torch.distributed as dist

        if not self.active:
            return
        waiting, step = time.perf_counter(), self.state.step
        self.state = None
        records, problem = {}, None
        try:
            found = self.shards.join()
            records = {str(path.relative_to(self.working)): record for path, record in found.items()}
        except OSError as error:
            problem = f"rank {dist.get_rank()}: {error}"
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (records, problem))  # also: all ranks have written
        problems = "; ".join(problem for _, problem in gathered if problem)
        merged = {name: record for part, _ in gathered for name, record in part.items()}
        _on_rank_0(lambda: self._publish(merged, problems), f"step {step} is not saved")
        gib = sum(record["bytes"] for record in merged.values()) / 2**30
        self.waited_s += time.perf_counter() - waiting
        self.log.line(
            f"saved {self.final} ({gib:.2f} GiB in {time.perf_counter() - self._started:.1f} s, "
            f"training waited {self.waited_s:.1f} s)"
        )

    def save(self, state: TrainerState) -> None:
        """Start and finish at once: a stop or the end of the run has no next step to hide behind."""
        self.start(state)
        self.finish()

    def close(self) -> None:
        """Finish what was started; wait for deletions."""
        self.finish()
        if self._deleting:
            self._deleting.join()

    def _prepare(self) -> None:
        if self._deleting:
            self._deleting.join()
        for stale in self.final.parent.glob(f"{TEMPORARY}*"):  # of a save or a deletion that was cut off
            shutil.rmtree(stale)
        problem = space_problem(self.config.output_dir, self.needed)
        if problem:
            raise OSError(problem)
        self.working.mkdir(parents=True)

    def _publish(self, records: dict, problems: str) -> None:
        """On rank 0: give the checkpoint its name, or take away what was written of it."""
        if problems:
            shutil.rmtree(self.working, ignore_errors=True)
            raise OSError(problems)
        files = _files_of(self.working)
        for name in set(files) - set(records):  # DeepSpeed's two recovery scripts
            records[name] = _fsynced_record(self.working / name)
        write_file_durably(self.working / "files.json", json.dumps(dict(sorted(records.items())), indent=1).encode())
        for folder in {self.working, *(path.parent for path in map(self.working.joinpath, files))}:
            fsync_path(folder)
        doomed = []
        if self.final.exists():  # moved aside, since deleting takes long and a kill inside it would leave neither
            doomed.append(_set_aside(self.final, "replaced"))
        os.rename(self.working, self.final)
        write_file_durably(self.final.parent / "latest", f"{self.final.name}\n".encode())
        doomed += _retain(self.final.parent, self.config.save_total_limit, self.log)
        # 600 GB take the file system many seconds to forget, and nobody has to wait for it
        self._deleting = threading.Thread(target=lambda: [shutil.rmtree(path, ignore_errors=True) for path in doomed])
        self._deleting.start()


def _on_rank_0(action, what: str) -> None:
    """Run `action` on rank 0 while the others wait; its OSError becomes a SaveError on every rank, since ranks fail together."""
    import torch.distributed as dist

    problem = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [f"{what}: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise SaveError(problem[0])


def _set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint that is to be deleted: half deleted under its own name it could be taken for one."""
    aside = path.with_name(f"{TEMPORARY}{why}-{path.name}")
    os.rename(path, aside)
    return aside


def _files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "files.json")


def _fsynced_record(path: Path) -> dict:
    fsync_path(path)
    return {"bytes": path.stat().st_size, "chunks_sha256": chunks_sha256(path)}


def _retain(output_dir: Path, limit: int, log) -> list[Path]:
    """Set aside the oldest complete checkpoints beyond `limit` (0 keeps all), for the caller to delete; incomplete folders
    are left alone."""
    complete = [path for path in list_checkpoints(output_dir) if incomplete_reason(path, checksums=False) is None]
    doomed = complete[limit:] if limit else []
    for path in doomed:
        log.line(f"deleted {path} (save_total_limit {limit})")
    return [_set_aside(path, "deleted") for path in doomed]


# ---------------------------------------------------------------------------------------------- finding and checking


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-stepN folders of `output_dir`, newest (highest step) first."""
    folder = Path(output_dir)
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-step*") if (match := NAME.search(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_records(path: Path) -> dict[str, dict]:
    """files.json of a checkpoint: {name: {"bytes", "chunks_sha256"}}. Raises UserError with the file and the key.

    Names are paths inside the folder; one that leaves it is refused, since files are read (and hashed) by them.
    """
    file = path / "files.json"
    records = read_json(str(file))
    for name, record in records.items():
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise UserError(f"{file}: {name!r} is no path inside the checkpoint")
        size, digest = (record.get("bytes"), record.get("chunks_sha256")) if isinstance(record, dict) else (None, None)
        if type(size) is not int or size < 0:
            raise UserError(f"{file}: {name}: bytes is {size!r}; it must be a number of bytes")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{file}: {name}: chunks_sha256 is {digest!r}; it must be 64 hexadecimal digits")
    return records


def incomplete_reason(path: Path, *, checksums: bool | str = "small") -> str | None:
    """Why `path` is not a complete checkpoint, or None if it is.

    Names and sizes always; contents of all files with `checksums=True`, of those under SMALL_BYTES with "small".
    """
    if not (path / "files.json").exists():
        return "it has no files.json, so its writing was cut off"
    try:
        records = read_records(path)
    except UserError as error:
        return str(error)
    present = _files_of(path)
    missing = [name for name in REQUIRED if name not in records]
    if missing or not any(name.startswith("zero/") for name in records):
        return f"files.json does not name {', '.join(missing) or 'any file in zero/'}"
    for name, record in records.items():
        reason = _damage(path, name, record, checksums=checksums)
        if reason:
            return reason
    # DeepSpeed finds its shards by their names, whatever files.json says
    unknown = sorted(name for name in set(present) - set(records) if name.startswith("zero/"))
    return f"{unknown[0]} is not in files.json" if unknown else None


def _damage(path: Path, name: str, record: dict, *, checksums: bool | str) -> str | None:
    file = path / name
    try:
        if file.is_symlink() or not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes, files.json says {record['bytes']}"
        hashed = checksums is True or (checksums == "small" and size < SMALL_BYTES)
        if hashed and chunks_sha256(file) != record["chunks_sha256"]:
            return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def find_checkpoint(wanted: str, output_dir: str, *, say=say) -> Path | None:
    """The folder to resume from. 'latest': the newest complete one in `output_dir`, None if there is none at all.

    Large files are only looked at by size here, see `verified_by_all_ranks`. Raises UserError for a named folder that is
    missing or incomplete, and when every checkpoint there is is incomplete.
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
            _compare_latest(path, say)
            return path
        say(f"WARNING: skipping {path}: {reason}")
    if candidates:
        raise UserError(
            f"resume_from_checkpoint: no complete checkpoint in {output_dir}; {len(candidates)} are damaged"
        )
    return None


def _compare_latest(found: Path, say) -> None:
    """`latest` is for people and other tools; the newest complete checkpoint is taken whatever it says."""
    file = found.with_name("latest")
    try:
        name = file.read_text(errors="replace").strip()
    except OSError:
        name = None
    if name != found.name:
        what = "is missing" if name is None else "is empty" if not name else f"says {name[:80]!r}"
        say(f"WARNING: {file} {what}; the newest complete checkpoint is {found.name}, resuming from it")


def verified_by_all_ranks(path: Path) -> str | None:
    """Compare the large files' contents with their checksums, shared out over the ranks; every rank calls it.

    Returns why the checkpoint is damaged, the same on all ranks, or None. It reads what loading reads right after.
    """
    import torch.distributed as dist

    records = read_records(path)
    large = sorted(name for name, record in records.items() if record["bytes"] >= SMALL_BYTES)
    reasons = (
        _damage(path, name, records[name], checksums=True) for name in large[dist.get_rank() :: dist.get_world_size()]
    )
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, next(filter(None, reasons), None))
    return next(filter(None, found), None)


def read_state(path: Path) -> TrainerState:
    """The checkpoint's trainer_state.json. Raises one UserError with the file and every key that is not as it must be."""
    file = path / "trainer_state.json"
    values = read_json(str(file))
    fields = {each.name: each for each in dataclasses.fields(TrainerState)}
    problems = [unknown_key(str(name), fields, str(file)) for name in values if name not in fields]
    for name, known in fields.items():
        if name not in values:
            if known.default_factory is dataclasses.MISSING:
                problems.append(f"{file}: {name} is missing")
            continue
        value, kind = values[name], {"int": int, "str": str, "dict": dict, "list": list}[known.type.partition("[")[0]]
        if type(value) is not kind:
            problems.append(f"{file}: {name}: {value!r:.80} must be of type {kind.__name__}")
        elif kind is int and not 0 <= value < 2**53:
            problems.append(f"{file}: {name}: {value!r:.80} must be from 0 to 2**53")
        elif kind is list and not all(type(item) is float and math.isfinite(item) for item in value):
            problems.append(f"{file}: {name}: must be a list of finite numbers")
    if not problems:
        problems += _impossible(path, values)
    if not problems and type(values["options"].get("bf16")) is not bool:
        problems.append(f"{file}: options: bf16 must be true or false")
    if problems:
        raise UserError("\n".join(f"checkpoint: {problem}" for problem in problems))
    return TrainerState(**values)


def _impossible(path: Path, values: dict) -> list[str]:
    """What cannot be so in a state of the right types: numbers that contradict each other or the folder."""
    problems, file, step = [], path / "trainer_state.json", values["step"]
    named = NAME.search(path.name)
    if named and int(named[1]) != step:
        problems.append(f"{file}: step: {step}, but the folder is {path.name}")
    shards = len(list((path / "zero").glob("*optim_states.pt")))
    if values["world_size"] != shards:
        problems.append(f"{file}: world_size: {values['world_size']}, but zero/ holds the shards of {shards} processes")
    losses, norms = values.get("recent_losses", []), values.get("recent_norms", [])
    if (
        len(losses) != len(norms)
        or len(norms) > min(WINDOW, step - values["skipped_total"])
        or min(norms, default=0) < 0
    ):
        problems.append(
            f"{file}: recent_losses and recent_norms hold {len(losses)} and {len(norms)} numbers; they must be as many, at most "
            f"{WINDOW}, not more than the steps done, and norms not negative"
        )
    if not values["skipped_in_a_row"] <= values["skipped_total"] <= step:
        problems.append(
            f"{file}: skipped_in_a_row {values['skipped_in_a_row']} and skipped_total {values['skipped_total']} must not be "
            f"more than each other and step {step}"
        )
    return problems


def options_of(config: TrainConfig, sequences_per_step: list[int], deepspeed: dict | None = None) -> dict:
    """What decides the mathematics, for trainer_state.json. Batch, accumulation and processes count only in the number
    of sequences of a step (one number a stage): how they are shared out changes nothing but the order of sums. Of the
    DeepSpeed JSON: the types that gradients are added up in and moments are kept in."""
    deepspeed = deepspeed or {}
    return {
        **{name: getattr(config, name) for name in MATHEMATICS},
        "sequences_per_step": sequences_per_step,
        "grad_accum_dtype": (deepspeed.get("data_types") or {}).get("grad_accum_dtype"),
        "bf16_optimizer_states": bool((deepspeed.get("bf16") or {}).get("bf16_optimizer_states")),
    }


def check_resume(
    state: TrainerState, *, options: dict, manifest_hash: str, fingerprint: str, allowed: tuple[str, ...] = ()
) -> list[str]:
    """Raise one UserError that names everything in which the checkpoint and this run differ, but for what is `allowed`
    (--allow_changed; another model never is). Returns a sentence for each difference that was let through."""
    problems, let_through = [], []
    if state.model_fingerprint != fingerprint:
        problems.append("the checkpoint is of another model (its config.json differs from this run's)")
    differences = []
    if state.manifest_hash != manifest_hash:
        text = (
            f"the checkpoint was trained on another data set (manifest {state.manifest_hash[:12]}, "
            f"now {manifest_hash[:12]}); give the --data_dir it was started with"
        )
        differences.append(("data_dir", text))
    for name, value in options.items():
        if name not in state.options:  # written by a version that did not have it
            let_through.append(f"{name}: the checkpoint does not say what it was, this run has {value!r}")
        elif state.options[name] != value:
            differences.append((name, f"{name}: the checkpoint has {state.options[name]!r}, this run {value!r}"))
    for name in sorted(set(state.options) - set(options)):
        problems.append(unknown_key(name, options, "options of the checkpoint"))
    for name, text in differences:
        if name in allowed:
            let_through.append(f"{text}: allowed by --allow_changed {name}")
        else:
            problems.append(f"{text} (or allow it: --allow_changed {name})")
    if problems:
        raise UserError("\n".join(f"resume_from_checkpoint: {problem}" for problem in problems))
    return let_through


def load_checkpoint(engine, fp32, path: Path, state: TrainerState, *, log) -> None:
    """Load model, optimizer and fp32 parameters from a complete checkpoint; every rank calls it.

    For another number of processes than wrote it, DeepSpeed's universal checkpoint is made beside it first (the size of
    the checkpoint again, deleted after loading).
    """
    import torch.distributed as dist
    from safetensors.torch import load_file

    from shard_files import ShardFiles, check_pickles

    check_pickles(path, key="resume_from_checkpoint")
    engine.checkpoint_engine = ShardFiles()  # its load refuses pickles that name anything else
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
    from shard_files import check_pickles

    check_pickles(checkpoint, key="export")
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
        fsync_path(file)
    os.rename(working, output)
    fsync_path(output.parent)
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
    parser.add_argument(
        "--verify_checkpoint", metavar="CHECKPOINT", help="compare every file with its size and checksum"
    )
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "DIR"), help="write a model folder")
    parser.add_argument("--tokenizer", help="with --export: the tokenizer folder to copy (default: the data's)")
    arguments = parser.parse_args()
    if not arguments.verify_checkpoint and not arguments.export:
        parser.error("give --verify_checkpoint CHECKPOINT or --export CHECKPOINT DIR")
    if arguments.verify_checkpoint:
        path = Path(arguments.verify_checkpoint)
        reason = incomplete_reason(path, checksums=True) if path.is_dir() else "the folder does not exist"
        if reason:
            raise UserError(f"verify_checkpoint: {path} is no complete checkpoint: {reason}")
        say(f"{path}: complete, every file matches its checksum (step {read_state(path).step})")
    if arguments.export:
        export(Path(arguments.export[0]), Path(arguments.export[1]), tokenizer=arguments.tokenizer)
    return 0


if __name__ == "__main__":
    run_main(main)
