"""What host memory costs the engine: the same step with its long tensors on the GPU and in pinned host memory.

    python benchmarks/bench_offload.py --lengths 131072,262144 --repeat 2 --out benchmarks/results/offload_h100.json

Two MLA layers of the real shapes (32 heads, MoE of 16 experts), forward and backward without an optimizer, at lengths where
both placements fit one 80 GB card. Each placement is run once to compile and pin, then `--repeat` times, turn by turn; times
are wall seconds between synchronisations. Attention grows with the square of the length and traffic does not, so the shortest
length is the hardest case.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODEL = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "mlp_layer_types": ["sparse"] * 2,
    "num_local_experts": 16,
    "vocab_size": 32_768,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(offload: str):
    import torch
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    from kimi_model import install_long_sequence

    config = KimiLinearConfig(**MODEL)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = KimiLinearForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    # equal tiles, so that only the places differ
    install_long_sequence(model, segment_tokens=65536, heads_per_group=8, token_tile=65536, offload=offload)
    return model


def seconds(model, ids) -> float:
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="65536,131072,262144")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import torch

    models = {offload: build(offload) for offload in ("gpu", "host")}
    rows = []
    for tokens in map(int, arguments.lengths.split(",")):
        ids = torch.randint(10, MODEL["vocab_size"] - 2, (1, tokens), device="cuda")
        times: dict[str, list[float]] = {offload: [] for offload in models}
        first = {offload: seconds(model, ids) for offload, model in models.items()}
        for _ in range(arguments.repeat):
            for offload, model in models.items():
                times[offload].append(seconds(model, ids))
        medians = {offload: statistics.median(values) for offload, values in times.items()}
        slower = medians["host"] / medians["gpu"] - 1
        rows.append(
            {"tokens": tokens, "first": first, "seconds": times, "median": medians, "host is slower by": slower}
        )
        print(
            f"{tokens:>9,} tokens: GPU {medians['gpu']:.3f} s, host {medians['host']:.3f} s ({slower:+.2%})", flush=True
        )
        record = {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": MODEL,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
