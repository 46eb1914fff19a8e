"""Every format to the same shards; the same bytes whoever writes them; what is bad is counted or refused by name."""

import gzip
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizer_samples import EOS, real_texts, save_kimi_tokenizer, save_transformers_tokenizer

import encoders
import token_units
import tokenize_dataset
import verify_shards
from config import UserError
from data_loader import MANIFEST, ShardReader, open_dataset
from text_sources import SourceFile, cut_units, find_source, hub_source, read_unit

ROOT = Path(tokenize_dataset.__file__).parent


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    return save_kimi_tokenizer(tmp_path_factory.mktemp("kimi"))


def run(data, tokenizer, output, *more) -> int:
    """tokenize_dataset.py in this process, with one worker unless told otherwise."""
    words = ["--dataset_name", data, "--tokenizer", tokenizer, "--output_dir", output, "--num_workers", "1"]
    words += ["--encoder", "reference", "--max_seq_length", 4096]
    return tokenize_dataset.main([str(word) for word in (*words, *more)])


def documents(folder) -> list[list[int]]:
    """All documents of a finished folder with their EOS, in the manifest's order."""
    found = []
    for shard in open_dataset(str(folder)).manifest.shards:
        with ShardReader(folder, shard.name) as reader:
            found += [reader.document(i).tolist() for i in range(shard.documents)]
    return found


def expected(tokenizer, texts) -> list[list[int]]:
    spec = encoders.find_tokenizer(str(tokenizer))
    encoder = encoders.load_encoder(spec)
    return [[*encoder.encode([text])[0].tolist(), spec.eos_token_id] for text in texts]


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write(path: Path, texts, *, column="text", **options) -> Path:
    """Write texts as the format that the path's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".jsonl.zst"):
        half = len(lines) // 2  # two frames, as parallel compressors write
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    elif path.name.endswith(".parquet"):
        table = pa.table({"id": range(len(texts)), column: pa.array(texts, options.get("type", pa.string()))})
        pq.write_table(table, path, row_group_size=options.get("row_group_size", 40))
    elif path.name.endswith(".arrow"):
        table = pa.table({"id": range(len(texts)), column: pa.array(texts, options.get("type", pa.string()))})
        new = pa.ipc.new_file if options.get("random_access") else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    return path


# ---------------------------------------------------------------------------- formats


FORMATS = {
    "d.jsonl": {},
    "d.jsonl.gz": {},
    "d.jsonl.zst": {},
    "d.parquet": {},
    "large.parquet": {"type": pa.large_string()},
    "categories.parquet": {"type": pa.dictionary(pa.int32(), pa.string())},
    "bytes.parquet": {"type": pa.binary()},
    "stream.arrow": {},
    "file.arrow": {"random_access": True, "type": pa.large_string()},
}


@pytest.fixture(scope="module")
def texts():
    return [*real_texts(100), f"says {EOS} in the text", "é中文 \U0001f600", "\n", "x"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("unit_bytes", [700, 3000, 50_000, 1 << 30])
def test_every_row_is_in_exactly_one_unit(tmp_path, texts, name, unit_bytes):
    write(tmp_path / name, texts, **FORMATS[name])
    source = find_source(str(tmp_path), config=None, split=None, text_column="text", threads=1)
    units = cut_units(source, unit_bytes=unit_bytes)
    rows = [row.text for unit in units for row in read_unit(source, unit)]
    assert rows == texts
    if unit_bytes == 3000 and not name.endswith((".gz", ".zst")):
        assert len(units) > 10
    known = [unit.rows for unit in units if unit.rows is not None]
    assert sum(known) in (0, len(texts))


def test_text_files_are_one_document_each(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i:04d}.txt").write_text(text, newline="")
    source = find_source(str(tmp_path / "*.txt"), config=None, split=None, text_column="text", threads=2)
    for unit_bytes in (1, 50_000, 1 << 30):
        units = cut_units(source, unit_bytes=unit_bytes)
        assert [row.text for unit in units for row in read_unit(source, unit)] == texts
        assert len(units) > 1 or unit_bytes == 1 << 30


@pytest.mark.parametrize("name", ["d.jsonl.zst", "d.parquet"])
def test_documents_are_the_encoders_ids_and_eos(tmp_path, texts, kimi, name):
    write(tmp_path / name, texts)
    assert run(tmp_path / name, kimi, tmp_path / "out") == 0
    assert documents(tmp_path / "out") == expected(kimi, [text for text in texts if text.strip()])
    assert verify_shards.verify(tmp_path / "out", workers=1) == 0


def test_a_transformers_tokenizer_from_the_command_line(tmp_path, texts):
    """As a user runs it: a local folder with tokenizer.json, then --verify."""
    fast = save_transformers_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "d.parquet", texts, column="body")
    words = ["--dataset_name", tmp_path / "*.parquet", "--text_column", "body", "--tokenizer", fast]
    command = [
        sys.executable,
        "tokenize_dataset.py",
        *words,
        "--output_dir",
        tmp_path / "o",
        "--max_seq_length",
        "2048",
    ]
    answer = subprocess.run([*map(str, command), "--num_workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "the tokenizer's own, through transformers" in answer.stdout
    assert "dropped    1 of 104 rows" in answer.stdout and "full sequences of 2,048 tokens" in answer.stdout
    assert "tokens/s" in answer.stderr and "documents" in answer.stderr
    assert documents(tmp_path / "o") == expected(fast, [text for text in texts if text.strip()])
    command = [sys.executable, "tokenize_dataset.py", "--output_dir", str(tmp_path / "o"), "--verify"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, "sound" in answer.stdout) == (0, True), answer.stderr


def test_help_needs_no_heavy_library():
    code = (
        "import sys, tokenize_dataset; tokenize_dataset.build_parser().format_help(); "
        "print({'torch', 'transformers', 'tokenizers', 'tiktoken', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr


def test_the_hubs_own_layout(tmp_path, texts, kimi, monkeypatch):
    """Configurations and splits of a folder as `datasets` resolves them, read by us and streamed by `datasets`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "repo"
    for config, part in (("web", texts[:30]), ("code", texts[30:60])):
        write(folder / config / "train-00000-of-00002.parquet", part[:10])
        write(folder / config / "train-00001-of-00002.parquet", part[10:25])
        write(folder / config / "test-00000-of-00001.parquet", part[25:])
    configs = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}-*"} for s in ("train", "test")]}
        for c in ("web", "code")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")

    def rows(source):
        return [row.text for unit in cut_units(source, unit_bytes=1 << 20) for row in read_unit(source, unit)]

    where = {"text_column": "text"}
    local = find_source(str(folder), config="code", split="train", threads=1, **where)
    assert rows(local) == texts[30:55]
    assert rows(find_source(str(folder), config="web", split="test", threads=1, **where)) == texts[25:30]
    streamed = hub_source(str(folder), config="code", split="train", **where)
    assert len(cut_units(streamed, unit_bytes=1)) == 2 and rows(streamed) == texts[30:55]
    with pytest.raises(UserError, match=r"split: .* has no split 'validation'; it has 'train', 'test'"):
        find_source(str(folder), config="web", split="validation", threads=1, **where)
    with pytest.raises(UserError, match=r"dataset_config: .* has no config 'maths'.*'web', 'code'"):
        find_source(str(folder), config="maths", split="train", threads=1, **where)
    with pytest.raises(UserError, match=r"text_column: .* has no column 'body'; it has 'id', 'text'"):
        hub_source(str(folder), config="code", split="train", text_column="body")
    assert run(folder, kimi, tmp_path / "out", "--dataset_config", "code", "--split", "train") == 0
    assert documents(tmp_path / "out") == expected(kimi, [text for text in texts[30:55] if text.strip()])


# ---------------------------------------------------------------------------- the same bytes


def test_same_bytes_again_and_for_any_number_of_workers(tmp_path, texts, kimi, monkeypatch):
    write(tmp_path / "d" / "a.jsonl", texts)
    write(tmp_path / "d" / "b.parquet", texts)
    monkeypatch.setattr(tokenize_dataset, "MIN_UNIT_BYTES", 100_000)
    for out, workers in (("once", 1), ("twice", 1), ("three", 3)):
        assert run(tmp_path / "d", kimi, tmp_path / out, "--num_workers", workers) == 0
    first = content(tmp_path / "once")
    assert len(first) > 10 and first == content(tmp_path / "twice") == content(tmp_path / "three")
    assert {name.split("_")[0].split(".")[0] for name in first} == {"manifest", "plan", "shard"}


def test_a_stopped_run_does_only_what_is_missing(tmp_path, texts, kimi, monkeypatch, capsys):
    """A folder as a kill leaves it: some records there, some shards without a record, temporary files, no manifest."""
    write(tmp_path / "d.jsonl", texts)
    monkeypatch.setattr(tokenize_dataset, "MIN_UNIT_BYTES", 100_000)
    monkeypatch.setattr(tokenize_dataset, "remove_leftovers", lambda folder, keep: None)
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    monkeypatch.undo()
    monkeypatch.setattr(tokenize_dataset, "MIN_UNIT_BYTES", 100_000)
    finished = {n: b for n, b in content(tmp_path / "o").items() if not n.startswith("unit_")}
    (tmp_path / "o" / MANIFEST).unlink()
    (tmp_path / "o" / "unit_00001.json").unlink()
    (tmp_path / "o" / "unit_00003.json").write_bytes((tmp_path / "o" / "unit_00003.json").read_bytes()[:50])
    (tmp_path / "o" / "shard_00003.bin").write_bytes(b"half")
    (tmp_path / "o" / "shard_00002.idx").unlink()
    (tmp_path / "o" / "shard_00009.bin.host-1.tmp").write_bytes(b"half")
    before = {n: (tmp_path / "o" / n).stat().st_mtime_ns for n in ("shard_00000.bin", "shard_00001.bin")}
    capsys.readouterr()
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    units = len(json.loads((tmp_path / "o" / "plan.json").read_text())["units"])
    assert f"resuming: {units - 3} of {units} units are already done" in capsys.readouterr().out
    assert content(tmp_path / "o") == finished
    assert (tmp_path / "o" / "shard_00000.bin").stat().st_mtime_ns == before["shard_00000.bin"]
    assert (tmp_path / "o" / "shard_00001.bin").stat().st_mtime_ns > before["shard_00001.bin"]
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    assert "is already complete" in capsys.readouterr().out and content(tmp_path / "o") == finished


def test_a_changed_plan_says_what_changed(tmp_path, texts, kimi):
    write(tmp_path / "d.jsonl", texts[:20])
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    before = content(tmp_path / "o")
    with pytest.raises(UserError, match=r"another plan: shard_tokens was 67108864, now 1000\. Give the same"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o", "--shard_tokens", 1000)
    with pytest.raises(UserError, match=r"tokenizer eos_token was \[EOS\], now \[BOS\]; tokenizer eos_token_id was"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o", "--eos_token", "[BOS]")
    write(tmp_path / "d.jsonl", [*texts[:19], "changed"])
    with pytest.raises(UserError, match=r"another plan: source file d\.jsonl has other content"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o")
    assert content(tmp_path / "o") == before


def test_a_second_launcher_refuses(tmp_path, texts, kimi):
    write(tmp_path / "d.jsonl", texts[:5])
    (tmp_path / "o").mkdir()
    with (
        tokenize_dataset.only_launcher(tmp_path / "o"),
        pytest.raises(UserError, match=r"another tokenize_dataset\.py is working in"),
    ):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o")
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0


# ---------------------------------------------------------------------------- shards, limits, counts


@pytest.mark.parametrize("shard_tokens", [1, 40_000])
def test_shards_hold_whole_documents(tmp_path, texts, kimi, shard_tokens):
    write(tmp_path / "d.jsonl.gz", texts)
    assert run(tmp_path / "d.jsonl.gz", kimi, tmp_path / "o", "--shard_tokens", shard_tokens) == 0
    wanted = expected(kimi, [text for text in texts if text.strip()])
    assert documents(tmp_path / "o") == wanted
    shards = open_dataset(str(tmp_path / "o")).manifest.shards
    assert all(shard.tokens <= shard_tokens or shard.documents == 1 for shard in shards)
    for shard, following in itertools.pairwise(shards):  # and no shard was closed early
        with ShardReader(tmp_path / "o", following.name) as reader:
            assert shard.tokens + reader.lengths[0] > shard_tokens


@pytest.mark.parametrize("workers", [1, 3])
def test_max_tokens_keeps_whole_documents_in_order(tmp_path, texts, kimi, workers, monkeypatch):
    write(tmp_path / "d.jsonl", texts)
    monkeypatch.setattr(tokenize_dataset, "MIN_UNIT_BYTES", 100_000)
    wanted = expected(kimi, [text for text in texts if text.strip()])
    ends = np.cumsum([len(document) for document in wanted])
    for limit in (int(ends[40]), int(ends[40]) - 1, int(ends[-1]) + 5) if workers == 1 else (int(ends[40]) - 1,):
        out = tmp_path / f"o{limit}"
        assert run(tmp_path / "d.jsonl", kimi, out, "--max_tokens", limit, "--num_workers", workers) == 0
        assert documents(out) == wanted[: int((ends <= limit).sum())]
        statistics = open_dataset(str(out)).manifest.statistics
        assert statistics["rows"] == open_dataset(str(out)).manifest.documents + statistics["dropped"]
        assert verify_shards.verify(out, workers=1) == 0
    with pytest.raises(UserError, match="no document with text"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "none", "--max_tokens", int(ends[0]) - 1)
    assert content(tmp_path / "none") == {}


def test_odd_rows_are_counted(tmp_path, kimi, capsys):
    half = '{"text": "half \\ud83d alone"}\n{"text": "whole \\ud83d\\ude00"}\n'
    raw = b'{"text": "bad \xff byte"}\n{"text": null}\n{"text": ""}\n{"text": " \\n\\u3000"}\n{"other": 1}\n\n{"text": "good"}'
    (tmp_path / "d.jsonl").write_bytes(half.encode() + raw)
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    out = capsys.readouterr().out
    assert "dropped    4 of 8 rows" in out and "replaced   2 documents" in out
    assert documents(tmp_path / "o") == expected(
        kimi, ["half \ufffd alone", "whole \U0001f600", "bad \ufffd byte", "good"]
    )


def test_invalid_utf8_in_parquet_and_txt(tmp_path, kimi, capsys):
    bad = pa.array([b"bad \xff byte", b"fine", None], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), len(bad), bad.buffers(), bad.null_count)  # what a careless writer leaves
    pq.write_table(pa.table({"text": bad}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_bytes(b"also \xc3( bad")
    (tmp_path / "f.txt").write_bytes(b"")
    assert run(tmp_path, kimi, tmp_path / "o") == 0
    out = capsys.readouterr().out
    assert "dropped    2 of 5 rows" in out and "replaced   2 documents" in out
    assert documents(tmp_path / "o") == expected(kimi, ["bad \ufffd byte", "fine", "also \ufffd( bad"])


def test_summary_counts_lengths_and_full_sequences(tmp_path, kimi, capsys):
    write(tmp_path / "d.jsonl", ["x " * 600, "y", "word " * 20_000])
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o") == 0
    lengths = [len(document) for document in documents(tmp_path / "o")]
    out = capsys.readouterr().out
    statistics = open_dataset(str(tmp_path / "o")).manifest.statistics
    assert statistics["longest"] == max(lengths)
    assert sum(statistics["class_documents"]) == 3 and sum(statistics["class_tokens"]) == sum(lengths)
    assert statistics["class_documents"][0] == sum(length < 1024 for length in lengths)
    assert f"full sequences of 4,096 tokens: {sum(lengths) // 4096:,}" in out
    assert "full sequences of 1,048,576 tokens: 0" in out and "full sequences of 2,097,152 tokens: 0" in out


# ---------------------------------------------------------------------------- verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts, kimi):
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "d.jsonl.gz", texts[:40])
    assert run(folder / "d.jsonl.gz", kimi, folder / "o", "--shard_tokens", 30_000) == 0
    return folder / "o"


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_any_flipped_byte_is_found_and_its_shard_named(finished, suffix):
    shards = open_dataset(str(finished)).manifest.shards
    assert len(shards) > 3
    for shard in shards:
        path = finished / f"{shard.name}.{suffix}"
        whole = path.read_bytes()
        for place in (0, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            problems = verify_shards.check_shard(finished, shard, vocab_size=1 << 20, eos_token_id=0)
            assert any(shard.name in problem and "sha256" in problem for problem in problems)
        path.write_bytes(whole)


def test_verify_from_the_command_line_fails_and_names_the_shard(finished, tmp_path):
    shard = open_dataset(str(finished)).manifest.shards[2]
    path = finished / f"{shard.name}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    command = [sys.executable, "tokenize_dataset.py", "--output_dir", str(finished), "--verify"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path.write_bytes(whole)
    assert answer.returncode == 1 and f"error: {shard.name}: the sha256 of {shard.name}.bin" in answer.stdout
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        verify_shards.check_folder(tmp_path / "none", workers=1)


def test_verify_finds_what_checksums_alone_would_not(finished, kimi):
    """A wrong writer gives right checksums of wrong tokens: EOS and vocabulary are checked in the tokens themselves."""
    manifest = open_dataset(str(finished)).manifest
    shard, eos = manifest.shards[0], manifest.eos_token_id
    assert verify_shards.check_shard(finished, shard, vocab_size=manifest.vocab_size, eos_token_id=eos) == []
    with ShardReader(finished, shard.name) as reader:
        inside = int(reader.document(0)[3])
    problems = verify_shards.check_shard(finished, shard, vocab_size=manifest.vocab_size, eos_token_id=inside)
    assert any("document 0 does not end in EOS" in p for p in problems)
    assert any("document 0 holds EOS" in p for p in problems)
    problems = verify_shards.check_shard(finished, shard, vocab_size=eos, eos_token_id=eos)
    assert any(f"holds id {eos}, not below {eos}" in p for p in problems)


def rewritten(folder: Path, target: Path, change) -> Path:
    """A copy of a finished folder whose manifest `change` has edited, as a wrong writer would have written it."""
    shutil.copytree(folder, target)
    values = json.loads((target / MANIFEST).read_text())
    change(values)
    (target / MANIFEST).write_text(json.dumps(values))
    return target


def test_quick_verify_checks_sizes_indexes_totals_and_rows(finished, tmp_path):
    assert verify_shards.check_folder(finished, workers=1, depth="quick")["ok"]

    def problems(name, change):
        return verify_shards.check_folder(rewritten(finished, tmp_path / name, change), workers=1, depth="quick")[
            "problems"
        ]

    assert any(
        "total_tokens is" in p for p in problems("totals", lambda m: m.update(total_tokens=m["total_tokens"] + 1))
    )

    def lose_a_row(manifest):
        manifest["statistics"]["rows"] -= 1
        manifest["statistics"]["units"]["rows"][0] -= 1

    assert any(p.startswith("unit 0: ") for p in problems("rows", lose_a_row))

    def lose_a_shard(manifest):
        lost = manifest["shards"].pop()
        manifest["total_tokens"] -= lost["tokens"]

    assert any("in its shards" in p for p in problems("shard", lose_a_shard))
    broken = rewritten(finished, tmp_path / "index", lambda m: None)
    name = open_dataset(str(finished)).manifest.shards[1].name
    whole = (broken / f"{name}.idx").read_bytes()
    (broken / f"{name}.idx").write_bytes(whole[:40] + b"\xff" + whole[41:])
    assert any(p.startswith(name) for p in verify_shards.check_folder(broken, workers=1, depth="quick")["problems"])


def test_full_verify_compares_a_sample_with_the_source(tmp_path, texts, kimi, capsys):
    write(tmp_path / "d.jsonl", texts)
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o", "--shard_tokens", 30_000) == 0
    words = ("--verify", "--report", tmp_path / "report.json")
    assert run(tmp_path / "d.jsonl", kimi, tmp_path / "o", *words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["depth"] == "full" and len(report["units_compared_with_source"]) == 8
    assert "8 units compared with the source" in capsys.readouterr().out
    # shards that are sound in themselves but of another text: every checksum is right, the source is not
    write(tmp_path / "e.jsonl", [text.replace("e", "E") for text in texts])
    assert run(tmp_path / "e.jsonl", kimi, tmp_path / "other", "--shard_tokens", 30_000) == 0
    source = json.loads((tmp_path / "o" / MANIFEST).read_text())["source"]
    forged = rewritten(tmp_path / "other", tmp_path / "forged", lambda m: m.update(source=source))
    assert run(tmp_path / "d.jsonl", kimi, forged, *words) == 1
    problems = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert any("is not what its source gives when tokenized again" in p for p in problems)
    with pytest.raises(UserError, match="this is not the source that the folder was made from"):
        run(tmp_path / "e.jsonl", kimi, tmp_path / "o", "--verify")


# ---------------------------------------------------------------------------- bad input


def bad_parquet(folder):
    write(folder / "d.parquet", list(real_texts(60)))
    whole = (folder / "d.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(whole[: len(whole) // 2])


def damaged_page(folder):
    write(folder / "d.parquet", list(real_texts(60)))
    whole = bytearray((folder / "d.parquet").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 4000] = bytes(4000)
    (folder / "d.parquet").write_bytes(whole)


def cut(name):
    def make(folder):
        write(folder / name, list(real_texts(60)))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 2000])

    return make


BAD_INPUT = {
    "nothing there": (lambda f: None, "missing.parquet", r"dataset_name: .*missing\.parquet does not exist"),
    "glob without match": (lambda f: None, "*.jsonl", r"dataset_name: no file matches"),
    "folder without data": (lambda f: (f / "a.csv").write_text("x"), "", r"holds no file of \.parquet, \.jsonl"),
    "unknown suffix": (lambda f: (f / "a.csv").write_text("x"), "a.csv", r"a\.csv is none of \.parquet"),
    "wrong column, jsonl": (lambda f: write(f / "d.jsonl", ["a"], column="body"), "", r"d\.jsonl has no column 'text'; it has 'id', 'body'"),
    "wrong column, parquet": (lambda f: write(f / "d.parquet", ["a"], column="body"), "", r"has no column 'text'; it has 'id', 'body'"),
    "wrong column, arrow": (lambda f: write(f / "d.arrow", ["a"], column="body"), "", r"has no column 'text'; it has 'id', 'body'"),
    "numbers in the column": (lambda f: pq.write_table(pa.table({"text": [1, 2]}), f / "d.parquet"), "", r"column 'text' holds int64, not text"),
    "mixed types": (lambda f: (f / "d.jsonl").write_text('{"text": "a"}\n{"text": 5}\n'), "", r"d\.jsonl, line 2: the text column holds int 5"),
    "not JSON": (lambda f: (f / "d.jsonl").write_text('{"text": "a"}\n\n{"text": \n'), "", r"d\.jsonl, line 3: not valid JSON"),
    "not an object": (lambda f: (f / "d.jsonl").write_text('{"text": "a"}\n["text"]\n'), "", r"line 2: expected a JSON object, found list"),
    "truncated parquet": (bad_parquet, "", r"d\.parquet: not a whole parquet file"),
    "damaged parquet page": (damaged_page, "", r"d\.parquet: cannot be read after row \d+"),
    "empty parquet": (lambda f: (f / "d.parquet").write_bytes(b""), "", r"d\.parquet: not a whole parquet file"),
    "gzip that ends early": (cut("d.jsonl.gz"), "", r"d\.jsonl\.gz: damaged or cut off after line \d+"),
    "zstd that ends early": (cut("d.jsonl.zst"), "", r"d\.jsonl\.zst: damaged or cut off after line \d+"),
    "not gzip at all": (lambda f: (f / "d.jsonl.gz").write_bytes(b"text"), "", r"d\.jsonl\.gz: damaged or cut off after line 0"),
    "arrow that ends early": (cut("d.arrow"), "", r"d\.arrow"),
    "only empty rows": (lambda f: write(f / "d.jsonl", ["", None, " "]), "", r"no document with text among 3 rows"),
    "an empty file": (lambda f: (f / "d.jsonl").write_bytes(b""), "", r"no document with text among 0 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_data_is_refused_by_name(tmp_path, kimi, case):
    make, name, message = BAD_INPUT[case]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in" / name, kimi, tmp_path / "o")
    assert not (tmp_path / "o" / MANIFEST).exists()
    assert not list((tmp_path / "o").glob("shard_*")) if (tmp_path / "o").exists() else True


def test_bad_options_are_refused(tmp_path, kimi):
    write(tmp_path / "d.jsonl", ["a text"])
    with pytest.raises(
        UserError, match="shard_tokens: 0 must be greater than 0\nmax_tokens: -5 must be greater than 0"
    ):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o", "--shard_tokens", 0, "--max_tokens", -5)
    with pytest.raises(
        UserError, match=r"split: 'dev' was asked for, but files given by name have only the split 'train'"
    ):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "o", "--split", "dev")
    with pytest.raises(UserError, match="dataset_name: say what to tokenize"):
        tokenize_dataset.main(["--output_dir", str(tmp_path / "o")])
    with pytest.raises(UserError, match=r"tokenizer: the folder .*none does not exist"):
        run(tmp_path / "d.jsonl", tmp_path / "none", tmp_path / "o")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds files of something else \(thesis\.tex\); give an empty or new folder"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"output_dir: .*file cannot be written"):
        run(tmp_path / "d.jsonl", kimi, tmp_path / "file")
    assert not (tmp_path / "o").exists()


def test_an_id_outside_the_vocabulary_or_an_eos_in_text_is_refused(kimi):
    import dataclasses

    spec = encoders.find_tokenizer(str(kimi))
    encoder = encoders.load_encoder(spec)
    first = int(encoder.encode(["hello"])[0][0])
    with pytest.raises(UserError, match="which ends documents; name another special token"):
        token_units.encode_documents(encoder, ["hello"], dataclasses.replace(spec, eos_token_id=first), "unit 0")
    with pytest.raises(UserError, match="is not below the vocabulary's 3"):
        token_units.encode_documents(encoder, ["hello"], dataclasses.replace(spec, vocab_size=3), "unit 0")


def test_source_identity_is_content_not_place(tmp_path, texts):
    for folder in ("here", "there"):
        write(tmp_path / folder / "sub" / "d.jsonl", texts[:5])
    here, there = (
        find_source(str(tmp_path / f), config=None, split=None, text_column="text", threads=1)
        for f in ("here", "there")
    )
    assert here.fingerprint() == there.fingerprint() and here.files[0].path != there.files[0].path
    assert isinstance(here.files[0], SourceFile) and here.files[0].name == "sub/d.jsonl"
