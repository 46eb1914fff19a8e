"""What the long-sequence engine keeps in memory, as arithmetic: tile sizes and placement for a length and a budget.

    plan = plan_step(shape, tokens, element_bytes=2, options=EngineOptions(), gpu_bytes=72 * 2**30, training=True)
    for buffer in engine_buffers(shape, tokens, plan.tiles, ...): ...

`engine_buffers` is the one list of the engine's buffers: name, bytes, GPU or host, and in which phase of a step each is
there. The engine places by it and the planner predicts by it. No torch here, so that a plan costs nothing.

What it does not count: model weights outside the layer that runs, optimizer states, DeepSpeed's buckets, the CUDA context.

Symbols: T tokens of the packed stream, D hidden size, H heads, L latent size, G head groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

GIB = 2**30
PHASES = ("kda", "attention", "mla_mlp", "mla_input", "loss")

# Bytes of temporaries per token, in units of one element (bf16: 2 bytes) times a width; see benchmarks/NOTES.md
KDA_WIDTHS = 50  # times heads * head size, one segment: the kernel's own 33 and what its layer keeps for backward
MOE_WIDTHS = 5  # times experts per token * hidden size, one tile: gathered rows, gate/up, their gradients
COPIES_UNDER_WAY = 5 * GIB // 2  # bytes of tiles that may wait on the GPU for their copy to the host
MARGIN = 1.06  # allocator rounding and fragments


@dataclass(frozen=True)
class Shape:
    """The sizes of a Kimi-Linear model that its memory depends on. `layers`: (mixer, mlp) per layer."""

    hidden: int
    vocab: int
    kda_heads: int
    kda_dim: int
    conv_width: int
    mla_heads: int
    nope_dim: int
    shared_key: int
    v_dim: int
    latent: int
    dense_width: int
    expert_width: int
    shared_width: int
    experts: int
    top_k: int
    layers: tuple[tuple[str, str], ...]

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.shared_key

    @property
    def kda_width(self) -> int:
        return self.kda_heads * self.kda_dim

    def layer_parameters(self, mixer: str, mlp: str) -> int:
        D = self.hidden
        if mixer == "kda":
            count = D * self.kda_width * 4 + 3 * self.kda_width * self.conv_width + D * self.kda_heads
            count += 2 * (D * self.kda_dim + self.kda_dim * self.kda_width)
        else:
            count = D * self.mla_heads * self.qk_dim + D * (self.latent + self.shared_key)
            count += self.latent * self.mla_heads * (self.nope_dim + self.v_dim) + self.mla_heads * self.v_dim * D
        if mlp == "dense":
            return count + 3 * D * self.dense_width
        return count + 3 * D * (self.experts * self.expert_width + self.shared_width) + D * self.experts


@dataclass(frozen=True)
class EngineOptions:
    """What the user may fix; None and 'auto' are planned for each sequence length."""

    segment_tokens: int | None = None
    heads_per_group: int | None = None
    token_tile: int | None = None
    offload: str = "auto"  # auto, host, gpu
    attention_outputs: str = "auto"  # auto, keep, recompute
    document_separator_id: int | None = None
    gpu_budget_gib: float | None = None


@dataclass(frozen=True)
class Plan:
    """Tile sizes and places of one length. Places: 'gpu' or 'host'; `normed` is 'gpu' or 'recompute'.

    `stream`: the layers' inputs, kept for backward. `gradient`: the last layer's output, which becomes the gradient.
    """

    segment_tokens: int
    heads_per_group: int
    token_tile: int
    loss_tile: int
    projection_tile: int
    stream: str
    gradient: str
    attention_outputs: str
    query_gradients: str
    normed: str
    keep_attention: bool
    gpu_gib: float = 0.0
    host_gib: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Buffer:
    """`phases`: where in a step it is there; empty means always."""

    name: str
    bytes: int
    where: str
    phases: tuple[str, ...] = ()


def engine_buffers(
    shape: Shape, tokens: int, plan: Plan, *, element_bytes: int = 2, training: bool = True
) -> list[Buffer]:
    """Every buffer of a training step (or, with training=False, of a forward pass) over `tokens` tokens."""
    e, wide, D = element_bytes, max(4, element_bytes), shape.hidden
    stream = tokens * D * e
    mixers = [mixer for mixer, _ in shape.layers]
    kda_layers, mla_layers = mixers.count("kda"), mixers.count("mla")
    groups = -(-shape.mla_heads // plan.heads_per_group)
    segment, tile = min(plan.segment_tokens, tokens), min(plan.token_tile, tokens)
    moe = any(mlp == "moe" for _, mlp in shape.layers)
    dense = any(mlp == "dense" for _, mlp in shape.layers)
    widths = max(
        MOE_WIDTHS * shape.top_k * D + 6 * shape.shared_width if moe else 0, 7 * shape.dense_width if dense else 0
    )
    mlp_elements = tile * (widths + 12 * D)
    largest = max(shape.layer_parameters(*layer) for layer in shape.layers)
    # weights, and while a backward runs their sums in fp32 and one tile's own gradients
    weights = largest * (2 * e + wide if training else e)
    output = tokens * shape.mla_heads * (shape.v_dim * e + wide)
    boundaries = len(shape.layers) if training else 1
    buffers = [
        Buffer(f"hidden states, inputs of {boundaries} layers", boundaries * stream, plan.stream),
        Buffer(
            "weights of one layer and their gradients", weights, "gpu", ("kda", "attention", "mla_mlp", "mla_input")
        ),
        Buffer("token ids and labels", tokens * 16, "gpu"),
    ]
    if training:
        buffers.append(Buffer("last hidden states, then their gradient", stream, plan.gradient))
    if kda_layers:
        state = shape.kda_heads * shape.kda_dim**2 * 4 + (shape.conv_width - 1) * 3 * shape.kda_width * e
        kept = kda_layers * -(-tokens // plan.segment_tokens) * state if training else state
        kda = segment * (KDA_WIDTHS * shape.kda_width + 6 * D) * e
        buffers += [
            Buffer("KDA states at segment starts", kept, "gpu"),
            Buffer("one KDA segment", kda, "gpu", ("kda",)),
            Buffer("one MLP tile", mlp_elements * e, "gpu", ("kda",)),
        ]
    if mla_layers:
        layers_kept = mla_layers if training and plan.keep_attention else 1
        group = plan.heads_per_group * (2 * shape.qk_dim + 3 * shape.v_dim) * e
        if training:  # and dq, dk, dv, the kernel's fp32 sum of dq
            group += plan.heads_per_group * (2 * shape.qk_dim * e + shape.v_dim * e + shape.qk_dim * 4)
        latent = tokens * (shape.latent + shape.shared_key)
        during = ("attention", "mla_mlp")
        segment_tiles = segment * (shape.mla_heads * shape.v_dim + 6 * D) * 2 * e
        buffers += [
            Buffer(f"attention outputs of {layers_kept} layers", layers_kept * output, plan.attention_outputs),
            Buffer("latent", latent * e, "gpu", during),
            Buffer("one head group", tokens * group, "gpu", ("attention",)),
            Buffer("projection tiles", plan.projection_tile * D * 8 * e, "gpu", ("attention", "mla_input")),
            Buffer("one MLP tile", mlp_elements * e + segment_tiles, "gpu", ("mla_mlp",)),
        ]
        if plan.normed == "gpu":
            buffers.append(Buffer("normed hidden states", stream, "gpu", during))
        if training:
            sizes = [size for size in query_gradient_sizes(shape) if not _reuses_outputs(shape, plan, size)]
            dq = tokens * shape.mla_heads * sum(sizes) * e
            buffers += [
                Buffer("latent gradient", latent * wide, "gpu", ("attention", "mla_input")),
                Buffer(f"query gradients, {groups} groups", dq, plan.query_gradients, ("attention", "mla_input")),
            ]
    if "host" in (plan.stream, plan.attention_outputs, plan.query_gradients):
        buffers.append(Buffer("tiles on their way to the host", min(COPIES_UNDER_WAY, stream), "gpu"))
    loss = min(plan.loss_tile, tokens) * (shape.vocab * e + 8 * D * e)
    head = shape.vocab * D
    buffers += [
        Buffer("one loss tile", loss, "gpu", ("loss",)),
        Buffer("head weight and gradient", head * (e + 2 * wide if training else e), "gpu", ("loss",)),
    ]
    return buffers


def query_gradient_sizes(shape: Shape) -> list[int]:
    """Columns per head of the stashes that hold the queries' gradient. The first is as wide as an attention output, whose
    stash is given back just before, group by group: in host memory it takes that one's place."""
    first = min(shape.v_dim, shape.qk_dim)
    return [first, shape.qk_dim - first] if shape.qk_dim > first else [first]


def _reuses_outputs(shape: Shape, plan: Plan, size: int) -> bool:
    return plan.query_gradients == plan.attention_outputs and size == shape.v_dim


def host_stashes(shape: Shape, tokens: int, plan: Plan, *, element_bytes: int = 2) -> list[int]:
    """Bytes of every pinned buffer that a training step has at once, to pin them before the first step."""
    stream = tokens * shape.hidden * element_bytes
    found = [stream] * (len(shape.layers) * (plan.stream == "host") + (plan.gradient == "host"))
    layers = sum(mixer == "mla" for mixer, _ in shape.layers)
    kept = layers if plan.keep_attention else min(layers, 1)
    for start in range(0, shape.mla_heads, plan.heads_per_group):
        heads = min(plan.heads_per_group, shape.mla_heads - start)
        if plan.attention_outputs == "host":
            found += [tokens * heads * shape.v_dim * element_bytes, tokens * heads * max(4, element_bytes)] * kept
        if plan.query_gradients == "host" and layers:
            sizes = [size for size in query_gradient_sizes(shape) if not _reuses_outputs(shape, plan, size)]
            found += [tokens * heads * size * element_bytes for size in sizes]
    return found


def peak_bytes(buffers: list[Buffer], where: str) -> int:
    """The largest sum over the phases of a step, of the buffers in one place."""
    here = [buffer for buffer in buffers if buffer.where == where]
    return max(sum(b.bytes for b in here if not b.phases or phase in b.phases) for phase in PHASES)


def plan_step(
    shape: Shape,
    tokens: int,
    *,
    element_bytes: int,
    options: EngineOptions,
    gpu_bytes: int | None,
    training: bool,
    host_bytes: int | None = None,
) -> Plan:
    """Tiles and places for one length: the fastest that fits `gpu_bytes` (None: no GPU, everything in place).

    Tried in the order of what each costs (benchmarks/NOTES.md): everything on the GPU; query gradients, attention outputs
    and the layers' inputs on the host; the normed stream recomputed per head group and the gradient on the host (both are
    read once per head group); smaller groups and tiles. Attention is recomputed only where the host has no room.
    """
    places = {"host": ("host",), "gpu": ("gpu",), "auto": ("gpu", "host")}[options.offload]
    keep = options.attention_outputs != "recompute"

    def build(stream, gradient, outputs, dq, normed, heads, segment, tile, keep):
        loss_tile = min(tile, 16384)
        return Plan(
            segment_tokens=segment,
            heads_per_group=heads,
            token_tile=tile,
            loss_tile=loss_tile,
            projection_tile=max(segment, tile),
            stream=stream,
            gradient=gradient,
            attention_outputs=outputs,
            query_gradients=dq,
            normed=normed,
            keep_attention=keep,
        )

    if gpu_bytes is None:
        tile = options.token_tile or 1024
        chosen = build(
            places[0],
            places[0],
            places[0],
            places[0],
            "gpu" if options.offload != "host" else "recompute",
            min(options.heads_per_group or shape.mla_heads, shape.mla_heads),
            options.segment_tokens or 4096,
            tile,
            keep,
        )
        return dataclasses.replace(chosen, text=f"{tokens:,} tokens on the CPU, {_sizes(chosen)}")

    def peak(plan, where):
        buffers = engine_buffers(shape, tokens, plan, element_bytes=element_bytes, training=training)
        return peak_bytes(buffers, where) * (MARGIN if where == "gpu" else 1)

    best = None
    for keep_now in (True, False) if options.attention_outputs == "auto" else (keep,):
        for plan in _candidates(shape, options, places, keep_now, build):
            gpu, host = peak(plan, "gpu"), peak(plan, "host")
            plan = dataclasses.replace(plan, gpu_gib=gpu / GIB, host_gib=host / GIB)
            if best is None or gpu < best.gpu_gib * GIB:
                best = plan
            if gpu <= gpu_bytes and (host_bytes is None or host <= host_bytes):
                return dataclasses.replace(plan, text=_text(plan, tokens, gpu_bytes, fits=True))
        if host_bytes is None:
            break
    return dataclasses.replace(best, text=_text(best, tokens, gpu_bytes, fits=False))


def _candidates(shape: Shape, options: EngineOptions, places, keep, build):
    """Plans from fast to frugal."""
    if places == ("gpu",):
        ladder = [("gpu", "gpu", "gpu", "gpu", "gpu")]
    else:
        ladder = [
            ("host", "gpu", "host", "host", "gpu"),
            ("host", "gpu", "host", "host", "recompute"),
            ("host", "host", "host", "host", "recompute"),
        ]
        if "gpu" in places:
            ladder = [("gpu", "gpu", "gpu", "gpu", "gpu"), ("gpu", "gpu", "host", "host", "gpu"), *ladder]
    heads_tried = [options.heads_per_group] if options.heads_per_group else [8, 4, 2, 1]
    sizes = [(65536, 65536), (65536, 32768), (32768, 32768), (32768, 16384), (16384, 16384), (8192, 8192)]
    sizes = list(dict.fromkeys((options.segment_tokens or s, options.token_tile or t) for s, t in sizes))
    # small head groups cost nothing at length (each fills the GPU), small tiles cost matmul efficiency: shrink heads first
    for segment, tile in sizes:
        for places_of in ladder:
            for heads in heads_tried:
                yield build(*places_of, min(heads, shape.mla_heads), segment, tile, keep)


def _sizes(plan: Plan) -> str:
    return (
        f"segments of {plan.segment_tokens:,}, {plan.heads_per_group} heads per group, token tiles of {plan.token_tile:,}, "
        f"loss tiles of {plan.loss_tile:,}"
    )


def _text(plan: Plan, tokens: int, gpu_bytes: int, *, fits: bool) -> str:
    kept = "kept for backward" if plan.keep_attention else "recomputed in backward"
    verdict = "" if fits else "; MORE THAN THERE IS: expect an out-of-memory error"
    return (
        f"{tokens:,} tokens, {_sizes(plan)}; layer inputs on the {plan.stream}, gradient on the "
        f"{plan.gradient}, attention outputs {kept} on the "
        f"{plan.attention_outputs}, query gradients on the {plan.query_gradients}, normed stream "
        f"{'kept' if plan.normed == 'gpu' else 'recomputed per head group'}; predicted {plan.gpu_gib:.1f} of "
        f"{gpu_bytes / GIB:.1f} GiB GPU, {plan.host_gib:.1f} GiB host{verdict}"
    )
