"""Whole training steps through the trainer on one GPU: real layer shapes, 3 KDA + 1 MLA layers, 64 experts.

    python benchmarks/bench_engine.py prepare WORK --lengths 65536,262144,2097152     # model, tokens, DeepSpeed and launch files
    python benchmarks/bench_engine.py run WORK --out OUT.json --gpu_memory_gib 72     # further options go to the trainer
    python benchmarks/bench_engine.py table benchmarks/results/engine_lengths_h100.json    # the README's figures of a run

The lengths become the stages of one run, shortest first: two steps each up to 256K tokens (compiling falls into the first),
one beyond. OUT.json is rewritten every few seconds with all that the run has said so far, so a run that dies or is cut off
leaves its numbers; it ends with the last step, before the checkpoint. With --engine reference the same files run the plain
path, and `out_of_memory_at` names the length at which it died.

Host memory: the DeepSpeed JSON is the shipped one without pinned optimizer buffers and with bf16 accumulation (one micro-step
a step accumulates nothing), so that 2.4 B parameters with all their states fit 128 GiB beside a 2M sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from portable_text import portable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 4,
    "num_local_experts": 64,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
TWO_STEPS_UP_TO = 262_144
ENGINE_LINE = re.compile(
    r"engine: forward and backward (?P<seconds>[\d.]+) s; kernels' own seconds: (?P<kernels>.*?); sum (?P<sum>[\d.]+), "
    r"ratio (?P<ratio>[\d.]+); GPU peak (?P<reserved>[\d.]+) GiB reserved, (?P<allocated>[\d.]+) allocated; "
    r"host (?P<pinned>[\d.]+) GiB pinned"
)


def prepare(work: Path, lengths: list[int], model: dict) -> None:
    """Write everything a run needs into `work`."""
    from config import read_json

    work.mkdir(parents=True, exist_ok=True)
    (work / "model.json").write_text(json.dumps(model))
    ds = read_json(str(ROOT / "deepspeed_config_h100.json"))
    ds["data_types"] = {**ds.get("data_types", {}), "grad_accum_dtype": "bf16"}
    for place in ("offload_optimizer", "offload_param"):
        ds["zero_optimization"][place]["pin_memory"] = False
    (work / "deepspeed.json").write_text(json.dumps(ds, indent=1))
    launch = (ROOT / "accelerate_config_h100_1x.yaml").read_text()
    (work / "accelerate.yaml").write_text(launch.replace("deepspeed_config_h100.json", str(work / "deepspeed.json")))
    stages, step, total = [], 0, 0
    for length in lengths:
        stages.append(f"{step}:{length}")
        steps = 2 if length <= TWO_STEPS_UP_TO else 1
        step, total = step + steps, total + steps * length
    write_tokens(work / "tokens", total, model.get("vocab_size", 163_840), longest=max(lengths))
    (work / "run.json").write_text(json.dumps({"curriculum": ",".join(stages), "num_train_steps": step}))


def write_tokens(folder: Path, total: int, vocabulary: int, *, longest: int) -> None:
    """A data set of `total` random tokens in one document, for windows of up to `longest`."""
    import numpy as np

    import data_loader

    folder.mkdir(parents=True, exist_ok=True)
    with data_loader.ShardWriter(folder, "shard_00000") as writer:
        # as uneven as words are, since experts are then hit unevenly too
        tokens = np.random.default_rng(0).zipf(1.2, total).clip(3, vocabulary - 1).astype("<i4")
        writer.add(tokens, np.array([total]))
        shard = writer.close()
    manifest = data_loader.Manifest(
        tokenizer_name="random",
        tokenizer_hash="random",
        vocab_size=vocabulary,
        eos_token="[EOS]",
        eos_token_id=2,
        max_seq_length=longest,
        total_tokens=total,
        documents=1,
        shards=(shard,),
    )
    data_loader.write_file_durably(folder / "manifest.json", manifest.to_json())


def command(work: Path, extra: list[str]) -> list[str]:
    """The trainer's command line for a prepared folder; `extra` options win."""
    options = {
        "data_dir": work / "tokens",
        "output_dir": work / "out",
        "model_config": work / "model.json",
        "deepspeed": work / "deepspeed.json",
        "accelerate_config": work / "accelerate.yaml",
        **json.loads((work / "run.json").read_text()),
        "gradient_accumulation_steps": 1,
        "attention_outputs": "keep",
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "save_steps": 1_000_000,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(work / "accelerate.yaml")]
    return [*launch, str(ROOT / "train_continual_2m.py"), *words, "--force", *extra]


def run(work: Path, out: Path, extra: list[str]) -> int:
    """Run the trainer to its last step and keep what it says in `out`; returns the trainer's exit code, 0 if it was stopped
    after its last step."""
    shutil.rmtree(work / "out", ignore_errors=True)
    words, last = command(work, extra), json.loads((work / "run.json").read_text())["num_train_steps"]
    finished = re.compile(rf"^step +{last}/{last} .*?^memory of this rank", re.MULTILINE | re.DOTALL)
    samples: list[dict] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(work / "stdout.txt", "w") as stdout:
        process = subprocess.Popen(words, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True)
    code = None
    try:
        while code is None:
            time.sleep(4)
            samples.append(sample_gpu())
            code = process.poll()
            if code is None and finished.search((work / "stdout.txt").read_text()):
                code = 0  # before the checkpoint, which takes a minute
            record = {"options": extra, "exit_code": code, **collect(work), "gpu": summary(samples)}
            out.write_text(json.dumps(record, indent=1))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code


def sample_gpu() -> dict:
    """Memory (MiB), utilisation (%), clock (MHz) and power (W) of the first GPU now; empty without nvidia-smi."""
    names = ("memory.used", "utilization.gpu", "clocks.sm", "power.draw")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, map(float, values), strict=True))


def summary(samples: list[dict]) -> dict:
    """Highest memory, and means of clock and power while the GPU was at work."""
    busy = [sample for sample in samples if sample.get("utilization.gpu", 0) >= 90]
    if not busy:
        return {}
    mean = {f"mean {name} while busy": sum(s[name] for s in busy) / len(busy) for name in ("clocks.sm", "power.draw")}
    return {"highest memory.used (MiB)": max(s["memory.used"] for s in samples if s), **mean, "busy samples": len(busy)}


def collect(work: Path) -> dict:
    """The run so far: its log, its metrics, and the engine's first step of each length."""

    def read(name: str) -> str:
        return portable((work / name).read_text(), WORK=work) if (work / name).exists() else ""

    stdout = read("stdout.txt")
    steps = [json.loads(line) for line in read("out/metrics.jsonl").splitlines()]
    firsts = []
    for match in ENGINE_LINE.finditer(stdout):
        parts = dict(part.rsplit(" ", 1) for part in match["kernels"].split(", "))
        numbers = {k: float(v) for k, v in match.groupdict().items() if k != "kernels"}
        firsts.append({**numbers, "kernels": {name: float(value) for name, value in parts.items()}})
    died = None
    if "CUDA out of memory" in stdout or "OutOfMemoryError" in stdout:
        stages = [stage.split(":") for stage in json.loads(read("run.json"))["curriculum"].split(",")]
        died = [int(length) for start, length in stages if int(start) <= len(steps)][-1]
    return {
        "model": json.loads(read("model.json")),
        "run": json.loads(read("run.json")),
        "out_of_memory_at": died,
        "steps": steps,
        "first_step_of_each_length": firsts,
        "log": read("out/log.txt"),
        "stdout": stdout[-20_000:],
    }


def table(path: Path) -> str:
    """The last step of each length: its speed and memory, its kernels' seconds (of the length's first step) and what a token
    costs besides attention. The first length's kernels are left out: they compile in it."""
    run = json.loads(path.read_text())
    last = {step["seq_length"]: step for step in run["steps"]}
    lines = [
        "| tokens | step, s | tok/s | MFU | GPU reserved, GiB | kernels, s | forward + backward / kernels | besides attention, us a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, ((tokens, step), first) in enumerate(zip(last.items(), run["first_step_of_each_length"], strict=False)):
        attention = sum(seconds for name, seconds in first["kernels"].items() if name.startswith("attention"))
        kernels = f"{first['sum']:.1f} | {first['ratio']:.3f} | {(step['seconds'] - attention) / tokens * 1e6:.0f}"
        lines.append(
            f"| {tokens:,} | {step['seconds']:.1f} | {step['tokens_per_second']:,.0f} | {100 * step['mfu']:.1f} % | "
            f"{step['peak_gib']:.1f} | {kernels if number else '| |'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "run", "table"))
    parser.add_argument("work", type=Path, help="a folder; for `table` the JSON of a run")
    parser.add_argument("--lengths", default="65536,131072,262144,524288,1048576,2097152")
    parser.add_argument("--model", type=Path, help="a model JSON instead of the four real layers")
    parser.add_argument("--out", type=Path)
    arguments, extra = parser.parse_known_args()
    if arguments.action == "prepare":
        model = json.loads(arguments.model.read_text()) if arguments.model else MODEL
        prepare(arguments.work, [int(n) for n in arguments.lengths.split(",")], model)
        return 0
    if arguments.action == "table":
        print(table(arguments.work))
        return 0
    if arguments.out is None:
        parser.error("run needs --out FILE.json")
    return run(arguments.work, arguments.out, extra)


if __name__ == "__main__":
    sys.exit(main())
