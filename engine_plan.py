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
PHASES = ("kda", "kda_mlp", "attention", "mla_mlp", "mla_input", "loss")

# What one token takes while a segment or a tile is worked on, in elements (an fp32 number is two bf16 elements), by reading
# the code and by benchmarks/trace_memory.py, which runs it (fla's too) on tensors without storage and adds up what is alive.
# KDA, times heads * head size. Kept from a segment's recomputation to its backward: q, k, v before the convolution and
# the decay (4), q and k normalised and v (3), fla's two 64-wide matrices per head (1), its output and the gate (2) and
# the gated norm of both (1). In fla's backward the last three are gone and its own gradients, states and copies are there;
# where a segment follows, autograd makes the gradient of q's, k's and v's last taps as wide as the segment (3). A forward
# without gradients is at its highest inside fla.
KDA_KEPT, KDA_BACKWARD, KDA_TAPS, KDA_FORWARD = 11, 35, 3, 20
# The residual stream's width: for the mixer the norm's output, mixed, its sum with the input and the result (4; one
# more in fla's backward, one more of the segment before), for the MLP the router's fp32 copy (2), the MLP's output (1)
# and the gradient of its input (1)
STREAM_KDA, STREAM_MLP = 4, 4
COPIES_UNDER_WAY = 5 * GIB // 2  # bytes of tiles that may wait on the GPU for their copy to the host
# The allocator's reserve over what is allocated: a step's allocations replayed against its rule for expandable segments leave
# 2 to 16 % in holes, 7 in the middle (benchmarks/results/planner_trace.json)
MARGIN = 1.08


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

    @property
    def expert_parameters(self) -> int:
        """Of one layer's routed experts."""
        return 3 * self.hidden * self.experts * self.expert_width

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
        return count + self.expert_parameters + 3 * D * self.shared_width + D * self.experts


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
    shape: Shape,
    tokens: int,
    plan: Plan,
    *,
    element_bytes: int = 2,
    training: bool = True,
    frozen_experts: bool = False,
) -> list[Buffer]:
    """Every buffer of a training step (or, with training=False, of a forward pass) over `tokens` tokens.

    With `frozen_experts` the routed experts' gradients are not there.
    """
    e, D = element_bytes, shape.hidden
    stream = tokens * D * e
    mixers = [mixer for mixer, _ in shape.layers]
    kda_layers, mla_layers = mixers.count("kda"), mixers.count("mla")
    segment, tile = min(plan.segment_tokens, tokens), min(plan.token_tile, tokens)
    buffers = [
        Buffer("token ids, labels, losses", tokens * 21, "gpu"),
        *_weight_buffers(shape, tokens, plan, e, training=training, frozen_experts=frozen_experts),
        *_kept_buffers(shape, tokens, plan, e, training=training),
    ]
    if training:
        buffers.append(Buffer("last hidden states, then their gradient", stream, plan.gradient))
    # tiles that come from the host: the one in work and the next, for the last of a layer's inputs the next layer's first
    coming = (plan.stream == "host") * 2 * segment * D * e
    coming += (training and plan.gradient == "host") * min(2 * segment, tokens) * D * e
    mlp = _mlp_tile(shape, tile, e, training=training, frozen_experts=frozen_experts)
    if kda_layers:
        state = shape.kda_heads * shape.kda_dim**2 * 4 + (shape.conv_width - 1) * 3 * shape.kda_width * e
        kept = kda_layers * -(-tokens // plan.segment_tokens) * state if training else state
        several = tokens > segment
        width = lambda kda, D_s: segment * (kda * shape.kda_width + (D_s + several) * D) * e + coming  # noqa: E731
        backward = KDA_BACKWARD + KDA_TAPS * several if training else KDA_FORWARD
        buffers += [
            Buffer("KDA states at segment starts", kept, "gpu"),
            Buffer("one KDA segment", width(backward, STREAM_KDA + 1), "gpu", ("kda",)),
            Buffer("one KDA segment", width(KDA_KEPT if training else 0, STREAM_KDA), "gpu", ("kda_mlp",)),
            Buffer("one MLP tile", mlp, "gpu", ("kda_mlp",)),
        ]
    if mla_layers:
        buffers += _mla_buffers(shape, tokens, plan, e, training=training)
        outputs = min(2 * segment, tokens) if plan.attention_outputs == "host" else segment
        mixer = segment * 3 * D * e + outputs * shape.mla_heads * shape.v_dim * e + coming
        buffers.append(Buffer("one MLP tile", mlp + mixer, "gpu", ("mla_mlp",)))
    if "host" in (plan.stream, plan.attention_outputs, plan.query_gradients):
        buffers.append(Buffer("tiles on their way to the host", min(COPIES_UNDER_WAY, stream), "gpu"))
    # the tile's logits, the norm of its rows, and of the tile before the gradients behind and before the norm
    loss = min(plan.loss_tile, tokens) * (shape.vocab + 3 * D) * e
    buffers.append(Buffer("one loss tile", loss, "gpu", ("loss",)))
    if training and plan.stream == "host":
        buffers.append(Buffer("first tile of the last layer's input", segment * D * e, "gpu", ("loss",)))
    return buffers


def _kept_buffers(shape: Shape, tokens: int, plan: Plan, e: int, *, training: bool) -> list[Buffer]:
    """What the forward keeps for the backward: the layers' inputs and the attention outputs, which go layer by layer.

    When a KDA layer's backward runs, what the layers above it had kept is gone: on the GPU that room is used.
    """
    stream, output = tokens * shape.hidden * e, tokens * shape.mla_heads * (shape.v_dim * e + max(4, e))
    mixers = [mixer for mixer, _ in shape.layers]
    top = max((i for i, mixer in enumerate(mixers) if mixer == "kda"), default=0) + 1
    in_kda = ("kda", "kda_mlp")
    buffers = []
    for layers, phases in ((mixers, tuple(p for p in PHASES if p not in in_kda)), (mixers[:top], in_kda)):
        inputs = len(layers) if training else 1
        outputs = layers.count("mla") if training and plan.keep_attention else min(1, layers.count("mla"))
        buffers.append(Buffer(f"hidden states, inputs of {inputs} layers", inputs * stream, plan.stream, phases))
        if outputs:
            name = f"attention outputs of {outputs} layers"
            buffers.append(Buffer(name, outputs * output, plan.attention_outputs, phases))
    return buffers


def _weight_buffers(
    shape: Shape, tokens: int, plan: Plan, e: int, *, training: bool, frozen_experts: bool
) -> list[Buffer]:
    """Weights of the layer that runs and its gradients: summed in fp32, bf16 once they are complete (MLA's attention)."""
    wide = max(4, e)
    largest = max(shape.layer_parameters(*layer) for layer in shape.layers)
    head = shape.vocab * shape.hidden
    layer_phases = tuple(phase for phase in PHASES if phase != "loss")
    buffers = [
        Buffer("weights of one layer", largest * e, "gpu", layer_phases),
        # a tile's share of the head's gradient is added to the sum
        Buffer("head weight and gradient", head * (e + 2 * wide if training else e), "gpu", ("loss",)),
    ]
    if training:
        trained = largest - shape.expert_parameters * frozen_experts
        # before the second tile of a layer there is no sum
        summing = ("kda", "kda_mlp", "mla_mlp") if tokens > min(plan.token_tile, plan.segment_tokens) else ("kda",)
        buffers += [
            Buffer("gradients of one layer", trained * wide, "gpu", summing),
            Buffer("gradients of one layer", trained * e, "gpu", ("attention", "mla_input")),
        ]
    return buffers


def _mlp_tile(shape: Shape, tile: int, e: int, *, training: bool, frozen_experts: bool) -> int:
    """Bytes of a token tile in the layers' MLP: the largest of routed experts and dense MLP.

    Routed experts, per routed row, in backward: gathered input and gradient (2 D), gate and up and their gradients (4 F),
    the gradient of their product and the product (2 F), with the down projection's own gradient; later the gradient of the
    input in place of the product's, with both weights' own gradients.
    """
    D, F, rows = shape.hidden, shape.expert_width, tile * shape.top_k
    sizes = [0]
    kinds = {mlp for _, mlp in shape.layers}
    if "moe" in kinds:
        own = 0 if frozen_experts else shape.expert_parameters
        if training:
            sizes += [rows * (2 * D + 6 * F) + own // 3, rows * (2 * D + 4 * F) + own]
        else:
            sizes.append(rows * (2 * D + 3 * F))
    if "dense" in kinds:
        own = 3 * D * shape.dense_width
        sizes.append(tile * 6 * shape.dense_width + own if training else tile * 4 * shape.dense_width)
    return (max(sizes) + tile * STREAM_MLP * D) * e


def _mla_buffers(shape: Shape, tokens: int, plan: Plan, e: int, *, training: bool) -> list[Buffer]:
    """The MLA layers' buffers, but for their MLP's tile."""
    wide, D = max(4, e), shape.hidden
    group = (2 * shape.qk_dim + 3 * shape.v_dim) * e
    if training:  # and dq, dk, dv, the kernel's fp32 sum of dq and three fp32 numbers a row
        group += (2 * shape.qk_dim + shape.v_dim) * e + -(-shape.qk_dim // 32) * 32 * 4 + 12
    latent = tokens * (shape.latent + shape.shared_key)
    during = ("attention", "mla_mlp")
    tile = min(plan.projection_tile, tokens)
    # in backward: the norm, its gradient by the queries, by the latent and their sum (4), the gradient of the tile
    # before (1), queries and their gradient in parts and whole (3), the latent, its norm and its gradient (4)
    queries = shape.mla_heads * shape.qk_dim
    projections = tile * (5 * D + 3 * queries + 4 * shape.latent) * e
    on_host = D * (plan.gradient == "host") + queries * (plan.query_gradients == "host")
    projections += (min(2 * tile, tokens) * on_host + 2 * tile * D * (plan.stream == "host")) * e
    # what the sweep after the last group's attention reads first, but for that group's own part
    groups = -(-shape.mla_heads // plan.heads_per_group)
    earlier = (groups - 1) * plan.heads_per_group
    if training:
        first = tile * (D * (plan.gradient == "host") + earlier * shape.qk_dim * (plan.query_gradients == "host"))
    else:
        first = tile * earlier * shape.v_dim * (plan.attention_outputs == "host")
    first += tile * D * (plan.stream == "host")
    buffers = [
        Buffer("latent", latent * e, "gpu", during),
        Buffer("one head group", tokens * plan.heads_per_group * group, "gpu", ("attention",)),
        Buffer("first tiles of the sweep after attention", first * e, "gpu", ("attention",)),
        Buffer("projection tiles", projections, "gpu", ("mla_input",)),
    ]
    if plan.normed == "gpu":
        buffers.append(Buffer("normed hidden states", tokens * D * e, "gpu", during))
    if training:
        sizes = [size for size in query_gradient_sizes(shape) if not _reuses_outputs(shape, plan, size)]
        dq = tokens * shape.mla_heads * sum(sizes) * e
        buffers += [
            Buffer("latent gradient", latent * wide, "gpu", ("attention", "mla_input")),
            Buffer(f"query gradients, {groups} groups", dq, plan.query_gradients, ("attention", "mla_input")),
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
