"""What a checkpoint costs: the disk's own speed, a save that training waits for, a save behind the next step.

    python benchmarks/bench_checkpoint.py --out benchmarks/results/checkpoint_cpu.json                     # 2 CPU ranks, 0.2 B
    python benchmarks/bench_checkpoint.py --layers 4 --hidden 2304 --experts 64 --vocabulary 163840 --ranks 1 \
        --trainable attention --bf16_gradients --out benchmarks/results/checkpoint_4layers_cpu.json     # a 24 GiB host
    (the same with --trainable all --tokens 65536 --accelerate accelerate_config_h100_1x.yaml
        --deepspeed deepspeed_config_h100.json needs a GPU and 64 GiB of host memory)

First the save's writer alone against the disk's own speed, alternating: as many random bytes, written to one file by one
process in pieces of 16 MiB, past the page cache and (to compare) through it, and fsynced. Each figure ends with all bytes on
the disk. Then through the trainer as a user starts it: `accelerate launch train_continual_2m.py` with random weights, a
checkpoint after every step, once with --no-background_save and once without; after each of the two runs the disk is asked
again, for as many bytes as a checkpoint has.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from portable_text import portable  # noqa: E402

from run_log import git_commit, versions  # noqa: E402

PIECE_BYTES = 16 * 2**20
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")
SAVED = re.compile(r"saved .*checkpoint-step(\d+) \(([\d.]+) GiB in ([\d.]+) s, training waited ([\d.]+) s\)")


def model_of(arguments) -> dict:
    """A Kimi-Linear of real head shapes in the given width: KDA but for every fourth layer, MoE but for the first."""
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(arguments.layers)]
    return {
        "model_type": "kimi_linear",
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "intermediate_size": 4 * arguments.hidden,
        "moe_intermediate_size": 4 * arguments.hidden // 9,
        "num_local_experts": arguments.experts,
        "num_attention_heads": max(1, arguments.hidden // 72),
        "num_key_value_heads": max(1, arguments.hidden // 72),
        "linear_num_heads": max(1, arguments.hidden // 72),
        "vocab_size": arguments.vocabulary,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_types": kinds,
        "mlp_layer_types": ["dense"] + ["sparse"] * (arguments.layers - 1),
    }


def disk_speed(folder: Path, size: int, *, flags: int = os.O_DIRECT) -> float:
    """GiB/s of writing `size` random bytes to a new file in `folder` until they are on the disk; past the page cache, or with
    `flags=0` through it."""
    piece = mmap.mmap(-1, PIECE_BYTES)
    piece.write(os.urandom(PIECE_BYTES))
    path = folder / "disk_speed"
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    for _ in range(0, size, PIECE_BYTES):
        os.write(descriptor, piece)
    os.fsync(descriptor)
    seconds = time.perf_counter() - started
    os.close(descriptor)
    path.unlink()
    return -(-size // PIECE_BYTES) * PIECE_BYTES / 2**30 / seconds


def alternate(folder: Path, gib: float, rounds: int) -> list[dict]:
    """The disk's own speed and that of the save's writer (torch.save, SHA-256, fsync), one after the other, in GiB/s.

    Alternating, since a shared disk is fast for some seconds and slow for the next; `processor_s_per_gib` says what a save
    costs beside the disk.
    """
    import torch

    from shard_files import ShardFiles

    torch.set_num_threads(1)
    state = {"tensors": [torch.randn(2**26) for _ in range(max(1, round(4 * gib)))]}
    found = []
    for _ in range(rounds):
        shards = ShardFiles()
        shards.save(state, str(folder / "save.pt"))
        processor, started = time.process_time(), time.perf_counter()
        shards.start()
        size = shards.join()[folder / "save.pt"]["bytes"]
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        (folder / "save.pt").unlink()
        speeds = {
            "save": size / 2**30 / seconds,
            "disk": disk_speed(folder, size),
            "disk_through_page_cache": disk_speed(folder, size, flags=0),
        }
        found.append({**speeds, "processor_s_per_gib": processor / (size / 2**30), "load_average": os.getloadavg()[0]})
    return found


def train(arguments, work: Path, name: str, *extra: str) -> tuple[list[dict], str]:
    """One run of the trainer; its saves and its log. Raises RuntimeError with its last lines if it fails."""
    output = work / name
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "data_dir": work / "tokens",
        "output_dir": output,
        "model_config": work / "model.json",
        "deepspeed": work / "deepspeed.json",
        "trainable": arguments.trainable,
        "curriculum": f"0:{arguments.tokens}",
        "num_train_steps": arguments.steps,
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "warmup_steps": 0,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(work / "accelerate.yaml")]
    command += [
        "--num_processes",
        str(arguments.ranks),
        "--main_process_port",
        "0",
        str(ROOT / "train_continual_2m.py"),
    ]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([*command, "--force", *extra], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")] or [done.stderr[-4000:]]
        raise RuntimeError(f"{name}: exit {done.returncode}\n" + "\n".join(said))
    saves = [
        {"step": int(step), "gib": float(gib), "seconds": float(seconds), "training_waited_s": float(waited)}
        for step, gib, seconds, waited in SAVED.findall(done.stdout)
    ]
    steps = [json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = (output / "log.txt").read_text()
    shutil.rmtree(output)
    return [{**save, "step_seconds": steps[save["step"] - 1]} for save in saves], log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_checkpoint"), help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--trainable", default="all")
    parser.add_argument(
        "--bf16_gradients", action="store_true", help="gradients summed in bf16: 2 bytes less a parameter"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of one round of the writer against the disk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accelerate", default="demo/accelerate.yaml")
    parser.add_argument("--deepspeed", default="demo/deepspeed.json")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import tiny

    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    (work / "model.json").write_text(json.dumps(model_of(arguments)))
    deepspeed = json.loads((ROOT / arguments.deepspeed).read_text())
    if arguments.bf16_gradients:
        deepspeed["data_types"]["grad_accum_dtype"] = "bf16"
    (work / "deepspeed.json").write_text(json.dumps(deepspeed))
    launcher = yaml.safe_load((ROOT / arguments.accelerate).read_text())
    launcher["deepspeed_config"]["deepspeed_config_file"] = str(work / "deepspeed.json")
    (work / "accelerate.yaml").write_text(yaml.safe_dump(launcher))
    documents = max(120, 4 * arguments.tokens * arguments.ranks * arguments.steps // 200)
    tiny.write_tokens(work / "tokens", documents=documents, vocabulary=min(arguments.vocabulary, 10_000))
    alternating = alternate(work, arguments.gib, arguments.rounds)
    waiting, log = train(arguments, work, "waiting", "--no-background_save")
    size = int(waiting[-1]["gib"] * 2**30)
    disk = [disk_speed(work, size)]
    hidden, hidden_log = train(arguments, work, "hidden")
    disk.append(disk_speed(work, size))
    median = {key: statistics.median(each[key] for each in alternating) for key in alternating[0]}
    result = {
        "environment": {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "commit": git_commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.release()}",
            "versions": versions(PACKAGES),
            "options": {key: str(value) for key, value in vars(arguments).items()},
        },
        "checkpoint_gib": waiting[-1]["gib"],
        "writer_and_disk_alternating": alternating,
        "median": {**median, "save_over_disk": median["save"] / median["disk"]},
        "disk_gib_per_s_at_its_size": disk,
        "saves_that_training_waits_for": waiting,
        "saves_behind_the_next_step": hidden,
        "logs": [log, hidden_log],
    }
    arguments.out.write_text(portable(json.dumps(result, indent=1), WORK=work))
    print(
        f"disk {median['disk']:.2f} GiB/s ({median['disk_through_page_cache']:.2f} through the page cache), "
        f"save {median['save']:.2f} GiB/s ({100 * median['save'] / median['disk']:.0f} %), "
        f"{median['processor_s_per_gib']:.2f} processor seconds a GiB; checkpoint of {waiting[-1]['gib']:.2f} GiB: "
        f"{statistics.median(s['gib'] / max(s['seconds'], 1e-3) for s in waiting):.2f} GiB/s, the disk at that size "
        f"{' and '.join(f'{speed:.2f}' for speed in disk)}; training "
        f"waited {statistics.median(s['training_waited_s'] for s in waiting):.2f} s for it, "
        f"{statistics.median(s['training_waited_s'] for s in hidden[:-1]):.2f} s when written behind a step of "
        f"{statistics.median(s['step_seconds'] for s in hidden[:-1]):.2f} s"
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
