"""What a training step holds on the GPU, by running the engine's own code on tensors without storage.

    python benchmarks/trace_memory.py --out benchmarks/results/planner_trace.json     # needs triton (its CPU wheel will do), no GPU

Every layer's forward and backward of long_sequence.py runs on torch's meta device, fla's Python with its kernel launches left
out, the other kernels as functions that allocate what the real ones do. A dispatch mode adds up the storages that are alive:
what is compared per phase with engine_plan.engine_buffers, which the planner predicts by. The same allocations replayed
against the allocator's rule for expandable segments give its reserve, with the holes that it cannot fill. Not in it:
DeepSpeed. Weights are added to each phase as DeepSpeed gathers them, one layer whole.

Without fla (`kda=allocating_kda`) the recurrence is a function that takes what fla was seen to take; the tests use that.
"""

from __future__ import annotations

import argparse
import bisect
import json
import sys
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kimi_model  # noqa: E402
import long_sequence  # noqa: E402
from engine_plan import COPIES_UNDER_WAY, PHASES, EngineOptions, Plan, engine_buffers, plan_step  # noqa: E402
from kernels import Kernels, causal_conv_fla, kda_fla, reference_kernels  # noqa: E402
from stash import Transfer  # noqa: E402

GIB = 2**30
META = torch.device("meta")
# where the engine's code runs in each phase of engine_plan
PHASE_OF = {
    "_kda_backward": "kda",
    "_mla_groups_backward": "attention",
    "_mla_output_backward": "mla_mlp",
    "_mla_input_backward": "mla_input",
    "loss": "loss",
}


# ---------------------------------------------------------------------------------------------- what is alive


class ExpandableSegment:
    """torch's allocator with expandable segments, large blocks of one stream: the smallest free range that is large enough
    is cut, neighbours are joined, and the end is moved by pages of 20 MiB where none fits. `reserved` never falls."""

    PAGE, SMALL = 20 * 2**20, 2**20

    def __init__(self):
        self.reserved = 0
        self._free: list[tuple[int, int]] = []  # (bytes, offset), sorted

    def take(self, size: int) -> int | None:
        """Offset of a new block; None for one of the small pool, which is not followed."""
        if size <= self.SMALL:
            return None
        place = bisect.bisect_left(self._free, (size, -1))
        if place == len(self._free):
            last = next((part for part in self._free if sum(part) == self.reserved), (0, self.reserved))
            grown = -(-(size - last[0]) // self.PAGE) * self.PAGE
            if last[0]:
                self._free.remove(last)
            self.reserved += grown
            free, offset = last[0] + grown, last[1]
        else:
            free, offset = self._free.pop(place)
        if free > size:
            bisect.insort(self._free, (free - size, offset + size))
        return offset

    def give(self, offset: int | None, size: int) -> None:
        if offset is None:
            return
        for part in [part for part in self._free if sum(part) == offset or part[1] == offset + size]:
            self._free.remove(part)
            offset, size = min(offset, part[1]), size + part[0]
        bisect.insort(self._free, (size, offset))


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive and were made inside the mode; the highest sum per phase."""

    def __init__(self, known, segment: ExpandableSegment):
        super().__init__()
        self._segment = segment
        self.bytes, self.phase = 0, "other"
        self.peaks: dict[str, int] = {}
        self._seen = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512 * counted
        if key in self._seen:
            return

        offset = self._segment.take(size)

        def gone(_):
            del self._seen[key]
            self.bytes -= size
            self._segment.give(offset, size)

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.bytes)

    @contextmanager
    def during(self, phase: str):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, owner, method: str, phase) -> None:
        """Everything alive while `owner.method` runs counts for `phase`, a name or a function of the phase around it."""
        original = getattr(owner, method)

        def call(*args, **kwargs):
            with self.during(phase if isinstance(phase, str) else phase(self.phase)):
                return original(*args, **kwargs)

        setattr(owner, method, call)


class MetaTransfer(Transfer):
    """stash.Transfer without streams: host buffers are not counted, tiles on their way to the host are."""

    total_bytes = 0

    def __init__(self, live: Live):
        self.device, self.cuda, self.pool = META, True, self
        self._live, self._pending, self._pending_bytes = live, deque(), 0

    def take(self, nbytes: int) -> torch.Tensor:
        with _disable_current_modes():
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=META)
        self._live.add(buffer, counted=False)
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        pass

    def to_host(self, host: torch.Tensor, tile: torch.Tensor):
        self._pending.append(tile)
        self._pending_bytes += tile.nbytes
        while self._pending_bytes > COPIES_UNDER_WAY:
            self._pending_bytes -= self._pending.popleft().nbytes

    def from_host(self, host: torch.Tensor, after):
        return torch.empty_like(host), None


# ---------------------------------------------------------------------------------------------- kernels that only allocate


class AllocatingAttention:
    """flash-attn-4's allocations: outputs, in backward fp32 sums of dq and two fp32 numbers a row."""

    name = "flash4"

    def forward(self, q, k, v, documents, scale):
        return torch.empty_like(v), v.new_empty(v.shape[1], v.shape[0], dtype=torch.float32)

    def backward(self, do, q, k, v, o, lse, documents, scale):
        rounded = -(-q.shape[2] // 32) * 32
        grads = [torch.empty_like(x) for x in (q, k, v)]
        alive = [lse.new_empty(*lse.shape, rounded), torch.empty_like(lse), torch.empty_like(lse)]
        del alive
        return grads


class _Kda(torch.autograd.Function):
    """Kept: q and k normalised, v, g, two matrices of 64 per head and token; in backward 26 widths more than those."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, A_log, dt_bias, state):
        matrices = [q.new_empty(*q.shape[:2], 64) for _ in range(2)]
        ctx.save_for_backward(torch.empty_like(q), torch.empty_like(k), v, g, *matrices)
        ctx.inputs = [(x.shape, x.dtype) for x in (q, k, v, g, beta, A_log, dt_bias, state)]
        return torch.empty_like(v), torch.empty_like(state)

    @staticmethod
    def backward(ctx, do, dstate):
        kept = ctx.saved_tensors
        own = do.new_empty(26, *do.shape)
        del own, kept
        return tuple(do.new_empty(shape, dtype=dtype) for shape, dtype in ctx.inputs)


def allocating_kda(q, k, v, g, beta, A_log, dt_bias, state, documents):
    state = q.new_empty(*q.shape[1:], v.shape[-1], dtype=torch.float32) if state is None else state
    return _Kda.apply(q, k, v, g, beta, A_log, dt_bias, state)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, tail):
        ctx.save_for_backward(x, weight)
        ctx.tail = tail
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None if ctx.tail is None else torch.empty_like(ctx.tail)


def allocating_conv(x, weight, tail, documents):
    return _Convolution.apply(x, weight, tail)


class _Norm(torch.autograd.Function):
    """triton_kernels' norms. Kept: the inputs; in backward NORM_PROGRAMS rows of the weight's gradient."""

    @staticmethod
    def forward(ctx, x, gate, weight):
        ctx.save_for_backward(x, gate, weight)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        dx, dgate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
        partial = x.new_empty(1024, x.shape[-1], dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return dx, dgate, None if partial is None else partial.sum(0).to(weight.dtype)


def meta_kernels(kda, conv) -> Kernels:
    """The GPU's kernels by what they allocate (triton_kernels.py, torch's grouped GEMM)."""
    empty = lambda rows, width, like: like.new_empty(rows, width)  # noqa: E731
    return replace(
        reference_kernels("meta"),
        kda=kda,
        causal_conv=conv,
        attention=AllocatingAttention(),
        grouped_matmul=lambda x, weight, ends: empty(x.shape[0], weight.shape[1], x),
        grouped_weight_grad=lambda dy, x, ends: x.new_empty(len(ends), dy.shape[1], x.shape[1]),
        gated=lambda h, weight: empty(h.shape[0], h.shape[1] // 2, h),
        gated_backward=lambda h, da, weight: (
            torch.empty_like(h),
            torch.empty_like(da),
            None if weight is None else torch.empty_like(weight),
        ),
        combine=lambda y, places: empty(places.shape[0], y.shape[1], y),
        rms_norm=lambda x, weight, eps: _Norm.apply(x, None, weight),
        gated_norm=lambda out, gate, weight, eps: _Norm.apply(out, gate, weight),
        cross_entropy=lambda logits, labels, scale, want: (
            logits.new_empty(logits.shape[0], dtype=torch.float32),
            logits.new_empty(logits.shape[0], dtype=torch.bool),
        ),
    )


def launch_no_kernels() -> None:
    """Turn every Triton kernel launch of this process into nothing."""
    from triton.runtime import autotuner, jit

    for kind in (jit.JITFunction, autotuner.Autotuner, autotuner.Heuristics):
        kind.__getitem__ = lambda self, grid: lambda *args, **kwargs: None


# ---------------------------------------------------------------------------------------------- one step


@contextmanager
def _fp32_out_of_matmuls():
    """As on CUDA, where the matmul writes fp32; elsewhere a bf16 product would be there too."""
    original = long_sequence.matmul_wide
    long_sequence.matmul_wide = lambda a, b: a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    try:
        yield
    finally:
        long_sequence.matmul_wide = original


def meta_model(values: dict):
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(**{key: value for key, value in values.items() if key != "model_type"})
    with META:
        model = KimiLinearForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.float()
    return model


def trace(
    values: dict,
    tokens: int,
    options: EngineOptions,
    *,
    gpu_gib: float,
    kda,
    conv,
    segment: ExpandableSegment | None = None,
) -> tuple[Plan, dict, dict]:
    """(plan, bytes listed per phase, bytes traced per phase) of one training step over `tokens` tokens.

    `segment`: the allocator of the steps before this one.
    """
    model = meta_model(values)
    parts = kimi_model._model_parts(model)
    engine = long_sequence.LongSequenceEngine(parts, meta_kernels(kda, conv), options, META)
    live = Live([*model.parameters(), *model.buffers()], segment or ExpandableSegment())
    engine.transfer = MetaTransfer(live)
    plan = plan_step(parts.shape, tokens, element_bytes=2, options=options, gpu_bytes=int(gpu_gib * GIB), training=True)
    engine._plans[tokens, True] = plan
    for method, phase in PHASE_OF.items():
        live.watch(engine, method, phase)
    live.watch(engine, "_mlp_backward", {"kda": "kda_mlp", "mla_mlp": "mla_mlp"}.get)
    with live, _fp32_out_of_matmuls():
        _step(engine, model, parts, tokens)
    buffers = engine_buffers(parts.shape, tokens, plan)
    here = lambda phase: [b for b in buffers if b.where == "gpu" and (not b.phases or phase in b.phases)]  # noqa: E731
    layer = next(b.bytes for b in buffers if b.name == "weights of one layer")
    head = parts.shape.vocab * parts.shape.hidden * 2
    listed = {phase: sum(b.bytes for b in here(phase)) for phase in PHASES if phase in live.peaks}
    return plan, listed, {phase: live.peaks[phase] + (head if phase == "loss" else layer) for phase in listed}


def _step(engine, model, parts, tokens: int) -> None:
    """The order in which autograd calls the engine."""
    ids = torch.empty(1, tokens, dtype=torch.int64, device=META)
    step = engine.start(ids, torch.empty(tokens, dtype=torch.int64, device=META), float(tokens), torch.bfloat16)
    with torch.no_grad():
        engine.embed(step, model.model.embed_tokens.weight)
        for index in range(len(parts.layers)):
            engine.layer(step, index)
        step.final_norm = (model.model.norm.weight.detach(), True)
        _, head_grad = engine.loss(step, model.lm_head.weight)
        del head_grad
        for index in reversed(range(len(parts.layers))):
            weights, gradients = engine.layer_backward(step, index)
            gradients.result(list(weights), weights)
            del weights, gradients
        engine.embed_backward(step, model.model.embed_tokens.weight)


def main() -> int:
    from bench_engine import MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    launch_no_kernels()
    eight = {"num_hidden_layers": 8, "num_local_experts": 16, "layer_types": MODEL["layer_types"] * 2}
    eight["mlp_layer_types"] = ["dense"] + ["sparse"] * 7
    small = {"segment_tokens": 16384, "token_tile": 16384, "heads_per_group": 2}
    eight = {**MODEL, **eight}
    runs = [  # one run each: its lengths follow one another in one allocator
        ("64 experts", MODEL, [2**n for n in range(16, 22)], 68, {}),
        ("64 experts, small tiles", MODEL, [2**16, 2**18], 68, small),
        ("64 experts", MODEL, [2**21], 36, {}),
        ("8 layers, 16 experts", eight, [2**16, 2**18, 2**19], 68, {}),
        ("256 experts", {**MODEL, "num_local_experts": 256}, [2**16, 2**21], 68, {}),
    ]
    records = []
    for name, values, lengths, gib, sizes in runs:
        segment, options = ExpandableSegment(), EngineOptions(attention_outputs="keep", **sizes)
        for tokens in lengths:
            kernels = {"kda": kda_fla, "conv": causal_conv_fla}
            plan, listed, traced = trace(values, tokens, options, gpu_gib=gib, segment=segment, **kernels)
            difference = max(listed.values()) / max(traced.values()) - 1
            record = {
                "model": name,
                "tokens": tokens,
                "gpu_gib": gib,
                "plan": plan.text,
                "listed": listed,
                "traced": traced,
            }
            records.append({**record, "reserved without weights": segment.reserved})
            each = ", ".join(f"{phase} {listed[phase] / GIB:.2f}/{traced[phase] / GIB:.2f}" for phase in listed)
            print(
                f"{name}, {tokens:,} tokens, {gib} GiB: {difference:+.1%}, reserved {segment.reserved / GIB:.2f}; GiB "
                f"listed/traced: {each}",
                flush=True,
            )
    if arguments.out:
        text = json.dumps({"torch": torch.__version__, "records": records}, indent=1)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
