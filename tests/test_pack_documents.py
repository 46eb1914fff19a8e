"""Orders of documents: each exactly once, the same bytes however many processes, neighbours alike; statistics."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import real_texts, save_kimi_tokenizer

import pack_documents
import tokenize_dataset
import verify_shards
from config import UserError
from data_loader import MANIFEST, ShardReader, open_dataset

ROOT = Path(tokenize_dataset.__file__).parent


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    return save_kimi_tokenizer(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """300 pieces of 60 real files in random order: pieces of one file are alike; every third row has its own host."""
    pieces = []
    for number, text in enumerate(real_texts(60)):
        size = max(200, len(text) // 5)
        for at in range(0, 5 * size, size):
            if text[at : at + size].strip():
                pieces.append((number, text[at : at + size]))
    random.Random(1).shuffle(pieces)
    path = tmp_path_factory.mktemp("corpus") / "d.jsonl"
    lines = [json.dumps({"text": text, "url": f"https://host{n % 3}.org:80/page{n}?q"}) + "\n" for n, text in pieces]
    path.write_text("".join(lines))
    return path


def run(corpus, kimi, output, *more) -> int:
    words = ["--dataset_name", corpus, "--tokenizer", kimi, "--output_dir", output, "--encoder", "reference"]
    words += ["--num_workers", 1, "--shard_tokens", 60_000]
    return tokenize_dataset.main([str(word) for word in (*words, *more)])


def documents(folder) -> list[tuple[int, ...]]:
    found = []
    for shard in open_dataset(str(folder)).manifest.shards:
        with ShardReader(folder, shard.name) as reader:
            found += [tuple(reader.document(i).tolist()) for i in range(shard.documents)]
    return found


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def likeness(found) -> float:
    """Mean Jaccard similarity of neighbours' token sets."""
    sets = [set(document) for document in found]
    return float(np.mean([len(a & b) / len(a | b) for a, b in itertools.pairwise(sets)]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, corpus, kimi) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    for how in ("source", "shuffled", "related"):
        assert run(corpus, kimi, folder / how, "--pack", how) == 0
    return {how: folder / how for how in ("source", "shuffled", "related")}


@pytest.mark.parametrize("how", ["shuffled", "related"])
def test_every_document_is_packed_exactly_once(packed, how):
    source, found = documents(packed["source"]), documents(packed[how])
    assert found != source and sorted(found) == sorted(source)
    order = np.load(packed[how] / pack_documents.ORDER)
    assert [source[i] for i in order] == found
    assert {path.name.split("_")[0].split(".")[0] for path in packed[how].iterdir()} == {
        "document",
        "manifest",
        "plan",
        "shard",
    }
    for shard in open_dataset(str(packed[how])).manifest.shards:
        assert shard.tokens <= 60_000 or shard.documents == 1


@pytest.mark.parametrize("how", ["shuffled", "related"])
def test_packing_is_the_same_bytes_for_any_number_of_processes(packed, how, corpus, kimi, tmp_path):
    assert run(corpus, kimi, tmp_path / "again", "--pack", how, "--num_workers", 3) == 0
    assert content(tmp_path / "again") == content(packed[how])


def test_related_neighbours_are_more_alike(packed):
    source, shuffled, related = (likeness(documents(packed[how])) for how in ("source", "shuffled", "related"))
    assert related > 1.25 * shuffled and related > 1.25 * source


def test_related_keeps_sources_together(packed, corpus):
    hosts = [json.loads(line)["url"].split("/")[2] for line in corpus.read_text().splitlines()]
    order = np.load(packed["related"] / pack_documents.ORDER)
    in_order = [hosts[i] for i in order]
    assert sum(a != b for a, b in itertools.pairwise(in_order)) == 2


def test_sketches_and_chain():
    generator = np.random.default_rng(0)
    state = pack_documents.SketchJob("", 5000).start(None)
    base = generator.integers(100, 5000, 400)
    near = np.where(generator.random(400) < 0.1, generator.integers(100, 5000, 400), base)
    far = generator.integers(100, 5000, 400)
    sketches = [pack_documents.sketch(np.append(t, 7), state, 5000)[1] for t in (base, far, near)]
    assert pack_documents.nearest_chain(np.stack(sketches)).tolist() == [0, 2, 1]
    signs = generator.integers(0, 256, (50, 32), dtype=np.uint8)
    assert sorted(pack_documents.nearest_chain(signs).tolist()) == list(range(50))


def test_shuffled_order_is_part_of_the_format():
    assert pack_documents.shuffled_order(8).tolist() == sorted(
        range(8), key=lambda i: int(pack_documents.mixed(np.array([i]), pack_documents.SEED)[0])
    )
    assert int(pack_documents.mixed(np.array([0]), -1)[0]) == 0  # splitmix64's fixed point: no numpy version changes it
    assert int(pack_documents.mixed(np.array([0]), 0)[0]) == 0xE220A8397B1DCDAF  # its first output from seed 0


def test_verify_of_packed_shards(packed, corpus, kimi, tmp_path, capsys):
    for how in ("shuffled", "related"):
        assert run(corpus, kimi, packed[how], "--pack", how, "--verify") == 0
        assert "units compared with the source" in capsys.readouterr().out
    order = packed["related"] / pack_documents.ORDER
    whole = order.read_bytes()
    order.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    problems = verify_shards.check_folder(packed["related"], workers=1, depth="quick")["problems"]
    order.write_bytes(whole)
    assert problems == [f"{pack_documents.ORDER}: its sha256 is not the manifest's: the file was changed"]


def test_killed_while_packing_ends_in_the_same_bytes(packed, corpus, kimi, tmp_path):
    words = ["--dataset_name", corpus, "--tokenizer", kimi, "--output_dir", tmp_path / "o", "--encoder", "reference"]
    words += ["--num_workers", 1, "--shard_tokens", 60_000, "--pack", "related"]
    command = [sys.executable, "tokenize_dataset.py", *map(str, words)]
    for sign in ("document_order.npy", "pack_00002.json"):
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (tmp_path / "o" / sign).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert content(tmp_path / "o") == content(packed["related"])


def test_packing_honours_max_tokens(packed, corpus, kimi, tmp_path):
    source = documents(packed["source"])
    limit = sum(len(document) for document in source[:100])
    assert run(corpus, kimi, tmp_path / "o", "--pack", "shuffled", "--max_tokens", limit) == 0
    assert sorted(documents(tmp_path / "o")) == sorted(source[:100])


# ---------------------------------------------------------------------------- statistics


def test_statistics_as_table_json_and_picture(packed, tmp_path, capsys):
    words = ["--output_dir", str(packed["related"]), "--statistics", str(tmp_path / "stats.png")]
    assert tokenize_dataset.main(words) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "stats.json").read_text())
    lengths = [len(document) for document in documents(packed["related"])]
    assert figures["tokens"] == sum(lengths) and figures["documents"] == len(lengths)
    assert figures["documents_per_2m_window"] == pytest.approx(2**21 * len(lengths) / sum(lengths))
    long = sum(length for length in lengths if length >= 1 << 16) / sum(lengths)
    assert figures["share_of_tokens_in_documents_of_at_least"]["64K"] == pytest.approx(long)
    assert figures["order"] == "related" and "(related order)" in out
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"stats\.nothing cannot be written"):
        tokenize_dataset.main([*words[:3], str(tmp_path / "stats.nothing")])


def test_sources_are_counted_by_host(packed, corpus, capsys):
    manifest = json.loads((packed["source"] / MANIFEST).read_text())
    sources = manifest["statistics"]["sources"]
    assert sources["column"] == "url" and sources["count"] == 3
    assert {name for name, _, _ in sources["largest"]} == {"host0.org", "host1.org", "host2.org"}
    assert sum(documents for _, documents, _ in sources["largest"]) == manifest["documents"]
    assert sum(tokens for _, _, tokens in sources["largest"]) == manifest["total_tokens"]


def test_source_column_is_checked(corpus, kimi, tmp_path):
    with pytest.raises(UserError, match=r"source_column: d\.jsonl has no column 'site'; it has 'text', 'url'"):
        run(corpus, kimi, tmp_path / "o", "--source_column", "site")
