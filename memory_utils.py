"""Memory, time and cost of a run before it starts, term by term; and what it really used, phase by phase.

    python memory_utils.py --config config_h100_2x.yaml                   # plan for the machine it runs on
    python memory_utils.py --config config_h100_2x.yaml --gpu h100 --gpus 2 --host_memory_gib 1024
    ... --suggest | --json | --plot memory.png | --budget_usd 5000 --gpu_hour_usd 2.5 | --budget_hours 72

The pipeline: a model's numbers (`ModelShape`), the DeepSpeed JSON (`ZeroSettings`) and the training config give bytes per
term and stage (`gpu_terms`, `host_terms`), FLOPs (`model_flops_per_step`) and, where kernels were measured, seconds
(`step_seconds`); `plan_run` chooses the engine's tile sizes and gives the verdict; `suggest` says what would make it fit;
`PhaseProfiler` measures the same things in a real run.

What it does not do: no torch is imported for a prediction (the answer takes less than a second), nothing is guessed for
a card that is in no table here ("n/a"), and no network is used.

Units: bytes inside, GiB in what is printed, FLOPs as multiply + add = 2. Symbols: T tokens of one sequence, D hidden
size, H heads, K key and V value size of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import engine_plan
from config import TrainConfig, UserError, read_json
from run_log import human_count, human_time

GIB = 2**30

# ---------------------------------------------------------------------------------------------- hardware


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
    matches = [gpu for gpu in GPUS if set(gpu.name.split()) <= words]
    return max(matches, key=lambda gpu: len(gpu.name.split()), default=None)


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of the card's datasheet; None for a card that is not in the table."""
    gpu = find_gpu(gpu_name)
    return gpu.bf16_flops if gpu else None


# ---------------------------------------------------------------------------------------------- the model's numbers

GROUPS = (
    "embedding",
    "head",
    "kda",
    "mla",
    "dense_mlp",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of transformers' KimiLinearForCausalLM: its name, shape and group; `layer` is None outside layers."""

    name: str
    shape: tuple[int, ...]
    group: str
    layer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def own_fp32(self) -> bool:
        """A_log and dt_bias: the trainer takes them out of ZeRO and keeps them in fp32 (kimi_model.py)."""
        return self.name.endswith((".A_log", ".dt_bias"))

    def trained(self, trainable: str) -> bool:
        """Whether `--trainable` leaves this parameter trained (the same rule as kimi_model.set_trainable)."""
        if trainable == "no_experts":
            return self.group != "routed_experts"
        if trainable == "attention":
            return self.group in ("kda", "mla")
        return True


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one Kimi-Linear model; the defaults are transformers' own. Layers are counted from 0."""

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216
    moe_intermediate_size: int = 1024
    num_attention_heads: int = 32
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    attention_bias: bool = False
    linear_num_heads: int = 32
    linear_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 256
    experts_per_token: int = 8
    num_shared_experts: int = 1
    tie_word_embeddings: bool = False
    mla_layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24)
    dense_layers: tuple[int, ...] = (0,)
    num_layers: int = 27

    @classmethod
    def from_config_dict(cls, d: dict) -> ModelShape:
        """From the config.json that transformers writes or from the Hub's own (layers there are counted from 1).

        Keys that are missing take transformers' defaults. Raises KeyError for a layer number beyond the model.
        """
        linear = d.get("linear_attn_config") or {}
        first = lambda *names, default: next((d[n] for n in names if d.get(n) is not None), default)  # noqa: E731
        layers = d.get("num_hidden_layers", cls.num_layers)
        if d.get("layer_types"):
            mla = [i for i, kind in enumerate(d["layer_types"]) if kind == "full_attention"]
        elif "full_attn_layers" in linear:
            mla = [layer - 1 for layer in linear["full_attn_layers"]]
        else:
            mla = [i for i in range(layers) if i and i % 4 == 0]
        if d.get("mlp_layer_types"):
            dense = [i for i, kind in enumerate(d["mlp_layer_types"]) if kind == "dense"]
        else:
            dense = list(range(min(layers, d.get("first_k_dense_replace", 1))))
        if mla and max(mla) >= layers:
            raise KeyError(f"full_attn_layers names layer {max(mla) + 1} of a model with {layers} layers")
        same_name = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank attention_bias tie_word_embeddings"
        )
        return cls(
            **{name: first(name, default=getattr(cls, name)) for name in same_name.split()},
            linear_num_heads=linear.get("num_heads", first("linear_num_heads", default=cls.linear_num_heads)),
            linear_head_dim=linear.get("head_dim", first("linear_head_dim", default=cls.linear_head_dim)),
            linear_conv_kernel_dim=linear.get(
                "short_conv_kernel_size", first("linear_conv_kernel_dim", default=cls.linear_conv_kernel_dim)
            ),
            num_experts=first("num_local_experts", "num_experts", default=cls.num_experts),
            experts_per_token=first("num_experts_per_tok", "num_experts_per_token", default=cls.experts_per_token),
            num_shared_experts=first("n_shared_experts", "num_shared_experts", default=cls.num_shared_experts),
            mla_layers=tuple(sorted(mla)),
            dense_layers=tuple(sorted(dense)),
            num_layers=layers,
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def linear_dim(self) -> int:
        """Width of q, k, v and o in a KDA layer, all heads."""
        return self.linear_num_heads * self.linear_head_dim

    @property
    def kda_layers(self) -> int:
        return self.num_layers - len(self.mla_layers)

    @property
    def moe_layers(self) -> int:
        return self.num_layers - len(self.dense_layers)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, in the order of the model's own `named_parameters()`."""
        found = [Parameter("model.embed_tokens.weight", (self.vocab_size, self.hidden_size), "embedding")]
        for layer in range(self.num_layers):
            attention = self._mla_parameters() if layer in self.mla_layers else self._kda_parameters()
            group = "mla" if layer in self.mla_layers else "kda"
            rows = [(f"self_attn.{name}", shape, group) for name, shape in attention]
            rows += self._mlp_parameters(dense=layer in self.dense_layers)
            rows += [(f"{name}.weight", (self.hidden_size,), "norms") for name in _LAYER_NORMS]
            found += [Parameter(f"model.layers.{layer}.{name}", shape, group, layer) for name, shape, group in rows]
        found.append(Parameter("model.norm.weight", (self.hidden_size,), "norms"))
        if not self.tie_word_embeddings:
            found.append(Parameter("lm_head.weight", (self.vocab_size, self.hidden_size), "head"))
        return tuple(found)

    def _kda_parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        d, width, head, heads = self.hidden_size, self.linear_dim, self.linear_head_dim, self.linear_num_heads
        return [
            ("q_proj.weight", (width, d)),
            ("k_proj.weight", (width, d)),
            ("v_proj.weight", (width, d)),
            ("conv1d.weight", (3 * width, 1, self.linear_conv_kernel_dim)),
            ("forget_gate.dt_bias", (width,)),
            ("forget_gate.A_log", (1, 1, heads, 1)),
            ("forget_gate.f_a_proj.weight", (head, d)),
            ("forget_gate.f_b_proj.weight", (width, head)),
            ("b_proj.weight", (heads, d)),
            ("g_a_proj.weight", (head, d)),
            ("g_b_proj.weight", (width, head)),
            ("o_norm.weight", (head,)),
            ("o_proj.weight", (d, width)),
        ]

    def _mla_parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        bias = lambda name, size: [(f"{name}.bias", (size,))] if self.attention_bias else []  # noqa: E731
        if self.q_lora_rank is None:
            query = [("q_proj.weight", (heads * self.qk_head_dim, d))]
        else:
            query = [
                ("q_a_proj.weight", (self.q_lora_rank, d)),
                *bias("q_a_proj", self.q_lora_rank),
                ("q_a_layernorm.weight", (self.q_lora_rank,)),
                ("q_b_proj.weight", (heads * self.qk_head_dim, self.q_lora_rank)),
            ]
        return [
            *query,
            ("kv_a_proj_with_mqa.weight", (rank + self.qk_rope_head_dim, d)),
            *bias("kv_a_proj_with_mqa", rank + self.qk_rope_head_dim),
            ("kv_a_layernorm.weight", (rank,)),
            ("kv_b_proj.weight", (heads * (self.qk_nope_head_dim + self.v_head_dim), rank)),
            ("o_proj.weight", (d, heads * self.v_head_dim)),
            *bias("o_proj", d),
        ]

    def _mlp_parameters(self, *, dense: bool) -> list[tuple[str, tuple[int, ...], str]]:
        d = self.hidden_size

        def swiglu(prefix: str, width: int, group: str):
            return [
                (f"{prefix}.gate_proj.weight", (width, d), group),
                (f"{prefix}.up_proj.weight", (width, d), group),
                (f"{prefix}.down_proj.weight", (d, width), group),
            ]

        if dense:
            return swiglu("mlp", self.intermediate_size, "dense_mlp")
        experts, width = self.num_experts, self.moe_intermediate_size
        return [
            ("mlp.experts.gate_up_proj", (experts, 2 * width, d), "routed_experts"),
            ("mlp.experts.down_proj", (experts, d, width), "routed_experts"),
            ("mlp.gate.weight", (experts, d), "router"),
            *swiglu("mlp.shared_experts", width * self.num_shared_experts, "shared_experts"),
        ]

    @cached_property
    def parameter_counts(self) -> dict[str, int]:
        """Parameters per group of GROUPS."""
        counts = dict.fromkeys(GROUPS, 0)
        for parameter in self.parameters:
            counts[parameter.group] += parameter.numel
        return counts

    @cached_property
    def total_parameters(self) -> int:
        return sum(self.parameter_counts.values())

    def trained_parameters(self, trainable: str) -> int:
        return sum(p.numel for p in self.parameters if p.trained(trainable))


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")

# the released model: its config.json names the MLA layers 4,8,12,16,20,24,27, counted from 1
KIMI_LINEAR_48B = ModelShape(mla_layers=(3, 7, 11, 15, 19, 23, 26))

# ---------------------------------------------------------------------------------------------- arithmetic


def forward_flops(shape: ModelShape, seq_length: int) -> dict[str, float]:
    """Forward FLOPs of one sequence of T tokens per term; a weight used by a token costs 2, whatever computes it.

    attention       layers x T^2 x H x (K + V): q.k and p.v over the causal half, 2 x T^2/2 x H x (K + V). At T = 2,097,152
                    one layer of the released model is T^2 x 32 x 320 = 4.5e16.
    kda_recurrence  layers x T x H x 6KV: what one token does to a head's K x V state (predict, correct, read), 2KV each.
    routed_experts  T x experts per token x one expert's weights; the rest: 2 x T x the group's matrices.
    """
    tokens = float(seq_length)
    weights = dict.fromkeys(GROUPS, 0)
    for p in shape.parameters:
        if len(p.shape) > 1 and not p.own_fp32:
            weights[p.group] += p.numel
    if shape.tie_word_embeddings:
        weights["head"] = weights["embedding"]
    weights["routed_experts"] = weights["routed_experts"] * shape.experts_per_token // max(1, shape.num_experts)
    heads, k, v = shape.num_attention_heads, shape.qk_head_dim, shape.v_head_dim
    kda_state = shape.linear_num_heads * shape.linear_head_dim**2
    return {
        "attention": len(shape.mla_layers) * tokens**2 * heads * (k + v),
        "kda_recurrence": shape.kda_layers * tokens * 6 * kda_state,
        "kda_projections": 2 * tokens * weights["kda"],
        "mla_projections": 2 * tokens * weights["mla"],
        "routed_experts": 2 * tokens * weights["routed_experts"],
        "shared_experts": 2 * tokens * weights["shared_experts"],
        "router": 2 * tokens * weights["router"],
        "dense_mlp": 2 * tokens * weights["dense_mlp"],
        "head": 2 * tokens * weights["head"],
    }


_WEIGHT_GROUP = {"kda_projections": "kda", "mla_projections": "mla"}


def model_flops_per_step(
    shape: ModelShape, seq_length: int, sequences: int, *, trainable: str = "all"
) -> dict[str, float]:
    """FLOPs per term of forward and backward over `sequences` sequences; what is recomputed is not counted.

    Backward is twice the forward (gradients of inputs and of weights); for frozen matrices once (inputs only).
    """
    totals = {}
    for term, forward in forward_flops(shape, seq_length).items():
        group = _WEIGHT_GROUP.get(term, term)
        frozen = group in GROUPS and not Parameter("", (), group).trained(trainable)
        totals[term] = sequences * forward * (2 if frozen else 3)
    return totals


# ---------------------------------------------------------------------------------------------- ZeRO-3: where the states lie


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed JSON decides memory. Bucket sizes in elements, as DeepSpeed has them."""

    weights_device: str = "cpu"
    states_device: str = "cpu"
    pin_weights: bool = True
    pin_states: bool = True
    weight_bytes: int = 2
    master_bytes: int = 4
    moment_bytes: int = 4
    accumulation_bytes: int = 4
    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    persistence_threshold: int = 100_000

    @classmethod
    def from_json(cls, ds: dict, *, bf16: bool) -> ZeroSettings:
        """From the DeepSpeed JSON; defaults are DeepSpeed 0.19's own (runtime/zero/config.py)."""
        zero = ds.get("zero_optimization") or {}
        weights, states = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}
        precision = ds.get("bf16") or {}
        element = 2 if bf16 else 4
        accumulation = (ds.get("data_types") or {}).get("grad_accum_dtype")
        return cls(
            weights_device=weights.get("device", "none"),
            states_device=states.get("device", "none"),
            pin_weights=weights.get("pin_memory", True),
            pin_states=states.get("pin_memory", True),
            weight_bytes=element,
            master_bytes=2 if precision.get("bf16_master_weights_and_grads") else 4,
            moment_bytes=2 if precision.get("bf16_optimizer_states") else 4,
            accumulation_bytes={"fp32": 4, "fp16": 2, "bf16": 2}.get(accumulation, element),
            reduce_bucket_size=int(zero.get("reduce_bucket_size", cls.reduce_bucket_size)),
            sub_group_size=int(zero.get("sub_group_size", cls.sub_group_size)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", cls.persistence_threshold)),
        )


class PinnedPool:
    """torch's caching host allocator: sizes go up to the next power of two, freed blocks wait for an equal size.

    `round_limit`: blocks above it are neither rounded nor kept (PYTORCH_ALLOC_CONF's pinned_max_round_threshold_mb and
    pinned_max_cached_size_mb, set alike); None is torch's default, no limit. Source: ATen/core/CachingHostAllocator.h.
    """

    def __init__(self, round_limit: int | None = None):
        self.round_limit, self.owned, self.asked = round_limit, 0, 0
        self._free: Counter[int] = Counter()

    def _size(self, asked: int) -> int:
        if self.round_limit is not None and asked > self.round_limit:
            return asked
        return 1 << (asked - 1).bit_length() if asked else 0

    def allocate(self, asked: int) -> int:
        """Bytes asked for, after taking a block of their size class."""
        size = self._size(asked)
        if self._free[size]:
            self._free[size] -= 1
        else:
            self.owned += size
        self.asked += asked
        return asked

    def free(self, asked: int) -> None:
        self.asked -= asked
        size = self._size(asked)
        if self.round_limit is not None and asked > self.round_limit:
            self.owned -= size
        else:
            self._free[size] += 1


@dataclass
class Memory:
    """Bytes by place and term: `gpu` of one GPU; `pinned`, `pageable` (process memory) and `disk` of the whole host."""

    gpu: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    pageable: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, term: str, size: int) -> None:
        if size:
            terms = getattr(self, place)
            terms[term] = terms.get(term, 0) + int(size)


def zero_memory(
    shape: ModelShape, zero: ZeroSettings, *, trainable: str, ranks: int, pool: PinnedPool | None
) -> Memory:
    """What DeepSpeed ZeRO-3 holds between steps, as its code allocates it (0.19.8, runtime/zero/stage3.py), in its order:

    1. every parameter's partition, ceil(numel / ranks) elements, one block each (zero.Init)
    2. one flat block per optimizer group for the trained ones (matrices, vectors); the blocks of 1. are freed
    3. fp32 master per sub-group (pageable), 4. fp32 gradient per sub-group (pinned)
    5. one flat block that gradients are accumulated in over micro-steps (pinned; grad_accum_dtype)
    6. CPU Adam's two moments, at the first step (pageable)
    `pool` is one rank's pinned allocator, None where nothing can be pinned (a CPU run). Adds up all ranks of the host.
    """
    memory = Memory()
    owned = [p for p in shape.parameters if not p.own_fp32]
    part = {p.name: -(-p.numel // ranks) for p in owned}
    groups = [
        [p for p in owned if p.trained(trainable) and (len(p.shape) > 1) == matrices] for matrices in (True, False)
    ]
    trained = [part[p.name] for group in groups for p in group]
    frozen = [part[p.name] for p in owned if not p.trained(trainable)]

    def hold(device: str, pinned: bool, term: str, blocks: list[int]) -> None:
        place = {"none": "gpu", "nvme": "disk"}.get(device, "pinned" if pinned and pool else "pageable")
        if place == "pinned":
            for block in blocks:
                pool.allocate(block)
        memory.add(place, term, sum(blocks) * (1 if place == "gpu" else ranks))

    w, weights_at = zero.weight_bytes, (zero.weights_device, zero.pin_weights)
    on_host = pool is not None and zero.weights_device == "cpu" and zero.pin_weights
    if on_host:
        for elements in trained:
            pool.allocate(w * elements)
    hold(*weights_at, "weights, frozen", [w * elements for elements in frozen])
    hold(*weights_at, "weights, trained", [w * sum(part[p.name] for p in group) for group in groups])
    if on_host:
        for elements in trained:
            pool.free(w * elements)
    sub_groups = [n for group in groups for n in _sub_groups([part[p.name] for p in group], zero.sub_group_size)]
    states = zero.states_device
    hold(states, False, "master weights", [zero.master_bytes * n for n in sub_groups])
    hold(states, zero.pin_states, "gradients for Adam", [zero.master_bytes * n for n in sub_groups])
    accumulator = states if states != "nvme" else "cpu"
    hold(accumulator, zero.pin_states, "gradient accumulation", [zero.accumulation_bytes * sum(trained)])
    hold(states, False, "Adam moments", [2 * zero.moment_bytes * n for n in sub_groups])

    memory.add("gpu", "ZeRO reduce bucket", w * zero.reduce_bucket_size)
    small = sum(p.numel for p in owned if p.numel <= zero.persistence_threshold)
    memory.add("gpu", "small parameters kept whole", w * small)
    # value, gradient and two moments, on every rank
    memory.add("gpu", "fp32 decay parameters", 16 * sum(p.numel for p in shape.parameters if p.own_fp32))
    return memory


def _sub_groups(partitions: list[int], limit: int) -> list[int]:
    """Elements per ZeRO sub-group: parameters are added until the limit is reached or passed."""
    if not partitions:
        return []
    if limit >= sum(partitions):
        return [sum(partitions)]
    groups, current = [], 0
    for elements in partitions:
        current += elements
        if current >= limit:
            groups.append(current)
            current = 0
    return [*groups, current] if current else groups


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
    pcie_bytes: float


# One H100 80GB HBM3, torch 2.11, fla-core 0.6.0, flash-attn-4 4.0.0b36; the table in DESIGN.md and benchmarks/results
RATES = {
    "GH100": KernelRates(
        peak=989.4e12,
        attention={
            "flash4": ((131072, 820e12, 500e12), (524288, 725e12, 495e12), (2097152, 718e12, 486e12)),
            "cudnn": ((131072, 555e12, 479e12), (2097152, 572e12, 376e12)),
            "flash": ((131072, 243e12, 230e12),),
        },
        kda_forward_tokens=2097152 / 0.39,
        kda_backward_tokens=2097152 / 1.57,
        matmul=755e12,
        experts_forward=183e12,
        experts_both=205e12,
        head=133e12,
        pcie_bytes=55e9,
    )
}
# CPU Adam reads weight, gradient and moments and writes weight, moments and the bf16 copy. The host's bandwidth is an
# assumption (a common two-socket server sustains more); at 2M tokens the term is 1 % of a step.
HOST_BYTES_PER_S = 100e9


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
    backward = lambda group: 2 if Parameter("", (), group).trained(trainable) else 1  # noqa: E731
    forward_rate, backward_rate = attention_rates(rates, backend, tokens)
    # the rates were measured with 32 heads of 128 x 128
    kda = tokens * shape.kda_layers * shape.linear_num_heads * shape.linear_head_dim**2 / (32 * 128**2)
    experts = f["routed_experts"]
    matmuls = {**_WEIGHT_GROUP, **{group: group for group in ("shared_experts", "dense_mlp", "router")}}
    return {
        "attention forward": f["attention"] * (1 if keep_attention else 2) / forward_rate,
        "attention backward": f["attention"] * 2.5 / backward_rate,
        "KDA recurrence": kda / rates.kda_forward_tokens + kda / rates.kda_backward_tokens,
        "routed experts": experts / rates.experts_forward
        + experts * (1 + backward("routed_experts")) / rates.experts_both,
        "other matrices": sum(f[term] * (2 + backward(group)) / rates.matmul for term, group in matmuls.items()),
        "head and loss": 3 * f["head"] / rates.head,
    }


def step_seconds(
    shape: ModelShape,
    zero: ZeroSettings,
    gpu: Gpu | None,
    *,
    tokens: int,
    micro_steps: int,
    batch: int,
    ranks: int,
    trainable: str,
    backend: str,
    keep_attention: bool,
) -> dict[str, float] | None:
    """Seconds per term of one optimizer step; None where no kernel was measured on this chip: never a guess.

    Another card of a measured chip is scaled by the datasheets' peaks.
    """
    rates = RATES.get(gpu.chip) if gpu else None
    if rates is None or backend not in ("auto", *rates.attention):
        return None
    sequence = sequence_seconds(
        shape, rates, tokens=tokens, trainable=trainable, backend=backend, keep_attention=keep_attention
    )
    times = micro_steps * batch * rates.peak / gpu.bf16_flops
    seconds = {term: value * times for term, value in sequence.items()}
    owned, trained = shape.total_parameters, shape.trained_parameters(trainable)
    # whole weights reach each GPU twice a micro-step; a rank's gradients are added up in host memory: read, written back
    traffic = 2 * zero.weight_bytes * owned + 2 * zero.accumulation_bytes * trained / ranks
    seconds["ZeRO-3 traffic"] = micro_steps * traffic / rates.pcie_bytes
    adam = 3 * zero.master_bytes + 4 * zero.moment_bytes + zero.weight_bytes
    seconds["CPU Adam"] = trained * adam / HOST_BYTES_PER_S
    return seconds


# ---------------------------------------------------------------------------------------------- the plan

# Outside torch's allocator: CUDA context, kernels' code, NCCL's buffers
GPU_CONTEXT = int(1.5 * GIB)
# One process with torch, transformers and DeepSpeed (and CUDA's libraries) loaded, before the model
PROCESS_BASE = {"gpu": int(4.0 * GIB), "cpu": int(0.75 * GIB)}
# Of the host's memory, left to the operating system and the page cache, which serves the token shards
HOST_RESERVE = 0.03
# The goal is 100 to 150 B tokens: a schedule of more is taken for a slip
INTENDED_TOKENS = 150e9
# For PYTORCH_ALLOC_CONF. Without the pinned_* settings every pinned block is rounded up to a power of two and freed ones
# are kept: near 350 GiB lost when all parameters are trained. torch >= 2.13.
ALLOCATOR_SETTINGS = "expandable_segments:True,pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"


@dataclass(frozen=True)
class Machine:
    """What the run has. `gpu`: the card's name or None; `gpu_limit`: bytes of one card, None for CPU processes."""

    num_gpus: int
    gpu: str | None
    gpu_limit: int | None
    host_limit: int
    pinned_round_limit: int | None

    @property
    def usable_host(self) -> int:
        return int(self.host_limit * (1 - HOST_RESERVE))


@dataclass(frozen=True)
class EngineChoice:
    """What the trainer tells the engine, for every stage: options of long_sequence.py, and its share of the card."""

    segment_tokens: int
    heads_per_group: int
    token_tile: int
    offload: str
    attention_outputs: str
    gpu_budget_gib: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage of the curriculum. Memory per term: `gpu` of one card at its fullest, the others of the whole host."""

    seq_length: int
    steps: int
    micro_steps: int
    tokens_per_step: int
    gpu_phase: str
    memory: Memory
    flops: dict[str, float]
    seconds: dict[str, float] | None
    mfu: float | None

    @property
    def gpu_bytes(self) -> int:
        return sum(self.memory.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.memory.pinned.values()) + sum(self.memory.pageable.values())

    @property
    def step_seconds(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None

    def fullness(self, machine: Machine) -> float:
        """Use over limit, of GPU or host, whichever is worse; up to 1.0 fits."""
        gpu = self.gpu_bytes / machine.gpu_limit if machine.gpu_limit else 0.0
        return max(gpu, self.host_bytes / machine.usable_host)


@dataclass(frozen=True)
class Plan:
    """A run before it starts. `fits` and `verdict` judge it; `engine` is what the trainer tells the engine."""

    stages: tuple[StagePlan, ...]
    engine: EngineChoice
    shape: ModelShape
    machine: Machine
    trainable: str
    gpu_hour_usd: float | None
    warnings: tuple[str, ...]

    @property
    def worst(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.fullness(self.machine))

    @property
    def fits(self) -> bool:
        return self.worst.fullness(self.machine) <= 1.0

    @property
    def total_tokens(self) -> int:
        return sum(stage.steps * stage.tokens_per_step for stage in self.stages)

    @property
    def total_seconds(self) -> float | None:
        """Seconds of the whole schedule; None where no speed is known."""
        if any(stage.seconds is None for stage in self.stages):
            return None
        return sum(stage.steps * stage.step_seconds for stage in self.stages)

    @property
    def cost_usd(self) -> float | None:
        if self.gpu_hour_usd is None or self.total_seconds is None:
            return None
        return self.total_seconds / 3600 * self.machine.num_gpus * self.gpu_hour_usd

    @property
    def verdict(self) -> str:
        """One sentence: does it fit, and which term binds."""
        stage, parts, short = self.worst, [], []
        for what, terms, limit in (
            ("GPU", stage.memory.gpu, self.machine.gpu_limit),
            ("host", {**stage.memory.pinned, **stage.memory.pageable}, self.machine.usable_host),
        ):
            used = sum(terms.values())
            if limit and used:
                largest = max(terms, key=terms.get)
                parts.append(
                    f"{what} {used / GIB:,.1f} of {limit / GIB:,.1f} GiB (largest: {largest}, {terms[largest] / GIB:,.1f})"
                )
                short += [what] * (used > limit)
        if self.fits:
            return f"fits; fullest at {stage.seq_length:,} tokens: {', '.join(parts)}"
        return f"does not fit: {' and '.join(short)} memory is short at {stage.seq_length:,} tokens: {', '.join(parts)}"

    def text(self) -> str:
        """The table for people, the warnings and the verdict."""
        return plan_text(self)

    def to_json(self) -> str:
        """Everything in the table, in bytes, seconds and FLOPs."""
        whole = ("fits", "verdict", "total_tokens", "total_seconds", "cost_usd", "trainable", "warnings")
        stages = [
            {**dataclasses.asdict(s), **{n: getattr(s, n) for n in ("gpu_bytes", "host_bytes", "step_seconds")}}
            for s in self.stages
        ]
        return json.dumps(
            {
                **{name: getattr(self, name) for name in whole},
                "machine": dataclasses.asdict(self.machine),
                "parameters": {"total": self.shape.total_parameters, **self.shape.parameter_counts},
                "engine": dataclasses.asdict(self.engine),
                "stages": stages,
            },
            indent=1,
        )


def plan_run(
    config: TrainConfig,
    shape: ModelShape,
    *,
    num_gpus: int,
    gpu: str | None,
    gpu_memory_gib: float | None,
    host_memory_gib: float | None,
    dataset_tokens: int | None = None,
    zero: ZeroSettings | None = None,
    environ=os.environ,
) -> Plan:
    """Plan `config` on one machine. With neither `gpu` nor `gpu_memory_gib`: processes on the CPU.

    `host_memory_gib` None: what this machine has. `zero` None: from the config's DeepSpeed JSON (DeepSpeed's defaults
    where it names none). Raises UserError where the card's memory is neither given nor in the table.
    """
    zero = zero or read_zero(config)
    if gpu is not None and gpu_memory_gib is None:
        if find_gpu(gpu) is None:
            raise UserError(f"gpu: {gpu!r} is in no table here; give its memory with --gpu_memory_gib")
        gpu_memory_gib = find_gpu(gpu).memory_gib
    machine = Machine(
        num_gpus=num_gpus,
        gpu=gpu,
        gpu_limit=int(gpu_memory_gib * GIB) if gpu_memory_gib else None,
        host_limit=int(host_memory_gib * GIB) if host_memory_gib else host_memory(),
        pinned_round_limit=pinned_round_limit(environ),
    )
    ends = [stage.start_step for stage in config.stages[1:]] + [config.num_train_steps]
    lengths = [
        (stage.seq_length, min(end, config.num_train_steps) - stage.start_step)
        for stage, end in zip(config.stages, ends, strict=True)
    ]
    lengths = [(length, steps) for length, steps in lengths if steps > 0]
    engine = choose_engine(config, shape, zero, machine, max(length for length, _ in lengths))
    stages = tuple(plan_stage(config, shape, zero, machine, engine, *stage) for stage in lengths)
    plan = Plan(stages, engine, shape, machine, config.trainable, config.gpu_hour_usd, ())
    return dataclasses.replace(plan, warnings=tuple(schedule_warnings(config, plan, dataset_tokens)))


def choose_engine(
    config: TrainConfig, shape: ModelShape, zero: ZeroSettings, machine: Machine, seq_length: int
) -> EngineChoice:
    """Tile sizes and what is kept, by the engine's own rule, with the longest sequences in mind.

    Attention outputs are recomputed only where that is what makes the host's memory suffice.
    """
    budget = (machine.gpu_limit - GPU_CONTEXT) / GIB if machine.gpu_limit else None
    keeps = ("keep", "recompute") if config.attention_outputs == "auto" else (config.attention_outputs,)
    for keep in keeps:
        open_choice = EngineChoice(
            config.segment_tokens, config.heads_per_group, config.token_tile, config.offload, keep, budget
        )
        found = engine_step(config, shape, zero, machine, open_choice, seq_length)
        choice = dataclasses.replace(
            open_choice,
            segment_tokens=found.segment_tokens,
            heads_per_group=found.heads_per_group,
            token_tile=found.token_tile,
        )
        _, memory = memory_at(config, shape, zero, machine, choice, seq_length)
        if sum(memory.pinned.values()) + sum(memory.pageable.values()) <= machine.usable_host:
            return choice
    return choice


def engine_step(
    config: TrainConfig, shape: ModelShape, zero: ZeroSettings, machine: Machine, choice: EngineChoice, seq_length: int
) -> engine_plan.Plan:
    """The engine's own plan for this length, as it will make it when the run is there."""
    resident = sum(zero_memory(shape, zero, trainable=config.trainable, ranks=machine.num_gpus, pool=None).gpu.values())
    return engine_plan.plan_step(
        engine_shape(shape),
        config.per_device_train_batch_size * seq_length,
        element_bytes=zero.weight_bytes,
        options=engine_plan.EngineOptions(**dataclasses.asdict(choice)),
        gpu_bytes=int(choice.gpu_budget_gib * GIB) - resident if machine.gpu_limit else None,
        training=True,
    )


def engine_shape(shape: ModelShape) -> engine_plan.Shape:
    """The same sizes in the engine's words."""
    return engine_plan.Shape(
        hidden=shape.hidden_size,
        vocab=shape.vocab_size,
        kda_heads=shape.linear_num_heads,
        kda_dim=shape.linear_head_dim,
        conv_width=shape.linear_conv_kernel_dim,
        mla_heads=shape.num_attention_heads,
        nope_dim=shape.qk_nope_head_dim,
        shared_key=shape.qk_rope_head_dim,
        v_dim=shape.v_head_dim,
        latent=shape.kv_lora_rank,
        dense_width=shape.intermediate_size,
        expert_width=shape.moe_intermediate_size,
        shared_width=shape.moe_intermediate_size * shape.num_shared_experts,
        experts=shape.num_experts,
        top_k=shape.experts_per_token,
        layers=tuple(
            ("mla" if i in shape.mla_layers else "kda", "dense" if i in shape.dense_layers else "moe")
            for i in range(shape.num_layers)
        ),
    )


def memory_at(
    config: TrainConfig,
    shape: ModelShape,
    zero: ZeroSettings,
    machine: Machine,
    choice: EngineChoice,
    seq_length: int,
) -> tuple[str, Memory]:
    """(the phase of a step in which the GPU is fullest, memory per term) for sequences of this length."""
    ranks, on_gpu = machine.num_gpus, machine.gpu_limit is not None
    pool = PinnedPool(machine.pinned_round_limit) if on_gpu else None
    memory = zero_memory(shape, zero, trainable=config.trainable, ranks=ranks, pool=pool)
    planned = engine_step(config, shape, zero, machine, choice, seq_length)
    tokens = config.per_device_train_batch_size * seq_length
    buffers = engine_plan.engine_buffers(engine_shape(shape), tokens, planned, element_bytes=zero.weight_bytes)

    def fullest(where: str) -> str:
        there = lambda b, phase: b.where == where and (not b.phases or phase in b.phases)  # noqa: E731
        return max(engine_plan.PHASES, key=lambda phase: sum(b.bytes for b in buffers if there(b, phase)))

    phases = {where: fullest(where) for where in ("gpu", "host")}
    for b in buffers:
        if not b.phases or phases[b.where] in b.phases:
            memory.add("gpu" if b.where == "gpu" else "pinned", b.name, b.bytes * (1 if b.where == "gpu" else ranks))
    if on_gpu:
        engine = sum(b.bytes for b in buffers if b.where == "gpu" and (not b.phases or phases["gpu"] in b.phases))
        memory.add("gpu", "allocator: rounding, fragments", int((engine_plan.MARGIN - 1) * engine))
        memory.add("gpu", "CUDA context, NCCL", GPU_CONTEXT)
        memory.add("pinned", "pinned blocks: rounding, cache", ranks * (pool.owned - pool.asked))
    else:  # there is one memory: what a GPU would hold lies in the processes
        for term, size in memory.gpu.items():
            memory.add("pageable", term, ranks * size)
        memory.gpu.clear()
    memory.add("pageable", "Python, libraries", ranks * PROCESS_BASE["gpu" if on_gpu else "cpu"])
    memory.add("disk", "checkpoints", checkpoint_bytes(shape, zero, config))
    return phases["gpu"], memory


def checkpoint_bytes(shape: ModelShape, zero: ZeroSettings, config: TrainConfig) -> int:
    """Disk of all kept checkpoints and the one being written: master weights and moments, and frozen weights as they are."""
    trained = shape.trained_parameters(config.trainable)
    one = (zero.master_bytes + 2 * zero.moment_bytes) * trained
    one += zero.weight_bytes * (shape.total_parameters - trained)
    kept = config.save_total_limit or math.ceil(config.num_train_steps / config.save_steps)
    return one * (kept + 1)


def plan_stage(
    config: TrainConfig,
    shape: ModelShape,
    zero: ZeroSettings,
    machine: Machine,
    engine: EngineChoice,
    seq_length: int,
    steps: int,
) -> StagePlan:
    """Memory, FLOPs and time of `steps` optimizer steps at one length."""
    batch, ranks = config.per_device_train_batch_size, machine.num_gpus
    micro_steps = config.gradient_accumulation_steps
    if config.tokens_per_step is not None:  # data_loader.Schedule's rule
        micro_steps = max(1, round(config.tokens_per_step / (seq_length * batch * ranks)))
    sequences = micro_steps * batch * ranks
    phase, memory = memory_at(config, shape, zero, machine, engine, seq_length)
    flops = model_flops_per_step(shape, seq_length, sequences, trainable=config.trainable)
    card = find_gpu(machine.gpu)
    seconds = step_seconds(
        shape,
        zero,
        card,
        tokens=seq_length,
        micro_steps=micro_steps,
        batch=batch,
        ranks=ranks,
        trainable=config.trainable,
        backend=config.attention_backend,
        keep_attention=engine.attention_outputs != "recompute",
    )
    mfu = sum(flops.values()) / (sum(seconds.values()) * card.bf16_flops * ranks) if seconds else None
    return StagePlan(seq_length, steps, micro_steps, sequences * seq_length, phase, memory, flops, seconds, mfu)


def schedule_warnings(config: TrainConfig, plan: Plan, dataset_tokens: int | None) -> list[str]:
    """Sentences about a schedule that asks for more tokens than are meant or there are."""
    warnings = []
    total, steps = plan.total_tokens, sum(stage.steps for stage in plan.stages)
    longest = max(stage.seq_length for stage in plan.stages)
    least = plan.machine.num_gpus * config.per_device_train_batch_size * longest
    if total > INTENDED_TOKENS:
        offer = least * max(1, int(INTENDED_TOKENS / steps // least))
        advice = f"--tokens_per_step {offer} makes it {human_count(offer * steps)}"
        if offer * steps > INTENDED_TOKENS:
            advice = (
                f"one step is at least {human_count(least)} tokens here, so lower --num_train_steps and the curriculum"
            )
        most = max(stage.tokens_per_step for stage in plan.stages)
        warnings.append(
            f"{steps:,} steps of up to {human_count(most)} tokens are {human_count(total)} tokens in all, where 100 to 150 B "
            f"are meant; {advice}"
        )
    if dataset_tokens and total > dataset_tokens:
        warnings.append(
            f"the schedule reads {human_count(total)} tokens but the data set has {human_count(dataset_tokens)}: "
            f"{total / dataset_tokens:.1f} epochs"
        )
    return warnings


def read_zero(config: TrainConfig) -> ZeroSettings:
    return ZeroSettings.from_json(read_json(config.deepspeed) if config.deepspeed else {}, bf16=config.bf16)


def pinned_round_limit(environ) -> int | None:
    """The size in bytes above which torch neither rounds nor keeps pinned blocks (PYTORCH_ALLOC_CONF); None: no limit."""
    settings = environ.get("PYTORCH_ALLOC_CONF", environ.get("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR_SETTINGS))
    match = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    return int(match[1]) * 2**20 if match else None


def host_memory() -> int:
    """Bytes of host memory this process may use: the machine's, or its container's limit."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    found = int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no control group, or 'max'
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


# ---------------------------------------------------------------------------------------------- the plan in words


def plan_text(plan: Plan) -> str:
    """The table of a plan: memory per term, FLOPs, time and cost per stage; warnings; verdict."""
    machine, shape, stages = plan.machine, plan.shape, plan.stages
    trained = shape.trained_parameters(plan.trainable)
    card = f"{machine.gpu or 'GPU'} ({machine.gpu_limit / GIB:.1f} GiB)" if machine.gpu_limit else "CPU process"
    lines = [
        f"plan: {human_count(shape.total_parameters)} parameters, {human_count(trained)} trained ({plan.trainable}), on "
        f"{machine.num_gpus} x {card}, host {machine.host_limit / GIB:,.0f} GiB"
    ]
    row = lambda name, cells: lines.append(f"  {name:<40}" + "".join(f"{cell:>12}" for cell in cells))  # noqa: E731
    row("tokens of a sequence", [f"{s.seq_length:,}" for s in stages])
    row("steps", [f"{s.steps:,}" for s in stages])
    row("micro-steps x ranks", [f"{s.micro_steps} x {machine.num_gpus}" for s in stages])
    row("tokens a step", [human_count(s.tokens_per_step) for s in stages])
    for place, title in (
        ("gpu", "GPU, GiB of one card at its fullest"),
        ("pinned", "pinned host memory, GiB of all ranks"),
        ("pageable", "other process memory, GiB of all ranks"),
        ("disk", "disk, GiB"),
    ):
        terms = dict.fromkeys(term for stage in stages for term in getattr(stage.memory, place))
        lines += [f"{title}:"] if terms else []
        for term in terms:
            row(term, [f"{getattr(s.memory, place).get(term, 0) / GIB:,.2f}" for s in stages])
        if len(terms) > 1:
            row("  sum", [f"{sum(getattr(s.memory, place).values()) / GIB:,.2f}" for s in stages])
    if machine.gpu_limit:
        row("GPU fullest during", [s.gpu_phase for s in stages])
    row("host memory in all, GiB", [f"{s.host_bytes / GIB:,.2f}" for s in stages])
    lines.append("arithmetic and time:")
    row("model FLOPs a step", [f"{sum(s.flops.values()):.3g}" for s in stages])
    row("  of it full attention", [f"{s.flops['attention'] / sum(s.flops.values()):.1%}" for s in stages])
    lines += _time_lines(plan, row)
    e = plan.engine
    lines.append(
        f"engine: KDA segments of {e.segment_tokens:,} tokens, {e.heads_per_group} MLA heads at a time, tiles of "
        f"{e.token_tile:,} tokens, offload {e.offload}, attention outputs: {e.attention_outputs}"
    )
    lines += [f"WARNING: {warning}" for warning in plan.warnings]
    return "\n".join([*lines, f"verdict: {plan.verdict}"])


def _time_lines(plan: Plan, row) -> list[str]:
    stages, seconds = plan.stages, plan.total_seconds
    if seconds is None:
        peak = find_gpu(plan.machine.gpu)
        if peak is None:
            return ["  step time, tokens/s, MFU, days and cost: n/a (no figures for this card)"]
        least = sum(s.steps * sum(s.flops.values()) for s in stages) / (peak.bf16_flops * plan.machine.num_gpus)
        return [
            f"  step time, tokens/s, MFU, days and cost: n/a (no kernel was measured on this card); its datasheet's peak "
            f"alone would take {human_time(least)}"
        ]
    for term in stages[0].seconds:
        row(f"{term}, s", [f"{s.seconds[term]:,.1f}" for s in stages])
    row("step time", [human_time(s.step_seconds) for s in stages])
    row("tokens/s", [human_count(s.tokens_per_step / s.step_seconds) for s in stages])
    row("MFU", [f"{s.mfu:.1%}" for s in stages])
    row("the stage takes", [human_time(s.steps * s.step_seconds) for s in stages])
    cost = "n/a (give --gpu_hour_usd)" if plan.cost_usd is None else f"${plan.cost_usd:,.0f}"
    return [
        f"whole schedule: {human_count(plan.total_tokens)} tokens in {human_time(seconds)}, "
        f"{seconds / 3600 * plan.machine.num_gpus:,.0f} GPU hours, cost {cost}"
    ]


# ---------------------------------------------------------------------------------------------- what a run really used


@dataclass
class PhasePeak:
    """Highest values seen in one phase, in bytes. `gpu_*` and `pinned` are 0 without a GPU."""

    gpu_allocated: int = 0
    gpu_reserved: int = 0
    pinned: int = 0
    process: int = 0
    seconds: float = 0.0
    entered: int = 0


class PhaseProfiler:
    """Peaks of GPU, pinned and process memory per phase of a run.

        profiler = PhaseProfiler()
        with profiler.phase("forward"):
            ...
        profiler.peaks["forward"].gpu_reserved      # bytes, the highest over all entries into the phase

    Phases must not be nested (there is one high-water mark). Process memory is the kernel's own mark (VmHWM, reset on
    entry), or a thread sampling every 5 ms where the kernel refuses the reset. Process memory counts this process only:
    a host's use is the sum over its ranks.
    """

    def __init__(self, *, proc: Path = Path("/proc/self"), sample_s: float = 0.005):
        self.peaks: dict[str, PhasePeak] = {}
        self._proc = proc
        self._sample_s = sample_s
        self._open: str | None = None
        self.process_source = "VmHWM" if self._reset_high_water_mark() else f"sampled every {sample_s * 1e3:g} ms"

    @contextmanager
    def phase(self, name: str):
        if self._open is not None:
            raise RuntimeError(f"phase {name!r} entered inside phase {self._open!r}; phases must not be nested")
        self._open = name
        cuda = _initialised_cuda()
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            cuda.reset_peak_host_memory_stats()
        sampler = None if self._reset_high_water_mark() else _RssSampler(self._proc, self._sample_s)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._open = None
            cuda = _initialised_cuda()
            if cuda:
                cuda.synchronize()
            peak = self.peaks.setdefault(name, PhasePeak())
            peak.seconds += time.perf_counter() - start
            peak.entered += 1
            if cuda:
                peak.gpu_allocated = max(peak.gpu_allocated, cuda.max_memory_allocated())
                peak.gpu_reserved = max(peak.gpu_reserved, cuda.max_memory_reserved())
                peak.pinned = max(peak.pinned, cuda.host_memory_stats().get("allocated_bytes.peak", 0))
            peak.process = max(peak.process, sampler.stop() if sampler else _status_bytes(self._proc, "VmHWM"))

    def _reset_high_water_mark(self) -> bool:
        """Set VmHWM back to the present size (Linux: write 5 to clear_refs); False where that is not allowed."""
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        # some sandboxes accept the write and do nothing, which would report an earlier phase's peak as this one's
        now = _status_bytes(self._proc, "VmRSS")
        return _status_bytes(self._proc, "VmHWM") <= now + 64 * 2**20

    def table(self) -> str:
        """One aligned line per phase."""
        lines = [
            f"{'phase':<12}{'GPU alloc':>11}{'GPU resv':>11}{'pinned':>11}{'process':>11}  GiB, peaks ({self.process_source})"
        ]
        for name, p in self.peaks.items():
            sizes = (p.gpu_allocated, p.gpu_reserved, p.pinned, p.process)
            lines.append(f"{name:<12}" + "".join(f"{size / GIB:>11.3f}" for size in sizes) + f"  {p.seconds:.1f} s")
        return "\n".join(lines)


class _RssSampler:
    """The highest VmRSS a thread saw between construction and stop()."""

    def __init__(self, proc: Path, sample_s: float):
        self._proc, self._sample_s = proc, sample_s
        self._highest = _status_bytes(proc, "VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss-sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(self._sample_s):
            self._highest = max(self._highest, _status_bytes(self._proc, "VmRSS"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._highest, _status_bytes(self._proc, "VmRSS"))


def _status_bytes(proc: Path, key: str) -> int:
    """A 'VmRSS: 123 kB' line of /proc/PID/status in bytes; 0 where there is none."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", (proc / "status").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _initialised_cuda():
    """torch.cuda once something has used it, else None: a profiler must not be what creates the CUDA context."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_available() and torch.cuda.is_initialized() else None
