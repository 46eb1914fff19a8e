"""Predicted against measured: GPU, host and step time of real trainer runs beside the plan of the same files.

    python benchmarks/bench_planner.py --cases cpu --out benchmarks/results/planner_cpu.json             # runs the trainer here
    python benchmarks/bench_planner.py --table benchmarks/results/engine_*_h100.json benchmarks/results/planner_cpu*.json

`--cases` runs small models on the CPU (`accelerate launch train_continual_2m.py`, ZeRO-3 with CPU offload, random tokens and
weights) and measures the highest resident memory of every rank's process, added up (/proc/PID/status, VmHWM).
`--table` runs nothing: it reads those records and the runs of bench_engine.py, every stage of which is a point: the allocator's
reserve and allocation at their highest, the process's highest resident memory (pinned memory counts in it), the seconds of
the stage's last step. Each is planned again with today's planner, so that a change of the planner is judged by runs that were
made before it; tile sizes are those that the run used, and a point whose other choices would be other ones today is marked.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench_engine  # noqa: E402
from portable_text import portable  # noqa: E402

import run_plan  # noqa: E402
from config import load_config, read_json  # noqa: E402
from hardware import found_gpus, host_memory  # noqa: E402
from model_shape import ModelShape  # noqa: E402
from run_log import git_commit, versions  # noqa: E402
from zero3_memory import ZeroSettings, set_allocator  # noqa: E402

GIB = 2**30
TODAYS_KERNEL = "its backward with our tile"  # the log of every run says which attention ran
DEMO_DEEPSPEED = "demo/deepspeed.json"
DEMO = json.loads((ROOT / "demo/model.json").read_text())


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
            Path(arguments.out).write_text(portable(text) + "\n")
    print(table([point_of(record) for record in records]))
    return 0


def environment() -> dict:
    packages = ("torch", "transformers", "accelerate", "deepspeed", "fla-core", "flash-attn-4", "triton")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "versions": versions(packages),
        "gpus": found_gpus(),
        "cores": os.cpu_count(),
        "host_gib": host_memory() / GIB,
    }


# ---------------------------------------------------------------------------------------------- one run


def run_case(case: Case) -> dict:
    """Run the trainer on a case; returns {"case", "machine", "measured"}, or "failed" with the log's end in "measured"."""
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
                "log": [line for line in text.splitlines() if line.startswith(("engine", "step", "saved"))][-30:],
            }
        else:
            said = [line for line in text.splitlines() if "rror" in line]
            measured["log"] = [*text.splitlines()[-30:], *said[:1]]
    machine = {"num_gpus": case.processes, "gpu": None, "gpu_memory_gib": None}
    machine |= {"host_memory_gib": host_memory() / GIB}
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
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        **case.options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--force"]


def write_files(case: Case, folder: Path) -> list[str]:
    """Model, DeepSpeed JSON and random tokens of a case; returns the trainer's options."""
    vocabulary = case.model.get("vocab_size", ModelShape.vocab_size)
    (folder / "model.json").write_text(json.dumps(case.model))
    (folder / "deepspeed.json").write_text(json.dumps(read_json(DEMO_DEEPSPEED)))
    launch = Path("demo/accelerate.yaml").read_text().replace(DEMO_DEEPSPEED, f"{folder}/deepspeed.json")
    (folder / "accelerate.yaml").write_text(launch)
    total = case.seq_length * case.steps * case.processes
    bench_engine.write_tokens(folder / "tokens", total, vocabulary, longest=case.seq_length)
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


@dataclass(frozen=True)
class Point:
    """One length of one run: what was measured beside today's plan for it. Bytes and seconds; None: not measured."""

    name: str
    source: str
    tokens: int
    tiles: str
    plan: run_plan.StagePlan
    gpu_reserved: float | None
    gpu_allocated: float | None
    host: float | None
    seconds: float | None
    steps: int
    failed: str | None


def read_records(path: Path) -> list[dict]:
    """The records of a file: this benchmark's own, or one per length of a run of bench_engine.py; none of other files."""
    found = json.loads(path.read_text())
    if "records" in found:
        return [{**record, "source": path.name} for record in found["records"]]
    return engine_records(found, path.name) if "steps" in found else []


def engine_records(run: dict, source: str) -> list[dict]:
    """A run of bench_engine.py: its options stand in the log's first line, the card in its header; it has one rank."""
    words = re.search(r"train_continual_2m\.py (.*)", run["log"])[1]
    options = dict(re.findall(r"--(\w+) (?!--)(\S+)", words))
    if options.get("engine") == "reference":  # the plain path is not what is planned
        return []
    kept = ("curriculum", "num_train_steps", "attention_outputs", "gpu_memory_gib", "trainable", "offload")
    kept += ("segment_tokens", "heads_per_group", "token_tile", "attention_backend")
    values = {key: options[key] for key in kept if key in options}
    text = run["stdout"] + run["log"]
    if used := re.search(
        r"engine: KDA segments of ([\d,]+) tokens, (\d+) MLA heads at a time, tiles of ([\d,]+)", text
    ):
        sizes = [int(number.replace(",", "")) for number in used.groups()]
        values |= dict(zip(("segment_tokens", "heads_per_group", "token_tile"), sizes, strict=True))
    machine = {
        "num_gpus": 1,
        "gpu": re.search(r"hardware: \d+ x (.*?), host", run["log"])[1],
        "gpu_memory_gib": float(values.get("gpu_memory_gib", 0)) or None,
        "host_memory_gib": 128.0,
    }
    model = run.get("model", bench_engine.MODEL)
    return [
        {
            "source": source,
            "case": {**asdict(Case(model_name(model), model, tokens, 1)), "options": values},
            "machine": machine,
            "allocator": {},
            "deepspeed": bench_engine_deepspeed(),
            "measured": measured_stage(run, text, tokens),
        }
        for tokens in dict.fromkeys(step["seq_length"] for step in run["steps"])
    ]


def measured_stage(run: dict, text: str, tokens: int) -> dict:
    """What a run measured at one length: peaks over its steps; the time of the last, unless its kernels are not today's."""
    steps = [step for step in run["steps"] if step["seq_length"] == tokens]
    phases = re.search(rf"at {tokens:,} tokens: .*\n  peaks per phase, GiB \(GPU allocated[^:]*: (.*)", text)
    allocated = [float(n) for n in re.findall(r"(?:^|; )\w+ ([\d.]+) /", phases[1])] if phases else []
    engine = re.findall(rf"^engine: ({tokens:,} tokens, .*); predicted", text, re.M)
    return {
        "exit_code": 0,
        "gpu_bytes": max(step["peak_gib"] for step in steps) * GIB,
        "gpu_allocated_bytes": max(allocated) * GIB if allocated else None,
        "host_bytes": max(step["process_gib"] for step in steps) * GIB,
        "step_seconds": steps[-1]["seconds"] if TODAYS_KERNEL in text else None,
        "steps": len(steps),
        "engine": engine[0] if engine else None,
    }


def bench_engine_deepspeed() -> dict:
    """The DeepSpeed JSON of bench_engine.prepare."""
    ds = read_json("deepspeed_config_h100.json")
    ds["data_types"]["grad_accum_dtype"] = "bf16"
    for place in ("offload_optimizer", "offload_param"):
        ds["zero_optimization"][place]["pin_memory"] = False
    return ds


def model_name(model: dict) -> str:
    shape = ModelShape.from_config_dict(model)
    layers = f"{shape.kda_layers} KDA + {len(shape.mla_layers)} MLA layers"
    return f"{layers}, {shape.num_experts} experts, {shape.total_parameters / 1e9:.1f} B"


def point_of(record: dict) -> Point:
    """A recorded case beside today's plan for it."""
    case, measured = Case(**record["case"]), record["measured"]
    on_gpu = record["machine"]["gpu"] is not None
    ds = "deepspeed_config_h100.json" if on_gpu else DEMO_DEEPSPEED
    with tempfile.TemporaryDirectory() as folder:
        words = options_of(case, Path(folder))
        words[words.index("--deepspeed") + 1] = ds
        config = load_config(words)
    zero = ZeroSettings.from_json(record.get("deepspeed", read_json(ds)), bf16=config.bf16)
    shape = ModelShape.from_config_dict(case.model)
    plan = run_plan.plan_run(config, shape, zero=zero, environ=record["allocator"], **record["machine"])
    at = [stage.seq_length for stage in plan.stages].index(case.seq_length)
    stage, step = plan.stages[at], engine_step(config, shape, zero, plan, case.seq_length)
    used = measured.get("engine")
    if (
        used and "layer inputs on the host" in used and step.stream == "gpu"
    ):  # today it would stay on the GPU: ask for what ran
        there = run_plan.plan_run(replace(config, offload="host"), shape, zero=zero, environ={}, **record["machine"])
        step = engine_step(config, shape, zero, there, case.seq_length)
        stage = run_plan.with_reserve([*plan.stages[:at], there.stages[at]], plan.machine.gpu_limit)[-1]
    tiles = f"{step.segment_tokens // 1024}K / {step.heads_per_group} / {step.token_tile // 1024}K" if on_gpu else ""
    return Point(
        name=case.name,
        source=record.get("source", ""),
        tokens=case.seq_length,
        tiles=tiles + (" (1)" if used and used != step.text.split("; predicted")[0] else ""),
        plan=stage,
        gpu_reserved=measured.get("gpu_bytes"),
        gpu_allocated=measured.get("gpu_allocated_bytes"),
        host=measured.get("host_bytes"),
        seconds=measured.get("step_seconds"),
        steps=measured.get("steps", case.steps),
        failed=measured["log"][-1] if measured["exit_code"] else None,
    )


def engine_step(config, shape: ModelShape, zero: ZeroSettings, plan: run_plan.Plan, tokens: int):
    return run_plan.engine_step(config, shape, zero, plan.machine, plan.engine, tokens)


def table(points: list[Point]) -> str:
    """Predicted / measured of every point as the README shows it, and the range of the differences."""
    head = (
        "model",
        "tokens",
        "segment / heads / tile",
        "GPU GiB, predicted / reserved (allocated)",
        "host GiB",
        "step s",
    )
    head += ("steps", "raw")
    lines = [_row(head), "|" + "---|" * len(head)]
    differences: dict[str, list[float]] = {"GPU": [], "host": [], "step": []}
    for p in points:
        if p.failed:
            lines.append(_row((p.name, f"{p.tokens:,}", p.tiles, f"failed: {p.failed}", "", "", "", p.source)))
            continue
        gpu = p.plan.gpu_reserve if p.plan.memory.gpu else None
        cells = []
        for what, predicted, measured, unit in (
            ("GPU", gpu, p.gpu_reserved, GIB),
            ("host", p.plan.host_bytes, p.host, GIB),
            ("step", p.plan.step_seconds, p.seconds, 1),
        ):
            cells.append(cell(predicted, measured, unit))
            if predicted is not None and measured is not None:
                differences[what].append(predicted / measured - 1)
        if p.gpu_allocated is not None:
            cells[0] += f" ({p.gpu_allocated / GIB:.1f})"
        if p.seconds is None:
            cells[2] += " (2)"
        lines.append(_row((p.name, f"{p.tokens:,}", p.tiles, *cells, str(p.steps), p.source)))
    if any(p.seconds is None and not p.failed for p in points):
        lines.append("\n(2) run with flash-attn-4's own backward: its time is not comparable with today's")
    if any("(1)" in p.tiles for p in points):
        lines.append("\n(1) the engine would place its buffers otherwise today; predicted is today's plan")
    ranges = [
        f"{what} {min(found):+.1%} to {max(found):+.1%} ({len(found)} points)"
        for what, found in differences.items()
        if found
    ]
    return "\n".join([*lines, f"\npredicted over measured: {', '.join(ranges)}"])


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def cell(predicted: float | None, measured: float | None, unit: float) -> str:
    """'predicted / measured (difference)'; a value that is not known is n/a."""
    if measured is None:
        return "n/a"
    digits = 1 if measured >= 10 * unit else 2
    if predicted is None:
        return f"n/a / {measured / unit:,.{digits}f}"
    return f"{predicted / unit:,.{digits}f} / {measured / unit:,.{digits}f}, {predicted / measured - 1:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
