"""The Triton kernels this project writes itself; imported on GPU machines only (kernels.py chooses).

    gated(h, weight)                    silu(gate) * up * routing weight
    gated_backward(h, da, weight)       its gradients and its output, in one pass over h
    combine(y, places)                  sum of each token's expert rows
    cross_entropy(logits, labels, ...)  loss of each row, gradient written over the logits
    rms_norm(x, weight, eps)            the model's RMS norm, with its backward
    gated_norm(out, gate, weight, eps)  the norm behind KDA, times sigmoid(gate), with its backward

All are bound by memory traffic: each reads its inputs once (cross_entropy twice) and writes its outputs once, where
the eager torch chains they replace go through memory four to ten times as often. Their plain references, with the same
names, are in kernels.py. Arithmetic inside is fp32; offsets are 64-bit, since a tile may hold more than 2^31 numbers.

Symbols: S rows sorted by expert, F width of the gated MLP, D hidden size (in the norms: a row's width), n tokens,
k experts per token, V vocabulary (in the gated norm: value size).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NORM_PROGRAMS = 1024  # at most, in a norm's backward: each leaves one row of the weight's gradient


@triton.jit
def _gated_kernel(h, weight, out, F, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gate = tl.load(h + row * 2 * F + columns, mask=mask).to(tl.float32)
    up = tl.load(h + row * 2 * F + F + columns, mask=mask).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if HAS_WEIGHT:
        value *= tl.load(weight + row).to(tl.float32)
    tl.store(out + row * F + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward_kernel(h, da, weight, dh, out, dweight, F, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = 1.0
    if HAS_WEIGHT:
        scale = tl.load(weight + row).to(tl.float32)
    total = 0.0
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < F
        gate = tl.load(h + row * 2 * F + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * F + F + columns, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(da + row * F + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if HAS_WEIGHT:
            total += tl.sum(d * silu * up, 0)
        d *= scale
        dgate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dh + row * 2 * F + columns, dgate.to(dh.dtype.element_ty), mask=mask)
        tl.store(dh + row * 2 * F + F + columns, (d * silu).to(dh.dtype.element_ty), mask=mask)
        tl.store(out + row * F + columns, (silu * up * scale).to(out.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight + row, total)


@triton.jit
def _combine_kernel(y, places, out, D, k: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(k):
        row = tl.load(places + token * k + j).to(tl.int64)
        total += tl.load(y + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_kernel(logits, labels, losses, first_choice, scale, V, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    if label == -100:
        tl.store(losses + row, 0.0)
        tl.store(first_choice + row, 0)
        if WANT_GRAD:
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(logits + columns, tl.zeros((BLOCK,), dtype=logits.dtype.element_ty), mask=columns < V)
        return
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
    picked = tl.load(logits + label).to(tl.float32)
    lse = largest + tl.log(total)
    tl.store(losses + row, lse - picked)
    tl.store(first_choice + row, (picked >= largest).to(tl.int8))
    if WANT_GRAD:
        # every thread has read the label's logit before any thread overwrites it
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(columns == label, 1.0, 0.0)
            tl.store(logits + columns, (grad * scale).to(logits.dtype.element_ty), mask=columns < V)


@triton.jit
def _norm_kernel(
    x,
    gate,
    weight,
    out,
    rows,
    x_stride,
    gate_stride,
    eps,
    D: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (columns < D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    if GATED:
        raw = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
        value = w * normed * tl.sigmoid(raw)
    else:
        value = w * normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * D + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    partial,
    rows,
    x_stride,
    gate_stride,
    dy_stride,
    eps,
    D: tl.constexpr,
    GATED: tl.constexpr,
    WANT_DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    if WANT_DWEIGHT:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & (columns < D)
        wide = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
        if GATED:
            raw = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(raw)
            d *= sigmoid
            share = d * wide * rstd
            d *= w
            slope = d * wide * rstd * (1 - sigmoid)
            tl.store(dgate + row * D + columns, slope.to(dgate.dtype.element_ty), mask=mask)
        else:
            share = d * (wide * rstd).to(x.dtype.element_ty).to(tl.float32)
            d *= w
        if WANT_DWEIGHT:
            total += share
        # both sums over the row wait for nothing but the loads
        along = tl.sum(d * wide, 1)[:, None] / D
        result = rstd * (d - wide * (rstd * rstd * along))
        tl.store(dx + row * D + columns, result.to(dx.dtype.element_ty), mask=mask)
    if WANT_DWEIGHT:
        place = partial + tl.program_id(0) * D + columns
        tl.store(place, tl.sum(total, 0)[None, :], mask=columns < D)


def gated(h_S2F: torch.Tensor, weight_S: torch.Tensor | None) -> torch.Tensor:
    rows, width = h_S2F.shape[0], h_S2F.shape[1] // 2
    out = h_S2F.new_empty(rows, width)
    if rows:
        grid = (rows, triton.cdiv(width, 1024))
        _gated_kernel[grid](h_S2F, weight_S, out, width, HAS_WEIGHT=weight_S is not None, BLOCK=1024)
    return out


def gated_backward(h_S2F: torch.Tensor, da_SF: torch.Tensor, weight_S: torch.Tensor | None):
    rows, width = da_SF.shape
    dh, out = torch.empty_like(h_S2F), torch.empty_like(da_SF)
    dweight = None if weight_S is None else torch.empty_like(weight_S)
    if rows:
        _gated_backward_kernel[(rows,)](
            h_S2F, da_SF.contiguous(), weight_S, dh, out, dweight, width, HAS_WEIGHT=weight_S is not None, BLOCK=1024
        )
    return dh, out, dweight


def combine(y_SD: torch.Tensor, places_nk: torch.Tensor) -> torch.Tensor:
    tokens, k = places_nk.shape
    out = y_SD.new_empty(tokens, y_SD.shape[1])
    if tokens:
        grid = (tokens, triton.cdiv(y_SD.shape[1], 1024))
        _combine_kernel[grid](y_SD, places_nk, out, y_SD.shape[1], k=k, BLOCK=1024)
    return out


def cross_entropy(logits_nV: torch.Tensor, label_n: torch.Tensor, scale: float, want_grad: bool):
    tokens, vocabulary = logits_nV.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits_nV.device)
    first_choice = torch.empty(tokens, dtype=torch.bool, device=logits_nV.device)
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits_nV,
            label_n,
            losses,
            first_choice.view(torch.int8),
            scale,
            vocabulary,
            WANT_GRAD=want_grad,
            BLOCK=4096,
            num_warps=16,
        )
    return losses, first_choice


class _Norm(torch.autograd.Function):
    """Both norms; the plain one has no gate. Nothing is kept but the inputs: the backward holds whole rows anyway, so
    their sums cost no memory traffic. The weight's gradient is summed in fp32 without atomic additions: equal inputs
    give equal bits.
    """

    @staticmethod
    def forward(ctx, x, gate, weight, eps: float):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        out = x.new_empty(x.shape)
        x_nD, gate_nD, rows, sizes = *_rows(x, gate), *_norm_sizes(x)
        if rows:
            _norm_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
                x_nD, gate_nD, weight, out, rows, x_nD.stride(0), _stride(gate_nD), eps, GATED=gate is not None, **sizes
            )
        return out

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight = ctx.saved_tensors
        dx, dgate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
        x_nD, gate_nD, dy_nD, rows, sizes = *_rows(x, gate, dy), *_norm_sizes(x)
        programs = min(triton.cdiv(rows, sizes["ROWS"]), NORM_PROGRAMS)
        want_dweight = ctx.needs_input_grad[2]
        partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if want_dweight else None
        if rows:
            _norm_backward_kernel[(programs,)](
                x_nD,
                gate_nD,
                weight,
                dy_nD,
                dx,
                dgate,
                partial,
                rows,
                x_nD.stride(0),
                _stride(gate_nD),
                dy_nD.stride(0),
                ctx.eps,
                GATED=gate is not None,
                WANT_DWEIGHT=want_dweight,
                **sizes,
            )
        return dx, dgate, partial.sum(0).to(weight.dtype) if want_dweight else None, None


def _rows(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """[..., D] as [n, D] whose columns lie side by side; rows of a slice stay where they are."""
    flat = [None if x is None else x.reshape(-1, x.shape[-1]) for x in tensors]
    return [x if x is None or x.stride(1) == 1 else x.contiguous() for x in flat]


def _stride(x_nD: torch.Tensor | None) -> int:
    return 0 if x_nD is None else x_nD.stride(0)


def _norm_sizes(x: torch.Tensor) -> tuple[int, dict[str, int]]:
    """(rows, the kernels' constants): a program holds one row or, of narrow ones, as many as fill its threads."""
    D = x.shape[-1]
    block = triton.next_power_of_2(D)
    tile = {"D": D, "BLOCK": block, "ROWS": max(1, 2048 // block), "num_warps": 8}
    return x.numel() // D, tile


def rms_norm(x_nD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return _Norm.apply(x_nD, None, weight_D, eps)


def gated_norm(out: torch.Tensor, gate: torch.Tensor, weight_V: torch.Tensor, eps: float) -> torch.Tensor:
    return _Norm.apply(out, gate, weight_V, eps)
