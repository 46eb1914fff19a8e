"""Cards and how fast they are: datasheet peaks, measured kernel speeds, and the time of a step made of them.

    find_gpu("NVIDIA H100 80GB HBM3").bf16_flops          # 989.4e12
    sequence_seconds(shape, RATES["GH100"], ...)           # seconds per term of one sequence, forward and backward

Every figure has its source beside it: a datasheet, or a measurement on one H100 (benchmarks/results). A card without
measured kernels has no time. Speeds are FLOP/s, tokens/s or bytes/s. Symbols: T tokens of one sequence.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from model_shape import MATRIX_GROUP, ModelShape, forward_flops, is_trained


@dataclass(frozen=True)
class Gpu:
    """One card. `bf16_flops`: dense bf16 peak of the datasheet; `memory_gib`: what a program finds on it."""

    name: str
    bf16_flops: float
    memory_gib: float
    chip: str
    source: str


_DATASHEET = "NVIDIA datasheet: bf16 dense, memory in decimal GB"
_SEEN = "NVIDIA datasheet; memory as torch reports it"
# The words of `name` must all occur in what the driver calls the card; the entry with the most words wins.
GPUS = (
    Gpu("H100", 989.4e12, 79.1, "GH100", _SEEN),
    Gpu("H100 PCIE", 756e12, 74.5, "GH100", _DATASHEET),
    Gpu("H100 NVL", 835e12, 87.5, "GH100", _DATASHEET),
    Gpu("H200", 989.4e12, 139.8, "GH100", _SEEN),
    Gpu("H800", 989.4e12, 74.5, "GH100", _DATASHEET),
    Gpu("H20", 148e12, 89.4, "GH100", _DATASHEET),
    Gpu("B200", 2250e12, 167.6, "GB100", _DATASHEET),
    Gpu("A100", 312e12, 37.2, "GA100", _DATASHEET),
    Gpu("A100 80GB", 312e12, 74.5, "GA100", _DATASHEET),
    Gpu("A800", 312e12, 74.5, "GA100", _DATASHEET),
    Gpu("A10", 125e12, 22.3, "GA102", _DATASHEET),
    Gpu("A40", 149.7e12, 44.7, "GA102", _DATASHEET),
    Gpu("L4", 121e12, 22.3, "AD104", _DATASHEET),
    Gpu("L20", 119.5e12, 44.7, "AD102", _DATASHEET),
    Gpu("L40", 181e12, 44.7, "AD102", _DATASHEET),
    Gpu("L40S", 362e12, 44.7, "AD102", _DATASHEET),
)


def find_gpu(name: str | None) -> Gpu | None:
    """The table's entry for a driver's or a user's name of a card ('NVIDIA H100 80GB HBM3', 'l20'); None if unknown."""
    words = set(re.findall(r"[A-Z0-9]+", (name or "").upper()))
    if "MIG" in words:  # a slice of a card has neither its peak nor its memory
        return None
    matches = [gpu for gpu in GPUS if set(gpu.name.split()) <= words]
    return max(matches, key=lambda gpu: len(gpu.name.split()), default=None)


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the card's datasheet; None for a card that is not in the table."""
    gpu = find_gpu(gpu_name)
    return gpu.bf16_flops if gpu else None


# ---------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class KernelRates:
    """Measured speed of the engine's kernels on one chip, FLOP/s, tokens/s and bytes/s; `attention`: (T, forward, backward).

    A backward of attention counts 2.5 times its forward's FLOPs (the kernel computes q.k again), as these were counted.
    """

    peak: float
    attention: dict[str, tuple[tuple[int, float, float], ...]]
    kda_forward_tokens: float
    kda_backward_tokens: float
    matmul: float
    experts_forward: float
    experts_both: float
    head: float
    memory_bytes: float
    pcie_bytes: float
    pageable_bytes: float


# One H100 80GB HBM3, torch 2.11, fla-core 0.6.0, flash-attn-4 4.0.0b36; the table in DESIGN.md and benchmarks/results
RATES = {
    "GH100": KernelRates(
        peak=989.4e12,
        attention={
            # with our tile in the backward, in whole steps: benchmarks/results/engine_lengths_h100.json
            "flash4": ((131072, 733e12, 586e12), (524288, 705e12, 570e12), (2097152, 707e12, 572e12)),
            "cudnn": ((131072, 555e12, 479e12), (2097152, 572e12, 376e12)),
            "flash": ((131072, 243e12, 230e12),),
        },
        kda_forward_tokens=2097152 / 0.39,
        kda_backward_tokens=2097152 / 1.57,
        matmul=755e12,
        experts_forward=479e12,  # 64 experts, tiles of 65,536 tokens: benchmarks/results/engine_kernels_h100.json
        experts_both=601e12,
        head=656e12,
        memory_bytes=2.8e12,  # the cross-entropy kernel, benchmarks/results/engine_kernels_h100.json
        pcie_bytes=55e9,
        # what the terms above leave of forward and backward of four short steps, 64K three times and 128K, while 16 to 19 GB
        # of gradients go to the host: 9.5 to 10.9 (benchmarks/results/engine_lengths_h100.json, engine_tiles, engine_8layers)
        pageable_bytes=10e9,
    )
}

# Norms, gates, residuals, casts and copies of one layer's forward, recomputation and backward: how often a tensor of each
# width goes through the GPU's memory in bf16 (an fp32 one counts twice), counted over the operators of a traced step
# (benchmarks/trace_memory.py) but for the matmuls and the kernels whose rates are above; a fused norm is 2 passes forward
# and 3 backward, the gated one 3 and 5
KDA_PASSES = {"linear": 37, "hidden": 95}
MLA_PASSES = {"queries": 55, "hidden": 94}

# CPU Adam with its clipping and the copy to bf16, by memory traffic: 42 bytes a parameter, 2.35 B parameters in 0.85 to
# 1.07 s, 2.0 B in 0.74 to 0.81, on 16 cores of H100 machines (the same runs)
ADAM_BYTES_PER_S = 103e9


def attention_rates(rates: KernelRates, backend: str, tokens: int) -> tuple[float, float]:
    """(forward, backward) FLOP/s at this length: between measured lengths by log(T), beyond them the nearest one's."""
    points = rates.attention["flash4" if backend == "auto" else backend]
    if tokens <= points[0][0]:
        return points[0][1:]
    for (t0, f0, b0), (t1, f1, b1) in itertools.pairwise(points):
        if tokens <= t1:
            x = math.log(tokens / t0) / math.log(t1 / t0)
            return f0 + x * (f1 - f0), b0 + x * (b1 - b0)
    return points[-1][1:]


def sequence_seconds(
    shape: ModelShape, rates: KernelRates, *, tokens: int, trainable: str, backend: str, keep_attention: bool
) -> dict[str, float]:
    """Seconds per term of one sequence's forward and backward on a card with these rates.

    Every layer runs forward, again in backward (all but quadratic attention where its output is kept), and backward.
    """
    f = forward_flops(shape, tokens)
    backward = lambda group: 2 if is_trained(group, trainable) else 1  # noqa: E731
    forward_rate, backward_rate = attention_rates(rates, backend, tokens)
    # the rates were measured with 32 heads of 128 x 128
    kda = tokens * shape.kda_layers * shape.linear_num_heads * shape.linear_head_dim**2 / (32 * 128**2)
    experts = f["routed_experts"]
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.qk_head_dim
    passes = shape.kda_layers * (KDA_PASSES["linear"] * shape.linear_dim + KDA_PASSES["hidden"] * hidden)
    passes += len(shape.mla_layers) * (MLA_PASSES["queries"] * queries + MLA_PASSES["hidden"] * hidden)
    matmuls = {**MATRIX_GROUP, **{group: group for group in ("shared_experts", "dense_mlp", "router")}}
    return {
        "attention forward": f["attention"] * (1 if keep_attention else 2) / forward_rate,
        "attention backward": f["attention"] * 2.5 / backward_rate,
        "KDA recurrence": kda / rates.kda_forward_tokens + kda / rates.kda_backward_tokens,
        "routed experts": experts / rates.experts_forward
        + experts * (1 + backward("routed_experts")) / rates.experts_both,
        "other matrices": sum(f[term] * (2 + backward(group)) / rates.matmul for term, group in matmuls.items()),
        "norms, gates, copies": tokens * 2 * passes / rates.memory_bytes,
        "head and loss": 3 * f["head"] / rates.head,
    }


# ---------------------------------------------------------------------------------------------- what this machine has


def found_gpus() -> list[tuple[str, float]]:
    """(name, memory in GiB) of every GPU here, from the driver's nvidia-smi; empty where there is none."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in out.splitlines() if "," in line]
    return [(name.strip(), float(mib) / 1024) for name, mib in rows if mib.strip().isdigit()]


def host_memory() -> int:
    """Bytes of host memory this process may use: the machine's, or its container's limit."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    found = int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no control group, or 'max'
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found
