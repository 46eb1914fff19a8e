"""Check finished token shards against their manifest and against themselves (`tokenize_dataset.py --verify`).

    report = check_folder(Path("./data/tokenized_2m"), workers=2)     # report["problems"] names shard and document

Per shard, in parallel: sizes and sha256 of both files, the index sound, every document ending in EOS with none inside,
every id below the vocabulary. Over all: the totals that the manifest states. Writes nothing into the folder.
"""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import process_pool
from config import UserError
from data_loader import TOKEN_DTYPE, Manifest, ShardInfo, ShardReader, read_manifest
from run_log import human_count, human_time, say

CHUNK_TOKENS = 1 << 21
MOST_PROBLEMS = 20  # per shard; a damaged shard would otherwise name every document


def check_shard(folder: Path, shard: ShardInfo, *, vocab_size: int, eos_token_id: int) -> list[str]:
    """Everything wrong with one shard, a sentence each; an empty list for a sound one."""
    problems = []
    for suffix, size, digest in (
        ("bin", shard.bin_bytes, shard.bin_sha256),
        ("idx", shard.idx_bytes, shard.idx_sha256),
    ):
        path = folder / f"{shard.name}.{suffix}"
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return [f"{shard.name}: {path.name} cannot be read ({error.strerror})"]
        if path.stat().st_size != size:
            return [f"{shard.name}: {path.name} has {path.stat().st_size:,} bytes, the manifest says {size:,}"]
        if found != digest:
            problems.append(f"{shard.name}: the sha256 of {path.name} is not the manifest's: the file was changed")
    with ShardReader(folder, shard.name) as reader:
        try:
            ends = reader.starts[1:]
        except UserError as error:
            return [*problems, f"{shard.name}: {error}"]
        if len(ends) != shard.documents or reader.starts[-1] != shard.tokens or shard.tokens * 4 != shard.bin_bytes:
            problems.append(
                f"{shard.name}: the index holds {len(ends):,} documents and {reader.starts[-1]:,} tokens, "
                f"the manifest says {shard.documents:,} and {shard.tokens:,}"
            )
            return problems
        problems += _check_tokens(reader, shard, ends, vocab_size, eos_token_id)
    return problems[:MOST_PROBLEMS]


def _check_tokens(reader: ShardReader, shard: ShardInfo, ends: np.ndarray, vocab_size: int, eos: int) -> list[str]:
    problems: list[str] = []
    for begin in range(0, shard.tokens, CHUNK_TOKENS):
        tokens = np.empty(min(CHUNK_TOKENS, shard.tokens - begin), TOKEN_DTYPE)
        reader.read_into(tokens, begin)
        bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        first, last = np.searchsorted(ends, [begin, begin + len(tokens)], side="right")
        should_end = ends[first:last] - 1
        does_end = np.flatnonzero(tokens == eos) + begin
        for place in bad[:MOST_PROBLEMS] + begin:
            document = int(np.searchsorted(ends, place, side="right"))
            problems.append(
                f"{shard.name}: document {document} holds id {tokens[place - begin]}, not below {vocab_size}"
            )
        for place in np.setdiff1d(should_end, does_end)[:MOST_PROBLEMS]:
            document = int(np.searchsorted(ends, place, side="right"))
            problems.append(f"{shard.name}: document {document} does not end in EOS (id {eos})")
        for place in np.setdiff1d(does_end, should_end)[:MOST_PROBLEMS]:
            document = int(np.searchsorted(ends, place, side="right"))
            problems.append(f"{shard.name}: document {document} holds EOS (id {eos}) before its end")
    return problems


@dataclass(frozen=True)
class VerifyJob:
    """Tasks are shards; a result is the shard's list of problems."""

    folder: Path
    vocab_size: int
    eos_token_id: int

    def start(self, report) -> None:
        return None

    def work(self, state, shard: ShardInfo, report) -> list[str]:
        return check_shard(self.folder, shard, vocab_size=self.vocab_size, eos_token_id=self.eos_token_id)


def check_totals(manifest: Manifest) -> list[str]:
    """Sums of the manifest that do not fit each other."""
    problems = []
    for key, stated, summed in (
        ("total_tokens", manifest.total_tokens, sum(shard.tokens for shard in manifest.shards)),
        ("documents", manifest.documents, sum(shard.documents for shard in manifest.shards)),
        ("rows", manifest.statistics.get("rows"), manifest.documents + manifest.statistics.get("dropped", 0)),
    ):
        if stated != summed:
            problems.append(f"manifest: {key} is {stated:,} but its parts add up to {summed:,}")
    return problems


def check_folder(folder: Path, *, workers: int) -> dict:
    """The report on a folder: {"ok", "shards", "documents", "tokens", "problems"}. Raises UserError without a manifest."""
    if not folder.is_dir():
        raise UserError(f"output_dir: the folder {folder} does not exist")
    manifest, digest = read_manifest(folder)
    problems = check_totals(manifest)
    job = VerifyJob(folder, manifest.vocab_size, manifest.eos_token_id)
    done = 0
    for shard, found in process_pool.run(job, manifest.shards, workers=max(1, min(workers, len(manifest.shards)))):
        problems += found
        done += shard.tokens
        if sys.stderr.isatty():
            print(
                f"\rverifying {100 * done / max(1, manifest.total_tokens):5.1f}%", end="", file=sys.stderr, flush=True
            )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {
        "ok": not problems,
        "manifest_sha256": digest,
        "shards": len(manifest.shards),
        "documents": manifest.documents,
        "tokens": manifest.total_tokens,
        "problems": sorted(problems),
    }


def verify(folder: Path, *, workers: int) -> int:
    """Check a folder, say what was found, and return the exit code: 0 for sound, 1 for not."""
    begin = time.monotonic()
    report = check_folder(folder, workers=workers)
    for problem in report["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    if not report["ok"]:
        say(f"{folder}: NOT sound, {len(report['problems'])} problems")
        return 1
    say(
        f"{folder}: sound. {report['shards']} shards, {report['documents']:,} documents, "
        f"{human_count(report['tokens'])} tokens checked in {human_time(time.monotonic() - begin)}"
    )
    return 0
