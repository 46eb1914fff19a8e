"""Whole training steps through the trainer on one GPU: real layer shapes, 3 KDA + 1 MLA layers, 64 experts.

    python benchmarks/bench_engine.py prepare WORK --lengths 65536,262144,2097152     # model, tokens, DeepSpeed and launch files
    python benchmarks/bench_engine.py command WORK --gpu_memory_gib 72                # prints the trainer's command line
    python benchmarks/bench_engine.py collect WORK --out benchmarks/results/engine_2m.json

One optimizer step per length, shortest first; the first is run twice, since compiling falls into it. `collect` may be called
at any time: it takes what log.txt and metrics.jsonl hold so far. With --engine reference the same files run the plain path.

Host memory: the DeepSpeed JSON is the shipped one without pinned optimizer buffers and with bf16 accumulation (one micro-step
a step accumulates nothing), so that 2.4 B parameters with all their states fit 128 GiB beside a 2M sequence.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL = {
    "model_type": "kimi_linear",
    "num_hidden_layers": 4,
    "num_local_experts": 64,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
ENGINE_LINE = re.compile(
    r"engine: forward and backward (?P<seconds>[\d.]+) s; kernels' own seconds: (?P<kernels>.*?); sum (?P<sum>[\d.]+), "
    r"ratio (?P<ratio>[\d.]+); GPU peak (?P<reserved>[\d.]+) GiB reserved, (?P<allocated>[\d.]+) allocated; "
    r"host (?P<pinned>[\d.]+) GiB pinned"
)


def prepare(work: Path, lengths: list[int], model: dict) -> None:
    """Write everything a run needs into `work`."""
    import numpy as np

    import data_loader
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
    steps = [lengths[0], *lengths]
    total, vocabulary = sum(steps), model.get("vocab_size", 163_840)
    tokens_folder = work / "tokens"
    tokens_folder.mkdir(exist_ok=True)
    with data_loader.ShardWriter(tokens_folder, "shard_00000") as writer:
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
        max_seq_length=max(lengths),
        total_tokens=total,
        documents=1,
        shards=(shard,),
    )
    data_loader.write_file_durably(tokens_folder / "manifest.json", manifest.to_json())
    starts = [0, *range(2, len(lengths) + 1)]
    (work / "curriculum").write_text(",".join(f"{start}:{n}" for start, n in zip(starts, lengths, strict=True)))


def command(work: Path, extra: list[str]) -> list[str]:
    """The trainer's command line for a prepared folder; `extra` options win."""
    curriculum = (work / "curriculum").read_text()
    options = {
        "data_dir": work / "tokens",
        "output_dir": work / "out",
        "model_config": work / "model.json",
        "deepspeed": work / "deepspeed.json",
        "accelerate_config": work / "accelerate.yaml",
        "curriculum": curriculum,
        "num_train_steps": curriculum.count(":") + 1,
        "gradient_accumulation_steps": 1,
        "attention_outputs": "keep",
        "learning_rate": 1e-5,
        "warmup_steps": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script = str(ROOT / "train_continual_2m.py")
    return ["accelerate", "launch", "--config_file", str(work / "accelerate.yaml"), script, *words, "--force", *extra]


def collect(work: Path) -> dict:
    """The run so far: its log, its metrics, and the engine's first step of each length."""
    import model_shape  # noqa: F401  (fails here, not in the table, where the toolkit is not whole)

    log = (work / "out/log.txt").read_text() if (work / "out/log.txt").exists() else ""
    stdout = (work / "stdout.txt").read_text() if (work / "stdout.txt").exists() else ""
    metrics = work / "out/metrics.jsonl"
    firsts = []
    for match in ENGINE_LINE.finditer(stdout):
        parts = dict(part.rsplit(" ", 1) for part in match["kernels"].split(", "))
        numbers = {k: float(v) for k, v in match.groupdict().items() if k != "kernels"}
        firsts.append({**numbers, "kernels": {name: float(value) for name, value in parts.items()}})
    return {
        "steps": [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else [],
        "first_step_of_each_length": firsts,
        "log": log,
        "stdout": stdout,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("prepare", "command", "collect"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--lengths", default="65536,131072,262144,524288,1048576,2097152")
    parser.add_argument("--model", type=Path, help="a model JSON instead of the four real layers")
    parser.add_argument("--out", type=Path)
    arguments, extra = parser.parse_known_args()
    if arguments.action == "prepare":
        model = json.loads(arguments.model.read_text()) if arguments.model else MODEL
        prepare(arguments.work, [int(n) for n in arguments.lengths.split(",")], model)
    elif arguments.action == "command":
        print(" ".join(command(arguments.work, extra)))
    else:
        arguments.out.write_text(json.dumps(collect(arguments.work), indent=1))


if __name__ == "__main__":
    main()
