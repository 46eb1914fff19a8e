"""The order of documents in the final shards: shuffled, or neighbours alike (`--pack shuffled | related`).

    tokenized shards in source order  ->  document_order.npy  ->  final shards, each with its own record

2M windows of random short documents teach little at long range: nothing in the first document helps with the last. `related`
puts documents of one source (domain, URL host) together, within it documents that share rare tokens, and within a
neighbourhood chains each document to its nearest neighbour:
  1. group   by the source column, if there is one, in order of name
  2. sketch  four minimum hashes over the document's tokens (two documents agree in one with the probability of their Jaccard
             similarity) and a 256-bit sign sketch; the commonest ids are left out
  3. sort    by group, then by the minimum hashes
  4. chain   in stretches of 1,024: from each document to the unused one with the nearest sign sketch
All of it is a function of the shards and the seed, so the result is the same bytes for any number of processes. Every
document is in the order exactly once.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import process_pool
from data_loader import ShardInfo, ShardReader, ShardWriter, read_index, write_file_durably
from progress import ProgressLine
from run_log import say
from token_units import sources_path

ORDER = "document_order.npy"
MIN_HASHES = 4
SKETCH_BITS = 256
SKETCH_TOKENS = 256
STRETCH = 1024
SEED = 1234


def mixed(values: np.ndarray, salt: int) -> np.ndarray:
    """splitmix64 of uint64 values: a hash that no numpy version changes."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled_order(documents: int) -> np.ndarray:
    """A permutation of all documents, by a seeded hash of their number."""
    return np.argsort(mixed(np.arange(documents), SEED), kind="stable")


# ---------------------------------------------------------------------------- related


@dataclass(frozen=True)
class SketchJob:
    """Tasks are shards in source order; a result is (minimum hashes [documents, 4], sign sketches [documents, 32])."""

    folder: str
    vocab_size: int

    def start(self, report) -> dict:
        ids = np.arange(self.vocab_size)
        return {
            "hashes": np.stack([mixed(ids, salt) >> np.uint64(32) for salt in range(MIN_HASHES)]).astype(np.uint32),
            "signs": np.stack([mixed(ids, 100 + word) for word in range(SKETCH_BITS // 64)], axis=1),
        }

    def work(self, state: dict, shard: ShardInfo, report) -> tuple[np.ndarray, np.ndarray]:
        with ShardReader(self.folder, shard.name) as reader:
            sketches = [sketch(reader.document(i), state, self.vocab_size) for i in range(shard.documents)]
        return np.stack([s[0] for s in sketches]), np.stack([s[1] for s in sketches])


def sketch(tokens: np.ndarray, state: dict, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(minimum hashes uint32 [4], sign sketch uint8 [32]) of a document's set of tokens, EOS aside.

    Byte-pair vocabularies number their tokens by frequency: ids in the lowest 2 % are the common ones that tell nothing, and
    the sign sketch is of the SKETCH_TOKENS rarest (of all, it would cost more than tokenizing).
    """
    ids = np.unique(tokens[:-1])
    rare = ids[ids >= vocab_size // 50]
    ids = rare if len(rare) else ids
    rarest = ids[-SKETCH_TOKENS:]
    bits = np.unpackbits(state["signs"][rarest].view(np.uint8), axis=1)
    signs = bits.sum(axis=0, dtype=np.int32) * 2 > len(rarest)
    return state["hashes"][:, ids].min(axis=1), np.packbits(signs)


def related_order(groups: np.ndarray, min_hashes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The permutation: by group, by minimum hashes, then chained to nearest neighbours within stretches."""
    keys = [min_hashes[:, i] for i in range(MIN_HASHES - 1, -1, -1)]
    order = np.lexsort([*keys, groups])
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    starts = [0, *borders.tolist(), len(order)]
    for first, last in itertools.pairwise(starts):
        for begin in range(first, last, STRETCH):
            part = order[begin : min(begin + STRETCH, last)]
            order[begin : begin + len(part)] = part[nearest_chain(signs[part])]
    return order


def nearest_chain(signs: np.ndarray) -> np.ndarray:
    """A path over all rows from row 0 that always steps to the unused row with the fewest differing bits."""
    vectors = np.unpackbits(signs, axis=1).astype(np.float32) * 2 - 1
    likeness = vectors @ vectors.T  # sums of +-1: exact in float32
    path = np.zeros(len(signs), np.int64)
    for step in range(1, len(signs)):
        likeness[:, path[step - 1]] = -np.inf
        path[step] = int(np.argmax(likeness[path[step - 1]]))
    return path


# ---------------------------------------------------------------------------- the final shards


@dataclass(frozen=True)
class GatherJob:
    """Tasks are (final shard number, first place, last place) in the order; a result is the new ShardInfo."""

    unpacked: str
    folder: str
    shards: tuple[ShardInfo, ...]

    def start(self, report) -> tuple:
        order = np.load(Path(self.folder) / ORDER, mmap_mode="r")
        firsts = np.cumsum([0, *(shard.documents for shard in self.shards)])
        return order, firsts, {}

    def work(self, state: tuple, task: tuple[int, int, int], report) -> ShardInfo:
        order, firsts, readers = state
        number, begin, end = task
        with ShardWriter(self.folder, f"shard_{number:05d}") as writer:
            for document in order[begin:end]:
                shard = int(np.searchsorted(firsts, document, side="right")) - 1
                if shard not in readers:
                    if len(readers) >= 256:  # far below the usual limit of open files
                        readers.pop(next(iter(readers))).close()
                    readers[shard] = ShardReader(self.unpacked, self.shards[shard].name)
                tokens = readers[shard].document(int(document - firsts[shard]))
                writer.add(tokens, np.array([len(tokens)]))
            info = writer.close()
        record = {"begin": begin, "end": end, "shard": asdict(info)}
        write_file_durably(Path(self.folder) / f"pack_{number:05d}.json", json.dumps(record).encode())
        return info


def document_groups(unpacked: Path, units: list[int]) -> np.ndarray:
    """The number of each document's source, by order of name; int32, as there may be many millions of documents."""
    paths = [sources_path(unpacked, unit) for unit in units]
    names = sorted(set().union(*(json.loads(path.read_bytes()) for path in paths)))
    number = {name: i for i, name in enumerate(names)}
    parts = (np.array([number[name] for name in json.loads(path.read_bytes())], np.int32) for path in paths)
    return np.concatenate(list(parts))


def write_order(
    folder: Path, unpacked: Path, shards: list[ShardInfo], units: list[int], how: str, *, vocab_size: int, workers: int
):
    """Find the order and write it durably, unless an earlier run of the same plan did."""
    path = folder / ORDER
    if path.exists():
        return
    documents = sum(shard.documents for shard in shards)
    if how == "shuffled":
        order = shuffled_order(documents)
    else:
        job = SketchJob(str(unpacked), vocab_size)
        tasks = list(enumerate(shards))
        found = {shard.name: s for shard, s in process_pool.run(job, shards, workers=min(workers, len(tasks)))}
        min_hashes = np.concatenate([found[shard.name][0] for shard in shards])
        signs = np.concatenate([found[shard.name][1] for shard in shards])
        order = related_order(document_groups(unpacked, units), min_hashes, signs)
    assert len(order) == documents
    content = io.BytesIO()
    np.save(content, order.astype(np.int64))
    write_file_durably(path, content.getvalue())


def pack(
    folder: Path,
    unpacked: Path,
    shards: list[ShardInfo],
    units: list[int],
    how: str,
    *,
    shard_tokens: int,
    vocab_size: int,
    workers: int,
) -> tuple[list[ShardInfo], str]:
    """Write the final shards from those in `unpacked`; returns them and the sha256 of the order. Resumable by shard."""
    say(f"packing: {how} order of {sum(shard.documents for shard in shards):,} documents")
    write_order(folder, unpacked, shards, units, how, vocab_size=vocab_size, workers=workers)
    order = np.load(folder / ORDER)
    lengths = np.concatenate([read_index(unpacked / f"{shard.name}.idx") for shard in shards])[order]
    tasks, begin, ends = [], 0, np.cumsum(lengths)
    while begin < len(order):
        used = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, used + shard_tokens, side="right")))
        tasks.append((len(tasks), begin, end))
        begin = end
    done: dict[int, ShardInfo] = {}
    for number, begin, end in tasks:
        record = finished_pack(folder, number, begin, end)
        if record:
            done[number] = record
    job = GatherJob(str(unpacked), str(folder), tuple(shards))
    bar = ProgressLine("packing", total=len(order), first=sum(info.documents for info in done.values()))
    todo = [task for task in tasks if task[0] not in done]
    for task, info in process_pool.run(job, todo, workers=min(workers, len(todo))):
        done[task[0]] = info
        bar.done += info.documents
        bar.add(documents=info.documents, tokens=info.tokens)
        bar.draw_if_due()
    return [done[number] for number, _, _ in tasks], hashlib.sha256((folder / ORDER).read_bytes()).hexdigest()


def finished_pack(folder: Path, number: int, begin: int, end: int) -> ShardInfo | None:
    """A final shard that an earlier run completed, if its files are there in full size."""
    try:
        record = json.loads((folder / f"pack_{number:05d}.json").read_bytes())
        info = ShardInfo(**record["shard"])
        sizes = [(folder / f"{info.name}.{suffix}").stat().st_size for suffix in ("bin", "idx")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = sizes == [info.bin_bytes, info.idx_bytes] and (record["begin"], record["end"]) == (begin, end)
    return info if whole else None
