"""Memory, time and cost of a run before it starts, term by term, and what would make it fit.

    python memory_utils.py --config config_h100_2x.yaml                   # plan for the machine it runs on
    python memory_utils.py --config config_h100_2x.yaml --gpu h100 --gpus 2 --host_memory_gib 2048
    ... --suggest | --json | --plot memory.png | --budget_usd 5000 --gpu_hour_usd 2.5 | --budget_hours 72

The command only: run_plan.py makes the plan, plan_changes.py says what to change, plan_picture.py draws. No torch is
imported: the answer takes less than a second.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from config import HUB_MODEL, TrainConfig, UserError, load_config, read_json, read_yaml, run_main
from hardware import found_gpus
from model_shape import KIMI_LINEAR_48B, ModelShape
from plan_changes import budget_schedule, suggest
from plan_picture import draw
from run_plan import CPU_PARAMETERS, plan_run
from zero3_memory import set_allocator


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Memory, time and cost of a training run before it starts. Every option of train_continual_2m.py may "
        "follow too (--config, --trainable, --tokens_per_step, --gpu_memory_gib, --host_memory_gib, --gpu_hour_usd, ...).",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", help="card to plan for: h100, h200, a100, l20, ... (default: what is found here)")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: the Accelerate YAML's num_processes)")
    parser.add_argument("--machines", type=int, default=1, help="machines that the GPUs are in (default: 1)")
    parser.add_argument("--suggest", action="store_true", help="what to change to make it fit, cheapest first")
    parser.add_argument("--budget_usd", type=float, help="the schedule this much money buys (with --gpu_hour_usd)")
    parser.add_argument("--budget_hours", type=float, help="the schedule this many hours buy")
    parser.add_argument("--json", action="store_true", help="the plan as JSON, for machines")
    parser.add_argument("--plot", metavar="FILE.png", help="draw memory by term against sequence length")
    return parser


def main() -> int:
    arguments, rest = build_parser().parse_known_args()
    config = load_config(rest)
    shape = read_shape(config)

    set_allocator()  # as the trainer does, so that the same memory is planned

    # --- the machine: what is named, else what is here
    gpu, gpu_memory_gib, note = arguments.gpu, config.gpu_memory_gib, None
    here = found_gpus() if gpu is None else []
    if here:
        gpu, gpu_memory_gib = here[0][0], gpu_memory_gib or here[0][1]
    elif gpu is None and gpu_memory_gib is None:
        if shape.total_parameters > CPU_PARAMETERS:
            raise UserError("gpu: none is named and none is found here; add --gpu h100, l20, ... to plan for that card")
        note = "no GPU is named (--gpu h100) or found here: planned as processes on the CPU"
    processes = read_yaml(config.accelerate_config).get("num_processes") if config.accelerate_config else None
    machine = {
        "num_gpus": arguments.gpus or processes or max(1, len(here)),
        "num_machines": arguments.machines,
        "gpu": gpu,
        "gpu_memory_gib": gpu_memory_gib,
        "host_memory_gib": config.host_memory_gib,
    }
    if machine["num_gpus"] % arguments.machines:
        raise UserError(f"machines: {machine['num_gpus']} GPUs do not divide into {arguments.machines} equal machines")

    # --- the answer
    plan = plan_run(config, shape, dataset_tokens=dataset_tokens(config), **machine)
    print(plan.to_json() if arguments.json else "\n".join(([note] if note else []) + [plan.text()]))
    if arguments.suggest:
        print("\n".join(["suggestions:", *(f"  {line}" for line in suggest(config, shape, plan, **machine))]))
    if arguments.budget_usd is not None and config.gpu_hour_usd is None:
        raise UserError("budget_usd: needs the price of a GPU hour; add --gpu_hour_usd")
    if arguments.budget_usd is not None:
        print(budget_schedule(config, plan, hours=arguments.budget_usd / config.gpu_hour_usd / machine["num_gpus"]))
    if arguments.budget_hours is not None:
        print(budget_schedule(config, plan, hours=arguments.budget_hours))
    if arguments.plot:
        draw(config, shape, plan, arguments.plot, **machine)
    return 0


def read_shape(config: TrainConfig) -> ModelShape:
    """Shapes of the model that the config names, without loading it: a JSON, a local folder, or the released model."""
    local = Path(config.model_name_or_path) / "config.json"
    if config.model_config or local.is_file():
        return ModelShape.from_config_dict(read_json(config.model_config or str(local)))
    if config.model_name_or_path != HUB_MODEL:
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path!r} is no local folder with a config.json; only {HUB_MODEL} is "
            "known here by name"
        )
    return KIMI_LINEAR_48B


def dataset_tokens(config: TrainConfig) -> int | None:
    """Tokens of the tokenized data set, where it is there already."""
    with contextlib.suppress(UserError):
        return read_json(str(Path(config.data_dir) / "manifest.json")).get("total_tokens")
    return None


if __name__ == "__main__":
    run_main(main)
