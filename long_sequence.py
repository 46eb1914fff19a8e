"""The long-sequence engine: an exact, tiled training step of Kimi-Linear whose memory does not grow with vocabulary x
tokens, heads x tokens or tokens x tokens.

    engine = LongSequenceEngine(model_parts, options)    # kimi_model.install_long_sequence builds the parts
    step = engine.start(input_ids, labels, ...)          # then run_embedding, run_layer, run_norm, run_loss in order

How a step goes. The hidden states do not travel through autograd. They live in a `Stash`, a [T, D] buffer on the GPU or
in pinned host memory that is read and written by spans of tokens, with copies on their own CUDA streams. What travels
through autograd from module to module is one dummy number, so that each module (embedding, each decoder layer, final
norm, head) is one `autograd.Function` whose inputs are the dummy and the module's parameters: ZeRO-3's hooks fire as
always, parameters are whole while the function runs, and each gets its gradient once, accumulated in fp32.

    embedding   writes stash 0                          backward: scatter-adds the gradient stash
    layer i     reads stash i, writes stash i+1         backward: reads stash i, rewrites the gradient stash in place
    norm, head  read the last stash, write the gradient of the loss over it: that is the gradient stash

Three exact tilings inside a layer:
  KDA   by segments: recurrent state (fp32) and the convolution's last inputs are carried; backward walks the segments in
        reverse, recomputes each from its kept start state and passes the state's gradient back;
  MLA   by head groups: q, k, v of a few heads are expanded from the normed stream and the latent, attended over the whole
        sequence; (output, log-sum-exp) are kept, so the quadratic forward runs once;
  MLP, experts, norms, loss   by token tiles.

A batch of B sequences is run as one packed stream of B documents; `document_separator_id` adds the borders inside.
What this file does not do: it names no module of the model (kimi_model.py does), and knows nothing of ranks.

Symbols: T tokens of the packed stream, D hidden size, H heads, K key size (192 in MLA), V value size, L latent size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from config import UserError
from engine_plan import EngineOptions, Plan, Shape, host_stashes, plan_step, query_gradient_sizes
from kernel_clock import KernelClock
from kernels import Documents, Experts, GatedMlp, Kernels, compute_dtype
from run_log import say
from stash import Stash, Transfer, read_ahead, spans

# ---------------------------------------------------------------------------------------------- what the engine is given


@dataclass(frozen=True)
class Part:
    """One module of the model: where each of its tensors is found (resolved at every use: ZeRO-3 swaps their storage)."""

    sources: dict[str, tuple[torch.nn.Module, str]]

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(module, attribute) for name, (module, attribute) in self.sources.items()}
        for name, tensor in found.items():
            if tensor.numel() == 0 and getattr(tensor, "ds_numel", 0):
                raise UserError(
                    f"zero_optimization: parameter {name!r} is not gathered while its layer runs; the decoder layer must be a "
                    "ZeRO-3 leaf module (install_long_sequence before the model is prepared, or name the class in "
                    "zero_optimization.leaf_module.classes)"
                )
        return found


@dataclass(frozen=True)
class LayerPart(Part):
    mixer: str  # "kda" or "mla"
    mlp: str  # "dense" or "moe"


@dataclass(frozen=True)
class ModelParts:
    """What kimi_model.py tells the engine about a model."""

    shape: Shape
    embedding: Part  # weight; its padding row gets no gradient
    layers: tuple[LayerPart, ...]
    norm: Part  # weight
    head: Part  # weight
    norm_eps: float
    latent_norm_eps: float
    padding_id: int | None
    top_k: int
    expert_groups: int
    top_groups: int
    normalise_weights: bool
    routed_scaling: float


# ---------------------------------------------------------------------------------------------- gradients of one module


class Gradients:
    """Sums of a module's parameter gradients over tiles, in fp32 (fp64 for fp64 parameters)."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.requires_grad}
        self._sums: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        return name in self._dtypes

    def add(self, name: str, grad: torch.Tensor | None, rows: slice | None = None, shape=None) -> None:
        """Add a tile's gradient; with `rows`, to these rows of the parameter's gradient of the given shape."""
        if grad is None:
            return
        if name not in self._sums:
            dtype = compute_dtype(self._dtypes[name])
            if rows is None:
                self._sums[name] = grad.to(dtype, copy=True)
                return
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=grad.device)
        total = self._sums[name]
        (total if rows is None else total[rows]).add_(grad)

    def round(self, names: Iterable[str]) -> None:
        """These are complete: hold them in the parameter's dtype from here on (bf16 halves what waits for the return)."""
        for name in names:
            if name in self._sums:
                self._sums[name] = self._sums[name].to(self._dtypes[name])

    def result(self, names: Iterable[str], tensors: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """One gradient per parameter in the order of `names`; a trained one that no token reached gets zeros."""
        self.round(list(self._sums))
        return [
            None
            if not self.wants(name)
            else self._sums[name]
            if name in self._sums
            else torch.zeros_like(tensors[name])
            for name in names
        ]


class Recompute:
    """A tile's forward with gradients, then its backward: leaves for inputs and trained weights, one autograd.grad call.

    tile = Recompute(weights, x=x)
    with torch.enable_grad(): y = f(tile.weights, tile.inputs["x"])
    dx, = tile.backward([y], [dy], gradients)
    """

    def __init__(self, weights: dict[str, torch.Tensor], **inputs: torch.Tensor | None):
        self.weights = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in weights.items()}
        self.inputs = {
            name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in inputs.items()
        }

    def backward(self, outputs, output_grads, gradients: Gradients) -> list[torch.Tensor | None]:
        inputs = [tensor for tensor in self.inputs.values() if tensor is not None]
        names = [name for name, tensor in self.weights.items() if tensor.requires_grad]
        pairs = [(o, g) for o, g in zip(outputs, output_grads, strict=True) if g is not None and o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            [*inputs, *(self.weights[n] for n in names)],
            [g for _, g in pairs],
            allow_unused=True,
        )
        for name, grad in zip(names, grads[len(inputs) :], strict=True):
            gradients.add(name, grad)
        found = iter(grads[: len(inputs)])
        return [None if tensor is None else next(found) for tensor in self.inputs.values()]


# ---------------------------------------------------------------------------------------------- a product with a wide sum


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with the sum left in fp32 (fp64): bf16 tensor cores on CUDA write fp32 without a rounding."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(compute_dtype(a.dtype))


# ---------------------------------------------------------------------------------------------- one step


@dataclass
class Step:
    """One forward pass and its backward: the stashes and what modules hand to each other besides them."""

    documents: Documents
    plan: Plan
    keep: bool  # a backward will follow
    input_ids: torch.Tensor
    labels: torch.Tensor | None
    loss_divisor: torch.Tensor | None
    dtype: torch.dtype
    stashes: dict[int, Stash] = field(default_factory=dict)
    kept: dict[int, object] = field(default_factory=dict)
    final_norm: tuple | None = None
    norm_grad: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    first_choice: torch.Tensor | None = None
    gradient: Stash | None = None


@dataclass
class KdaKept:
    """Per segment: the recurrent state and the convolution's last inputs before it (None at a document's start)."""

    states: list
    tails: list


@dataclass
class MlaKept:
    outputs: list[Stash]  # per head group, [T, heads * V]
    lses: list[Stash]  # per head group, [heads, T]


class LongSequenceEngine:
    """Runs the parts of one model. Made once; a `Step` is made for every forward pass."""

    def __init__(self, parts: ModelParts, kernels: Kernels, options: EngineOptions, device: torch.device):
        self.clock = KernelClock(device)
        self.parts, self.kernels, self.options = parts, self.clock.watch(kernels), options
        self.device = device
        self.transfer = Transfer(device)
        self.expert_counts: dict[int, torch.Tensor] = {}
        self._plans: dict[tuple, Plan] = {}

    # ---- start of a step

    def start(self, input_ids: torch.Tensor, labels: torch.Tensor | None, loss_divisor, dtype: torch.dtype) -> Step:
        """input_ids [B, T'] -> a step over the packed stream of B * T' tokens."""
        documents = self._documents(input_ids)
        keep = torch.is_grad_enabled()
        plan = self._plan(documents.tokens, dtype, keep)
        self.clock.start(documents.tokens)
        return Step(
            documents=documents,
            plan=plan,
            keep=keep,
            input_ids=input_ids.reshape(-1),
            labels=labels,
            loss_divisor=loss_divisor,
            dtype=dtype,
        )

    def _plan(self, tokens: int, dtype: torch.dtype, keep: bool) -> Plan:
        key = (tokens, keep)
        if key not in self._plans:
            if self.transfer.cuda and tokens > max((known for known, _ in self._plans), default=tokens):
                self.transfer.drain()
                self.transfer.pool.release_free()  # buffers of shorter sequences fit nothing any more
            self._plans[key] = plan_step(
                self.parts.shape,
                tokens,
                element_bytes=dtype.itemsize,
                options=self.options,
                gpu_bytes=self._gpu_bytes(),
                training=keep,
            )
            say(f"engine: {self._plans[key].text}")
        return self._plans[key]

    def reserve(self, tokens: int, dtype: torch.dtype) -> float:
        """Pin the host memory of a training step over this many tokens now; returns GiB pinned.

        Call it before the first step with the longest sequence of the run: pinning costs seconds per 10 GB, and a machine
        with too little memory fails at once and not at the stage that needs it. Shorter steps use the same buffers.
        """
        if not self.transfer.cuda:
            return 0.0
        plan = self._plan(tokens, dtype, True)
        pool = self.transfer.pool
        needed = sorted(host_stashes(self.parts.shape, tokens, plan, element_bytes=dtype.itemsize), reverse=True)
        for buffer in [pool.take(nbytes) for nbytes in needed]:
            pool.give(buffer)
        return pool.total_bytes / 2**30

    def _documents(self, input_ids: torch.Tensor) -> Documents:
        batch, tokens = input_ids.shape
        bounds = set(range(0, batch * tokens + 1, tokens))
        if self.options.document_separator_id is not None:
            places = (input_ids.reshape(-1) == self.options.document_separator_id).nonzero().view(-1).tolist()
            bounds.update(place + 1 for place in places)
        return Documents(tuple(sorted(bounds)))

    def _gpu_bytes(self) -> int | None:
        """Bytes the engine may use: the budget, less what is already allocated (weights that live on the GPU)."""
        if not self.transfer.cuda:
            return None
        total = torch.cuda.get_device_properties(self.device).total_memory
        if self.options.gpu_budget_gib is not None:
            total = min(total, int(self.options.gpu_budget_gib * 2**30))
        return total - torch.cuda.memory_allocated(self.device)

    def _stash(self, step: Step, width: int, where: str, dtype: torch.dtype | None = None) -> Stash:
        return self.transfer.stash(step.documents.tokens, width, dtype or step.dtype, on_gpu=where == "gpu")

    # ---- embedding

    def embed(self, step: Step, weight: torch.Tensor) -> None:
        stash = self._stash(step, weight.shape[1], step.plan.stream)
        for start, end in spans(step.documents.tokens, step.plan.token_tile):
            stash.write(start, end, F.embedding(step.input_ids[start:end], weight))
        step.stashes[0] = stash

    def embed_backward(self, step: Step, weight: torch.Tensor) -> torch.Tensor | None:
        total = None
        if weight.requires_grad:
            total = torch.zeros(weight.shape, dtype=compute_dtype(weight.dtype), device=step.input_ids.device)
            for (start, end), (d,) in read_ahead([step.gradient], spans(step.documents.tokens, step.plan.token_tile)):
                total.index_add_(0, step.input_ids[start:end], d.to(total.dtype))
            if self.parts.padding_id is not None:
                total[self.parts.padding_id] = 0
            total = total.to(weight.dtype)
        step.gradient.free()
        step.gradient = None
        self.clock.finish(self.transfer.pool.total_bytes if self.transfer.cuda else 0)
        return total

    # ---- a layer

    def layer(self, step: Step, index: int) -> None:
        part = self.parts.layers[index]
        weights = part.tensors()
        source = step.stashes[index]
        # without a backward nothing reads the input again, so the layer may write over it
        where = step.plan.gradient if index + 1 == len(self.parts.layers) else step.plan.stream
        target = self._stash(step, self.parts.shape.hidden, where) if step.keep else source
        if part.mixer == "kda":
            kept = self._kda_forward(step, index, weights, source, target)
        else:
            kept = self._mla_forward(step, index, weights, source, target)
        if step.keep:
            step.kept[index] = kept
        else:
            del step.stashes[index]
        step.stashes[index + 1] = target

    def layer_backward(self, step: Step, index: int) -> tuple[dict, Gradients]:
        part = self.parts.layers[index]
        weights = part.tensors()
        gradients = Gradients(weights)
        source = step.stashes.pop(index, None)
        if source is None or step.gradient is None:
            raise RuntimeError("the engine's backward runs once per forward; retain_graph is not supported")
        if part.mixer == "kda":
            self._kda_backward(step, index, weights, source, gradients)
        else:
            self._mla_backward(step, index, weights, source, gradients)
        source.free()
        return weights, gradients

    # What the next sweep over the stream reads first: its copy hides behind the last piece of the sweep before. At the long
    # lengths this is one piece of 32, at the short ones one of two.

    def _first_in_forward(self, step: Step, index: int, source: Stash, last: tuple[int, int]) -> list:
        """Of layer `index` (after the last layer, of the loss) from its input, unless `last`, the piece in work, writes it."""
        size = step.plan.loss_tile
        if index < len(self.parts.layers):
            kda = self.parts.layers[index].mixer == "kda"
            size = self._segments(step)[0][1] if kda else step.plan.projection_tile
        return [(source, 0, size)] if size <= last[0] else []

    def _first_in_backward(self, step: Step, index: int) -> list:
        """Of layer `index` from its input; the embedding's backward (-1) does not read it."""
        if index < 0:
            return []
        kda = self.parts.layers[index].mixer == "kda"
        pieces = self._segments(step)[::-1] if kda else spans(step.documents.tokens, step.plan.projection_tile)
        return [(step.stashes[index], *pieces[0])]

    # ---- MLP and experts of a layer, by token tiles

    def _mlp(self, index: int, w: dict, h: torch.Tensor, *, need_output: bool = True) -> torch.Tensor:
        """Everything between the second residual's ends, for a tile h [n, D]."""
        x = self.kernels.rms_norm(h, w["post_norm"], self.parts.norm_eps)
        if self.parts.layers[index].mlp == "dense":
            return GatedMlp.apply(x, w["gate"], w["up"], w["down"], self.kernels, need_output)
        weights, experts = self._route(w, x)
        if need_output:
            self._count_experts(index, experts, w["expert_gate_up"].shape[0])
        routed = Experts.apply(x, weights, experts, w["expert_gate_up"], w["expert_down"], self.kernels, need_output)
        shared = GatedMlp.apply(x, w["shared_gate"], w["shared_up"], w["shared_down"], self.kernels, need_output)
        return routed + shared

    def _route(self, w: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' KimiLinearTopkRouter, in fp32 always: routing weights [n, k] and expert numbers [n, k]."""
        parts = self.parts
        scores = F.linear(x.float(), w["router"].float()).sigmoid()
        choice = scores.detach() + w["router_bias"]
        if parts.expert_groups > 1:
            grouped = choice.unflatten(-1, (parts.expert_groups, -1))
            best = grouped.topk(2, dim=-1)[0].sum(-1).topk(parts.top_groups, dim=-1, sorted=False)[1]
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        experts = choice.topk(parts.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, experts)
        if parts.normalise_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * parts.routed_scaling, experts

    def _count_experts(self, index: int, experts: torch.Tensor, number: int) -> None:
        if index not in self.expert_counts:
            self.expert_counts[index] = torch.zeros(number, dtype=torch.int64, device=experts.device)
        flat = experts.reshape(-1)
        self.expert_counts[index].scatter_add_(0, flat, torch.ones_like(flat))

    def _mlp_tiles(self, step: Step, index: int, w: dict, h: torch.Tensor) -> torch.Tensor:
        """h + mlp(h) for a segment, in place."""
        for start, end in spans(h.shape[0], step.plan.token_tile):
            h[start:end] += self._mlp(index, w, h[start:end])
        return h

    def _mlp_backward(self, step: Step, index: int, w: dict, h, d, gradients: Gradients) -> torch.Tensor:
        """Gradient at h of h + mlp(h), from that at its output; new tensor."""
        out = torch.empty_like(d)
        mlp_weights = {name: w[name] for name in w if name in _MLP_NAMES}
        for start, end in spans(h.shape[0], step.plan.token_tile):
            tile = Recompute(mlp_weights, h=h[start:end])
            with torch.enable_grad():
                y = self._mlp(index, tile.weights, tile.inputs["h"], need_output=False)
            (dh,) = tile.backward([y], [d[start:end]], gradients)
            torch.add(d[start:end], dh, out=out[start:end])
        return out

    # ---- KDA

    def _segments(self, step: Step) -> list[tuple[int, int]]:
        """Spans of at most segment_tokens tokens and a bounded number of documents (each has a state of its own).

        Halved where documents are many, so that few different lengths occur: fla tunes its l2 norm anew for each.
        """
        found, start, tokens = [], 0, step.documents.tokens
        while start < tokens:
            size = step.plan.segment_tokens
            while (
                size > 1 and len(step.documents.within(start, min(start + size, tokens)).bounds) - 1 > _MOST_DOCUMENTS
            ):
                size = -(-size // 2)
            found.append((start, min(start + size, tokens)))
            start = found[-1][1]
        return found

    def _kda(self, w: dict, x, state, tail, documents: Documents):
        """KDA over a segment x [C, D], before the residual: returns (mixed [C, D], last state, last W-1 inputs of the
        convolution)."""
        shape = self.parts.shape
        heads, size = shape.kda_heads, shape.kda_dim
        normed = self.kernels.rms_norm(x, w["input_norm"], self.parts.norm_eps)
        raw = [F.linear(normed, w[name]) for name in ("q", "k", "v")]
        conv = w["conv"].squeeze(1).split(heads * size)
        tails = (None, None, None) if tail is None else tail.split(heads * size, -1)
        q, k, v = (
            self.kernels.causal_conv(r, c, t, documents).view(-1, heads, size)
            for r, c, t in zip(raw, conv, tails, strict=True)
        )
        g = F.linear(F.linear(normed, w["forget_a"]), w["forget_b"]).view(-1, heads, size)
        beta = F.linear(normed, w["beta"])
        out, state = self.kernels.kda(q, k, v, g, beta, w["A_log"], w["dt_bias"], state, documents)
        gate = F.linear(F.linear(normed, w["gate_a"]), w["gate_b"]).view(-1, heads, size)
        out = self.kernels.gated_norm(out, gate, w["out_norm"], self.parts.norm_eps)
        mixed = F.linear(out.reshape(x.shape[0], -1), w["out"])
        width = shape.conv_width - 1
        last = [r[-width:] for r in raw]
        if x.shape[0] < width:  # a segment shorter than the convolution hands on part of what it was given
            before = (
                x.new_zeros(width, 3 * heads * size) if tail is None or len(documents.bounds) > 2 else tail
            ).split(heads * size, -1)
            last = [torch.cat([b, r])[-width:] for b, r in zip(before, raw, strict=True)]
        last = torch.cat(last, -1)
        if documents.bounds[-1] - documents.bounds[-2] < width and len(documents.bounds) > 2:
            # the last document began inside these taps: what lies before it is not its history
            keep = torch.arange(width, device=x.device) >= width - (documents.bounds[-1] - documents.bounds[-2])
            last = last * keep[:, None]
        return mixed, state, last

    def _kda_forward(self, step: Step, index: int, w: dict, source: Stash, target: Stash) -> KdaKept:
        kept = KdaKept([], [])
        state = tail = None
        pieces = self._segments(step)
        then = self._first_in_forward(step, index + 1, target, pieces[-1])
        for (start, end), (x,) in read_ahead([source], pieces, then):
            if step.documents.starts_at(start):
                state = tail = None
            if step.keep:
                kept.states.append(state)
                kept.tails.append(tail)
            mixed, state, tail = self._kda(w, x, state, tail, step.documents.within(start, end))
            target.write(start, end, self._mlp_tiles(step, index, w, mixed.add_(x)))
        return kept

    def _kda_backward(self, step: Step, index: int, w: dict, source: Stash, gradients: Gradients) -> None:
        kept: KdaKept = step.kept.pop(index)
        own = {name: w[name] for name in w if name not in _MLP_NAMES}
        d_state = d_tail = None
        pieces, then = self._segments(step)[::-1], self._first_in_backward(step, index - 1)
        for (start, end), (x, d) in read_ahead([source, step.gradient], pieces, then):
            state, tail = kept.states.pop(), kept.tails.pop()
            tile = Recompute(own, x=x, state=state, tail=tail)
            with torch.enable_grad():
                i = tile.inputs
                mixed, new_state, new_tail = self._kda(
                    tile.weights, i["x"], i["state"], i["tail"], step.documents.within(start, end)
                )
                h = i["x"] + mixed
            d = self._mlp_backward(step, index, w, h.detach(), d, gradients)
            dx, d_state, d_tail = tile.backward([h, new_state, new_tail], [d, d_state, d_tail], gradients)
            step.gradient.write(start, end, dx)

    # ---- MLA

    def _groups(self, step: Step) -> list[slice]:
        heads = self.parts.shape.mla_heads
        return [slice(start, end) for start, end in spans(heads, step.plan.heads_per_group)]

    def _latent(self, w: dict, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed hidden states [n, D] -> the normed latent [n, L] and the keys' part shared by all heads [n, R]."""
        shape = self.parts.shape
        latent, shared = F.linear(normed, w["kv_a"], w.get("kv_a_bias")).split([shape.latent, shape.shared_key], -1)
        return self.kernels.rms_norm(latent, w["kv_norm"], self.parts.latent_norm_eps), shared

    def _queries(self, w: dict, normed: torch.Tensor, rows: slice) -> torch.Tensor:
        if "q" in w:
            return F.linear(normed, w["q"][rows])
        down = F.linear(normed, w["q_a"], w.get("q_a_bias"))
        return F.linear(self.kernels.rms_norm(down, w["q_norm"], self.parts.latent_norm_eps), w["q_b"][rows])

    def _normed_tiles(self, step: Step, w: dict, source: Stash, normed: torch.Tensor | None):
        """Spans and normed hidden states: from the resident copy, or recomputed from the stash."""
        pieces = spans(step.documents.tokens, step.plan.projection_tile)
        if normed is not None:
            for start, end in pieces:
                yield (start, end), normed[start:end]
            return
        for piece, (x,) in read_ahead([source], pieces):
            yield piece, self.kernels.rms_norm(x, w["input_norm"], self.parts.norm_eps)

    def _prepare_mla(self, step: Step, w: dict, source: Stash):
        """(latent [T, L + R], normed hidden states [T, D] or None) on the device."""
        shape, tokens = self.parts.shape, step.documents.tokens
        latent = torch.empty(tokens, shape.latent + shape.shared_key, dtype=step.dtype, device=self.device)
        resident = None
        if step.plan.normed == "gpu":
            resident = torch.empty(tokens, shape.hidden, dtype=step.dtype, device=self.device)
        for (start, end), normed in self._normed_tiles(step, w, source, None):
            latent[start:end, : shape.latent], latent[start:end, shape.latent :] = self._latent(w, normed)
            if resident is not None:
                resident[start:end] = normed
        return latent, resident

    def _expand(self, step: Step, w: dict, source: Stash, latent, normed, group: slice):
        """q, k, v [T, heads, size] of one head group."""
        shape, tokens, heads = self.parts.shape, step.documents.tokens, group.stop - group.start
        new = lambda size: torch.empty(tokens, heads, size, dtype=step.dtype, device=self.device)  # noqa: E731
        q, k, v = new(shape.qk_dim), new(shape.qk_dim), new(shape.v_dim)
        q_rows = slice(group.start * shape.qk_dim, group.stop * shape.qk_dim)
        kv_b = self._kv_b(w, group)
        for (start, end), x in self._normed_tiles(step, w, source, normed):
            q[start:end] = self._queries(w, x, q_rows).view(-1, heads, shape.qk_dim)
            kv = F.linear(latent[start:end, : shape.latent], kv_b).view(-1, heads, shape.nope_dim + shape.v_dim)
            k[start:end, :, : shape.nope_dim], v[start:end] = kv.split([shape.nope_dim, shape.v_dim], -1)
            k[start:end, :, shape.nope_dim :] = latent[start:end, None, shape.latent :]
        return q, k, v

    def _kv_b(self, w: dict, group: slice) -> torch.Tensor:
        return w["kv_b"][self._kv_rows(group)]

    def _kv_rows(self, group: slice) -> slice:
        size = self.parts.shape.nope_dim + self.parts.shape.v_dim
        return slice(group.start * size, group.stop * size)

    def _attend(self, step: Step, w: dict, source: Stash, latent, normed) -> MlaKept:
        """Attention of every head group into stashes."""
        shape = self.parts.shape
        kept = MlaKept([], [])
        groups, pieces = self._groups(step), spans(step.documents.tokens, step.plan.segment_tokens)
        for group in groups:
            q, k, v = self._expand(step, w, source, latent, normed, group)
            last = group is groups[-1]
            if last:
                for ahead in (source, *kept.outputs):  # as the sweep that follows reads them
                    ahead.prefetch(*pieces[0])
            out, lse = self.kernels.attention.forward(q, k, v, step.documents, shape.qk_dim**-0.5)
            del q, k, v
            where = step.plan.attention_outputs
            stash = self._stash(step, out.shape[1] * shape.v_dim, where)
            for start, end in pieces:
                stash.write(start, end, out[start:end].flatten(1), read_next=last and start == 0)
            kept.outputs.append(stash)
            kept.lses.append(self.transfer.stash(*lse.shape, lse.dtype, on_gpu=where == "gpu"))
            kept.lses[-1].write(0, lse.shape[0], lse)
            del out, lse
        return kept

    def _after_attention(self, w: dict, x, outs) -> torch.Tensor:
        """First residual: x + output projection of all heads, for a tile."""
        return x + F.linear(torch.cat(outs, -1), w["out"], w.get("out_bias"))

    def _mla_forward(self, step: Step, index: int, w: dict, source: Stash, target: Stash) -> MlaKept | None:
        kept = self._attend(step, w, source, *self._prepare_mla(step, w, source))
        pieces = spans(step.documents.tokens, step.plan.segment_tokens)
        then = self._first_in_forward(step, index + 1, target, pieces[-1])
        for (start, end), (x, *outs) in read_ahead([source, *kept.outputs], pieces, then):
            target.write(start, end, self._mlp_tiles(step, index, w, self._after_attention(w, x, outs)))
        if step.keep and step.plan.keep_attention:
            return kept
        for stash in (*kept.outputs, *kept.lses):
            stash.free()
        return None

    def _mla_backward(self, step: Step, index: int, w: dict, source: Stash, gradients: Gradients) -> None:
        kept: MlaKept | None = step.kept.pop(index)
        latent, normed = self._prepare_mla(step, w, source)
        if kept is None:
            kept = self._attend(step, w, source, latent, normed)
        self._mla_output_backward(step, index, w, source, kept, gradients)
        d_latent, d_queries = self._mla_groups_backward(step, w, source, latent, normed, kept, gradients)
        del latent, normed
        self._mla_input_backward(step, index, w, source, d_latent, d_queries, gradients)

    def _mla_output_backward(self, step: Step, index, w, source, kept: MlaKept, gradients: Gradients) -> None:
        """Through the MLP and the output projection's weight; the gradient stash then holds that at the first residual."""
        pieces = spans(step.documents.tokens, step.plan.segment_tokens)
        for (start, end), (x, d, *outs) in read_ahead([source, step.gradient, *kept.outputs], pieces):
            d = self._mlp_backward(step, index, w, self._after_attention(w, x, outs), d, gradients)
            if gradients.wants("out"):
                gradients.add("out", d.t() @ torch.cat(outs, -1))
            if gradients.wants("out_bias"):
                gradients.add("out_bias", d.sum(0, dtype=compute_dtype(d.dtype)))
            step.gradient.write(start, end, d)
        gradients.round([*_MLP_NAMES, "out"])

    def _mla_groups_backward(self, step: Step, w, source, latent, normed, kept: MlaKept, gradients: Gradients):
        """Attention's backward, head group by head group: returns the latent's gradient [T, L + R] (fp32) and the
        queries' as stashes, group by group."""
        shape, tokens = self.parts.shape, step.documents.tokens
        d_latent = torch.zeros(latent.shape, dtype=compute_dtype(latent.dtype), device=latent.device)
        d_queries: list[Stash] = []
        groups, pieces = self._groups(step), spans(tokens, step.plan.projection_tile)
        for number, group in enumerate(groups):
            heads = group.stop - group.start
            # started here, the copy of a whole group hides behind the projections and takes no memory beside attention's own
            kept.outputs[number].prefetch(0, tokens)
            kept.lses[number].prefetch(0, heads)
            q, k, v = self._expand(step, w, source, latent, normed, group)
            columns = w["out"][:, group.start * shape.v_dim : group.stop * shape.v_dim]
            d_out = torch.empty_like(v)
            for (start, end), (d,) in read_ahead([step.gradient], pieces):
                d_out[start:end] = (d @ columns).view(-1, heads, shape.v_dim)
            out, lse = kept.outputs[number].read(0, tokens).view_as(v), kept.lses[number].read(0, heads)
            last = group is groups[-1]
            if last:
                for ahead in (source, step.gradient, *d_queries):  # as the sweep that follows reads them
                    ahead.prefetch(*pieces[0])
            dq, dk, dv = self.kernels.attention.backward(d_out, q, k, v, out, lse, step.documents, shape.qk_dim**-0.5)
            del q, k, v, out, lse, d_out
            kept.outputs[number].free()
            kept.lses[number].free()
            self._kv_b_backward(step, w, latent, group, dk, dv, d_latent, gradients)
            del dk, dv
            d_queries += self._keep_query_gradient(step, dq, read_next=last)
            del dq  # before the next group is expanded: these three are 8 GiB for 4 heads at 2M
        return d_latent, d_queries

    def _keep_query_gradient(self, step: Step, dq: torch.Tensor, *, read_next: bool) -> list[Stash]:
        """dq [T, heads, K] into stashes of `query_gradient_sizes` columns per head."""
        sizes = query_gradient_sizes(self.parts.shape)
        stashes = [self._stash(step, dq.shape[1] * size, step.plan.query_gradients) for size in sizes]
        for stash, part in zip(stashes, dq.split(sizes, -1), strict=True):
            for start, end in spans(dq.shape[0], step.plan.projection_tile):
                stash.write(start, end, part[start:end].flatten(1), read_next=read_next and start == 0)
        return stashes

    def _kv_b_backward(self, step: Step, w, latent, group: slice, dk, dv, d_latent, gradients: Gradients) -> None:
        shape, rows, weight = self.parts.shape, self._kv_rows(group), self._kv_b(w, group)
        for start, end in spans(step.documents.tokens, step.plan.projection_tile):
            d_kv = torch.cat([dk[start:end, :, : shape.nope_dim], dv[start:end]], -1).flatten(1)
            d_latent[start:end, : shape.latent] += matmul_wide(d_kv, weight)
            d_latent[start:end, shape.latent :] += dk[start:end, :, shape.nope_dim :].sum(1, dtype=d_latent.dtype)
            if gradients.wants("kv_b"):
                grad = matmul_wide(d_kv.t(), latent[start:end, : shape.latent])
                gradients.add("kv_b", grad, rows=rows, shape=w["kv_b"].shape)

    def _mla_input_backward(
        self, step: Step, index: int, w, source, d_latent, d_queries: list[Stash], gradients: Gradients
    ) -> None:
        """From the gradients of queries, latent and shared key to the layer's input; rewrites the gradient stash."""
        shape = self.parts.shape
        own = {name: w[name] for name in w if name in _MLA_INPUT_NAMES}
        pieces = spans(step.documents.tokens, step.plan.projection_tile)
        sizes = query_gradient_sizes(shape)
        then = self._first_in_backward(step, index - 1)
        for (start, end), (x, d, *parts) in read_ahead([source, step.gradient, *d_queries], pieces, then):
            columns = [
                torch.cat([p.unflatten(1, (-1, size)) for p in parts[i :: len(sizes)]], 1)
                for i, size in enumerate(sizes)
            ]
            dq = torch.cat(columns, -1).flatten(1)
            tile = Recompute(own, x=x)
            with torch.enable_grad():
                normed = self.kernels.rms_norm(tile.inputs["x"], tile.weights["input_norm"], self.parts.norm_eps)
                queries = self._queries(tile.weights, normed, slice(None))
                latent, shared = self._latent(tile.weights, normed)
            d_own = d_latent[start:end].to(step.dtype).split([shape.latent, shape.shared_key], -1)
            (dx,) = tile.backward([queries, latent, shared], [dq, *d_own], gradients)
            step.gradient.write(start, end, d + dx)
        for stash in d_queries:
            stash.free()

    # ---- final norm and loss

    def loss(self, step: Step, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean cross-entropy of the stream and, if a backward follows, the head's gradient.

        Logits exist for one tile only. The gradient of the loss is computed here, tile by tile, and written over the
        hidden states; a later backward only scales it.
        """
        stash = step.stashes.pop(len(self.parts.layers))
        norm_weight, want_norm_grad = step.final_norm
        tokens, dtype = step.documents.tokens, compute_dtype(step.dtype)
        divisor = float(step.loss_divisor)
        scale = 1 / divisor if divisor else float("nan")
        total = torch.zeros((), dtype=torch.float64, device=step.labels.device)
        head_grad = (
            torch.zeros(head.shape, dtype=dtype, device=head.device) if step.keep and head.requires_grad else None
        )
        norm_gradients = Gradients({"norm": norm_weight.requires_grad_(want_norm_grad)})
        losses, choices = [], []
        then = self._first_in_backward(step, len(self.parts.layers) - 1) if step.keep else []
        for (start, end), (x,) in read_ahead([stash], spans(tokens, step.plan.loss_tile), then):
            tile = Recompute({"norm": norm_weight}, x=x)
            with torch.set_grad_enabled(step.keep):
                normed = self.kernels.rms_norm(tile.inputs["x"], tile.weights["norm"], self.parts.norm_eps)
            with self.clock.region("loss"):
                loss, first_choice, d_hidden = self._loss_tile(
                    step, normed.detach(), head, start, end, scale, head_grad
                )
            total += loss.sum(dtype=torch.float64)
            losses.append(loss)
            choices.append(first_choice)
            if not step.keep:
                continue
            (dx,) = tile.backward([normed], [d_hidden], norm_gradients)
            stash.write(start, end, dx)
        step.token_losses, step.first_choice = torch.cat(losses), torch.cat(choices)
        if step.keep:
            step.gradient = stash
            step.norm_grad = norm_gradients.result(["norm"], {"norm": norm_weight})[0]
        else:
            stash.free()
        return (total / divisor if divisor else total * scale).to(dtype), head_grad

    def _loss_tile(self, step: Step, hidden, head, start: int, end: int, scale: float, head_grad):
        """(losses [n], first choices [n], gradient of `hidden` or None) of a tile; adds to `head_grad` if there is one."""
        logits = F.linear(hidden, head)
        losses, first_choice = self.kernels.cross_entropy(logits, step.labels[start:end], scale, step.keep)
        if head_grad is not None:
            head_grad += matmul_wide(logits.t(), hidden)
        return losses, first_choice, logits @ head if step.keep else None

    def scale_gradient(self, step: Step, factor: torch.Tensor) -> float:
        """Bring the gradient stash to the scale of the loss's incoming gradient (1 / accumulation steps, say)."""
        value = float(factor)
        if value != 1.0:
            pieces = spans(step.documents.tokens, step.plan.token_tile)
            for (start, end), (d,) in read_ahead([step.gradient], pieces):
                step.gradient.write(start, end, d * value)
            if step.norm_grad is not None:
                step.norm_grad = step.norm_grad * value
        return value


_MOST_DOCUMENTS = 256  # per KDA segment: each takes a state of its own (2 MB at 32 heads of 128 x 128 in fp32)
_MLP_NAMES = frozenset(
    "post_norm gate up down router router_bias expert_gate_up expert_down shared_gate shared_up shared_down".split()
)
_MLA_INPUT_NAMES = frozenset("input_norm q q_a q_a_bias q_norm q_b kv_a kv_a_bias kv_norm".split())


# ---------------------------------------------------------------------------------------------- autograd


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dummy, engine: LongSequenceEngine, step: Step, weight):
        ctx.engine, ctx.step = engine, step
        engine.embed(step, weight)
        return torch.zeros_like(dummy)

    @staticmethod
    def backward(ctx, d_dummy):
        weight = ctx.engine.parts.embedding.tensors()["weight"]
        return d_dummy, None, None, ctx.engine.embed_backward(ctx.step, weight)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dummy, engine: LongSequenceEngine, step: Step, index: int, *tensors):
        ctx.engine, ctx.step, ctx.index = engine, step, index
        engine.layer(step, index)
        return torch.zeros_like(dummy)

    @staticmethod
    def backward(ctx, d_dummy):
        weights, gradients = ctx.engine.layer_backward(ctx.step, ctx.index)
        return d_dummy, None, None, None, *gradients.result(list(weights), weights)


class _Norm(torch.autograd.Function):
    """The final norm's arithmetic runs inside the loss, tile by tile; its weight is handed on, its gradient comes back."""

    @staticmethod
    def forward(ctx, dummy, step: Step, weight):
        ctx.step = step
        step.final_norm = (weight.detach().clone(), weight.requires_grad and step.keep)
        return torch.zeros_like(dummy)

    @staticmethod
    def backward(ctx, d_dummy):
        return d_dummy, None, ctx.step.norm_grad


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dummy, engine: LongSequenceEngine, step: Step, head):
        ctx.engine, ctx.step = engine, step
        loss, ctx.head_grad = engine.loss(step, head)
        ctx.head_dtype, ctx.dummy_shape = head.dtype, dummy.shape
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        if ctx.step.gradient is None:
            raise RuntimeError("the engine's backward runs once per forward; retain_graph is not supported")
        factor = ctx.engine.scale_gradient(ctx.step, d_loss)
        head_grad, ctx.head_grad = ctx.head_grad, None
        if head_grad is not None:
            head_grad = head_grad.mul_(factor).to(ctx.head_dtype)
        return d_loss.new_zeros(ctx.dummy_shape), None, None, head_grad


def run_embedding(engine: LongSequenceEngine, step: Step) -> torch.Tensor:
    """Returns the dummy that carries autograd from module to module."""
    dummy = torch.zeros(1, device=step.input_ids.device, requires_grad=step.keep)
    return _Embedding.apply(dummy, engine, step, engine.parts.embedding.tensors()["weight"])


def run_layer(engine: LongSequenceEngine, step: Step, index: int, dummy: torch.Tensor) -> torch.Tensor:
    return _Layer.apply(dummy, engine, step, index, *engine.parts.layers[index].tensors().values())


def run_norm(engine: LongSequenceEngine, step: Step, dummy: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(dummy, step, engine.parts.norm.tensors()["weight"])


def run_loss(engine: LongSequenceEngine, step: Step, dummy: torch.Tensor) -> torch.Tensor:
    return _Loss.apply(dummy, engine, step, engine.parts.head.tensors()["weight"])
