"""What goes wrong in the middle: kills, a lost worker, a full disk, a read-only folder, a changed source, huge documents."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import EOS, real_texts, save_kimi_tokenizer

import encoders
import process_pool
import token_units
import tokenize_dataset
import verify_shards
from config import UserError
from data_loader import MANIFEST, ShardReader, open_dataset
from text_sources import cut_units, find_source

ROOT = Path(tokenize_dataset.__file__).parent


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    return save_kimi_tokenizer(tmp_path_factory.mktemp("kimi"))


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(data, tokenizer, output, *more) -> list[str]:
    words = ["--dataset_name", data, "--tokenizer", tokenizer, "--output_dir", output, "--encoder", "reference"]
    return [sys.executable, "tokenize_dataset.py", *(str(word) for word in (*words, *more))]


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def children(pid: int) -> list[int]:
    """Process ids of the workers of a running launcher (not multiprocessing's resource tracker)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [c for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def kill_until_done(words: list[str], output: Path, *, kills: int, seed: int, longest_wait_s: float) -> int:
    """Run the command, SIGKILL it `kills` times at random moments, then let it finish. Returns kills that hit work.

    Every other time only the launcher is killed and its workers must notice by themselves.
    """
    generator = random.Random(seed)
    hits = 0
    for number in range(kills):
        process = subprocess.Popen(
            words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began = set(output.glob("unit_*.json")) if output.exists() else set()
        deadline = time.monotonic() + 60
        # from the first new sign of work on, so that slow imports do not swallow the kills
        while process.poll() is None and time.monotonic() < deadline:
            if set(output.glob("unit_*.json")) - began or any(output.glob("*.tmp")):
                break
            time.sleep(0.005)
        time.sleep(generator.uniform(0, longest_wait_s))
        hits += process.poll() is None
        if number % 2:
            process.kill()
        else:
            with suppress(ProcessLookupError):  # it may just have finished
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return hits


def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path, kimi, monkeypatch):
    texts = [*real_texts(150)] * 4
    data = write_jsonl(tmp_path / "d.jsonl", texts)
    options = ("--num_workers", 2, "--shard_tokens", 50_000)
    subprocess.run(command(data, kimi, tmp_path / "whole", *options), cwd=ROOT, check=True, capture_output=True)
    hits = kill_until_done(
        command(data, kimi, tmp_path / "killed", *options), tmp_path / "killed", kills=6, seed=3, longest_wait_s=0.15
    )
    assert hits >= 2
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_lost_worker_is_an_error_that_says_so(tmp_path, kimi):
    data = write_jsonl(tmp_path / "d.jsonl", real_texts(150))
    words = command(data, kimi, tmp_path / "o", "--num_workers", 2)
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not (tmp_path / "o").exists():
        time.sleep(0.01)
    while process.poll() is None and not (workers := children(process.pid)):
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was ended from outside (exit code -9)" in said and "fewer --num_workers" in said
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    assert verify_shards.verify(tmp_path / "o", workers=1) == 0


class Crash:
    """A job whose task 3 fails by a bug."""

    def start(self, report):
        return None

    def work(self, state, task, report):
        report(seen=task)
        return 1 / (task - 3)


def test_a_bug_in_a_worker_shows_its_traceback_and_its_task():
    seen = []
    with pytest.raises(RuntimeError, match=r"(?s)failed on 3:.*ZeroDivisionError"):
        list(
            process_pool.run(Crash(), range(5), workers=1, on_progress=lambda task, counts: seen.append((task, counts)))
        )
    assert seen[:3] == [(0, {"seen": 0}), (1, {"seen": 1}), (2, {"seen": 2})]


# ---------------------------------------------------------------------------- disks


@contextmanager
def small_disk(folder: Path, *options: str):
    """A tmpfs on `folder`; skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_then_room_then_the_same_bytes(tmp_path, kimi):
    data = write_jsonl(tmp_path / "d.jsonl", real_texts(120))
    options = ("--num_workers", 1, "--shard_tokens", 60_000)
    subprocess.run(command(data, kimi, tmp_path / "whole", *options), cwd=ROOT, check=True, capture_output=True)
    with small_disk(tmp_path / "disk", "size=3m") as disk:
        answer = subprocess.run(command(data, kimi, disk / "o", *options), cwd=ROOT, capture_output=True, text=True)
        assert answer.returncode == 2 and "No space left on device" in answer.stderr and "make room" in answer.stderr
        assert not (disk / "o" / MANIFEST).exists() and not list((disk / "o").glob("*.tmp"))
        assert (disk / "o" / "unit_00000.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert subprocess.run(command(data, kimi, disk / "o", *options), cwd=ROOT).returncode == 0
        assert content(disk / "o") == content(tmp_path / "whole")


def test_a_file_size_limit_is_a_clear_error(tmp_path, kimi):
    """The same without a mount: a shard that may not grow as far as it must."""
    data = write_jsonl(tmp_path / "d.jsonl", real_texts(80))
    words = command(data, kimi, tmp_path / "o", "--num_workers", 1)
    limited = ["bash", "-c", 'ulimit -f 600; exec "$@"', "limited", *words]
    answer = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2 and "File too large" in answer.stderr
    assert not (tmp_path / "o" / MANIFEST).exists()


def test_read_only_folder(tmp_path, kimi):
    data = write_jsonl(tmp_path / "d.jsonl", ["a text"])
    with small_disk(tmp_path / "disk", "size=1m", "ro") as disk:
        answer = subprocess.run(command(data, kimi, disk / "o"), cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2 and "o cannot be written (Read-only file system)" in answer.stderr


# ---------------------------------------------------------------------------- sources


def test_a_source_that_changed_before_the_resume(tmp_path, kimi):
    texts = list(real_texts(30))
    data = write_jsonl(tmp_path / "d.jsonl", [*texts, 5])
    answer = subprocess.run(
        command(data, kimi, tmp_path / "o", "--shard_tokens", 20_000), cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 2 and "d.jsonl, line 31: the text column holds int 5" in answer.stderr
    write_jsonl(data, [*texts, "mended"])
    answer = subprocess.run(
        command(data, kimi, tmp_path / "o", "--shard_tokens", 20_000), cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 2 and "source file d.jsonl has other content" in answer.stderr
    assert not (tmp_path / "o" / MANIFEST).exists()


def test_huge_and_hostile_documents(tmp_path, kimi):
    """None of them hangs or is cut: each is one document with the published wrapper's ids."""
    book = "\n".join(real_texts(60))
    texts = [
        " " * 1_000_000 + "end",
        "a" * 8_000_000,
        (book * (24_000_000 // len(book) + 1))[:24_000_000],
        f"{EOS}<|im_end|>[BOS]" * 1000,
        "\n" * 100_000 + "x",
    ]
    data = write_jsonl(tmp_path / "d.jsonl", [*texts, " " * 1_000_000])
    words = [
        str(w)
        for w in ("--dataset_name", data, "--tokenizer", kimi, "--output_dir", tmp_path / "o", "--num_workers", 1)
    ]
    assert tokenize_dataset.main(words) == 0
    manifest = open_dataset(str(tmp_path / "o")).manifest
    assert (manifest.documents, manifest.statistics["dropped"]) == (5, 1)
    spec = encoders.find_tokenizer(str(kimi))
    encoder = encoders.load_encoder(spec)
    pairs = itertools.chain.from_iterable(
        (ShardReader(tmp_path / "o", shard.name).document(i) for i in range(shard.documents))
        for shard in manifest.shards
    )
    for text, document in zip(texts, pairs, strict=True):
        np.testing.assert_array_equal(document[:-1], encoder.encode([text])[0])
        assert document[-1] == spec.eos_token_id


def test_a_wrong_fast_encoder_redoes_its_unit(tmp_path, kimi):
    """The first difference: one warning, the unit once more, and the reference's ids from there on."""

    class Wrong:
        name = "wrong"

        def __init__(self, reference):
            self.reference, self.calls = reference, 0

        def encode(self, texts):
            self.calls += 1
            if self.calls == 2:
                raise encoders.EncoderMismatch("on a text of 5 characters")
            tokens, lengths = self.reference.encode(texts)
            return tokens * 0, lengths

    texts = list(real_texts(100))
    data = write_jsonl(tmp_path / "d.jsonl", texts)
    spec = encoders.find_tokenizer(str(kimi))
    source = find_source(str(data), config=None, split=None, text_column="text", threads=1)
    (unit,) = cut_units(source, unit_bytes=1 << 40)
    (tmp_path / "o").mkdir()
    job = token_units.TokenizeJob(str(tmp_path / "o"), source, spec, "auto", 1 << 26, "plan")
    reference = encoders.load_encoder(spec)
    state, reports = [Wrong(reference)], []
    record = job.work(state, (unit, None), lambda **counts: reports.append(counts))
    assert state == [reference] and sum("warning" in counts for counts in reports) == 1
    with ShardReader(tmp_path / "o", record["shards"][0]["name"]) as reader:
        for i, text in enumerate(texts):
            np.testing.assert_array_equal(reader.document(i)[:-1], reference.encode([text])[0])


def test_a_run_without_a_finished_unit_may_be_begun_anew(tmp_path, kimi):
    data = write_jsonl(tmp_path / "d.jsonl", ["fine", {"not": "text"}])
    words = [
        str(w)
        for w in ("--dataset_name", data, "--tokenizer", kimi, "--output_dir", tmp_path / "o", "--num_workers", 1)
    ]
    with pytest.raises(UserError, match=r"d\.jsonl, line 2: the text column holds dict"):
        tokenize_dataset.main(words)
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["plan.json"]
    write_jsonl(data, ["fine", "mended"])
    assert tokenize_dataset.main(words) == 0
    assert open_dataset(str(tmp_path / "o")).manifest.documents == 2
