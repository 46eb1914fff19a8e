"""One unit of a plan: its rows to shards, and the record that completes it.

    job = TokenizeJob(folder, source, spec, encoder="auto", shard_tokens=1 << 26, plan_sha256=...)
    record = job.work(job.start(report), (unit, None), report)      # in any process, on any machine

    text_sources.read_unit -> batches -> encode_documents -> UnitWriter -> shard files -> unit_00012.json

A unit's bytes depend on the plan alone, so it may be done twice, by anyone, at any time: the same files are renamed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import encoders
from config import UserError
from data_loader import TOKEN_DTYPE, ShardInfo, ShardWriter, write_file_durably
from text_sources import Row, Source, Unit, read_unit

BATCH_CHARS = 1 << 20  # text encoded at once
BATCH_DOCUMENTS = 1024
LENGTH_CLASSES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)  # borders of the length histogram, tokens


@dataclass(frozen=True)
class TokenizeJob:
    """Everything a worker needs: tasks are (unit, most documents to keep or None)."""

    folder: str
    source: Source
    spec: encoders.TokenizerSpec
    encoder: str
    shard_tokens: int
    plan_sha256: str
    keep_sources: bool = False  # write each document's source beside the shards, for --pack related

    def start(self, report) -> list[encoders.Encoder]:
        """The process's encoder, in a list so that `work` can replace it."""
        encoder, why = encoders.choose_encoder(self.spec, self.encoder)
        report(encoder=why)
        return [encoder]

    def work(self, state: list[encoders.Encoder], task: tuple[Unit, int | None], report) -> dict:
        unit, max_documents = task
        try:
            return tokenize_unit(self, state[0], unit, report, max_documents=max_documents)
        except encoders.EncoderMismatch as difference:
            report(
                warning=f"the fast encoder is not exact ({difference}); unit {unit.index} is done again and this process "
                "goes on with the reference encoder"
            )
            state[0] = state[0].reference
            return tokenize_unit(self, state[0], unit, report, max_documents=max_documents)


def record_path(folder: Path, unit: int) -> Path:
    return folder / f"unit_{unit:05d}.json"


def tokenize_unit(job: TokenizeJob, encoder, unit: Unit, report, *, max_documents: int | None = None) -> dict:
    """Write a unit's shards and then its record, which is returned. With `max_documents` only so many are kept."""
    counts = {"rows": 0, "dropped": 0, "replaced": 0, "text_bytes": 0}
    lengths_seen: list[np.ndarray] = []
    origins_seen: list[str] = []
    try:
        with UnitWriter(Path(job.folder), unit.index, job.shard_tokens) as writer:
            room = lambda: BATCH_DOCUMENTS if max_documents is None else max_documents - len(origins_seen)  # noqa: E731
            for rows, batch_counts in batches(read_unit(job.source, unit), room):
                where = f"unit {unit.index}, row {counts['rows']}"
                tokens, lengths, kept = encode_documents(encoder, [row.text for row in rows], job.spec, where)
                batch_counts["dropped"] += len(rows) - len(kept)
                origins_seen += [rows[i].source for i in kept]
                writer.add(tokens, lengths)
                lengths_seen.append(lengths)
                for key in counts:
                    counts[key] += batch_counts[key]
                report(documents=len(lengths), tokens=len(tokens), text_bytes=batch_counts["text_bytes"])
                if len(origins_seen) == max_documents:
                    break
            shards = writer.close()
        lengths = np.concatenate(lengths_seen) if lengths_seen else np.zeros(0, np.int64)
        classes = np.searchsorted(LENGTH_CLASSES, lengths, side="right")
        record = {
            "unit": unit.index,
            "plan_sha256": job.plan_sha256,
            "max_documents": max_documents,
            "shards": [asdict(shard) for shard in shards],
            **counts,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max(initial=0)),
            "class_documents": np.bincount(classes, minlength=len(LENGTH_CLASSES) + 1).tolist(),
            "class_tokens": np.bincount(classes, lengths, len(LENGTH_CLASSES) + 1).astype(np.int64).tolist(),
            "sources": count_sources(origins_seen, lengths) if job.source.source_column else {},
        }
        if job.keep_sources:
            write_file_durably(sources_path(Path(job.folder), unit.index), json.dumps(origins_seen).encode())
        write_file_durably(record_path(Path(job.folder), unit.index), json.dumps(record).encode())
    except OSError as error:
        raise UserError(
            f"output_dir: writing to {job.folder} failed ({error.strerror or error}); finished units are kept: make room or mend "
            "the disk, then run the same command again"
        ) from None
    return record


def sources_path(folder: Path, unit: int) -> Path:
    return folder / f"sources_{unit:05d}.json"


def count_sources(origins: list[str], lengths: np.ndarray) -> dict[str, list[int]]:
    """Source -> [documents, tokens]."""
    found: dict[str, list[int]] = {}
    for origin, length in zip(origins, lengths.tolist(), strict=True):
        entry = found.setdefault(origin, [0, 0])
        entry[0] += 1
        entry[1] += length
    return found


def batches(rows: Iterable[Row], room: Callable[[], int]) -> Iterator[tuple[list[Row], dict]]:
    """Rows with text, some at a time, and what was counted on the way; a batch may be one long document.

    A batch has at most `room()` texts, asked anew for each.
    """
    texts: list[Row] = []
    counts = {"rows": 0, "dropped": 0, "replaced": 0, "text_bytes": 0}
    chars = 0
    for row in rows:
        counts["rows"] += 1
        if not row.has_text:
            counts["dropped"] += 1
        else:
            texts.append(row)
            chars += len(row.text)
            counts["replaced"] += row.replaced
            counts["text_bytes"] += row.text_bytes
        if chars >= BATCH_CHARS or len(texts) >= min(BATCH_DOCUMENTS, room()):
            yield texts, counts
            texts, chars, counts = [], 0, dict.fromkeys(counts, 0)
    if counts["rows"]:
        yield texts, counts


def encode_documents(encoder, texts: list[str], spec, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens with EOS after each document, tokens of each with its EOS, which texts became documents).

    Texts without a token are left out. Raises UserError if an id is not below the vocabulary or a text gives EOS: both
    would poison training silently.
    """
    tokens, lengths = encoder.encode(texts)
    if len(tokens) and (tokens.max() >= spec.vocab_size or tokens.min() < 0):
        raise UserError(f"tokenizer: {where}: id {tokens.max()} is not below the vocabulary's {spec.vocab_size}")
    if (tokens == spec.eos_token_id).any():
        raise UserError(
            f"tokenizer: {where} on: a document's text gives {spec.eos_token!r} (id {spec.eos_token_id}), which ends "
            "documents; name another special token with --eos_token"
        )
    kept = np.flatnonzero(lengths)
    lengths = lengths[kept]
    ended = np.insert(tokens, np.cumsum(lengths), spec.eos_token_id).astype(TOKEN_DTYPE, copy=False)
    return ended, lengths + 1, kept


class UnitWriter:
    """Spreads a unit's documents over shards of at most `shard_tokens` tokens: shard_00012, shard_00012_1, ..."""

    def __init__(self, folder: Path, unit: int, shard_tokens: int):
        self.folder, self.unit, self.shard_tokens = folder, unit, shard_tokens
        self._done: list[ShardInfo] = []
        self._open: ShardWriter | None = None

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            begin = int(ends[first] - lengths[first])
            room = self.shard_tokens - (self._open.tokens if self._open else 0)
            last = int(np.searchsorted(ends, begin + room, side="right"))  # documents [first, last) fit
            if last <= first and self._open:
                self._finish_shard()
                continue
            last = max(last, first + 1)  # a document longer than a shard gets one of its own
            if self._open is None:
                suffix = f"_{len(self._done)}" if self._done else ""
                self._open = ShardWriter(self.folder, f"shard_{self.unit:05d}{suffix}")
            self._open.add(tokens[begin : ends[last - 1]], lengths[first:last])
            first = last

    def _finish_shard(self) -> None:
        self._done.append(self._open.close())
        self._open = None

    def close(self) -> list[ShardInfo]:
        """All shards of the unit, durable; none if it had no documents."""
        if self._open:
            self._finish_shard()
        return self._done

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *exception) -> None:
        if self._open:
            self._open.abort()


def finished_records(folder: Path, units: list[Unit], plan_sha256: str) -> dict[int, dict]:
    """Records of the units that an earlier run of this plan completed and whose shards are there in full size."""
    records = {}
    for unit in units:
        try:
            record = json.loads(record_path(folder, unit.index).read_bytes())
            whole = record["plan_sha256"] == plan_sha256 and record["max_documents"] is None
            for shard in record["shards"]:
                whole = whole and (folder / f"{shard['name']}.bin").stat().st_size == shard["bin_bytes"]
                whole = whole and (folder / f"{shard['name']}.idx").stat().st_size == shard["idx_bytes"]
        except (OSError, ValueError, KeyError):
            continue
        if whole:
            records[unit.index] = record
    return records
