"""The loader on windows of 2M tokens: warm and cold speed, the first batch after a resume, resident memory.

    python benchmarks/bench_loader.py --work WORK            # writes 4 GiB of shards there, then reads them

warm    every page in the page cache, every shard's checksum compared before
first   the same when each shard is used for the first time: its SHA-256 is compared before its tokens are served
cold    first use with the files' pages dropped before (posix_fadvise DONTNEED), so that reads go to the disk
train   windows taken while the process computes between them, with prefetch: how long micro_batch waits
resume  open the folder in a fresh process and take the first batch of steps all over the schedule, checksum included
Each figure is the median of the runs; raw values go to benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import data_loader  # noqa: E402
from config import Stage  # noqa: E402
from run_log import git_commit, versions  # noqa: E402

WINDOW = 1 << 21
SHARD_TOKENS = 1 << 26


def make_shards(folder: Path, gib: int) -> None:
    """`gib` GiB of random ids in shards of 256 MiB; contents do not matter to a reader."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    shards = []
    for number in range(gib * 4):
        with data_loader.ShardWriter(folder, f"shard_{number:05d}") as writer:
            for _ in range(64):
                writer.add(generator.integers(0, 163_840, SHARD_TOKENS // 64, dtype="<i4"), np.full(1024, 1024))
            shards.append(writer.close())
    manifest = data_loader.Manifest(
        tokenizer_name="random",
        tokenizer_hash="0" * 64,
        vocab_size=163_840,
        eos_token="[EOS]",
        eos_token_id=163_585,
        max_seq_length=WINDOW,
        total_tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        shards=tuple(shards),
    )
    data_loader.write_file_durably(folder / data_loader.MANIFEST, manifest.to_json())


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def schedule(steps: int) -> data_loader.Schedule:
    return data_loader.Schedule(
        stages=(Stage(0, WINDOW),),
        num_train_steps=steps,
        world_size=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )


def resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def windows(folder: Path, count: int, *, prefetch: bool, work_s: float = 0.0, first_use: bool = False) -> dict:
    """Take `count` windows one after another, `work_s` seconds of other work between them."""
    dataset = data_loader.open_dataset(str(folder))
    if not first_use:
        for shard in range(len(dataset.manifest.shards)):
            dataset.read_shard_into(np.empty(1, data_loader.TOKEN_DTYPE), shard, 0)
    with data_loader.WindowLoader(dataset, schedule(count), seed=0, rank=0, prefetch=prefetch) as loader:
        waits = []
        begin = time.perf_counter()
        for step in range(count):
            asked = time.perf_counter()
            loader.micro_batch(step, 0)
            waits.append(time.perf_counter() - asked)
            time.sleep(work_s)
        seconds = time.perf_counter() - begin - count * work_s
    return {"mtok_per_s": count * WINDOW / seconds / 1e6, "longest_wait_after_first_ms": 1000 * max(waits[1:])}


RESUME = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import data_loader, bench_loader
begin = time.perf_counter()
dataset = data_loader.open_dataset(sys.argv[2])
loader = data_loader.WindowLoader(dataset, bench_loader.schedule(30_000), seed=0, rank=0)
loader.micro_batch(int(sys.argv[3]), 0)
print(1000 * (time.perf_counter() - begin))
loader.close()
"""


def resume_ms(folder: Path, step: int) -> float:
    words = [sys.executable, "-c", RESUME, str(ROOT), str(folder), str(step)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return float(subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    folder = args.work / f"loader_{args.gib}gib"
    if not (folder / data_loader.MANIFEST).exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        # in a process of its own: what writing needs is not the reader's memory
        code = f"import sys; sys.path[:0] = {sys.path!r}; import bench_loader, pathlib; "
        code += f"bench_loader.make_shards(pathlib.Path({str(folder)!r}), {args.gib})"
        subprocess.run(
            [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        )
    count = args.gib * (1 << 30) // 4 // WINDOW
    runs: dict[str, list] = {"cold": [], "first": [], "warm": [], "warm_no_prefetch": [], "train": []}
    for _ in range(args.runs):
        drop_from_cache(folder)
        runs["cold"].append(windows(folder, count, prefetch=True, first_use=True))
        runs["first"].append(windows(folder, count, prefetch=True, first_use=True))
        runs["warm"].append(windows(folder, count, prefetch=True))
        runs["warm_no_prefetch"].append(windows(folder, count, prefetch=False))
        runs["train"].append(windows(folder, 40, prefetch=True, work_s=0.05, first_use=True))
    resumes = {step: resume_ms(folder, step) for step in (0, 1, 777, 15_000, 29_999)}
    report = {
        "environment": {"commit": git_commit(), "versions": versions(("numpy",)), "load": os.getloadavg()},
        "window_tokens": WINDOW,
        "gib": args.gib,
        "median_mtok_per_s": {
            name: statistics.median(run["mtok_per_s"] for run in found) for name, found in runs.items()
        },
        "train_longest_wait_ms": statistics.median(run["longest_wait_after_first_ms"] for run in runs["train"]),
        "resume_first_batch_ms": resumes,
        "peak_resident_mib": resident_mib(),
        "runs": runs,
    }
    target = ROOT / "benchmarks" / "results" / "loader.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
