"""Check finished token shards against their manifest, themselves and their source (`tokenize_dataset.py --verify`).

    report = check_folder(Path("./data/tokenized_2m"), workers=2)     # report["problems"] names shard and document

quick: the files' sizes, the indexes sound, the totals that the manifest states, each source row accounted for once.
full:  also, per shard and in parallel, the sha256 of both files, every document ending in EOS with none inside and every
       id below the vocabulary; and, where the source and the tokenizer are given, a seeded sample of units read again:
       every row of them one document or counted as dropped, and sampled documents tokenized again and decoded back.

Writes nothing into the folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import encoders
import process_pool
from config import UserError
from data_loader import PLAN, TOKEN_DTYPE, Manifest, ShardInfo, ShardReader, read_manifest
from pack_documents import ORDER
from progress import ProgressLine
from run_log import human_count, human_time, say
from text_sources import Source, Unit, read_unit

SAMPLED_UNITS = 8
SAMPLED_DOCUMENTS = 25  # of each sampled unit
CHUNK_TOKENS = 1 << 21
MOST_PROBLEMS = 20  # per shard; a damaged shard would otherwise name every document


def check_shard(
    folder: Path, shard: ShardInfo, *, vocab_size: int, eos_token_id: int, depth: str = "full"
) -> list[str]:
    """Everything wrong with one shard, a sentence each; an empty list for a sound one. `depth`: "quick" or "full"."""
    problems = []
    for suffix, size, digest in (
        ("bin", shard.bin_bytes, shard.bin_sha256),
        ("idx", shard.idx_bytes, shard.idx_sha256),
    ):
        path = folder / f"{shard.name}.{suffix}"
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest() if depth == "full" else digest
            found_size = path.stat().st_size
        except OSError as error:
            return [f"{shard.name}: {path.name} cannot be read ({error.strerror})"]
        if found_size != size:
            return [f"{shard.name}: {path.name} has {found_size:,} bytes, the manifest says {size:,}"]
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
        if depth == "full":
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
    """Tasks are shards, or (unit, places of its documents) to compare with the source; a result is a list of problems."""

    folder: Path
    manifest: Manifest
    depth: str
    source: Source | None = None
    spec: encoders.TokenizerSpec | None = None

    def start(self, report) -> list[encoders.Encoder]:
        return []  # the reference encoder, loaded by the first task that needs it

    def work(self, state: list, task, report) -> list[str]:
        if isinstance(task, ShardInfo):
            vocab_size, eos = self.manifest.vocab_size, self.manifest.eos_token_id
            return check_shard(self.folder, task, vocab_size=vocab_size, eos_token_id=eos, depth=self.depth)
        if not state:
            state.append(encoders.load_encoder(self.spec))
        return check_unit(self, state[0], *task)


def check_unit(job: VerifyJob, encoder: encoders.Encoder, unit: Unit, places: np.ndarray) -> list[str]:
    """Read a unit again: its rows with text must be its documents, and sampled ones must have the same ids.

    `places` is where each of its documents stands among all documents of the shards.
    """
    sample = set(random.Random(f"verify/{unit.index}").sample(range(len(places)), min(SAMPLED_DOCUMENTS, len(places))))
    firsts = np.cumsum([0, *(shard.documents for shard in job.manifest.shards)])
    problems: list[str] = []
    number = 0
    cut_short = unit.index == max(job.manifest.statistics["units"]["unit"])
    for row in read_unit(job.source, unit):
        if not row.has_text:
            continue
        if number == len(places) and cut_short:
            break  # --max_tokens ended here
        if number in sample:
            shard = int(np.searchsorted(firsts, places[number], side="right")) - 1
            name, index = job.manifest.shards[shard].name, int(places[number] - firsts[shard])
            with ShardReader(job.folder, name) as reader:
                problems += _compare_document(job, encoder, row.text, reader.document(index), name, index)
        number += 1
    if number != len(places):
        problems.append(
            f"unit {unit.index}: its source has {number:,} rows with text but its shards {len(places):,} documents"
        )
    return problems


def _compare_document(job: VerifyJob, encoder, text: str, stored: np.ndarray, shard: str, index: int) -> list[str]:
    tokens, _ = encoder.encode([text])
    if not np.array_equal(stored[:-1], tokens):
        return [f"{shard}: document {index} is not what its source gives when tokenized again ({text[:40]!r}...)"]
    # byte-level vocabularies lose nothing; others may normalize, so only Kimi's format promises the way back
    if job.spec.format == "kimi" and encoder.decode(stored[:-1]) != text:
        return [f"{shard}: document {index} does not decode to its source ({text[:40]!r}...)"]
    return []


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


def check_units(folder: Path, manifest: Manifest) -> list[str]:
    """Whether each source row is accounted for exactly once: the plan's units, their rows, and the shards' documents."""
    units = manifest.statistics.get("units")
    if not units:
        return ["manifest: it does not say which units its shards come from"]
    plan = json.loads((folder / PLAN).read_bytes())
    problems = []
    expected = [unit["index"] for unit in plan["units"]]
    if plan["options"]["max_tokens"] is not None:
        expected = expected[: len(units["unit"])]
    if units["unit"] != expected:
        problems.append("manifest: its units are not the plan's, each once and in order")
    if manifest.statistics["pack"] == "source":
        in_shards = dict.fromkeys(units["unit"], 0)
        for shard in manifest.shards:
            unit = int(shard.name.split("_")[1])
            in_shards[unit] = in_shards.get(unit, 0) + shard.documents
    else:
        in_shards = dict(zip(units["unit"], units["documents"], strict=True))
        problems += check_order(folder, manifest)
    columns = (units[key] for key in ("unit", "rows", "dropped", "documents"))
    for place, (unit, rows, dropped, documents) in enumerate(zip(*columns, strict=True)):
        if rows != dropped + documents or in_shards[unit] != documents:
            problems.append(
                f"unit {unit}: {rows:,} rows, {dropped:,} dropped, {documents:,} documents, {in_shards[unit]:,} in its shards"
            )
        planned = plan["units"][place]["rows"]
        last = plan["options"]["max_tokens"] is not None and place == len(units["unit"]) - 1
        if planned is not None and planned != rows and not last:
            problems.append(f"unit {unit}: {rows:,} rows were read but the source has {planned:,}")
    return problems


def check_order(folder: Path, manifest: Manifest) -> list[str]:
    """Whether the order of packed documents is the manifest's and holds each document exactly once."""
    try:
        content = (folder / ORDER).read_bytes()
    except OSError as error:
        return [f"{ORDER}: cannot be read ({error.strerror})"]
    if hashlib.sha256(content).hexdigest() != manifest.statistics["order_sha256"]:
        return [f"{ORDER}: its sha256 is not the manifest's: the file was changed"]
    order = np.load(folder / ORDER)
    if not np.array_equal(np.sort(order), np.arange(manifest.documents)):
        return [f"{ORDER}: it does not hold each of the {manifest.documents:,} documents exactly once"]
    return []


def unit_places(folder: Path, manifest: Manifest) -> dict[int, np.ndarray]:
    """Unit -> where each of its documents, in source order, stands among all documents of the shards."""
    units = manifest.statistics["units"]
    borders = np.cumsum([0, *units["documents"]])
    if manifest.statistics["pack"] == "source":
        places = np.arange(manifest.documents)
    else:
        places = np.argsort(np.load(folder / ORDER))
    return {unit: places[borders[i] : borders[i + 1]] for i, unit in enumerate(units["unit"])}


def sampled_units(folder: Path, manifest: Manifest, source: Source, spec: encoders.TokenizerSpec) -> list[tuple]:
    """(unit, its shards) of a seeded sample. Raises UserError if source or tokenizer are not those of the folder."""
    if source.fingerprint() != manifest.source:
        raise UserError("dataset_name: this is not the source that the folder was made from (other files or content)")
    if spec.content_hash != manifest.tokenizer_hash:
        raise UserError(f"tokenizer: {spec.name} is not the tokenizer that the folder was made with")
    plan = json.loads((folder / PLAN).read_bytes())
    done = [
        unit for unit in (Unit(**unit) for unit in plan["units"]) if unit.index in manifest.statistics["units"]["unit"]
    ]
    sample = random.Random("verify").sample(done, min(SAMPLED_UNITS, len(done)))
    places = unit_places(folder, manifest)
    return [(unit, places[unit.index]) for unit in sample]


def check_folder(
    folder: Path,
    *,
    workers: int,
    depth: str = "full",
    source_and_spec: tuple[Source, encoders.TokenizerSpec] | None = None,
) -> dict:
    """The report on a folder: {"ok", "depth", "shards", ..., "problems"}. Raises UserError without a manifest."""
    if not folder.is_dir():
        raise UserError(f"output_dir: the folder {folder} does not exist")
    manifest, digest = read_manifest(folder)
    problems = check_totals(manifest) + check_units(folder, manifest)
    tasks: list = list(manifest.shards)
    source, spec = source_and_spec or (None, None)
    units = sampled_units(folder, manifest, source, spec) if source and depth == "full" else []
    bar = ProgressLine("verifying", total=manifest.total_tokens)
    job = VerifyJob(folder, manifest, depth, source, spec)
    for task, found in process_pool.run(job, [*tasks, *units], workers=max(1, min(workers, len(tasks)))):
        problems += found
        if isinstance(task, ShardInfo):
            bar.done += task.tokens
            bar.add(documents=task.documents, tokens=task.tokens)
            bar.draw_if_due()
    bar.close()
    return {
        "ok": not problems,
        "depth": depth,
        "manifest_sha256": digest,
        "shards": len(manifest.shards),
        "documents": manifest.documents,
        "tokens": manifest.total_tokens,
        "units_compared_with_source": [unit.index for unit, _ in units],
        "problems": sorted(problems),
    }


def verify(
    folder: Path,
    *,
    workers: int,
    depth: str = "full",
    source_and_spec: tuple[Source, encoders.TokenizerSpec] | None = None,
    report_path: str | None = None,
) -> int:
    """Check a folder, say what was found, and return the exit code: 0 for sound, 1 for not."""
    begin = time.monotonic()
    report = check_folder(folder, workers=workers, depth=depth, source_and_spec=source_and_spec)
    if report_path:
        Path(report_path).write_text(json.dumps(report, indent=1) + "\n")
    for problem in report["problems"]:
        say(f"error: {problem}")
    if not report["ok"]:
        say(f"{folder}: NOT sound, {len(report['problems'])} problems")
        return 1
    compared = report["units_compared_with_source"]
    sampled = f"{len(compared)} units compared with the source" if compared else "not compared with the source"
    say(
        f"{folder}: sound ({depth}: {report['shards']} shards, {report['documents']:,} documents, "
        f"{human_count(report['tokens'])} tokens; {sampled}) in {human_time(time.monotonic() - begin)}"
    )
    if not compared and depth == "full":
        say("give --dataset_name, --text_column and --tokenizer as well to tokenize a sample of the source again")
    return 0
