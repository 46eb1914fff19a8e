"""Tokenizing against peers: the same files, the same vocabulary, the same cores, runs interleaved, ratios reported.

    apt-get download linux-doc-6.1 rust-doc openjdk-17-doc libboost1.81-doc python3.11-doc     # in DEBS
    pip install --no-deps dashscope==2.0.2                                                     # for its qwen.tiktoken
    python benchmarks/bench_tokenize.py corpus --debs DEBS --work WORK
    python benchmarks/bench_tokenize.py speed --work WORK --datatrove_python OTHER_VENV/bin/python
    python benchmarks/bench_tokenize.py steady --work WORK
    python benchmarks/bench_tokenize.py kills --work WORK --kills 20
    python benchmarks/bench_tokenize.py memory --work WORK

Contenders, each on `--workers` processes:
  ours          tokenize_dataset.py, tiktoken (--encoder reference)
  ours_fast     tokenize_dataset.py, fastokens proven and sampled (--encoder fast)
  encoder       the encoder alone: tiktoken over texts in memory, nothing written (the floor of `ours`)
  megatron      a loop in the manner of Megatron's preprocess_data.py with tiktoken: a pool of processes over JSON lines,
                one writer, megatron-core's own IndexedDatasetBuilder
  map           `datasets.map(batched=True)` with tiktoken into arrow
  datatrove     DocumentTokenizer with the same vocabulary as a tokenizer.json
All write Kimi's ids of a 151,643-rank vocabulary. Wall and processor seconds include start-up. Raw runs go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import encoders  # noqa: E402
from run_log import git_commit, versions  # noqa: E402

CONTENDERS = ("ours", "ours_fast", "encoder", "megatron", "map", "datatrove")
PACKAGES = (
    "numpy",
    "pyarrow",
    "tiktoken",
    "fastokens",
    "tokenizers",
    "transformers",
    "datasets",
    "megatron-core",
    "datatrove",
)


# ---------------------------------------------------------------------------- corpus


def text_of(path: Path) -> str | None:
    """The text of a documentation file, markup removed; None for what is no text."""
    suffixes = {suffix for suffix in path.suffixes if suffix in (".html", ".txt", ".gz", ".rst", ".cpp", ".hpp", ".md")}
    if not suffixes:
        return None
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if b"\0" in raw[:4096]:
        return None
    text = raw.decode(errors="replace")
    if ".html" in suffixes:
        text = re.sub(r"(?s)<(script|style).*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n\s*\n+", "\n\n", text))
    return text if text.strip() else None


def make_corpus(debs: Path, work: Path, most_bytes: int) -> None:
    """WORK/corpus.parquet, corpus.jsonl and kimi/: real text from documentation packages, and a tokenizer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    work.mkdir(parents=True, exist_ok=True)
    unpacked = work / "unpacked"
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
    paths = sorted(path for path in unpacked.rglob("*") if path.is_file() and not path.is_symlink())
    random.Random(0).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        text = text_of(path)
        if text:
            texts.append(text)
            size += len(text.encode())
        if size >= most_bytes:
            break
    shutil.rmtree(unpacked)
    pq.write_table(pa.table({"text": texts}), work / "corpus.parquet", row_group_size=1000)
    with open(work / "corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    import importlib.util

    ranks = Path(importlib.util.find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    (work / "kimi").mkdir(exist_ok=True)
    shutil.copy(ranks, work / "kimi" / "tiktoken.model")
    named = {str(151_643 + i): {"content": token, "special": True} for i, token in enumerate(("[BOS]", "[EOS]"))}
    config = {"eos_token": "[EOS]", "bos_token": "[BOS]", "added_tokens_decoder": named}
    (work / "kimi" / "tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer_json(work / "kimi", work / "tokenizer.json")
    print(f"{len(texts):,} documents, {size:,} bytes of text")


def write_tokenizer_json(kimi: Path, target: Path) -> None:
    """The same ranks and word pattern as a tokenizer.json, for peers that read only that."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(kimi / "tiktoken.model"), pattern=encoders.KIMI_PATTERN, extra_special_tokens=["[BOS]", "[EOS]"]
    )
    converter.converted().save(str(target))


# ---------------------------------------------------------------------------- contenders


def tiktoken_encoding(kimi: str):
    import tiktoken

    spec = encoders.find_tokenizer(kimi)
    ranks = encoders.read_tiktoken_ranks(Path(kimi) / "tiktoken.model")
    return tiktoken.Encoding(
        "kimi", pat_str=encoders.KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=dict(spec.special_tokens)
    ), spec.eos_token_id


class MegatronEncoder:
    """What Megatron's preprocess_data.py gives to its pool: an initializer and one call per JSON line."""

    kimi = ""

    def initializer(self):
        MegatronEncoder.encoding, MegatronEncoder.eos = tiktoken_encoding(self.kimi)

    def encode(self, line):
        text = json.loads(line)["text"]
        ids = [i for piece in encoders.kimi_pieces(text) for i in MegatronEncoder.encoding.encode_ordinary(piece)]
        ids.append(MegatronEncoder.eos)
        return ids, len(line)


def run_megatron(work: Path, out: Path, workers: int) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    out.mkdir()
    encoder = MegatronEncoder()
    encoder.kimi = str(work / "kimi")
    builder = IndexedDatasetBuilder(str(out / "m.bin"), dtype=np.int32)
    with (
        open(work / "corpus.jsonl", encoding="utf-8") as lines,
        multiprocessing.get_context("fork").Pool(workers, initializer=encoder.initializer) as pool,
    ):
        for ids, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(out / "m.idx"))


def map_batch(batch, kimi):
    if not hasattr(map_batch, "encoding"):
        map_batch.encoding, map_batch.eos = tiktoken_encoding(kimi)
    encoded = []
    for text in batch["text"]:
        ids = [i for piece in encoders.kimi_pieces(text) for i in map_batch.encoding.encode_ordinary(piece)]
        encoded.append([*ids, map_batch.eos])
    return {"input_ids": encoded}


def run_map(work: Path, out: Path, workers: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(work / "corpus.parquet"), split="train", cache_dir=str(out))
    rows.map(
        map_batch,
        batched=True,
        num_proc=workers,
        remove_columns=["text"],
        fn_kwargs={"kimi": str(work / "kimi")},
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
    )


def _encode_part(task) -> int:
    kimi, path, part, parts = task
    import pyarrow.parquet as pq

    encoding, _ = tiktoken_encoding(kimi)
    texts = pq.read_table(path)["text"].to_pylist()[part::parts]
    begin = time.process_time()
    tokens = 0
    for text in texts:
        for piece in encoders.kimi_pieces(text):
            tokens += len(encoding.encode_to_numpy(piece, disallowed_special=()))
    return tokens, time.process_time() - begin


def run_encoder(work: Path, out: Path, workers: int) -> None:
    """Reports through OUT/encoder.json the processor seconds of encoding only, without start-up and reading."""
    tasks = [(str(work / "kimi"), str(work / "corpus.parquet"), i, workers) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_encode_part, tasks)
    out.mkdir()
    report = {"tokens": sum(p[0] for p in parts), "cpu_s": sum(p[1] for p in parts)}
    (out / "encoder.json").write_text(json.dumps(report))


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, tokenizer, out, workers = sys.argv[1:5]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern="corpus_*.jsonl"),
            DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="[EOS]", shuffle_documents=False),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=out + "/logs", start_method="spawn",
    ).run()
"""


def run_datatrove(work: Path, out: Path, workers: int, python: str) -> None:
    parts = work / "parts"
    if not parts.exists():  # datatrove's unit of work is a file
        parts.mkdir()
        lines = (work / "corpus.jsonl").read_bytes().splitlines(keepends=True)
        for i in range(workers):
            (parts / f"corpus_{i}.jsonl").write_bytes(b"".join(lines[i::workers]))
    (work / "datatrove_run.py").write_text(DATATROVE)
    words = [python, str(work / "datatrove_run.py"), str(parts), str(work / "tokenizer.json"), str(out), str(workers)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_ours(work: Path, out: Path, workers: int, encoder: str) -> None:
    words = ["--dataset_name", work / "corpus.parquet", "--tokenizer", work / "kimi", "--output_dir", out]
    words += ["--num_workers", workers, "--encoder", encoder]
    command = [sys.executable, str(ROOT / "tokenize_dataset.py"), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_one(name: str, work: Path, workers: int, datatrove_python: str) -> None:
    """One contender, once, in this process (the parent measures it)."""
    out = work / f"out_{name}"
    shutil.rmtree(out, ignore_errors=True)
    if name == "ours":
        run_ours(work, out, workers, "reference")
    elif name == "ours_fast":
        run_ours(work, out, workers, "fast")
    elif name == "datatrove":
        run_datatrove(work, out, workers, datatrove_python)
    else:
        {"megatron": run_megatron, "map": run_map, "encoder": run_encoder}[name](work, out, workers)


# ---------------------------------------------------------------------------- measurements


def measured(words: list[str]) -> dict:
    """Wall and processor seconds of a command with all its children."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": round(time.perf_counter() - begin, 3), "cpu_s": round(cpu, 3)}


def tokens_of(work: Path) -> int:
    return json.loads((work / "out_ours" / "manifest.json").read_text())["total_tokens"]


def environment(workers: int) -> dict:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": git_commit(),
        "versions": versions(PACKAGES),
        "cpu": model.group(1) if model else "unknown",
        "cores": os.cpu_count(),
        "workers": workers,
        "load_before": os.getloadavg(),
    }


def speed(args: argparse.Namespace) -> dict:
    names = [name for name in CONTENDERS if name != "datatrove" or args.datatrove_python]
    if args.only:
        names = args.only.split(",")
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(args.runs):
        for name in names:
            words = [
                sys.executable,
                __file__,
                "one",
                "--name",
                name,
                "--work",
                str(args.work),
                "--workers",
                str(args.workers),
            ]
            run = measured([*words, "--datatrove_python", args.datatrove_python or ""])
            if name == "encoder":
                run |= json.loads((args.work / "out_encoder" / "encoder.json").read_text()) | {"wall_s": run["wall_s"]}
            runs[name].append(run)
            print(number, name, run, flush=True)
    corpus = {"tokens": tokens_of(args.work), "jsonl_bytes": (args.work / "corpus.jsonl").stat().st_size}
    return {"corpus": corpus, **summarized(runs, corpus["tokens"]), "runs": runs}


def summarized(runs: dict[str, list[dict]], tokens: int) -> dict:
    """Medians and fastest runs, and the ratios of both.

    On a machine that others use too, disturbance only ever adds seconds: the fastest wall time of each contender says
    most about it, processor time next.
    """
    report: dict = {}
    for label, choose in (("median", statistics.median), ("fastest", min)):
        best = {n: {key: choose(run[key] for run in found) for key in ("wall_s", "cpu_s")} for n, found in runs.items()}
        table = {
            n: b | {"mtok_per_s": tokens / b["wall_s"] / 1e6, "cpu_us_per_token": 1e6 * b["cpu_s"] / tokens}
            for n, b in best.items()
        }
        ratios = {
            f"{peer} / {ours}, {what}": best[peer][key] / best[ours][key]
            for ours in ("ours", "ours_fast")
            for peer in ("megatron", "map", "datatrove")
            for what, key in (("wall", "wall_s"), ("processor time", "cpu_s"))
            if ours in best and peer in best
        }
        report[label] = {"contenders": table, "ratios": ratios}
    return report


def steady(args: argparse.Namespace) -> dict:
    """Whole units (read, encode, check, hash, write, fsync) against the encoder alone on the same texts, in one process.

    Interleaved unit by unit, processor time, start-up left out: what a long run pays beyond the encoder.
    """
    import tempfile

    from text_sources import cut_units, find_source, read_unit
    from token_units import TokenizeJob

    spec = encoders.find_tokenizer(str(args.work / "kimi"))
    path = str(args.work / "corpus.parquet")
    source = find_source(path, config=None, split=None, text_column="text", threads=1)
    encoding, _ = tiktoken_encoding(str(args.work / "kimi"))
    report = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for name in ("reference", "fast"):
            job = TokenizeJob(folder, source, spec, name, 1 << 26, "plan")
            state = job.start(lambda **counts: None)
            rows = []
            for unit in cut_units(source, unit_bytes=32 << 20):
                texts = [row.text for row in read_unit(source, unit) if row.has_text]
                begin = time.process_time()
                tokens = 0
                for text in texts:
                    for piece in encoders.kimi_pieces(text):
                        tokens += len(encoding.encode_to_numpy(piece, disallowed_special=()))
                alone = time.process_time() - begin
                begin = time.process_time()
                job.work(state, (unit, None), lambda **counts: None)
                rows.append(
                    {"tokens": tokens, "tiktoken_alone_cpu_s": alone, "unit_cpu_s": time.process_time() - begin}
                )
            report[name] = {
                "unit / tiktoken alone, processor time": statistics.median(
                    r["unit_cpu_s"] / r["tiktoken_alone_cpu_s"] for r in rows
                ),
                "mtok_per_cpu_s": statistics.median(r["tokens"] / r["unit_cpu_s"] / 1e6 for r in rows),
                "units": rows,
            }
    return report


def kills(args: argparse.Namespace) -> dict:
    """SIGKILL at random moments, then the comparison of every byte with an uninterrupted run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_tokenize_faults import command, content, kill_until_done

    whole, killed = args.work / "out_whole", args.work / "out_killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    data, kimi = args.work / "corpus.parquet", args.work / "kimi"
    options = ("--num_workers", args.workers)
    subprocess.run(command(data, kimi, whole, *options), cwd=ROOT, check=True, capture_output=True)
    hits = kill_until_done(command(data, kimi, killed, *options), killed, kills=args.kills, seed=1, longest_wait_s=2.0)
    same = content(whole) == content(killed)
    return {"kills": args.kills, "hit_running_work": hits, "byte_identical": same, "files": len(content(whole))}


def pss_mib(pid: int) -> float:
    """Proportional memory of a process and its descendants, MiB."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(re.search(r"Pss:\s+(\d+) kB", rollup).group(1))
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, AttributeError):
            continue
    return total / 1024


def memory(args: argparse.Namespace) -> dict:
    """Peak proportional memory of the whole tree on the corpus once and four times, a 24 MB document among it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pq.read_table(args.work / "corpus.parquet")["text"].to_pylist()[:20_000]
    long = "\n".join(texts)[:24_000_000]
    report = {}
    for times in (1, 4):
        path = args.work / f"memory_{times}.parquet"
        pq.write_table(pa.table({"text": [*(texts * times), long]}), path, row_group_size=1000)
        for encoder in ("reference", "fast"):
            out = args.work / "out_memory"
            shutil.rmtree(out, ignore_errors=True)
            words = ["--dataset_name", path, "--tokenizer", args.work / "kimi", "--output_dir", out]
            words += ["--num_workers", args.workers, "--encoder", encoder]
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tokenize_dataset.py"), *map(str, words)], stdout=subprocess.DEVNULL
            )
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, pss_mib(process.pid))
                time.sleep(0.05)
            report[f"{encoder}, data x{times}"] = round(peak)
            print(encoder, times, round(peak), "MiB", flush=True)
        path.unlink()
    return {"peak_pss_mib": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "speed", "steady", "kills", "memory", "one"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--debs", type=Path)
    parser.add_argument("--corpus_bytes", type=int, default=400_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--name", choices=CONTENDERS)
    parser.add_argument("--only", help="comma-separated contenders")
    parser.add_argument("--datatrove_python", default="")
    args = parser.parse_args()
    if args.what == "corpus":
        make_corpus(args.debs, args.work, args.corpus_bytes)
    elif args.what == "one":
        run_one(args.name, args.work, args.workers, args.datatrove_python)
    else:
        report = {"what": args.what, "environment": environment(args.workers)}
        report |= {"speed": speed, "steady": steady, "kills": kills, "memory": memory}[args.what](args)
        target = ROOT / "benchmarks" / "results" / f"tokenize_{args.what}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({k: v for k, v in report.items() if k not in ("runs", "environment")}, indent=1))


if __name__ == "__main__":
    main()
