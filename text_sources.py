"""Documents out of files: which files a data set has, how they are cut into units of work, and reading one unit.

    source = find_source("data/*.parquet", config=None, split=None, text_column="text", threads=2)
    units = cut_units(source, unit_bytes=32 << 20)
    for row in read_unit(source, units[0]): ...        # Row(text, replaced), in the file's order

A unit is a range of one file: rows of a parquet file, bytes of a .jsonl, record batches of an .arrow file, a whole
compressed .jsonl.gz or .jsonl.zst (they cannot be entered in the middle), a range of .txt files (one document each), or
one shard of a Hub data set read through `datasets` streaming. The units of a source and the rows of a unit depend on the
data and the options alone, never on how many processes read them. Every row belongs to exactly one unit.

Nothing here knows tokens. Errors are UserErrors that name file and row. pyarrow, zstandard and datasets are imported by
the functions that need them.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import urllib.parse
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".arrow", ".txt")
READ_BYTES = 1 << 20  # how much is read, or decoded from parquet, at a time
COMPRESSED_RATIO = 4  # text bytes per compressed byte: a guess for progress and unit sizes only


@dataclass(frozen=True)
class SourceFile:
    """One file. `name` is relative to the data set, so that a copy elsewhere is the same source; `sha256` its content."""

    path: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A data set: files on this machine, or (`hub`) rows that `datasets` streams from the Hub at one revision."""

    text_column: str
    source_column: str | None = None
    files: tuple[SourceFile, ...] = ()
    hub: tuple[str, str | None, str, str | None] | None = None  # name, config, split, revision

    def fingerprint(self) -> dict:
        """What a plan records: equal for equal content, wherever it lies."""
        files = [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in self.files]
        return {
            "text_column": self.text_column,
            "source_column": self.source_column,
            "files": files,
            "hub": list(self.hub) if self.hub else None,
        }


@dataclass(frozen=True)
class Unit:
    """One piece of work: [start, stop) of file number `file`, in the unit of its kind (see the module's text).

    `text_bytes` estimates its size, for progress. `rows` is known for parquet and arrow only.
    """

    index: int
    kind: str
    file: int
    start: int
    stop: int
    text_bytes: int
    rows: int | None = None

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `text` is None where the row has none; `replaced` tells that characters became U+FFFD.

    `text_bytes` is the text's size as UTF-8. `source` is where it came from: the source column's value, of a URL its host.
    """

    text: str | None
    text_bytes: int = 0
    replaced: bool = False
    source: str = ""

    @property
    def has_text(self) -> bool:
        """Whether the row becomes a document: not null, not empty, not only white space."""
        return bool(self.text) and not self.text.isspace()


# ---------------------------------------------------------------------------- finding the files


def kind_of(path: str | Path) -> str | None:
    """'parquet', 'jsonl', 'jsonl.gz', ... by the file's name; None for a name that is none of them."""
    name = Path(path).name.lower()
    return next((suffix[1:] for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def find_source(
    name: str,
    *,
    config: str | None,
    split: str | None,
    text_column: str,
    threads: int,
    source_column: str | None = None,
) -> Source:
    """Resolve --dataset_name: a file, a glob, a folder, or else a Hub name. Raises UserError with the fix.

    A folder without `split` and `config` means every file in it; with one of them `datasets` resolves the folder's own
    layout (README.md, data/train-*.parquet, ...) as it would on the Hub. All files are read once for their sha256.
    """
    path = Path(name)
    if path.is_dir():
        paths = _files_of_split(name, config, split) if split or config else _files_below(path)
        root = path
    elif path.is_file() or glob.has_magic(name):
        paths = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(name, recursive=True))
        paths = [p for p in paths if p.is_file()]
        if not paths:
            raise UserError(f"dataset_name: no file matches {name!r}")
        if config or split not in (None, "train"):
            asked = f"split: {split!r}" if split not in (None, "train") else f"dataset_config: {config!r}"
            raise UserError(f"{asked} was asked for, but files given by name have only the split 'train'")
        root = Path(os.path.commonpath([p.resolve().parent for p in paths]))
        paths = [p.resolve() for p in paths]
    elif kind_of(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"dataset_name: {name} does not exist")
    else:
        return hub_source(name, config=config, split=split, text_column=text_column, source_column=source_column)
    unknown = [p for p in paths if kind_of(p) is None]
    if unknown:
        raise UserError(f"dataset_name: {unknown[0]} is none of {', '.join(SUFFIXES)}")
    with ThreadPoolExecutor(threads) as pool:  # hashing releases the interpreter's lock
        files = tuple(pool.map(lambda p: _fingerprint(p, root), paths))
    known: list[str] = []
    for file in files:
        columns = _check_column(file, text_column)
        if source_column and columns and source_column not in columns:
            raise _no_column(file.name, source_column, columns, option="source_column")
        known = known or columns
    return Source(text_column=text_column, source_column=source_column or _likely_source_column(known), files=files)


def _likely_source_column(columns: list[str]) -> str | None:
    return next((name for name in ("source", "domain", "url") if name in columns), None)


def _files_below(folder: Path) -> list[Path]:
    files = [
        p
        for p in folder.rglob("*")
        if p.is_file() and kind_of(p) and not p.relative_to(folder).as_posix().startswith(".")
    ]
    if not files:
        raise UserError(f"dataset_name: the folder {folder} holds no file of {', '.join(SUFFIXES)}")
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix())


def _files_of_split(name: str, config: str | None, split: str | None) -> list[Path]:
    builder, split = _builder_and_split(name, config, split)
    return sorted(Path(p) for p in builder.config.data_files[split])


def _builder_and_split(name: str, config: str | None, split: str | None, revision: str | None = None):
    """(`datasets`' builder, the split's name) of a folder or Hub name in the Hub's layout. Raises UserError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        if config and "BuilderConfig" in reason:
            raise UserError(f"dataset_config: {name} has no config {config!r}: {reason}") from None
        raise UserError(
            f"dataset_name: {name!r} is no local file, folder or glob, and `datasets` could not open it ({reason}); "
            f"give a local folder or file of {', '.join(SUFFIXES)}"
        ) from None
    splits = list(builder.config.data_files or {}) or list(builder.info.splits or {})
    split = split or "train"
    if split not in splits:
        raise UserError(f"split: {name} has no split {split!r}; it has {', '.join(map(repr, splits)) or 'none'}")
    return builder, split


def _fingerprint(path: Path, root: Path) -> SourceFile:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"dataset_name: {path} cannot be read ({error.strerror})") from None
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return SourceFile(path=str(path.resolve()), name=name, bytes=size, sha256=digest)


def _no_column(where: str, column: str, columns: list[str], *, option: str = "text_column") -> UserError:
    return UserError(f"{option}: {where} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")


def _check_column(file: SourceFile, column: str) -> list[str]:
    """The file's columns, as its schema or first row tells; raises UserError if there is plainly no text in `column`."""
    kind = kind_of(file.name)
    if file.bytes == 0 and kind != "parquet" and kind != "arrow":
        return []
    if kind == "txt":
        columns = ["text"]
    elif kind.startswith("jsonl"):
        first = next(_jsonl_objects(file, 0, file.bytes, kind), None)
        if first is None:
            return []
        columns = list(first[0])
    else:
        schema = _parquet(file).schema_arrow if kind == "parquet" else _arrow(file).schema
        columns = schema.names
        if column in columns and not _is_text(schema.field(column).type):
            raise UserError(
                f"text_column: {file.name}: column {column!r} holds {schema.field(column).type}, not text; "
                f"columns: {', '.join(f'{f.name} ({f.type})' for f in schema)}"
            )
    if column not in columns:
        raise _no_column(file.name, column, columns)
    return columns


def _is_text(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    return any(check(kind) for check in (*checks, pa.types.is_large_binary))


# ---------------------------------------------------------------------------- units


def cut_units(source: Source, *, unit_bytes: int) -> list[Unit]:
    """Cut a source into units of about `unit_bytes` bytes of text. Raises UserError for a damaged file."""
    if source.hub:
        shards = _hub_rows(source).num_shards
        return [Unit(i, "hub", 0, i, i + 1, text_bytes=1) for i in range(shards)]
    pieces: list[tuple] = []
    for number, file in enumerate(source.files):
        kind = kind_of(file.name)
        if kind == "txt":
            _add_text_file(pieces, number, file, unit_bytes)
        elif kind == "jsonl":
            count = max(1, round(file.bytes / unit_bytes))
            borders = [file.bytes * i // count for i in range(count + 1)]
            pieces += [(kind, number, a, b, b - a) for a, b in itertools.pairwise(borders)]
        elif kind.startswith("jsonl"):
            pieces.append((kind, number, 0, file.bytes, file.bytes * COMPRESSED_RATIO))
        else:
            groups = _parquet_groups(file, source.text_column) if kind == "parquet" else _arrow_batches(file)
            pieces += _group_ranges(kind, number, groups, unit_bytes)
    return [Unit(index, *piece) for index, piece in enumerate(pieces)]


def _add_text_file(pieces: list, number: int, file: SourceFile, unit_bytes: int) -> None:
    """Add a .txt file to the last unit if that ends right before it and has room, else begin a unit."""
    if pieces and pieces[-1][0] == "txt" and pieces[-1][3] == number and pieces[-1][4] + file.bytes <= unit_bytes:
        kind, first, start, _, size = pieces.pop()
        pieces.append((kind, first, start, number + 1, size + file.bytes))
    else:
        pieces.append(("txt", number, number, number + 1, file.bytes))


def _group_ranges(kind: str, number: int, groups: list[tuple[int, int]], unit_bytes: int) -> Iterator[tuple]:
    """Row ranges of about `unit_bytes` from (rows, bytes) per row group; a larger group is cut into equal parts."""
    start = rows = size = 0
    for group_rows, group_bytes in groups:
        if rows and size + group_bytes > unit_bytes:
            yield kind, number, start, start + rows, size, rows
            start, rows, size = start + rows, 0, 0
        parts = min(group_rows, max(1, round(group_bytes / unit_bytes)))
        if parts <= 1:
            rows, size = rows + group_rows, size + group_bytes
            continue
        borders = [start + group_rows * i // parts for i in range(parts + 1)]
        for a, b in itertools.pairwise(borders):
            yield kind, number, a, b, group_bytes // parts, b - a
        start = borders[-1]
    if rows:
        yield kind, number, start, start + rows, size, rows


def _parquet_groups(file: SourceFile, column: str) -> list[tuple[int, int]]:
    metadata = _parquet(file).metadata
    place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == column)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return [(group.num_rows, group.column(place).total_uncompressed_size) for group in groups]


def _arrow_batches(file: SourceFile) -> list[tuple[int, int]]:
    rows = [batch.num_rows for batch in _arrow(file).batches()]
    return [(n, file.bytes * n // max(1, sum(rows))) for n in rows]


# ---------------------------------------------------------------------------- reading


def read_unit(source: Source, unit: Unit) -> Iterator[Row]:
    """The rows of a unit in the file's order. Raises UserError naming file and row for what cannot be read."""
    if unit.kind == "hub":
        yield from _read_hub(source, unit)
        return
    if unit.kind == "txt":
        yield from (_text_file(source.files[i]) for i in range(unit.start, unit.stop))
        return
    file = source.files[unit.file]
    try:
        if unit.kind == "parquet":
            yield from _column_rows(_parquet_batches(file, unit, source), source, file.name, unit.start)
        elif unit.kind == "arrow":
            yield from _column_rows(_arrow_batches_of(file, unit), source, file.name, unit.start)
        else:
            for record, replaced, where in _jsonl_objects_with_place(file, unit.start, unit.stop, unit.kind):
                yield _clean(record.get(source.text_column), where, replaced, _origin(record.get(source.source_column)))
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error})") from None


def _origin(value) -> str:
    """What stands for a document's source: of a URL the host, of anything else its text."""
    if value is None:
        return ""
    text = str(value)
    if "://" in text:
        with contextlib.suppress(ValueError):  # no valid URL: taken as it is
            text = urllib.parse.urlsplit(text).hostname or text
    return text[:200].encode(errors="replace").decode()


def _clean(value, where, replaced: bool = False, origin: str = "") -> Row:
    """A row from a raw value: bytes are decoded, what is no valid text is replaced by U+FFFD and flagged.

    `where` is called to name file and row when the value is no text at all.
    """
    if value is None:
        return Row(None)
    if isinstance(value, bytes):
        try:
            return Row(value.decode(), len(value), source=origin)
        except UnicodeDecodeError:
            text, replaced = value.decode(errors="replace"), True
    elif isinstance(value, str):
        text = value
    else:
        shown = repr(value)[:60]
        raise UserError(
            f"{where()}: the text column holds {type(value).__name__} {shown}, not text; clean the row first"
        )
    try:
        return Row(text, len(text) if text.isascii() else len(text.encode()), replaced, origin)
    except UnicodeEncodeError:
        # through UTF-16, so that two halves of one character become that character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Row(text, len(text.encode()), True, origin)


def _text_file(file: SourceFile) -> Row:
    try:
        return _clean(Path(file.path).read_bytes(), lambda: file.name)
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error.strerror})") from None


# --- .jsonl, plain and compressed


def _jsonl_objects(file: SourceFile, start: int, stop: int, kind: str) -> Iterator[tuple[dict, bool]]:
    return ((record, replaced) for record, replaced, _ in _jsonl_objects_with_place(file, start, stop, kind))


def _jsonl_objects_with_place(file: SourceFile, start: int, stop: int, kind: str):
    """(object, whether its bytes were no UTF-8, a function that names file and line) of each line that is not blank."""
    lines = _plain_lines(file, start, stop) if kind == "jsonl" else _compressed_lines(file, kind)
    for number, offset, line in lines:

        def where(number=number, offset=offset) -> str:
            return f"{file.name}, line {number if number is not None else _line_number(file, offset)}"

        if not line.strip():
            continue
        replaced = False
        try:
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError:
                record, replaced = json.loads(line.decode(errors="replace")), True
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where()}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where()}: expected a JSON object, found {type(record).__name__}")
        yield record, replaced, where


def _plain_lines(file: SourceFile, start: int, stop: int) -> Iterator[tuple[None, int, bytes]]:
    """Lines that begin in bytes [start, stop) of the file."""
    with open(file.path, "rb", buffering=READ_BYTES) as stream:
        offset = start
        if start:
            stream.seek(start - 1)
            offset += len(stream.readline()) - 1  # the rest of a line that began before belongs to the unit before
        while offset < stop and (line := stream.readline()):
            yield None, offset, line
            offset += len(line)


def _line_number(file: SourceFile, offset: int) -> int:
    with open(file.path, "rb") as stream:
        count, left = 1, offset
        while left and (chunk := stream.read(min(left, READ_BYTES))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def _compressed_lines(file: SourceFile, kind: str) -> Iterator[tuple[int, None, bytes]]:
    pending: list[bytes] = []
    number = 0
    chunks = _gzip_chunks(file) if kind == "jsonl.gz" else _zstd_chunks(file)
    try:
        for chunk in chunks:
            *complete, last = chunk.split(b"\n")
            for part in complete:
                number += 1
                yield number, None, b"".join([*pending, part])
                pending = []
            pending.append(last)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.name}: damaged or cut off after line {number} ({error}); fetch it again") from None
    if any(pending):
        yield number + 1, None, b"".join(pending)


def _gzip_chunks(file: SourceFile) -> Iterator[bytes]:
    with gzip.open(file.path, "rb") as stream:
        while chunk := stream.read(READ_BYTES):
            yield chunk


def _zstd_chunks(file: SourceFile) -> Iterator[bytes]:
    """Decompressed chunks of all frames. zstandard's own reader takes a file that is cut off for a whole one."""
    import zstandard

    decompressor, at_border = None, True
    with open(file.path, "rb") as stream:
        while data := stream.read(READ_BYTES // 8):
            while data:
                if at_border:
                    decompressor, at_border = zstandard.ZstdDecompressor().decompressobj(), False
                try:
                    chunk = decompressor.decompress(data)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                at_border = decompressor.eof
                data = decompressor.unused_data if at_border else b""
                if chunk:
                    yield chunk
    if not at_border:
        raise EOFError("the zstd data ends in the middle of a frame")


# --- parquet and arrow


def _parquet(file: SourceFile):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # pages are streamed, not whole column chunks
        return pq.ParquetFile(file.path, buffer_size=READ_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.name}: not a whole parquet file ({reason}); fetch it again") from None


def _parquet_batches(file: SourceFile, unit: Unit, source: Source):
    """Record batches of the columns needed for rows [unit.start, unit.stop)."""
    import pyarrow as pa

    parquet = _parquet(file)
    groups, first_row, row = [], None, 0
    for i in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(i).num_rows
        if row < unit.stop and row + rows > unit.start:
            groups.append(i)
            first_row = row if first_row is None else first_row
        row += rows
    at = first_row
    columns = [source.text_column, source.source_column] if source.source_column else [source.text_column]
    batch_rows = max(1, min(1024, READ_BYTES * (unit.rows or 1) // max(1, unit.text_bytes)))
    try:
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False):
            begin, end = max(unit.start - at, 0), min(unit.stop - at, batch.num_rows)
            if end > begin:
                yield batch.slice(begin, end - begin)
            at += batch.num_rows
            if at >= unit.stop:
                break
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.name}: cannot be read after row {at} ({reason}); fetch it again") from None


class _ArrowBatches:
    """Record batches of an .arrow file in the IPC file or stream format (`datasets` writes streams), memory-mapped."""

    def __init__(self, file: SourceFile):
        import pyarrow as pa

        self.file = file
        try:
            self._map = pa.memory_map(file.path)
            try:
                self._reader = pa.ipc.open_file(self._map)
                self._random = True
            except pa.ArrowInvalid:
                self._map.seek(0)
                self._reader, self._random = pa.ipc.open_stream(self._map), False
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.name}: not a whole .arrow file ({str(error).splitlines()[0]})") from None
        self.schema = self._reader.schema

    def batches(self):
        import pyarrow as pa

        try:
            if self._random:
                yield from (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
            else:
                yield from self._reader
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.file.name}: cannot be read ({str(error).splitlines()[0]}); fetch it again"
            ) from None


def _arrow(file: SourceFile) -> _ArrowBatches:
    return _ArrowBatches(file)


def _arrow_batches_of(file: SourceFile, unit: Unit):
    at = 0
    for batch in _arrow(file).batches():
        begin, end = max(unit.start - at, 0), min(unit.stop - at, batch.num_rows)
        if end > begin:
            yield batch.slice(begin, end - begin)
        at += batch.num_rows
        if at >= unit.stop:
            break


def _column_rows(batches, source: Source, name: str, first_row: int) -> Iterator[Row]:
    """Rows of record batches. Python strings are made a few at a time: a batch may hold much text."""
    row = first_row
    for batch in batches:
        texts = batch.column(batch.schema.get_field_index(source.text_column))
        place = batch.schema.get_field_index(source.source_column) if source.source_column else -1
        origins = batch.column(place) if place >= 0 else None
        for at in range(0, len(texts), 64):
            part = texts.slice(at, 64)
            values, sizes = _python_values(part), _utf8_sizes(part)
            where_from = _python_values(origins.slice(at, 64)) if origins is not None else itertools.repeat(None)
            for value, size, origin in zip(values, sizes, where_from, strict=False):
                if size is not None and type(value) is str:  # arrow's strings are UTF-8: nothing to clean
                    yield Row(value, size, source=_origin(origin))
                else:
                    yield _clean(value, lambda row=row: f"{name}, row {row}", origin=_origin(origin))
                row += 1


def _utf8_sizes(array):
    """Bytes of each string; None for each value of a type that does not say."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return pc.binary_length(array).to_pylist()
    return itertools.repeat(None)


def _python_values(array) -> list:
    """The array's values; strings that are no UTF-8 (a careless writer) as bytes."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return array.cast(pa.large_binary()).to_pylist()


# --- the Hub


def hub_source(
    name: str, *, config: str | None, split: str | None, text_column: str, source_column: str | None = None
) -> Source:
    """A data set that `datasets` streams, pinned to the revision it has now. Raises UserError.

    `name` may also be a local folder in the Hub's layout; it then has no revision.
    """
    revision = None
    if not Path(name).is_dir():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            revision = HfApi().dataset_info(name).sha
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"dataset_name: {name!r} is no local file, folder or glob and could not be reached on the Hub ({reason}); "
                f"check the name, or give a local folder or file of {', '.join(SUFFIXES)}"
            ) from None
        except Exception as error:  # httpx errors of whichever version huggingface_hub brings
            if "httpx" not in type(error).__module__:
                raise
            raise UserError(
                f"dataset_name: {name!r} is no local file, folder or glob and the Hub cannot be reached ({error}); "
                f"give a local folder or file of {', '.join(SUFFIXES)}"
            ) from None
    _, split = _builder_and_split(name, config, split, revision)
    source = Source(text_column=text_column, source_column=source_column, hub=(name, config, split, revision))
    columns = list(next(iter(_hub_rows(source)), {}))
    for option, column in (("text_column", text_column), ("source_column", source_column)):
        if columns and column and column not in columns:
            raise _no_column(f"{name}, split {split!r},", column, columns, option=option)
    return replace(source, source_column=source_column or _likely_source_column(columns))


def _hub_rows(source: Source):
    import datasets

    name, config, split, revision = source.hub
    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)


def _read_hub(source: Source, unit: Unit) -> Iterator[Row]:
    rows = _hub_rows(source)
    shard = rows.shard(num_shards=rows.num_shards, index=unit.start)
    for number, record in enumerate(shard):
        origin = _origin(record.get(source.source_column))
        where = lambda n=number: f"{source.hub[0]}, shard {unit.start}, row {n}"  # noqa: E731
        yield _clean(record.get(source.text_column), where, origin=origin)
