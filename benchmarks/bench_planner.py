"""Predicted against measured: runs the real trainer on small cases and compares GPU, host and step time with the plan.

    python benchmarks/bench_planner.py --cases cpu  --out benchmarks/results/planner_cpu.json
    python benchmarks/bench_planner.py --cases h100 --only K --out benchmarks/results/planner_h100.json   # one H100; then M
    python benchmarks/bench_planner.py --table benchmarks/results/planner_*.json benchmarks/results/engine*.json   # no run

Each case is `accelerate launch train_continual_2m.py` under ZeRO-3 with CPU offload on random tokens and random weights.
Measured: the allocator's highest reserve on the GPU and the seconds of a step (metrics.jsonl; the last step, the first
holds warm-up), and the highest resident memory of every rank's process, added up (/proc/PID/status, VmHWM). Predicted: by
memory_utils.plan_run for the same files. `--table` plans again with today's planner, so that a change of the planner is
judged by runs that were made before it; it also reads what bench_engine.py collects.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import memory_utils  # noqa: E402
from config import load_config, read_json  # noqa: E402
from hardware import found_gpus  # noqa: E402
from model_shape import ModelShape  # noqa: E402
from run_log import git_commit, versions  # noqa: E402
from zero3_memory import ZeroSettings, set_allocator  # noqa: E402

GIB = 2**30
DEMO = json.loads((ROOT / "demo/model.json").read_text())
# the released layers (hidden 2304, 32 heads, vocabulary 163,840), fewer of them and fewer experts
REAL = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 4,
    "num_experts": 16,
    "first_k_dense_replace": 1,
    "linear_attn_config": {
        "full_attn_layers": [4],
        "kda_layers": [1, 2, 3],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}
REAL_2 = {**REAL, "num_hidden_layers": 2, "num_experts": 48}
REAL_2["linear_attn_config"] = {**REAL["linear_attn_config"], "full_attn_layers": [2], "kda_layers": [1]}


@dataclass(frozen=True)
class Case:
    """One run. `options` are trainer options besides those that every case has."""

    name: str
    model: dict
    seq_length: int
    steps: int
    processes: int = 1
    options: dict = field(default_factory=dict)


WIDE = {**DEMO, "vocab_size": 16384, "hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32}
MIDDLE = {**DEMO, "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_experts": 16}
MIDDLE["linear_attn_config"] = {**DEMO["linear_attn_config"], "full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5]}
CASES = {
    # not among the runs that the planner's CPU constants were fitted to
    "cpu_check": (Case("middle model", MIDDLE, 1024, 25, processes=2), Case("middle, one rank", MIDDLE, 768, 25)),
    "cpu": (
        Case("demo model", DEMO, 2048, 40, processes=2),
        Case("demo model, short", DEMO, 512, 40, processes=2),
        Case("wide model", WIDE, 512, 8, processes=2),
        Case("wide model, experts frozen", WIDE, 512, 8, processes=2, options={"trainable": "no_experts"}),
    ),
    "h100": (
        Case("4 layers, 64K", REAL, 65536, 3),
        Case("4 layers, 64K, small tiles", REAL, 65536, 2, options={"segment_tokens": 16384, "token_tile": 16384}),
        Case("4 layers, 256K", REAL, 262144, 2),
        Case("4 layers, 512K, 2 heads", REAL, 524288, 2, options={"heads_per_group": 2, "token_tile": 32768}),
        Case("2 layers, 256K", REAL_2, 262144, 2),
        Case("2 layers, 512K, 40 GiB", REAL_2, 524288, 2, options={"gpu_memory_gib": 40}),
        Case("4 layers, 1M", REAL, 1048576, 2),
        Case("4 layers, 2M", REAL, 2097152, 1),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", choices=sorted(CASES), help="which set to run")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--out", help="JSON file for the raw records of --cases (written after every case)")
    parser.add_argument("--table", nargs="+", metavar="FILE.json", help="compare recorded runs with today's planner")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    records = []
    if arguments.table:
        records = [record for name in arguments.table for record in read_records(Path(name))]
    elif arguments.out and Path(arguments.out).exists():  # go on: cases that are run again are replaced
        records = json.loads(Path(arguments.out).read_text())["records"]
    for case in CASES[arguments.cases] if arguments.cases else ():
        if arguments.only and arguments.only not in case.name:
            continue
        records = [record for record in records if record["case"]["name"] != case.name]
        records.append(run_case(case))
        print(json.dumps(records[-1]["measured"]), flush=True)
        if arguments.out:
            text = json.dumps({"environment": environment(), "records": records}, indent=1)
            Path(arguments.out).write_text(text + "\n")
    print(table(records))
    return 0


def environment() -> dict:
    packages = ("torch", "transformers", "accelerate", "deepspeed", "fla-core", "flash-attn-4", "triton")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "versions": versions(packages),
        "gpus": found_gpus(),
        "cores": os.cpu_count(),
        "host_gib": memory_utils.host_memory() / GIB,
    }


# ---------------------------------------------------------------------------------------------- one run


def run_case(case: Case) -> dict:
    """Run the trainer on a case; returns {"case", "machine", "measured"}, or "failed" with the log's end in "measured"."""
    gpus = found_gpus()
    with tempfile.TemporaryDirectory(prefix="planner_") as folder:
        words = write_files(case, Path(folder))
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
        if not Path(launch[0]).exists():
            launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", f"{folder}/accelerate.yaml", "--num_processes", str(case.processes)]
        environ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        set_allocator(environ)
        start = time.perf_counter()
        with open(Path(folder) / "log", "w+") as log:
            run = subprocess.Popen(
                [*launch, "train_continual_2m.py", *words], stdout=log, stderr=subprocess.STDOUT, env=environ
            )
            highest: dict[int, dict] = {}
            while run.poll() is None:
                watch(folder, highest)
                time.sleep(0.2)
            log.seek(0)
            text = log.read()
        measured: dict = {"seconds_in_all": time.perf_counter() - start, "exit_code": run.returncode}
        if run.returncode == 0:
            steps = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
            measured |= {
                "step_seconds": statistics.median(s["seconds"] for s in steps[1:] or steps),
                "first_step_seconds": steps[0]["seconds"],
                "loss": [s["loss"] for s in steps],
                "host_bytes": sum(h["VmHWM"] for h in highest.values()),
                "ranks": sorted(highest.values(), key=lambda h: -h["VmHWM"]),
                "gpu_bytes": max(s["peak_gib"] for s in steps) * GIB if gpus else None,
                "log": [line for line in text.splitlines() if line.startswith(("engine", "step", "saved"))][-30:],
            }
        else:
            said = [line for line in text.splitlines() if "rror" in line]
            measured["log"] = [*text.splitlines()[-30:], *said[:1]]
    machine = {"num_gpus": case.processes, "gpu": gpus[0][0] if gpus else None}
    machine |= {"gpu_memory_gib": case.options.get("gpu_memory_gib", gpus[0][1] if gpus else None)}
    machine |= {"host_memory_gib": memory_utils.host_memory() / GIB}
    allocator = {name: environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in environ}
    return {"case": asdict(case), "machine": machine, "allocator": allocator, "measured": measured}


def options_of(case: Case, folder: Path) -> list[str]:
    """The trainer's command line for a case whose files lie in `folder`."""
    options = {
        "model_config": folder / "model.json",
        "data_dir": folder / "tokens",
        "output_dir": folder / "run",
        "deepspeed": folder / "deepspeed.json",
        "curriculum": f"0:{case.seq_length}",
        "num_train_steps": case.steps,
        "gradient_accumulation_steps": 1,
        "wandb_mode": "disabled",
        "save_total_limit": 1,
        "learning_rate": 3e-3 if case.seq_length < 65536 else 1e-5,
        "warmup_steps": 5,
        **case.options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--force"]


def write_files(case: Case, folder: Path) -> list[str]:
    """Model, DeepSpeed JSON and random tokens of a case; returns the trainer's options."""
    import numpy as np

    import data_loader

    vocabulary = case.model.get("vocab_size", ModelShape.vocab_size)
    (folder / "model.json").write_text(json.dumps(case.model))
    ds = read_json("deepspeed_config_h100.json" if found_gpus() else "demo/deepspeed.json")
    (folder / "deepspeed.json").write_text(json.dumps(ds))
    launch = Path("demo/accelerate.yaml").read_text().replace("demo/deepspeed.json", f"{folder}/deepspeed.json")
    (folder / "accelerate.yaml").write_text(launch)
    total = case.seq_length * case.steps * case.processes
    (folder / "tokens").mkdir()
    with data_loader.ShardWriter(folder / "tokens", "shard_00000") as writer:
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
        max_seq_length=case.seq_length,
        total_tokens=total,
        documents=1,
        shards=(shard,),
    )
    data_loader.write_file_durably(folder / "tokens/manifest.json", manifest.to_json())
    return options_of(case, folder)


def watch(folder: str, highest: dict[int, dict]) -> None:
    """Note the high-water mark of every rank's process: those that run the trainer on this folder's files."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            status = (process / "status").read_text()
        except OSError:  # it has ended
            continue
        if b"launch" in words or not any(folder.encode() in word for word in words):
            continue
        if not any(word.endswith(b"train_continual_2m.py") for word in words):
            continue
        values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if int(values["PPid"]) in highest:  # a rank's own child, between fork and exec: the same memory again
            continue
        sizes = {
            key: int(values[key].split()[0]) * 1024
            for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")
            if key in values
        }
        if sizes.get("VmHWM", 0) >= highest.get(int(process.name), {}).get("VmHWM", 0):
            highest[int(process.name)] = sizes


# ---------------------------------------------------------------------------------------------- predicted against measured


def read_records(path: Path) -> list[dict]:
    """The records of a file: this benchmark's own, or one per length of a run that bench_engine.py collected."""
    found = json.loads(path.read_text())
    if "records" in found:
        return found["records"]
    return engine_records(found, path.stem)


def engine_records(run: dict, name: str) -> list[dict]:
    """A run of bench_engine.py: its options stand in the log's first line, the card in its header; it has one rank.

    The last step of each length is taken. Its host memory was not measured.
    """
    import bench_engine

    words = re.search(r"train_continual_2m\.py (.*)", run["log"])[1]
    options = dict(re.findall(r"--(\w+) (?!--)(\S+)", words))
    kept = ("curriculum", "num_train_steps", "attention_outputs", "gpu_memory_gib", "trainable", "offload")
    kept += ("segment_tokens", "heads_per_group", "token_tile", "attention_backend")
    values = {key: options[key] for key in kept if key in options}
    card = re.search(r"hardware: \d+ x (.*?), host", run["log"])[1]
    ds = read_json("deepspeed_config_h100.json")
    ds["data_types"]["grad_accum_dtype"] = "bf16"
    for place in ("offload_optimizer", "offload_param"):
        ds["zero_optimization"][place]["pin_memory"] = False
    machine = {"num_gpus": 1, "gpu": card, "gpu_memory_gib": None, "host_memory_gib": 128}
    if "gpu_memory_gib" in values:
        machine["gpu_memory_gib"] = float(values["gpu_memory_gib"])
    last = {step["seq_length"]: step for step in run["steps"]}
    return [
        {
            "case": asdict(Case(f"{name}, {n:,}", run.get("model", bench_engine.MODEL), n, 1, options=values)),
            "machine": machine,
            "allocator": {},
            "deepspeed": ds,
            "measured": {
                "exit_code": 0,
                "gpu_bytes": step["peak_gib"] * GIB,
                "host_bytes": None,
                "step_seconds": step["seconds"],
            },
        }
        for n, step in last.items()
    ]


def predict(record: dict) -> memory_utils.StagePlan:
    """Today's plan for a recorded case."""
    values = {**record["case"]}
    case = Case(**values)
    on_gpu = record["machine"]["gpu"] is not None
    with tempfile.TemporaryDirectory() as folder:
        words = options_of(case, Path(folder))
        ds = "deepspeed_config_h100.json" if on_gpu else "demo/deepspeed.json"
        words[words.index("--deepspeed") + 1] = ds
        config = load_config(words)
    zero = ZeroSettings.from_json(record.get("deepspeed", read_json(ds)), bf16=config.bf16)
    shape = ModelShape.from_config_dict(case.model)
    plan = memory_utils.plan_run(config, shape, zero=zero, environ=record["allocator"], **record["machine"])
    return next(stage for stage in plan.stages if stage.seq_length == case.seq_length)


def table(records: list[dict]) -> str:
    """One line a case: predicted, measured and the difference, for GPU, host and step time."""
    head = f"{'case':<30}{'GPU GiB':>26}{'host GiB':>26}{'step s':>26}"
    lines = [head, f"{'':<30}" + f"{'predicted  measured':>26}" * 3]
    for record in records:
        stage, measured = predict(record), record["measured"]
        if measured["exit_code"] != 0:
            lines.append(f"{record['case']['name']:<30} failed: {measured['log'][-1]}")
            continue
        # the context is outside the allocator, whose reserve is what was measured
        gpu = stage.gpu_bytes - memory_utils.GPU_CONTEXT if stage.memory.gpu else None
        cells = [
            cell(gpu, measured["gpu_bytes"], GIB),
            cell(stage.host_bytes, measured["host_bytes"], GIB),
            cell(stage.step_seconds, measured["step_seconds"], 1),
        ]
        lines.append(f"{record['case']['name']:<30}" + "".join(f"{text:>26}" for text in cells))
    return "\n".join(lines)


def cell(predicted: float | None, measured: float | None, unit: float) -> str:
    if predicted is None or measured is None:
        return "n/a" if measured is None else f"n/a {measured / unit:9.2f}"
    return f"{predicted / unit:.2f} {measured / unit:9.2f} {predicted / measured - 1:+7.1%}"


if __name__ == "__main__":
    sys.exit(main())
