"""Token shards on disk, and which tokens a rank reads at a step.

    tokenize_dataset.py -> shard_00000.bin/.idx ... manifest.json -> TokenDataset -> Schedule -> WindowLoader

Three layers, each a plain value of the one before:
  TokenDataset  a folder of shards in Megatron's indexed-dataset format and its manifest.
  the stream    epoch after epoch of all shards; in epoch e the shards stand in an order that is a pure function of
                (seed, e). Every token of an epoch is in the stream exactly once.
  Schedule      where each optimizer step of the length curriculum starts in the stream, in closed form. Sequence j of a
                step covers stream tokens [start + j*L, start + (j+1)*L), so a change of length repeats and loses nothing
                and a resumed run needs no saved loader state.

    dataset = open_dataset("./data/tokenized_2m")        # or several folders with weights: "a@0.6,b@0.4"
    schedule = Schedule(stages=..., num_train_steps=..., world_size=2, per_device_train_batch_size=1,
                        gradient_accumulation_steps=256)
    with WindowLoader(dataset, schedule, seed=1234, rank=0) as loader:
        ids = loader.micro_batch(step=0, micro_step=0)      # int64 [batch, seq_length]

Memory stays flat however large the data: windows are read with pread into one buffer, nothing is mapped. Sequences
cross document and shard borders; the documents end in EOS. Needs numpy, no torch.

Damage is found before it is trained on: sizes when the folder is opened, and each shard's SHA-256 when its first token is
asked for, through the descriptor that is then read. Hashing all of a 100 B token data set (400 GB) at the start would take
minutes to hours, this way a rank pays a shard at a time, in the prefetch thread: 256 MiB at 1.5 GB/s are 0.18 s.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from config import Stage, UserError, parse_json, unknown_key
from durable_files import fsync_path, write_file_durably
from run_log import human_count

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKEN_DTYPE = np.dtype("<i4")  # ids reach 163,839: uint16 overflows
HASH_BYTES = 1 << 20
READ_TOKENS = 1 << 18  # read and widened to int64 at a time: small enough to stay in the processor's cache
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INT32_CODE = 4  # Megatron's code for int32
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of document_indices

# ---------------------------------------------------------------------------- shard files


def index_bytes(lengths: np.ndarray) -> bytes:
    """The .idx file of a shard whose documents have `lengths` tokens: one sequence per document."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and lengths.max() > np.iinfo(np.int32).max:
        raise UserError(f"a document has {lengths.max():,} tokens; Megatron's index holds at most 2,147,483,647")
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1] * TOKEN_DTYPE.itemsize, out=pointers[1:])
    # document_indices marks where documents begin among the sequences, and the end: 0, 1, ..., n
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, INT32_CODE, len(lengths), len(documents))
    return header + lengths.astype("<i4").tobytes() + pointers.tobytes() + documents.tobytes()


def read_index(path: Path) -> np.ndarray:
    """Tokens of each document of a shard, int64 [documents]. Raises UserError if the file is no sound index."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) < INDEX_HEADER.size:
        raise UserError(f"{path}: {len(content)} bytes is too short for a shard index")
    magic, version, code, sequences, documents = INDEX_HEADER.unpack_from(content)
    if (magic, version, code) != (INDEX_MAGIC, INDEX_VERSION, INT32_CODE):
        raise UserError(f"{path}: not a Megatron index of int32 tokens (header {content[:18]!r})")
    if documents != sequences + 1 or len(content) != INDEX_HEADER.size + sequences * 12 + documents * 8:
        raise UserError(f"{path}: {len(content)} bytes do not hold {sequences} sequences and {documents} borders")
    lengths = np.frombuffer(content, "<i4", sequences, INDEX_HEADER.size).astype(np.int64)
    if (lengths <= 0).any() or index_bytes(lengths) != content:
        raise UserError(f"{path}: lengths, byte offsets and document borders do not agree")
    return lengths


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest records it. `name` has no suffix: NAME.bin and NAME.idx lie in the folder."""

    name: str
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one shard document by document; nothing has its final name before `close`.

    Raises OSError (disk full, read-only folder). Use as a context manager: on an exception the temporary file goes.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder, self.name = Path(folder), name
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self._sha256 = hashlib.sha256()
        # the process id keeps a lost worker that still writes from sharing a file with its successor
        self._temporary = self.folder / f"{name}.bin.{os.uname().nodename}-{os.getpid()}.tmp"
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115

    @property
    def documents(self) -> int:
        return sum(len(part) for part in self._lengths)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` is their concatenation (int32, EOS included), `lengths` their token counts."""
        assert tokens.dtype == TOKEN_DTYPE and int(lengths.sum()) == len(tokens)
        data = memoryview(np.ascontiguousarray(tokens)).cast("B")
        self._sha256.update(data)
        while len(data):
            data = data[self._file.write(data) :]
        self._lengths.append(np.array(lengths, dtype=np.int64))
        self.tokens += len(tokens)

    def close(self) -> ShardInfo:
        """Make the shard durable under its final name and return what the manifest needs to know."""
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_bytes(np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64))
        write_file_durably(self.folder / f"{self.name}.idx", index)
        os.replace(self._temporary, self.folder / f"{self.name}.bin")
        fsync_path(self.folder)
        return ShardInfo(
            name=self.name,
            tokens=self.tokens,
            documents=self.documents,
            bin_bytes=self.tokens * TOKEN_DTYPE.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception) -> None:
        if not self._file.closed:
            self.abort()


class ShardReader:
    """Reads one shard by document or by token range. `lengths` (int64 [documents]) is loaded at first use."""

    def __init__(self, folder: str | Path, name: str):
        self.path = Path(folder) / name
        self._descriptor = os.open(f"{self.path}.bin", os.O_RDONLY | os.O_CLOEXEC)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return read_index(Path(f"{self.path}.idx"))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fill `buffer` (int32, contiguous) with the tokens from `start` on. Raises UserError if they are not there."""
        view = memoryview(buffer).cast("B")
        offset = start * TOKEN_DTYPE.itemsize
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise UserError(f"{self.path}.bin: ends before byte {offset + len(view)}; run --verify on its folder")
            view, offset = view[count:], offset + count

    def will_need(self, start: int, length: int) -> None:
        """Tell the kernel to read these tokens ahead; costs nothing when they are in memory."""
        if hasattr(os, "posix_fadvise"):
            size = TOKEN_DTYPE.itemsize
            os.posix_fadvise(self._descriptor, start * size, length * size, os.POSIX_FADV_WILLNEED)

    def sha256(self) -> str:
        """Of the .bin file, through the open descriptor: what is hashed is what will be read, even if the path is replaced."""
        digest, chunk, offset = hashlib.sha256(), memoryview(bytearray(HASH_BYTES)), 0
        while count := os.preadv(self._descriptor, [chunk], offset):
            digest.update(chunk[:count])  # without the GIL: training goes on beside it
            offset += count
        return digest.hexdigest()

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` with its EOS, int32."""
        tokens = np.empty(int(self.lengths[index]), TOKEN_DTYPE)
        self.read_into(tokens, int(self.starts[index]))
        return tokens

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


# ---------------------------------------------------------------------------- manifest and data set


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `statistics` and `source` are for people and for --verify; training needs the rest."""

    tokenizer_name: str
    tokenizer_hash: str
    vocab_size: int
    eos_token: str
    eos_token_id: int
    max_seq_length: int
    total_tokens: int
    documents: int
    shards: tuple[ShardInfo, ...]
    statistics: dict = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The manifest's one serial form: equal manifests are equal bytes."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(content: bytes, path: Path) -> Manifest:
        """Raises UserError, naming `path`, if the content is no manifest of this format version."""
        values = parse_json(content, path)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format_version is {version!r}; this toolkit reads {FORMAT_VERSION}")
        problems = _type_problems(Manifest, values, str(path))
        if not problems:
            for number, shard in enumerate(values["shards"]):
                problems += _type_problems(ShardInfo, shard, f"{path}: shards[{number}]")
        if problems:
            raise UserError("\n".join(f"{problem}; tokenize again or restore the file" for problem in problems))
        return Manifest(**{**values, "shards": tuple(ShardInfo(**shard) for shard in values["shards"])})

    def contradictions(self) -> list[str]:
        """What cannot be true of a finished folder, a sentence each."""
        problems = []
        for key in ("tokens", "documents"):
            stated = getattr(self, f"total_{key}" if key == "tokens" else key)
            counted = sum(getattr(shard, key) for shard in self.shards)
            if stated != counted:
                problems.append(f"it says {stated:,} {key}, its shards have {counted:,}")
        if not 0 <= self.eos_token_id < self.vocab_size:
            problems.append(f"eos_token_id is {self.eos_token_id}, not an id of a vocabulary of {self.vocab_size}")
        if self.max_seq_length < 1:
            problems.append(f"max_seq_length is {self.max_seq_length}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            problems.append("two shards have the same name")
        for shard in self.shards:
            if not re.fullmatch(r"\w[\w.-]*", shard.name):  # a path would leave the folder
                problems.append(f"{shard.name!r} is not the name of a shard in this folder")
            if shard.tokens < 0 or shard.bin_bytes != shard.tokens * TOKEN_DTYPE.itemsize:
                problems.append(f"{shard.name}: {shard.bin_bytes} bytes cannot be {shard.tokens} tokens")
            for key in ("bin_sha256", "idx_sha256"):
                if not re.fullmatch(r"[0-9a-f]{64}", getattr(shard, key)):
                    problems.append(f"{shard.name}: {key} is no SHA-256")
        return problems


_JSON_TYPES = {"str": str, "int": int, "dict": dict, "tuple[ShardInfo, ...]": list}


def _type_problems(kind: type, values, source: str) -> list[str]:
    """Missing, unknown and mistyped keys of a JSON object that is to become the dataclass `kind`."""
    if not isinstance(values, dict):
        return [f"{source} is a {type(values).__name__}, not a JSON object"]
    known = {f.name: f for f in fields(kind)}
    problems = [unknown_key(name, known, source) for name in values if name not in known]
    for name, f in known.items():
        wanted = _JSON_TYPES[f.type]
        if name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                problems.append(f"{source}: {name!r} is missing")
        elif not isinstance(values[name], wanted) or isinstance(values[name], bool):
            problems.append(f"{source}: {name} is {values[name]!r:.60}, not a {wanted.__name__}")
    return problems


class TokenDataset:
    """A finished folder of shards. Open it with `open_dataset`. Safe to use from several threads.

    A shard's checksum is compared before its first token is given out, and again whenever it had to be reopened.
    """

    MAX_OPEN_SHARDS = 256  # far below the usual limit of 1,024 open files

    def __init__(self, folder: Path, manifest: Manifest, manifest_hash: str):
        self.folder, self.manifest, self.manifest_hash = folder, manifest, manifest_hash
        self.total_tokens = manifest.total_tokens
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._verified: set[int] = set()  # of the open ones
        self._lock = threading.Lock()

    def read_shard_into(self, buffer: np.ndarray, shard: int, start: int) -> None:
        """Fill `buffer` with tokens of shard number `shard` from `start` on. Raises UserError for a damaged shard."""
        with self._lock:  # held while reading, so that no descriptor is closed under a reader's feet
            reader = self._reader(shard)
            if shard not in self._verified:
                if reader.sha256() != self.manifest.shards[shard].bin_sha256:
                    raise UserError(
                        f"data_dir: {reader.path}.bin has the right size but its SHA-256 is not the one in {MANIFEST}: it "
                        "was changed or replaced; restore it or tokenize again, then resume"
                    )
                self._verified.add(shard)
            reader.read_into(buffer, start)

    def will_need(self, shard: int, start: int, length: int) -> None:
        with self._lock:
            self._reader(shard).will_need(start, length)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            name = self.manifest.shards[shard].name
            try:
                self._readers[shard] = ShardReader(self.folder, name)
            except OSError as error:
                raise UserError(f"data_dir: {self.folder / name}.bin cannot be opened ({error.strerror})") from None
            if len(self._readers) > self.MAX_OPEN_SHARDS:
                closed, reader = self._readers.popitem(last=False)
                reader.close()
                self._verified.discard(closed)
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def close(self) -> None:
        with self._lock:
            self._verified.clear()
            while self._readers:
                self._readers.popitem()[1].close()


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a finished folder and its sha256. Raises UserError if there is none."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if (folder / PLAN).exists():
            raise UserError(
                f"data_dir: {folder} has no {MANIFEST}: tokenizing it was not finished; "
                "run the same tokenize_dataset.py command again, it goes on where it stopped"
            ) from None
        raise UserError(
            f"data_dir: {folder} has no {MANIFEST}, so it is not a folder of token shards; "
            f"make one with: python tokenize_dataset.py --dataset_name ... --output_dir {folder}"
        ) from None
    except OSError as error:
        raise UserError(f"data_dir: {path} cannot be read ({error.strerror})") from None
    return Manifest.from_json(content, path), hashlib.sha256(content).hexdigest()


def open_dataset(data_dir: str) -> TokenDataset | Mixture:
    """Open a folder of token shards, or several with weights: "a@0.6,b@0.4".

    Raises UserError: no folder, no manifest, files of another size than it says, or folders of unlike tokenizers.
    """
    if "@" not in data_dir:
        return _open_folder(data_dir)
    parts, weights = [], []
    for word in data_dir.split(","):
        folder, _, weight = word.strip().rpartition("@")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(math.nan)
        if not folder or not weights[-1] > 0 or math.isinf(weights[-1]):
            raise UserError(f"data_dir: {word.strip()!r} is not FOLDER@WEIGHT with a weight above 0; write a@0.6,b@0.4")
        parts.append(_open_folder(folder))
    return Mixture(parts, weights)


def _open_folder(data_dir: str) -> TokenDataset:
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(
            f"data_dir: the folder {data_dir} does not exist; make it with: "
            f"python tokenize_dataset.py --dataset_name ... --output_dir {data_dir}"
        )
    manifest, digest = read_manifest(folder)
    problems = manifest.contradictions()
    if problems:
        sentences = [f"data_dir: {folder / MANIFEST}: {text}; tokenize again or restore the file" for text in problems]
        raise UserError("\n".join(sentences))
    for shard in manifest.shards:
        for suffix, expected in (("bin", shard.bin_bytes), ("idx", shard.idx_bytes)):
            path = folder / f"{shard.name}.{suffix}"
            try:
                size = path.stat().st_size
            except OSError:
                raise UserError(f"data_dir: {path} is missing although {MANIFEST} lists it") from None
            if size != expected:
                raise UserError(
                    f"data_dir: {path} has {size:,} bytes but {MANIFEST} says {expected:,}; copy it again or tokenize again"
                )
    return TokenDataset(folder, manifest, digest)


class Mixture:
    """Several data sets with weights, served sequence by sequence; which one serves sequence n is a function of n.

    Every block of BLOCK sequences holds each part's share exactly (weights are kept to 1/BLOCK), in a fixed shuffled
    order, so the sequences that a part has served before n are known in closed form. Within a part its own stream goes
    on where its last sequence ended: each of its epochs is served exactly once.
    """

    BLOCK = 1000

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[float]):
        first = parts[0].manifest
        for part in parts[1:]:
            for key in ("tokenizer_hash", "vocab_size", "eos_token_id"):
                ours, theirs = getattr(first, key), getattr(part.manifest, key)
                if ours != theirs:
                    raise UserError(
                        f"data_dir: {parts[0].folder} and {part.folder} cannot be mixed: {key} is {ours} and {theirs}; "
                        "tokenize them with one tokenizer"
                    )
        self.parts, self.weights = tuple(parts), tuple(weight / sum(weights) for weight in weights)
        self.folder = ", ".join(f"{part.folder}@{weight:g}" for part, weight in zip(parts, weights, strict=True))
        self.total_tokens = sum(part.total_tokens for part in parts)
        self.manifest = replace(
            first,
            total_tokens=self.total_tokens,
            documents=sum(part.manifest.documents for part in parts),
            shards=tuple(shard for part in parts for shard in part.manifest.shards),
            statistics={},
            source={},
        )
        digests = [[part.manifest_hash, weight] for part, weight in zip(parts, self.weights, strict=True)]
        self.manifest_hash = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        self._block = self._shuffled_block()
        # served[i, n]: sequences of part i among the first n of a block
        owners = np.array(self._block)[None] == np.arange(len(parts))[:, None]
        self._served = np.concatenate([np.zeros((len(parts), 1), np.int64), np.cumsum(owners, axis=1)], axis=1)

    def _shuffled_block(self) -> list[int]:
        """Which part serves each sequence of a block: largest remainders, then an order by hash."""
        exact = [weight * self.BLOCK for weight in self.weights]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: self.BLOCK - sum(counts)]:
            counts[i] += 1
        owners = [part for part, count in enumerate(counts) for _ in range(count)]
        order = epoch_order(self.BLOCK, seed=0, epoch=0)
        return [owners[place] for place in order]

    def owner(self, sequence: int) -> int:
        """The part that serves sequence number `sequence` of the whole run."""
        return self._block[sequence % self.BLOCK]

    def served_before(self, part: int, sequence: int) -> int:
        """How many of the run's first `sequence` sequences `part` serves."""
        blocks, rest = divmod(sequence, self.BLOCK)
        return int(blocks * self._served[part, -1] + self._served[part, rest])

    def close(self) -> None:
        for part in self.parts:
            part.close()


# ---------------------------------------------------------------------------- the endless stream


def epoch_order(shards: int, *, seed: int, epoch: int) -> list[int]:
    """The order of `shards` shards in an epoch: a pure function of its arguments.

    Sorted by a hash rather than drawn from numpy's generator, whose draws may change between numpy versions.
    """
    key = lambda shard: hashlib.blake2b(f"{seed}/{epoch}/{shard}".encode(), digest_size=16).digest()  # noqa: E731
    return sorted(range(shards), key=key)


class TokenStream:
    """Epoch after epoch of a data set's shards as one endless stream of tokens."""

    def __init__(self, dataset: TokenDataset, *, seed: int):
        self.dataset, self.seed = dataset, seed
        self._epoch = functools.lru_cache(maxsize=4)(self._epoch_layout)

    def _epoch_layout(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shards in this epoch's order and the offset in the epoch at which each begins."""
        shards = self.dataset.manifest.shards
        order = epoch_order(len(shards), seed=self.seed, epoch=epoch)
        return order, [0, *itertools.accumulate(shards[shard].tokens for shard in order)]

    def pieces(self, start: int, length: int):
        """Where stream tokens [start, start + length) lie: (offset in the window, shard, first token, tokens)."""
        done = 0
        while done < length:
            epoch, offset = divmod(start + done, self.dataset.total_tokens)
            order, starts = self._epoch(epoch)
            place = bisect.bisect_right(starts, offset) - 1
            count = min(starts[place + 1] - offset, length - done)
            yield done, order[place], offset - starts[place], count
            done += count

    def read_into(self, buffer: np.ndarray, start: int) -> None:
        """Fill `buffer` (int32) with the stream's tokens from `start` on."""
        for at, shard, first, count in self.pieces(start, len(buffer)):
            self.dataset.read_shard_into(buffer[at : at + count], shard, first)

    def will_need(self, start: int, length: int) -> None:
        for _, shard, first, count in self.pieces(start, length):
            self.dataset.will_need(shard, first, count)


def sequence_tokens(dataset: TokenDataset, seed: int, start_token: int, length: int) -> np.ndarray:
    """Stream tokens [start_token, start_token + length), int64, token by token: the reference for the loader's tests."""
    tokens = np.empty(length, dtype=np.int64)
    epochs: dict[int, np.ndarray] = {}
    for i in range(length):
        epoch, offset = divmod(start_token + i, dataset.total_tokens)
        if epoch not in epochs:
            names = [
                dataset.manifest.shards[k].name
                for k in epoch_order(len(dataset.manifest.shards), seed=seed, epoch=epoch)
            ]
            epochs[epoch] = np.concatenate([np.fromfile(dataset.folder / f"{name}.bin", TOKEN_DTYPE) for name in names])
        tokens[i] = epochs[epoch][offset]
    return tokens


# ---------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. `sequences` and `tokens` count all ranks; `start_token` is its place in the endless stream."""

    step: int
    stage_index: int
    seq_length: int
    accumulation_steps: int
    sequences: int
    tokens: int
    start_token: int


class Schedule:
    """The length curriculum as a function of the step, in closed form per stage.

    `tokens_per_step` holds the tokens of an optimizer step near one number in every stage: the accumulation becomes
    max(1, round(tokens_per_step / (seq_length * world_size * batch))) instead of `gradient_accumulation_steps`.
    """

    def __init__(
        self,
        *,
        stages: Sequence[Stage],
        num_train_steps: int,
        world_size: int,
        per_device_train_batch_size: int,
        gradient_accumulation_steps: int,
        tokens_per_step: int | None = None,
    ):
        self.num_train_steps, self.world_size, self.batch = num_train_steps, world_size, per_device_train_batch_size
        self.stages = tuple(stages)
        self._accumulation, self._stage_start_tokens, start_token = [], [], 0
        self._stage_start_sequences, start_sequence = [], 0
        for index, stage in enumerate(self.stages):
            rows = world_size * per_device_train_batch_size
            accumulation = gradient_accumulation_steps
            if tokens_per_step is not None:
                accumulation = max(1, round(tokens_per_step / (stage.seq_length * rows)))
            self._accumulation.append(accumulation)
            self._stage_start_tokens.append(start_token)
            self._stage_start_sequences.append(start_sequence)
            start_sequence += self.stage_steps(index) * accumulation * rows
            start_token += self.stage_steps(index) * accumulation * rows * stage.seq_length
        self.total_tokens = start_token

    @property
    def sequences_per_step(self) -> list[int]:
        """Sequences of an optimizer step on all ranks, one number a stage."""
        return [accumulation * self.world_size * self.batch for accumulation in self._accumulation]

    def stage_steps(self, index: int) -> int:
        """Optimizer steps of stage `index` within num_train_steps."""
        ends = [stage.start_step for stage in self.stages[1:]] + [self.num_train_steps]
        return max(0, min(ends[index], self.num_train_steps) - self.stages[index].start_step)

    def step(self, step: int) -> StepPlan:
        """What optimizer step `step` (counted from 0) trains on. Raises ValueError outside the schedule."""
        if not 0 <= step < self.num_train_steps:
            raise ValueError(f"step {step} is outside the schedule of {self.num_train_steps} steps")
        index = bisect.bisect_right([stage.start_step for stage in self.stages], step) - 1
        stage, accumulation = self.stages[index], self._accumulation[index]
        sequences = accumulation * self.world_size * self.batch
        tokens = sequences * stage.seq_length
        start = self._stage_start_tokens[index] + (step - stage.start_step) * tokens
        return StepPlan(step, index, stage.seq_length, accumulation, sequences, tokens, start)

    def sequence_number(self, step: int, sequence: int) -> int:
        """The number in the whole run of sequence `sequence` of a step."""
        plan = self.step(step)
        stage_start = self.stages[plan.stage_index].start_step
        return self._stage_start_sequences[plan.stage_index] + (step - stage_start) * plan.sequences + sequence

    def tokens_of_part(self, mixture: Mixture, part: int, sequence: int) -> int:
        """Tokens that `part` of a mixture has served before the run's sequence number `sequence`, O(stages)."""
        ends = [*self._stage_start_sequences[1:], math.inf]
        tokens = 0
        for stage, start, end in zip(self.stages, self._stage_start_sequences, ends, strict=True):
            if start < sequence:
                upto = int(min(end, sequence))
                tokens += (mixture.served_before(part, upto) - mixture.served_before(part, start)) * stage.seq_length
        return tokens

    def describe(self, dataset: TokenDataset | Mixture | None) -> str:
        """The start-up text: every stage, the tokens that the schedule needs and the epochs of `dataset` that is.

        Without a data set (a dry run before tokenizing) the text ends with the tokens needed.
        """
        lines = []
        for index, stage in enumerate(self.stages):
            steps = self.stage_steps(index)
            if steps == 0:
                lines.append(f"stage {index}: from step {stage.start_step}: beyond num_train_steps, never reached")
                continue
            plan = self.step(stage.start_step)
            lines.append(
                f"stage {index}: steps {stage.start_step}-{stage.start_step + steps - 1}: {stage.seq_length:,} tokens x "
                f"{plan.sequences:,} sequences ({plan.accumulation_steps} micro-steps x {self.world_size} ranks x "
                f"{self.batch}) = {human_count(plan.tokens)} tokens a step, {human_count(plan.tokens * steps)} in all"
            )
        if dataset is None:
            lines.append(f"data: none yet; the schedule needs {human_count(self.total_tokens)} tokens")
            return "\n".join(lines)
        lines.append(f"the schedule needs {human_count(self.total_tokens)} tokens")
        parts, weights = (dataset.parts, dataset.weights) if isinstance(dataset, Mixture) else ((dataset,), (1.0,))
        for part, weight in zip(parts, weights, strict=True):
            epochs = weight * self.total_tokens / part.total_tokens
            share = f"{100 * weight:.1f} % of the sequences from {part.folder}: " if len(parts) > 1 else ""
            lines.append(
                f"data: {share}{human_count(part.total_tokens)} tokens in {part.manifest.documents:,} documents and "
                f"{len(part.manifest.shards)} shards = {epochs:.2f} epochs of this data set"
            )
            if epochs > 4:
                lines.append(
                    f"WARNING: every document is read {epochs:.1f} times; beyond about 4 repeats little is learned"
                )
        return "\n".join(lines)


# ---------------------------------------------------------------------------- the loader


class BufferPool:
    """int64 arrays that are given out again once nobody holds them.

    A fresh 16 MB array costs more in page faults than reading 2M tokens from the page cache does. Who still holds an array
    (or a view of it, or a torch tensor made from it) keeps it: reuse is decided by the reference count.
    """

    def __init__(self):
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, length: int) -> np.ndarray:
        with self._lock:
            # a stage switch leaves arrays of another length behind
            self._buffers = [buffer for buffer in self._buffers if len(buffer) == length]
            for place in range(len(self._buffers)):
                # two references: the list's, and getrefcount's own argument
                if sys.getrefcount(self._buffers[place]) == 2:
                    return self._buffers[place][:]
            self._buffers.append(np.empty(length, np.int64))
            return self._buffers[-1][:]


class WindowLoader:
    """Serves micro-batches; the next one is read in a background thread while this one is trained on.

    Row r of rank k in micro-step m is sequence j = m*world*batch + k*batch + r of the step: what is served depends on
    the arguments alone, and the order of sequences is the same for any world size at equal global batch.

    Raises UserError if the data set is smaller than one sequence of the first stage.
    """

    def __init__(
        self, dataset: TokenDataset | Mixture, schedule: Schedule, *, seed: int, rank: int, prefetch: bool = True
    ):
        first = schedule.stages[0].seq_length
        self.mixture = dataset if isinstance(dataset, Mixture) else None
        parts = self.mixture.parts if self.mixture else (dataset,)
        for part in parts:
            if part.total_tokens < first:
                raise UserError(
                    f"data_dir: {part.folder} holds {part.total_tokens:,} tokens, less than one sequence of the first "
                    f"stage ({first:,}); tokenize more data or shorten the curriculum"
                )
        self.schedule, self.rank = schedule, rank
        self.streams = [TokenStream(part, seed=seed) for part in parts]
        self._buffers = BufferPool()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="window-prefetch") if prefetch else None
        self._pending: tuple[tuple[int, int], Future] | None = None

    def begin(self, step: int) -> None:
        """Read the first micro-batch of `step` in the background: the model can be loaded meanwhile."""
        if self._pool and step < self.schedule.num_train_steps:
            self._pending = ((step, 0), self._pool.submit(self._read_ahead, step, 0))

    def micro_batch(self, step: int, micro_step: int) -> np.ndarray:
        """Token ids of this rank's micro-batch, int64 [batch, seq_length]. A pure function of its arguments."""
        wanted = (step, micro_step)
        pending, self._pending = self._pending, None
        batch = pending[1].result() if pending and pending[0] == wanted else self._read(*wanted)
        following = self._following(*wanted)
        if self._pool and following:
            self._pending = (following, self._pool.submit(self._read_ahead, *following))
        return batch

    def _following(self, step: int, micro_step: int) -> tuple[int, int] | None:
        if micro_step + 1 < self.schedule.step(step).accumulation_steps:
            return step, micro_step + 1
        return (step + 1, 0) if step + 1 < self.schedule.num_train_steps else None

    def _read_ahead(self, step: int, micro_step: int) -> np.ndarray:
        following = self._following(step, micro_step)
        if following:  # the window after this one: the kernel fetches it while this one is trained on
            for stream, start, length in self._places(*following):
                stream.will_need(start, length)
        return self._read(step, micro_step)

    def _places(self, step: int, micro_step: int) -> list[tuple[TokenStream, int, int]]:
        """(stream, its first token, tokens) of this rank's micro-batch, in order."""
        plan, batch = self.schedule.step(step), self.schedule.batch
        if not 0 <= micro_step < plan.accumulation_steps:
            raise ValueError(f"micro-step {micro_step} is outside step {step}'s {plan.accumulation_steps}")
        sequence = (micro_step * self.schedule.world_size + self.rank) * batch
        if self.mixture is None:  # a rank's rows are neighbours in the one stream: one read
            return [(self.streams[0], plan.start_token + sequence * plan.seq_length, batch * plan.seq_length)]
        places = []
        for row in range(batch):
            number = self.schedule.sequence_number(step, sequence + row)
            part = self.mixture.owner(number)
            start = self.schedule.tokens_of_part(self.mixture, part, number)
            places.append((self.streams[part], start, plan.seq_length))
        return places

    def _read(self, step: int, micro_step: int) -> np.ndarray:
        places = self._places(step, micro_step)
        ids = self._buffers.take(sum(length for _, _, length in places))
        scratch = np.empty(min(len(ids), READ_TOKENS), TOKEN_DTYPE)
        at = 0
        for stream, start, length in places:
            for begin in range(0, length, READ_TOKENS):
                part = scratch[: min(READ_TOKENS, length - begin)]
                stream.read_into(part, start + begin)
                ids[at : at + len(part)] = part
                at += len(part)
        return ids.reshape(self.schedule.batch, -1)

    def close(self) -> None:
        """Stop the background thread; a window it is reading is finished and dropped."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pending = None

    def __enter__(self) -> WindowLoader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
