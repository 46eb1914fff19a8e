"""What DeepSpeed ZeRO-3 keeps in memory, as its code allocates it (0.19.8), and torch's pinned allocator under it.

    zero = ZeroSettings.from_json(read_json("deepspeed_config_h100.json"), bf16=True)
    memory = zero_memory(shape, zero, trainable="all", ranks=2, local_ranks=2, pool=PinnedPool(round_limit))

Bytes by place (GPU, pinned, pageable, disk) and term. A test compares them with the buffers of a real engine on two ranks.
No torch here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata

from model_shape import ModelShape

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
    prefetch_bucket_size: int = 50_000_000

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
            prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch_bucket_size)),
        )


@dataclass
class Memory:
    """Bytes by place and term: `gpu` of one GPU; `pinned`, `pageable` (process memory) and `disk` of the whole host.

    `idle`: what a GPU's allocator holds besides, for streams that cannot use each other's freed blocks; it is given back
    when memory runs short.
    """

    gpu: dict[str, int] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    pageable: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, term: str, size: int) -> None:
        if size:
            terms = getattr(self, place)
            terms[term] = terms.get(term, 0) + int(size)


def zero_memory(
    shape: ModelShape, zero: ZeroSettings, *, trainable: str, ranks: int, local_ranks: int, pool: PinnedPool | None
) -> Memory:
    """What DeepSpeed ZeRO-3 holds between steps, as its code allocates it (0.19.8, runtime/zero/stage3.py), in its order:

    1. every parameter's partition, ceil(numel / ranks) elements, one block each (zero.Init)
    2. one flat block per optimizer group for the trained ones (matrices, vectors), on the host pinned whatever pin_memory
       says; the blocks of 1. are freed
    3. fp32 master per sub-group (pageable), 4. fp32 gradient per sub-group (pinned)
    5. one flat block that gradients are accumulated in over micro-steps (pinned; grad_accum_dtype)
    6. CPU Adam's two moments, at the first step (pageable)
    `pool` is one rank's pinned allocator, None where nothing can be pinned (a CPU run). `ranks` share the parameters,
    `local_ranks` of them are on this host and added up.
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
        memory.add(place, term, sum(blocks) * (1 if place == "gpu" else local_ranks))

    w, weights_at = zero.weight_bytes, (zero.weights_device, zero.pin_weights)
    on_host = pool is not None and zero.weights_device == "cpu" and zero.pin_weights
    if on_host:
        for elements in trained:
            pool.allocate(w * elements)
    hold(*weights_at, "weights, frozen", [w * elements for elements in frozen])
    hold(zero.weights_device, True, "weights, trained", [w * sum(part[p.name] for p in group) for group in groups])
    if on_host:
        for elements in trained:
            pool.free(w * elements)
    stepped = [n for group in groups for n in sub_groups([part[p.name] for p in group], zero.sub_group_size)]
    states = zero.states_device
    hold(states, False, "master weights", [zero.master_bytes * n for n in stepped])
    hold(states, zero.pin_states, "gradients for Adam", [zero.master_bytes * n for n in stepped])
    accumulator = states if states != "nvme" else "cpu"
    hold(accumulator, zero.pin_states, "gradient accumulation", [zero.accumulation_bytes * sum(trained)])
    hold(states, False, "Adam moments", [2 * zero.moment_bytes * n for n in stepped])
    if states == "nvme":  # buffer_count, 4 by default, sub-groups at a time pass through host memory
        hold("cpu", True, "NVMe swap buffers", [4 * zero.master_bytes * max(stepped, default=0)])

    memory.add("gpu", "ZeRO reduce bucket", w * zero.reduce_bucket_size)
    small = sum(p.numel for p in owned if p.numel <= zero.persistence_threshold)
    memory.add("gpu", "small parameters kept whole", w * small)
    # value, gradient and two moments, on every rank
    memory.add("gpu", "fp32 decay parameters", 16 * sum(p.numel for p in shape.parameters if p.own_fp32))
    steps = [p for p in owned if p.trained(trainable)]
    if zero.weights_device != "none":
        memory.add("gpu", PREFETCHED, w * _prefetched(owned, zero))
    memory.add("gpu", WAITING, w * max((p.numel for p in steps if p.layer is not None), default=0))
    memory.add("idle", "ZeRO's copies of a gradient", _gradient_copies(steps, zero, ranks))
    return memory


# Terms that are there only while a step runs: whole weights of the next layer, a gradient of the layer before
PREFETCHED, WAITING = "ZeRO's prefetched weights", "gradient that waits for its reduction"
PASSING = (PREFETCHED, WAITING)


def _prefetched(owned: list, zero: ZeroSettings) -> int:
    """Elements gathered for the next layer while one runs: whole parameters until the prefetch bucket is reached or passed."""
    largest = max((p.numel for p in owned if p.layer is not None), default=0)
    return min(largest_layer(owned), zero.prefetch_bucket_size + largest if zero.prefetch_bucket_size else 0)


def largest_layer(parameters) -> int:
    """Elements of the largest decoder layer."""
    layers: Counter[int] = Counter()
    for p in parameters:
        if p.layer is not None:
            layers[p.layer] += p.numel
    return max(layers.values(), default=0)


def gathered_ahead(shape: ModelShape, zero: ZeroSettings, *, resident: bool) -> int:
    """Bytes of whole weights that wait for the GPU, besides the layer that runs and what is prefetched.

    With every long tensor on the GPU (`resident`) nothing stops the CPU: it gathers all layers of a forward ahead of the
    GPU, and each layer's block is free only when the GPU is through. Copies to the host hold it back to one layer.
    """
    if zero.weights_device == "none":
        return 0
    owned = [p for p in shape.parameters if not p.own_fp32]
    layer = largest_layer(owned)
    ahead = sum(p.numel for p in owned) - layer - _prefetched(owned, zero) if resident else layer
    return zero.weight_bytes * max(0, ahead)


def _gradient_copies(trained: list, zero: ZeroSettings, ranks: int) -> int:
    """Bytes of one bucket's copies on the stream that ZeRO reduces on.

    A bucket is filled up to reduce_bucket_size, a larger parameter is one by itself. Of a rank's share: the sum over ranks
    in the accumulation's precision, the accumulated gradient read back from the host, the same in the master's precision.
    """
    acc, master, on_host = zero.accumulation_bytes, zero.master_bytes, zero.states_device != "none"
    share = acc * (acc != zero.weight_bytes) + on_host * (acc + master * (master != acc))
    alone = max((p.numel for p in trained), default=0)
    filled = min(zero.reduce_bucket_size, sum(p.numel for p in trained))
    return max(share * -(-alone // ranks), zero.weight_bytes * filled + share * -(-filled // ranks))


def sub_groups(partitions: list[int], limit: int) -> list[int]:
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


# ---------------------------------------------------------------------------------------------- pinned memory

# For PYTORCH_ALLOC_CONF. Without expandable segments every block keeps the size it was first taken with: when the sequences
# of the next stage want other sizes the old blocks are of no use to them, and 5 GiB of a 2M step's reserve were such blocks.
# Without the pinned_* settings (torch >= 2.13) every pinned block is rounded up to a power of two and freed ones are
# kept: near 350 GiB lost when all parameters are trained.
EXPANDABLE = "expandable_segments:True"
ALLOCATOR_SETTINGS = f"{EXPANDABLE},pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"


def set_allocator(environ=os.environ) -> None:
    """Set PYTORCH_ALLOC_CONF to ALLOCATOR_SETTINGS unless the user set it. Call it before torch is imported."""
    if "PYTORCH_ALLOC_CONF" in environ or "PYTORCH_CUDA_ALLOC_CONF" in environ:
        return
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = tuple(int(n) for n in re.findall(r"\d+", metadata.version("torch"))[:2])
        # an older torch refuses a setting it does not know
        environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTINGS if version >= (2, 13) else EXPANDABLE


def pinned_round_limit(environ) -> int | None:
    """The size in bytes above which torch neither rounds nor keeps pinned blocks (PYTORCH_ALLOC_CONF); None: no limit."""
    settings = environ.get("PYTORCH_ALLOC_CONF", environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    match = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    return int(match[1]) * 2**20 if match else None


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
