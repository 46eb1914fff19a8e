"""Text to token shards, and `--verify` of the result.

    python tokenize_dataset.py --dataset_name semran1/megamath-web-pro --split train --text_column text \\
        --output_dir ./data/tokenized_2m --max_seq_length 2097152
    python tokenize_dataset.py --output_dir ./data/tokenized_2m --verify

The pipeline:
  plan      plan.json, written first: the sources by content, the tokenizer by content, the options, and the units of
            work (a range of one file each). It depends on those alone, never on the number of processes.
  units     one spawned process per core; each takes units and writes their shards (text_sources -> encoders ->
            data_loader.ShardWriter). A unit is complete when its own record, unit_00012.json, has been renamed in,
            after its shards and the folder were fsynced.
  manifest  manifest.json, written last, from the records. A folder without it is an unfinished run.

Kill it anywhere and start the same command again: only units without a record are done again, and the result is byte for
byte that of an uninterrupted run. A plan that no longer fits (another option, a source file that changed) is an error
that says what changed. A second launcher on the folder refuses.

Documents are never cut and each ends in EOS. Rows without text (null, empty, only white space) are dropped and counted;
lone surrogates and invalid UTF-8 are replaced by U+FFFD and counted.

Many machines that share the output folder: `--num_tasks 8 --task_index $I` in a job array, or `--ray` on a Ray cluster.
The bytes are the same either way.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import encoders
import process_pool
from cluster_work import Claims, run_on_ray
from config import HUB_MODEL, UserError, run_main
from data_loader import (
    MANIFEST,
    PLAN,
    Manifest,
    ShardInfo,
    ShardReader,
    fsync_path,
    read_manifest,
    write_file_durably,
)
from dataset_statistics import table
from progress import ProgressLine
from run_log import human_count, human_time, say
from text_sources import SUFFIXES, Source, Unit, cut_units, find_source
from token_units import LENGTH_CLASSES, TokenizeJob, finished_records

PLAN_VERSION = 1
TEXT_BYTES_PER_TOKEN = 4  # English prose and code; sizes units only
MIN_UNIT_BYTES = 2 << 20  # below this the fsyncs of a unit are felt
UNPACKED = "unpacked"  # folder of the shards in source order while --pack makes the final ones
MANIFEST_SOURCES = 100
UNITS_AIMED_AT = 64  # a data set is cut at least this fine, so that the last unit is a small part of the run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn text into token shards for train_continual_2m.py (Megatron's indexed-dataset format).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--dataset_name",
        help=f"a local folder, file or glob of {', '.join(SUFFIXES)} (a .txt file is one document), or a Hub data set",
    )
    add("--dataset_config", help="configuration of a Hub data set, or of a folder in the Hub's layout")
    add(
        "--split", help="split of a Hub data set or of a folder in its layout; default: train, or all files of a folder"
    )
    add("--text_column", default="text", help="the column that holds the text")
    add(
        "--source_column",
        help="column that tells a row's source; default: source, domain or url (its host) if there is one",
    )
    add("--tokenizer", default=HUB_MODEL, help="Hub name or local folder of the model's tokenizer")
    add("--trust_remote_code", action="store_true", help="let the tokenizer run the Python code in its folder")
    add("--output_dir", required=True, help="where the shards go; an unfinished run there is continued")
    add(
        "--max_seq_length",
        type=int,
        default=2097152,
        help="recorded, and the length that the summary counts sequences of",
    )
    add("--num_workers", type=int, default=process_pool.cores(), help="processes; the result does not depend on it")
    add(
        "--shard_tokens",
        type=int,
        default=1 << 26,
        help="most tokens in a shard (a longer document makes a longer one)",
    )
    add("--max_tokens", type=int, help="stop before the document that would exceed this many tokens in all")
    add(
        "--pack",
        choices=("source", "shuffled", "related"),
        default="source",
        help="order of the documents: as in the source; shuffled (seeded); or related, neighbours alike, which gives long "
        "windows of short documents something to learn at long range",
    )
    add("--eos_token", help="special token that ends each document; default: the tokenizer's eos_token")
    add(
        "--encoder",
        choices=("auto", "reference", "fast"),
        default="auto",
        help="auto: fastokens where it is installed and proves to give the tokenizer's own ids, else the reference",
    )
    add(
        "--verify",
        nargs="?",
        const="full",
        choices=("quick", "full"),
        help="check --output_dir and exit; quick: sizes, indexes and totals; full (the default): also checksums and every "
        "token, and, where --dataset_name and --tokenizer are given, a sample tokenized again from the source",
    )
    add(
        "--num_tasks",
        type=int,
        help="tasks of a job array that share --output_dir; each is started with its --task_index",
    )
    add("--task_index", type=int, help="which task of --num_tasks this is, from 0; any task finishes what others left")
    add("--finalize", action="store_true", help="only write the manifest of a folder whose units are all done")
    add(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="do the units on a Ray cluster (default: this machine's) that shares --output_dir",
    )
    add(
        "--statistics", metavar="PNG", help="print what --output_dir holds, draw it to PNG and a .json beside, and exit"
    )
    add("--report", help="with --verify: write what was found as JSON to this file")
    return parser


# ---------------------------------------------------------------------------- plan


def make_plan(args: argparse.Namespace, source: Source, spec: encoders.TokenizerSpec) -> dict:
    """Everything that decides the output's bytes, as plain JSON values."""
    total = sum(unit.text_bytes for unit in cut_units(source, unit_bytes=1 << 62))
    unit_bytes = min(max(total // UNITS_AIMED_AT, MIN_UNIT_BYTES), args.shard_tokens * TEXT_BYTES_PER_TOKEN)
    tokenizer = {k: v for k, v in asdict(spec).items() if k not in ("folder", "special_tokens", "trust_remote_code")}
    return {
        "plan_version": PLAN_VERSION,
        "tokenizer": tokenizer,
        "source": source.fingerprint(),
        "options": {
            "max_seq_length": args.max_seq_length,
            "shard_tokens": args.shard_tokens,
            "max_tokens": args.max_tokens,
            "pack": args.pack,
        },
        "units": [unit.to_json() for unit in cut_units(source, unit_bytes=unit_bytes)],
    }


def plan_bytes(plan: dict) -> bytes:
    return (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode()


def plan_changes(old: dict, new: dict) -> list[str]:
    """What differs between two plans, one sentence each; the tokenizer's name alone does not matter."""
    changes = []
    for section, label in (("options", ""), ("tokenizer", "tokenizer ")):
        for key in sorted({*old.get(section, {}), *new[section]} - {"name"}):
            before, now = old.get(section, {}).get(key), new[section].get(key)
            if before != now:
                changes.append(f"{label}{key} was {before}, now {now}")
    old_source, new_source = old.get("source", {}), new["source"]
    for key in ("text_column", "source_column", "hub"):
        if old_source.get(key) != new_source[key]:
            changes.append(f"{key} was {old_source.get(key)}, now {new_source[key]}")
    before = {file["name"]: file for file in old_source.get("files", [])}
    now = {file["name"]: file for file in new_source["files"]}
    changes += [f"source file {name} is gone" for name in sorted(before.keys() - now.keys())]
    changes += [f"source file {name} is new" for name in sorted(now.keys() - before.keys())]
    changes += [f"source file {n} has other content" for n in sorted(before.keys() & now.keys()) if before[n] != now[n]]
    if not changes and old != new:
        changes.append("the plan was made by another version of this tool")
    return changes


def adopt_plan(folder: Path, plan: dict) -> dict:
    """Write the plan if the folder has none, else check that it is the same and return the folder's.

    A plan of which no unit was finished yet gives way to the new one: a mended row needs no new folder.
    """
    path = folder / PLAN
    if not path.exists():
        strange = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp"))
        if strange:
            raise UserError(
                f"output_dir: {folder} holds files of something else ({', '.join(strange[:3])}); give an empty or new folder"
            )
        write_file_durably(path, plan_bytes(plan))
        return plan
    try:
        old = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"output_dir: {path} is damaged ({error}); remove {folder} and start again") from None
    changes = plan_changes(old, plan)
    if changes and not (folder / MANIFEST).exists() and not any(folder.rglob("unit_*.json")):
        write_file_durably(path, plan_bytes(plan))
        return plan
    if changes:
        raise UserError(
            f"output_dir: {folder} was begun with another plan: {'; '.join(changes)}. "
            "Give the same data and options to continue it, or another --output_dir to start anew"
        )
    return old


@contextlib.contextmanager
def only_launcher(folder: Path, *, shared: bool = False):
    """Hold the folder's lock, alone or `shared` with the other tasks of a job array. Raises UserError if it is taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: another tokenize_dataset.py is working in {folder}; wait for it or give another folder"
            ) from None
        except OSError as error:
            say(
                f"WARNING: {folder} lies on a file system without locks ({error.strerror}); start only one launcher on it"
            )
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- all units


class UnitProgress:
    """Adds up what the workers report, in bytes of text: whole units and the begun part of the others."""

    def __init__(self, units: list[Unit], finished: set[int]):
        done = sum(unit.text_bytes for unit in units if unit.index in finished)
        self.line = ProgressLine("tokenizing", total=sum(unit.text_bytes for unit in units), first=done)
        self._finished_bytes = done
        self._begun: dict[int, int] = {}

    def add(self, unit: Unit, *, documents: int, tokens: int, text_bytes: int) -> None:
        self._begun[unit.index] = min(unit.text_bytes, self._begun.get(unit.index, 0) + text_bytes)
        self.line.add(documents=documents, tokens=tokens)
        self._update()

    def finish(self, unit: Unit) -> None:
        self._begun.pop(unit.index, None)
        self._finished_bytes += unit.text_bytes
        self._update()

    def _update(self) -> None:
        self.line.done = self._finished_bytes + sum(self._begun.values())
        self.line.draw_if_due()


def enough(units: list[Unit], records: dict[int, dict], max_tokens: int | None) -> bool:
    """Whether the units done from the first on without a gap already hold more than --max_tokens."""
    tokens = 0
    for unit in units:
        if max_tokens is None or unit.index not in records:
            return False
        tokens += records[unit.index]["tokens"]
        if tokens > max_tokens:
            return True
    return False


def tokenize_units(
    job: TokenizeJob,
    units: list[Unit],
    records: dict[int, dict],
    args: argparse.Namespace,
    claims: Claims | None,
    manifest_path: Path,
) -> None:
    """Do every unit that has no record and add its record to `records`; with --max_tokens only as many as are needed.

    With `claims`, only units that no other task is doing; their records are added too.
    """
    todo = [unit for unit in units if unit.index not in records]
    progress = UnitProgress(units, set(records))
    folder = Path(job.folder)

    def tasks():
        for unit in claims.order(todo) if claims else todo:
            if claims and args.max_tokens is not None:
                records.update(finished_records(folder, units, job.plan_sha256))
            if enough(units, records, args.max_tokens) or manifest_path.exists():
                return
            if claims and (finished_records(folder, [unit], job.plan_sha256) or not claims.take(unit)):
                continue
            yield unit, None

    encoders_said: set[str] = set()

    def on_report(task: tuple[Unit, int | None] | None, counts: dict) -> None:
        if "encoder" in counts:
            if counts["encoder"] not in encoders_said:
                say(f"encoder: {counts['encoder']}")
            encoders_said.add(counts["encoder"])
        elif "warning" in counts:
            progress.line.warn(counts["warning"])
        else:
            progress.add(task[0], **counts)
            if claims:
                claims.touch(task[0])

    if args.ray:
        done = run_on_ray(job, tasks(), address=args.ray)
    else:
        done = process_pool.run(job, tasks(), workers=min(args.num_workers, len(todo)), on_progress=on_report)
    try:
        for (unit, _), record in done:
            records[unit.index] = record
            progress.finish(unit)
            if args.ray:  # its workers do not report while they work
                progress.line.add(documents=record["documents"], tokens=record["tokens"])
            if claims:
                claims.release(unit)
    except process_pool.WorkerLost as lost:
        unit = f"unit {lost.task[0].index}" if lost.task else "start-up"
        raise UserError(
            f"num_workers: a worker process was ended from outside (exit code {lost.code}) during {unit}, most likely for "
            "want of memory; run the same command with fewer --num_workers, it goes on where it stopped"
        ) from None
    if todo:
        progress.line.close()
    if claims:
        records.update(finished_records(folder, units, job.plan_sha256))


def apply_max_tokens(job: TokenizeJob, units: list[Unit], records: dict[int, dict], max_tokens: int) -> dict[int, dict]:
    """The records of the first units that hold at most `max_tokens`, the last of them cut after a whole document."""
    kept: dict[int, dict] = {}
    left = max_tokens
    for unit in units:
        if unit.index not in records:
            break
        record = records[unit.index]
        if record["tokens"] > left:
            documents = 0
            for shard in record["shards"]:
                with ShardReader(job.folder, shard["name"]) as reader:
                    fitting = int(np.searchsorted(reader.starts[1:], left, side="right"))
                    documents, left = documents + fitting, left - int(reader.starts[fitting])
                    if fitting < len(reader.lengths):
                        break
            if documents:
                ignore = lambda **counts: None  # noqa: E731
                # tokenized once more, so that its counts are those of what is kept
                kept[unit.index] = job.work(job.start(ignore), (unit, documents), ignore)
            break
        kept[unit.index] = record
        left -= record["tokens"]
    return kept


# ---------------------------------------------------------------------------- manifest and summary


def build_manifest(plan: dict, records: list[dict], shards: list[ShardInfo], order_sha256: str | None) -> Manifest:
    """The manifest from the records of all units in the plan's order and the final shards."""
    total = {
        key: sum(record[key] for record in records)
        for key in ("rows", "documents", "dropped", "replaced", "tokens", "text_bytes")
    }
    columns = {key: np.sum([r[key] for r in records], axis=0).tolist() for key in ("class_documents", "class_tokens")}
    return Manifest(
        tokenizer_name=plan["tokenizer"]["name"],
        tokenizer_hash=plan["tokenizer"]["content_hash"],
        vocab_size=plan["tokenizer"]["vocab_size"],
        eos_token=plan["tokenizer"]["eos_token"],
        eos_token_id=plan["tokenizer"]["eos_token_id"],
        max_seq_length=plan["options"]["max_seq_length"],
        total_tokens=total["tokens"],
        documents=total["documents"],
        shards=tuple(shards),
        statistics={
            "rows": total["rows"],
            "dropped": total["dropped"],
            "replaced": total["replaced"],
            "text_bytes": total["text_bytes"],
            "longest": max(record["longest"] for record in records),
            "length_classes": list(LENGTH_CLASSES),
            **columns,
            "sources": largest_sources(plan["source"]["source_column"], records),
            "pack": plan["options"]["pack"],
            "order_sha256": order_sha256,
            "units": {key: [r[key] for r in records] for key in ("unit", "rows", "dropped", "documents")},
        },
        source=plan["source"],
    )


def largest_sources(column: str | None, records: list[dict]) -> dict | None:
    """Documents and tokens by source, the largest MANIFEST_SOURCES by tokens; None without a source column."""
    if column is None:
        return None
    total: dict[str, list[int]] = {}
    for record in records:
        for name, (documents, tokens) in record["sources"].items():
            entry = total.setdefault(name, [0, 0])
            entry[0] += documents
            entry[1] += tokens
    largest = sorted(total.items(), key=lambda item: (-item[1][1], item[0]))[:MANIFEST_SOURCES]
    # kept by rank: the manifest sorts keys
    return {"column": column, "count": len(total), "largest": [[name, *counts] for name, counts in largest]}


def remove_leftovers(folder: Path, keep: set[str] | None) -> None:
    """Remove temporary files, and with `keep` also the records and every shard that is not in it."""
    for path in folder.iterdir():
        stale_shard = keep is not None and path.name.startswith("shard_") and path.stem not in keep
        record = keep is not None and path.name.startswith(("unit_", "pack_")) and path.suffix == ".json"
        claim = keep is not None and path.suffix == ".claim"
        if path.suffix == ".tmp" or stale_shard or record or claim:
            path.unlink(missing_ok=True)  # another task may be tidying the same folder
    if keep is not None:
        shutil.rmtree(folder / UNPACKED, ignore_errors=True)
    fsync_path(folder)


# ---------------------------------------------------------------------------- entry


def check_options(args: argparse.Namespace) -> None:
    problems = [
        f"{name}: {getattr(args, name)} must be greater than 0"
        for name in ("max_seq_length", "num_workers", "shard_tokens", "max_tokens", "num_tasks")
        if getattr(args, name) is not None and getattr(args, name) <= 0
    ]
    if (args.num_tasks is None) != (args.task_index is None):
        problems.append("num_tasks, task_index: give both or neither")
    elif args.num_tasks is not None and not 0 <= args.task_index < args.num_tasks:
        problems.append(f"task_index: {args.task_index} must be from 0 to num_tasks - 1 = {args.num_tasks - 1}")
    if args.num_tasks is not None and args.ray:
        problems.append("ray, num_tasks: Ray spreads the units itself; leave --num_tasks out")
    if not args.dataset_name and not args.verify and not args.statistics:
        problems.append("dataset_name: say what to tokenize, or --verify to check what is in --output_dir")
    if problems:
        raise UserError("\n".join(problems))


def find_inputs(args: argparse.Namespace) -> tuple[Source, encoders.TokenizerSpec]:
    """The source and the tokenizer that the options name. Raises UserError."""
    spec = encoders.find_tokenizer(args.tokenizer, eos_token=args.eos_token, trust_remote_code=args.trust_remote_code)
    source = find_source(
        args.dataset_name,
        config=args.dataset_config,
        split=args.split,
        text_column=args.text_column,
        source_column=args.source_column,
        threads=args.num_workers,
    )
    return source, spec


def tokenize(args: argparse.Namespace) -> Manifest | None:
    """Everything from the plan to the manifest; None if other tasks of a job array still have units to do.

    Raises UserError before anything is written where it can.
    """
    source, spec = find_inputs(args)
    say(f"tokenizer: {spec.name} ({spec.vocab_size:,} ids, documents end in {spec.eos_token!r} = {spec.eos_token_id})")
    plan = make_plan(args, source, spec)
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_launcher(folder, shared=args.num_tasks is not None):
            return _tokenize_locked(args, folder, plan, source, spec)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror or error})") from None


def _tokenize_locked(args, folder: Path, plan: dict, source: Source, spec: encoders.TokenizerSpec) -> Manifest | None:
    plan = adopt_plan(folder, plan)
    units = [Unit(**unit) for unit in plan["units"]]
    if (folder / MANIFEST).exists():
        manifest, _ = read_manifest(folder)
        remove_leftovers(folder, {shard.name for shard in manifest.shards})
        say(f"{folder} is already complete")
        return manifest
    pack = plan["options"]["pack"]
    work = folder if pack == "source" else folder / UNPACKED
    work.mkdir(exist_ok=True)
    claims = None
    if args.num_tasks is None:
        remove_leftovers(folder, None)
        remove_leftovers(work, None)
    else:
        claims = Claims(work, num_tasks=args.num_tasks, task_index=args.task_index)
    job = TokenizeJob(
        folder=str(work),
        source=source,
        spec=spec,
        encoder=args.encoder,
        shard_tokens=plan["options"]["shard_tokens"],
        plan_sha256=hashlib.sha256(plan_bytes(plan)).hexdigest(),
        keep_sources=pack == "related",
    )
    records = finished_records(work, units, job.plan_sha256)
    size = f"{len(source.files):,} files, {human_count(sum(u.text_bytes for u in units))} bytes of text"
    say(f"source: {size if source.files else source.hub[0]}, {len(units)} units; {args.num_workers} processes")
    if records:
        say(f"resuming: {len(records)} of {len(units)} units are already done")
    if not args.finalize:
        tokenize_units(job, units, records, args, claims, folder / MANIFEST)
    if (folder / MANIFEST).exists():  # another task was the last
        return read_manifest(folder)[0]
    missing = [unit.index for unit in units if unit.index not in records]
    if missing and not enough(units, records, args.max_tokens):
        if args.finalize:
            raise UserError(
                f"finalize: {len(missing)} of {len(units)} units are not done (the first is unit {missing[0]}); "
                "start a task again to do them"
            )
        say(f"task {args.task_index} has nothing left to take; other tasks are doing {len(missing)} units")
        say("the last of them writes the manifest; if one was lost, start any task again after 5 minutes")
        return None
    if args.max_tokens is not None:
        records = apply_max_tokens(job, units, records, args.max_tokens)
    done = [records[unit.index] for unit in units if unit.index in records]
    if not any(record["documents"] for record in done):  # leaves nothing behind
        (folder / PLAN).unlink()
        remove_leftovers(folder, set())
        rows = sum(record["rows"] for record in done)
        raise UserError(f"dataset_name: no document with text among {rows:,} rows; nothing was written")
    shards = [ShardInfo(**shard) for record in done for shard in record["shards"]]
    order_sha256 = None
    if pack != "source":
        from pack_documents import pack as pack_shards

        shards, order_sha256 = pack_shards(
            folder,
            work,
            shards,
            [record["unit"] for record in done],
            pack,
            shard_tokens=plan["options"]["shard_tokens"],
            vocab_size=spec.vocab_size,
            workers=args.num_workers,
        )
    manifest = build_manifest(plan, done, shards, order_sha256)
    write_file_durably(folder / MANIFEST, manifest.to_json())
    remove_leftovers(folder, {shard.name for shard in manifest.shards})
    return manifest


def show_statistics(folder: Path, picture: Path) -> int:
    from dataset_statistics import write_report

    manifest, _ = read_manifest(folder)
    say(table(manifest))
    try:
        figures = write_report(manifest, picture)
    except (OSError, ValueError) as error:  # a suffix that matplotlib does not know is a ValueError
        raise UserError(f"statistics: {picture} cannot be written ({error}); give the name of a .png file") from None
    say(f"drawn to {picture}, figures in {figures}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_options(args)
    if args.verify:
        from verify_shards import verify

        return verify(
            Path(args.output_dir),
            workers=args.num_workers,
            depth=args.verify,
            source_and_spec=find_inputs(args) if args.dataset_name else None,
            report_path=args.report,
        )
    if args.statistics:
        return show_statistics(Path(args.output_dir), Path(args.statistics))
    begin = time.monotonic()
    manifest = tokenize(args)
    if manifest is None:
        return 0
    say(table(manifest))
    say(f"written to {args.output_dir} in {human_time(time.monotonic() - begin)}; check it with --verify")
    return 0


if __name__ == "__main__":
    run_main(main)
